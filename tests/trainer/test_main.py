"""`python -m bagualu.trainer` started as several processes that have no ranks."""

import pytest

from bagualu.trainer.__main__ import main


@pytest.mark.parametrize(("index", "said"), [("0", 1), ("1", 0)])
def test_processes_of_srun_are_refused_with_the_command_to_use_and_one_says_it(monkeypatch, capsys, tmp_path, index, said):
    monkeypatch.delenv("RANK", raising=False)
    for name, value in (("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_STEP_NUM_NODES", "1"), ("SLURM_PROCID", index)):
        monkeypatch.setenv(name, value)
    assert main(["recipe=tiny", "parallel.data=2", f"run.dir={tmp_path}/run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == said
    assert error.count("srun --ntasks-per-node=1 torchrun --nproc-per-node=2 -m bagualu.trainer") == said
    assert list(tmp_path.iterdir()) == []
