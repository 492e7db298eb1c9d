"""Tokens/s of every engine and ZeRO stage against the same library used directly, and of the native engine against both libraries.

    python tests/bench/engines.py --rounds 10 --json out.json

Two data ranks; contestants take turns as in throughput.py. A ratio is the median of the rounds' ratios, with the least and the
largest. The libraries have Bagualu's precision: gradients added and sent in float32. `--precision bf16` has DDP and DeepSpeed do
that in bfloat16, their default, so that they send half as much. DeepSpeed must be installed.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import throughput
from contest.entry import ENGINE_STAGES, PRECISIONS, parse

DIRECT = {"native0": "ddp", "native1": "ddp", "fsdp3": "fsdp", "deepspeed1": "deepspeed", "deepspeed2": "deepspeed2",
          "deepspeed3": "deepspeed3"}  # fmt: skip
"""What a library does by itself, by the engine and stage that stands on it or, for DDP, does the same."""
SAME_STAGE = {"native1": ("deepspeed",), "native2": ("deepspeed2",), "native3": ("deepspeed3", "fsdp")}
"""The loops of other libraries that native stages are compared with."""
Pair = tuple[str, str]
"""Names of contestants: ours, and the one that it is divided by."""


def pairs(precision: str) -> list[Pair]:
    compared = [(ours, theirs) for ours, theirs in DIRECT.items() if ours in ENGINE_STAGES]
    compared += [(ours, theirs) for ours, several in SAME_STAGE.items() for theirs in several]
    sums = {"fsdp": precision.removesuffix("sum32")}  # which has no others
    return [(f"bagualu-{ours}", f"{theirs}-{sums.get(theirs, precision)}") for ours, theirs in compared]


def ratios(compared: list[Pair], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens/s of ours over theirs by round, for the pairs of which both were measured."""
    measured = {row["contestant"]: [statistics.median(sample["step_seconds"]) for sample in row["samples"]] for row in rows}
    table = []
    for pair in compared:
        ours, theirs = (measured.get(parse(name, throughput.cores()).name) for name in pair)
        if ours is None or theirs is None:
            print(f"{pair[0]} / {pair[1]}: not both were measured", file=sys.stderr)
            continue
        by_round = [slow / fast for fast, slow in zip(ours, theirs, strict=True)]
        figures = {"median": statistics.median(by_round), "min": min(by_round), "max": max(by_round)}
        table.append({"ours": pair[0], "theirs": pair[1], **figures, "rounds": by_round})
    return table


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="Other options are those of throughput.py, without --contestants.")  # fmt: skip
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16sum32", help="of the libraries (default bf16sum32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions, every sample and ratio here")
    options, others = parser.parse_known_args(argv)
    compared = pairs(options.precision)
    names = list(dict.fromkeys(name for pair in compared for name in pair))
    document = throughput.measure([*others, "--contestants", *names])
    document["ratios"] = {recipe: ratios(compared, rows) for recipe, rows in document["recipes"].items()}
    for recipe, table in document["ratios"].items():
        for row in table:
            print(f"{recipe} {row['ours']:19} / {row['theirs']:20} {row['median']:.2f} ({row['min']:.2f} to {row['max']:.2f})")
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if document["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
