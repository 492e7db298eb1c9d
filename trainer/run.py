"""A whole run on a rank: assemble, resume, train, summarise. Every rank calls `train` with the same recipe."""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bagualu.comm.agree import meet, total
from bagualu.comm.errors import StorageError
from bagualu.comm.group import Communicator
from bagualu.comm.objects import broadcast_json
from bagualu.fault_tolerance.checkpoint.layout.directory import list_checkpoints
from bagualu.fault_tolerance.checkpoint.layout.format import CheckpointStorageError
from bagualu.fault_tolerance.files import write_atomic
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.fault_tolerance.straggler import Stragglers
from bagualu.parallel.balance.stages.show import show_split
from bagualu.parallel.parallelize import Fill
from bagualu.trainer.assemble import TrainerState, assemble, choose_kernels
from bagualu.trainer.conversion.origin import keep_origin, values_of
from bagualu.trainer.costs.choose_operators import choose_operators
from bagualu.trainer.costs.throughput import matmul_ceiling
from bagualu.trainer.data.ahead import ReadAhead
from bagualu.trainer.data.chat import BESIDE_TOKENIZERS
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.data.corpus_cache import cache_folder
from bagualu.trainer.data.tokenised import Corpus, show_data
from bagualu.trainer.engine.local_model import no_values
from bagualu.trainer.loop import Loop
from bagualu.trainer.memory import PeakMemory
from bagualu.trainer.models.decoder.flops import model_flops_per_token
from bagualu.trainer.observers import close_ledger, open_ledger, plan_faults
from bagualu.trainer.operators.choice import ChosenOperators
from bagualu.trainer.output.metric_writers import JsonlSink, Sink
from bagualu.trainer.output.progress import Progress
from bagualu.trainer.output.rate import remarks
from bagualu.trainer.output.summary import final as final_summary
from bagualu.trainer.output.summary import write as write_summary
from bagualu.trainer.output.wandb_sink import WandbSink
from bagualu.trainer.process.environment import keep_kernels_in
from bagualu.trainer.rebalance import open_rebalancer
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.recipe.same_recipe import require_same_recipe
from bagualu.trainer.recovery.replication import Replication, open_replication
from bagualu.trainer.recovery.resume import Resumed, resume
from bagualu.trainer.recovery.saving import Checkpoints, take_checkpoints
from bagualu.trainer.simulation.step_clock import open_step_clock
from bagualu.trainer.step import read_samples

log = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    communicator: Communicator,
    stop: Callable[[], bool] = lambda: False,
    scratch: Path | None = None,
    assemble: Callable[[Recipe, Communicator, Corpus, Fill | None], TrainerState] = assemble,
) -> dict[str, Any]:
    """Trains to `train.steps`, or until `stop()` is true on any rank; returns the summary, the same on every rank. If the run had
    done all its steps before, it returns the summary that the run wrote then.

    `stop` is called on every rank in each attempt at a step, and while reading checkpoints waits for storage. A run that is stopped
    in a step saves a checkpoint. Rank 0 writes metrics.jsonl and summary.json.
    `scratch`: a folder in memory that this node's ranks share; it outlives them, but not the launcher. None if there is none.
    `assemble` makes the state that is trained.
    Raises RecipeError, StorageError, CheckpointError, CommunicationError, and GuardError if the guard ends the run (`guard.*`).
    """
    started = time.perf_counter()
    torch.manual_seed(recipe.run.seed)  # nothing uses this generator; if code ever does, ranks will not differ by accident
    require_same_recipe(recipe, communicator)
    keep_kernels_in(cache_folder(recipe.data) / "kernels")
    ledger = open_ledger(recipe, communicator)
    choose_kernels(recipe, communicator.device)
    operators, said = choose_operators(recipe, communicator)
    recipe = replace(recipe, operators=operators.as_config(), train=replace(recipe.train, compile=False))  # chosen now
    comes = _state_will_be_read(recipe, communicator)
    state = assemble(recipe, communicator, _corpus(recipe), no_values if comes else values_of(recipe, communicator))
    if recipe.model.origin and not comes and communicator.rank == 0:
        keep_origin(recipe)
    _announce(state, communicator, scratch, said)
    fence = take_checkpoints(state, scratch)
    if communicator.rank == 0:
        _keep_tokenizer(state.corpus, RunDirectory(recipe.run.dir))
    replication = open_replication(state, scratch, fence)
    resumed = _resumed(state, replication, comes, stop)
    if finished := _finished(recipe, resumed.step):
        close_ledger(ledger, recipe, communicator, "done")
        if communicator.rank == 0:
            write_summary(Path(recipe.run.dir), finished)
        return finished
    if communicator.rank == 0:
        _keep_operators(operators, RunDirectory(recipe.run.dir))
    figures = _Figures.of(state, communicator, resumed.step)
    sinks = _sinks(recipe, resumed.step) if communicator.rank == 0 else []
    checkpoints = Checkpoints(state, fence, resumed.checkpoint, ledger)
    try:
        state.ahead = ReadAhead(partial(read_samples, state), recipe.train.steps, recipe.data.workers)
        ending = _loop(state, communicator, stop, sinks, figures, checkpoints, replication).run(resumed.step)
        checkpoints.close()
        if replication:
            replication.replicas.remove()
        summary = {
            **figures.summary(ending),
            "compile": operators.compiled,
            "damaged": resumed.damaged + ending["damaged"],
            "seconds": time.perf_counter() - started,
            **close_ledger(ledger, recipe, communicator, ending["ended"]),
        }
        if communicator.rank == 0:
            write_summary(Path(recipe.run.dir), summary)
    finally:  # after the summary: waiting for sinks is not part of the run's time
        if state.ahead is not None:
            state.ahead.close()
        checkpoints.close(wait=False)
        for sink in sinks:
            sink.close()
    return summary


@dataclass
class _Figures:
    """What the steps of a run are measured against."""

    state: TrainerState
    communicator: Communicator
    memory: PeakMemory
    flops_per_token: float
    ceiling: float
    """FLOP/s that matrix products reach, summed over all ranks."""

    @staticmethod
    def of(state: TrainerState, communicator: Communicator, first_step: int) -> "_Figures":
        """Measures and predicts; rank 0 prints what there is to say of a run that goes on after `first_step` steps. Collective."""
        recipe = state.recipe
        ceiling, memory = _ceiling(state, communicator), PeakMemory(state, communicator)
        if communicator.rank == 0:
            about_file = recipe.deepspeed_terms(state.mesh.layout).remarks()
            print(*[memory.remark(), *remarks(recipe, first_step), *about_file], sep="\n", file=sys.stderr, flush=True)
        return _Figures(state, communicator, memory, model_flops_per_token(recipe.model, recipe.data.sequence_length), ceiling)

    def summary(self, ending: dict[str, Any]) -> dict[str, Any]:
        """Returns the summary fields of a run's `ending` with these figures. Collective."""
        mfu: dict[str, float] = {}
        if ending["ended"] == "done" and "mfu" in ending:  # at the start, other programs or ranks may have used the machine
            before, self.ceiling = self.ceiling, max(self.ceiling, _ceiling(self.state, self.communicator))
            mfu = {"mfu": ending["mfu"] * before / self.ceiling}
        figures = {"flops_per_token": self.flops_per_token, "matmul_ceiling_flops": self.ceiling}
        return {**ending, **mfu, **_facts(self.state, self.memory), **figures}


def _announce(state: TrainerState, communicator: Communicator, scratch: Path | None, said: list[str]) -> None:
    """Plans the faults of this rank; rank 0 prints what is trained on, what `choose_operators` says, and how the layers are divided
    if that was computed."""
    if communicator.rank == 0:
        print(show_data(state.corpus, state.recipe.data.source), *said, sep="\n", file=sys.stderr, flush=True)
    plan_faults(state, communicator, scratch)
    if state.costs and communicator.rank == 0:
        print(show_split(state.split, state.mesh.placement), file=sys.stderr, flush=True)


def _loop(
    state: TrainerState,
    communicator: Communicator,
    stop: Callable[[], bool],
    sinks: list[Sink],
    figures: _Figures,
    checkpoints: Checkpoints,
    replication: Replication | None,
) -> Loop:
    return Loop(
        state=state,
        sinks=sinks,
        stop=stop,
        seconds_per_token_at_ceiling=figures.flops_per_token / figures.ceiling,
        checkpoints=checkpoints,
        stragglers=Stragglers(
            state.recipe.straggler, communicator.world, [state.mesh.group(axis) for axis in ("tensor", "replica")]
        ),
        replication=replication,
        rebalancer=open_rebalancer(state),
        counting=figures.memory.counting,
        clock=open_step_clock(communicator),
    )


def _resumed(state: TrainerState, replication: Replication | None, comes: bool, stop: Callable[[], bool]) -> Resumed:
    """Reads the state of an earlier start, if there is one. `comes`: whether there was one when this start began. Collective."""
    resumed = resume(state, replication.candidates() if replication else [], stop)
    if comes and resumed.source is None:
        raise CheckpointStorageError(f"the checkpoints of {state.recipe.run.dir}, there when it began to start, are gone; see "
                                     "whether its storage is mounted")  # fmt: skip
    if replication:
        replication.start(resumed)
    return resumed


def _facts(state: TrainerState, memory: PeakMemory) -> dict[str, Any]:
    """Returns the part of the summary that says what was trained, on which layout and engine, and what memory it took.
    Collective."""
    return {
        "steps": state.recipe.train.steps,
        "layout": str(state.mesh.layout),
        "engine": state.recipe.parallel.engine,
        "zero": state.recipe.parallel.zero_stage,
        "operators": state.recipe.operators.as_dict(),
        "micro_batches_of_data_ranks": state.shares,
        "layers_of_stages": state.split.counts,
        **_tokens(state.corpus),
        "parameters": _parameters(state),
        "run_dir": state.recipe.run.dir,
        "memory": memory.summary(),
        "peak_memory_bytes": memory.sum_of_peaks(),
    }


def _state_will_be_read(recipe: Recipe, communicator: Communicator) -> bool:
    """Returns whether the run is to resume and has checkpoints, so that no initial weights need to be drawn. False also if rank 0
    cannot list the checkpoints now. Collective."""
    has_checkpoints = False
    if recipe.checkpoint.resume and communicator.rank == 0:
        with contextlib.suppress(OSError):  # storage that cannot be read now is waited for later
            has_checkpoints = bool(list_checkpoints(RunDirectory(recipe.run.dir).checkpoints))
    return bool(broadcast_json(has_checkpoints, communicator.world))


def _corpus(recipe: Recipe) -> Corpus:
    """Returns the result of `prepare`. With checkpoint.resume=true, a missing source or cache raises StorageError and not also
    RecipeError: the data existed before, so it may come back."""
    try:
        return prepare(
            recipe.data,
            recipe.model.vocab,
            validation=recipe.train.validation_sequences > 0,
            run_dir=recipe.run.dir,
            length_multiple=recipe.parallel.tensor if recipe.parallel.sequence else 1,
        )
    except StorageError as error:
        if recipe.checkpoint.resume:
            raise StorageError(str(error)) from error
        raise


def _keep_operators(operators: ChosenOperators, run: RunDirectory) -> None:
    """Records the variants of the operators in the run's directory. If that fails, it logs a warning."""
    try:
        write_atomic(run.operators, (json.dumps(operators.to_json(), indent=2) + "\n").encode())
    except OSError as error:
        log.warning("%s cannot be written (%s); when the run resumes, it may choose others", run.operators, error.strerror)


def _keep_tokenizer(corpus: Corpus, run: RunDirectory) -> None:
    """Copies the corpus's tokenizer, if it has one, and the files that belong to it to the run's directory, so that texts can be
    generated wherever the run is. If that fails, it logs a warning."""
    if corpus.tokenizer_path is None:
        return
    besides = [(corpus.tokenizer_path.with_name(name), run.tokenizer.with_name(name)) for name in BESIDE_TOKENIZERS]
    try:
        for there, here in [(corpus.tokenizer_path, run.tokenizer), *besides]:
            if there == corpus.tokenizer_path or there.is_file():
                write_atomic(here, there.read_bytes())
    except OSError as error:
        log.warning("%s cannot be written (%s); `bagualu generate` will only take tokens", run.tokenizer, error.strerror)


def _tokens(corpus: Corpus) -> dict[str, int | bool | None]:
    """Returns, for the summary, the numbers of training and validation tokens, None for random tokens, which never run out; and
    whether tokens stand for `text`."""
    counts = {"train_tokens": corpus.train_tokens, "validation_tokens": corpus.validation_tokens}
    known: dict[str, int | bool | None] = dict.fromkeys(counts) if corpus.endless else {**counts}
    return {**known, "text": corpus.tokenizer_path is not None}


def _finished(recipe: Recipe, first_step: int) -> dict[str, Any] | None:
    """Returns the summary that the run wrote earlier after `first_step` steps, if no step is left to do; None if steps are left, or
    if that summary does not exist."""
    if first_step < recipe.train.steps:
        return None
    summary = final_summary(Path(recipe.run.dir))
    return {**summary, "ended": "done", "steps": recipe.train.steps} if summary.get("step") == first_step else None


def _ceiling(state: TrainerState, communicator: Communicator) -> float:
    """Returns the FLOP/s that matrix multiplication reaches, summed over all ranks, which measure at the same time. Collective."""
    meet(communicator.world)
    dtype = getattr(torch, state.recipe.train.stored_dtype)
    return total(matmul_ceiling(dtype, state.device, torch.get_num_threads()), communicator.world)


def _sinks(recipe: Recipe, first_step: int) -> list[Sink]:
    run_dir = Path(recipe.run.dir)
    sinks: list[Sink] = [JsonlSink(RunDirectory(run_dir).metrics, first_step)]
    if recipe.log.wandb != "disabled":
        patience = min(recipe.comm.timeout_seconds, recipe.restart.hang_seconds or math.inf) / 4  # the other ranks wait meanwhile
        log = recipe.log
        sinks.append(WandbSink(run_dir, log.wandb_project, recipe.run.name, log.wandb, asdict(recipe), patience))
    if recipe.log.progress != "off":
        sinks.append(Progress(recipe.train.steps, recipe.log.every, recipe.log.progress))
    return sinks


def _parameters(state: TrainerState) -> int:
    """Returns the number of elements of the whole model's parameters, each counted once. Collective."""
    return int(total(state.engine.parameters, state.mesh.group("world")))
