"""The suite every backend passes: each collective against the same thing computed in one place.

A new backend is added to `BACKENDS` and gets no exceptions. Sizes are odd on purpose, splits uneven and sometimes empty.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bagualu.comm.errors import CommunicationError, RecipeError
from bagualu.comm.group import Communicator, Group, connect
from bagualu.comm.world import World
from tests.harness import BACKENDS, ON_GPU, WorkerFailed, run

SIZES = (2, 3, 4)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)


def value(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What `rank` holds: small whole numbers, so that sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


def all_values(size: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.stack([value(rank, shape, dtype) for rank in range(size)])


def on_device(c: Communicator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return value(c.rank, shape, dtype).to(c.device)


def expect(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(actual.cpu(), expected), f"{actual} is not {expected}"


def collectives(c: Communicator, dtype: torch.dtype) -> None:
    group, n = c.world, c.size
    x = on_device(c, (3, 5), dtype)
    group.all_reduce(x)
    expect(x, all_values(n, (3, 5), dtype).sum(0).to(dtype))
    x = on_device(c, (7,), dtype)
    group.all_reduce(x, "max")
    expect(x, all_values(n, (7,), dtype).amax(0))
    out = torch.empty(n * 3, 5, dtype=dtype, device=c.device)
    group.all_gather(out, on_device(c, (3, 5), dtype))
    expect(out, all_values(n, (3, 5), dtype).flatten(0, 1))
    out = torch.empty(3, 5, dtype=dtype, device=c.device)
    group.reduce_scatter(out, on_device(c, (3 * n, 5), dtype))
    expect(out, all_values(n, (3 * n, 5), dtype).sum(0).to(dtype)[3 * c.rank : 3 * c.rank + 3])
    for source in range(n):
        x = on_device(c, (5,), dtype)
        group.broadcast(x, source)
        expect(x, value(source, (5,), dtype))


def in_place(c: Communicator) -> None:
    # A flat buffer of which each member owns a slice: reduced into the slice, then gathered from it.
    n, whole = c.size, on_device(c, (3 * c.size,), torch.float64)
    mine = whole[3 * c.rank : 3 * c.rank + 3]
    c.world.reduce_scatter(mine, whole)
    total = all_values(n, (3 * n,), torch.float64).sum(0)
    expect(mine, total[3 * c.rank : 3 * c.rank + 3])
    c.world.all_gather(whole, mine)
    expect(whole, total)


def waiting_again(c: Communicator) -> None:
    # A finished work may be waited for again, and nothing of nothing is nothing.
    whole = on_device(c, (2 * c.size,), torch.float32)
    mine = whole[2 * c.rank : 2 * c.rank + 2]
    work = c.world.reduce_scatter(mine, whole)
    work.wait()
    expect(mine, all_values(c.size, (2 * c.size,), torch.float32).sum(0)[2 * c.rank : 2 * c.rank + 2])
    empty = torch.empty(0, device=c.device)
    c.world.reduce_scatter(empty, empty.clone())
    c.world.all_gather(empty, empty.clone())


def sums_are_rounded_once(c: Communicator) -> None:
    # 256 + 1 + 1 + ... in bfloat16: added one after the other, every 1 would be lost.
    x = torch.full((4,), 256.0 if c.rank == 0 else 1.0, dtype=torch.bfloat16, device=c.device)
    out = torch.empty(4 // 4, dtype=torch.bfloat16, device=c.device)
    if c.size == 4:
        c.world.reduce_scatter(out, x)
        assert out.item() == torch.tensor(259.0).bfloat16().item()


def uneven_all_to_all(c: Communicator) -> None:
    # Rank i sends (i + j) % 3 rows to rank j: uneven, and some of them none.
    n = c.size
    sends = [[(i + j) % 3 for j in range(n)] for i in range(n)]
    inputs = [value(i, (sum(sends[i]), 4), torch.float32) for i in range(n)]
    receives = [sends[i][c.rank] for i in range(n)]
    out = torch.empty(sum(receives), 4, device=c.device)
    c.world.all_to_all(out, inputs[c.rank].to(c.device), receives, sends[c.rank])
    expect(out, torch.cat([inputs[i].split(sends[i])[c.rank] for i in range(n)]))


def ordered_messages(c: Communicator) -> None:
    # Around the ring, three messages of different sizes each way, sends started before receives are waited for.
    group, n = c.world, c.size
    after, before = (c.rank + 1) % n, (c.rank - 1) % n
    shapes = [(2,), (3, 3), (1,)]
    sent = [
        group.send(value(10 * c.rank + i, s, torch.float32).to(c.device), after, asynchronous=True) for i, s in enumerate(shapes)
    ]
    for i, shape in enumerate(shapes):
        x = torch.empty(shape, device=c.device)
        group.receive(x, before)
        expect(x, value(10 * before + i, shape, torch.float32))
    for work in sent:
        work.wait()


def many_at_once(c: Communicator) -> None:
    tensors = [on_device(c, (1000 + i,), torch.float64) for i in range(5)]
    works = [c.world.all_reduce(tensor, asynchronous=True) for tensor in tensors]
    for work in works:
        work.wait()
    for i, tensor in enumerate(tensors):
        expect(tensor, all_values(c.size, (1000 + i,), torch.float64).sum(0))
    c.world.barrier()


def starts_do_not_wait(c: Communicator) -> None:
    # Rank 1 begins nothing before it has heard from rank 0, which has begun everything; at every size, whatever way it goes.
    talk = c.group(tuple(range(c.size)), "talk")
    for elements in (8, 2**19):
        whole, parts = torch.ones(elements, device=c.device), torch.empty(c.size * elements, device=c.device)
        mine = torch.empty(elements // c.size, device=c.device)
        message = torch.zeros(1, device=c.device)
        if c.rank == 1:
            talk.receive(message, 0)
        works = [
            work
            for _ in range(3)
            for work in (
                c.world.all_reduce(whole, asynchronous=True),
                c.world.all_gather(parts, torch.ones(elements, device=c.device), asynchronous=True),
                c.world.reduce_scatter(mine, torch.ones(c.size * mine.numel(), device=c.device), asynchronous=True),
            )
        ]
        if c.rank == 0:
            talk.send(message, 1)
        for work in works:
            work.wait()


def subgroups(c: Communicator) -> None:
    # Two partitions of the same world live side by side, and groups of the same ranks do not mix.
    parity = c.group(tuple(range(c.rank % 2, c.size, 2)), "parity")
    again = c.group(parity.ranks, "again")
    first, second = torch.tensor([1.0], device=c.device), torch.tensor([10.0], device=c.device)
    works = [parity.all_reduce(first, asynchronous=True), again.all_reduce(second, asynchronous=True)]
    for work in works:
        work.wait()
    assert (first.item(), second.item()) == (parity.size, 10 * parity.size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", [*BACKENDS, ON_GPU])
class TestConformance:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_collectives(self, backend: str, size: int, dtype: torch.dtype) -> None:
        run(backend, size, collectives, dtype)

    def test_in_place(self, backend: str, size: int) -> None:
        run(backend, size, in_place)

    def test_waiting_again(self, backend: str, size: int) -> None:
        run(backend, size, waiting_again)

    def test_reduce_scatter_rounds_once(self, backend: str, size: int) -> None:
        run(backend, size, sums_are_rounded_once)

    def test_uneven_all_to_all(self, backend: str, size: int) -> None:
        run(backend, size, uneven_all_to_all)

    def test_ordered_messages(self, backend: str, size: int) -> None:
        run(backend, size, ordered_messages)

    def test_many_at_once(self, backend: str, size: int) -> None:
        run(backend, size, many_at_once)

    def test_starts_do_not_wait(self, backend: str, size: int) -> None:
        run(backend, size, starts_do_not_wait)

    def test_subgroups(self, backend: str, size: int) -> None:
        run(backend, size, subgroups)


def one_does_not_wait(c: Communicator, op: str) -> None:
    asynchronous, x = c.rank == 1, torch.zeros(4)
    if op == "all_reduce":
        c.world.all_reduce(x, asynchronous=asynchronous).wait()
    else:
        c.world.all_to_all(torch.empty(4), x, asynchronous=asynchronous).wait()


@pytest.mark.parametrize("op", ["all_reduce", "all_to_all"])
def test_whether_it_is_asynchronous_is_the_same_everywhere(op: str) -> None:
    with pytest.raises(CommunicationError, match=r"'asynchronous'\), but rank . calls|'synchronous'\), but rank . calls"):
        run("simulated", 2, one_does_not_wait, op)


def lose_a_rank(c: Communicator) -> None:
    if c.rank == 1:
        raise KeyError("gone")
    c.world.all_reduce(torch.zeros(1, device=c.device))


def test_a_rank_that_fails_is_an_error_on_its_peers_not_a_hang() -> None:
    with pytest.raises(KeyError, match="gone"):
        run("simulated", 3, lose_a_rank)
    with pytest.raises(WorkerFailed, match=r"gone[\s\S]*then .*CommunicationError: all_reduce in group world of ranks \[0, 1, 2\]"):
        run("gloo", 3, lose_a_rank)


def wrong_arguments(c: Communicator) -> None:
    group = c.world
    with pytest.raises(ValueError, match="not contiguous"):
        group.all_reduce(torch.zeros(3, 3).t())
    with pytest.raises(ValueError, match="must hold 2 x"):
        group.all_gather(torch.zeros(5), torch.zeros(2))
    with pytest.raises(ValueError, match="add up"):
        group.all_to_all(torch.zeros(2, 1), torch.zeros(2, 1), [1, 1], [1, 2])
    with pytest.raises(ValueError, match="this rank itself"):
        group.send(torch.zeros(1), c.rank)
    with pytest.raises(ValueError, match="positions 0 to 1"):
        group.broadcast(torch.zeros(1), 2)


def test_wrong_arguments_are_refused_before_anything_is_sent() -> None:
    run("simulated", 2, wrong_arguments)


def test_a_group_of_one_communicates_nothing() -> None:
    c = connect("gloo", World(0, 1))
    out = torch.empty(2, 2)
    c.world.all_gather(out, torch.ones(2, 2))
    c.world.all_reduce(out)
    c.world.barrier()
    expect(out, torch.ones(2, 2))
    c.close()


def through_torch(c: Communicator) -> list[float]:
    """What a library that communicates by itself sums over all ranks, and over this rank alone."""
    x = torch.full((3,), c.rank + 1.0)
    dist.all_reduce(x, group=c.world.process_group)
    alone = c.group((c.rank,), "alone")
    dist.all_reduce(x, group=alone.process_group)
    assert alone.process_group is alone.process_group
    return x.tolist()


def test_a_library_communicates_through_a_group_s_process_group() -> None:
    assert run("gloo", 3, through_torch) == [[6.0] * 3] * 3
    assert run("gloo", 1, through_torch) == [[1.0] * 3]
    c = connect("gloo", World(0, 1))  # without a rendezvous
    try:
        assert through_torch(c) == [1.0] * 3
    finally:
        c.close()
    assert not dist.is_initialized()


def no_process_group(c: Communicator) -> None:
    with pytest.raises(RecipeError, match=r"uses SimulatedTransport, not torch\.distributed"):
        _ = c.world.process_group


def test_ranks_that_are_threads_have_no_process_group() -> None:
    run("simulated", 2, no_process_group)


@pytest.mark.gpu
def test_nccl_world_of_one(tmp_path: Path) -> None:
    """One GPU can still run every kernel: the group has a transport although it has one member."""
    c = connect("nccl", World(0, 1, rendezvous=(tmp_path / "meeting").as_uri()))
    try:
        c.world = Group("world", (0,), 0, c.backend.transport((0,), "world"), c.device)
        for dtype in DTYPES:
            collectives(c, dtype)
        in_place(c)
        uneven_all_to_all(c)
        many_at_once(c)
    finally:
        c.close()


def mismatch(c: Communicator) -> None:
    c.world.all_reduce(torch.zeros(3 + c.rank))


def cross_wait(c: Communicator) -> None:
    c.world.receive(torch.zeros(1), 1 - c.rank)


def early_return(c: Communicator) -> None:
    if c.rank == 0:
        c.world.barrier()


def test_simulated_names_ranks_that_call_different_things() -> None:
    with pytest.raises(CommunicationError, match=r"rank \d calls all_reduce number 1 in group world"):
        run("simulated", 2, mismatch)


def test_simulated_names_who_waits_for_whom() -> None:
    with pytest.raises(CommunicationError, match=r"deadlock.*: rank 0 waits in receive .* rank 1 waits in receive"):
        run("simulated", 2, cross_wait)


def test_simulated_sees_that_a_rank_has_left() -> None:
    with pytest.raises(CommunicationError, match=r"rank 0 waits in barrier number 1 in group world for ranks \[1\]"):
        run("simulated", 2, early_return)


def threads_after(communicator):
    """Groups that something still refers to when their communicator is closed."""
    KEPT.append([communicator.group(communicator.world.ranks, f"kept {number}") for number in range(3)])
    return len(list(Path("/proc/self/task").iterdir()))


KEPT = []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_a_closed_communicator_leaves_no_threads():
    first, *_, last = [run("gloo", 2, threads_after)[0] for _ in range(4)]
    assert last == first
