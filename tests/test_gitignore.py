"""What the commands of README leave behind is not for git to see."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEFT_BEHIND = ("build/lib", "bagualu.egg-info", "runs/tiny", "comm/__pycache__", ".pytest_cache", ".hypothesis")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_sees_nothing_of_what_the_commands_of_readme_make(tmp_path):
    environments = re.findall(r"python3 -m venv (\S+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(environments) == 2
    shutil.copy(ROOT / ".gitignore", tmp_path)
    for folder in (*environments, *LEFT_BEHIND):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").touch()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    seen = subprocess.run(["git", "status", "--porcelain"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert seen == "?? .gitignore\n"
