"""Formats the memory of a run: as predicted, for its start, and beside what was measured, for its end."""

from collections.abc import Mapping
from typing import Any

from bagualu.parallel.balance.stages.show import aligned
from bagualu.trainer.costs.prediction import Memory, fullest, memory_text, size_text


def show_prediction(ranks: list[Memory]) -> str:
    """Returns a line about the fullest rank and, if there are several pipeline ranks, a table of all of them by kind."""
    line = f"memory of the fullest rank, predicted: {memory_text(fullest(ranks))}"
    return "\n".join([line, *_table(ranks)]) if len(ranks) > 1 else line


def show_measurement(memory: Mapping[str, Any]) -> list[str]:
    """Returns lines about `memory` of summary.json: the fullest rank, and each pipeline rank if there are several."""
    ranks = memory.get("pipeline_ranks", [])
    lines = [f"{_both(memory)}, on the fullest rank; largest process {size_text(memory['process'])}"]
    return lines + [f"pipeline rank {index}: {_both(rank)}" for index, rank in enumerate(ranks) if len(ranks) > 1]


def _both(memory: Mapping[str, Any]) -> str:
    predicted = f"{size_text(sum(memory['predicted'].values()))} predicted"
    return f"{size_text(memory['measured'])} of tensors, {predicted}" if memory["measured"] else predicted


def _table(ranks: list[Memory]) -> list[str]:
    kinds = [kind for kind in ranks[0] if any(memory[kind] for memory in ranks)]
    rows = [["pipeline rank", *(kind.replace("_", " ") for kind in kinds), "all"]]
    for index, memory in enumerate(ranks):
        rows.append([str(index), *(size_text(memory[kind]) for kind in kinds), size_text(sum(memory.values()))])
    return aligned(rows)
