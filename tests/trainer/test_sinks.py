import json
import math

from bagualu.trainer.sinks import JsonlSink


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
