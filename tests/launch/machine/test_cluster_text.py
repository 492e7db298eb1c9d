"""What doctor writes is a cluster that Bagualu reads."""

from dataclasses import replace

import pytest
import yaml

from bagualu.comm.cluster_file import read_cluster
from bagualu.comm.topology import Cluster
from bagualu.launch.machine.cluster_text import cluster_text
from bagualu.launch.machine.disk import DiskFigures
from bagualu.launch.machine.figures import LinkTime, RankFigures
from tests.launch.machine.test_figures import ONE

DISK = DiskFigures("/runs", 2e8, 8e8, 0.01, 10**12)
LINKS = [LinkTime(kind, size, 2, 1e-4 + size / 1e9) for kind in ("all_reduce", "p2p") for size in (2**10, 2**24)]


def read(*measured: RankFigures, disk: DiskFigures | None = DISK) -> Cluster:
    return read_cluster(yaml.safe_load(cluster_text(measured, disk)), "this", "this.yaml")


def test_ranks_of_a_cpu_have_figures_for_each_number_of_ranks() -> None:
    cluster = read(replace(ONE, ranks=1, links=[]), replace(ONE, links=LINKS, memory_bytes=5 * 10**9))
    alone, two = (cluster.for_world(world).parts[0] for world in (1, 2))
    assert (alone.chip.type, alone.chip.memory_bytes, two.chip.memory_bytes) == ("cpu", 10**10, 5 * 10**9)
    assert [row.fraction for row in two.chip.efficiency["bfloat16"]] == [0.25, 1.0]
    assert two.chip.operators["aten.silu.default"][0].seconds == 1e-4
    assert two.tiers[0].bytes_per_second == pytest.approx(1e9, rel=0.3)
    storage = cluster.for_world(2).storage
    assert storage is not None
    assert (storage.write_bytes_per_second, storage.read_bytes_per_second, storage.device_bytes_per_second) == (1e8, 4e8, 8e8)


def test_ranks_with_a_gpu_each_have_the_same_figures_whatever_their_number() -> None:
    links = [replace(one, ranks=4) for one in LINKS]
    cluster = read(replace(ONE, ranks=4, device="cuda", name="NVIDIA H200", cores=132, operators=[], links=links))
    chip = cluster.for_world(2).parts[0].chip
    assert (cluster.devices, chip.type, chip.vendor, chip.cores) == (4, "cuda", "NVIDIA", 132)


def test_a_single_gpu_has_no_links() -> None:
    cluster = read(replace(ONE, ranks=1, device="cuda", operators=[], links=[]), disk=None)
    assert (cluster.for_world(1).devices, cluster.for_world(1).storage) == (1, None)
