"""Shows a run to people: a progress bar or lines while it runs, and at its end a summary with the commands to type next."""

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, repeat
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from bagualu.fault_tolerance.ledger.totals import CATEGORIES
from bagualu.trainer.optim.config import OptimConfig
from bagualu.trainer.optim.schedule import learning_rate, same_curve
from bagualu.trainer.output.metric_writers import Record
from bagualu.trainer.recipe.override_text import typed
from bagualu.trainer.show_memory import show_measurement

_SMOOTHING = 0.1
"""Weight of the newest step in the exponential mean of step times, from which the remaining time is estimated."""

_LEAST_RATE = 0.02
"""A fraction of optim.lr: `_further` does not propose to go on with a constant learning rate that is lower than this."""


class Progress:
    """A sink that shows the progress of the run: a bar on a terminal, lines elsewhere. It writes to stderr by default."""

    def __init__(self, steps: int, every: int = 10, mode: str = "auto", stream: TextIO | None = None) -> None:
        """`steps`: number of steps of the whole run. `every`: steps between lines. `mode`: auto (a bar if `stream` is a terminal,
        else lines) | bar | lines | off."""
        self._stream = sys.stderr if stream is None else stream
        self._steps, self._every = steps, every
        self._mode = ("bar" if self._stream.isatty() else "lines") if mode == "auto" else mode
        self._step_seconds: float | None = None
        self._shown_validation = ""
        if self._mode == "bar":
            self._bar = RichProgress(
                BarColumn(bar_width=8),  # with all the figures below it fits 80 columns
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                console=Console(file=self._stream, force_terminal=True, highlight=False),
            )
            self._task = self._bar.add_task("train", total=steps, figures="starting")
            self._bar.start()

    def write(self, record: Record) -> None:
        step, seconds = int(record["step"]), record.get("step_seconds")
        if seconds is not None:
            before = self._step_seconds
            self._step_seconds = seconds if before is None else before + _SMOOTHING * (seconds - before)
        if self._mode == "bar":
            figures = "  ".join(self._figures(record, step))
            self._bar.update(self._task, completed=step, figures=figures)
        elif self._mode == "lines" and (step % self._every == 0 or step in (1, self._steps) or "validation_loss" in record):
            width = len(str(self._steps))
            print(f"step {step:>{width}}/{self._steps}", *self._figures(record, step), sep="  ", file=self._stream,
                  flush=True)  # fmt: skip

    def rewind(self, step: int) -> None:
        if self._mode == "bar":
            self._bar.update(self._task, completed=step)

    def close(self) -> None:
        if self._mode == "bar":
            self._bar.stop()

    def _figures(self, record: Record, step: int) -> Iterable[str]:
        yield f"loss {record['loss']:.3f}" + (f" ({record['cause']})" if "cause" in record else "")
        if (bits := record.get("validation_bits_per_byte")) is not None:
            self._shown_validation = f"val {bits:.3f} bits/B"
        elif (loss := record.get("validation_loss")) is not None:
            self._shown_validation = f"val {loss:.3f}"
        elif self._mode != "bar":  # a bar keeps showing the latest value, a line shows only new values
            self._shown_validation = ""
        if self._shown_validation:
            yield self._shown_validation
        if (rate := record.get("tokens_per_second")) is not None:
            yield f"{rate:,.0f} tok/s"
        if (mfu := record.get("mfu")) is not None:
            yield f"MFU {mfu:.1%}"
        if (virtual := record.get("virtual_step_seconds")) is not None:
            yield f"virtual {virtual:.3g} s"
        if self._step_seconds is not None:
            yield f"{duration(self._step_seconds * (self._steps - step))} left"


def duration(seconds: float) -> str:
    """Formats seconds as m:ss, or as h:mm:ss from an hour on."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


_ROWS = (
    ("loss", "loss", "{:.4f}"),
    ("validation_loss", "validation loss", "{:.4f}"),
    ("validation_bits_per_byte", "validation", "{:.3f} bits/byte"),
    ("tokens_per_second", "speed", "{:,.0f} tokens/s"),
    ("mfu", "MFU", "{:.1%} of this machine's matmul ceiling"),
    ("tokens", "tokens", "{:,}"),
    ("effective_training_time_ratio", "productive", "{:.1%} of the wall time"),
    ("run_dir", "run", "{}"),
    ("checkpoint", "checkpoint", "{}"),
)


def summary_text(summary: Mapping[str, Any], next_commands: Sequence[tuple[str, str]] = ()) -> str:
    """Returns the closing summary as text, without the values that `summary` lacks.

    Reads `ended` (done | stopped | ...), `step`, `steps`, `seconds`, `loss`, `validation_loss`, `validation_bits_per_byte`,
    `tokens_per_second`, `mfu`, `tokens`, `memory`, `left_out_steps` (a count), `effective_training_time_ratio`, `ledger`,
    `run_dir`, `checkpoint`.
    `next_commands`: (purpose, command) pairs, shown at the end.
    """
    head = f"{summary.get('ended', 'done')}: step {summary['step']}/{summary['steps']}"
    if summary.get("seconds") is not None:
        head += f" in {duration(summary['seconds'])}"
    rows = [(name, form.format(summary[key])) for key, name, form in _ROWS if summary.get(key) is not None]
    if memory := summary.get("memory"):
        rows += zip(chain(["memory"], repeat("")), show_measurement(memory), strict=False)
    if left_out := summary.get("left_out_steps"):
        rows.append(("left out", f"the samples of {left_out} of {summary['step']} steps (guard.* and metrics.jsonl say why)"))
    rows += [("other time", spent)] if (spent := _spent(summary.get("ledger", {}))) else []
    width = max((len(name) for name, _ in [*rows, *next_commands]), default=0)
    lines = [head, "─" * len(head), *(f"{name:<{width}}  {value}" for name, value in rows)]
    if next_commands:
        lines += ["", "next", *(f"{name:<{width}}  {command}" for name, command in next_commands)]
    return "\n".join(lines)


def _spent(ledger: Mapping[str, float]) -> str:
    """Describes where unproductive time went, largest part first, without parts below a thousandth of the wall time; "" if there
    are none."""
    least = ledger.get("wall", 0.0) / 1000
    others = [name for name in CATEGORIES if name != "productive" and ledger.get(name, 0.0) > least]
    return ", ".join(f"{name} {ledger[name] / ledger['wall']:.1%}" for name in sorted(others, key=lambda name: -ledger[name]))


def next_commands(
    run_dir: str, optim: OptimConfig, step: int, steps: int, text: bool = True, program: str = "bagualu"
) -> list[tuple[str, str]]:
    """Returns (purpose, command) pairs to type, with `program` for bagualu, after a start of the run in `run_dir` that has done
    `step` of `steps` steps with the schedule of `optim`. The other keys of the run stand in its config.yaml. `text`: whether its
    tokens stand for text."""
    resume = ["train", f"run.dir={typed(run_dir)}", "checkpoint.resume=true"]
    prompt = ["--prompt", "The", "--temperature", "0.8"] if text else ["--tokens", "1,2,3"]
    says = ("it says", shlex.join([program, "generate", run_dir, *prompt]))
    if step < steps:
        return [("go on", shlex.join([program, *resume])), says]
    kind, changes = _further(optim, steps)
    larger = ["train", "recipe=bench_dense", "data.source=stdlib", "train.steps=1000"]
    return [
        says,
        (kind, shlex.join([program, *resume, *(f"{key}={value}" for key, value in changes.items())])),
        ("larger", shlex.join([program, *larger])),
    ]


def _further(optim: OptimConfig, steps: int) -> tuple[str, dict[str, str]]:
    """Returns how a run that has done its `steps` steps can train for as many again: the purpose, and the keys to change. The
    learning rate does not jump, unless the schedule has ended near 0; then the purpose names the jump."""
    rate, more = learning_rate(optim, steps - 1, steps), {"train.steps": str(2 * steps)}
    if same_curve(optim, steps - 1, 2 * steps, rate):
        return "train on", more
    if rate < optim.lr * _LEAST_RATE:
        return f"train on, rate x {learning_rate(optim, steps, 2 * steps) / rate:.0f}", more
    changes = {**more, "optim.schedule": "wsd", "optim.lr": f"{rate:g}"}
    decay = OptimConfig(decay_fraction=optim.decay_fraction).decay_steps(2 * steps)
    if decay > steps or optim.warmup_steps + decay > 2 * steps:
        changes["optim.decay_fraction"] = str(OptimConfig.decay_fraction)
    return "train on, rate kept", changes
