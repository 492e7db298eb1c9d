"""What the passes of single layers cost a rank, from traces of models of a few layers.

A plan compares thousands of layouts, of which few can be traced as a whole. But the passes of a layer depend only on how it is
divided, so a stage with one layer is traced instead, once for each way to divide it. The first and the last stage also hold the
embedding and the head, whose passes are what these stages do besides their layer. The three stages are those of a pipeline with a
schedule that splits backward passes, so the trace tells the gradient of the input from that of the weights.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property

from bagualu.comm.calls import Communication, Pending, Waited
from bagualu.comm.errors import RecipeError
from bagualu.parallel.pipeline.layer_slice import LayerPart
from bagualu.parallel.pipeline.schedules.schedule import Kind
from bagualu.parallel.planner.layouts import Degrees
from bagualu.parallel.simulation.events import Event, Operator
from bagualu.parallel.simulation.timed import kind_of
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.decoder.lora import LoraConfig
from bagualu.trainer.models.decoder.shapes import parameter_shapes
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.trace import Traced, trace

_STAGES = 3
_SCHEDULE = "zb_h1"
_MICRO_BATCHES, _TAKEN = 2, 1
"""The number of micro-batches, and that whose passes are taken: not the first, which does not add to gradients."""
PASS_KINDS = (Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)


@dataclass(frozen=True)
class PassCost:
    """What a pass takes on a chip."""

    kernels: Mapping[str, float] = field(default_factory=dict)
    """The seconds of its kernels, by kind (`kind_of`)."""
    waits: Mapping[str, float] = field(default_factory=dict)
    """The seconds in which it waits for communication, by mesh axis."""

    @cached_property
    def total(self) -> float:
        return sum(self.kernels.values()) + sum(self.waits.values())

    def times(self, factor: int) -> "PassCost":
        kernels, waits = ({name: factor * each for name, each in part.items()} for part in (self.kernels, self.waits))
        return PassCost(kernels, waits)

    def less(self, other: "PassCost") -> "PassCost":
        """Returns what is left without `other`, nothing below 0."""
        pairs = (self.kernels, other.kernels), (self.waits, other.waits)
        return PassCost(*({name: max(0.0, each - less.get(name, 0.0)) for name, each in own.items()} for own, less in pairs))


@dataclass(frozen=True)
class LayerPasses:
    """The passes of a layer for a micro-batch."""

    forward: PassCost
    input_gradient: PassCost
    weight_gradient: PassCost

    def times(self, factor: int) -> "LayerPasses":
        return LayerPasses(*(one.times(factor) for one in (self.forward, self.input_gradient, self.weight_gradient)))

    def less(self, other: "LayerPasses") -> "LayerPasses":
        return LayerPasses(
            self.forward.less(other.forward),
            self.input_gradient.less(other.input_gradient),
            self.weight_gradient.less(other.weight_gradient),
        )

    @cached_property
    def total(self) -> float:
        return self.forward.total + self.input_gradient.total + self.weight_gradient.total


@dataclass(frozen=True)
class Division:
    """How a layer is divided, and what its backward pass computes again: all that its passes depend on."""

    tensor: int
    expert: int
    sequence: bool
    micro_batch: int
    recompute: str = "none"

    @staticmethod
    def of(degrees: Degrees, recompute: str = "none") -> "Division":
        return Division(degrees.tensor, degrees.expert, degrees.sequence, degrees.micro_batch, recompute)


class LayerKind(Enum):
    """What a stage consists of."""

    DENSE = "a dense layer"
    MIXTURE = "a layer with a mixture of experts"
    ATTENTION = "the attention of a layer"
    FEED_FORWARD = "the feed-forward of a dense layer"
    EXPERTS = "the mixture of experts of a layer"
    FIRST = "the embedding"
    LAST = "the last norm and the head, with the loss"


def kind_of_layer(model: ModelConfig, layer: int, part: LayerPart = LayerPart.WHOLE) -> LayerKind:
    """Returns what `layer`, or a half of it, is to a stage."""
    if part is LayerPart.ATTENTION:
        return LayerKind.ATTENTION
    kinds = {
        LayerPart.WHOLE: (LayerKind.DENSE, LayerKind.MIXTURE),
        LayerPart.FEED_FORWARD: (LayerKind.FEED_FORWARD, LayerKind.EXPERTS),
    }
    return kinds[part][model.is_moe_layer(layer)]


@dataclass(frozen=True)
class KindTrace:
    """What a stage with a unit does."""

    passes: Mapping[Kind, Sequence[Event]]
    """The events of its passes for a micro-batch."""
    update_bytes: int
    """Bytes that the kernels after the passes read and write: for the norm of its gradients and the update of its weights."""
    besides: LayerKind | None
    """The layer that the stage holds besides the unit; None: none."""


class LayerTraces:
    """Traces the layers of a recipe's model, each only once for each division."""

    def __init__(self, recipe: Recipe, how: Traced) -> None:
        self._recipe, self._how = recipe, how
        self._known: dict[tuple[Division, LayerKind], KindTrace] = {}

    def of(self, division: Division, unit: LayerKind) -> KindTrace:
        """Returns the trace of a stage with `unit`; of the embedding and the head without recomputation and division of experts,
        and for a single sequence."""
        if unit in (LayerKind.FIRST, LayerKind.LAST):
            division = replace(division, recompute="none", expert=1, micro_batch=1)
        if (division, unit) not in self._known:
            self._known[division, unit] = self._trace(division, unit)
        return self._known[division, unit]

    def _trace(self, division: Division, unit: LayerKind) -> KindTrace:
        counts, stage = self._stages(unit)
        small = self._small(division, counts)
        ranks = division.expert * division.tensor
        traced = trace(small, len(counts) * ranks, stage * ranks, self._how)
        passes: dict[Kind, list[Event]] = {kind: [] for kind in PASS_KINDS}
        last = max(index for index, section in enumerate(traced.sections) if section.action is not None)
        for section in traced.sections:
            if section.action is not None and section.action.kind in passes and section.action.micro_batch == _TAKEN:
                passes[section.action.kind] += section.events
        after = [event for section in traced.sections[last + 1 :] for event in section.events if isinstance(event, Operator)]
        update_bytes = sum(operator.read_bytes + operator.written_bytes for operator in after)
        layer = {LayerKind.FIRST: 0, LayerKind.LAST: small.model.layers - 1}.get(unit)
        mixture = layer is not None and small.model.is_moe_layer(layer)
        return KindTrace(passes, update_bytes, None if layer is None else LayerKind.MIXTURE if mixture else LayerKind.DENSE)

    def _stages(self, unit: LayerKind) -> tuple[list[float], int]:
        """Returns the numbers of layers of the stages of a small model, and the stage that holds `unit` and a layer, or that is
        `unit`."""
        moe = self._recipe.model.moe
        if unit in (LayerKind.FIRST, LayerKind.LAST):
            return [1, max(1, moe.every - 2), 1], 0 if unit is LayerKind.FIRST else _STAGES - 1
        model, layers = self._recipe.model, range(1, moe.every + 2)
        layer, part = next((i, part) for i in layers for part in LayerPart if kind_of_layer(model, i, part) is unit)
        after = max(1, moe.every - layer - 1)
        counts: dict[LayerPart, list[float]] = {
            LayerPart.WHOLE: [layer, 1, after],
            LayerPart.ATTENTION: [layer, 0.5, after + 0.5],
            LayerPart.FEED_FORWARD: [layer + 0.5, 0.5, after],
        }
        return counts[part], 1

    def _small(self, division: Division, counts: list[float]) -> Recipe:
        """Returns the recipe of a model whose stages have `counts` layers."""
        recipe = self._recipe
        parallel = replace(
            recipe.parallel, data=division.expert, tensor=division.tensor, pipeline=len(counts), expert=division.expert,
            sequence=division.sequence, schedule=_SCHEDULE, virtual_stages=None, balance=counts, speeds=None, shares=None,
            memory_bytes=None, zero=1, engine="native", shard=None,
        )  # fmt: skip
        return replace(
            recipe,
            model=_with_layers(recipe.model, int(sum(counts))),
            parallel=parallel,
            train=replace(recipe.train, micro_batch=division.micro_batch, recompute=division.recompute),
            data=replace(recipe.data, global_batch=division.expert * _MICRO_BATCHES * division.micro_batch),
            optim=replace(recipe.optim, groups=[]),
            launch=replace(recipe.launch, workers=None, nodes=1),
            faults=[],
        )


def _with_layers(model: ModelConfig, layers: int) -> ModelConfig:
    """Returns the model with this number of layers. If it does not have all layers that model.lora.targets names, all layers have
    factors."""
    small = replace(model, layers=layers)
    try:
        small.lora.check_targets(parameter_shapes(small))
    except RecipeError:
        return replace(small, lora=replace(small.lora, targets=LoraConfig().targets))
    return small


def pass_cost(
    events: Iterable[Event], operator_seconds: Callable[[Operator], float], call_seconds: Callable[[Communication], float]
) -> PassCost:
    """Returns the cost of a pass in which communications of the same axis follow each other and run beside the kernels until the
    rank waits for them."""
    now = 0.0
    pending, free, waits, kernels = Pending[float](), Counter[str](), Counter[str](), Counter[str]()
    for event in events:
        if isinstance(event, Operator):
            seconds = operator_seconds(event)
            now += seconds
            kernels[kind_of(event)] += seconds  # type: ignore[assignment]
        elif isinstance(event, Communication):
            free[event.group] = max(now, free[event.group]) + call_seconds(event)  # type: ignore[assignment]
            pending.begin(event, free[event.group])
        elif isinstance(event, Waited):
            with suppress(LookupError):  # of a call that another pass began
                end = pending.end(event)
                waits[event.group] += max(0.0, end - now)  # type: ignore[assignment]
                now = max(now, end)
    return PassCost(dict(kernels), dict(waits))
