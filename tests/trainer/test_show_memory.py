"""The memory of a run as text: predicted at its start, and beside what was measured at its end."""

from typing import Any

from bagualu.trainer.output.progress import summary_text
from bagualu.trainer.show_memory import show_prediction

FIRST = {"parameters": 2**20, "master_weights": 0, "activations": 3 * 2**19}
LAST = {"parameters": 2**20, "master_weights": 0, "activations": 0}


def ended(memory: dict[str, Any]) -> list[str]:
    return summary_text({"step": 1, "steps": 1, "memory": memory}).splitlines()[2:]


def test_a_single_pipeline_rank_is_predicted_in_a_line() -> None:
    line = "memory of the fullest rank, predicted: 2.5 MiB (1.0 MiB parameters, 1.5 MiB activations)"
    assert show_prediction([FIRST]) == line


def test_several_pipeline_ranks_have_a_table_of_the_kinds_that_there_are() -> None:
    assert show_prediction([LAST, FIRST]).splitlines() == [
        "memory of the fullest rank, predicted: 2.5 MiB (1.0 MiB parameters, 1.5 MiB activations)",
        "pipeline rank  parameters  activations      all",
        "            0     1.0 MiB      0.0 KiB  1.0 MiB",
        "            1     1.0 MiB      1.5 MiB  2.5 MiB",
    ]


def test_the_closing_summary_shows_both() -> None:
    memory = {"predicted": FIRST, "measured": 2**20 * 2.4, "process": 2**30}
    assert ended(memory) == ["memory  2.4 MiB of tensors, 2.5 MiB predicted, on the fullest rank; largest process 1.0 GiB"]
    memory["measured"] = None
    assert ended(memory) == ["memory  2.5 MiB predicted, on the fullest rank; largest process 1.0 GiB"]


def test_the_closing_summary_shows_each_of_several_pipeline_ranks() -> None:
    ranks = [{"predicted": LAST, "measured": 2**19, "process": 2**30}, {"predicted": FIRST, "measured": 2**21, "process": 2**30}]
    assert ended({**ranks[1], "pipeline_ranks": ranks}) == [
        "memory  2.0 MiB of tensors, 2.5 MiB predicted, on the fullest rank; largest process 1.0 GiB",
        "        pipeline rank 0: 512.0 KiB of tensors, 1.0 MiB predicted",
        "        pipeline rank 1: 2.0 MiB of tensors, 2.5 MiB predicted",
    ]
    assert len(ended({**ranks[1], "pipeline_ranks": ranks[1:]})) == 1
