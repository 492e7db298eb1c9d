"""Whether a run is started again after a failure: a budget, a pause that grows, an end to crash loops. Free of torch."""

from dataclasses import dataclass, field, replace

from bagualu.fault_tolerance.config import RestartConfig
from bagualu.launch.workers.storage_probe import newest
from bagualu.trainer.process.failure import Failure
from bagualu.trainer.recipe.config import Recipe


@dataclass(frozen=True)
class RestartDecision:
    """What follows a failure."""

    failure: Failure
    """As it is to be told: a crash loop is told as one."""
    again: bool
    pause_seconds: float = 0.0
    without_rank: bool = False
    """Again, but without the rank that failed: starting it anew has not helped."""


@dataclass
class Restarts:
    """The restarts of one launch so far, and the verdict on the next failure."""

    config: RestartConfig
    count: int = 0
    _failed: list[Failure] = field(default_factory=list)
    """Failures since the run last came further than ever."""
    _dropped: int = 0
    """Ranks given up since then."""

    def decide(self, failure: Failure, elsewhere: bool = False, may_drop: bool = False) -> RestartDecision:
        """Takes a failure into account.

        `elsewhere`: its cause is on another node, which judges whether it is a crash loop. `may_drop`: there is a layout for
        the ranks without the one that failed.
        """
        config = self.config
        if failure.kind in ("recipe", "final"):
            return RestartDecision(failure, again=False)
        no_step = elsewhere or failure.kind == "storage"  # a full disk is waited for, by pauses that grow
        times = 0 if no_step else self._times(failure)
        loop = times >= config.same_step_limit * (1 + self._dropped)
        known = failure.rank >= 0 and len({one.rank for one in self._at(failure.step)}) == 1
        drop = loop and may_drop and not self._dropped and known
        if loop and not drop:
            why = f"{failure.cause} (failed at this step {times} times with nothing gained in between; restart.same_step_limit)"
            return RestartDecision(replace(failure, kind="loop", cause=why), again=False)
        if self.count >= config.limit:
            spent = f" (after {self.count} restarts; restart.limit={config.limit})" if self.count else ""
            return RestartDecision(replace(failure, cause=failure.cause + spent), again=False)
        self._dropped += drop
        self.count += 1
        return RestartDecision(failure, again=True, pause_seconds=config.pause_seconds(self.count), without_rank=drop)

    def _times(self, failure: Failure) -> int:
        """How often the step of `failure` has failed by now, with nothing gained in between."""
        if failure.step > max((one.step for one in self._failed), default=-1):
            self._failed, self._dropped = [], 0
        self._failed.append(failure)
        return len(self._at(failure.step))

    def _at(self, step: int) -> list[Failure]:
        return [one for one in self._failed if one.step == step]


def announcement(verdict: RestartDecision, restarts: Restarts, recipe: Recipe, begun: bool = False) -> str:
    """The line that a restart begins with: what was lost where, which restart this is, where it goes on."""
    failure = verdict.failure
    start = f"from {newest(recipe, begun) or 'the beginning'}"
    start += " or a later replica in memory" if recipe.checkpoint.replica_every else ""
    left_out = f" without rank {failure.rank}" if verdict.without_rank else ""
    return (f"{failure.who} failed, {failure.phase}: {failure.cause}; restart {restarts.count} of "
            f"{restarts.config.limit}{left_out} in {verdict.pause_seconds:g} s, {start}")  # fmt: skip


def resuming(recipe: Recipe) -> Recipe:
    """The recipe of workers that are started again."""
    return replace(recipe, checkpoint=replace(recipe.checkpoint, resume=True))
