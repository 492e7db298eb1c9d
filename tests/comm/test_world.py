"""Who a process is, as launchers say it in its environment."""

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.comm.world import World

COMPLETE = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "here", "MASTER_PORT": "1", "LOCAL_RANK": "1"}


def world(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> World:
    for name in (*COMPLETE, "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return World.from_environment()


def test_launchers_say_who_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world(monkeypatch, COMPLETE) == World(5, 8, 1, "env://")


def test_rank_0_holds_the_store_where_no_agent_does(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {**COMPLETE, "RANK": "0", "MASTER_PORT": "29500"}
    assert world(monkeypatch, first).serves == ("here", 29500)
    assert world(monkeypatch, {**first, "TORCHELASTIC_USE_AGENT_STORE": "True"}).serves is None


def test_launchers_say_whether_all_are_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world(monkeypatch, {**COMPLETE, "LOCAL_WORLD_SIZE": "8"}).one_machine
    assert not world(monkeypatch, {**COMPLETE, "LOCAL_WORLD_SIZE": "4"}).one_machine


def test_without_a_launcher_it_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world(monkeypatch, {}) == World(0, 1)


def test_half_of_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="RANK is set but WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"):
        world(monkeypatch, {"RANK": "1"})
