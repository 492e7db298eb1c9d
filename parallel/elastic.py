"""Which layout a run goes on with when it has lost ranks. Free of torch."""

from collections.abc import Callable, Iterator

from bagualu.parallel.layout import Layout


def largest_layout(full: Layout, ranks: int, valid: Callable[[Layout], bool]) -> Layout | None:
    """The layout for at most `ranks` ranks that is nearest to `full`; None when no valid one is that small.

    No degree grows. The slices of the model stay as they are (tensor, pipeline, context, then expert), because the memory
    of a rank was planned for them, and data parallel replicas go, as few as can be; only when not one whole replica is
    left do slices grow, and then the layout that uses most ranks is taken.
    """
    for layout in _candidates(full, ranks):
        if valid(layout):
            return layout
    return None


def _candidates(full: Layout, ranks: int) -> Iterator[Layout]:
    """Layouts of at most `ranks` ranks, best first."""
    sliced = (full.pipeline, full.context, full.tensor)
    kept = list(_replicas(full, *sliced, ranks))
    yield from sorted(kept, key=lambda one: (one.expert == full.expert, one.world, one.expert), reverse=True)
    others = [
        layout
        for pipeline in range(1, full.pipeline + 1)
        for context in range(1, full.context + 1)
        for tensor in range(1, full.tensor + 1)
        if (pipeline, context, tensor) != sliced
        for layout in _replicas(full, pipeline, context, tensor, ranks)
    ]
    yield from sorted(others, key=lambda one: (one.world, one.tensor, one.pipeline, one.context, one.expert), reverse=True)


def _replicas(full: Layout, pipeline: int, context: int, tensor: int, ranks: int) -> Iterator[Layout]:
    """Every number of replicas with these slices, and every expert degree that divides their ranks."""
    for data in range(1, min(full.data, ranks // (pipeline * context * tensor)) + 1):
        for expert in range(1, full.expert + 1):
            if data * context % expert == 0:
                yield Layout(pipeline, data, context, tensor, expert)
