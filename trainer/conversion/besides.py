"""Keeps configuration and tokenizer of a model of Hugging Face with the run that begins with it."""

import json
import shutil
from typing import Any

from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.trainer.models.hugging_face.config import POSITIONS
from bagualu.trainer.models.hugging_face.directory import BESIDES, CONFIG, HuggingFaceModel


def keep_besides(model: HuggingFaceModel, run: RunDirectory) -> None:
    """Copies configuration and tokenizer of `model` to the directory of the run, from where an export takes them. Raises
    OSError."""
    run.hugging_face.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, *BESIDES):
        if (model.path / name).is_file():
            shutil.copyfile(model.path / name, run.hugging_face / name)


def kept_config(run: RunDirectory) -> dict[str, Any]:
    """Returns the fields of config.json of the model of Hugging Face that the run began with; {} if it began with none."""
    try:
        config = json.loads((run.hugging_face / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def context_length(run: RunDirectory, trained: int) -> int:
    """Returns the number of positions that the model of a run knows: `trained`, the length of the sequences that the run trains on,
    or those that the model of Hugging Face knew with which it began, whichever is more."""
    before = kept_config(run).get(POSITIONS)
    return max(trained, before if isinstance(before, int) else 0)
