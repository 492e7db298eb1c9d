"""The backend that writes communication down: alone for any rank of any world, and around another backend."""

from typing import Any

import pytest
import torch

from bagualu.comm.calls import Communication, Pending, Waited
from bagualu.comm.group import Communicator
from bagualu.comm.recording import RecordingBackend
from bagualu.comm.world import World
from tests.harness import run


def alone(rank: int, size: int) -> tuple[Communicator, list[Any]]:
    events: list[Any] = []
    world = World(rank, size, rank)
    return Communicator(RecordingBackend(world, 1.0, write=lambda event, tensors: events.append(event)), world), events


def talk(communicator: Communicator) -> torch.Tensor:
    """Some calls of a group of all ranks."""
    group, device = communicator.world, communicator.device
    values = torch.ones(6, device=device)
    group.all_reduce(values)
    work = group.reduce_scatter(torch.empty(3, device=device), values, asynchronous=True)
    group.all_to_all(torch.empty(4, 2, device=device), torch.ones(4, 2, device=device))
    work.wait()
    work.wait()
    if group.rank == 0:
        group.send(values, 1)
    else:
        group.receive(values, 0)
    return values


def test_calls_are_written_down_in_order_with_their_bytes_and_waits() -> None:
    communicator, events = alone(1, 2)
    assert talk(communicator).is_meta
    assert events == [
        Communication("all_reduce", "world", 2, 24),
        Waited("all_reduce", "world"),
        Communication("reduce_scatter", "world", 2, 24),
        Communication("all_to_all", "world", 2, 32),
        Waited("all_to_all", "world"),
        Waited("reduce_scatter", "world"),
        Communication("receive", "world", 2, 24, peer=0),
        Waited("receive", "world", 0),
    ]


def test_a_wait_says_which_of_the_calls_under_way_has_ended() -> None:
    communicator, events = alone(0, 2)
    group, values = communicator.world, torch.ones(2, device=communicator.device)
    first, second, third = (group.all_reduce(values, asynchronous=True) for _ in range(3))
    second.wait()
    third.wait()
    first.wait()
    assert [event.index for event in events[3:]] == [1, 1, 0]
    pending = Pending[int]()
    for number, call in enumerate(events[:3]):
        pending.begin(call, number)
    assert [pending.end(waited) for waited in events[3:]] == [1, 2, 0]


def test_a_group_of_one_rank_communicates_nothing() -> None:
    communicator, events = alone(5, 8)
    group = communicator.group((5,), "alone")
    group.all_reduce(torch.ones(3, device=communicator.device))
    assert events == []


def test_values_that_do_not_exist_are_read_as_zeros() -> None:
    communicator, _ = alone(0, 2)
    assert communicator.world.read(torch.ones(2, 2, device="meta")) == [[0.0, 0.0], [0.0, 0.0]]


def recorded(communicator: Communicator) -> tuple[list[float], list[Any]]:
    events: list[Any] = []
    world = World(communicator.rank, communicator.size, communicator.rank)
    backend = RecordingBackend(world, 1.0, communicator.backend, lambda event, tensors: events.append(event))
    return talk(Communicator(backend, world)).tolist(), events


@pytest.mark.parametrize("backend", ["gloo", "simulated"])
def test_around_another_backend_it_writes_the_same_and_changes_no_result(backend: str) -> None:
    for rank, (values, events) in enumerate(run(backend, 2, recorded)):
        communicator, expected = alone(rank, 2)
        talk(communicator)
        assert events == expected
        assert values == [2.0] * 6
