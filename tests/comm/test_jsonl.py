"""Whole objects of a damaged file are all read, and nothing else is."""

import json
from pathlib import Path

import pytest

from bagualu.comm import jsonl

DAMAGE = [b"", b"   ", b'{"a": 1', b"garbage", b"\xff", b"[1]", b"null", b"\0" * 100, b'{"a": \0\0', b"[" * 100_000, b'{"a": 1}}']


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_damage_hides_nothing_else(tmp_path: Path, damage: bytes, end: bytes) -> None:
    path = tmp_path / "file.jsonl"
    path.write_bytes(b"\n".join([b'{"n": 1}', damage, b'{"n": 2}', damage, damage, b'{"n": 3}']) + end)
    assert jsonl.read(path) == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_zero_bytes_of_a_power_cut_separate_lines(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b'{"n": 1}\n\0\0\0\0{"n": 2}\0\0\n{"n": 3}\0\0\0')
    assert jsonl.read(tmp_path / "file") == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_no_file_is_no_object(tmp_path: Path) -> None:
    assert jsonl.read(tmp_path / "file") == []


def test_numbers_that_are_not_finite_are_written_as_null() -> None:
    value = {"loss": float("nan"), "deep": [{"norm": float("inf")}, (1, -float("inf"), "NaN")], "step": 3}
    assert json.loads(jsonl.dumps(value)) == {"loss": None, "deep": [{"norm": None}, [1, None, "NaN"]], "step": 3}
