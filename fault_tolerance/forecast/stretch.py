"""What a run does between two interruptions, in closed form: steps, saves, and what is durable when it is interrupted.

A stretch begins with a start (processes, reading the state), then repeats cycles until it is interrupted:

    start | step step ... step [wait for the save before] save | step step ... step [wait] save | step ste# interrupted
          |<- the first cycle begins `offset` steps later, after a start from a step between two checkpoints

All times are whole microseconds in integer arrays of one shape, or of shapes that broadcast.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Cycle:
    """What repeats in a stretch."""

    steps: Integers
    """Steps between two checkpoints in storage."""
    step: Integers
    """Time of a step, without replicas."""
    replica: Integers
    """Time of a replica, divided by the steps between two of them."""
    save: int
    """Time for which training stands still for a checkpoint."""
    durable: int
    """Time from the end of that until the checkpoint is committed."""

    @property
    def training(self) -> Integers:
        """The time of the steps, with replicas, between two checkpoints."""
        return self.steps * (self.step + self.replica)

    @property
    def standstill(self) -> Integers:
        """The time of a save, and of the wait for the save before it."""
        return np.maximum(0, self.durable - self.training) + self.save


@dataclass(frozen=True)
class Stretch:
    """What happened in a stretch. start + steps * Cycle.step + partial + checkpoint is its whole time."""

    start: Integers
    steps: Integers
    """Steps that were finished."""
    partial: Integers
    """Time in a step that was not finished."""
    checkpoint: Integers
    """Time of saves, of waits for them, and of replicas."""
    durable: Integers
    """Checkpoints that were begun in this stretch and are committed."""
    finishing: Integers
    """Time until the step or save that was going on would have been finished; 0 during the start."""


def stretch(cycle: Cycle, elapsed: Integers, start: Integers, offset: Integers, unknown: Integers) -> Stretch:
    """Returns what happened in the first `elapsed` microseconds of a stretch.

    `start` is the time of its start, `offset` the steps since the last checkpoint before it. Only checkpoints that were committed
    `unknown` microseconds ago, or earlier, count as durable.
    """
    step, length = cycle.step + cycle.replica, cycle.training + cycle.standstill
    started = np.minimum(elapsed, start)
    since = elapsed - started + offset * step  # as if the cycle had begun `offset` steps earlier
    cycles, rest = np.divmod(since, length)
    training = np.minimum(rest, cycle.training)
    done, partial = np.divmod(training, step)
    standing = rest - training
    steps = cycles * cycle.steps + done - offset
    finishing = np.where(standing > 0, length - rest, np.where(partial > 0, step - partial, 0))
    return Stretch(
        start=started,
        steps=steps,
        partial=partial,
        checkpoint=cycles * cycle.standstill + standing + steps * cycle.replica,
        durable=np.maximum(0, (since - cycle.durable - unknown) // length),
        finishing=np.where(elapsed < start, 0, finishing),
    )
