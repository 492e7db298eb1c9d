"""Half of 1F1B's activations, with two chunks a rank, there and back again. Free of torch.

3 ranks, 4 micro-batches:

    F0  F1  F2  .   .   F0' I0' W0' .   .   F1' I1' W1' I0  W0  F3  F2' I2' W2' I1  W1  F3' I3' W3' I2  W2  .   .   .   I3  W3
        F0  F1  F2  F0' .   .   I0' W0' F1' .   I0  I1' W0  F2' W1' F3  I1  I2' W1  F3' W2' .   I2  I3' W2  W3' .   I3  W3
            F0  F0' F1  F1' .   .   I0' W0' I0  W0  F2  F2' I1' W1' I1  W1  F3  F3' I2' W2' I2  W2  .   I3' W3' I3  W3
"""

from collections import deque

from bagualu.parallel.pipeline.formula import Formula
from bagualu.parallel.pipeline.schedule import Action, Kind, Placement
from bagualu.parallel.pipeline.schedules.squeeze import squeeze

_PERIOD = 6
"""A micro-batch has six passes on a rank."""


def v_half(placement: Placement, micro_batches: int) -> list[list[Action]]:
    """One micro-batch's passes at fixed times, the building block, and every six steps the next one's; how long the block keeps an
    activation decides how many are held. Then the passes are drawn together as far as that allows (V-Half: Qi et al., arXiv
    2405.15362).

    With F = I = W and m of at least p the bubble is at most p(F+I+W) in passes of one stage. That is the authors' rate of about
    p/2m, half of 1F1B's, whose stages are twice as long. As long as 2F <= W+2I and 2I <= W+2F (the authors' condition) only the
    start and the end wait, however many micro-batches there are. At most 2 floor((p+2)/2) activations of a stage in flight on any
    rank, as much as floor((p+2)/2) of a rank's whole share, the authors' figure; 1F1B holds p.
    """
    block = [_with_weight_gradients(_repeated(placement, rank, micro_batches)) for rank in range(placement.ranks)]
    return squeeze(block, placement)


def _repeated(placement: Placement, rank: int, micro_batches: int) -> dict[int, Action]:
    """Time -> pass, W left out. The first chunk's forward passes go down the ranks at two steps each, the second one's come up at
    one; so do I of the second chunk and then of the first. No two passes of a rank meet."""
    ranks, (first, second) = placement.ranks, placement.stages_of(rank)
    gap = 0 if ranks % 2 else 3
    block = (
        (2 * rank, Kind.FORWARD, first),
        (3 * ranks - rank - 2, Kind.FORWARD, second),
        (3 * ranks + gap + 2 * rank - 1, Kind.INPUT_GRADIENT, second),
        (6 * ranks + gap - rank - 2, Kind.INPUT_GRADIENT, first),
    )
    return {time + _PERIOD * m: Action(kind, m, stage) for time, kind, stage in block for m in range(micro_batches)}


def _with_weight_gradients(times: dict[int, Action]) -> list[Action]:
    """All passes in their order, each W in the first free step after its I."""
    waiting: deque[Action] = deque()
    actions = []
    for time in range(max(times) + 1):
        if time in times:
            actions.append(times[time])
            if times[time].kind == Kind.INPUT_GRADIENT:
                waiting.append(Action(Kind.WEIGHT_GRADIENT, times[time].micro_batch, times[time].stage))
        elif waiting:
            actions.append(waiting.popleft())
    return [*actions, *waiting]


V_HALF = Formula(
    "p(F+I+W) for F = I = W", lambda size: size.ranks * (size.forward + size.backward) if size.even else None,
    "2 floor((p+2)/2)", lambda size: 2 * min((size.ranks + 2) // 2, size.micro_batches), bound=True, least=lambda ranks: ranks,
)  # fmt: skip
