"""Tells by memory traffic which operators of a training step are worth a generated kernel.

A kernel keeps what its operators pass to each other in registers, where each operator alone writes it to memory and reads it back.
What that takes is predicted by the simulator's costs of operators, on the graph of what `train_step` executes.
"""

from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch
from torch import fx

from bagualu.comm.topology import Chip
from bagualu.parallel.config import ParallelConfig
from bagualu.parallel.simulation.events import Operator
from bagualu.parallel.simulation.operator_cost import operator_seconds
from bagualu.trainer.recipe.changed import changed
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.simulation.gain import one_micro_batch, over_layers
from bagualu.trainer.simulation.loads import Shares
from bagualu.trainer.simulation.step_graph import KERNEL, LOOP, OPERATOR, PLACE, READS, StepGraph
from bagualu.trainer.simulation.trace import Traced, Tracer, trace

_COPIES = ("aten::_to_copy", "aten::copy_")
"""Operators that compute each element for itself, besides those that torch has marked."""


@dataclass(frozen=True)
class Chain:
    """Operators that one kernel can compute."""

    operators: tuple[Operator, ...]
    kernel: str | None
    """The generated kernel of which they are the function; None: no kernel has them."""
    kept_bytes: int
    """What they write and read to pass results to each other: a kernel does not move it."""

    @property
    def name(self) -> str:
        """The registry's name of the operator for which the kernel was generated; without a kernel, those of torch."""
        if self.kernel is not None:
            return self.kernel.partition(".")[0]
        return " + ".join(dict.fromkeys(one.name.removeprefix("aten.").split(".")[0] for one in self.operators))

    def seconds(self, chip: Chip) -> float:
        """Returns the time of the operators one after the other."""
        return sum(operator_seconds(chip, one) for one in self.operators)

    def saved_seconds(self, chip: Chip) -> float:
        """Returns the time that one kernel in place of the operators saves."""
        read, written = (sum(getattr(one, key) for one in self.operators) for key in ("read_bytes", "written_bytes"))
        first = self.operators[0]
        fused = Operator("bagualu.fused", first.inputs, first.outputs, read + written - self.kept_bytes, 0, 0)
        return self.seconds(chip) - operator_seconds(chip, fused)


@dataclass(frozen=True)
class Fusion:
    """What fusion saves of the time of operators that compute a micro-batch on all layers and update their weights."""

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


def fusion_of(recipe: Recipe, chip: Chip, shares: Shares | None = None) -> Fusion:
    """Returns what fusion saves on a chip, for a rank of a tensor and an expert group. `shares`: as for `Traced`. Raises
    RecipeError like `trace`."""
    given = recipe.parallel
    parallel = ParallelConfig(data=given.expert, tensor=given.tensor, expert=given.expert, sequence=given.sequence)
    world, how = given.tensor * given.expert, Traced(chip=chip.type, shares=shares)
    found = over_layers(one_micro_batch(recipe, parallel), lambda part: _seconds(graph_of(part, world, how), chip))
    seconds = found.pop((False, ""))
    kernels, others = (
        {name: value / seconds for (of_kernels, name), value in found.items() if of_kernels is which and value > 0}
        for which in (True, False)
    )
    return Fusion(kernels, dict(sorted(others.items(), key=lambda item: -item[1])))


def _seconds(graph: fx.Graph, chip: Chip) -> dict[tuple[bool, str], float]:
    """Returns the seconds that chains save, by whether a generated kernel has them and by name; and by (False, "") those of all
    operators."""
    found: defaultdict[tuple[bool, str], float] = defaultdict(float)
    for chain in chains_of(graph):
        found[chain.kernel is not None, chain.name] += chain.saved_seconds(chip)
    found[False, ""] = sum(operator_seconds(chip, node.meta[OPERATOR]) for node in graph.nodes if node.meta)
    return found


def graph_of(recipe: Recipe, world: int, how: Traced) -> fx.Graph:
    """Returns the graph of what the first rank executes in a step with generated kernels. Raises RecipeError like `trace`."""
    made: list[StepGraph] = []

    def graphed(tracer: Tracer) -> StepGraph:
        made.append(StepGraph(tracer.chip, tracer.linear_products, lambda: len(tracer.sections)))
        return made[0]

    trace(changed(recipe, {"train.compile": True}), world, 0, how, graphed=graphed)
    return made[0].graph


def chains_of(graph: fx.Graph) -> list[Chain]:
    """Returns the functions of generated kernels, and the longest chains of other operators that kernels could compute, each of at
    least two operators. What a chain passes on is written only if another operator reads it."""
    chains = _Chains()
    for node in graph.nodes:
        chains.add(node)
    return [_chain(nodes) for nodes in chains.members.values() if len(nodes) > 1]


class _Chains:
    """Nodes by the chain to which they belong. Each begins as a chain of its own."""

    def __init__(self) -> None:
        self.members: defaultdict[Any, list[fx.Node]] = defaultdict(list)
        self._chain_of: dict[fx.Node, Any] = {}
        self._needs: defaultdict[Any, set[Any]] = defaultdict(set)
        """The chains whose results a chain reads."""
        self._number: dict[fx.Node, int] = {}

    def add(self, node: fx.Node) -> None:
        """Adds the next node of the graph, to the first chain of its arguments that it can join."""
        self._number[node] = len(self._number)
        chain: Any = node
        if node.meta and node.meta[KERNEL] is not None:
            chain = node.meta[KERNEL], node.meta[PLACE]
        elif node.meta and _fuses(node):
            chain = next((self._chain_of[one] for one in node.all_input_nodes if self._joins(node, one)), node)
        self._chain_of[node] = chain
        self.members[chain].append(node)
        self._needs[chain] |= {self._chain_of[one] for one in node.all_input_nodes} - {chain}

    def _joins(self, node: fx.Node, before: fx.Node) -> bool:
        """Returns whether a node can be the next operator in the chain of `before`, whose result it reads: it loops over the same
        elements, and needs no result that has to wait for the chain."""
        one = self.members[chain := self._chain_of[before]][-1]
        fuses = one.meta and one.meta[KERNEL] is None and _fuses(one)
        if not fuses or one.meta[PLACE] != node.meta[PLACE] or not _same_loop(before, node):
            return False
        seen, left = {chain}, [self._chain_of[other] for other in node.all_input_nodes]
        while left:
            if (other := left.pop()) in seen or self._number[self.members[other][-1]] < self._number[self.members[chain][0]]:
                continue  # what ended before the chain began does not wait for it
            if chain in self._needs[other]:
                return False
            seen.add(other)
            left += self._needs[other]
        return True


def _same_loop(one: fx.Node, other: fx.Node) -> bool:
    """Returns whether nodes loop over the same elements, or one over a number for each row of the other's."""
    long, short = sorted((one.meta[LOOP], other.meta[LOOP]), key=torch.Size.numel, reverse=True)
    return long.numel() == short.numel() or (len(long) > 1 and short.numel() * long[-1] == long.numel())


def _fuses(node: fx.Node) -> bool:
    """Returns whether a kernel can compute a node with others: each element for itself, or sums of elements."""
    func: Any = node.target
    return torch.Tag.pointwise in func.tags or torch.Tag.reduction in func.tags or func._schema.name in _COPIES


def _chain(nodes: Sequence[fx.Node]) -> Chain:
    inside = set(nodes)
    kept = sum(_read_of(node, inside) for node in nodes)
    kept += sum(node.meta[OPERATOR].written_bytes for node in nodes if node.users and inside.issuperset(node.users))
    return Chain(tuple(node.meta[OPERATOR] for node in nodes), nodes[0].meta[KERNEL], kept)


def _read_of(node: fx.Node, others: Set[fx.Node]) -> int:
    """Returns the bytes that a node reads of the results of `others`."""
    return sum(size for size, one in zip(node.meta[READS], node.args, strict=True) if one in others)
