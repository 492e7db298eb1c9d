"""Who a process is, as launchers say it in its environment."""

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.comm.world import World

OF_THE_WORLD = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "here", "MASTER_PORT": "1"}


def world(monkeypatch: pytest.MonkeyPatch, **variables: str) -> World:
    for name in (*OF_THE_WORLD, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return World.from_environment()


def test_the_ranks_of_a_machine_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = world(monkeypatch, **OF_THE_WORLD, LOCAL_RANK="1", LOCAL_WORLD_SIZE="3")
    assert (whole.rank, whole.size, whole.local_rank, whole.neighbours) == (5, 8, 1, range(4, 7))


def test_nobody_is_taken_for_a_neighbour_who_is_not_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not world(monkeypatch, **OF_THE_WORLD, LOCAL_WORLD_SIZE="3").neighbours
    assert not world(monkeypatch, **OF_THE_WORLD, LOCAL_RANK="1").neighbours
    assert not world(monkeypatch, **OF_THE_WORLD).neighbours


def test_without_a_launcher_it_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world(monkeypatch) == World(0, 1)


def test_half_of_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="RANK is set but WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"):
        world(monkeypatch, RANK="1")
