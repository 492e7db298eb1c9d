import json
import math
import os

import pytest

from bagualu.trainer.output.metric_writers import JsonlSink
from tests.fault_tolerance.test_append_log import room_for


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    sink = JsonlSink(tmp_path / "run" / "metrics.jsonl")
    for step in (1, 2):
        sink.write({"step": step, "loss": 1.5, "mfu": 0.25})
        assert steps(tmp_path / "run" / "metrics.jsonl") == list(range(1, step + 1))
    sink.close()
    first = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first) == {"step": 1, "loss": 1.5, "mfu": 0.25}


def test_after_a_resume_every_step_is_there_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonlSink(path)
    for step in range(1, 8):
        first.write({"step": step, "loss": 1.0})
    first.close()
    with open(path, "a") as stream:
        stream.write('{"step": 8, "lo')  # killed in the middle of a line
    second = JsonlSink(path, after_step=5)
    for step in range(6, 11):
        second.write({"step": step, "loss": 2.0})
    second.close()
    assert steps(path) == list(range(1, 11))
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.0] * 5 + [2.0] * 5
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_run_starts_with_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    JsonlSink(path).close()
    assert path.read_text() == ""


def test_what_is_not_finite_is_null(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    sink.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "grad_norm": null}\n'


def record(step: int, loss: float = 1.0) -> bytes:
    return json.dumps({"step": step, "loss": loss}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        b"\n",
        b"\n\n  \n",
        b'{"step": 3, "lo\n',
        b"garbage\n",
        b"\xff\xfe\n",
        b"[3]\n",
        b"3\n",
        b"null\n",
        b'{"loss": 1.0}\n',
        b'{"step": "3"}\n',
        b'{"step": NaN}\n',
        b'{"step": true}\n',
        b"\0" * 512,
        b"\0" * 512 + b"\n",
        b'{"step": 3, "l\0\0\0',
        b"[" * 100_000 + b"\n",
        b"\r\n",
    ],
)
@pytest.mark.parametrize("place", [0, 2, 6])
def test_a_damaged_line_costs_no_whole_line(tmp_path, damage, place):
    path = tmp_path / "metrics.jsonl"
    whole = [record(step) + b"\n" for step in range(1, 7)]
    path.write_bytes(b"".join(whole[:place]) + damage + b"".join(whole[place:]))
    sink = JsonlSink(path, after_step=5)
    sink.write({"step": 6, "loss": 2.0})
    sink.close()
    assert path.read_bytes() == b"".join(whole[:5]) + record(6, 2.0) + b"\n"
    assert list(tmp_path.iterdir()) == [path]


def test_lines_out_of_order_and_twice_are_kept_once_by_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([record(9), record(2, 7.0), record(1), record(4), record(2, 8.0), record(8), record(3)]))
    sink = JsonlSink(path, after_step=4)
    sink.write({"step": 5, "loss": 1.0})
    sink.close()
    assert steps(path) == [1, 2, 3, 4, 5]
    assert json.loads(path.read_text().splitlines()[1])["loss"] == 8.0, "the newer of two lines of a step counts"


def test_a_last_line_without_an_end_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(record(1) + b"\n" + record(2))
    sink = JsonlSink(path, after_step=2)
    sink.write({"step": 3, "loss": 1.0})
    assert steps(path) == [1, 2, 3]


def test_damage_on_a_full_disk_loses_no_whole_line(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(record(1) + b"\n\n" + record(2) + b"\n" + record(9) + b"\n")
    with room_for(0):
        sink = JsonlSink(path, after_step=2)
    assert "make room" in caplog.text
    assert list(tmp_path.iterdir()) == [path]
    sink.write({"step": 3, "loss": 1.0})
    sink.close()
    assert {1, 2, 3} <= {json.loads(line)["step"] for line in path.read_text().splitlines() if line}
    JsonlSink(path, after_step=3).close()
    assert steps(path) == [1, 2, 3]


def test_a_kill_while_damage_is_removed_loses_no_whole_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    before = b"garbage\n" + b"".join(record(step) + b"\n" for step in range(1, 4))
    path.write_bytes(before)

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    for moment in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, moment, killed)
            with pytest.raises(Killed):
                JsonlSink(path, after_step=3)
        assert path.read_bytes() == before
    JsonlSink(path, after_step=3).close()
    assert steps(path) == [1, 2, 3]
