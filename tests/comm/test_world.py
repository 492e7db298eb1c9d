"""Who a process is, as launchers say it in its environment."""

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.comm.world import Tasks, World

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


SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3"}


@pytest.fixture
def _nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*COMPLETE, *SRUN, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_SIZE", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_nobody")
@pytest.mark.parametrize(
    ("variables", "tasks", "command"),
    [
        (SRUN, Tasks("srun", 8, 2, 3), "srun --ntasks-per-node=1 torchrun --nproc-per-node=4 --nnodes=2 "),
        (SRUN, Tasks("srun", 8, 2, 3), "bagualu slurm launch.nodes=2 launch.workers=4 "),
        ({"SLURM_STEP_NUM_TASKS": "2"}, Tasks("srun", 2, 1, 0), "torchrun --nproc-per-node=2 -m bagualu.trainer"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, Tasks("mpirun", 2, 1, 1), "give torchrun --nproc-per-node=2 "),
        ({"PMI_SIZE": "2"}, Tasks("mpirun", 2, 1, 0), "give torchrun --nproc-per-node=2 "),
    ],
)
def test_processes_of_srun_without_torchrun_are_seen(monkeypatch, variables, tasks, command) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Tasks.from_environment() == tasks
    assert command in tasks.refusal()


@pytest.mark.usefixtures("_nobody")
@pytest.mark.parametrize("variables", [{}, {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "8"}, SRUN | COMPLETE])
def test_a_process_with_a_rank_or_by_itself_is_none_of_them(monkeypatch, variables) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Tasks.from_environment() is None
