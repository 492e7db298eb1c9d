"""Chooses the variants of a run's operators, the same on every rank.

Times differ between ranks and between measurements. So rank 0 takes those of its device and broadcasts the choice. What a run has
recorded is kept when it resumes, so that it goes on bit by bit.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bagualu.comm.agree import on_all
from bagualu.comm.group import Communicator
from bagualu.comm.objects import broadcast_json, gather_json
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.parallel.layout import Layout
from bagualu.parallel.precision import chip_of
from bagualu.trainer.costs.cache import device_name
from bagualu.trainer.costs.operator_cases import AttentionShape, OperatorCalls, cases_of
from bagualu.trainer.costs.operator_times import measurable, times_of
from bagualu.trainer.costs.work import work_of
from bagualu.trainer.data.corpus_cache import cache_folder
from bagualu.trainer.operators.choice import (
    COMPILED,
    GIVEN,
    MEASURED,
    USUAL,
    Chosen,
    ChosenOperators,
    by_rule,
    changes_float8,
    kept,
    quickest,
)
from bagualu.trainer.operators.config import OperatorsConfig, generated_of
from bagualu.trainer.operators.operator_set import lacked_by, operator_set
from bagualu.trainer.operators.registry import AUTO, DEFAULT_VARIANTS, FLOAT8_MULTIPLE, GENERATED
from bagualu.trainer.operators.usual import usual_variant
from bagualu.trainer.recipe.config import Recipe

LEAST_SECONDS = 0.03
"""An operator is measured only if its calls are estimated to take a rank this long in a step. Measuring takes a second or two,
which a gain of a tenth wins back in some hundred steps. The number of steps does not count: the choice would depend on it, and so
would the bits of a run that is continued beyond its first end."""
log = logging.getLogger(__name__)


def choose_operators(recipe: Recipe, communicator: Communicator) -> tuple[ChosenOperators, list[str]]:
    """Returns the variants of all operators, and on rank 0 what is to be said about them. Collective. Raises RecipeError on every
    rank if a variant cannot be had."""
    found = on_all(lambda: _choose(recipe, communicator) if communicator.rank == 0 else None, communicator.world)
    values = broadcast_json(None if found is None else found[0].to_json(), communicator.world)
    chosen, remarks = _had_by_all(ChosenOperators.from_json(values), recipe.operators, communicator)
    on_all(lambda: operator_set(chosen.as_config(), chip_of(communicator.device)), communicator.world)  # all or none are refused
    return chosen, [] if found is None else [*found[1], *remarks]


def _had_by_all(chosen: ChosenOperators, given: OperatorsConfig, communicator: Communicator) -> tuple[ChosenOperators, list[str]]:
    """Returns the choices with auto in place of variants for which the machine of some rank lacks something, and what is to be said
    about them. Collective."""
    lacked: dict[str, str] = {}
    own = on_all(lambda: lacked_by(chosen.as_config(), given, chip_of(communicator.device)), communicator.world)
    for rank in gather_json(own, communicator.world):
        lacked.update(rank)
    remarks = [f"operators.{operator}={AUTO}: {chosen.operators[operator].variant} needs {what}, which not all ranks have"
               for operator, what in lacked.items()]  # fmt: skip
    return replace(chosen, operators={**chosen.operators, **dict.fromkeys(lacked, Chosen(AUTO, USUAL))}), remarks


def _choose(recipe: Recipe, communicator: Communicator) -> tuple[ChosenOperators, list[str]]:
    chip, product = chip_of(communicator.device), device_name(communicator.device)
    recorded, begun = _recorded(recipe)
    compiles = recipe.train.compile is True
    before = recorded.operators if recorded is not None else {}
    dropped = [name for name, was in before.items() if was.why == COMPILED and not compiles]
    if recorded is not None and dropped:
        recorded = recorded.without(COMPILED)
    changed = changes_float8(recorded, recipe.operators, recipe.train.dtype)
    chosen, remarks = kept(recorded, recipe.operators, chip, product, recipe.train.dtype)
    layout = recipe.validate(communicator.size)
    if recipe.train.dtype == "float8":
        remarks += _about_float8(recipe, layout, chip)
    if dropped:
        remarks.append(f"train.compile=false: {', '.join(dropped)} are not generated kernels any more, as they were so far")
    if compiles:
        remarks += _compile(chosen, before, recipe.operators)
    micro_batches = recipe.micro_batches() / layout.data
    cases = list(cases_of(work_of(recipe, layout)))
    for operator in DEFAULT_VARIANTS:
        if operator in chosen:
            continue
        calls = [case for case in cases if case.operator == operator]
        usual = [_usual(case, chip) for case in calls] or [DEFAULT_VARIANTS[operator]]
        times = [case.calls * case.call_seconds * (1 if case.each_step else micro_batches) for case in calls]
        seconds = sum(times) / recipe.parallel.pipeline
        again = operator == "linear" and changed
        measures = (again or not begun) and recipe.comm.backend != "simulated" and seconds >= LEAST_SECONDS
        if measures and len(measurable(operator, chip)) > 1:
            chosen[operator] = quickest(usual, _times(calls, communicator.device, cache_folder(recipe.data)))
            remarks += _remark(operator, chosen[operator])
        else:
            chosen[operator] = by_rule(usual)
    if changed:
        remarks.append(f"train.dtype={recipe.train.dtype}: linear layers had operators.linear={before['linear'].variant} so far, "
                       f"have {chosen['linear'].variant} now")  # fmt: skip
    kept_on = recorded.chip if recorded is not None else product
    return ChosenOperators(kept_on, {operator: chosen[operator] for operator in DEFAULT_VARIANTS}), remarks


def _about_float8(recipe: Recipe, layout: Layout, chip: str) -> list[str]:
    remarks = ["a CPU computes products in float8, but slowly; this is for trying out"] if chip == "cpu" else []
    narrow = {name: width for name, width in recipe.float8_widths(layout).items() if width % FLOAT8_MULTIPLE}
    if narrow:
        layers = " and ".join(f"{width} ({name})" for name, width in narrow.items())
        remarks.append(f"linear layers of width {layers} on a rank multiply in bfloat16, since that is no multiple of "
                       f"{FLOAT8_MULTIPLE}")  # fmt: skip
    return [f"train.dtype=float8: {remark}" for remark in remarks]


def _compile(chosen: dict[str, Chosen], before: Mapping[str, Chosen], given: OperatorsConfig) -> list[str]:
    """Changes `chosen` to generated kernels where the recipe names no variant, now or when the run began; returns what is to be
    said about that. `before`: what the run has recorded."""
    remarks = []
    for operator in generated_of(given):
        was = before.get(operator)
        if was is not None and was.why == GIVEN:
            continue
        chosen[operator] = Chosen(GENERATED, COMPILED)
        if was is not None and was.variant != GENERATED:
            remarks.append(f"operators.{operator}={GENERATED}, by train.compile=true; so far the run had {was.variant}")
    return remarks


def _usual(case: OperatorCalls, chip: str) -> str:
    if case.operator != "attention" or not isinstance(case.shape, AttentionShape):
        return DEFAULT_VARIANTS[case.operator]
    return usual_variant(chip, case.dtype == "bfloat16", case.shape.length, case.shape.window)


def _times(cases: Sequence[OperatorCalls], device: torch.device, cache: Path) -> list[dict[str, float]]:
    """Returns, for each case, the seconds of all its calls in a micro-batch or an update, by variant."""
    return [{name: seconds * case.calls for name, seconds in times_of(case, device, cache).items()} for case in cases]


def _remark(operator: str, chosen: Chosen) -> list[str]:
    if chosen.why != MEASURED:
        return []
    times = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in chosen.seconds.items())
    of = "an update" if operator == "update" else "a micro-batch"
    return [f"operators.{operator}={chosen.variant}, as measured: {times} for {of}"]


def _recorded(recipe: Recipe) -> tuple[ChosenOperators | None, bool]:
    """Returns what the run that is resumed has recorded, None if nothing, and whether there is such a run: one without a
    record had the usual variants."""
    run = RunDirectory(recipe.run.dir)
    if not recipe.checkpoint.resume:
        return None, False
    try:
        recorded = ChosenOperators.read(run.operators)
        return recorded, recorded is not None or run.has_begun()
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s); operators are computed by the usual variants", run.operators, error)
        return None, True
