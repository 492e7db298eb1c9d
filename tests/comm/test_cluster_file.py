"""Cluster files: those that ship, and what is refused with file, key and fix."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bagualu.comm.cluster_file import cluster_names, load_cluster, read_cluster
from bagualu.comm.cost import collective_seconds
from bagualu.comm.errors import RecipeError
from bagualu.comm.topology import OperatorTime, ShapeEfficiency

FOLDER = Path(__file__).parents[2] / "recipes/cluster"
SINGLE = """
chip:
  name: chip
  vendor: vendor
  matmul_flops_per_second: {bfloat16: 1.0e+14}
  memory_bytes: 80000000000
  memory_bytes_per_second: 2.0e+12
  launch_seconds: 4.0e-06
  context_bytes: 1000000000
tiers:
  node: {devices: 8, latency_seconds: 1.0e-06, bytes_per_second: 1.0e+11}
  network: {latency_seconds: 5.0e-06, bytes_per_second: 1.0e+10, oversubscription: 2}
start_seconds: 1.0e-05
algorithms: [rings, tree]
storage: {read_bytes_per_second: 1.0e+08, write_bytes_per_second: 1.0e+08, device_bytes_per_second: 1.0e+09}
failures_per_device_hour: {all: 1.0e-05}
"""
MIXED = """
parts:
  h100: {devices: 16}
  a100: {devices: 8}
joint: {latency_seconds: 5.0e-06, bytes_per_second: 1.0e+10}
start_seconds: 1.0e-05
"""
SHARED = """
ranks:
  1:
    chip: &chip
      name: cores
      vendor: vendor
      type: cpu
      matmul_flops_per_second: {bfloat16: 8.0e+11}
      memory_bytes: 32000000000
      memory_bytes_per_second: 2.0e+10
      launch_seconds: 5.0e-06
      context_bytes: 300000000
      operators: {aten.silu.default: [{dtype: bfloat16, work: 2097152, seconds: 1.0e-04}]}
  2:
    chip: {<<: *chip, memory_bytes: 16000000000, matmul_flops_per_second: {bfloat16: 4.0e+11}}
    tiers: {loopback: {latency_seconds: 5.0e-05, bytes_per_second: 2.0e+09, relative: {all_reduce: 3}}}
    start_seconds: 1.0e-05
    storage: {read_bytes_per_second: 1.0e+09, write_bytes_per_second: 1.0e+08, device_bytes_per_second: 1.0e+09}
"""


def document(text: str, change: Callable[[Any], Any] | None = None) -> Any:
    values = yaml.safe_load(text)
    if change:
        change(values)
    return values


@pytest.mark.parametrize("name", cluster_names())
def test_the_clusters_that_ship_are_complete(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    for part in cluster.parts:
        assert part.chip.peak("bfloat16") > 1e13
        assert part.chip.context_bytes < part.chip.memory_bytes
        assert part.chip.memory_bytes_per_second < part.chip.peak("bfloat16")


def test_the_clusters_that_are_promised_ship() -> None:
    promised = {"a100_40gb", "a100", "h100", "h200", "h800", "b200", "gb200", "gb300", "mi300x", "sw26010pro", "ascend910b"}
    assert promised <= set(cluster_names())
    assert len([name for name in cluster_names() if load_cluster(name).joint is not None]) == 1


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_figure_names_its_source(path: Path) -> None:
    """A number of the list at the top, which names a document, or the word that says that there is none. A table of efficiencies
    has one source."""
    text = path.read_text()
    listed = set(re.findall(r"^# (\[\d+\]) \S", text, re.MULTILINE))
    used = set()
    for line in text.splitlines():
        if re.match(r"\s*(\w+: (\d|\[)|efficiency:)", line):
            comment = line.partition(" # ")[2]
            assert re.match(r"\[\d+\]|estimate: |an example", comment), line
            used |= set(re.findall(r"\[\d+\]", comment))
    assert used == listed


def test_the_sunway_is_that_of_the_paper() -> None:
    chip, (supernode, machine) = (part := load_cluster("sw26010pro").parts[0]).chip, part.tiers
    assert (chip.memory_bytes, chip.peak("float16")) == (96e9, 55.3e12)
    assert chip.memory_bytes_per_second == pytest.approx(307e9, rel=0.001)
    assert supernode.devices == 256
    assert machine.oversubscription == pytest.approx(16 / 3)


def test_failures_of_h100_are_those_of_llama_3() -> None:
    rates = load_cluster("h100").parts[0].failures_per_device_hour
    assert sum(rates.values()) * 16384 * 54 * 24 == pytest.approx(419, rel=0.001)


def test_a_file_is_read_into_dataclasses() -> None:
    cluster = read_cluster(document(SINGLE), "test", "test.yaml")
    (part,) = cluster.parts
    assert (part.chip.memory_bytes, type(part.chip.memory_bytes)) == (80 * 10**9, int)
    assert [(tier.name, tier.devices, tier.oversubscription) for tier in part.tiers] == [("node", 8, 1.0), ("network", None, 2.0)]
    assert cluster.algorithms == ("rings", "tree")
    assert cluster.storage is not None
    assert cluster.devices is None


def test_an_optional_key_may_be_null() -> None:
    keys = ("devices", "storage", "algorithms", "failures_per_device_hour")
    cluster = read_cluster(document(SINGLE, lambda values: values.update(dict.fromkeys(keys))), "test", "test.yaml")
    assert (cluster.devices, cluster.storage, cluster.algorithms, cluster.parts[0].failures_per_device_hour) == (None, None, (), {})


def test_numbers_may_be_written_without_point_or_sign() -> None:
    """YAML 1.1 reads 1e11 as text."""
    cluster = read_cluster(document(SINGLE.replace("1.0e+11", "1e11")), "test", "test.yaml")
    assert cluster.parts[0].tiers[0].bytes_per_second == 1e11


def test_ranks_that_share_processors_have_the_figures_measured_with_as_many() -> None:
    cluster = read_cluster(document(SHARED), "this", "this.yaml")
    alone, two = (cluster.for_world(world) for world in (1, 2))
    assert [one.parts[0].chip.memory_bytes for one in (alone, two)] == [32 * 10**9, 16 * 10**9]
    assert [one.devices for one in (alone, two)] == [1, 2]
    assert collective_seconds(alone, "all_reduce", 1e6, range(1)) == 0
    assert collective_seconds(two, "p2p", 2e9, range(2)) == pytest.approx(1.0, rel=0.001)
    assert collective_seconds(two, "all_gather", 4e9, range(2)) == pytest.approx(1.0, rel=0.001)
    assert collective_seconds(two, "all_reduce", 6e9, range(2)) == pytest.approx(1.0, rel=0.001)
    assert [one.storage is not None for one in (alone, two)] == [False, True]
    assert alone.parts[0].chip.operators == {"aten.silu.default": (OperatorTime("bfloat16", 2097152, 1e-4),)}
    with pytest.raises(RecipeError, match=r"world=3: cluster=this was measured with 1 or 2 ranks.*give world=2"):
        cluster.for_world(3)


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        (lambda values: values.update(ranks={}), "must have a section for each number of ranks"),
        (lambda values: values.update(ranks={"two": values["ranks"][2]}), "must have a section for each number of ranks"),
        (lambda values: values.update(devices=2), "unknown key devices"),
        (lambda values: values["ranks"][2].pop("tiers"), "ranks.2.tiers is missing"),
        (lambda values: values["ranks"][2]["tiers"]["loopback"]["relative"].update(gather=2), "unknown key .*relative.gather"),
        (lambda values: values["ranks"][2]["tiers"]["loopback"]["relative"].update(p2p=0), "p2p=0 must be a finite"),
        (lambda values: values["ranks"][2].update(start_second=1), "did you mean ranks.2.start_seconds"),
        (lambda values: values["ranks"][1]["chip"].update(type="gpu"), "type=gpu must be cpu or cuda"),
        (lambda values: values["ranks"][1]["chip"].update(operators={"aten.silu.default": 1.0}), "must be a list, e.g. .*work"),
        (lambda values: values["ranks"][1]["chip"]["operators"]["aten.silu.default"][0].update(seconds=0), "seconds=0 must be a"),
    ],
)
def test_a_shared_machine_is_refused_with_key_and_fix(change: Callable[[Any], Any], fix: str) -> None:
    with pytest.raises(RecipeError, match=fix) as refused:
        read_cluster(document(SHARED, change), "this", "this.yaml")
    assert "this.yaml" in str(refused.value)


def test_this_is_known_once_it_has_been_measured(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^cluster=this has not been measured yet; run bagualu doctor$"):
        load_cluster("this", [tmp_path])
    (tmp_path / "this.yaml").write_text(SHARED)
    assert load_cluster("this", [tmp_path]).for_world(2).name == "this"


def test_an_efficiency_table_is_read_and_may_be_left_out() -> None:
    assert read_cluster(document(SINGLE), "test", "test.yaml").parts[0].chip.efficiency == {}
    rows = [{"m": 4096, "n": 4096, "k": 1024, "fraction": 0.7}]
    values = document(SINGLE, lambda values: values["chip"].update(efficiency={"bfloat16": rows}))
    table = read_cluster(values, "test", "test.yaml").parts[0].chip.efficiency
    assert table == {"bfloat16": (ShapeEfficiency(4096, 4096, 1024, 0.7),)}


def test_a_mixed_cluster_takes_its_parts_from_other_files() -> None:
    cluster = read_cluster(document(MIXED), "test", "test.yaml")
    assert [(part.chip.vendor, part.devices) for part in cluster.parts] == [("NVIDIA", 16), ("NVIDIA", 8)]
    assert cluster.parts[1] == load_cluster("a100").for_world(8).parts[0]
    assert cluster.devices == 24


def test_files_of_the_user_are_found_in_their_folders_and_by_path(tmp_path: Path) -> None:
    (tmp_path / "this.yaml").write_text(SINGLE)
    assert load_cluster("this", [tmp_path]).parts[0].chip.name == "chip"
    assert load_cluster(str(tmp_path / "this.yaml")).name == "this"
    assert "this" in cluster_names([tmp_path, tmp_path / "missing"])
    assert "this" not in cluster_names()


def test_a_mixed_cluster_that_names_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(MIXED.replace("h100:", "own:"))
    with pytest.raises(RecipeError, match=r"own\.yaml: parts\.own: cluster=own is mixed itself"):
        load_cluster("own", [tmp_path])


def test_an_unknown_name_is_refused_with_the_nearest_and_all_others() -> None:
    with pytest.raises(RecipeError) as refusal:
        load_cluster("h10")
    message = str(refusal.value)
    assert message.startswith("cluster=h10 is unknown; did you mean cluster=h100? There are a100, a100_40gb, ")
    assert "\n" not in message
    with pytest.raises(RecipeError, match=r"cluster=x\.yaml is no file; give one of a100"):
        load_cluster("x.yaml")


def refusals() -> list[tuple[str, Callable[[Any], Any], str]]:
    """Returns (text of the file, change to its values, message after the name of the file)."""
    return [
        (SINGLE, lambda v: v["chip"].pop("memory_bytes"), "chip.memory_bytes is missing; give memory_bytes: 84942000000"),
        (SINGLE, lambda v: v["chip"].update(memory_bytes=0), "chip.memory_bytes=0 must be a finite number above 0"),
        (SINGLE, lambda v: v["chip"].update(memory_bytes=-1), "chip.memory_bytes=-1 must be a finite number above 0"),
        (SINGLE, lambda v: v["chip"].update(memory_bytes=1.5), "chip.memory_bytes=1.5 must be a whole number"),
        (SINGLE, lambda v: v["chip"].update(memory_bytes=True), "chip.memory_bytes=True must be a finite number above 0"),
        (SINGLE, lambda v: v["chip"].update(memory_bytes="80 GB"), "chip.memory_bytes=80 GB must be a finite number above 0"),
        (SINGLE, lambda v: v["chip"].update(memory=1), "unknown key chip.memory; did you mean chip.memory_bytes?"),
        (SINGLE, lambda v: v["chip"].update(name=None), "chip.name is missing; give name: H100 SXM5 80GB"),
        (SINGLE, lambda v: v["chip"].pop("context_bytes"), "chip.context_bytes is missing"),
        (SINGLE, lambda v: v["chip"].pop("launch_seconds"), "chip.launch_seconds is missing"),
        (SINGLE, lambda v: v["chip"].pop("matmul_flops_per_second"), "chip.matmul_flops_per_second is missing"),
        (SINGLE, lambda v: v["chip"].update(matmul_flops_per_second={}), "chip.matmul_flops_per_second={} must have keys"),
        (
            SINGLE,
            lambda v: v["chip"]["matmul_flops_per_second"].update(bfloat16=float("inf")),
            "chip.matmul_flops_per_second.bfloat16=inf must be a finite number above 0",
        ),
        (
            SINGLE,
            lambda v: v["chip"].update(efficiency={"bfloat16": [{"m": 1, "n": 1, "k": 1, "fraction": 1.1}]}),
            "chip.efficiency.bfloat16[0].fraction=1.1 must be at most 1",
        ),
        (SINGLE, lambda v: v["chip"].update(efficiency={"bfloat16": 0.5}), "chip.efficiency.bfloat16=0.5 must be a list"),
        (SINGLE, lambda v: v.pop("chip"), "chip is missing; give a section with name"),
        (SINGLE, lambda v: v.update(chip=3), "chip=3 must be a section with keys of its own"),
        (SINGLE, lambda v: v["chip"].update(memory_bytes=10**400), "chip.memory_bytes=1000"),
        (SINGLE, lambda v: v["tiers"].update({8: {}}), "tiers={'node'"),
        (SINGLE, lambda v: v.update(tiers={}), "tiers={} must have keys of its own"),
        (SINGLE, lambda v: v.pop("tiers"), "tiers is missing; give a section"),
        (SINGLE, lambda v: v.update(tier=v.pop("tiers")), "unknown key tier; did you mean tiers?"),
        (SINGLE, lambda v: v.pop("start_seconds"), "start_seconds is missing; give start_seconds: 1.0e-05"),
        (SINGLE, lambda v: v["tiers"]["node"].pop("latency_seconds"), "tiers.node.latency_seconds is missing"),
        (
            SINGLE,
            lambda v: v["tiers"]["node"].update(latency_seconds=0),
            "tiers.node.latency_seconds=0 must be a finite",
        ),
        (SINGLE, lambda v: v["tiers"]["node"].pop("devices"), "tiers.node.devices is missing; give devices: 8"),
        (SINGLE, lambda v: v["tiers"]["network"].update(devices=64), "tiers.network.devices=64 is of the last tier"),
        (
            SINGLE,
            lambda v: v["tiers"]["network"].update(oversubscription=0.5),
            "tiers.network.oversubscription=0.5 must be at least",
        ),
        (
            SINGLE,
            lambda v: v["tiers"].update(network={**v["tiers"]["node"], "devices": 12}, top=v["tiers"]["network"]),
            "tiers.network.devices=12 must be a larger multiple of 8",
        ),
        (
            SINGLE,
            lambda v: v["tiers"]["network"].update(peer_bytes_per_second=1),
            "tiers.network.peer_bytes_per_second=1 is for the first tier only",
        ),
        (SINGLE, lambda v: v["storage"].pop("write_bytes_per_second"), "storage.write_bytes_per_second is missing"),
        (SINGLE, lambda v: v["failures_per_device_hour"].update(all=-1), "failures_per_device_hour.all=-1 must be a finite number"),
        (SINGLE, lambda v: v.update(quick="maybe"), "quick=maybe must be true or false"),
        (SINGLE, lambda v: v.update(devices=0), "devices=0 must be a finite number above 0"),
        (SINGLE, lambda v: v.update(algorithms=["rings", "mesh"]), "algorithms=['rings', 'mesh'] must be a list of ring, rings"),
        (SINGLE, lambda v: v.update(algorithms=["tree"]), "algorithms=['tree'] must be a list of ring, rings"),
        (SINGLE, lambda v: v.update(algorithms="tree"), "algorithms=tree must be a list of ring, rings"),
        (MIXED, lambda v: v.pop("joint"), "joint is missing; give a section"),
        (MIXED, lambda v: v["joint"].update(devices=8), "joint.devices=8 does not apply to these links"),
        (MIXED, lambda v: v["joint"].update(peer_bytes_per_second=1), "joint.peer_bytes_per_second=1 does not apply"),
        (MIXED, lambda v: v["parts"].pop("h100"), "parts must be two or more clusters"),
        (MIXED, lambda v: v["parts"]["h100"].pop("devices"), "parts.h100.devices is missing; give devices: 256"),
        (MIXED, lambda v: v["parts"].update(h10={"devices": 8}), "parts.h10: cluster=h10 is unknown; did you mean cluster=h100?"),
        (
            MIXED,
            lambda v: v["parts"].update(mixed_h100_a100={"devices": 8}),
            "parts.mixed_h100_a100: cluster=mixed_h100_a100 is mixed",
        ),
        (MIXED, lambda v: v["parts"].update(sw26010pro={"devices": 10**6}), "parts.sw26010pro: world=1000000"),
        (MIXED, lambda v: v.update(chip={}), "unknown key chip; there are parts"),
    ]


@pytest.mark.parametrize(("text", "change", "message"), refusals(), ids=[message for *_, message in refusals()])
def test_a_wrong_file_is_refused_in_one_line_that_names_file_and_key(text: str, change: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        read_cluster(document(text, change), "test", "folder/test.yaml")
    assert str(refusal.value).startswith(f"folder/test.yaml: {message}")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["chip: [", "chip: \x00", "- 1", ""])
def test_a_file_that_is_no_yaml_or_no_mapping_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"own\.yaml.*[;:] (correct it|the file must hold)") as refusal:
        load_cluster(str(tmp_path / "own.yaml"))
    assert "\n" not in str(refusal.value)
