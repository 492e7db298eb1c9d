"""Writes tables of efficiencies into the text of a cluster file, and leaves everything else in it as it is."""

import re
from collections.abc import Mapping, Sequence

from bagualu.comm.topology import ShapeEfficiency

Tables = Mapping[str, Sequence[ShapeEfficiency]]


def with_tables(text: str, tables: Tables, source: str) -> str:
    """Returns the text of a cluster file with `tables`, by dtype, as `chip.efficiency`; `source` joins the list at its top."""
    lines = _without_tables(text.splitlines())
    number = _number(lines, source)
    first = lines.index("chip:")
    if not any(line.startswith(f"# [{number}] ") for line in lines):
        lines.insert(first, f"# [{number}] {source}")
        first += 1
    end = next((index for index in range(first + 1, len(lines)) if not lines[index].startswith(" ")), len(lines))
    block = [f"  efficiency: # [{number}]"]
    for dtype, entries in tables.items():
        block.append(f"    {dtype}: # [{number}]")
        block += [f"      - {{m: {one.m}, n: {one.n}, k: {one.k}, fraction: {one.fraction:.3f}}}" for one in entries]
    return "\n".join([*lines[:end], *block, *lines[end:]]) + "\n"


def _without_tables(lines: list[str]) -> list[str]:
    """Returns the lines without `chip.efficiency`."""
    kept, inside = [], False
    for line in lines:
        inside = line.startswith("  efficiency:") or (inside and line.startswith("    "))
        if not inside:
            kept.append(line)
    return kept


def _number(lines: Sequence[str], source: str) -> int:
    """Returns the number of `source` in the list at the top of the file, or the next that is free."""
    numbers = [int(found.group(1)) for line in lines if (found := re.match(r"# \[(\d+)\] ", line))]
    own = [int(found.group(1)) for line in lines if (found := re.match(r"# \[(\d+)\] (.*)", line)) and found.group(2) == source]
    return own[0] if own else max(numbers, default=0) + 1
