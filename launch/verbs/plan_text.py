"""What `bagualu plan` prints: the best layouts, and what other choices cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from bagualu.launch.verbs.prediction_text import quick_text
from bagualu.parallel.balance.stages.show import aligned
from bagualu.parallel.planner.layouts import KEYS
from bagualu.parallel.planner.search import Plan, RankedLayout, StepParts, slower_by
from bagualu.parallel.simulation.step_parts import legend
from bagualu.trainer.costs.prediction import size_text
from bagualu.trainer.recipe.override_text import typed
from bagualu.trainer.simulation.failures import RunLength
from bagualu.trainer.simulation.predict import Prediction

Ranked = RankedLayout[Prediction]
_MOST_REASONS = 2
_WORTH_NAMING = 0.005
"""A part of a step is not named as a reason if it differs by less than this fraction of the step."""
_IMPLIED = ("parallel.data", "parallel.balance", "parallel.shares", "parallel.virtual_stages")
"""Keys whose values follow from others, so that no other choice of them is shown by itself."""
_COLUMNS = {
    "data": "parallel.data", "tensor": "parallel.tensor", "pipeline": "parallel.pipeline", "expert": "parallel.expert",
    "micro-batch": "train.micro_batch", "schedule": "parallel.schedule", "recompute": "train.recompute", "zero": "parallel.zero",
    "sequence": "parallel.sequence", "layers of stages": "parallel.balance", "shares": "parallel.shares",
}  # fmt: skip
_USUAL = (None, 1, False, "uniform")
"""Values of which a column would show nothing new."""
_MOST_NUMBERS = 8
"""A column shows longer lists by their least and largest number."""
_NOTES = (
    "step s: the predicted seconds of a training step. MFU: the part of the chips' peak that the model's own FLOPs take.",
    "memory: tensors on the fullest rank. zero: the ZeRO stage. schedule xN: with N stages on each pipeline rank.",
    "because of: the parts of the step that take longest compared with the best layout, and how much longer.",
)


def parts_of(one: Ranked) -> StepParts:
    """Returns what the predicted step of a layout consists of, the mean of all ranks."""
    assert one.exact is not None
    return StepParts(one.exact.parts())


def reasons(parts: StepParts, best: StepParts) -> list[tuple[str, float]]:
    """Returns the parts in which a step is longest compared with the best, with the seconds, the longest first."""
    least = _WORTH_NAMING * best.total
    return [(part, seconds) for part, seconds in slower_by(parts, best) if seconds >= least][:_MOST_REASONS]


def other_choices(plan: Plan[Prediction]) -> list[tuple[str, Ranked]]:
    """Returns, for each other value of a key than that of the best layout, the best layout found that has it: the fastest that fits
    or, if none does, the one that exceeds its device least. Layouts that stand for several values come once, with all of them."""
    best, *rest = plan.ranked
    values = best.layout.values()
    found: dict[tuple[str, Any], Ranked] = {}
    for one in [*rest, *plan.others]:
        for key, value in one.layout.values().items():
            if key in _IMPLIED or value == values[key]:
                continue
            known = found.get((key, str(value)))
            if known is None or (one.fits and not known.fits) or (not one.fits and one.need.excess_bytes < known.need.excess_bytes):
                found[key, str(value)] = one
    named: dict[int, tuple[list[str], Ranked]] = {}
    for (key, _), one in sorted(found.items(), key=lambda item: KEYS.index(item[0][0])):
        named.setdefault(id(one), ([], one))[0].append(f"{key}={typed(one.layout.values()[key])}")
    return [(" ".join(keys), one) for keys, one in named.values()]


def table(plan: Plan[Prediction], top: int) -> list[str]:
    """Returns a line for each of the `top` best layouts, with the reasons why it is slower than the best."""
    shown = plan.ranked[:top]
    columns = [name for name, key in _COLUMNS.items() if name in ("data", "tensor", "pipeline") or _varied(shown, key)]
    rows = [["", "step s", "tokens/s/device", "MFU", "memory", *columns, "slower", "because of"]]
    best = parts_of(shown[0])
    for number, one in enumerate(shown, 1):
        assert one.exact is not None
        values = one.layout.values()
        slower = one.exact.step_seconds / shown[0].exact.step_seconds - 1  # type: ignore[union-attr]
        rows.append([
            str(number), f"{one.exact.step_seconds:.4g}", f"{one.exact.tokens_per_second_per_device:.0f}", f"{one.exact.mfu:.3f}",
            size_text(one.need.bytes), *(_cell(values, name) for name in columns),
            f"{slower:+.1%}" if number > 1 else "", _because(reasons(parts_of(one), best)) if number > 1 else "",
        ])  # fmt: skip
    return [line if line.strip() else "" for line in aligned(rows)]


def _varied(shown: Sequence[Ranked], key: str) -> bool:
    return any(one.layout.values()[key] not in _USUAL for one in shown)


def _cell(values: Mapping[str, Any], column: str) -> str:
    value = values[_COLUMNS[column]]
    if column == "schedule" and values["parallel.pipeline"] == 1:
        return "-"
    stages = values["parallel.virtual_stages"]
    if column == "schedule" and stages:
        return f"{value} x{stages}"
    if isinstance(value, list):
        return ",".join(map(str, value)) if len(value) <= _MOST_NUMBERS else f"{min(value)} to {max(value)}"
    return "default" if value is None else typed(value)


def length_text(length: RunLength, step_tokens: int) -> str:
    """Returns what fits into the time that was asked for. `step_tokens`: the tokens of a step."""
    return (f"in {length.days:g} days: train.steps={length.steps}, {length.steps * step_tokens:.3g} tokens, end in time in 95% of "
            f"runs\n  {length.effective.mean:.1%} of the time is training, the rest goes to failures and checkpoints")  # fmt: skip


def notes(plan: Plan[Prediction], top: int) -> list[str]:
    """Returns lines that explain the words of the table and of the other choices."""
    best = plan.ranked[0]
    compared = [(parts_of(one), parts_of(best)) for one in plan.ranked[1:top]]
    compared += [_compared(one, best) for _, one in other_choices(plan) if one.fits]
    named = [part for own, other in compared for part, _ in reasons(own, other)]
    about = ["about: not predicted, but estimated from single layers."] if any(
        one.exact is None and one.fits for _, one in other_choices(plan)) else []  # fmt: skip
    assert best.exact is not None
    quick = [f"figures: {quick_text(best.exact.cluster)}"] if best.exact.cluster.quick else []
    return [*_NOTES, *about, *legend(named), *quick]


def _compared(one: Ranked, best: Ranked) -> tuple[StepParts, StepParts]:
    """Returns the parts of both steps: predicted or, if that of `one` was only estimated, both estimated."""
    return (parts_of(one), parts_of(best)) if one.exact is not None else (one.parts, best.parts)


def choice_lines(plan: Plan[Prediction]) -> list[str]:
    """Returns a line for each other choice: what it costs, or by how much it does not fit."""
    best = plan.ranked[0]
    rows = []
    for keys, one in other_choices(plan):
        own, compared = _compared(one, best)
        if one.fits:
            about = "" if one.exact is not None else "about "
            rows.append((keys, f"{about}{own.total / compared.total - 1:+.1%}", _because(reasons(own, compared))))
        else:
            rows.append((keys, "does not fit", f"{size_text(one.need.excess_bytes)} more than its device has"))
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return [f"  {keys:<{widths[0]}}  {cost:>{widths[1]}}  {why}".rstrip() for keys, cost, why in rows]


def _because(found: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{part} +{seconds:.3g} s" for part, seconds in found)


def as_plan(one: Ranked, layout: Mapping[str, Any], command: str, best: Ranked) -> dict[str, Any]:
    """Returns a layout as an object for JSON."""
    assert one.exact is not None
    return {
        "step_seconds": one.exact.step_seconds,
        "tokens_per_second_per_device": one.exact.tokens_per_second_per_device,
        "mfu": one.exact.mfu,
        "hfu": one.exact.hfu,
        "memory_bytes": one.need.bytes,
        "layout": dict(layout),
        "command": command,
        "estimated_seconds": one.parts.total,
        "parts": dict(parts_of(one).seconds),
        "slower_because": dict(reasons(parts_of(one), parts_of(best))),
    }


def as_choice(keys: str, one: Ranked, layout: Mapping[str, Any], best: Ranked) -> dict[str, Any]:
    """Returns another choice as an object for JSON."""
    own, compared = _compared(one, best)
    return {
        "choice": keys,
        "layout": dict(layout),
        "fits": one.fits,
        "excess_bytes": max(0, one.need.excess_bytes),
        "memory_bytes": one.need.bytes,
        "slower": own.total / compared.total - 1,
        "slower_because": dict(reasons(own, compared)),
    }
