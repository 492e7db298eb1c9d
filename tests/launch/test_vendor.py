"""A chip vendor's backend: one small package, found by its entry point alone, trains any recipe."""

import json
import sys
from pathlib import Path

import pytest

from tests.launch.survival import SMALL
from tests.launch.warm import ROOT, Launcher
from tests.leftovers import Leftovers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks launchers with what only Linux has")
MODULE = """
from pathlib import Path
from bagualu.comm.gloo import GlooBackend

class PulsarBackend(GlooBackend):
    def __init__(self, world, timeout_seconds):
        super().__init__(world, timeout_seconds)
        (Path(__file__).parent / f"joined-{world.rank}").touch()
"""


def train(folder: Path, packages: Path, leftovers: Leftovers, backend: str) -> tuple[int, str]:
    """The exit code, and what was said."""
    words = [
        *SMALL,
        "launch.workers=2",
        "parallel.data=1",
        "parallel.tensor=2",
        "train.steps=2",
        f"comm.backend={backend}",
        f"run.dir={folder}",
    ]
    environment = {**leftovers.environment, "PYTHONPATH": f"{packages}:{ROOT}"}
    with Launcher(["train", *words], None, cwd=packages, env=environment) as launcher:
        _, err = launcher.communicate()
    return launcher.returncode, err


def test_a_backend_of_another_package_trains_and_its_name_is_offered(tmp_path, leftovers):
    packages = tmp_path / "packages"
    about = packages / "pulsar-1.0.dist-info"
    about.mkdir(parents=True)
    (packages / "pulsar.py").write_text(MODULE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: pulsar\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[bagualu.backends]\npulsar = pulsar:PulsarBackend\n")
    code, err = train(tmp_path / "run", packages, leftovers, "pulsar")
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == 2
    assert sorted(path.name for path in packages.glob("joined-*")) == ["joined-0", "joined-1"]
    code, err = train(tmp_path / "other", packages, leftovers, "pulsr")
    assert (code, "pulsar" in err.splitlines()[-1]) == (2, True)
