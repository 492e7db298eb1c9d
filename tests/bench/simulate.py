"""What `bagualu simulate` takes on this machine: seconds and memory, and how they grow with the number of ranks.

    python tests/bench/simulate.py                          # the two largest runs, and 16,384 ranks
    python tests/bench/simulate.py growth --figure FILE.svg # 8 to 131,072 ranks of one recipe, with as many sequences for each

Each prediction is a process of its own, from the start of Python to the printed document, on at most `--cores` cores. `--json FILE`
writes machine, versions and every sample.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contest.environment import machine, versions
from contest.report import table_of

LARGE = {
    "llama3_405b on 16,384 H100": ["recipe=llama3_405b", "cluster=h100", "world=16384"],
    "llama3_405b on 131,072 H100": ["recipe=llama3_405b", "cluster=h100", "world=131072"],
    "bagualu_174t on 96,000 SW26010-Pro": ["recipe=bagualu_174t", "cluster=sw26010pro", "world=96000"],
}
"""The words of each prediction, by title."""
WORLDS = [2**power for power in range(3, 18)]
SEQUENCES = 64
"""Sequences of a step for each data rank in `growth`."""


def growing(world: int) -> list[str]:
    """Returns the words of a prediction of Llama 3 8B, tensor 8, on `world` ranks."""
    return ["recipe=llama3_8b", "cluster=h100", f"world={world}", f"data.global_batch={world // 8 * SEQUENCES}"]


def measure(words: Sequence[str], cores: int) -> dict[str, Any]:
    """Returns the seconds of a prediction, the most memory that it takes, and what it predicts."""
    command = [sys.executable, "-m", "bagualu.launch.cli", "simulate", *words, "--json"]
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    before = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=lambda: os.sched_setaffinity(0, allowed))
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - before
    document = json.loads(output)
    if os.waitstatus_to_exitcode(status) not in (0, 2) or "step_seconds" not in document:  # 2: the model does not fit
        raise SystemExit(f"{' '.join(words)}: {document.get('error', output.decode())}")
    return {"words": list(words), "seconds": seconds, "cpu_seconds": _processor(used), "peak_memory_bytes": used.ru_maxrss * 1024,
            "step_seconds": document["step_seconds"], "mfu": document["mfu"], "fits": document["fits"]}  # fmt: skip


def _processor(used: resource.struct_rusage) -> float:
    return used.ru_utime + used.ru_stime


def best(words: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Returns the quickest of several runs, with the seconds of all of them."""
    samples = [measure(words, options.cores) for _ in range(options.rounds)]
    return min(samples, key=lambda sample: sample["seconds"]) | {"samples": [sample["seconds"] for sample in samples]}


def row(title: str, sample: dict[str, Any]) -> dict[str, Any]:
    return {"prediction": title, "seconds": f"{sample['seconds']:.1f}", "cpu seconds": f"{sample['cpu_seconds']:.1f}",
            "memory MB": f"{sample['peak_memory_bytes'] / 1e6:.0f}", "predicted step s": f"{sample['step_seconds']:.3f}",
            "MFU": f"{sample['mfu']:.3f}", "fits": sample["fits"]}  # fmt: skip


def draw(samples: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws seconds and memory over the number of ranks."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    worlds = [int(sample["words"][2].partition("=")[2]) for sample in samples]
    figure = Figure(figsize=(6.4, 3.4), dpi=130)
    axes = figure.add_subplot()
    axes.plot(worlds, [sample["seconds"] for sample in samples], "o-", color="#2f6db3", label="seconds")
    axes.set_xscale("log", base=2)
    axes.set_xticks(worlds[::2], [f"{world:,}" for world in worlds[::2]], fontsize=8)
    axes.set_xlabel("ranks")
    axes.set_ylabel("seconds")
    memory = axes.twinx()
    memory.plot(worlds, [sample["peak_memory_bytes"] / 1e6 for sample in samples], "s--", color="#e08a2c", label="MB of memory")
    memory.set_ylabel("MB")
    for scale in (axes, memory):
        scale.set_ylim(0, 1.15 * scale.get_ylim()[1])
    figure.legend(loc="upper left", bbox_to_anchor=(0.12, 0.45), fontsize=8)
    figure.tight_layout()
    with rc_context({"svg.hashsalt": "bagualu"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="large", choices=("large", "growth"))
    parser.add_argument("--rounds", type=int, default=1, help="runs of each prediction; the quickest counts (default 1)")
    parser.add_argument("--cores", type=int, default=2, help="cores that a prediction may use (default 2)")
    parser.add_argument("--figure", type=Path, help="growth: draw it here (.svg or .png)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and every sample here")
    options = parser.parse_args(argv)
    cases = LARGE if options.command == "large" else {f"llama3_8b on {world:,} H100": growing(world) for world in WORLDS}
    samples = {title: best(words, options) for title, words in cases.items()}
    print(table_of([row(title, sample) for title, sample in samples.items()]))
    if options.figure is not None:
        draw(list(samples.values()), options.figure)
    if options.json is not None:
        document = {"command": list(argv), "machine": machine(), "versions": versions(), "samples": samples}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
