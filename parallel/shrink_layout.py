"""Chooses the layout with which a run continues after it has lost ranks."""

from collections.abc import Callable, Iterator

from bagualu.parallel.layout import Layout


def largest_layout(full: Layout, ranks: int, valid: Callable[[Layout], bool]) -> Layout | None:
    """Returns the valid layout of at most `ranks` ranks that is nearest to `full`; None if there is none.

    No degree grows. The tensor, pipeline, context and, if possible, expert degrees stay the same, because they determine the memory
    of a rank, and as few data-parallel replicas as possible are given up. If not even one whole replica fits, these degrees
    shrink too, and the layout that uses the most ranks is chosen.
    """
    for layout in _candidates(full, ranks):
        if valid(layout):
            return layout
    return None


def _candidates(full: Layout, ranks: int) -> Iterator[Layout]:
    """Yields the layouts of at most `ranks` ranks, best first."""
    sliced = (full.pipeline, full.context, full.tensor)
    kept = list(_replicas(full, *sliced, ranks))
    yield from sorted(kept, key=lambda layout: (layout.expert == full.expert, layout.world, layout.expert), reverse=True)
    others = [
        layout
        for pipeline in range(1, full.pipeline + 1)
        for context in range(1, full.context + 1)
        for tensor in range(1, full.tensor + 1)
        if (pipeline, context, tensor) != sliced
        for layout in _replicas(full, pipeline, context, tensor, ranks)
    ]
    yield from sorted(others, key=lambda new: (new.world, new.tensor, new.pipeline, new.context, new.expert), reverse=True)


def _replicas(full: Layout, pipeline: int, context: int, tensor: int, ranks: int) -> Iterator[Layout]:
    """Yields every layout with these degrees: all numbers of replicas, each with all expert degrees that divide data x context."""
    for data in range(1, min(full.data, ranks // (pipeline * context * tensor)) + 1):
        for expert in range(1, full.expert + 1):
            if data * context % expert == 0:
                yield Layout(pipeline, data, context, tensor, expert)
