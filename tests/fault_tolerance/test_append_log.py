"""Lines at the end of a file: none is lost when there is room again, none is mixed with one that was cut short."""

import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bagualu.fault_tolerance.append_log import AppendLog
from bagualu.fault_tolerance.injection.kinds import Kill
from bagualu.fault_tolerance.injection.record import Record


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes: the kernel writes what fits and refuses the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("shared", [False, True])
def test_lines_wait_for_room_and_come_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture, shared: bool) -> None:
    path = tmp_path / "folder" / "file"
    lines = AppendLog(path, shared)
    assert lines.add("one")
    with caplog.at_level(logging.WARNING), room_for(7):
        assert not lines.add("two")
        assert path.read_bytes() == (b"one\ntwo" if shared else b"one\n")
        assert not lines.add("three")
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} cannot be written (File too large); its lines are kept in memory, make room"
    ]
    assert lines.add("four")
    lines.close()
    assert path.read_text() == ("one\ntwo\ntwo\nthree\nfour\n" if shared else "one\ntwo\nthree\nfour\n")


def test_a_line_after_one_that_somebody_was_killed_at_stands_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("cut sho")
    AppendLog(tmp_path / "file").add("whole")
    assert (tmp_path / "file").read_text() == "cut sho\nwhole\n"


def test_a_torn_line_of_a_strike_fails_no_start(tmp_path: Path) -> None:
    record, first, second = Record(tmp_path / "faults.jsonl"), Kill(step=3), Kill(step=5, rank=1)
    assert record.add(first, 3)
    with record.path.open("a") as file:
        file.write('{"fault": "kill@st')
    assert record.add(second, 5)
    assert record.add(second, 5, "this")
    assert [(one["fault"], one.get("did")) for one in record.strikes()] == [(str(first), None), (str(second), "this")]
    assert record.struck() == {str(first): 1, str(second): 1}


def test_what_cannot_be_recorded_is_said_to_be_so_and_not_recorded_later(tmp_path: Path) -> None:
    record = Record(tmp_path / "faults.jsonl")
    with room_for(0):
        assert not record.add(Kill(step=3), 3)
    assert record.add(Kill(step=4), 4)
    assert list(record.struck()) == [str(Kill(step=4))]


@pytest.mark.parametrize(
    "damage", [b"\n", b"[1]\n", b'{"fault": 3}\n', b'"did"\n', b"\0\0\0", b"\xff\n", b'{"fault": "kill", "step": 1}\n']
)
def test_damage_to_the_strikes_hides_no_other_strike(tmp_path: Path, damage: bytes) -> None:
    record, first, second = Record(tmp_path / "faults.jsonl"), Kill(step=3), Kill(step=5, rank=1)
    record.add(first, 3)
    with record.path.open("ab") as file:
        file.write(damage)
    record.add(second, 5)
    assert record.struck() == {str(first): 1, str(second): 1}
