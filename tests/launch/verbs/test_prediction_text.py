"""The words in which a prediction is told."""

from dataclasses import replace

from bagualu.comm.cluster_file import load_cluster
from bagualu.launch.verbs.prediction_text import excess
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.simulation.predict import predict


def test_what_does_not_fit_is_said_of_the_chip_that_is_too_small() -> None:
    """Without a pipeline, the first ranks of a mixed cluster have the larger chip."""
    large, small = load_cluster("mixed_h100_a100").parts
    small = replace(small, chip=replace(small.chip, memory_bytes=small.chip.context_bytes + 2**20))
    words = ["recipe=tiny_dense", "train.dtype=bfloat16", "data.global_batch=16", "train.micro_batch=1", "parallel.data=null"]
    prediction = predict(compose(words), replace(load_cluster("mixed_h100_a100"), parts=(large, small)), 16)
    assert f"of {small.chip.name} without" in excess(prediction)
