"""The way from the loop to the model is short, and every call on it is named in docs/design/architecture.md."""

import sys
from pathlib import Path
from types import FrameType

from bagualu.comm import simulated
from bagualu.comm.group import Communicator
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.run import train
from tests.parity import small_recipe

PROJECT = Path(__file__).parents[2]
CALLS = [
    ("trainer/loop.py", "Loop.run"),
    ("trainer/step.py", "train_step"),
    ("parallel/pipeline/runtime.py", "PipelineRunner.run"),
    ("parallel/pipeline/runtime.py", "PipelineRunner._forward"),
    ("trainer/models/decoder/model.py", "Decoder.forward"),
]


def calls_of_this_project(frame: FrameType | None) -> list[tuple[str, str]]:
    """(file, function) from the outermost call to `frame`; by module name, so that an installed copy reads the same."""
    found = []
    while frame is not None:
        package, _, module = frame.f_globals.get("__name__", "").partition(".")
        if package == "bagualu":
            found.append((module.replace(".", "/") + ".py", frame.f_code.co_qualname))
        frame = frame.f_back
    return found[::-1]


def test_from_loop_to_model_it_is_four_calls(tmp_path: Path) -> None:
    seen: list[list[tuple[str, str]]] = []
    recipe = small_recipe(run__dir=str(tmp_path), train__steps=1, log__progress="off", model__layers=2)

    def watched(communicator: Communicator) -> None:
        def profile(frame: FrameType, event: str, argument: object) -> None:
            if event == "call" and frame.f_code is Decoder.forward.__code__:
                seen.append(calls_of_this_project(frame))

        sys.setprofile(profile)
        try:
            train(recipe, communicator)
        finally:
            sys.setprofile(None)

    simulated.run(recipe.world_size(), watched, 60.0, 1)
    stacks = [stack[stack.index(CALLS[0]) :] for stack in seen if ("trainer/step.py", "train_step") in stack]
    assert stacks
    assert all(stack == CALLS for stack in stacks)


def test_each_of_them_is_in_the_architecture_page() -> None:
    page = (PROJECT / "docs/design/architecture.md").read_text()
    for file, function in CALLS:
        assert f"`{file}`" in page
        assert f"`{function}`" in page
