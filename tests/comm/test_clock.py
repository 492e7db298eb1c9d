"""The rules of streams, on cases computed by hand."""

from collections.abc import Callable

import pytest

from bagualu.comm.clock import Begin, Clock, Compute, Item, Lane, Mark, Price, Prices, StreamSpan, Wait
from bagualu.comm.cluster_file import load_cluster
from bagualu.comm.cost import collective_cost
from bagualu.comm.errors import CommunicationError


class Given(Prices):
    """Prices of calls whose size is their time: `bytes` seconds of transfer after a second of latency, over the tier of links of
    as many ranks."""

    def __init__(self, latency: float = 1.0, on_cpu: bool = False) -> None:
        self._latency, self._on_cpu = latency, on_cpu

    def of(self, lane: Lane, kind: str, size_bytes: int) -> Price:
        return self._latency, float(size_bytes)

    def tier(self, lane: Lane) -> int:
        return len(lane.ranks)

    def moved_by_processor(self, rank: int) -> bool:
        return self._on_cpu


def lane(name: str, *members: int, tier: int = 2) -> Lane:
    return Lane(name, name, members, range(tier))


def run(*programs: list[Item], latency: float = 1.0, records: bool = False, on_cpu: bool = False) -> Clock:
    clock = Clock([(10 * index, items) for index, items in enumerate(programs)], Given(latency, on_cpu), records)
    clock.run()
    return clock


def call(on: Lane, seconds: int, kind: str = "all_reduce") -> list[Item]:
    return [Begin(on, kind, seconds), Wait(on, kind)]


def test_a_collective_begins_when_its_last_rank_reaches_it() -> None:
    both = lane("fold", 0, 1)
    clock = run([Compute(1), *call(both, 4)], [Compute(3), *call(both, 4), Compute(2)])
    first, second = clock.programs
    assert (first.time, second.time, clock.end) == (8, 10, 10)
    assert first.held_up == {("fold", 1): 2}
    assert not second.held_up
    assert first.exposed == second.exposed == {"fold": 5}


def test_the_largest_part_decides_what_a_call_takes() -> None:
    both = lane("expert", 0, 1)
    for sizes in ((4, 2), (2, 4)):
        assert run(*([Compute(at), *call(both, size)] for at, size in enumerate(sizes))).end == 6


def test_computation_goes_on_beside_a_call_until_the_rank_waits_for_it() -> None:
    alone = lane("fold", 0)
    for computes, exposed in ((2, 3), (5, 0), (9, 0)):
        (program,) = run([Begin(alone, "all_reduce", 4), Compute(computes), Wait(alone, "all_reduce"), Compute(1)]).programs
        assert program.time == max(5, computes) + 1
        assert sum(program.exposed.values()) == exposed


def test_a_call_for_which_nobody_waits_belongs_to_the_step() -> None:
    clock = run([Begin(lane("fold", 0), "all_gather", 4), Compute(1)])
    assert (clock.programs[0].time, clock.end, clock.last_group) == (1, 5, "fold")


def test_the_calls_of_a_lane_run_one_after_the_other() -> None:
    alone = lane("fold", 0)
    begun: list[Item] = [Begin(alone, "all_gather", 4), Begin(alone, "all_reduce", 4), Begin(alone, "all_gather", 4), Compute(1)]
    for waits, end in (((0,), 5), ((1,), 15), ((0, 0), 15), ((), 1)):
        (program,) = run([*begun, *(Wait(alone, "all_gather", index) for index in waits)]).programs
        assert program.time == end
    (program,) = run([*begun, Wait(alone, "all_reduce")]).programs
    assert program.exposed == {"fold": 9}  # the first call is communication of the same group


def test_transfers_over_the_same_links_share_them() -> None:
    """The second begins 2 s later; the first then has 2 of its 4 s left, which take 4, in which the second does half of its 4."""
    first, second = lane("fold", 0), lane("replica", 0)
    begun: list[Item] = [Begin(first, "all_reduce", 4), Compute(2), Begin(second, "all_reduce", 4)]
    waits = [Wait(first, "all_reduce"), Mark(), Wait(second, "all_reduce"), Mark()]
    (program,) = run([*begun, *waits], latency=0.0).programs
    assert program.marks == [6, 8]
    other = lane("replica", 0, tier=8)
    (program,) = run(
        [begun[0], begun[1], Begin(other, "all_reduce", 4), waits[0], Mark(), Wait(other, "all_reduce"), Mark()], latency=0.0
    ).programs
    assert program.marks == [4, 6]  # of another tier


def test_links_of_another_rank_slow_a_call_down() -> None:
    both, other = lane("fold", 0, 1), lane("replica", 1)
    first, second = run(call(both, 4), [Begin(other, "all_reduce", 4), *call(both, 4)], latency=0.0).programs
    assert first.time == second.time == 8


def test_the_processors_of_a_cpu_compute_or_move_bytes() -> None:
    """A transfer of 4 s beside computation: each gets half of the processors as long as there are both."""
    alone = lane("fold", 0)
    for computes, end in ((10, 14), (4, 8), (2, 6), (0, 4)):
        begun = [Begin(alone, "all_reduce", 4), Compute(computes), Mark(), Wait(alone, "all_reduce"), Mark()]
        (program,) = run(begun, latency=0.0, on_cpu=True).programs
        assert (program.time, program.exposed) == (end, {"fold": 4})
    there = lane("pipeline", 0, 1)
    sender, receiver = run(
        [Begin(there, "send", 2), Compute(5), Wait(there, "send")],
        [Begin(there, "receive", 2), Compute(1), Wait(there, "receive"), Compute(3)],
        latency=0.0,
        on_cpu=True,
    ).programs
    assert (sender.time, receiver.time) == (7, 7)  # the message ends at 4, when the sender has computed 2 s beside it


def test_a_message_ends_when_it_is_received() -> None:
    there = lane("pipeline", 0, 1)
    sender, receiver = run(
        [Compute(1), Begin(there, "send", 2), Compute(1), Wait(there, "send"), Compute(1)], [Compute(6), *call(there, 2, "receive")]
    ).programs
    assert (sender.time, receiver.time) == (10, 9)
    assert sender.held_up == {("pipeline", 1): 4}
    assert sender.exposed == receiver.exposed == {"pipeline": 3}


def test_messages_share_links_only_in_the_same_direction() -> None:
    there, back, on = lane("pipeline", 0, 1), lane("pipeline_back", 1, 0), lane("pipeline", 0, 2)

    def times(second: Lane) -> list[float]:
        programs: list[list[Item]] = [[], [], []]
        for message in (there, second):
            for member, kind in zip(message.members, ("send", "receive"), strict=True):
                programs[member].append(Begin(message, kind, 4))
        return [program.time for program in _waiting(programs).programs]

    assert times(back) == [4, 4, 0]
    assert times(on) == [8, 8, 8]


def _waiting(programs: list[list[Item]]) -> Clock:
    waits = [[Wait(item.lane, item.kind) for item in program if isinstance(item, Begin)] for program in programs]
    return run(*(begun + ends for begun, ends in zip(programs, waits, strict=True)), latency=0.0)


def test_messages_between_two_ranks_keep_their_order() -> None:
    there = lane("pipeline", 0, 1)
    _, receiver = run(
        [Begin(there, "send", 1), Begin(there, "send", 7)],
        [*call(there, 1, "receive"), Mark(), *call(there, 7, "receive"), Mark()],
        latency=0.0,
    ).programs
    assert receiver.marks == [1, 8]


def test_waiting_twice_or_for_a_call_of_an_earlier_step_takes_no_time() -> None:
    alone = lane("fold", 0)
    (program,) = run([Wait(alone, "all_gather"), *call(alone, 4), Wait(alone, "all_reduce")]).programs
    assert program.time == 5


def test_spans_of_a_call_have_one_number_on_all_ranks() -> None:
    there = lane("pipeline", 0, 1)
    sender, receiver = run(
        [Compute(1, "mm"), Begin(there, "send", 2), Wait(there, "send")],
        [*call(there, 2, "receive"), Compute(3, "add")],
        records=True,
    ).programs
    assert sender.spans == [StreamSpan("compute", "mm", 0, 1), StreamSpan("pipeline", "send", 1, 4, 0)]
    assert receiver.spans == [StreamSpan("pipeline", "receive", 1, 4, 0), StreamSpan("compute", "add", 4, 7)]


def stuck_messages() -> list[list[Item]]:
    there, back = lane("pipeline", 0, 1), lane("pipeline_back", 1, 0)
    return [call(back, 1, "receive") + call(there, 1, "send"), call(there, 1, "receive") + call(back, 1, "send")]


def different_calls() -> list[list[Item]]:
    both = lane("fold", 0, 1)
    return [call(both, 1), [Compute(1), *call(both, 1, "all_gather")]]


def missing_call() -> list[list[Item]]:
    both = lane("fold", 0, 1)
    return [call(both, 1) + call(both, 1), call(both, 1)]


def message_nobody_receives() -> list[list[Item]]:
    return [[Begin(lane("pipeline", 0, 1), "send", 1)], []]


@pytest.mark.parametrize(
    ("programs", "text"),
    [
        (
            stuck_messages,
            "deadlock, ranks wait for each other: rank 0 waits for message number 1 in pipeline_back, which rank 10 has not begun; "
            "rank 10 waits for message number 1 in pipeline, which rank 0 has not begun",
        ),
        (different_calls, "rank 10 calls all_gather as number 1 in fold, but rank 0 calls all_reduce"),
        (missing_call, "rank 0 waits for all_reduce number 2 in fold, which rank 10 has not begun"),
        (message_nobody_receives, "the step ends before message number 1 in pipeline, which rank 10 has not begun"),
    ],
)
def test_ranks_that_do_not_fit_together_are_named_with_their_calls(programs: Callable[[], list[list[Item]]], text: str) -> None:
    with pytest.raises(CommunicationError, match=text):
        run(*programs())


def test_prices_are_those_of_the_cluster() -> None:
    cluster = load_cluster("h100")
    prices, fold = Prices(cluster), Lane("fold", "fold", (0,), range(0, 64, 8))
    for kind, collective, ranks in (("all_gather", "all_gather", fold.ranks), ("barrier", "all_reduce", fold.ranks)):
        cost = collective_cost(cluster, collective, 1e6, ranks)
        assert prices.of(fold, kind, 1_000_000) == (cost.latency_seconds, cost.transfer_seconds)
    message = Lane("pipeline", "pipeline 0 -> 1", (0, 1), range(0, 16, 8))
    assert sum(prices.of(message, "send", 10**6)) == collective_cost(cluster, "p2p", 1e6, message.ranks).seconds
    tensor = Lane("tensor", "tensor", (0,), range(8))
    assert [prices.tier(one) for one in (tensor, fold, message)] == [0, 1, 1]
