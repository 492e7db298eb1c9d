"""The guard decides whether a step is applied, computed again, left out, rolled back, or ends the run.

    begin -> compute and reduce -> inspect -> agree (one reduction over all ranks) -> judge -> update -> agree that all of it is
    finite -> finish

`begin`, `finish` and, after RETRY, `samples` return the step whose samples are computed next: the current step, an earlier step
whose samples were deferred, or the newest committed step, whose samples show whether the weights are at fault.

`judge` decides from values that are the same on every rank, so all ranks make the same decision without another exchange. Ranks
exchange details only when these values show that something is wrong.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bagualu.comm.objects import gather_json
from bagualu.fault_tolerance.config import GuardConfig
from bagualu.fault_tolerance.guard import damage, messages
from bagualu.fault_tolerance.guard.damage import Damage, DamageCheck
from bagualu.fault_tolerance.guard.decide import Situation, decide
from bagualu.fault_tolerance.guard.engine import GuardedEngine
from bagualu.fault_tolerance.guard.finite import after_update
from bagualu.fault_tolerance.guard.gradient_checksums import Attempts, culprits
from bagualu.fault_tolerance.guard.history import Memory
from bagualu.fault_tolerance.guard.messages import by_rank, diagnosis, ending, finding
from bagualu.fault_tolerance.guard.verdict import SPIKES, Cause, GuardAction, GuardDecision
from bagualu.parallel.mesh import Mesh


@dataclass(frozen=True)
class StepValues:
    """The results of one attempt at a step, reduced over all ranks and therefore the same on every rank."""

    loss: float
    """Loss in nats per token."""
    norm: float
    """Norm of the gradient with respect to all weights, divided by the loss scale; not finite if any part of the gradient on any
    rank is not finite."""
    inspected: Sequence[float]
    """The values that `Guard.inspect` returned after this attempt, summed over all ranks."""
    scale_can_fall: bool = False
    """Whether the loss scale can fall further, which could make a non-finite gradient finite (float16)."""


class Guard:
    """The guard of one rank. Its `memory` is saved in checkpoints.

    `saves_every` is the number of steps between checkpoints, 0 if none are saved during the run. `repeatable` says whether
    computing a step again gives the same bits. `steps` is the number of steps of the run, None if it has no end.
    """

    def __init__(
        self,
        config: GuardConfig,
        mesh: Mesh,
        engine: GuardedEngine,
        saves_every: int = 0,
        repeatable: bool = True,
        steps: int | None = None,
    ) -> None:
        self.config, self._saves_every, self._steps = config, saves_every, steps
        self.memory = Memory.empty(config)
        self._mesh = mesh
        self._damage = DamageCheck(engine, mesh)
        self._attempts = Attempts(engine)
        self._compares = repeatable and config.compares
        self._count = 0
        self._step = 0
        self._late: int | None = None
        """The earlier step whose deferred samples are being computed now; None while the current step's own samples are
        computed."""
        self._pending: GuardDecision | None = None
        """A decision to defer samples that is not returned yet, because the weights are checked first; None if no decision
        waits."""
        self._values = (0.0, 0.0)
        """Loss and gradient norm of the newest attempt at the samples that `judge` decides about (not those recomputed to judge the
        weights)."""
        self._limited = False
        """Whether the newest attempt is a spike whose update is applied nevertheless, with its gradient clipped to `strongest`."""
        self.clean = 0
        """The last step after which the state is known to be undamaged; checkpoints of later steps may contain damage."""
        self._first: tuple[Cause, tuple[int, ...], str] | None = None
        """The first thing that was wrong with the present samples: (cause, ranks at fault, description); None while nothing was
        wrong."""
        if self._compares:
            engine.before_reduction = self._attempts.before_reduction

    def leaves_out(self, step: int) -> str | None:
        """Returns the reason why the samples of `step` (counted from 1) must not be trained on; None if they may."""
        return self.memory.left_out.get(step)

    def begin(self, step: int) -> int:
        """Starts `step` (from 1) before its first attempt. Returns the step whose samples to compute: `step` or a deferred step."""
        self._step, self._late = step, self.memory.due(step, self._steps)
        return self._start()

    def _start(self) -> int:
        self._attempts.begin()
        self._damage.damages = []
        self._count, self._first, self._pending = 0, None, None
        if self._checks(self._step) and not self._damage.sealed:
            self._damage.seal()
        return self.samples

    @property
    def samples(self) -> int:
        """The step (from 1) whose samples are computed next."""
        if self._pending and self.memory.newest:
            return self.memory.newest[0]
        return self._late or self._step

    @property
    def weighing(self) -> bool:
        """Whether the samples of the newest committed step are being computed again to judge the weights."""
        return self._pending is not None

    def inspect(self, step: int) -> list[torch.Tensor]:
        """Checks this rank's state after the gradients of an attempt are reduced. Returns float64 scalars to be summed over the
        ranks for `StepValues.inspected`.

        Collective in the steps that `_checks` selects (guard.check_every, and after a save), and once something was wrong with an
        attempt at this step.
        """
        self._count += 1
        # Once something is wrong, the state is checked too: a damaged weight gives the same wrong bits in every attempt.
        damaged = (self._checks(step) or self._first is not None) and self._damage.inspect()
        if self._compares:
            self._attempts.end()
        flag = torch.tensor(float(damaged), dtype=torch.float64, device=self._mesh.group("world").device)
        return [flag, *self._attempts.differing(flag)]

    def judge(self, step: int, figures: StepValues) -> GuardDecision:
        """Returns the decision about `step`, the same on every rank.

        After RETRY the caller computes the samples of step `self.samples` from the same weights. Collective if something is wrong.
        """
        if self._pending:
            verdict, self._pending = self._pending, None
            return self._weigh(step, verdict, figures)
        self._values = figures.loss, figures.norm
        damaged, *differing = figures.inspected
        differing = differing[: self._attempts.earlier]
        table = self._gather_details() if damaged or any(differing) else []
        damages = damage.blame([damage.from_json(row["damage"]) for row in table])
        same = 0.0 in differing if self._compares else None
        cause = self._cause(step, figures, damages, same)
        if self._checks(step) and not any(damages):
            self.clean = step - 1
        ranks = tuple(rank for rank, own in enumerate(damages) if own) or culprits(table)
        if cause and not self._first:
            self._first = cause, ranks, finding(cause, figures.loss, figures.norm, _named(damages))
        if cause is None and self._audits(step) and not self._attempts.earlier:
            self._attempts.keep()
            return GuardDecision(GuardAction.RETRY, attempts=self._count)
        spike, setbacks = cause in SPIKES, self.memory.setbacks
        now = Situation(cause, self._count, same, damage.repairable(damages), 0 if spike and self._late else setbacks)
        action = decide(self._late_config if self._late else self.config, now)
        deferred = action is GuardAction.SKIP and spike and self.config.on_spike == "retry"
        self._limited = deferred and (self._late is not None or step == self._steps)
        if self._limited:  # a spike again some steps later, or no step is left to defer to: apply it
            action, deferred = GuardAction.COMMIT, False
        if action is GuardAction.RETRY and any(damages):
            self._damage.repair(damages)
            self._attempts.begin()  # attempts with damaged weights cannot be compared with later ones
        elif action is GuardAction.RETRY and self._compares:
            self._attempts.keep()
        verdict = self._verdict(step, action, ranks, same, deferred)
        if not (deferred and self.memory.newest):
            return verdict
        self._pending = verdict
        return GuardDecision(GuardAction.RETRY, attempts=self._count)

    def _weigh(self, step: int, verdict: GuardDecision, figures: StepValues) -> GuardDecision:
        """Checks `verdict`, which defers the samples of `step`. Returns it, or a decision with the cause DIVERGED if the weights
        are wrong.

        `figures` are the results of the newest committed step's samples, computed again with the current weights. If they are a
        spike too, the weights are wrong and not the new samples. The second time in a row, the run goes back to a checkpoint, if it
        saves any.
        """
        loss, norm = figures.loss, figures.norm
        if not self.memory.diverged(step, loss, norm, figures.scale_can_fall):
            return verdict
        assert self.memory.newest is not None
        old, loss_then, norm_then = self.memory.newest
        again = self.memory.diverged_row > 0 and self._saves_every > 0
        action = GuardAction.ROLLBACK if again else GuardAction.SKIP
        if again and not self.config.check_every:  # the state was not checked, but the values at `old` were right
            self.clean = max(self.clean, old - 1)
        then_and_now = f"step {old}, applied with loss {loss_then:g} and gradient norm {norm_then:g}, now has {loss:g} and {norm:g}"
        end = "; back to a checkpoint" if again else ""
        text = f"{verdict.text}; but {then_and_now}: the weights are at fault, not the samples{end}"
        return replace(verdict, action=action, cause=Cause.DIVERGED, deferred=not again, text=text)

    @property
    def _late_config(self) -> GuardConfig:
        """The policies for deferred samples: a spike is computed again, and trained on unless the hardware is at fault."""
        nonfinite = self.config.on_nonfinite
        return replace(self.config, on_spike="retry", on_nonfinite="skip" if nonfinite == "rollback" else nonfinite)

    @property
    def strongest(self) -> float:
        """The gradient norm to which the gradient of the newest attempt is clipped before its update; infinite if the guard sets no
        bound."""
        return self.memory.strongest() if self._limited else math.inf

    def judge_update(self, step: int, spoilt: Sequence[tuple[int, str]]) -> GuardDecision:
        """Returns the decision about `step`, whose update left non-finite values on some rank: COMMIT (after a repair), ROLLBACK or
        STOP.

        `spoilt`: (index of the shard, kind of state) for each non-finite tensor of this rank. Collective; the decision is the same
        on every rank.
        """
        world = self._mesh.group("world")
        own = {"damage": damage.as_json(self._damage.not_finite(spoilt))}
        damages = [damage.from_json(row["damage"]) for row in gather_json(own, world)]
        repairable = damage.repairable(damages)
        again = self.memory.setbacks > 0 and step <= self.memory.furthest
        action = after_update(self.config, repairable, again, self.memory.setbacks)
        if action is GuardAction.COMMIT:
            self._damage.repair(damages)
        ranks = tuple(rank for rank, own in enumerate(damages) if own)
        text = messages.after_update(step, action, _named(damages), again)
        return GuardDecision(action, Cause.UPDATE, ranks, self._count, text=text)

    def finish(self, verdict: GuardDecision) -> int | None:
        """Records the decision about the samples computed last, after their update if they had one. Returns the step whose samples
        to compute next as part of the same step; None if the step has ended."""
        if self._late is None:
            self.memory.learn(self._step, *self._values, verdict)
            self.expect(self._step + 1)
            return None
        self.memory.learn_late(self._late, *self._values, verdict, self._step)
        self.expect(self._step)
        self._late = None
        return None if verdict.action in (GuardAction.ROLLBACK, GuardAction.STOP) else self._start()

    def load(self, saved: dict[str, Any], step: int) -> None:
        """Continues from a checkpoint of `step` steps. `saved` is what `memory.as_json` returned when that checkpoint was saved."""
        self.memory.load(saved)
        self.clean = step
        self.expect(step + 1)

    def expect(self, step: int) -> None:
        """Drops the seal after an intended change of the state. Takes a new seal if the state is checked in `step`, the next
        step."""
        self._damage.break_seal()
        if self._checks(step):
            self._damage.seal()

    def _cause(self, step: int, figures: StepValues, damages: Sequence[Sequence[Damage]], same: bool | None) -> Cause | None:
        if any(damages):
            return Cause.STATE if any(item.kind != "copy" for own in damages for item in own) else Cause.WEIGHTS
        if not math.isfinite(figures.loss):
            return Cause.NONFINITE
        if not math.isfinite(figures.norm):
            return Cause.OVERFLOW if figures.scale_can_fall else Cause.NONFINITE
        if spike := self.memory.spike(step, figures.loss, figures.norm):
            return spike
        unconfirmed = self._audits(step) and self._attempts.earlier and not same
        return Cause.GRADIENTS if unconfirmed else None

    def _gather_details(self) -> list[dict[str, Any]]:
        """Returns the gradient checksums and the damages of every rank, by rank. Collective."""
        world = self._mesh.group("world")
        own = {"attempts": self._attempts.as_json(), "damage": damage.as_json(self._damage.damages)}
        return gather_json(own, world)

    def _verdict(self, step: int, action: GuardAction, ranks: tuple[int, ...], same: bool | None, deferred: bool) -> GuardDecision:
        late = f"the samples of step {self._late}, deferred before" if self._late else ""
        if self._first is None:
            text = f"step {step}: {late}, were trained on" if late and action is GuardAction.COMMIT else ""
            return GuardDecision(action, attempts=self._count, text=text)
        cause, before, what = self._first
        ranks = before or ranks
        end = "its samples are trained on later" if deferred else ending(cause, action, ranks, self.memory.setbacks, step)
        text = f"step {step}: " + "; ".join(filter(None, [late, what, diagnosis(cause, ranks, same), end]))
        return GuardDecision(action, cause, ranks, self._count, deferred, text)

    def _checks(self, step: int) -> bool:
        """Returns whether the state is checked in `step`: every guard.check_every steps, and after a save, to check what was
        saved."""
        after_save = self._saves_every > 0 and step > 1 and (step - 1) % self._saves_every == 0
        return self.config.check_every > 0 and (after_save or step % self.config.check_every == 0)

    def _audits(self, step: int) -> bool:
        return bool(self.config.audit_every) and step % self.config.audit_every == 0


def _named(damages: Sequence[Sequence[Damage]]) -> list[str]:
    return [by_rank(rank, [item.what for item in own]) for rank, own in enumerate(damages) if own]
