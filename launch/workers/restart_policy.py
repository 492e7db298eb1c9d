"""Decides whether a run is restarted after a failure: at most restart.limit times, with growing pauses, and not in a crash loop."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from bagualu.fault_tolerance.config import RestartConfig
from bagualu.launch.workers.storage_probe import newest
from bagualu.trainer.process.failure import Failure
from bagualu.trainer.recipe.config import Recipe


@dataclass(frozen=True)
class RestartDecision:
    """The decision whether, when and with which ranks the workers are restarted after a failure."""

    failure: Failure
    """The failure as it is reported; for a crash loop, with kind "loop"."""
    again: bool
    """Whether the workers are restarted."""
    pause_seconds: float = 0.0
    """Seconds to wait before the restart; 0 without a restart."""
    without_rank: bool = False
    """Whether the failed rank is left out of the restart, because restarting with it did not help."""


@dataclass
class Restarts:
    """Counts the restarts of one launch and decides after each failure whether the workers are restarted."""

    config: RestartConfig
    clock: Callable[[], float] = time.monotonic
    """Seconds from any moment on."""
    count: int = 0
    _pauses: int = 0
    """The number of pauses since they last began anew."""
    _restarted: float = 0.0
    """When the last pause ends."""
    _failed: list[Failure] = field(default_factory=list)
    """Failures since the run last got further, beginning with the first failure at the latest step that has failed."""
    _dropped: int = 0
    """Number of ranks that were left out of restarts since the first failure in `_failed`."""

    def decide(self, failure: Failure, elsewhere: bool = False, may_drop: bool = False) -> RestartDecision:
        """Records a failure and returns the decision about it.

        `elsewhere` says that the cause is on another node, whose own agent checks for a crash loop, so that this method does not;
        `may_drop`, that a valid layout exists without the failed rank.
        """
        config = self.config
        if failure.kind in ("recipe", "final"):
            return RestartDecision(failure, again=False)
        no_step = elsewhere or failure.kind == "storage"  # storage failures are waited out, with growing pauses
        times = 0 if no_step else self._times(failure)
        loop = times >= config.same_step_limit * (1 + self._dropped)
        same_rank = failure.rank >= 0 and len({earlier.rank for earlier in self._at(failure.step)}) == 1
        drop = loop and may_drop and not self._dropped and same_rank
        if loop and not drop:
            why = f"{failure.cause} (failed at this step {times} times without progress in between; restart.same_step_limit)"
            return RestartDecision(replace(failure, kind="loop", cause=why), again=False)
        if self.count >= config.limit:
            spent = f" (after {self.count} restarts; restart.limit={config.limit})" if self.count else ""
            return RestartDecision(replace(failure, cause=failure.cause + spent), again=False)
        self._dropped += drop
        self.count += 1
        return RestartDecision(failure, again=True, pause_seconds=self._pause(), without_rank=drop)

    def _pause(self) -> float:
        """Returns the seconds of the pause that begins now: the first again if the workers ran long enough since the last, starting
        included, for a pause is to keep failures apart that follow each other at once."""
        if max(0.0, self.clock() - self._restarted) >= self.config.backoff_reset_seconds:
            self._pauses = 0
        self._pauses += 1
        seconds = self.config.pause_seconds(self._pauses)
        self._restarted = self.clock() + seconds
        return seconds

    def _times(self, failure: Failure) -> int:
        """Records `failure` and returns how often its step has failed, this failure included, without a failure at a later step."""
        if failure.step > max((earlier.step for earlier in self._failed), default=-1):
            self._failed, self._dropped = [], 0
        self._failed.append(failure)
        return len(self._at(failure.step))

    def _at(self, step: int) -> list[Failure]:
        return [earlier for earlier in self._failed if earlier.step == step]


def announcement(decision: RestartDecision, restarts: Restarts, recipe: Recipe, begun: bool = False) -> str:
    """Returns the line printed before a restart: what failed, how many restarts there were, and where training resumes. `begun`: as
    for `storage_probe.newest`."""
    failure = decision.failure
    start = f"from {newest(recipe, begun) or 'the beginning'}"
    start += " or a later replica in memory" if recipe.checkpoint.replica_every else ""
    left_out = f" without rank {failure.rank}" if decision.without_rank else ""
    return (f"{failure.who} failed, {failure.phase}: {failure.cause}; restart {restarts.count} of "
            f"{restarts.config.limit}{left_out} in {decision.pause_seconds:g} s, {start}")  # fmt: skip


def resuming(recipe: Recipe) -> Recipe:
    """Returns the recipe for restarted workers, with checkpoint.resume=true."""
    return replace(recipe, checkpoint=replace(recipe.checkpoint, resume=True))
