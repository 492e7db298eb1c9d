"""The kinds of planned faults."""

import math
import os
import signal
import time
from dataclasses import dataclass, field

from bagualu.comm.errors import CommunicationError
from bagualu.fault_tolerance.checkpoint.layout.directory import latest
from bagualu.fault_tolerance.checkpoint.layout.durable import DISK
from bagualu.fault_tolerance.injection.alarm import continue_after
from bagualu.fault_tolerance.injection.fault import Fault, ProcessKilled, Scene
from bagualu.fault_tolerance.injection.slowness import Slowness


class PlannedError(RuntimeError):
    """The error that the planned fault `exception` raises."""


def _one_of(*choices: str) -> str:
    """Declares a field whose value is one of `choices`, with the first as its default."""
    default: str = field(default=choices[0], metadata={"choices": choices})
    return default


@dataclass(frozen=True)
class Kill(Fault):
    """The rank's process is killed as by kill -9; a rank that is a thread ends alone, with ProcessKilled."""

    kind = "kill"
    ends_process = True
    at: str = "backward"

    def strike(self, scene: Scene) -> str | None:
        if scene.one_process:
            raise ProcessKilled(f"planned: {self}")
        os.kill(os.getpid(), signal.SIGKILL)
        return None


@dataclass(frozen=True)
class Raise(Fault):
    """The rank raises a PlannedError, which nothing catches."""

    kind = "exception"
    ends_process = True
    at: str = "backward"

    def strike(self, scene: Scene) -> str | None:
        raise PlannedError(f"planned: {self}")


@dataclass(frozen=True)
class Stop(Fault):
    """The rank's process stops for `seconds`, as after SIGSTOP; by default forever."""

    kind = "stop"
    at: str = "backward"
    seconds: float = math.inf

    def strike(self, scene: Scene) -> str | None:
        if scene.one_process:
            until = time.monotonic() + self.seconds
            while time.monotonic() < until and not scene.given_up():
                time.sleep(0.01)
            return None
        if math.isfinite(self.seconds):
            continue_after(self.seconds)
        os.kill(os.getpid(), signal.SIGSTOP)
        return None


@dataclass(frozen=True)
class Slow(Fault):
    """Computation takes the rank `factor` times as long for `steps` steps."""

    kind = "slow"
    steps: int = 5
    factor: float = 3.0

    def strike(self, scene: Scene) -> str | None:
        scene.monitor.observers.append(Slowness(scene.monitor.step + self.steps, self.factor))
        return None


@dataclass(frozen=True)
class Corrupt(Fault):
    """A bit in a shard of the newest committed checkpoint or replica (`what`) flips; nothing happens if there is none."""

    kind = "corrupt"
    what: str = _one_of("checkpoint", "replica")

    def strike(self, scene: Scene) -> str | None:
        folder = scene.folder(self.what)
        newest = latest(folder) if folder else None
        if newest is None:
            return f"there is no {self.what} yet"
        shard = max(newest.glob("*.safetensors"), key=lambda path: (path.stat().st_size, path.name))
        size = shard.stat().st_size
        offset = size - 1 - self.step * 7919 % max(1, size // 2)
        with open(shard, "r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))
        return f"byte {offset} of {newest.name}/{shard.name}"


@dataclass(frozen=True)
class FullDisk(Fault):
    """The next `writes` writes of this process to checkpoint files fail as on a full disk."""

    kind = "full_disk"
    writes: int = 1

    def strike(self, scene: Scene) -> str | None:
        DISK.refuse(self.writes, f"planned: {self}")
        return None


@dataclass(frozen=True)
class Nan(Fault):
    """An element of the gradient of the weights that this rank computes in this step becomes NaN."""

    kind = "nan"
    points = ("data",)

    def strike(self, scene: Scene) -> str | None:
        return scene.spoil_gradient("nan")


@dataclass(frozen=True)
class Flip(Fault):
    """In one element of this rank's weights, master weights, moments or gradient (`what`), the highest bit of the fraction
    flips."""

    kind = "flip"
    points = ("data",)
    what: str = _one_of("weight", "master", "moment", "gradient")

    def strike(self, scene: Scene) -> str | None:
        return scene.spoil_gradient("flip") if self.what == "gradient" else scene.flip(self.what)


@dataclass(frozen=True)
class DropLink(Fault):
    """From this point on, all communications of this rank fail (how=raise) or never end (how=block)."""

    kind = "drop_link"
    ends_process = True
    at: str = "reduce"
    how: str = _one_of("raise", "block")

    def strike(self, scene: Scene) -> str | None:
        scene.monitor.observers.append(_Cut(self, scene))
        return None


class _Cut:
    """Observes the monitor and makes every communication of the rank fail or block."""

    def __init__(self, fault: DropLink, scene: Scene) -> None:
        self.fault, self.scene = fault, scene

    def at(self, point: str, step: int) -> None:
        return None

    def waits(self, what: str | None) -> None:
        if what is None:
            return
        while self.fault.how == "block" and not self.scene.given_up():
            time.sleep(0.01)
        raise CommunicationError(f"{what}: the link is down, planned: {self.fault}")


KINDS: dict[str, type[Fault]] = {kind.kind: kind for kind in (Kill, Raise, Stop, Slow, Corrupt, FullDisk, Nan, Flip, DropLink)}
