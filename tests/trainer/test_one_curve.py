"""Invariant 1: any valid layout trains the same curve as one process, in float64 to 1e-9, on Gloo and simulated."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from bagualu.comm.errors import RecipeError
from bagualu.parallel.balance.stages.forecast import by_rank
from bagualu.parallel.balance.stages.problem import Problem
from bagualu.parallel.pipeline.registry import SCHEDULES, compute_schedule
from bagualu.parallel.pipeline.split import split_layers
from bagualu.trainer.costs.analytic import analytic_table
from bagualu.trainer.costs.work import work_of
from bagualu.trainer.recipe.config import Recipe
from tests.covering import covering, in_turns
from tests.harness import BACKENDS, ON_GPU, run
from tests.parity import Curve, assert_same, small_recipe, train
from tests.trainer.models.reference import unfelt
from tests.trainer.models.styles import STYLES

STEPS, BATCH = 2, 8
"""The gradients of the second step are those of weights that the first one has changed, and its moments sums of both."""
SLOW = pytest.mark.slow

MOE = {"moe__experts": 4, "moe__ffn": 8, "moe__every": 2, "moe__shared_experts": 1}
MODELS = {
    "dense": {},
    "dense_tied": {"tie_embeddings": True},
    "dense_5_layers_gqa": {"layers": 5, "kv_heads": 2},
    "dense_tied_padded": {"tie_embeddings": True, "vocab": 61, "layers": 3},
    "moe": MOE,
    "moe_tied": {**MOE, "tie_embeddings": True, "moe__bias_rate": 0.05},
    "moe_everywhere_5_layers": {**MOE, "moe__every": 1, "moe__shared_experts": 0, "layers": 5, "moe__top_k": 3},
    "dense_8_layers": {"layers": 8},
    "dense_30_layers": {"layers": 30},
    "moe_tied_5_layers": {**MOE, "tie_embeddings": True, "layers": 5, "moe__bias_rate": 0.05},
    "moe_tied_9_layers": {**MOE, "tie_embeddings": True, "layers": 9},
    **STYLES,
    **{f"{style}_moe": {**changes, **MOE} for style, changes in STYLES.items()},
}

# data, tensor, pipeline, expert, then what differs from the defaults
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    # one axis, and every pair of axes together
    ("dense", {"data": 2}),
    ("dense", {"data": 4, "zero": 0}),
    ("dense", {"tensor": 2}),
    ("dense", {"tensor": 4}),
    ("dense", {"pipeline": 2}),
    ("dense", {"pipeline": 4, "schedule": "gpipe"}),
    ("dense", {"data": 2, "tensor": 2}),
    ("dense", {"data": 2, "pipeline": 2}),
    ("dense", {"data": 2, "pipeline": 2, "schedule": "gpipe", "zero": 0}),
    ("dense", {"tensor": 2, "pipeline": 2}),
    ("dense", {"tensor": 2, "sequence": True}),
    ("dense", {"tensor": 4, "sequence": True, "data": 2}),
    ("dense", {"tensor": 2, "sequence": True, "pipeline": 2}),
    ("dense", {"data": 2, "tensor": 2, "pipeline": 2}),
    ("dense", {"data": 2, "tensor": 2, "pipeline": 2, "sequence": True}),
    ("dense", {"data": 8}),
    ("dense", {"data": 2, "zero": 2}),
    ("dense", {"data": 4, "tensor": 2, "sequence": True, "zero": 2}),
    ("dense_tied", {"data": 2, "pipeline": 2, "zero": 2}),
    ("moe_tied", {"data": 4, "expert": 2, "zero": 2}),
    ("dense", {"data": 2, "zero": 3}),
    ("dense_tied", {"data": 2, "tensor": 2, "sequence": True, "zero": 3}),
    ("dense_tied", {"data": 2, "pipeline": 2, "zero": 3}),
    ("moe_tied", {"data": 4, "expert": 2, "zero": 3}),
    ("moe_everywhere_5_layers", {"data": 2, "tensor": 2, "expert": 2, "pipeline": 2, "balance": [2, 3], "zero": 3}),
    # tied embeddings, on one stage and across the first and the last
    ("dense_tied", {"data": 2}),
    ("dense_tied", {"tensor": 2}),
    ("dense_tied", {"pipeline": 2}),
    ("dense_tied", {"pipeline": 4}),
    ("dense_tied", {"data": 2, "pipeline": 2}),
    ("dense_tied", {"data": 2, "pipeline": 2, "zero": 0}),
    ("dense_tied", {"data": 2, "tensor": 2, "pipeline": 2, "sequence": True}),
    ("dense_tied_padded", {"tensor": 4, "pipeline": 2}),
    ("dense_tied_padded", {"tensor": 4, "sequence": True}),
    ("dense_tied_padded", {"data": 2, "pipeline": 3}),
    # layers that do not divide, and splits by hand
    ("dense_5_layers_gqa", {"pipeline": 2}),
    ("dense_5_layers_gqa", {"pipeline": 3, "data": 2}),
    ("dense_5_layers_gqa", {"pipeline": 4, "tensor": 2}),
    ("dense_5_layers_gqa", {"pipeline": 3, "balance": [1, 3, 1]}),
    ("dense_5_layers_gqa", {"pipeline": 5}),
    # experts alone, with each other axis, and with all of them
    ("moe", {"data": 2}),
    ("moe", {"tensor": 2}),
    ("moe", {"pipeline": 2}),
    ("moe", {"data": 2, "expert": 2}),
    ("moe", {"data": 4, "expert": 4}),
    ("moe", {"data": 4, "expert": 2}),
    ("moe", {"data": 4, "expert": 2, "zero": 0}),
    ("moe", {"data": 2, "expert": 2, "tensor": 2}),
    ("moe", {"data": 2, "expert": 2, "tensor": 2, "sequence": True}),
    ("moe", {"data": 2, "expert": 2, "pipeline": 2}),
    ("moe", {"data": 4, "expert": 2, "pipeline": 2, "schedule": "gpipe"}),
    ("moe", {"data": 2, "expert": 2, "tensor": 2, "pipeline": 2}),
    ("moe_tied", {"data": 2, "expert": 2, "tensor": 2, "pipeline": 2, "sequence": True}),
    ("moe_tied", {"data": 2, "expert": 2, "pipeline": 4}),
    ("moe_everywhere_5_layers", {"data": 8, "expert": 4}),
    ("moe_everywhere_5_layers", {"data": 2, "expert": 2, "pipeline": 3}),
    ("moe_everywhere_5_layers", {"data": 2, "tensor": 2, "expert": 2, "pipeline": 2, "balance": [2, 3], "zero": 0}),
]

# Layouts that together have every axis, ZeRO stage and kind of backward pass; models in the style of published ones on each.
OF_STYLES: list[tuple[str, dict[str, Any]]] = [
    ("", {"data": 2, "tensor": 2, "sequence": True, "zero": 3}),
    ("", {"data": 2, "tensor": 2, "pipeline": 2, "schedule": "zb_v", "zero": 2, "bucket_bytes": 512}),
    ("_moe", {"data": 2, "expert": 2, "tensor": 2, "pipeline": 2, "sequence": True}),
]
MORE_OF_STYLES: list[tuple[str, dict[str, Any]]] = [
    ("", {"data": 4}),
    ("", {"tensor": 4}),
    ("", {"pipeline": 4}),
    ("", {"data": 2, "pipeline": 2, "zero": 3}),
    ("", {"tensor": 2, "pipeline": 2, "sequence": True, "schedule": "dualpipe_v"}),
    ("_moe", {"data": 4, "expert": 2, "zero": 3}),
    ("_moe", {"data": 2, "tensor": 2, "pipeline": 2, "schedule": "interleaved_1f1b", "zero": 0}),
]

# Every other schedule: with data parallel ranks, and then with all axes, tied embeddings and stages that differ in length: two
# pipeline ranks have up to 4 of them, four have up to 8.
SCHEDULED: list[tuple[str, dict[str, object]]] = [
    *(("dense_tied", {"data": 2, "pipeline": 2, "schedule": name}) for name in SCHEDULES if name not in ("gpipe", "1f1b")),
    *(
        ("moe_tied_5_layers", {"data": 2, "expert": 2, "tensor": 2, "sequence": True, "pipeline": 2, "schedule": name})
        for name in SCHEDULES
    ),
    *(("moe_tied_9_layers", {"pipeline": 4, "schedule": name, "data": 2, "zero": 0}) for name in SCHEDULES),
    *(("moe_tied_9_layers", {"pipeline": 2, "schedule": name, "data": 2, "zero": 2, "bucket_bytes": 512}) for name in SCHEDULES),
    *(("moe_tied_9_layers", {"pipeline": 2, "schedule": name, "data": 2, "zero": 3}) for name in SCHEDULES),
    ("moe_tied_9_layers", {"pipeline": 2, "schedule": "interleaved_1f1b", "virtual_stages": 4}),
    ("moe_tied_9_layers", {"pipeline": 3, "schedule": "zb_v", "balance": [2, 1, 1, 3, 1, 1]}),
    ("dense_tied", {"data": 2, "shares": [5, 3]}),
    # replicas whose buckets are complete in different orders
    *(
        ("dense_8_layers", {"data": 2, "pipeline": 2, "schedule": name, "shares": [2, 6], "bucket_bytes": size})
        for name, size in (("dualpipe_v", 4096), ("zb_v", 512), ("interleaved_1f1b", 512))
    ),
    ("moe_tied_9_layers", {"data": 3, "pipeline": 2, "schedule": "zb_h1", "shares": [4, 1, 3], "zero": 0}),
    ("dense_30_layers", {"pipeline": 4}),
    ("dense_tied", {"pipeline": 1, "schedule": "zb_v"}),
    ("dense_tied", {"pipeline": 1, "schedule": "interleaved_1f1b", "virtual_stages": 3}),
    ("dense_tied", {"pipeline": 1, "schedule": "zb_h1"}),
]


# Stages that begin inside layers: together every schedule, ZeRO stage, axis, mixtures and tied embeddings. Ranks of a V, and a
# single rank, may hold both halves of a layer in two of their stages.
CUT_INSIDE: list[tuple[str, dict[str, object]]] = [
    ("dense_8_layers", {"pipeline": 2, "balance": [4.5, 3.5]}),
    ("moe_tied_5_layers", {"data": 2, "expert": 2, "tensor": 2, "sequence": True, "pipeline": 2, "balance": [2.5, 2.5]}),
    ("dense_5_layers_gqa", {"pipeline": 4, "schedule": "gpipe", "data": 2, "zero": 0, "balance": [0.5, 2, 0.5, 2]}),
    ("moe_everywhere_5_layers", {"pipeline": 2, "schedule": "zb_h1", "data": 2, "zero": 3, "balance": [1.5, 3.5]}),
    (
        "moe_tied_9_layers",
        {"pipeline": 2, "schedule": "zb_v", "data": 2, "zero": 2, "bucket_bytes": 512, "balance": [2, 2.5, 2.5, 2]},
    ),
    ("moe_tied_5_layers", {"pipeline": 2, "schedule": "zb_v", "tensor": 2, "zero": 3, "data": 2, "balance": [1, 1.5, 1, 1.5]}),
    ("moe_tied_5_layers", {"pipeline": 2, "schedule": "v_half", "data": 2, "expert": 2, "balance": [1.5, 1, 1.5, 1]}),
    ("dense_tied_padded", {"pipeline": 1, "schedule": "v_half", "tensor": 4, "balance": [1.5, 1.5]}),
    ("moe_everywhere_5_layers", {"pipeline": 2, "schedule": "dualpipe_v", "expert": 2, "data": 2, "balance": [1.5, 0.5, 1, 2]}),
    (
        "moe_tied_9_layers",
        {"pipeline": 2, "schedule": "interleaved_1f1b", "virtual_stages": 4, "balance": [0.5, 1.5, 1, 1, 1.5, 1.5, 1.5, 0.5]},
    ),
    (
        "dense_tied",
        {"data": 2, "pipeline": 1, "schedule": "interleaved_1f1b", "zero": 3, "virtual_stages": 2, "balance": [1.5, 2.5]},
    ),
    ("dense_5_layers_gqa", {"data": 2, "pipeline": 2, "shares": [5, 3], "balance": [2.5, 2.5]}),
    *((f"{style}_moe", {"pipeline": 2, "tensor": 2, "balance": [1.5, 2.5]}) for style in STYLES),
]


def recipe_for(model: str, layout: dict[str, object], **changes: object) -> Recipe:
    return small_recipe(
        **{f"model__{key}": value for key, value in MODELS[model].items()},
        **{f"parallel__{key}": value for key, value in layout.items()},
        **changes,
    )


# Muon, for which every matrix is brought together from the ranks that hold it
BY_MUON: list[tuple[str, dict[str, Any]]] = [
    ("dense_5_layers_gqa", {"data": 4, "tensor": 2}),
    ("dense_tied", {"data": 2, "pipeline": 2, "schedule": "zb_v"}),
    ("moe", {"data": 2, "expert": 2, "tensor": 2, "sequence": True, "zero": 2}),
    ("moe_tied", {"data": 4, "expert": 2, "pipeline": 2, "zero": 0}),
    ("dense_tied", {"data": 2, "pipeline": 2, "zero": 2}),
    ("dense", {"data": 2, "tensor": 2, "zero": 3}),
    *((style, {"data": 2, "tensor": 2}) for style in STYLES),
]


def _as_text(layout: dict[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in layout.items()}


DEFAULTS = _as_text({**dict.fromkeys(("data", "tensor", "pipeline", "expert", "zero"), 1), "schedule": "1f1b", "sequence": False})
"""What a layout that does not say it has: a choice as any other."""


def choices(model: str, layout: dict[str, Any]) -> dict[str, str]:
    """What a case consists of: the options of its model, not its name, and not the number of each stage's layers."""
    options = {"layers": 4, "moe__experts": 0, "moe__bias_rate": 0, "tie_embeddings": False, **MODELS[model]}
    balance, layout = layout.get("balance"), {**layout, "balance": None}
    return {
        **{f"model.{key}": str(value) for key, value in options.items() if key not in ("layers", "moe__ffn")},
        "layers": "odd" if options["layers"] % 2 else "even",
        **DEFAULTS,
        **_as_text(layout),
        "shares": str("shares" in layout),
        "balance": "by size" if balance is None else "inside layers" if any(share % 1 for share in balance) else "by hand",
    }


def _quick() -> set[str]:
    cases = [*LAYOUTS, *SCHEDULED, *CUT_INSIDE]
    return {case_name(*cases[index]) for index in covering([choices(*case) for case in cases])}


@functools.cache
def alone(model: str, optimizer: str = "adamw", steps: int = STEPS) -> Curve:
    """The curve of one process that takes the whole batch at once."""
    return run("simulated", 1, train, recipe_for(model, {}, train__micro_batch=BATCH, optim__name=optimizer), steps)[0]


def name_of(layout: dict[str, object]) -> str:
    return "-".join(f"{key}{value}".replace(" ", "") for key, value in layout.items())


def case_name(model: str, layout: dict[str, Any]) -> str:
    return f"{model}-{name_of(layout)}"


QUICK = _quick()
"""Of all layouts, schedules and cuts: cases that have every pair of choices that any of them has."""


def on_both(
    cases: Sequence[tuple[str, dict[str, Any]]],
    over_processes: Callable[..., bool] | None = None,
    on_gpu: bool = False,
    needed: Sequence[int] | None = None,
) -> Any:
    """Marks a test with these cases on each backend: on Gloo if `over_processes` says so, else simulated, and on the other if slow
    tests run. By default each case is on the backend on which more of its choices have not been yet. Cases that are not `needed`,
    by their index, wait for slow tests too; by default all are."""
    needed = range(len(cases)) if needed is None else needed
    if over_processes is None:
        turns = dict(zip(needed, _in_turns([cases[index] for index in needed]), strict=True))
        quick = [turns.get(index) for index in range(len(cases))]
    else:
        quick = [("gloo" if over_processes(*case) else "simulated") if i in needed else None for i, case in enumerate(cases)]
    return pytest.mark.parametrize(
        ("backend", "model", "layout"),
        [
            pytest.param(backend, *case, id=f"{case[0]}-{name_of(case[1])}-{backend}", marks=marks)
            for name in (*BACKENDS, *([ON_GPU] if on_gpu else []))
            for case, usual in zip(cases, quick, strict=True)
            for backend, marks in [
                (name, [SLOW] * (name != usual)) if isinstance(name, str) else (name.values[0], list(name.marks))
            ]
        ],
    )


def quick_of(cases: Sequence[tuple[str, dict[str, Any]]]) -> list[int]:
    return [index for index, case in enumerate(cases) if case_name(*case) in QUICK]


def _in_turns(cases: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    been: dict[str, set[str]] = {backend: set() for backend in BACKENDS}
    found = []
    for model, layout in cases:
        choices = {model, *(f"{key}={value}" for key, value in layout.items())}
        new = {backend: len(choices - been[backend]) for backend in BACKENDS}
        backend = max(BACKENDS, key=lambda name: (new[name], -found.count(name)))
        been[backend] |= choices
        found.append(backend)
    return found


@on_both(LAYOUTS, on_gpu=True, needed=quick_of(LAYOUTS))
def test_layout_trains_the_same_curve(backend: str, model: str, layout: dict[str, Any]) -> None:
    """Two sequences at once where every stage still has one to work on; one more step, for what only a third one shows."""
    stages, in_replica = layout.get("pipeline", 1), BATCH // layout.get("data", 1)
    recipe = recipe_for(model, layout, train__micro_batch=2 if in_replica >= 2 * stages else 1)
    assert_same(run(backend, recipe.world_size(), train, recipe, STEPS + 1), [alone(model, steps=STEPS + 1)])


def assert_style_trains_the_same_curve(backend: str, model: str, layout: dict[str, Any], **changes: object) -> None:
    recipe = recipe_for(model, layout, **changes)
    assert_same_as_alone(run(backend, recipe.world_size(), train, recipe, STEPS), model, recipe)


def assert_same_as_alone(curves: list[Curve], model: str, recipe: Recipe) -> None:
    assert_same(curves, [alone(model, recipe.optim.name)], unfelt=".key.bias" if unfelt(recipe.model) else None)


@in_turns(lambda x: x if isinstance(x, str) else f"{x[0]}-{name_of(x[1])}", style=list(STYLES), kind_and_layout=OF_STYLES)
def test_models_as_published_train_the_same_curve(style: str, kind_and_layout: tuple[str, dict[str, Any]]) -> None:
    kind, layout = kind_and_layout
    assert_style_trains_the_same_curve("simulated", style + kind, layout)


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("kind", "layout"), [*OF_STYLES, *MORE_OF_STYLES], ids=[f"{kind}-{name_of(x)}" for kind, x in [*OF_STYLES, *MORE_OF_STYLES]]
)
def test_models_as_published_train_the_same_curve_on_more_layouts(kind: str, layout: dict[str, Any], style: str) -> None:
    assert_style_trains_the_same_curve("gloo", style + kind, layout)


@in_turns(style=list(STYLES), recompute=["full", "attention", "every:2"])
def test_recompute_and_host_memory_do_not_matter_to_models_as_published(style: str, recompute: str) -> None:
    layout = {"data": 2, "pipeline": 2, "zero": 2}
    assert_style_trains_the_same_curve("simulated", style, layout, train__recompute=recompute, train__offload_bytes=4000)


@pytest.mark.slow
def test_sixty_four_ranks_of_one_process_train_the_same_curve() -> None:
    recipe = recipe_for("moe", {"data": 4, "tensor": 4, "pipeline": 4, "expert": 4}, train__micro_batch=1)
    assert_same(run("simulated", 64, train, recipe, STEPS), [alone("moe")])


@on_both(BY_MUON, lambda model, layout: model not in STYLES and "tensor" in layout, on_gpu=True)
def test_muon_trains_the_same_curve(backend: str, model: str, layout: dict[str, Any]) -> None:
    recipe = recipe_for(model, layout, optim__name="muon")
    assert_same_as_alone(run(backend, recipe.world_size(), train, recipe, STEPS), model, recipe)


@on_both(SCHEDULED, lambda model, layout: model == "dense_tied" and layout.get("pipeline") == 2, needed=quick_of(SCHEDULED))
def test_schedule_trains_the_same_curve(backend: str, model: str, layout: dict[str, object]) -> None:
    recipe = recipe_for(model, layout, train__micro_batch=2 if model == "dense_30_layers" else 1)
    assert_same(run(backend, recipe.world_size(), train, recipe, STEPS), [alone(model)])


@on_both(CUT_INSIDE, lambda model, layout: layout.get("balance") == [2.5, 2.5], needed=quick_of(CUT_INSIDE))
def test_stages_that_begin_inside_layers_train_the_same_curve(backend: str, model: str, layout: dict[str, Any]) -> None:
    recipe = recipe_for(model, layout)
    assert_same_as_alone(run(backend, recipe.world_size(), train, recipe, STEPS), model, recipe)


def test_thirty_layers_on_four_stages_are_thirty() -> None:
    weights = {name for name, *_ in alone("dense_30_layers").pieces}
    assert {f"weight/layers.{i}.attention.query.weight" for i in range(30)} <= weights


WAYS: list[tuple[object, int]] = [
    ("full", 0), ("attention", 0), ("experts", 0), ("every:2", 4000), ([1, 3, 4], 0), ("bytes", 0),
    ("none", 4000), ("none", 2**30), ("attention", 2**30), ("full", 4000), ("bytes", 4000),
]  # fmt: skip
"""What is recomputed, and how many bytes of activations may be in host memory."""
AXES: list[dict[str, object]] = [
    {"pipeline": 2, "data": 2, "expert": 2},
    {"pipeline": 2, "data": 2, "expert": 2, "tensor": 2, "sequence": True},
    {"pipeline": 2, "tensor": 2, "zero": 0},
    {"pipeline": 2, "data": 2, "zero": 2, "bucket_bytes": 512},
    {"pipeline": 2, "data": 2, "zero": 3, "expert": 2},
]


def recomputing(layout: dict[str, object], recompute: object, offload_bytes: int) -> Recipe:
    """For the recompute "bytes": a rank keeps as many as lie in the middle between all activations and the fewest."""
    recipe = recipe_for("moe_tied_5_layers", layout, train__offload_bytes=offload_bytes, train__recompute=recompute)
    if recompute == "bytes":
        recipe.train.recompute = "auto"
        recipe.parallel.memory_bytes = 10**9
        degrees = recipe.validate(recipe.world_size())
        schedule = compute_schedule(recipe.parallel.schedule, degrees.pipeline, BATCH // degrees.data)
        problem = Problem(analytic_table(work_of(recipe, degrees)), schedule, [1.0, 1.0], None, recipe.activations())
        slices = split_layers(recipe.model.layers, schedule.placement, "uniform")
        pieces = by_rank(problem, problem.pieces(slices))
        most = max(problem.activation_bytes(rank, mine) for rank, mine in enumerate(pieces))
        least = max(problem.least_bytes(rank, mine)[1] for rank, mine in enumerate(pieces))
        recipe.train.recompute, recipe.parallel.memory_bytes = f"bytes:{(most + least) // 2}", None
    return recipe


def assert_recomputing_does_not_matter(
    layout: dict[str, object], recompute: object, offload_bytes: int, backend: str = "simulated"
) -> None:
    recipe = recomputing(layout, recompute, offload_bytes)
    assert_same(run(backend, recipe.world_size(), train, recipe, STEPS), [alone("moe_tied_5_layers")])


@pytest.mark.parametrize("backend", [pytest.param("gloo", marks=pytest.mark.slow), "simulated"])
@pytest.mark.parametrize(("recompute", "offload_bytes"), WAYS, ids=str)
def test_recompute_and_host_memory_do_not_matter(backend: str, recompute: object, offload_bytes: int) -> None:
    """Every way once, with one of the schedules and axes."""
    way = WAYS.index((recompute, offload_bytes))
    layout = {**AXES[way % len(AXES)], "schedule": SCHEDULES[way % len(SCHEDULES)]}
    assert_recomputing_does_not_matter(layout, recompute, offload_bytes, backend)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("recompute", "offload_bytes"), WAYS, ids=str)
def test_recompute_and_host_memory_do_not_matter_to_any_schedule(recompute: object, offload_bytes: int, schedule: str) -> None:
    """All pairs of a way and a schedule, and all pairs of either and axes."""
    way, number = WAYS.index((recompute, offload_bytes)), SCHEDULES.index(schedule)
    assert_recomputing_does_not_matter({**AXES[(way + number) % len(AXES)], "schedule": schedule}, recompute, offload_bytes)


@pytest.mark.parametrize(
    ("recompute", "offload_bytes"),
    [pytest.param(*way, marks=[SLOW] * (index % 2 == 1), id="-".join(map(str, way))) for index, way in enumerate(WAYS)],
)
def test_recompute_and_host_memory_do_not_matter_to_stages_that_begin_inside_layers(recompute: object, offload_bytes: int) -> None:
    cuts = [{"balance": [2.5, 2.5]}, {"schedule": "zb_v", "balance": [1, 1.5, 1, 1.5]}]
    number = WAYS.index((recompute, offload_bytes))
    assert_recomputing_does_not_matter({**AXES[number % len(AXES)], **cuts[number // 2 % 2]}, recompute, offload_bytes)


@pytest.mark.parametrize("micro_batch", [1, 4])
@on_both([(model, {"data": 2, "pipeline": 2}) for model in ("dense", "moe")])
def test_micro_batch_does_not_matter(backend: str, model: str, layout: dict[str, object], micro_batch: int) -> None:
    recipe = recipe_for(model, layout, train__micro_batch=micro_batch)
    assert_same(run(backend, 4, train, recipe, STEPS), [alone(model)])


@st.composite
def recipes(draw: st.DrawFn) -> tuple[str, Recipe]:
    model = draw(st.sampled_from(sorted(MODELS)))
    degree = st.sampled_from([1, 2, 4])
    layout = {
        "data": draw(degree), "tensor": draw(degree), "pipeline": draw(st.integers(1, 4)), "expert": draw(degree),
        "sequence": draw(st.booleans()), "schedule": draw(st.sampled_from(SCHEDULES)),
        "zero": draw(st.integers(0, 3)), "bucket_bytes": draw(st.sampled_from([1, 4096, 2**20])),
    }  # fmt: skip
    return model, recipe_for(model, layout, train__micro_batch=draw(st.sampled_from([1, 2])))


drawing = functools.partial(settings, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@drawing(max_examples=5)
@given(recipes())
def test_any_valid_layout_trains_the_same_curve(drawn: tuple[str, Recipe]) -> None:
    assert_trains_the_same_curve(*drawn)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@drawing(max_examples=40)
@given(recipes())
def test_many_valid_layouts_train_the_same_curve(backend: str, drawn: tuple[str, Recipe]) -> None:
    assert_trains_the_same_curve(*drawn, backend)


def assert_trains_the_same_curve(model: str, recipe: Recipe, backend: str = "simulated") -> None:
    world = recipe.world_size()
    assume(world <= 8 and _valid(recipe, world))
    assert_same_as_alone(run(backend, world, train, recipe, STEPS), model, recipe)


def _valid(recipe: Recipe, world: int) -> bool:
    try:
        recipe.validate(world)
    except RecipeError:  # refused with its reason; test_config.py holds that
        return False
    return True
