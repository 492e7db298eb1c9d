"""Schedules for ranks with a single stage each.

Time runs to the right, each pass takes a step, a dot is a waiting rank. 4 ranks and 4 micro-batches, first gpipe, then 1f1b:

    F0 F1 F2 F3 .  .  .  .  .  .  B0 B1 B2 B3
       F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3
          F0 F1 F2 F3 .  .  B0 B1 B2 B3
             F0 F1 F2 F3 B0 B1 B2 B3

    F0 F1 F2 F3 .  .  .  B0 .  B1 .  B2 .  B3
       F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
          F0 F1 .  B0 F2 B1 F3 B2 .  B3
             F0 B0 F1 B1 F2 B2 F3 B3

zb_h1 with 4 ranks and 6 micro-batches:

    F0 F1 F2 F3 .  .  .  I0 W0 F4 I1 W1 F5 I2 W2 I3 W3 I4 W4 I5 W5
       F0 F1 F2 .  .  I0 F3 I1 W0 F4 I2 W1 F5 I3 W2 I4 W3 I5 W4 W5
          F0 F1 .  I0 F2 I1 F3 I2 W0 F4 I3 W1 F5 I4 W2 I5 W3 W4 W5
             F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 W3 W4 W5
"""

from collections.abc import Iterator

from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.schedules.formula import Formula
from bagualu.parallel.pipeline.schedules.schedule import Action, Kind


def gpipe(placement: StagePlacement, micro_batches: int) -> list[list[Action]]:
    """Returns the passes of each rank: all forward passes, then all backward passes (Huang et al., arXiv 1811.06965).

    The bubble is (p-1)(F+B), a fraction (p-1)/(m+p-1) of the time (section 2.3); m activations are held.
    """
    every = range(micro_batches)
    return [[*_passes("F", every, stage), *_passes("B", every, stage)] for stage in range(placement.ranks)]


def one_f_one_b(placement: StagePlacement, micro_batches: int) -> list[list[Action]]:
    """Returns the passes of each rank. A rank starts with as many forward passes as there are stages after it, then alternates
    between forward and backward passes (PipeDream-flush, arXiv 2006.09503, section 3).

    The bubble is (p-1)(F+B), as for gpipe. Rank i holds p-i activations, or m if that is less.
    """
    actions = []
    for stage in range(placement.ranks):
        forward, backward = _passes("F", range(micro_batches), stage), _passes("B", range(micro_batches), stage)
        actions.append([*_take(forward, placement.ranks - 1 - stage), *_in_turn(forward, backward)])
    return actions


def zb_h1(placement: StagePlacement, micro_batches: int) -> list[list[Action]]:
    """Returns the passes of each rank: 1f1b with split backward passes. On rank i, the W of a micro-batch runs only after i further
    I passes, so that W passes fill the wait at the end (ZB-H1, also ZB1P: Qi et al., arXiv 2401.10241, section 2.2).

    The bubble is (p-1)(F+I-W) if W is at most F and m at least p (section 2.3, table 1). Every rank holds p activations, or m if
    that is less: a late rank has fewer forward passes ahead, but as many more W passes outstanding.
    """
    actions = []
    for stage in range(placement.ranks):
        forward, backward, weight = (_passes(kind, range(micro_batches), stage) for kind in "FIW")
        mine = [*_take(forward, placement.ranks - 1 - stage)]
        for _ in range(min(stage, micro_batches)):
            mine += [*_take(forward, 1), *_take(backward, 1)]
        actions.append([*mine, *_in_turn(forward, backward, weight)])
    return actions


def _passes(kind: str, micro_batches: range, stage: int) -> Iterator[Action]:
    return iter([Action(Kind(kind), m, stage) for m in micro_batches])


def _take(passes: Iterator[Action], count: int) -> Iterator[Action]:
    """Yields the next `count` passes, or all that remain if there are fewer."""
    return (action for _, action in zip(range(count), passes, strict=False))


def _in_turn(*several: Iterator[Action]) -> Iterator[Action]:
    """Yields a pass of each iterator in turn until all are exhausted."""
    left = list(several)
    while left:
        for passes in list(left):
            action = next(passes, None)
            if action is None:
                left.remove(passes)
            else:
                yield action


GPIPE = Formula(
    "(p-1)(F+B)", lambda size: (size.ranks - 1) * (size.forward + size.backward),
    "m", lambda size: size.micro_batches,
)  # fmt: skip
ONE_F_ONE_B = Formula(
    "(p-1)(F+B)", GPIPE.bubble,
    "p", lambda size: min(size.ranks, size.micro_batches),
)  # fmt: skip
ZB_H1 = Formula(
    "(p-1)(F+I-W) for W <= F",
    lambda size: (size.ranks - 1) * (size.forward + size.input_gradient - size.weight_gradient)
    if size.weight_gradient <= size.forward else None,
    "p", ONE_F_ONE_B.peak, least=lambda ranks: ranks,
)  # fmt: skip
