"""A directory with a model of Hugging Face: its configuration and where its tensors are. It does not import torch, so that a wrong
directory is refused before workers start."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.run_directory import CHAT_TEMPLATE, GENERATION, MODEL, TOKENIZER, TOKENIZER_CONFIG
from bagualu.trainer.models.hugging_face.config import Description, read_config
from bagualu.trainer.models.hugging_face.names import FilePart, parts_of, shapes_of
from bagualu.trainer.models.hugging_face.safetensors_file import DTYPES, FileTensor, read_header

CONFIG, INDEX, SINGLE = MODEL, "model.safetensors.index.json", "model.safetensors"
BESIDES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", CHAT_TEMPLATE, GENERATION)
"""The files beside configuration and weights that belong to a model."""


@dataclass(frozen=True)
class HuggingFaceModel:
    """A model in a directory, whose tensors have been found to be those of its configuration."""

    path: Path
    description: Description
    parts: list[FilePart]
    tensors: dict[str, FileTensor]

    @property
    def dtype(self) -> str:
        """The widest dtype of the weights."""
        return max((tensor.dtype for tensor in self.tensors.values()), key=_width)

    @property
    def bytes(self) -> int:
        """The bytes of the weights in the files."""
        return sum(tensor.bytes for tensor in self.tensors.values())


def is_hugging_face(path: Path) -> bool:
    """Returns whether `path` is a directory of a model of Hugging Face, rather than a run or a checkpoint."""
    return (path / CONFIG).is_file()


def open_model(path: Path) -> HuggingFaceModel:
    """Returns the model in the directory `path`, after checking its configuration and the header of every file.

    Raises RecipeError for an architecture or a field that the decoder does not have, for missing, surplus, or misshapen tensors,
    all of them by name, and for files that are missing or cut off.
    """
    description = read_config(_json(path / CONFIG), str(path / CONFIG))
    _check_tokenizer(path, description.model.vocab)
    found: dict[str, FileTensor] = {}
    for file in _files(path):
        found |= read_header(file)
    fused = any(name.endswith(".mlp.experts.gate_up_proj") for name in found)
    parts = parts_of(description.model, description.family, fused)
    expected = shapes_of(parts)
    surplus = {name for name in found.keys() - expected.keys() if not _may_be_left(name, description)}
    _refuse_names(path, expected.keys() - found.keys(), surplus)
    wrong = [f"{name} {list(found[name].shape)} instead of {list(shape)}" for name, shape in expected.items()
             if found[name].shape != shape]  # fmt: skip
    if wrong:
        raise RecipeError(f"{path} has tensors of other shapes than {CONFIG} says: {', '.join(wrong)}; give the files that belong "
                          "together")  # fmt: skip
    if others := sorted({found[name].kind for name in expected} - DTYPES.keys()):
        raise RecipeError(f"{path} has weights of {', '.join(others)}; there are {', '.join(DTYPES)}: give a version of the model "
                          "that is not quantised")  # fmt: skip
    return HuggingFaceModel(path, description, parts, {name: found[name] for name in expected})


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}); give the directory of a model of Hugging Face") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not JSON ({error}); give the file as it was published") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{path} holds no JSON object; give the file as it was published")
    return value


def _files(path: Path) -> list[Path]:
    """Returns the safetensors files of the model. Raises RecipeError if there are none, or one that the index names is missing."""
    if (path / INDEX).is_file():
        places = _json(path / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise RecipeError(f"{path / INDEX} has no weight_map with the names of files; download it again")
        names = sorted(set(places.values()))
        if missing := [name for name in names if not (path / name).is_file()]:
            raise RecipeError(f"{path} lacks {', '.join(missing)}, which {INDEX} names; download them too")
        if names:
            return [path / name for name in names]
    if not (path / SINGLE).is_file():
        raise RecipeError(f"{path} has neither {SINGLE} nor {INDEX}; give a model in safetensors files (save_pretrained of "
                          "transformers writes them)")  # fmt: skip
    return [path / SINGLE]


def _may_be_left(name: str, description: Description) -> bool:
    """Returns whether the decoder needs no tensor of this name: a copy of a tied head, or angles that old files hold."""
    return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and description.model.tie_embeddings)


def _refuse_names(path: Path, missing: set[str], surplus: set[str]) -> None:
    problems = [f"{what} {', '.join(sorted(names))}" for what, names in (("lacks", missing), ("has besides", surplus)) if names]
    if problems:
        raise RecipeError(f"{path} does not hold the tensors of its {CONFIG}: it {' and '.join(problems)}; give the files and the "
                          "configuration that belong together")  # fmt: skip


def _check_tokenizer(path: Path, vocab: int) -> None:
    """Raises RecipeError if a tokenizer lies beside the model that has ids which the model does not have."""
    if not (path / TOKENIZER).is_file():
        return
    tokenizer = _json(path / TOKENIZER)
    try:
        known = (tokenizer.get("model") or {}).get("vocab") or {}
        ids = list(known.values()) if isinstance(known, dict) else list(range(len(known)))
        ids = list(map(int, [*ids, *(token.get("id", 0) for token in tokenizer.get("added_tokens") or [])]))
    except (AttributeError, TypeError, ValueError) as error:
        raise RecipeError(f"{path / TOKENIZER} is no tokenizer ({error}); give the file as it was published") from error
    if ids and max(ids) >= vocab:
        raise RecipeError(f"{path / TOKENIZER} has ids up to {max(ids)}, but the model has vocab_size={vocab}; give the tokenizer "
                          "of this model, or add rows to its embedding and raise vocab_size")  # fmt: skip


def _width(dtype: str) -> tuple[int, bool]:
    return dict(DTYPES.values())[dtype], dtype == "bfloat16"
