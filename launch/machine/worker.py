"""What a rank does for `bagualu doctor`: the functions that the launcher starts on each worker in place of the trainer."""

import resource
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bagualu.comm.group import Communicator
from bagualu.comm.objects import broadcast_json, gather_json
from bagualu.launch.machine import links, plan, products
from bagualu.launch.machine.figures import OperatorSample, RankFigures, VariantTime, by_octave, of_all, rank_figures, usual
from bagualu.launch.machine.plan import MeasuringPlan, Sample
from bagualu.parallel.precision import chip_of
from bagualu.parallel.simulation.events import Operator
from bagualu.parallel.simulation.measured_times import dtype_of, work_of
from bagualu.trainer.costs.cache import device_name
from bagualu.trainer.costs.operator_cases import cases_of
from bagualu.trainer.costs.operator_times import measurable, times_of
from bagualu.trainer.costs.work import work_of as work_of_model
from bagualu.trainer.data.config import RANDOM, DataConfig
from bagualu.trainer.data.corpus_cache import cache_folder
from bagualu.trainer.models.decoder.config import ModelConfig, MoEConfig
from bagualu.trainer.recipe.config import Recipe, TrainConfig
from bagualu.trainer.recipe.device_memory import cpu_bytes
from bagualu.trainer.simulation.timed import Timed, operator_times, step_seconds

_STEPS = 4
"""Steps of a sample that are timed."""
_LEAST_SECONDS = 1e-6
"""Python starts no operator sooner than that."""


class Stopped(Exception):
    """The user has asked to stop."""


def measure(recipe: Recipe, communicator: Communicator, stop: Callable[[], bool], scratch: Path | None = None) -> dict[str, Any]:
    """Returns the figures of the mean rank, as `RankFigures.as_dict` does; an empty dictionary if the user has asked to stop."""
    return _measure(recipe, communicator, stop, plan.FULL)


def measure_quickly(
    recipe: Recipe, communicator: Communicator, stop: Callable[[], bool], scratch: Path | None = None
) -> dict[str, Any]:
    """Does the same as `measure` with few shapes and sizes, in seconds."""
    return _measure(recipe, communicator, stop, plan.QUICK)


def check(recipe: Recipe, communicator: Communicator, stop: Callable[[], bool], scratch: Path | None = None) -> dict[str, Any]:
    """Returns whether the sum of a one from each rank is the number of ranks."""
    ones = torch.ones(1024, device=communicator.device)
    communicator.world.all_reduce(ones)
    return {"works": ones.tolist() == [float(communicator.size)] * ones.numel()}


def _measure(recipe: Recipe, communicator: Communicator, stop: Callable[[], bool], how: MeasuringPlan) -> dict[str, Any]:
    def meet() -> None:
        """Waits for the other ranks. Raises Stopped on all of them if the first was asked to stop."""
        if broadcast_json(stop(), communicator.world) if communicator.size > 1 else stop():
            raise Stopped

    try:
        own = figures_of_rank(communicator, how, meet, cache_folder(recipe.data))
    except Stopped:
        return {}
    return of_all([rank_figures(each) for each in gather_json(own.as_dict(), communicator.world)]).as_dict()


def figures_of_rank(communicator: Communicator, how: MeasuringPlan, meet: Callable[[], None], cache: Path) -> RankFigures:
    """Returns what this rank measures; `meet` waits for the others. The first rank keeps times of variants in `cache`."""
    device = communicator.device
    on_cpu = device.type == "cpu"
    before = _used_bytes(device)
    times, spread = products.product_times(plan.DTYPES, device, how, meet)
    copies = products.copy_bytes_per_second(device, how, meet)
    return RankFigures(
        ranks=communicator.size,
        device=device.type,
        name=device_name(device),
        threads=torch.get_num_threads(),
        memory_bytes=cpu_bytes() // communicator.size if on_cpu else _gpu_bytes(device),
        context_bytes=before,
        products=times,
        copy_bytes_per_second=copies,
        launch_seconds=_between_operators(how, meet) if on_cpu else products.launch_seconds(device, how.rounds),
        operators=_operators(how, meet) if on_cpu else [],
        variants=list(_variants(how, device, cache)) if communicator.rank == 0 else [],
        links=links.link_times(communicator.world, how) if communicator.size > 1 else [],
        cores=_multiprocessors(device),
        spread=spread,
    )


def _used_bytes(device: torch.device) -> int:
    """Returns the memory that the rank uses without tensors: of a CPU the process's, of a GPU the driver's."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.mm(torch.ones(2, 2, device=device), torch.ones(2, 2, device=device))  # the library for products is part of the context
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def _gpu_bytes(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[1])


def _multiprocessors(device: torch.device) -> int | None:
    """Returns the number of streaming multiprocessors of a GPU; None for other devices."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else None


def _operators(how: MeasuringPlan, meet: Callable[[], None]) -> list[OperatorSample]:
    """Returns the times of all operators but products of two matrices in steps of the sample models."""
    return by_octave(
        [
            OperatorSample(operator.name, dtype_of(operator), work_of(operator), seconds)
            for sample in how.samples
            for operator, seconds in _one_step(recipe_of(sample), meet)
            if not _is_product(operator)
        ]
    )


def _variants(how: MeasuringPlan, device: torch.device, cache: Path) -> Iterator[VariantTime]:
    """Yields the times of operators with several variants, as a run takes them: kept ones, or new ones that are kept."""
    for recipe in map(recipe_of, how.variants):
        for case in cases_of(work_of_model(recipe, recipe.validate(1))):
            if len(measurable(case.operator, chip_of(device))) > 1:
                for name, seconds in times_of(case, device, cache).items():
                    yield VariantTime(case.operator, name, case.dtype, asdict(case.shape), seconds)


def _one_step(recipe: Recipe, meet: Callable[[], None]) -> list[Timed]:
    """Returns the operators of a step, each with its usual time in several steps, which do the same."""
    timed = operator_times(recipe, _STEPS, meet)
    count = len(timed) // _STEPS
    return [(timed[index][0], usual(seconds for _, seconds in timed[index::count])) for index in range(count)]


def _between_operators(how: MeasuringPlan, meet: Callable[[], None]) -> float:
    """Returns the time of a step that is spent outside operators, for each of them: in Python, and in starting them. The model is
    so small that this is much of the step, and so large that the processor finds no more in its caches than in other steps."""
    recipe = recipe_of(how.between)
    inside = [seconds for _, seconds in _one_step(recipe, meet)]
    return max(_LEAST_SECONDS, (usual(step_seconds(recipe, 2 * _STEPS, meet)) - sum(inside)) / len(inside))


def _is_product(operator: Operator) -> bool:
    """Returns whether the operator is a product of two matrices, which product_times measures by shape."""
    return operator.flops > 0 and all(len(tensor.shape) <= 2 for tensor in operator.inputs)


def recipe_of(sample: Sample) -> Recipe:
    """Returns the recipe of a sample, whose heads are 64 wide, or one head if it is narrower."""
    model = ModelConfig(
        layers=sample.layers, hidden=sample.hidden, heads=max(1, sample.hidden // 64), ffn=sample.ffn, vocab=sample.vocab,
        moe=MoEConfig(experts=sample.experts, ffn=sample.ffn) if sample.experts else MoEConfig(),
    )  # fmt: skip
    data = DataConfig(source=RANDOM, sequence_length=sample.sequence_length, global_batch=sample.micro_batch)
    return Recipe(model=model, data=data, train=TrainConfig(steps=100, micro_batch=sample.micro_batch, dtype=sample.dtype))
