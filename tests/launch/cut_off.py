"""A run on two machines whose link is lost in the middle of a commit: who commits from then on? Run as a script.

    unshare -rn python -m tests.launch.cut_off FOLDER both|from_0|from_1 WORD...

Machine 0 has the rank that commits, machine 1 the store where the agents meet: either could believe to be the run. Both see the
same storage. The third commit of machine 0 is held up after the vote of all ranks; then the link is cut. As soon as machine 1 has
started anew by itself, machine 0, whose ranks do not end before that, is let go, and then the link comes back.

Not collected by pytest. Leaves in FOLDER the run and what the agents said (agent-0, agent-1); the run has a file `started-4` if it
took machine 0 back before its end. Prints one JSON object.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bagualu.comm.errors import CommunicationError
from bagualu.comm.group import Communicator
from bagualu.fault_tolerance.checkpoint.saving import save
from bagualu.fault_tolerance.checkpoint.saving.fence import EPOCH
from bagualu.trainer.recipe.config import Recipe
from tests.launch import faulty
from tests.launch.survival import SMALL
from tests.launch.together import FOLDER, MACHINE, have_come, tell_them_to_meet
from tests.namespaces import own_network
from tests.wire import Weather, Wire, address

CUTS = {"both": {(0, 1), (1, 0)}, "from_0": {(0, 1)}, "from_1": {(1, 0)}}
_AGENT = "import sys; from tests.launch.together import agent; sys.exit(agent(sys.argv[1:], 'tests.launch.cut_off:train'))"
_NOTES = "commits.jsonl"


def train(recipe: Recipe, communicator: Communicator, stop: Any, scratch: Path | None = None) -> dict[str, Any]:
    """What the ranks run: the trainer, which notes what was committed by whom, and dawdles as long as `slow` is there."""
    machine, commit, folder = int(os.environ[MACHINE]), save.commit, Path(recipe.run.dir)

    def noting(fence: Any, temporary: Path, final: Path, manifest: Any, claim: Any) -> None:
        line = {"step": manifest.step, "machine": machine, "error": None}
        if machine == 0 and _tries(folder) == 2:
            (folder / "holding").touch()
            while not (folder / "let_go").exists():
                time.sleep(0.01)
        try:
            commit(fence, temporary, final, manifest, claim)
        except Exception as error:
            line["error"] = repr(error)
            raise
        finally:
            with (folder / _NOTES).open("a") as file:
                file.write(json.dumps(line) + "\n")

    save.commit = noting
    try:
        return faulty.train(recipe, communicator, stop, scratch)
    except CommunicationError:
        while machine == 0 and _tries(folder) < 3:  # what it does then is up to its writer
            time.sleep(0.01)
        raise


def _notes(folder: Path) -> list[dict[str, Any]]:
    path = folder / _NOTES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _tries(folder: Path) -> int:
    """Commits of machine 0 that have come to an end."""
    return sum(note["machine"] == 0 for note in _notes(folder))


def main(folder: Path, how: str, words: list[str]) -> None:
    run = folder / "run"
    run.mkdir()
    (run / "slow").touch()
    epoch = run / "checkpoints" / EPOCH
    agents = [_agent(machine, folder, words) for machine in (0, 1)]

    def ended() -> bool:
        return all(agent.poll() is not None for agent in agents)

    try:
        with Wire([agent.pid for agent in agents]) as wire:
            wire.carry(lambda: ended() or have_come(folder, 2))
            tell_them_to_meet(folder)
            wire.carry(lambda: ended() or (run / "holding").exists())
            first = epoch.read_text()
            wire.weather = Weather(cut=CUTS[how])
            wire.carry(lambda: ended() or epoch.read_text() != first)
            (run / "let_go").touch()
            wire.carry(lambda: ended() or _tries(run) == 3)
            (run / "started-4").unlink(missing_ok=True)
            wire.weather = Weather()
            (run / "slow").unlink()
            wire.carry(ended)
    finally:
        for agent in agents:
            agent.kill()
    print(json.dumps({"codes": [agent.wait() for agent in agents], "commits": _notes(run)}))


def _agent(machine: int, folder: Path, words: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _AGENT, "--meet", f"{address(1)}:29500", "--id", "test", *SMALL, "launch.nodes=2"]
    command += ["launch.workers=2", "checkpoint.resume=true", "run.name=slow", f"run.dir={folder}/run"]
    return subprocess.Popen(
        [*command, *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, preexec_fn=own_network,
        stderr=(folder / f"agent-{machine}").open("w"),
        env={**os.environ, MACHINE: str(machine), FOLDER: str(folder), "GLOO_SOCKET_IFNAME": "eth0"},
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
