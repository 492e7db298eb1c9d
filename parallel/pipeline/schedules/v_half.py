"""The V-Half schedule: half of 1F1B's activation memory, with two chunks per rank in a V.

3 ranks, 4 micro-batches:

    F0  F1  F2  .   .   F0' I0' W0' .   .   F1' I1' W1' I0  W0  F3  F2' I2' W2' I1  W1  F3' I3' W3' I2  W2  .   .   .   I3  W3
        F0  F1  F2  F0' .   .   I0' W0' F1' .   I0  I1' W0  F2' W1' F3  I1  I2' W1  F3' W2' .   I2  I3' W2  W3' .   I3  W3
            F0  F0' F1  F1' .   .   I0' W0' I0  W0  F2  F2' I1' W1' I1  W1  F3  F3' I2' W2' I2  W2  .   I3' W3' I3  W3
"""

from collections import deque

from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.schedules.formula import Formula
from bagualu.parallel.pipeline.schedules.schedule import Action, Kind
from bagualu.parallel.pipeline.schedules.squeeze import squeeze

_PERIOD = 6
"""Number of passes of a micro-batch on each rank: F, I and W at two stages."""


def v_half(placement: StagePlacement, micro_batches: int) -> list[list[Action]]:
    """Returns the passes of each rank: a building block, a micro-batch's passes at fixed times, is repeated every six steps, then
    `squeeze` closes gaps (V-Half: Qi et al., arXiv 2405.15362).

    The time for which the block keeps an activation determines how many are held.

    With F = I = W and m of at least p, the bubble is at most p(F+I+W) in passes of a stage. That is the authors' rate of about
    p/2m, half of 1F1B's, whose stages are twice as long. As long as 2F <= W+2I and 2I <= W+2F (the authors' condition), ranks wait
    only at the start and at the end, for any number of micro-batches. A rank holds at most 2 floor((p+2)/2) activations of a stage,
    as much as floor((p+2)/2) of its two stages together, the authors' number; 1F1B holds p.
    """
    block = [_with_weight_gradients(_repeated(placement, rank, micro_batches)) for rank in range(placement.ranks)]
    return squeeze(block, placement)


def _repeated(placement: StagePlacement, rank: int, micro_batches: int) -> dict[int, Action]:
    """Returns the passes of a rank, without W, by time.

    The first chunk's forward passes take two steps from each rank to the next; the second chunk's return in one step per rank. The
    I passes of the second chunk and then of the first follow the same pattern. No two passes of a rank have the same time.
    """
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
    """Returns all passes in the order of their times, with each W in the first free time step after its I."""
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
