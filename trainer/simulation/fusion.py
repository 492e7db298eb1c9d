"""Tells by memory traffic which operators of a training step are worth a generated kernel.

A kernel keeps what its operators pass to each other in registers, where each operator alone writes it to memory and reads it back.
What that takes is predicted by the simulator's costs of operators, on the graph of what `train_step` executes.
"""

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from textwrap import shorten
from typing import Any

import torch
from torch import fx

from bagualu.comm.topology import Chip
from bagualu.parallel.config import ParallelConfig
from bagualu.parallel.simulation.events import Operator, RankTrace
from bagualu.parallel.simulation.operator_cost import operator_seconds
from bagualu.trainer.recipe.changed import changed
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.gain import one_data_rank, over_layers
from bagualu.trainer.simulation.loads import Shares
from bagualu.trainer.simulation.step_graph import CALL, OperatorCall, StepGraph
from bagualu.trainer.simulation.trace import Traced, Tracer, trace

_COPIES = ("aten::_to_copy", "aten::copy_")
"""Operators that compute each element for itself, besides those that torch has marked."""


@dataclass(frozen=True)
class Chain:
    """Operators that one kernel can compute: nodes of a graph, in their order."""

    nodes: tuple[fx.Node, ...]

    @cached_property
    def calls(self) -> list[OperatorCall]:
        return [node.meta[CALL] for node in self.nodes]

    @property
    def kernel(self) -> str | None:
        """The generated kernel of which they are the function; None: no kernel has them."""
        return self.calls[0].kernel

    @property
    def name(self) -> str:
        """The registry's name of the operator for which the kernel was generated; without a kernel, those of torch."""
        if self.kernel is not None:
            return self.kernel.partition(".")[0]
        return " + ".join(dict.fromkeys(one.operator.name.removeprefix("aten.").split(".")[0] for one in self.calls))

    @cached_property
    def read_bytes(self) -> int:
        """What the kernel reads: what other nodes have made, each part once."""
        inside = set(self.nodes)
        parts = {(part.made_by, part.begin): part.bytes for one in self.calls for part in one.reads if part.made_by not in inside}
        return sum(parts.values())

    @cached_property
    def written_bytes(self) -> int:
        """What the kernel writes: all but results in new memory that it alone reads."""
        inside = set(self.nodes)
        alone = [bool(node.users) and inside.issuperset(node.users) for node in self.nodes]
        return sum(part.bytes for only, one in zip(alone, self.calls, strict=True) for part in one.writes
                   if not (only and part.made_by in inside))  # fmt: skip

    def seconds(self, chip: Chip) -> float:
        """Returns the time of the operators one after the other."""
        return sum(operator_seconds(chip, one.operator) for one in self.calls)

    def saved_seconds(self, chip: Chip) -> float:
        """Returns the time that one kernel in place of the operators saves."""
        first = self.calls[0].operator
        fused = Operator("bagualu.fused", first.inputs, first.outputs, self.read_bytes, self.written_bytes, 0)
        return self.seconds(chip) - operator_seconds(chip, fused)


@dataclass(frozen=True)
class Fusion:
    """What fusion saves of the time of the operators of a step."""

    saved: dict[str, float]
    """The fractions that the generated kernels of each operator save, beside their functions operator by operator."""
    left: dict[str, float]
    """The fractions that further kernels would save, by the operators that they would compute; the largest first."""

    def lines(self) -> list[str]:
        """Returns what `bagualu simulate` prints."""
        saved = ", ".join(f"{name} {part:.1%}" for name, part in self.saved.items())
        largest = f", the most as {shorten(next(iter(self.left)), 60, placeholder=' ...')}" if self.left else ""
        return [f"kernels  save {saved} of the operators' time, beside the same functions operator by operator",
                f"         chains without a kernel would save {sum(self.left.values()):.1%}{largest}"]  # fmt: skip


def fusion_of(recipe: Recipe, chip: Chip, micro_batches: int = 1, shares: Shares | None = None) -> Fusion:
    """Returns what fusion saves on a chip, for a rank with all layers, of a tensor and an expert group, in a step of so many
    micro-batches. `shares`: as for `Traced`. Raises RecipeError like `trace`."""
    given = recipe.parallel
    parallel = ParallelConfig(data=given.expert, tensor=given.tensor, expert=given.expert, sequence=given.sequence)
    world, how = given.tensor * given.expert, Traced(chip=chip.type, shares=shares)
    found = over_layers(one_data_rank(recipe, parallel), micro_batches, lambda part: _seconds(part, world, how, chip))
    seconds = found.pop((False, ""))
    kernels, others = (
        {name: value / seconds for (of_kernels, name), value in found.items() if of_kernels is which and value > 0}
        for which in (True, False)
    )
    return Fusion(kernels, dict(sorted(others.items(), key=lambda item: -item[1])))


def _seconds(recipe: Recipe, world: int, how: Traced, chip: Chip) -> dict[tuple[bool, str], float]:
    """Returns the seconds that chains save, by whether a generated kernel has them and by name; and by (False, "") those of all
    operators, with the functions of kernels operator by operator."""
    graph, traced = graph_of(recipe, world, how)
    found: defaultdict[tuple[bool, str], float] = defaultdict(float)
    for chain in chains_of(graph):
        found[chain.kernel is not None, chain.name] += chain.saved_seconds(chip)
    found[False, ""] = sum(operator_seconds(chip, operator) for operator in traced.operators())
    return found


def graph_of(recipe: Recipe, world: int, how: Traced) -> tuple[fx.Graph, RankTrace]:
    """Returns the graph of what the first rank executes in a step with generated kernels, and its trace, in which the functions of
    kernels are operator by operator too. Raises RecipeError like `trace`."""
    made: list[StepGraph] = []

    def graphed(tracer: Tracer) -> StepGraph:
        made.append(StepGraph(tracer, lambda: (len(tracer.sections), tracer.calls)))
        return made[0]

    traced = trace(changed(recipe, {"train.compile": True}), world, 0, how, graphed=graphed)
    return made[0].graph, traced


def chains_of(graph: fx.Graph) -> list[Chain]:
    """Returns the functions of generated kernels, and the longest chains of other operators that kernels could compute, each of at
    least two operators."""
    chains = _Chains()
    for node in graph.nodes:
        chains.add(node)
    return [Chain(tuple(nodes)) for nodes in chains.members.values() if len(nodes) > 1]


class _Chains:
    """Nodes by the chain to which they belong. Each begins as a chain of its own."""

    def __init__(self) -> None:
        self.members: defaultdict[Hashable, list[fx.Node]] = defaultdict(list)
        self._chain_of: dict[fx.Node, Hashable] = {}
        self._needs: defaultdict[Hashable, set[Hashable]] = defaultdict(set)
        """The chains whose results a chain reads."""

    def add(self, node: fx.Node) -> None:
        """Adds the next node of the graph, to the first chain of its arguments that it can join."""
        call: OperatorCall | None = node.meta.get(CALL)
        chain: Hashable = node
        if call is not None and call.kernel is not None:
            chain = call.kernel, call.place
        elif call is not None and _fuses(node):
            chain = next((self._chain_of[one] for one in node.all_input_nodes if self._joins(node, one)), node)
        self._chain_of[node] = chain
        self.members[chain].append(node)
        self._needs[chain] |= {self._chain_of[one] for one in node.all_input_nodes} - {chain}

    def _joins(self, node: fx.Node, before: fx.Node) -> bool:
        """Returns whether a node can be the next operator in the chain of `before`, whose result it reads: it loops over the same
        elements, and needs no result that has to wait for the chain."""
        one: OperatorCall | None = before.meta.get(CALL)
        call: OperatorCall = node.meta[CALL]
        if one is None or one.kernel is not None or one.ends_loop or not _fuses(before):
            return False
        return one.place == call.place and _same_loop(one, call) and not self._waits(node, self._chain_of[before])

    def _waits(self, node: fx.Node, chain: Hashable) -> bool:
        """Returns whether a node needs a result of another chain that itself needs one of `chain`."""
        seen, left = {chain}, [self._chain_of[one] for one in node.all_input_nodes]
        while left:
            if (other := left.pop()) in seen:
                continue
            if chain in self._needs[other]:
                return True
            seen.add(other)
            left += self._needs[other]
        return False


def _same_loop(one: OperatorCall, other: OperatorCall) -> bool:
    """Returns whether operators loop over the same elements, or one over a number for each row of the other's."""
    long, short = sorted((one.loop, other.loop), key=torch.Size.numel, reverse=True)
    return long.numel() == short.numel() or (len(long) > 1 and short.numel() * long[-1] == long.numel())


def _fuses(node: fx.Node) -> bool:
    """Returns whether a kernel can compute a node with others: each element for itself, or sums of elements."""
    func: Any = node.target
    return torch.Tag.pointwise in func.tags or torch.Tag.reduction in func.tags or func._schema.name in _COPIES
