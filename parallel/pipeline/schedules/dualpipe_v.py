"""DeepSeek's DualPipeV: pairs of forward and backward passes, for ranks with two chunks.

2 ranks, 5 micro-batches; B takes as long as I and W together:

    F0  F1  F2  F0' I0' W0' F1' F3  B1' --  F2' B0  --  F4  B2' --  F3' B1  --  B3' --  F4' .   B2  --  B4' --  I3  W3  I4  W4
        F0  F0' F1  F1' F2  B0' --  F2' B0  --  F3  B1' --  F3' B1  --  F4  B2' --  F4' B2  --  B3' --  B3  --  I4' I4  W4' W4
"""

from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.schedules.formula import Formula
from bagualu.parallel.pipeline.schedules.schedule import Action
from bagualu.parallel.pipeline.schedules.v_shaped import Speller, only


def dualpipe_v(placement: StagePlacement, micro_batches: int) -> list[list[Action]]:
    """Returns the passes of each rank. In the steady part, each forward pass of a chunk is paired with a backward pass of the other
    chunk, so that the communication of each can overlap the computation of the other (DeepSeek-V3, arXiv 2412.19437, section 3.2.1;
    the V form is from the repository github.com/deepseek-ai/DualPipe). Here the two passes of a pair run one after the other.

    The repository states a bubble of (p-1)(F&B+B-3W) for 2p stages and m of at least 2p, where F&B is the duration of a pair. Here
    each pass of a pair sends its result as soon as it ends, so the bubble is at most the stated value with F&B = F+B, and
    (p-1)(F+I-W) if F = I = W. Every rank holds 2p+1 activations of a stage, as the repository states. With fewer than 2p
    micro-batches, this is the schedule for 2p without the missing ones.
    """
    ranks, planned = placement.ranks, max(micro_batches, 2 * placement.ranks)
    actions = []
    for rank in range(ranks):
        after = ranks - 1 - rank
        speller = Speller(placement, rank)
        speller.do("F0", 2 * after)
        speller.do("F0 F1", rank + 1)
        speller.do("I1 W F1", after)
        speller.do("F0 B1 F1 B0", planned - 2 * ranks + rank + 1)
        speller.do("B1 F1 B0", after)
        whole, ending = divmod(rank + 1, 2)  # the second half of these 2(rank+1) backward passes, alternating chunks, is split
        speller.do("B1 B0", whole)
        speller.do("B1 I0", ending)
        speller.do("I1 I0", whole)
        speller.do("W I0", after)
        speller.rest()
        actions.append(only(speller.actions, micro_batches))
    return actions


DUALPIPE_V = Formula(
    "(p-1)(F&B+B-3W)",
    lambda size: (size.ranks - 1) * (size.forward + 2 * size.backward - 3 * size.weight_gradient),
    "2p+1", lambda size: min(2 * size.ranks + 1, 2 * size.micro_batches), bound=True, least=lambda ranks: 2 * ranks,
)  # fmt: skip
