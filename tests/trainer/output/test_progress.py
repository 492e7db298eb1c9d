import io

import pytest

from bagualu.trainer.optim.config import OptimConfig
from bagualu.trainer.output.progress import Progress, duration, next_commands, summary_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(step: int, **more: float) -> dict[str, float]:
    known = {"step": step, "loss": 6.0 - step / 10, "tokens_per_second": 5812.3, "mfu": 0.1234, "step_seconds": 2.0}
    return known | more


def show(progress: Progress, steps: int) -> None:
    for step in range(1, steps + 1):
        progress.write(record(step, validation_loss=3.0, validation_bits_per_byte=2.5) if step == 13 else record(step))
    progress.close()


def test_without_a_terminal_there_is_a_line_every_so_often():
    stream = io.StringIO()
    show(Progress(25, every=10, stream=stream), 25)
    assert stream.getvalue().splitlines() == [
        "step  1/25  loss 5.900  5,812 tok/s  MFU 12.3%  0:48 left",
        "step 10/25  loss 5.000  5,812 tok/s  MFU 12.3%  0:30 left",
        "step 13/25  loss 4.700  val 2.500 bits/B  5,812 tok/s  MFU 12.3%  0:24 left",
        "step 20/25  loss 4.000  5,812 tok/s  MFU 12.3%  0:10 left",
        "step 25/25  loss 3.500  5,812 tok/s  MFU 12.3%  0:00 left",
    ]


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    show(Progress(25, every=10, stream=stream), 25)
    last = stream.getvalue().split("\x1b[2K")[-1]
    assert "25/25" in last
    assert "loss 3.500  val 2.500 bits/B  5,812 tok/s  MFU 12.3%  0:00 left" in last


def test_off_is_silent_and_the_mode_can_be_forced():
    stream = Terminal()
    show(Progress(25, mode="off", stream=stream), 25)
    assert stream.getvalue() == ""
    show(Progress(25, mode="lines", stream=stream), 25)
    assert stream.getvalue().startswith("step  1/25  loss")


def test_the_time_of_a_step_on_a_described_cluster_is_shown():
    stream = io.StringIO()
    Progress(5, every=1, stream=stream).write(record(1, virtual_step_seconds=0.012345))
    assert "  virtual 0.0123 s  " in stream.getvalue()


def test_figures_that_are_not_known_are_left_out():
    stream = io.StringIO()
    Progress(5, every=1, stream=stream).write({"step": 1, "loss": 2.0})
    assert stream.getvalue() == "step 1/5  loss 2.000\n"


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0:00"), (59.6, "1:00"), (3599, "59:59"), (36000, "10:00:00")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_the_summary_says_how_it_went_and_what_to_type():
    text = summary_text(
        {"ended": "done", "step": 30, "steps": 30, "seconds": 183, "loss": 3.21, "validation_bits_per_byte": 2.1,
         "tokens_per_second": 5812.0, "mfu": 0.12, "run_dir": "runs/tiny", "mystery": 1},
        next_commands("runs/tiny", OptimConfig(schedule="constant"), 30, 30),
    )  # fmt: skip
    assert text.splitlines() == [
        "done: step 30/30 in 3:03",
        "────────────────────────",
        "loss        3.2100",
        "validation  2.100 bits/byte",
        "speed       5,812 tokens/s",
        "MFU         12.0% of this machine's matmul ceiling",
        "run         runs/tiny",
        "",
        "next",
        "it says     bagualu generate runs/tiny --prompt The --temperature 0.8",
        "train on    bagualu train run.dir=runs/tiny checkpoint.resume=true train.steps=60",
        "larger      bagualu train recipe=bench_dense data.source=stdlib train.steps=1000",
    ]


def test_a_run_that_was_stopped_is_told_to_go_on():
    assert next_commands("runs/a, b", OptimConfig(), 10, 30, False, ".venv/bin/bagualu") == [
        ("go on", ".venv/bin/bagualu train 'run.dir=\"runs/a, b\"' checkpoint.resume=true"),
        ("it says", ".venv/bin/bagualu generate 'runs/a, b' --tokens 1,2,3"),
    ]
