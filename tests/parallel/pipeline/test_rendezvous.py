"""Messages as NCCL does them: what two ranks send each other in one group happens one after the other, and a send is over only
when the other side has come to its receive. With the groups of `Mesh.messages` no schedule comes to a stop; with fewer some do."""

from collections.abc import Callable

import pytest

from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.mesh import message_group
from bagualu.parallel.pipeline.check import received_as
from bagualu.parallel.pipeline.registry import SCHEDULES, compute_schedule
from bagualu.parallel.pipeline.schedules.schedule import PASSES, SENDS, Action, Kind, Schedule, forward_only, with_messages

GroupOf = Callable[[bool, int, int], str]
"""(gradients, source, destination) -> the group's name."""


def comes_to_its_end(schedule: Schedule, group_of: GroupOf) -> bool:
    """Passes of a rank in their order; messages in the order in which they were started, for each group and pair of ranks."""
    placement = schedule.placement
    place = [0] * placement.ranks
    queues: list[dict[tuple[str, frozenset[int]], list[tuple[Action, bool]]]] = [{} for _ in place]
    """By rank: what has been started and is not over, a message (as its receive) and whether it is sent."""
    done: set[Action] = set()

    def go_on(rank: int) -> bool:
        moved = False
        while place[rank] < len(schedule.actions[rank]):
            action = schedule.actions[rank][place[rank]]
            if action.kind not in PASSES:
                sends = action.kind in SENDS
                message = received_as(action) if sends else action
                gradients = message.kind == Kind.RECEIVE_GRADIENT
                source = placement.rank_of(message.stage + (1 if gradients else -1))
                destination = placement.rank_of(message.stage)
                queue = queues[rank].setdefault((group_of(gradients, source, destination), frozenset((source, destination))), [])
                if (message, sends) not in queue and message not in done:
                    queue.append((message, sends))
                    moved = True
                if not sends and message not in done:  # what comes after needs it
                    return moved
            place[rank] += 1
            moved = True
        return moved

    def match() -> bool:
        heads = [queue[0] for mine in queues for queue in mine.values() if queue]
        met = {message for message, sends in heads if (message, not sends) in heads}
        for mine in queues:
            for queue in mine.values():
                if queue and queue[0][0] in met:
                    queue.pop(0)
        done.update(met)
        return bool(met)

    while any([*(go_on(rank) for rank in range(placement.ranks)), match()]):
        pass
    return all(at == len(actions) for at, actions in zip(place, schedule.actions, strict=True))


SIZES = [(ranks, micro_batches) for ranks in (2, 3, 4) for micro_batches in (1, 2, 5, 8)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_comes_to_its_end(name: str) -> None:
    for ranks, micro_batches in SIZES:
        assert comes_to_its_end(with_messages(compute_schedule(name, ranks, micro_batches)), message_group), (ranks, micro_batches)


@pytest.mark.parametrize(
    "placement", [StagePlacement(3), StagePlacement(2, 2), StagePlacement(3, 2), StagePlacement(3, 2, True)], ids=str
)
def test_so_does_validation(placement: StagePlacement) -> None:
    assert comes_to_its_end(with_messages(forward_only(placement, 4)), message_group)


@pytest.mark.parametrize("name", ["zb_v", "v_half", "dualpipe_v", "interleaved_1f1b"])
def test_with_both_directions_in_one_group_ranks_wait_for_each_other(name: str) -> None:
    both = with_messages(compute_schedule(name, 2, 5))
    assert not comes_to_its_end(both, lambda gradients, source, destination: "gradients" if gradients else "activations")
