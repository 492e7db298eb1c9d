"""The table a person reads."""

from bagualu.parallel.balance.stages.choose import choose_split
from bagualu.parallel.balance.stages.cost import CostTable, LayerCost
from bagualu.parallel.balance.stages.forecast import Split
from bagualu.parallel.balance.stages.show import show_split
from bagualu.parallel.layout import StagePlacement
from bagualu.parallel.pipeline.layer_slice import LayerSlice
from bagualu.parallel.pipeline.registry import compute_schedule

LAYER = LayerCost("layer", 0.001, 0.001, 0.0005, state_bytes=2**20)
TABLE = CostTable(LayerCost("embedding", 0, 0, 0), [LAYER] * 3, LayerCost("head", 0.001, 0, 0), "drawn")


def test_with_costs_and_measured_times() -> None:
    split = choose_split(TABLE, compute_schedule("1f1b", 2, 2), speeds=[0.5, 1.0])
    assert show_split(split, StagePlacement(2), [(0.002, 0.0031), (0.0030, 0.0029)]).splitlines() == [
        "stage  rank  layers  count  speed  forward ms  backward ms  rank's memory MiB  measured forward ms  measured backward ms",
        "    0     0     0-0      1   0.50           2            3                1.0                    2                   3.1",
        "    1     1     1-2      2   1.00           3            3                2.0                    3                   2.9",
        "predicted (drawn): slowest rank 6 ms per micro-batch (lower bound 6), 17 ms for the passes of a step",
    ]


def test_without_costs_there_are_the_layers() -> None:
    split = Split(
        [LayerSlice(0, 4), LayerSlice(4, 6), LayerSlice(6, 10), LayerSlice(10, 12)],
        ["attention", "attention", "full", "none", "full", "none"],
    )
    assert show_split(split, StagePlacement(2, 2, True)).splitlines() == [
        "stage  rank  layers  count  recompute",
        "    0     0     0-1      2  attention",
        "    1     1     2-2      1       full",
        "    2     1     3-4      2  full in 1",
        "    3     0     5-5      1       none",
    ]
