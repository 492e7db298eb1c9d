"""Expert parallelism: sends tokens to the ranks that hold their experts, and the results back.

Shapes: N rows (a copy of each token for each of its experts), H hidden, E experts, e = E / group.size experts on this rank.
"""

from dataclasses import dataclass

import torch

from bagualu.comm.differentiable import all_to_all
from bagualu.comm.group import Group


@dataclass(frozen=True)
class Routed:
    """Rows on the rank of their experts, grouped by expert, and the data needed to send the results back."""

    rows: torch.Tensor
    """The rows for this rank's experts [n, H], sorted by expert."""
    counts: list[int]
    """The number of rows of each expert on this rank."""
    order: torch.Tensor | None = None
    """For each of `rows`, its index in the order in which rows arrived; None if the rows did not move."""
    sent: tuple[int, ...] = ()
    """The number of rows that this rank sent to each rank of the group; empty if the rows did not move."""
    received: tuple[int, ...] = ()
    """The number of rows that this rank received from each rank of the group; empty if the rows did not move."""


class Loads:
    """Reads how many rows go to which expert. Where tensors have no values, a subclass says it instead."""

    def of_experts(self, counts: torch.Tensor, rows: int) -> list[int]:
        """Returns the number of rows of each expert, given it on the device [E]. They sum to `rows`."""
        values: list[int] = counts.tolist()
        return values

    def exchanged(
        self, counts: torch.Tensor, arriving: torch.Tensor, rows: int, group: Group
    ) -> tuple[list[int], list[int], list[int]]:
        """Returns the numbers of rows that this rank sends to each position of `group`, that it receives from each, and of each of
        its own experts, given the rows for each expert [E] and those that arrive [group.size, e]. It sends `rows` altogether."""
        size = group.size
        # A single transfer to the host, because the accelerator waits for each transfer.
        sums = group.read(torch.cat((counts.view(size, -1).sum(1), arriving.sum(1), arriving.sum(0))))
        return sums[:size], sums[size : 2 * size], sums[2 * size :]


class LocalExperts:
    """Routes rows to experts that are all on this rank, which needs no communication."""

    loads = Loads()

    def dispatch(self, rows: torch.Tensor, counts: torch.Tensor) -> Routed:
        """Brings each row to the rank of its expert and returns the rows that this rank's experts process.

        rows [N, H] are sorted by expert; counts [E] is the number of rows of each expert.
        """
        return Routed(rows, self.loads.of_experts(counts, rows.shape[0]))

    def combine(self, results: torch.Tensor, routed: Routed) -> torch.Tensor:
        """Sends results, one per row of `routed.rows`, back and returns them [N, H] in the order of the rows given to
        `dispatch`."""
        return results


class ExpertParallel(LocalExperts):
    """Routes rows to experts that are split over `group` in order. The forward pass of a layer takes two all-to-alls of rows and
    one of numbers of rows."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def dispatch(self, rows: torch.Tensor, counts: torch.Tensor) -> Routed:
        arriving = torch.empty_like(counts)
        self.group.all_to_all(arriving, counts)
        size, per_source = self.group.size, arriving.view(self.group.size, -1)
        sent, received, per_expert = self.loads.exchanged(counts, per_source, rows.shape[0], self.group)
        arrived = all_to_all(rows, self.group, received, sent)
        # Rows arrive sorted by source, then by expert; the experts need them sorted by expert.
        experts = torch.arange(per_source.shape[1], device=rows.device).repeat(size)
        order = torch.repeat_interleave(experts, arriving, output_size=sum(received)).argsort(stable=True)
        return Routed(arrived[order], per_expert, order, tuple(sent), tuple(received))

    def combine(self, results: torch.Tensor, routed: Routed) -> torch.Tensor:
        assert routed.order is not None
        by_source = torch.empty_like(results).index_copy(0, routed.order, results)
        return all_to_all(by_source, self.group, list(routed.sent), list(routed.received))
