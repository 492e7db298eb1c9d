"""Every guard is needed: with one of them taken out, a check that is [] otherwise finds something."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
from checks import damage, power_loss, zombie
from ranks import rows_of, run

from bagualu.comm.group import Group
from bagualu.fault_tolerance.checkpoint.layout import blocks, durable, format
from bagualu.fault_tolerance.checkpoint.layout.shard import write_shard
from bagualu.fault_tolerance.checkpoint.saving import save
from bagualu.fault_tolerance.checkpoint.saving.fence import Fence


@pytest.mark.parametrize("check", [power_loss, zombie, damage])
def test_nothing_is_lost_or_mixed(tmp_path, monkeypatch, check):
    assert check(tmp_path, monkeypatch) == []


def without_fsync(patch, folder):
    class Careless:
        def __getattr__(self, name: str) -> Any:
            return (lambda descriptor: None) if name == "fsync" else getattr(os, name)

    patch.setattr(durable, "os", Careless())


def without_hash(patch, folder):
    class Constant:
        def update(self, data: Any) -> None: ...
        def reset(self) -> None: ...
        def hexdigest(self) -> str:
            return "0" * 32

    patch.setattr(blocks, "xxhash", SimpleNamespace(xxh3_128=Constant))
    for module in (blocks, format):
        patch.setattr(module, "digest", lambda data: "0" * 32)


def without_barrier(patch, folder):
    """Rank 0 commits when its own part is durable, with what it knows the others will report."""
    (folder / "known").mkdir()

    def reports_of(step: int) -> list[Any]:
        def report(group: Group) -> Any:
            return {"done": write_shard(folder / "known" / f"rank-{group.rank:05d}.safetensors", rows_of(step, group))}

        reports = run(2, report)
        for file in (folder / "known").iterdir():
            file.unlink()
        return reports

    known = [reports_of(10), reports_of(20)]
    patch.setattr(save.Saver, "status", lambda saver: (0.0, 0.0))
    patch.setattr(save, "collect_json", lambda value, group: known.pop(0) if group.rank == 0 else None)


def without_fence(patch, folder):
    patch.setattr(Fence, "check", lambda self: None)


def without_setting_aside(patch, folder):
    """The other half of the fence: a new start leaves the saves under way where they are."""
    patch.setattr("bagualu.fault_tolerance.checkpoint.saving.fence.clear_stale", lambda root: None)


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (without_fsync, power_loss),
        (without_barrier, power_loss),
        (without_hash, damage),
        (without_fence, zombie),
        (without_setting_aside, zombie),
    ],
)
def test_a_mutant_is_found(tmp_path, monkeypatch, mutant, check):
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch, tmp_path)
        assert check(tmp_path, monkeypatch) != []
