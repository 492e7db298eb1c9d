"""Expert parallel: tokens travel to the ranks that hold their experts, and back.

Shapes: N rows (token copies, one for each of a token's experts), H hidden, E experts, e = E / group.size experts here.
"""

from dataclasses import dataclass

import torch

from bagualu.comm.differentiable import all_to_all
from bagualu.comm.group import Group


@dataclass(frozen=True)
class Routed:
    """Rows at the experts' side, grouped by expert, and what it takes to bring results back."""

    rows: torch.Tensor
    counts: list[int]
    """Rows of each expert held here, in order."""
    order: torch.Tensor | None = None
    """Row i of `rows` arrived at place order[i]."""
    sent: tuple[int, ...] = ()
    received: tuple[int, ...] = ()


class LocalExperts:
    """Every expert is held here: rows sorted by expert are already where they belong."""

    def dispatch(self, rows: torch.Tensor, counts: torch.Tensor) -> Routed:
        """rows [N, H] sorted by expert, counts [E] of them for each."""
        return Routed(rows, counts.tolist())

    def combine(self, results: torch.Tensor, routed: Routed) -> torch.Tensor:
        """Results in the order of dispatch's rows."""
        return results


class ExpertParallel(LocalExperts):
    """The experts are split over `group` in order; two all-to-alls of rows a layer, and one of the counts."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def dispatch(self, rows: torch.Tensor, counts: torch.Tensor) -> Routed:
        arriving = torch.empty_like(counts)
        self.group.all_to_all(arriving, counts)
        size, per_source = self.group.size, arriving.view(self.group.size, -1)
        # One transfer to the host, as each makes an accelerator wait.
        sums = torch.cat((counts.view(size, -1).sum(1), per_source.sum(1), per_source.sum(0))).tolist()
        sent, received, per_expert = sums[:size], sums[size : 2 * size], sums[2 * size :]
        arrived = all_to_all(rows, self.group, received, sent)
        # Rows came sorted by source, then by expert; the experts want them by expert.
        experts = torch.arange(per_source.shape[1], device=rows.device).repeat(size)
        order = torch.repeat_interleave(experts, arriving, output_size=sum(received)).argsort(stable=True)
        return Routed(arrived[order], per_expert, order, tuple(sent), tuple(received))

    def combine(self, results: torch.Tensor, routed: Routed) -> torch.Tensor:
        assert routed.order is not None
        by_source = torch.empty_like(results).index_copy(0, routed.order, results)
        return all_to_all(by_source, self.group, list(routed.sent), list(routed.received))
