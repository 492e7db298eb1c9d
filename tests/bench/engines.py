"""Tokens/s of every engine and ZeRO stage against the same library used directly, and of the native engine against both libraries.

    python tests/bench/engines.py --rounds 10 --json out.json

Two data ranks; contestants take turns as in throughput.py. A ratio is the median of the rounds' ratios, with the least and the
largest. The libraries have Bagualu's precision: gradients added and sent in float32. `--precision bf16` has DDP and DeepSpeed do
that in bfloat16, their default, so that they send half as much. DeepSpeed must be installed.
"""

import statistics
import sys
from typing import Any

import throughput
from contest.entry import ENGINE_STAGES, parse

DIRECT = {"native0": "ddp", "native1": "ddp", "fsdp3": "fsdp", "deepspeed1": "deepspeed", "deepspeed2": "deepspeed2",
          "deepspeed3": "deepspeed3"}  # fmt: skip
"""What a library does by itself, by the engine and stage that stands on it or, for DDP, does the same."""
SAME_STAGE = {"native1": ("deepspeed",), "native2": ("deepspeed2",), "native3": ("deepspeed3", "fsdp")}
"""The loops of other libraries that native stages are compared with."""


def pairs(precision: str) -> list[tuple[str, str]]:
    """Names of contestants: ours, and the one that it is divided by."""
    compared = [(ours, theirs) for ours, theirs in DIRECT.items() if ours in ENGINE_STAGES]
    compared += [(ours, theirs) for ours, several in SAME_STAGE.items() for theirs in several]
    sums = {"fsdp": precision.removesuffix("sum32")}  # which has no others
    return [(f"bagualu-{ours}", f"{theirs}-{sums.get(theirs, precision)}") for ours, theirs in compared]


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> list[float]:
    """Tokens/s of ours over theirs, by round."""
    seconds = [[statistics.median(sample["step_seconds"]) for sample in row["samples"]] for row in (ours, theirs)]
    return [slow / fast for fast, slow in zip(*seconds, strict=True)]


def main(argv: list[str]) -> int:
    precision = next((argv[index + 1] for index, word in enumerate(argv) if word == "--precision"), "bf16sum32")
    rest = [word for index, word in enumerate(argv) if "--precision" not in argv[max(0, index - 1) : index + 1]]
    compared = pairs(precision)
    names = list(dict.fromkeys(name for pair in compared for name in pair))
    document = throughput.measure([*rest, "--contestants", *names])
    rows = {row["contestant"]: row for row in document["recipes"].get("bench_dense", [])}
    for pair in compared:
        ours, theirs = (rows.get(parse(name, throughput.cores()).name) for name in pair)
        if ours and theirs:
            by_round = ratios(ours, theirs)
            print(f"{pair[0]:20} / {pair[1]:18} {statistics.median(by_round):.2f} ({min(by_round):.2f} to {max(by_round):.2f})")
    return 1 if document["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
