"""What the simulation of failures knows of a run: its steps, its checkpoints, and how often and how it fails."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from bagualu.comm.errors import RecipeError

MICROSECONDS = 1_000_000
"""Times are counted in whole microseconds, as in the ledger, so that the categories add up exactly."""


@dataclass(frozen=True)
class Interruption:
    """A kind of failure. Failures of a kind are a Poisson process."""

    component: str
    per_second: float
    """How often it interrupts the run, while the run uses all its devices."""
    detection_seconds: float
    """From the failure until the launcher has noticed it. Not used if the failure is silent."""
    loses_node: bool = False
    """Whether the node must be repaired before it can be used again."""
    silent: bool = False
    """Whether values become wrong and nothing else happens: a check finds it, and the run goes back to a checkpoint from before,
    in the same processes."""


@dataclass(frozen=True)
class RunModel:
    """A run, with the times that a failure costs it. Seconds are those of the whole run: of its slowest rank."""

    step_seconds: float
    interruptions: Sequence[Interruption] = ()
    checkpoint_steps: int = 100
    """Steps between checkpoints in storage."""
    save_seconds: float = 0.0
    """Time for which training stands still for a checkpoint."""
    durable_seconds: float = 0.0
    """Time from then until the checkpoint is committed. Training goes on meanwhile, unless the next checkpoint is due: it waits."""
    slowdown: float = field(default=0.0, metadata={"most": 0.9})
    """Fraction by which steps are slower while a checkpoint is written in the background."""
    read_seconds: float = 0.0
    """Time to read a checkpoint from storage."""
    replica_steps: int = 0
    """Steps between replicas in the memory of nodes; 0: none."""
    replica_seconds: float = 0.0
    """Time for which training stands still for a replica."""
    restore_seconds: float = 0.0
    """Time to read a replica."""
    replica_loss: float = field(default=0.0, metadata={"most": 1.0})
    """The probability that a failure takes the replicas with it, so that the run goes back to storage."""
    pauses: Sequence[float] = (0.0,)
    """Seconds of pause between a failure that has been noticed and the restart: for the first restart of a launch, the second and
    so on; the last value holds for all further ones."""
    healthy_seconds: float = 600.0
    """Time from a restart until the next failure is noticed after which the pauses begin with the first again."""
    start_seconds: float = 0.0
    """From the start of workers to their first step, without reading the state. Failures strike during a start too."""
    check_steps: int = 0
    """Steps between the checks that find silent failures; 0: they are found at once."""
    nodes: int = 1
    replicas: int = 1
    """Data-parallel replicas. A run that has lost a node does without those that do not fit on the others."""
    micro_batches: int | None = None
    """Micro-batches of a replica in a step; None: so many that any number of replicas can share them equally."""
    equal_shares: bool = False
    """Whether each replica must have as many micro-batches as the others, so that a run that shrinks does without all replicas
    beyond a number that divides those of a step. Otherwise some have one more."""
    spares: int | None = None
    """Nodes that stand by; None: always enough."""
    swap_seconds: float = 0.0
    """Time, after the pause, until a spare node has taken the place of a lost one, or the run goes on without it."""
    repair_seconds: float = 0.0
    """Mean time until a lost node can be used again; times are exponentially distributed."""
    elastic: bool = False
    """Whether the run goes on with fewer replicas if no spare node is left; otherwise it waits for a repair."""
    rejoin: bool = True
    """Whether a repaired node joins an elastic run at once, which costs a save and a start; otherwise it joins at the next
    failure."""

    @property
    def mean_seconds_between_failures(self) -> float:
        """The reciprocal of all rates together; infinite without failures."""
        rate = sum(kind.per_second for kind in self.interruptions)
        return 1 / rate if rate else math.inf

    def validate(self) -> None:
        """Raises RecipeError if a figure is impossible."""
        for kind in self.interruptions:
            _require(kind.per_second, f"rate of failures of {kind.component}", "per_second")
            _require(kind.detection_seconds, f"detection of failures of {kind.component}", "detection_seconds")
        for pause in self.pauses:
            _require(pause, "failures", "pauses")
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, float | int) and not isinstance(value, bool):
                _require(value, "failures", entry.name, float(entry.metadata.get("most", math.inf)))
        for name in ("checkpoint_steps", "nodes", "replicas"):
            if getattr(self, name) < 1:
                raise RecipeError(f"failures: {name}={getattr(self, name)} must be at least 1, e.g. {name}=1")
        if self.step_seconds * MICROSECONDS < 1:
            raise RecipeError(f"failures: step_seconds={self.step_seconds} must be at least a microsecond, e.g. step_seconds=10.0")
        if self.repair_seconds == 0 and self.spares is not None:
            raise RecipeError(
                f"failures: spares={self.spares} needs the time of a repair; give repair_hours=24, or leave out spares"
            )

    def usable_replicas(self) -> NDArray[np.int64]:
        """Returns with how many replicas an elastic run goes on if 0, 1, ... or all of its nodes can be used."""
        counts = np.arange(self.replicas + 1)
        if self.equal_shares and self.micro_batches is not None:
            divides = self.replicas * self.micro_batches % np.maximum(counts, 1) == 0
            counts = np.maximum.accumulate(np.where(divides, counts, 0))
        usable: NDArray[np.int64] = counts[np.arange(self.nodes + 1) * self.replicas // self.nodes]
        return usable

    def step_seconds_with(self, replicas: int) -> float:
        """Returns the time of a step in which `replicas` of the replicas do all the work."""
        if self.micro_batches is None:
            return self.step_seconds * self.replicas / replicas
        return self.step_seconds * math.ceil(self.replicas * self.micro_batches / replicas) / self.micro_batches


def _require(value: float, what: str, name: str, most: float = math.inf) -> None:
    """Raises RecipeError unless `value` is a finite number from 0 to `most`."""
    if not (0 <= value <= most and math.isfinite(value)):
        limit = "a finite number of at least 0" if most == math.inf else f"a number from 0 to {most:g}"
        raise RecipeError(f"{what}: {name}={value} must be {limit}, e.g. {name}=0")
