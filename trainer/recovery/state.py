"""Defines what a checkpoint holds besides tensors, and restores a run from a checkpoint after checking it.

The learning rate, the order of the data and every random number are functions of (recipe, seed, step). So the step, the seed and
the fingerprint of the data are their whole state; no random generator has a position that must be saved.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bagualu.comm.agree import first_different, totals
from bagualu.comm.errors import RecipeError
from bagualu.comm.monitor import Phase
from bagualu.fault_tolerance.checkpoint.agree import on_all
from bagualu.fault_tolerance.checkpoint.layout.format import REMEDY, CheckpointError
from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.fault_tolerance.guard.finite import is_finite
from bagualu.fault_tolerance.guard.history import Memory
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.parallel.boxes import TensorPiece
from bagualu.trainer.assemble import TrainerState
from bagualu.trainer.data.blend import Period, changed_source, read_periods
from bagualu.trainer.data.config import RANDOM, STREAM
from bagualu.trainer.data.split import NOTHING
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.decoder.plan import decoder_plan
from bagualu.trainer.recipe.config import DTYPES
from bagualu.trainer.recipe.override_text import typed

FINGERPRINT = "data fingerprint"
_BLEND = "blend"
"""The fingerprint of a blend: its sources may change, and `_check_blend` checks each."""
_RENORMALISE = "model.moe.renormalise"
_WEIGHTS = "weight/"
"""How the names of weights in a checkpoint begin."""
_SPLIT, _KIND = "data.split", "data split in fact"
"""Keys of the dictionary that `identity` returns: how the text was to be split (none: nothing is kept for validation), and how it
was in fact. Checkpoints of earlier versions lack both: those versions kept whole files."""
_OF_TEXT = {FINGERPRINT, _SPLIT, _KIND, "data.source", "data.validation", "data.validation_fraction"}
"""Keys that may differ if the fingerprint proves that the tokens are the same, for example because the text was moved."""


def checkpoints_of(state: TrainerState) -> Path:
    """Returns the directory of the run's checkpoints."""
    return RunDirectory(state.recipe.run.dir).checkpoints


def metadata_of(state: TrainerState, step: int) -> dict[str, Any]:
    """Returns, as plain JSON, what a checkpoint after `step` steps holds besides tensors."""
    recipe = state.recipe
    return {
        "step": step,
        "updates": state.updates,
        "scaler": {"scale": state.scaler.scale, "good_steps": state.scaler.good_steps},
        "guard": state.guard.memory.as_json(),
        "layout": {axis: state.mesh.layout.size(axis) for axis in ("data", "tensor", "pipeline", "expert", "context")},
        "engine": recipe.parallel.engine,
        "zero": recipe.parallel.zero_stage,
        "dtype": recipe.train.dtype,
        "identity": identity(state),
        **({"blend": state.batches.blend()} if state.recipe.data.blend else {}),
    }


@dataclass(frozen=True)
class Saved:
    """The metadata of a checkpoint: what it holds about the run besides tensors."""

    step: int
    updates: int
    scale: float
    good_steps: int
    dtype: str
    identity: dict[str, Any]
    guard: dict[str, Any]
    imported: bool
    """Whether the weights come from elsewhere: the checkpoint has no moments, and no data have been trained on."""
    blend: list[Period] | None = None
    """The periods of data.blend; None without one."""

    @staticmethod
    def of(checkpoint: Checkpoint) -> "Saved":
        """Reads the metadata of `checkpoint`. Raises CheckpointError if a field is missing or invalid."""
        metadata = checkpoint.metadata
        scaler = metadata.get("scaler")
        fields: dict[str, Any] = {name: metadata.get(name) for name in ("step", "updates", "dtype", "identity", "guard")}
        fields |= {name: scaler.get(name) if type(scaler) is dict else None for name in ("scale", "good_steps")}
        counts = {name: fields[name] for name in ("step", "updates", "good_steps")}
        wrong = {name: value for name, value in counts.items() if type(value) is not int or value < 0}
        if type(fields["identity"]) is not dict:
            wrong["identity"] = fields["identity"]
        if type(fields["dtype"]) is not str or fields["dtype"] not in DTYPES:
            wrong["dtype"] = fields["dtype"]
        if type(fields["scale"]) not in (int, float) or not 0 < fields["scale"] < math.inf:
            wrong["scale"] = fields["scale"]
        if not Memory.is_one(fields["guard"]):
            wrong["guard"] = fields["guard"]
        if fields["step"] != checkpoint.step:
            wrong["step"] = fields["step"]
        if "blend" in metadata:
            fields["blend"] = read_periods(metadata["blend"])
            if fields["blend"] is None:
                wrong["blend"] = metadata["blend"]
        if wrong:
            name, value = next(iter(wrong.items()))
            raise CheckpointError(f"{checkpoint.path}: metadata says {name}={str(value)[:40]}, which no run saves; {REMEDY}")
        return Saved(**fields, imported="imported" in metadata)


def take_state(state: TrainerState, open_checkpoint: Callable[[], Checkpoint]) -> int:
    """Restores the state from a checkpoint, which may have been written under any layout; returns the steps done. Collective.

    Every rank first reads and verifies all it needs in separate memory; model and optimizer change only after all ranks have done
    so. The loss scale is restored only for the same train.dtype. Raises on every rank, with nothing changed: RecipeError if the
    checkpoint belongs to another run (model, data, seed) or the ranks see different checkpoints, CheckpointError if it is damaged,
    cannot be read now (CheckpointStorageError) or does not hold exactly the tensors of the model.
    """
    group, monitor = state.mesh.group("world"), state.mesh.monitor
    monitor.at(Phase.LOAD)
    checkpoint = on_all(open_checkpoint, group)
    if first_different(checkpoint.digest, group):
        raise RecipeError(f"the ranks see different checkpoints at {checkpoint.path}; put run.dir on a disk that all nodes share")
    saved = on_all(lambda: _check(state, checkpoint), group)
    incoming = state.engine.incoming()
    wanted = [piece for piece in incoming.pieces() if not saved.imported or piece.name.startswith(_WEIGHTS)]
    on_all(lambda: _check_tensors(checkpoint, wanted, _padded_before(state, saved)), group)
    _check_none_is_left(state, checkpoint, {piece.name for piece in wanted})
    monitor.at(Phase.VERIFY)
    threads = torch.get_num_threads()
    on_all(lambda: checkpoint.read_all(wanted, threads), group)
    on_all(lambda: _check_finite(checkpoint, wanted), group)
    monitor.at(Phase.RESTORE)
    incoming.apply(saved.updates)
    state.updates = saved.updates
    if state.scaler.enabled and saved.dtype == state.recipe.train.dtype:
        state.scaler.scale, state.scaler.good_steps = saved.scale, saved.good_steps
    state.guard.load(saved.guard, saved.step)
    if saved.blend is not None:
        state.batches.resume(saved.blend, saved.step)
        if state.ahead is not None:
            state.ahead.forget()
    return saved.step


def _check(state: TrainerState, checkpoint: Checkpoint) -> Saved:
    saved = Saved.of(checkpoint)
    _check_identity(saved.identity, identity(state), checkpoint.path, saved.imported)
    if not saved.imported:
        _check_blend(state, saved, checkpoint.path)
        _check_moments(state, checkpoint)
    _check_dtype(saved.dtype, state.recipe.train.dtype, checkpoint.path)
    return saved


def _check_blend(state: TrainerState, saved: Saved, path: Path) -> None:
    """Raises RecipeError if only one of the checkpoint and the recipe blends sources, or if a source of the blend has changed."""
    parts = state.corpus.blend
    if bool(parts) != (saved.blend is not None):
        blended, fix = ("was", "give its data.blend") if saved.blend else ("was not", "leave data.blend out")
        raise RecipeError(f"{path} {blended} saved with data.blend; {fix} to go on with it, or another run.dir to start anew")
    if saved.blend is None:
        return
    if source := changed_source(saved.blend, {part.source: part.corpus.fingerprint for part in parts}):
        raise RecipeError(f"{path} was saved with other tokens of {source} in data.blend; put them back as they were, or leave it "
                          "out, to go on with it, or give another run.dir to start anew")  # fmt: skip


def _padded_before(state: TrainerState, saved: Saved) -> Callable[[str, tuple[int, ...]], tuple[int, ...]]:
    """Returns a function (tensor name, shape) -> the shape that an older checkpoint, which includes the vocabulary's padding,
    holds."""
    model = replace(state.recipe.model, vocab_multiple=saved.identity.get("model.vocab_multiple", 1))
    plan = decoder_plan(model, sequence=False)

    def stored(tensor: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        padded = plan.placement(tensor.partition("/")[2]).rows is not None
        return (model.padded_vocab, *shape[1:]) if padded else shape

    return stored


def _check_tensors(
    checkpoint: Checkpoint, wanted: list[TensorPiece], stored_shape: Callable[[str, tuple[int, ...]], tuple[int, ...]]
) -> None:
    """Raises CheckpointError unless the checkpoint holds every tensor of `wanted`, with the same dtype, and with the same global
    shape or the shape with padding that `stored_shape` returns."""
    stored = checkpoint.tensors
    for piece in wanted:
        shapes = (piece.global_shape, stored_shape(piece.name, piece.global_shape))
        if stored.get(piece.name) not in [(shape, piece.tensor.dtype) for shape in shapes]:
            has = "{} {}".format(*stored[piece.name]) if piece.name in stored else "not in it"
            raise CheckpointError(f"{checkpoint.path}: tensor {piece.name} is {has}; the model has {piece.global_shape} "
                                  f"{piece.tensor.dtype}; load it into the model that wrote it")  # fmt: skip


def finite_pieces(pieces: Iterable[TensorPiece]) -> Iterator[TensorPiece]:
    """Yields the same pieces, each checked just before, so that no value that is not finite is saved. Raises CheckpointError at the
    first piece with such a value."""
    for piece in pieces:
        if not is_finite(piece.tensor):
            raise CheckpointError(f"tensor {piece.name} holds values that are not finite")
        yield piece


def _check_finite(checkpoint: Checkpoint, wanted: list[TensorPiece]) -> None:
    """Raises CheckpointError if this rank has read a value that is not finite; older versions could save such values."""
    for piece in wanted:
        if not is_finite(piece.tensor):
            raise CheckpointError(f"{checkpoint.path}: tensor {piece.name} holds values that are not finite; {REMEDY}")


def _check_none_is_left(state: TrainerState, checkpoint: Checkpoint, own: set[str]) -> None:
    """Raises CheckpointError on every rank unless each tensor of the checkpoint is needed by some rank. Collective."""
    names = list(checkpoint.tensors)
    wanted = totals([name in own for name in names], state.mesh.group("world"))
    left = [name for name, count in zip(names, wanted, strict=True) if not count]
    if left:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.path}: tensor {left[0]}{more} is unknown to the model; load it into the model that wrote it"
        )


def identity(state: TrainerState) -> dict[str, Any]:
    """Returns, mostly by recipe key, the values that a checkpoint records to recognise its run (model, data, seed);
    `_check_identity` says which may differ."""
    recipe = state.recipe
    kept = "sequence_length", "global_batch", "packing", "end_token"
    data = {f"data.{key}": getattr(recipe.data, key) for key in kept}
    text = {"data.source": recipe.data.source, "data.validation": recipe.data.validation,
            "data.validation_fraction": recipe.data.validation_fraction,
            _SPLIT: recipe.data.split if state.corpus.split != NOTHING.kind else NOTHING.kind, _KIND: state.corpus.split,
            FINGERPRINT: _BLEND if state.corpus.blend else state.corpus.fingerprint}  # fmt: skip
    return recipe.model.identity() | data | {"run.seed": recipe.run.seed} | text


def _check_identity(saved: dict[str, Any], here: dict[str, Any], path: Path, imported: bool = False) -> None:
    """Raises RecipeError if the checkpoint belongs to another run, or if it is `imported`, to another model. A key of the model
    that the checkpoint lacks is newer; before it existed, models were as its default says, and so was the packing of documents.
    Padding of the vocabulary and the rate of biases may differ, and keys of the text if the tokens are the same."""
    if imported:
        here = {key: value for key, value in here.items() if key.startswith("model.")}
    saved = ModelConfig().identity() | ({} if imported else {"data.packing": STREAM}) | saved
    saved.pop("model.vocab_multiple", None)
    # The text comes last: if the vocabulary differs, so do the tokens, and the message should name the vocabulary.
    for key in sorted((saved.keys() | here.keys()) - _OF_TEXT):
        if not ModelConfig.fits(key, saved.get(key), here.get(key)):
            if key == _RENORMALISE and here.get("model.moe.top_k") == 1:
                raise RecipeError(
                    f"{path} was saved with {key}={saved.get(key)} but the recipe has {here.get(key)}; with "
                    "model.moe.top_k=1 its router learnt nothing from the loss: give another run.dir to start anew"
                )
            raise _other(path, key, saved.get(key), here.get(key), f"give {key}={typed(saved.get(key))}")
    if saved.get(FINGERPRINT) != here.get(FINGERPRINT) and _BLEND not in (saved.get(FINGERPRINT), here.get(FINGERPRINT)):
        raise _other_text(saved, here, path)


def _other_text(saved: dict[str, Any], here: dict[str, Any], path: Path) -> RecipeError:
    """Returns the error for a run whose tokens differ from those it was trained on; it names the key that changed and how to undo
    that."""
    source, tokens = saved.get("data.source"), here[FINGERPRINT]
    if source != here["data.source"] and RANDOM in (source, here["data.source"]):
        return _other(path, "data.source", source, here["data.source"], f"give data.source={source}")
    if _SPLIT not in saved and here[_KIND] != "files":
        remark = " (an earlier version kept whole files for validation, whatever share of the text they are)"
        return _other(path, _SPLIT, "files", here[_SPLIT], "give data.split=files", remark)
    if (before := saved.get(_SPLIT, here[_SPLIT])) != here[_SPLIT]:
        fix = f"give {_split_as(before, here[_SPLIT])}"
        return _other(path, _SPLIT, before, here[_SPLIT], fix, ", which trains on other tokens")
    if (apart := saved.get("data.validation")) != here["data.validation"]:
        return _other(path, "data.validation", apart, here["data.validation"], f"give data.validation={typed(apart)}")
    fraction = saved.get("data.validation_fraction", here["data.validation_fraction"])
    if fraction != here["data.validation_fraction"]:
        return _other(path, "data.validation_fraction", fraction, here["data.validation_fraction"],
                      f"give data.validation_fraction={fraction}")  # fmt: skip
    if source != here["data.source"]:
        remark = f", whose tokens are not the same ({FINGERPRINT} {saved.get(FINGERPRINT)} and {tokens})"
        return _other(path, "data.source", source, here["data.source"], "give the text that the run began with", remark)
    fix = f"put the text of data.source={source} back as it was"
    if _SPLIT not in saved:
        fix += ", without links to folders, which an earlier version left out (it read the files of runs instead),"
    return _other(path, FINGERPRINT, saved.get(FINGERPRINT), tokens, fix)


def _split_as(before: str, here: str) -> str:
    """Returns the overrides with which text is split as `before`, for a recipe that splits it as `here`."""
    if before == NOTHING.kind:  # data.split=files keeps files also where nothing is validated
        return "train.validation_sequences=0" + (" data.split=share" if here == "files" else "")
    return "train.validation_sequences=64" if here == NOTHING.kind and before != "files" else f"data.split={before}"


def _other(path: Path, key: str, saved: object, here: object, fix: str, remark: str = "") -> RecipeError:
    """Returns the error for a checkpoint of a run with another value of `key`; `remark` follows the value that the recipe has."""
    return RecipeError(f"{path} was saved with {key}={typed(saved)} but the recipe has {typed(here)}{remark}; {fix} to go on with "
                       "it, or another run.dir to start anew")  # fmt: skip


def _check_moments(state: TrainerState, checkpoint: Checkpoint) -> None:
    """Raises RecipeError if the checkpoint holds the moments of another optimizer, or of other parameters."""
    optim, shapes = state.recipe.optim, state.recipe.trainable_shapes()
    saved = {tensor.partition("/")[0] for tensor in checkpoint.tensors} - {"weight", "buffer"}
    optimizers = {name: optim.treatment(name, len(shape)).optimizer for name, shape in shapes.items()}
    wanted = optim.all_moments(shapes)
    if saved != wanted:
        held, keeps = (" and ".join(sorted(names)) or "no moments" for names in (saved, wanted))
        fix = optim.to_keep(saved, shapes) or "the keys of optim that the run began with"
        raise RecipeError(f"{checkpoint.path} holds {held}, but optim.name={optim.name} keeps {keeps}; give {fix} to go on with "
                          "it, or another run.dir to start anew")  # fmt: skip
    dtypes = {dtype for tensor, (_, dtype) in checkpoint.tensors.items() if tensor.partition("/")[0] in saved}
    before = "bfloat16" if torch.bfloat16 in dtypes else "float32"
    if saved and before != optim.moments_dtype:
        raise _other(checkpoint.path, "optim.moments_dtype", before, optim.moments_dtype, f"give optim.moments_dtype={before}")
    for name, optimizer in optimizers.items():
        own, kept = {moment for moment in saved if f"{moment}/{name}" in checkpoint.tensors}, optim.moments(optimizer)
        frozen = not own
        if kept and frozen != optim.freezes(name):
            did, does = ("frozen", "trains") if frozen else ("trained", "freezes")
            raise RecipeError(f"{checkpoint.path} was saved with {name} {did}, but the recipe {does} it; freeze the same "
                              "parameters in optim.groups, or give another run.dir to start anew")  # fmt: skip
        if kept and own not in (set(), set(kept)):
            raise RecipeError(f"{checkpoint.path} holds {' and '.join(sorted(own))} of {name}, which the recipe leaves to "
                              f"{optimizer}; give it the other in optim.groups, or another run.dir to start anew")  # fmt: skip


def _check_dtype(saved: str, here: str, path: Path) -> None:
    """Raises RecipeError unless both dtypes are float64 or neither is: with all others, master weights are float32, so a run
    may change between them."""
    if (saved == "float64") != (here == "float64"):
        raise RecipeError(f"{path} was saved with train.dtype={saved} but the recipe has {here}; "
                          f"give train.dtype={saved} to go on with it, or another run.dir to start anew")  # fmt: skip
