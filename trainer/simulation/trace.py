"""Traces a training step of any rank of any world: runs `train_step` itself on tensors without values and writes down what it does.

The rank's state is assembled as in a run, but on the meta device and over `RecordingBackend`. A dispatch mode sees every operator
of forward passes, backward passes and updates, and every storage that these make or free. So the trace holds what the trainer
does, whatever that is: there is no other description of the model or the schedule here.
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bagualu.comm.calls import Communication, Waited
from bagualu.comm.errors import RecipeError
from bagualu.comm.group import Communicator
from bagualu.comm.monitor import Monitor, Phase
from bagualu.comm.recording import RecordingBackend
from bagualu.comm.world import World
from bagualu.parallel.balance.stages.cost import CostTable
from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.boxes import Box
from bagualu.parallel.layout import Layout
from bagualu.parallel.memory_kinds import ACTIVATIONS, BUFFERS, COMMUNICATION
from bagualu.parallel.pipeline.program import Program
from bagualu.parallel.pipeline.registry import compute_schedule
from bagualu.parallel.pipeline.schedules.schedule import Action, Schedule, with_messages
from bagualu.parallel.simulation.events import Allocation, Event, Free, RankTrace, Section
from bagualu.trainer.assemble import TrainerState, assemble
from bagualu.trainer.costs.plan_split import plan_split
from bagualu.trainer.data.config import RANDOM
from bagualu.trainer.data.split import NOTHING
from bagualu.trainer.data.tokenised import Corpus
from bagualu.trainer.operators.kernel import Kernel
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.loads import Shares, by_layer, give
from bagualu.trainer.simulation.operators import Operators, computes, generated, tensors_in
from bagualu.trainer.simulation.results import Results
from bagualu.trainer.step import train_step


class Tracer(TorchDispatchMode):
    """Within this context, writes down the operators of the thread, and the memory of its tensors on the meta device. `chip` is the
    type of the device for which these stand (`precision.chip_of`)."""

    def __init__(self, chip: str, results: Results) -> None:
        """`results`: those of operators that other traces have run."""
        super().__init__()
        self.chip = chip
        self.sections: list[Section] = [Section("start", None)]
        self.kinds: list[str] = []
        self._phase = "start"
        self._action: Action | None = None
        self._blocks: dict[int, tuple[int, weakref.ref[torch.UntypedStorage], int]] = {}
        """By the id of a storage: its block, a reference that does not keep it alive, and its bytes when last read."""
        self._resized: dict[int, None] = {}
        """The ids of storages whose size has changed, as ZeRO-3 changes that of gathered weights, in the order of their first
        change."""
        self._operators, self._results = Operators(), results
        self._in_one_kernel = False
        self.calls = 0
        """How many communications there were."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        given = [*tensors_in(args), *tensors_in(named.values())]
        result = self._results.of(func, args, named, given)
        made = list(tensors_in((result,)))
        if self._in_one_kernel:
            return result
        self._measure(self._resized)
        for tensor in made:
            if tensor.is_meta:
                self._count(tensor)
        if computes(func) and any(tensor.is_meta for tensor in (made or given)):
            self._write(self._operators.of(func, args, named, result, given, made))
        return result

    def as_one_kernel(self, kernel: Kernel, given: Sequence[Any]) -> Any:
        """Returns what `kernel` does, and writes it down as one operator that reads the tensors among `given` and makes the
        results. Whatever else its function makes never exists."""
        self._in_one_kernel = True
        try:
            result = kernel.function(*given)
        finally:
            self._in_one_kernel = False
        made = list(tensors_in((result,)))
        self._measure(self._resized)
        for tensor in made:
            self._count(tensor)
        self._write(generated(kernel.name, list(tensors_in(given)), made))
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns that torch need not import its compiler to keep it from compiling this class."""
        return False

    def begin(self, held: Iterable[tuple[str, Tensor]]) -> None:
        """Forgets what was written. A section "start" allocates what exists now: `held`, as pairs (kind, tensor), and buffers."""
        self._resized.update(dict.fromkeys(self._blocks))
        self._measure(self._resized)
        self._resized.clear()
        for block, *_ in list(self._blocks.values()):
            self.kinds[block] = BUFFERS
        for kind, tensor in held:
            self._set_kind(tensor, kind)
        self.sections = [Section("start", None, [Allocation(block, size) for block, _, size in list(self._blocks.values())])]

    def end(self) -> list[Section]:
        """Returns the sections that have events."""
        sections, self.sections = self.sections, [Section("end", None)]  # what is freed from now on is not in the trace
        return [section for section in sections if section.events]

    def reached(self, action: Action | None) -> None:
        """Begins a section for an action of the program; None: the program has ended."""
        self._action = action
        self._begin(Section(self._phase, action))

    def _begin(self, section: Section) -> None:
        self._measure(self._resized)
        self.sections.append(section)

    def at(self, point: Phase, step: int) -> None:
        """Begins a section for a phase of the step; within an action, only gives its section the name of the first phase."""
        self._phase = point.value
        if self._action is None:
            self._begin(Section(self._phase, None))
        elif not self.sections[-1].events:
            self.sections[-1].phase = self._phase

    def waits(self, what: str | None) -> None:
        """Does nothing: the transport writes down what the rank waits for."""

    def call(self, event: Communication | Waited, tensors: Sequence[Tensor]) -> None:
        """Writes down a communication of these tensors."""
        self.calls += 1
        self._measure([*self._resized, *(id(tensor.untyped_storage()) for tensor in tensors)])
        if isinstance(event, Communication) and (event.kind in ("send", "receive") or event.group.startswith(("fold", "replica"))):
            for tensor in tensors:
                if self._kind(tensor) == ACTIVATIONS or id(tensor.untyped_storage()) in self._resized:
                    self._set_kind(tensor, COMMUNICATION)
        self._write(event)

    def _write(self, event: Event) -> None:
        self.sections[-1].events.append(event)

    def _count(self, tensor: Tensor) -> None:
        """Writes the storage of `tensor` down as new memory, unless it is known."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._blocks:
            return
        block = len(self.kinds)
        self.kinds.append(BUFFERS if self._phase == Phase.DATA else ACTIVATIONS)

        def forget(_: Any) -> None:
            self._resized.pop(key, None)
            self._write(Free(block, self._blocks.pop(key)[2]))

        self._blocks[key] = block, weakref.ref(storage, forget), storage.nbytes()
        self._write(Allocation(block, storage.nbytes()))

    def _kind(self, tensor: Tensor) -> str | None:
        known = self._blocks.get(id(tensor.untyped_storage()))
        return self.kinds[known[0]] if known else None

    def _set_kind(self, tensor: Tensor, kind: str) -> None:
        if known := self._blocks.get(id(tensor.untyped_storage())):
            self.kinds[known[0]] = kind

    def _measure(self, keys: Iterable[int]) -> None:
        """Writes down by how much the storages with these ids have grown or shrunk."""
        for key in list(keys):
            if (known := self._blocks.get(key)) is None or (storage := known[1]()) is None:
                continue
            block, reference, before = known
            if change := storage.nbytes() - before:
                self._blocks[key] = block, reference, before + change
                self._resized[key] = None
                self._write(Allocation(block, change) if change > 0 else Free(block, -change))


class _Shapes:
    """Batches of tokens without values."""

    def __init__(self, sequence_length: int) -> None:
        self._length = sequence_length

    def batch(self, step: int, start: int, count: int) -> tuple[Tensor, Tensor]:
        return self._tokens(count), self._tokens(count)

    def _tokens(self, count: int) -> Tensor:
        return torch.empty(count, self._length, dtype=torch.int64, device="meta")


@dataclass(frozen=True)
class Traced:
    """What a trace is made with."""

    chip: str = "cuda"
    """The type of the ranks' device: cpu | cuda | that of another accelerator."""
    shares: Shares | None = None
    """The share of each expert of a layer in the rows that every rank's router sends; None: equal shares."""
    assemble: Callable[..., TrainerState] = assemble
    """Makes the state that is traced."""
    results: Results = field(default_factory=Results, compare=False)
    """The results of operators. Traces that share them run equal operators only once."""


def without_values(name: str, shape: tuple[int, ...], box: Box) -> Tensor:
    """Returns an initial value for `assemble`: only its shape."""
    return torch.empty(box.shape, device="meta")


def traceable(recipe: Recipe) -> Recipe:
    """Returns the recipe as it is traced: without text and the guard's periodic checks, and with parallel.engine=fsdp as ZeRO-3 of
    the native engine. Raises RecipeError for what cannot be traced."""
    parallel = recipe.parallel
    if parallel.engine == "deepspeed":
        raise RecipeError("parallel.engine=deepspeed cannot be simulated; give parallel.engine=native parallel.zero="
                          f"{parallel.zero_stage}, which divides the same state")  # fmt: skip
    if parallel.shares == "measured":
        raise RecipeError("parallel.shares=measured needs ranks that measure; give the number of micro-batches of each data rank, "
                          "or leave it out")  # fmt: skip
    for key, given, works in (
        ("train.offload_bytes", recipe.train.offload_bytes, "train.offload_bytes=0"),
        ("optim.name", recipe.optim.name == "muon" and "muon", "optim.name=adamw"),
    ):
        if given:
            raise RecipeError(f"{key}={given} cannot be simulated yet; give {works}")
    if parallel.engine == "fsdp":
        parallel = replace(parallel, engine="native", zero=3, shard=None)
    guard = replace(recipe.guard, check_every=0, audit_every=0, leave_out=[])
    return replace(recipe, parallel=parallel, guard=guard, data=recipe.data.without_text())


def trace(
    recipe: Recipe,
    world: int,
    rank: int,
    how: Traced | None = None,
    split: tuple[Split, CostTable | None] | None = None,
    program: Program | None = None,
    graphed: Callable[[Tracer], AbstractContextManager[Any]] = lambda tracer: nullcontext(),
) -> RankTrace:
    """Traces the second step of `rank` in a world of `world` ranks; in the first, ZeRO-3 does not know yet what to gather next.

    `split`: the layers of each stage, and their costs; by default as `plan_split` chooses them. `program`: what the rank does, for
    as many micro-batches as the recipe gives it; by default its part of the schedule. `graphed`: makes a context around the traced
    step. Raises RecipeError if the recipe is wrong for that world or cannot be traced.
    """
    recipe, how = traceable(recipe), how or Traced()
    tracer = Tracer(how.chip, how.results)
    backend = RecordingBackend(World(rank, world, rank), 1.0, write=tracer.call)
    monitor = Monitor()
    communicator = Communicator(backend, backend.world, monitor)
    with _quick_collections(), tracer:
        state = how.assemble(recipe, communicator, _no_text(recipe), without_values, split or plan(recipe, world))
        state.program = program or state.program
        state.batches = _Shapes(recipe.data.sequence_length)  # type: ignore[assignment]
        give(state.engine.model, by_layer(how.shares, recipe.model))
        _first_step(state)
        gc.collect()
        tracer.begin(state.engine.held())
        monitor.observers.append(tracer)
        state.runner.reached = tracer.reached
        with graphed(tracer):
            train_step(state, 1)
    return RankTrace(rank, tracer.end(), list(tracer.kinds))


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Within this context, garbage collections do not walk through what exists when it begins, such as all that is imported."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _first_step(state: TrainerState) -> None:
    """Runs a first step, of a single micro-batch unless ZeRO-3 is to learn in it in which order weights are used."""
    shares, program = state.shares, state.program
    if state.recipe.parallel.zero_stage < 3:
        state.shares = [1] * len(shares)
        state.program = Program([action for action in program.actions if action.micro_batch == 0])
    train_step(state, 0)
    state.shares, state.program = shares, program


def plan(recipe: Recipe, world: int) -> tuple[Split, CostTable | None]:
    """Returns the split of a run, and the costs from which it was computed, without measuring any."""
    layout = recipe.validate(world)
    return plan_split(recipe, layout, schedule_of(recipe, layout, max(recipe.declared_shares(layout) or [])))


def schedule_of(recipe: Recipe, layout: Layout, micro_batches: int) -> Schedule:
    """Returns the schedule with its messages, as `assemble` makes it."""
    parallel = recipe.parallel
    return with_messages(compute_schedule(parallel.schedule, layout.pipeline, micro_batches, parallel.virtual_stages))


def _no_text(recipe: Recipe) -> Corpus:
    nothing, sizes = np.zeros(0, np.uint32), np.zeros(recipe.model.vocab, np.int64)
    return Corpus(recipe.model.vocab, nothing, nothing, sizes, RANDOM, None, NOTHING.kind)
