"""The parts of a step have one name each, and a meaning."""

from bagualu.parallel.layout import COPIES, SHARD
from bagualu.parallel.simulation.step_parts import FOR_OTHERS, IN_PIPELINE, OTHER_KERNELS, PRODUCTS, communication, legend, meaning


def test_groups_of_one_axis_are_one_part() -> None:
    assert communication("pipeline") == communication("pipeline_back_return")
    assert {communication(group + tier) for group in ("fold", "replica") for tier in ("", SHARD, COPIES)} == {"data communication"}
    assert communication("tensor") == "tensor communication"


def test_every_part_that_a_step_can_have_has_a_meaning() -> None:
    groups = ("tensor", "expert", "pipeline", "fold", "replica", "ends", "world")
    for part in (PRODUCTS, OTHER_KERNELS, IN_PIPELINE, FOR_OTHERS, *map(communication, groups)):
        assert meaning(part)


def test_a_legend_has_only_the_parts_that_are_shown() -> None:
    shown = [PRODUCTS, communication("tensor"), IN_PIPELINE]
    lines = legend(reversed(shown))
    assert [line.split("  ")[1] for line in lines] == shown
    assert len({line.index(meaning(part)) for line, part in zip(lines, shown, strict=True)}) == 1
