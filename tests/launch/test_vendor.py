"""A chip vendor's backend: one small package, found by its entry point alone, trains any recipe."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.launch.survival import SMALL

MODULE = """
from pathlib import Path
from bagualu.comm.gloo import GlooBackend

class PulsarBackend(GlooBackend):
    def __init__(self, world, timeout_seconds):
        super().__init__(world, timeout_seconds)
        (Path(__file__).parent / f"joined-{world.rank}").touch()
"""


def train(folder: Path, packages: Path, backend: str) -> "subprocess.CompletedProcess[str]":
    words = [
        *SMALL,
        "launch.workers=2",
        "parallel.data=1",
        "parallel.tensor=2",
        "train.steps=2",
        f"comm.backend={backend}",
        f"run.dir={folder}",
    ]
    command = "import sys; from bagualu.launch.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": f"{packages}:{Path(__file__).parents[2]}"}
    return subprocess.run([sys.executable, "-c", command, "train", *words], text=True, capture_output=True, env=environment)


def test_a_backend_of_another_package_trains_and_its_name_is_offered(tmp_path):
    packages = tmp_path / "packages"
    about = packages / "pulsar-1.0.dist-info"
    about.mkdir(parents=True)
    (packages / "pulsar.py").write_text(MODULE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: pulsar\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[bagualu.backends]\npulsar = pulsar:PulsarBackend\n")
    done = train(tmp_path / "run", packages, "pulsar")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == 2
    assert sorted(path.name for path in packages.glob("joined-*")) == ["joined-0", "joined-1"]
    wrong = train(tmp_path / "other", packages, "pulsr")
    assert (wrong.returncode, "pulsar" in wrong.stderr.splitlines()[-1]) == (2, True)
