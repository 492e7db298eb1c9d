"""Writes the weights of a checkpoint as a model of Hugging Face. One process, which holds a small part of one tensor at a time."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.checkpoint.layout.directory import checkpoint_at
from bagualu.fault_tolerance.checkpoint.layout.durable import durable_file, fsync_directory, write_all
from bagualu.fault_tolerance.checkpoint.layout.format import DTYPES
from bagualu.fault_tolerance.checkpoint.layout.shard import bytes_of, encode_header
from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.fault_tolerance.run_directory import GENERATION, TOKENIZER, TOKENIZER_CONFIG, RunDirectory
from bagualu.parallel.boxes import Box
from bagualu.trainer.conversion.besides import context_length
from bagualu.trainer.conversion.exported_tokenizer import ExportedTokenizer, find_tokenizer
from bagualu.trainer.conversion.portions import portions
from bagualu.trainer.conversion.stored_weights import StoredWeights
from bagualu.trainer.conversion.torch_checkpoint import TorchCheckpoint
from bagualu.trainer.models.decoder.identity import model_of
from bagualu.trainer.models.decoder.lora import LoraConfig
from bagualu.trainer.models.hugging_face.config import OF_TOKENS, POSITIONS, write_config
from bagualu.trainer.models.hugging_face.directory import BESIDES, CONFIG, INDEX, SINGLE
from bagualu.trainer.models.hugging_face.families import family_of
from bagualu.trainer.models.hugging_face.names import EMBEDDING, HEAD, FilePart, parts_of, shapes_of
from bagualu.trainer.recipe.config import stored_dtype_of

SHARD_BYTES = 5 * 10**9
"""The most bytes of weights in a file, unless a single tensor has more."""
EXPORTED = ("float64", "float32", "bfloat16", "float16")
FORMATS = ("safetensors", "dcp")
"""What an export can be: files as Hugging Face publishes them, or a checkpoint of torch.distributed.checkpoint."""


def export_model(given: Path, to: Path, dtype: str | None = None, form: str = "safetensors") -> dict[str, Any]:
    """Exports the checkpoint `given`, or the newest of the run `given`, to the new directory `to`, with weights of `dtype`, by
    default that of the run's training, in the format `form`, one of `FORMATS`. Returns the path, the number of parameters and the
    bytes of the weights.

    Raises RecipeError for a model that no family of transformers describes, and CheckpointError if the checkpoint cannot be read.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RecipeError(f"{to} exists and is not empty; give another directory, or remove it first")
    if to.resolve() == Path.cwd():
        raise RecipeError(f"to={to} is the directory from which this was started, and is replaced; give a new directory")
    checkpoint = Checkpoint(checkpoint_at(given))
    identity = checkpoint.metadata.get("identity") or {}
    model = replace(model_of(identity), lora=LoraConfig())  # factors are merged into the weights
    dtype = dtype or stored_dtype_of(str(checkpoint.metadata.get("dtype")))
    if dtype not in EXPORTED:
        raise RecipeError(f"dtype={dtype} is unknown; give one of {', '.join(EXPORTED)}")
    if form not in FORMATS:
        raise RecipeError(f"format={form} is unknown; give one of {', '.join(FORMATS)}")
    run = RunDirectory(checkpoint.path.resolve().parent.parent)
    tokenizer = find_tokenizer(run)
    positions = context_length(run, int(identity.get("data.sequence_length", 0))) or 2048
    config = write_config(model, dtype, tokenizer.ids, positions)
    family = family_of(model)
    assert family is not None  # or write_config had raised
    fused = form == "dcp"  # where each tensor has the name and the shape that it has in a model of transformers 5
    parts = parts_of(model, family, fused)
    writing = to.with_name(f".{to.name}-{secrets.token_hex(4)}")
    try:
        writing.mkdir(parents=True)
        write = _write_torch_checkpoint if form == "dcp" else _write_weights
        size = write(writing, StoredWeights(checkpoint), parts, dtype)
        _write_json(writing / CONFIG, config)
        _write_besides(writing, tokenizer, config)
        fsync_directory(writing)
        if to.exists():
            to.rmdir()
        os.rename(writing, to)
        fsync_directory(to.parent)
    except OSError as error:
        raise RecipeError(f"{to} cannot be written ({error.strerror}); make room there or give another directory") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return {"path": str(to), "parameters": sum(prod(part.box.shape) for part in parts), "bytes": size}


def _write_weights(folder: Path, weights: StoredWeights, parts: list[FilePart], dtype: str) -> int:
    """Writes all tensors, in one file or in several with an index; returns their bytes."""
    item_bytes = DTYPES[dtype][1]
    shards = list(_shards(parts, item_bytes))
    several = len(shards) > 1
    places: dict[str, str] = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" if several else SINGLE
        _write_shard(folder / name, weights, shard, dtype)
        places |= {part.tensor: name for part in shard}
    total = sum(prod(part.shape) for part in parts) * item_bytes
    if several:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return total


def _shards(parts: list[FilePart], item_bytes: int) -> Iterator[list[FilePart]]:
    """Yields consecutive parts that fit into a file together."""
    shard: list[FilePart] = []
    held = 0
    for part in parts:
        size = prod(part.box.shape) * item_bytes
        if shard and held + size > SHARD_BYTES:
            yield shard
            shard, held = [], 0
        shard.append(part)
        held += size
    yield shard


def _write_shard(path: Path, weights: StoredWeights, parts: list[FilePart], dtype: str) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    name, item_bytes = DTYPES[dtype]
    at = 0
    for part in parts:
        end = at + prod(part.shape) * item_bytes
        entries[part.tensor] = {"dtype": name, "shape": list(part.shape), "data_offsets": [at, end]}
        at = end
    with durable_file(path) as file:
        write_all(file, encode_header(entries))
        for part in parts:
            for _, values in _values(weights, part):
                write_all(file, bytes_of(values.to(getattr(torch, dtype))))


def _write_torch_checkpoint(folder: Path, weights: StoredWeights, parts: list[FilePart], dtype: str) -> int:
    """Writes all tensors as torch.distributed.checkpoint loads them; returns their bytes. A tied head has its own name too, as in
    the state of a model of transformers."""
    item_bytes = DTYPES[dtype][1]
    writer = TorchCheckpoint(folder, shapes_of(parts), getattr(torch, dtype))
    for shard in _shards(parts, item_bytes):
        writer.write(shard, partial(_values, weights))
    if HEAD not in shapes_of(parts):
        writer.add_name(HEAD, EMBEDDING)
    writer.finish()
    return sum(prod(part.box.shape) for part in parts) * item_bytes


def _values(weights: StoredWeights, part: FilePart) -> Iterator[tuple[Box, torch.Tensor]]:
    """Yields boxes of a tensor of the files that make up `part`, one after the other, with their values as the checkpoint holds
    them, factors merged."""
    leading = len(part.box.shape) - len(part.shape)
    for box in portions(part.box.shape[leading:]):
        inner = Box((0,) * leading + box.offset, part.box.shape[:leading] + box.shape)
        values = weights.fill(part.parameter, part.box.shape, inner.shift(part.box.offset))
        yield box.shift(part.offset), values.view(box.shape)


def _write_besides(folder: Path, tokenizer: ExportedTokenizer, config: Mapping[str, Any]) -> None:
    """Copies the tokenizer and the files beside it; writes its configuration and that of generation where there is none."""
    for name in BESIDES:
        if (tokenizer.folder / name).is_file():
            shutil.copyfile(tokenizer.folder / name, folder / name)
    if (folder / TOKENIZER).exists() and not (folder / TOKENIZER_CONFIG).exists():
        ends = {} if tokenizer.end is None else {"eos_token": tokenizer.end}
        fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        _write_json(folder / TOKENIZER_CONFIG, {**fixed, **ends, "model_max_length": config[POSITIONS]})
    if not (folder / GENERATION).exists():
        ids = {name: config[name] for name in OF_TOKENS if config[name] is not None}
        _write_json(folder / GENERATION, {"_from_model_config": True, **ids})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with durable_file(path) as file:
        write_all(file, (json.dumps(value, indent=2) + "\n").encode())
