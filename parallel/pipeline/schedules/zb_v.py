"""The ZB-V schedule: zero bubble with two chunks per rank in a V.

3 ranks, 5 micro-batches:

    F0  F1  F2  F3  F4  F0' I0' W0' F1' I1' W1' F2' I2' W2' I0  W0  F3' I3' W3' I1  W1  F4' I4' W4' I2  W2  I3  W3  I4  W4
        F0  F1  F2  F0' F3  F1' I0' W0' F2' I1' W1' F4  I0  W0  F3' I2' W2' I1  W1  F4' I3' W3' I2  I4' I3  W2  I4  W3  W4' W4
            F0  F0' F1  F1' F2  F2' I0' W0' F3  I0  W0  F3' I1' W1' F4  I1  W1  F4' I2' W2' I2  I3' I3  I4' I4  W2  W3' W4' W3  W4
"""

from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.schedules.formula import Formula
from bagualu.parallel.pipeline.schedules.schedule import Action
from bagualu.parallel.pipeline.schedules.v_shaped import Speller, only


def zb_v(placement: StagePlacement, micro_batches: int) -> list[list[Action]]:
    """Returns the passes of each rank (ZB-V: Qi et al., arXiv 2401.10241, section 6). The last stage is on the first rank, so the
    first I comes early, and W passes fill the time in which ranks would wait.

    The bubble is 0 if F = I = W and m is at least 2p-1 (section 6): no rank waits between its own first pass and its own last, and
    rank i starts and ends i passes later than rank 0. A rank holds at most 2p activations of a stage, as much as p of its two
    stages together, which is what 1f1b holds. With fewer than 2p-1 micro-batches, this is the schedule for 2p-1 without the missing
    ones.
    """
    ranks, planned = placement.ranks, max(micro_batches, 2 * placement.ranks - 1)
    actions = []
    for rank in range(ranks):
        after = ranks - 1 - rank
        speller = Speller(placement, rank)
        speller.do("F0", 2 * after + 1)  # until the first forward pass of the second chunk can start
        speller.do("F1 F0", rank)
        speller.do("F1 I1 W1", after + 1)
        speller.do("F0 I0 W0 F1 I1 W1", planned - 2 * ranks + rank + 1)
        speller.do("I0 W0 F1 I1 W1", after)
        speller.do("I0 I1", rank)
        speller.do("I0 W0", after + 1)
        speller.do("W1", rank)
        speller.rest()
        actions.append(only(speller.actions, micro_batches))
    return actions


ZB_V = Formula(
    "0 for F = I = W", lambda size: 0 if size.even else None,
    "2p", lambda size: 2 * min(size.ranks, size.micro_batches), least=lambda ranks: 2 * ranks - 1,
)  # fmt: skip
