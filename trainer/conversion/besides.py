"""Keeps configuration and tokenizer of a model of Hugging Face with the run that begins with it."""

import shutil

from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.trainer.models.hugging_face.directory import BESIDES, CONFIG, HuggingFaceModel


def keep_besides(model: HuggingFaceModel, run: RunDirectory) -> None:
    """Copies configuration and tokenizer of `model` to the directory of the run, from where an export takes them."""
    run.hugging_face.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, *BESIDES):
        if (model.path / name).is_file():
            shutil.copyfile(model.path / name, run.hugging_face / name)
