"""The kinds of planned faults: what each of them does to the rank it strikes. Free of torch."""

import math
import os
import signal
import time
from dataclasses import dataclass, field

from bagualu.comm.errors import CommunicationError
from bagualu.fault_tolerance.checkpoint.directory import latest
from bagualu.fault_tolerance.checkpoint.durable import DISK
from bagualu.fault_tolerance.injection.alarm import continue_after
from bagualu.fault_tolerance.injection.fault import Fault, ProcessKilled, Scene
from bagualu.fault_tolerance.injection.slowness import Slowness


class PlannedError(RuntimeError):
    """What a planned exception raises."""


def _one_of(*choices: str) -> str:
    """A field that holds one of `choices`, at first the first."""
    default: str = field(default=choices[0], metadata={"choices": choices})
    return default


@dataclass(frozen=True)
class Kill(Fault):
    """The process is gone, as after kill -9."""

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
    """An error that nobody catches."""

    kind = "exception"
    ends_process = True
    at: str = "backward"

    def strike(self, scene: Scene) -> str | None:
        raise PlannedError(f"planned: {self}")


@dataclass(frozen=True)
class Stop(Fault):
    """The process stands still, as after SIGSTOP, for `seconds`."""

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
    """For `steps` steps the rank computes `factor` times as long."""

    kind = "slow"
    steps: int = 5
    factor: float = 3.0

    def strike(self, scene: Scene) -> str | None:
        scene.monitor.observers.append(Slowness(scene.monitor.step + self.steps, self.factor))
        return None


@dataclass(frozen=True)
class Corrupt(Fault):
    """A bit of the newest committed checkpoint, or of the newest replica, flips."""

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
    """The next `writes` writes of this process to checkpoint files find no space."""

    kind = "full_disk"
    writes: int = 1

    def strike(self, scene: Scene) -> str | None:
        DISK.refuse(self.writes, f"planned: {self}")
        return None


@dataclass(frozen=True)
class Nan(Fault):
    """One element of the gradient that this rank computes is NaN."""

    kind = "nan"
    points = ("data",)

    def strike(self, scene: Scene) -> str | None:
        return scene.spoil_gradient("nan")


@dataclass(frozen=True)
class Flip(Fault):
    """The highest bit of the fraction of one number on this rank flips: of a weight, its master, a moment or a gradient."""

    kind = "flip"
    points = ("data",)
    what: str = _one_of("weight", "master", "moment", "gradient")

    def strike(self, scene: Scene) -> str | None:
        return scene.spoil_gradient("flip") if self.what == "gradient" else scene.flip(self.what)


@dataclass(frozen=True)
class DropLink(Fault):
    """From now on this rank's communications fail, or never end."""

    kind = "drop_link"
    ends_process = True
    at: str = "reduce"
    how: str = _one_of("raise", "block")

    def strike(self, scene: Scene) -> str | None:
        scene.monitor.observers.append(_Cut(self, scene))
        return None


class _Cut:
    """A link that is down."""

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


KINDS: dict[str, type[Fault]] = {one.kind: one for one in (Kill, Raise, Stop, Slow, Corrupt, FullDisk, Nan, Flip, DropLink)}
