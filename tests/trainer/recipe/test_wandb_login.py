"""`log.wandb=online` needs a key, which is known before anything starts."""

import subprocess
import sys

import pytest

CHECK = "from bagualu.trainer.recipe.wandb_login import require_login as check; check()"
PROGRAM = "import sys; from {} import main; sys.exit(main({}))"
ENTRIES = {
    "bagualu train": PROGRAM.format("bagualu.launch.cli", "['train', *sys.argv[1:]]"),
    "torchrun": PROGRAM.format("bagualu.trainer.__main__", "sys.argv[1:]"),
    "node": PROGRAM.format("bagualu.launch.node", "['--meet', 'localhost:29400', '--id', 'x', *sys.argv[1:]]"),
}
KEY = "0" * 40


@pytest.fixture
def environment(tmp_path, leftovers):
    (tmp_path / "home").mkdir()
    own = {key: value for key, value in leftovers.environment.items() if not key.startswith("WANDB_") and key != "NETRC"}
    return {**own, "HOME": str(tmp_path / "home"), "WANDB_BASE_URL": "http://127.0.0.1:9"}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_run_without_a_key_is_refused_in_one_line(tmp_path, environment, entry):
    layout = ["parallel.data=1", "parallel.pipeline=1", "parallel.expert=1", "checkpoint.resume=true"]
    words = ["recipe=tiny", f"run.dir={tmp_path}/run", "log.wandb=online", *layout]
    done = subprocess.run([sys.executable, "-c", ENTRIES[entry], *words], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "bagualu: error: log.wandb=online, but there is no API key for http://127.0.0.1:9; run `wandb login`, set "
        "WANDB_API_KEY, or give log.wandb=offline\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "netrc", "refused"),
    [
        ({"WANDB_API_KEY": KEY}, "", ""),
        ({}, f"machine 127.0.0.1:9 login user password {KEY}", ""),
        ({}, f"machine api.wandb.ai login user password {KEY}", ", but there is no API key for http://127.0.0.1:9"),
        ({}, "machine machine", ", but there is no API key"),
        ({"WANDB_API_KEY": ""}, "", ", but there is no API key"),
        (
            {"WANDB_API_KEY": "short"},
            "",
            ": WANDB_API_KEY invalid: API key must have 40+ characters, has 5. Correct it",
        ),
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "nonsense"}, "", ": 1 validation error"),
    ],
)
def test_a_key_is_looked_for_where_wandb_does(environment, tmp_path, variables, netrc, refused):
    (tmp_path / "home" / ".netrc").write_text(netrc)
    done = subprocess.run([sys.executable, "-c", CHECK], env={**environment, **variables}, capture_output=True, text=True)
    assert (done.returncode == 0) is (refused == "")
    last = done.stderr.splitlines()[-1:]
    assert last == [] if refused == "" else last[0].startswith(f"bagualu.comm.errors.RecipeError: log.wandb=online{refused}")
