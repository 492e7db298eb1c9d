"""The guard of one rank's steps: whether a step is applied, computed again, left out, taken back, or ends the run.

    begin -> compute and reduce -> inspect -> agree (one reduction over all ranks) -> judge -> update -> agree that all of it is
    finite -> finish

`begin`, `finish` and, after RETRY, `samples` say which samples are computed next: those of the step, of an earlier one that were
deferred, or of the newest committed one, which tell whether the weights are to blame.

What `judge` decides depends on figures that every rank holds alike, so every rank decides the same without asking again. Only
when one of them says that something is wrong do ranks tell each other the details.
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
    """One attempt at a step, as all ranks hold it."""

    loss: float
    """Nats per token."""
    norm: float
    """Of the whole gradient, the loss scale taken out; not finite when any part of it on any rank is not."""
    found: Sequence[float]
    """What `Guard.inspect` gave, summed over all ranks."""
    scale_can_fall: bool = False
    """Whether a smaller loss scale could make the gradient finite."""


class Guard:
    """One rank's. `memory` is its part of the run's state. `saves_every`: steps between checkpoints, 0 for none. `repeatable`:
    whether a step that is computed again gives the same bits. `steps`: how many steps the run has; None: no end is known."""

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
        """The step whose samples, deferred before, are computed now."""
        self._pending: GuardDecision | None = None
        """The decision to defer samples, if the weights are not to blame."""
        self._values = (0.0, 0.0)
        """Loss and gradient norm of the newest attempt at the samples that are judged."""
        self._limited = False
        """Whether the newest attempt is a spike that is learnt from all the same, with a gradient of bounded norm."""
        self.clean = 0
        """Steps after which the state is known to have been whole: checkpoints of later steps may hold damage."""
        self._first: tuple[Cause, tuple[int, ...], str] | None = None
        """The first thing that was wrong with the step: what, on which ranks, in words."""
        if self._compares:
            engine.before_reduction = self._attempts.before_reduction

    def leaves_out(self, step: int) -> str | None:
        """Why `step` (from 1) is not to be learnt from; None: it is."""
        return self.memory.left_out.get(step)

    def begin(self, step: int) -> int:
        """Before the first attempt at `step` (from 1): the step whose samples are computed, `step` or one that was deferred."""
        self._step, self._late = step, self.memory.due(step, self._steps)
        return self._start()

    def _start(self) -> int:
        self._attempts.begin()
        self._damage.found = []
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
        """Whether those are samples that were learnt from before, computed again to judge the weights."""
        return self._pending is not None

    def inspect(self, step: int) -> list[torch.Tensor]:
        """Look at this rank after the reduction of an attempt: float64 scalars for `StepValues.found`.

        Collective in the steps that `guard.check_every` names, and after an attempt that something was wrong with.
        """
        self._count += 1
        # Once something is wrong everything is looked at: a damaged weight gives the same bad bits every time.
        damaged = (self._checks(step) or self._first is not None) and self._damage.inspect()
        if self._compares:
            self._attempts.end()
        found = torch.tensor(float(damaged), dtype=torch.float64, device=self._mesh.group("world").device)
        return [found, *self._attempts.differing(found)]

    def judge(self, step: int, figures: StepValues) -> GuardDecision:
        """What becomes of `step`; the same on every rank. After RETRY `samples` are to be computed, from where the step was.

        Collective where something is wrong.
        """
        if self._pending:
            verdict, self._pending = self._pending, None
            return self._weigh(step, verdict, figures)
        self._values = figures.loss, figures.norm
        damaged, *differing = figures.found
        differing = differing[: self._attempts.earlier]
        table = self._tell() if damaged or any(differing) else []
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
        if self._limited:  # the same again some steps later, or no step is left to defer them to
            action, deferred = GuardAction.COMMIT, False
        if action is GuardAction.RETRY and any(damages):
            self._damage.repair(damages)
            self._attempts.begin()  # what was computed with damaged weights is nothing to compare with
        elif action is GuardAction.RETRY and self._compares:
            self._attempts.keep()
        verdict = self._verdict(step, action, ranks, same, deferred)
        if not (deferred and self.memory.newest):
            return verdict
        self._pending = verdict
        return GuardDecision(GuardAction.RETRY, attempts=self._count)

    def _weigh(self, step: int, verdict: GuardDecision, figures: StepValues) -> GuardDecision:
        """`verdict`, which defers the samples of `step`, or another one if the weights are to blame.

        `figures` are those of the newest committed step, computed again with the weights as they are. If these stand out too, the
        weights are to blame. The second time in a row the run goes back to a checkpoint, if it makes any.
        """
        loss, norm = figures.loss, figures.norm
        if not self.memory.diverged(step, loss, norm, figures.scale_can_fall):
            return verdict
        assert self.memory.newest is not None
        old, loss_then, norm_then = self.memory.newest
        again = self.memory.diverged_row > 0 and self._saves_every > 0
        action = GuardAction.ROLLBACK if again else GuardAction.SKIP
        if again and not self.config.check_every:  # nobody has looked; but at `old` the figures were right
            self.clean = max(self.clean, old - 1)
        then_and_now = (
            f"step {old}, learnt from at loss {loss_then:g} and gradient norm {norm_then:g}, now has {loss:g} and {norm:g}"
        )
        text = f"{verdict.text}; but {then_and_now}: the weights, not the samples" + ("; back to a checkpoint" if again else "")
        return replace(verdict, action=action, cause=Cause.DIVERGED, deferred=not again, text=text)

    @property
    def _late_config(self) -> GuardConfig:
        """Samples that were deferred are computed again, and learnt from if the hardware is not to blame."""
        nonfinite = self.config.on_nonfinite
        return replace(self.config, on_spike="retry", on_nonfinite="skip" if nonfinite == "rollback" else nonfinite)

    @property
    def strongest(self) -> float:
        """The gradient norm that the update of the newest attempt may have; infinite for any."""
        return self.memory.strongest() if self._limited else math.inf

    def judge_update(self, step: int, spoilt: Sequence[tuple[int, str]]) -> GuardDecision:
        """What becomes of `step` whose update left values that are not finite on some rank: COMMIT (repaired), ROLLBACK, STOP.

        `spoilt`: (shard, kind of its state) for this rank's own. Collective; the same on every rank.
        """
        world = self._mesh.group("world")
        own = {"damage": damage.as_json(self._damage.not_finite(spoilt))}
        damages = [damage.from_json(row["damage"]) for row in gather_json(own, world)]
        repairable = damage.repairable(damages)
        again = self.memory.setbacks > 0 and step <= self.memory.furthest
        action = after_update(self.config, repairable, again, self.memory.setbacks)
        if action is GuardAction.COMMIT:
            self._damage.repair(damages)
        ranks = tuple(rank for rank, found in enumerate(damages) if found)
        text = messages.after_update(step, action, _named(damages), again)
        return GuardDecision(action, Cause.UPDATE, ranks, self._count, text=text)

    def finish(self, verdict: GuardDecision) -> int | None:
        """The samples have been judged so, and the update has happened if it was to: the step whose samples are computed next as
        part of the same step; None when the step has ended."""
        if self._late is None:
            self.memory.learn(self._step, *self._values, verdict)
            self.expect(self._step + 1)
            return None
        self.memory.learn_late(self._late, *self._values, verdict, self._step)
        self.expect(self._step)
        self._late = None
        return None if verdict.action in (GuardAction.ROLLBACK, GuardAction.STOP) else self._start()

    def load(self, saved: dict[str, Any], step: int) -> None:
        """Go on after `step` steps with what a checkpoint holds of `memory`."""
        self.memory.load(saved)
        self.clean = step
        self.expect(step + 1)

    def expect(self, step: int) -> None:
        """The state has changed lawfully, and the next step is `step`."""
        self._damage.break_seal()
        if self._checks(step):
            self._damage.seal()

    def _cause(self, step: int, figures: StepValues, damages: Sequence[Sequence[Damage]], same: bool | None) -> Cause | None:
        if any(damages):
            return Cause.STATE if any(one.kind != "copy" for own in damages for one in own) else Cause.WEIGHTS
        if not math.isfinite(figures.loss):
            return Cause.NONFINITE
        if not math.isfinite(figures.norm):
            return Cause.OVERFLOW if figures.scale_can_fall else Cause.NONFINITE
        if spike := self.memory.spike(step, figures.loss, figures.norm):
            return spike
        unconfirmed = self._audits(step) and self._attempts.earlier and not same
        return Cause.GRADIENTS if unconfirmed else None

    def _tell(self) -> list[dict[str, Any]]:
        """What every rank has found on itself. Collective."""
        world = self._mesh.group("world")
        own = {"attempts": self._attempts.as_json(), "damage": damage.as_json(self._damage.found)}
        return gather_json(own, world)

    def _verdict(self, step: int, action: GuardAction, ranks: tuple[int, ...], same: bool | None, deferred: bool) -> GuardDecision:
        late = f"the samples of step {self._late}, deferred before" if self._late else ""
        if self._first is None:
            text = f"step {step}: {late}, were learnt from" if late and action is GuardAction.COMMIT else ""
            return GuardDecision(action, attempts=self._count, text=text)
        cause, before, what = self._first
        ranks = before or ranks
        end = "its samples are learnt from later" if deferred else ending(cause, action, ranks, self.memory.setbacks, step)
        text = f"step {step}: " + "; ".join(filter(None, [late, what, diagnosis(cause, ranks, same), end]))
        return GuardDecision(action, cause, ranks, self._count, deferred, text)

    def _checks(self, step: int) -> bool:
        """The step after a checkpoint is one too: it shows that nothing had changed while that was written."""
        after_save = self._saves_every > 0 and step > 1 and (step - 1) % self._saves_every == 0
        return self.config.check_every > 0 and (after_save or step % self.config.check_every == 0)

    def _audits(self, step: int) -> bool:
        return bool(self.config.audit_every) and step % self.config.audit_every == 0


def _named(damages: Sequence[Sequence[Damage]]) -> list[str]:
    return [by_rank(rank, [one.what for one in own]) for rank, own in enumerate(damages) if own]
