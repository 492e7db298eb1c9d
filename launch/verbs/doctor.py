"""`bagualu doctor`: what this machine can do, measured as a run uses it, and what is wrong with it. Writes cluster=this."""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from bagualu.comm.cluster_file import THIS, load_cluster
from bagualu.comm.config import AUTO
from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.files import write_atomic
from bagualu.launch.machine import worker_names
from bagualu.launch.machine.cluster_text import cluster_text
from bagualu.launch.machine.disk import DiskFigures, disk_figures
from bagualu.launch.machine.facts import Facts, facts
from bagualu.launch.machine.figures import RankFigures, VariantTime, rank_figures
from bagualu.launch.machine.fit_links import fit
from bagualu.launch.machine.plan import FULL, QUICK
from bagualu.launch.machine.problems import MachineProblem, problems
from bagualu.launch.verbs.command_line import DOCTOR_KEYS, SEVERAL, CommandLine
from bagualu.launch.workers.run import call_on_workers
from bagualu.trainer.data.config import RANDOM, DataConfig
from bagualu.trainer.data.corpus_cache import cache_folder
from bagualu.trainer.process.failure import DONE, FAILED, INTERRUPTED, os_error
from bagualu.trainer.process.stop_request import StopRequest
from bagualu.trainer.recipe.choose_backend import choose_backend, registered
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe

_MOST_RANKS = 8
"""The most workers that are measured together on CPUs, unless launch.workers asks for more."""
_WORKS = "works"


@dataclass(frozen=True)
class _Diagnosis:
    facts: Facts
    backends: dict[str, str]
    """For each backend "works", or why it does not."""
    measured: list[RankFigures]
    """By number of ranks, the fewest first."""
    disk: DiskFigures | None
    problems: list[MachineProblem]
    cluster_file: Path | None
    """The file of cluster=this; None if nothing could be measured."""
    cluster_written: bool
    """Whether the figures were written into that file; otherwise it keeps those of a full measurement."""


def doctor(request: CommandLine) -> tuple[int, Any]:
    """Measures this machine, writes cluster=this and prints a report. Returns the exit code and the object that --json prints.
    Raises RecipeError, and OSError if the cluster cannot be written."""
    recipe = _recipe(request.overrides)
    stop = StopRequest()
    found = _examine(recipe, request.quick, stop)
    if found is None:
        print("bagualu: stopped; nothing was written", file=sys.stderr)
        return INTERRUPTED, {"ended": "interrupted"}
    if not request.json:
        print("\n".join(_report(found)))
    return DONE if found.measured else FAILED, _document(found)


def _recipe(arguments: Sequence[str]) -> Recipe:
    """Returns a recipe with the keys that `arguments` set. Raises RecipeError for a key that changes nothing here."""
    for argument in arguments:
        key = argument.partition("=")[0]
        if key not in DOCTOR_KEYS:
            near = get_close_matches(key, DOCTOR_KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(DOCTOR_KEYS)}"
            raise RecipeError(f"doctor has no key {key}; {hint}")
    recipe = compose(arguments, SEVERAL["doctor"])
    known = (AUTO, *(name for name in registered() if name != "simulated"))
    if recipe.comm.backend not in known:  # simulated: threads of a process have no links to measure
        raise RecipeError(f"comm.backend={recipe.comm.backend} cannot be measured; give one of {', '.join(known)}")
    for part in (recipe.run, recipe.data, recipe.comm, recipe.launch):
        part.validate()
    return recipe


def _examine(recipe: Recipe, quick: bool, stop: StopRequest) -> _Diagnosis | None:
    """Measures everything; returns None if the user has asked to stop."""
    seen = facts()
    backend, disk, disk_error = _backend(recipe, seen), None, ""
    try:
        disk = disk_figures(Path(recipe.run.dir), (QUICK if quick else FULL).disk_bytes)
    except OSError as error:
        disk_error = os_error(error)
    measured, states = [], dict.fromkeys(registered(), "")
    for ranks in _numbers(recipe, seen, backend):
        _say(f"measuring {ranks} rank{'s' * (ranks > 1)} with comm.backend={backend}")
        outcome = _call(recipe, backend, ranks, worker_names.MEASURE_QUICKLY if quick else worker_names.MEASURE, stop)
        if stop() or outcome == {}:
            return None
        states[backend] = outcome if isinstance(outcome, str) else _WORKS
        if isinstance(outcome, str):
            break
        measured.append(rank_figures(outcome))
    for name in states:
        states[name] = states[name] or _state(recipe, name, seen, stop)
        if stop():
            return None
    cache = cache_folder(recipe.data)
    cluster = cache / f"{THIS}.yaml" if measured else None
    written = cluster is not None and not (quick and _measured_fully(cache))
    if cluster is not None and written:
        _write(cluster, cluster_text(measured, disk, quick))
    return _Diagnosis(seen, states, measured, disk, problems(seen, states, disk, measured, disk_error), cluster, written)


def _say(text: str) -> None:
    print(f"bagualu: {text}", file=sys.stderr, flush=True)


def _backend(recipe: Recipe, seen: Facts) -> str:
    """Returns the backend that a run uses here: that of the recipe or, for auto, NCCL if there are GPUs that torch can use."""
    return choose_backend(recipe, max(1, seen.gpus))[1].backend


def _numbers(recipe: Recipe, seen: Facts, backend: str) -> list[int]:
    """Returns the numbers of ranks to measure: with GPUs, one each; else powers of two, up to one for each core."""
    if recipe.launch.workers is not None:
        return [recipe.launch.workers]
    if backend != "gloo":
        return [max(1, seen.gpus)]
    numbers, most = [1], min(seen.cores, _MOST_RANKS)
    while numbers[-1] * 2 <= most:
        numbers.append(numbers[-1] * 2)
    return numbers


def _call(recipe: Recipe, backend: str, ranks: int, entrypoint: str, stop: StopRequest) -> dict[str, Any] | str:
    """Returns what `entrypoint` returned on the first of `ranks` workers, or as text why it failed."""
    with tempfile.TemporaryDirectory(prefix="bagualu-doctor-") as folder:
        any_recipe = Recipe(
            run=replace(recipe.run, dir=folder),
            data=DataConfig(source=RANDOM, global_batch=ranks, cache=recipe.data.cache),
            comm=replace(recipe.comm, backend=backend),
            launch=replace(recipe.launch, workers=ranks),
            restart=replace(recipe.restart, limit=0),
        )
        ended = call_on_workers(any_recipe, ranks, entrypoint, stop)
    return ended.failure.cause if ended.failure is not None else ended.summary or {}


def _state(recipe: Recipe, backend: str, seen: Facts, stop: StopRequest) -> str:
    """Returns "works", or why a backend that was not measured does not."""
    if backend == "simulated":
        return _WORKS  # threads and memory of one process
    if backend == "nccl" and not seen.gpus:
        return "no NVIDIA GPU here"
    if backend == "nccl" and not seen.torch_has_cuda:
        return "the installed torch is built without CUDA"
    _say(f"trying comm.backend={backend}")
    outcome = _call(recipe, backend, seen.gpus if backend == "nccl" else 2, worker_names.CHECK, stop)
    if isinstance(outcome, str):
        return outcome
    return _WORKS if outcome.get("works") else "it sums wrongly"


def _measured_fully(cache: Path) -> bool:
    """Returns whether the cache folder has a cluster=this that can be used and that no quick measurement wrote."""
    try:
        return not load_cluster(THIS, [cache]).quick
    except RecipeError:
        return False


def _write(path: Path, text: str) -> None:
    """Writes a file into the cache folder. Raises RecipeError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
    except OSError as error:
        raise RecipeError(f"cannot write {path} ({error.strerror}); give data.cache=FOLDER with room to write") from error


def _report(found: _Diagnosis) -> Iterator[str]:
    """Yields the lines of the report."""
    seen = found.facts
    versions = ", ".join(f"{name} {number}" for name, number in seen.versions.items() if number)
    yield f"versions   Python {seen.python}, {versions}"
    yield f"cpu        {seen.cpu}, {seen.cores} cores, {_bytes(seen.memory_bytes)}, {' '.join(seen.instructions)}"
    gpus = f"{seen.gpus} of {_bytes(seen.gpu_memory_bytes or 0)}" if seen.gpus else "none"
    yield f"gpu        {gpus}"
    yield f"backends   {', '.join(f'{name} {state}' for name, state in found.backends.items())}"
    for one in found.measured:
        yield from _of_ranks(one)
    if found.disk is not None:
        disk = found.disk
        yield (f"disk       {disk.path}: writes {_rate(disk.write_bytes_per_second)}, reads {_rate(disk.read_bytes_per_second)}, "
               f"{_bytes(disk.free_bytes)} free")  # fmt: skip
    if found.cluster_file is not None:
        keeps = "" if found.cluster_written else ", which keeps what was measured without --quick"
        yield f"cluster    cluster=this is {found.cluster_file}{keeps}"
    yield f"problems   {len(found.problems) or 'none'}"
    yield from (f"  {problem}" for problem in found.problems)


def _of_ranks(one: RankFigures) -> Iterator[str]:
    each = f"{one.threads} thread{'s' * (one.threads > 1)} each" if one.device == "cpu" else one.name
    yield f"{one.ranks} rank{'s' * (one.ranks > 1)}, {each}"
    peaks = ", ".join(f"{dtype} {rate / 1e12:.3g}" for dtype, rate in one.peaks().items())
    yield f"  products {peaks} TFLOP/s"
    yield f"  memory   {_rate(one.copy_bytes_per_second)} read and written, {one.launch_seconds * 1e6:.1f} us for each operator"
    yield from _of_variants(one.variants)
    if one.links:
        links = fit(one.links)
        yield f"  links    {_rate(links.bytes_per_second)}, {(links.latency_seconds + links.start_seconds) * 1e6:.0f} us"


def _of_variants(times: Sequence[VariantTime]) -> Iterator[str]:
    """Yields a line for each operator and shape, with the times of its variants, the least first."""
    key = attrgetter("name", "dtype", "shape")
    for (name, dtype, shape), group in groupby(times, key):
        each = ", ".join(f"{one.variant} {one.seconds * 1e3:.3g} ms" for one in sorted(group, key=attrgetter("seconds")))
        sizes = ", ".join(f"{what.replace('_', ' ')} {size}" for what, size in shape.items() if size)
        yield f"  {name} {each} ({sizes}, {dtype})"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.3g} GB/s"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _document(found: _Diagnosis) -> dict[str, Any]:
    """Returns the object that --json prints. Figures are those of each rank; those at the top are of the fewest ranks, which share
    least."""
    first = found.measured[0] if found.measured else None
    return {
        "devices": found.facts.devices(),
        "backends": [{"name": name, "works": state == _WORKS, "why": state} for name, state in found.backends.items()],
        "matmul_flops_per_second": first.peaks() if first else None,
        "memory_bytes_per_second": first.copy_bytes_per_second if first else None,
        "launch_seconds": first.launch_seconds if first else None,
        "links": [asdict(link) for one in found.measured for link in one.links],
        "disk": asdict(found.disk) if found.disk is not None else None,
        "operators": [{"ranks": one.ranks, **values} for one in found.measured for values in _operators(one)],
        "ranks": [_summary(one) for one in found.measured],
        "versions": {"python": found.facts.python, "system": found.facts.system, **found.facts.versions},
        "problems": [asdict(problem) for problem in found.problems],
        "cluster_file": str(found.cluster_file) if found.cluster_file is not None else None,
        "cluster_written": found.cluster_written,
    }


def _operators(one: RankFigures) -> list[dict[str, Any]]:
    """Returns the times of the model's operators, in each variant, and those of torch's operators."""
    return [*map(asdict, one.variants), *map(asdict, one.operators)]


def _summary(one: RankFigures) -> dict[str, Any]:
    return {
        "ranks": one.ranks,
        "device": one.device,
        "name": one.name,
        "threads": one.threads,
        "memory_bytes": one.memory_bytes,
        "matmul_flops_per_second": one.peaks(),
        "memory_bytes_per_second": one.copy_bytes_per_second,
        "launch_seconds": one.launch_seconds,
    }
