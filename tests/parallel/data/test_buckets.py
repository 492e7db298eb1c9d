"""Gradient buckets: what lies where, when they are reduced, and how much of the optimizer each rank holds."""

import threading
import time
from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import nn

from bagualu.comm import gloo
from bagualu.comm.group import Communicator, Group
from bagualu.parallel.boxes import Box
from bagualu.parallel.data.bucket import Bucket, build_buckets, gathering
from bagualu.parallel.data.reducer import GradientReducer
from bagualu.parallel.data.shard import norm_squared
from bagualu.parallel.layout import Layout
from bagualu.parallel.mesh import Mesh
from bagualu.parallel.parallelize import parallelize
from bagualu.parallel.products import torch_products
from bagualu.parallel.sharding import Placement, ShardingPlan
from bagualu.trainer.costs.tensor_memory import TensorMemory
from bagualu.trainer.optim.config import OptimConfig
from bagualu.trainer.optim.groups import Treatment
from bagualu.trainer.optim.sharded import ShardedOptimizer
from tests.harness import BACKENDS, run

WIDTH = 5
PLAN = ShardingPlan((("*", Placement()),))


class Chain(nn.Module):
    """Linear layers of odd sizes; those in `skip` take no part."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.empty(WIDTH, WIDTH)) for _ in range(layers)])
        self.scale = nn.Parameter(torch.empty(3))

    def forward(self, x: torch.Tensor, skip: tuple[int, ...] = ()) -> torch.Tensor:
        for index, weight in enumerate(self.weights):
            if index not in skip:
                x = torch.tanh(x @ weight.T)
        return x.sum() * self.scale.sum()


def values(name: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator)[box.slices((0,) * len(shape))]


def treat(name: str, parameter: torch.nn.Parameter) -> Treatment:
    return OptimConfig().treatment(name, parameter.ndim)


def built(
    communicator: Communicator, zero: int, bucket_bytes: int, layers: int = 6, dtype: torch.dtype = torch.float64
) -> tuple[Chain, list[Bucket], GradientReducer]:
    mesh = Mesh.build(Layout(data=communicator.size), communicator)
    with torch.device("meta"):
        model = Chain(layers)
    parallelize(model, PLAN, mesh, False, dtype, values)
    buckets = build_buckets(list(model.named_parameters()), PLAN, mesh, zero, bucket_bytes, treat=treat)
    reducer = GradientReducer(buckets, mesh)
    reducer.lend()
    return model, buckets, reducer


def check_cover(communicator: Communicator, zero: int, bucket_bytes: int) -> list[tuple[str, int, int]]:
    """(name, start in the parameter, elements) that this rank's shards hold; weights are views of the buckets."""
    model, buckets, _ = built(communicator, zero, bucket_bytes)
    sizes = [sum(e.parameter.numel() for e in bucket.entries) * 8 for bucket in buckets]
    for bucket, size in zip(buckets, sizes, strict=True):
        assert bucket.weights.numel() % communicator.size == 0
        assert bucket.weights.numel() - size // 8 < 8 * communicator.size, "shards are whole multiples of eight elements"
        assert size - bucket.entries[-1].parameter.numel() * 8 < bucket_bytes, "closed as soon as it is full"
        assert len({entry.parameter.ndim >= 2 for entry in bucket.entries} | {bucket.kind.treatment.weight_decay > 0}) == 1
        for entry in bucket.entries:
            place = bucket.weights[entry.start : entry.start + entry.parameter.numel()]
            assert place.data_ptr() == entry.parameter.data_ptr()
            assert torch.equal(place, values(entry.name, entry.global_shape, entry.box).double().flatten())
    names = [entry.name for bucket in buckets for entry in bucket.entries]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    matrices = [name for name in names if name != "scale"]
    assert matrices == sorted(matrices, reverse=True), "last to first, as the backward pass finishes them"
    assert all(size >= bucket_bytes for size in sizes[:-2]), "only the last one of each kind may be left open"
    held = []
    for bucket in buckets:
        for entry, in_shard, in_parameter, numel in bucket.shard_entries():
            flat = entry.parameter.detach().flatten()[in_parameter : in_parameter + numel]
            assert torch.equal(bucket.shard_weights[in_shard : in_shard + numel], flat)
            held.append((entry.name, in_parameter, numel))
    return held


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("bucket_bytes", [1, 200, 201, 450, 10**6])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_element_is_in_one_place(size: int, bucket_bytes: int, zero: int) -> None:
    held = run("simulated", size, check_cover, zero, bucket_bytes)
    ranks = held if zero else held[:1]
    for name, numel in [*((f"weights.{i}", WIDTH * WIDTH) for i in range(6)), ("scale", 3)]:
        pieces = sorted((start, count) for rank in ranks for own, start, count in rank if own == name)
        assert [start for start, _ in pieces] == [sum(count for _, count in pieces[:i]) for i in range(len(pieces))]
        assert sum(count for _, count in pieces) == numel
    assert all(rank == held[0] for rank in held) or zero


def reduced(communicator: Communicator, zero: int) -> None:
    """Gradients over ranks, micro-batches and steps; a parameter that took part before does not when it is skipped."""
    model, buckets, reducer = built(communicator, zero, 300)
    for skips in [[(), ()], [(2,), (2,)], [(2, 5), (2, 3)], [(), (0,)]]:
        reducer.begin(len(skips))
        expected = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
        for micro_batch, skip in enumerate(skips):
            for rank in range(communicator.size):
                x = torch.randn(4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * micro_batch + rank))
                twin = Chain(6).double()
                twin.load_state_dict(model.state_dict())
                twin(x, skip).backward()
                for name, parameter in twin.named_parameters():
                    expected[name] += 0 if parameter.grad is None else parameter.grad
                if rank == communicator.rank:
                    model(x, skip).backward()
        reducer.finish()
        for bucket in buckets:
            for entry, in_shard, in_parameter, numel in bucket.shard_entries():
                found = bucket.shard_gradients[in_shard : in_shard + numel]
                wanted = expected[entry.name].flatten()[in_parameter : in_parameter + numel]
                torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12, msg=f"{entry.name} {skips}")
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_gradients_are_summed_and_those_of_skipped_parameters_are_zero(backend: str, zero: int, size: int) -> None:
    run(backend, size, reduced, zero)


def held_in_a_step(communicator: Communicator, zero: int, micro_batches: int) -> list[bool]:
    """Whether the buckets have gradients after an earlier step, when the next one has begun, in its backward pass, and after it;
    padding is zero."""
    model, buckets, reducer = built(communicator, zero, WIDTH * WIDTH * 8)
    seen: list[bool] = []

    def look() -> None:
        matrices = [bucket for bucket in buckets if bucket.entries[0].name != "scale"]
        seen.append(any(bucket.gradients.numel() for bucket in matrices))
        seen.append(all(bucket.gradients.numel() for bucket in matrices))

    for _ in range(2):
        seen.clear()
        look()
        reducer.begin(micro_batches)
        look()
        x = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)
        for _ in range(micro_batches):
            first = torch.tanh(x @ model.weights[0].T)
            first.register_hook(lambda _: look())
            rest = first
            for weight in list(model.weights)[1:]:
                rest = torch.tanh(rest @ weight.T)
            (rest.sum() * model.scale.sum()).backward()
        reducer.finish()
        look()
        for bucket in buckets:
            padded = bucket.gradients[bucket.entries[-1].start + bucket.entries[-1].parameter.numel() :]
            assert (padded == 0).all()
    return seen


@pytest.mark.parametrize(("size", "zero", "freed"), [(1, 1, True), (2, 0, True), (2, 1, False)])
def test_gradients_leave_their_memory_to_the_only_forward_pass(size: int, zero: int, freed: bool) -> None:
    before, begun, in_backward, after = [True] * 2, [False] * 2 if freed else [True] * 2, [True, not freed], [True] * 2
    for seen in run("simulated", size, held_in_a_step, zero, 1):
        assert seen == [*before, *begun, *in_backward, *after]
    for seen in run("simulated", size, held_in_a_step, zero, 2):
        assert all(seen), "gradients of the first micro-batch stay for the second"


def steps_of_one_who_reads_late(communicator: Communicator) -> None:
    model, buckets, reducer = built(communicator, 1, 2**20)
    assert all(bucket.lent for bucket in buckets)
    for step in range(1, 4):
        reducer.begin(1)
        loss = sum(((communicator.rank + 1) * step * parameter).sum() for parameter in model.parameters())
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        reducer.finish()
        for bucket in buckets:
            used = [bucket.shard_gradients[start : start + numel] for _, start, _, numel in bucket.shard_entries()]
            assert all((part == 3 * step).all() for part in used), f"step {step}: {used}"


def test_gradients_are_not_written_again_while_somebody_reads_them() -> None:
    run("gloo", 2, reading_late, steps_of_one_who_reads_late)


def reading_late(communicator: Communicator, function: Callable[[Communicator], None]) -> None:
    summed = gloo._sum

    def late(parts: list[torch.Tensor], output: torch.Tensor) -> None:
        time.sleep(0.05 * communicator.rank)
        summed(parts, output)

    gloo._sum = late
    try:
        function(communicator)
    finally:
        gloo._sum = summed


def events(communicator: Communicator, log: dict[int, list[str]], zero: int, micro_batches: int) -> None:
    """A backward pass that notes when each layer's gradient is made."""
    model, _, reducer = built(communicator, zero, WIDTH * WIDTH * 8, layers=4)
    own = log[communicator.rank] = []
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    reducer.begin(micro_batches)
    for _ in range(micro_batches):
        for index, weight in enumerate(model.weights):
            weight.register_hook(lambda _, i=index: own.append(f"gradient {i}"))
        own.append("backward")
        model(x).backward()
        own.append("end")
        for weight in model.weights:
            weight._backward_hooks.clear()
    reducer.finish()


@pytest.mark.parametrize("zero", [0, 1])
def test_a_bucket_is_on_its_way_before_the_next_gradient_is_made(monkeypatch: pytest.MonkeyPatch, zero: int) -> None:
    log: dict[int, list[str]] = {}
    place = threading.current_thread  # a rank is a thread here
    for name in ("reduce_scatter", "all_reduce"):
        original = getattr(Group, name)

        def note(group: Group, *args: torch.Tensor, original=original, **options: bool):  # type: ignore[no-untyped-def]
            if options.get("asynchronous"):
                log[int(place().name.removeprefix("rank-"))].append("reduce")
            return original(group, *args, **options)

        monkeypatch.setattr(Group, name, note)
    run("simulated", 2, events, log, zero, 2)
    first = ["backward", "gradient 3", "gradient 2", "gradient 1", "gradient 0", "end"]
    last = ["backward", "gradient 3", "reduce", "gradient 2", "reduce", "gradient 1", "reduce", "gradient 0", "reduce", "end"]
    for own in log.values():
        reductions = [event for event in own if event == "reduce"]
        assert len(reductions) == 5
        without_scale = [event for event in own if event != "reduce"]
        assert without_scale == first + first
        assert own[:6] == first, "nothing is reduced before the last micro-batch"
        assert own[6:] == [*last[:-1], "reduce", "end"], "in the order of the buckets; scale's is the last one"


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_zero_1_holds_a_share_of_masters_and_moments_and_zero_0_all(size: int) -> None:
    total = 6 * WIDTH * WIDTH + 3

    def elements(communicator: Communicator, zero: int) -> tuple[int, int, int]:
        _, buckets, _ = built(communicator, zero, 500, dtype=torch.bfloat16)
        optimizer = ShardedOptimizer(buckets, OptimConfig())
        assert all(value.dtype == torch.float32 for shard in optimizer.shards() for value in shard.values())
        numel = {kind: sum(shard[kind].numel() for shard in optimizer.shards()) for kind in optimizer.shards()[0]}
        return numel["weight"], numel["exp_avg"] + numel["exp_avg_sq"], len(buckets)

    for masters, moments, buckets in run("simulated", size, elements, 1):
        assert moments == 2 * masters
        assert total / size <= masters < total / size + 8 * buckets  # less than eight elements of padding a bucket
    for masters, _, buckets in run("simulated", size, elements, 0):
        assert total <= masters < total + 8 * size * buckets


def alive(communicator: Communicator, bucket_bytes: int) -> tuple[int, int, int]:
    """Most bytes of whole gradients that this rank holds at any time of a step under ZeRO-2; those of all buckets; of shards."""
    model, buckets, reducer = built(communicator, 2, bucket_bytes, layers=24)
    whole = sum(bucket.weights.numel() * 8 for bucket in buckets)
    most, prepare = 0, reducer.prepare

    def watched(bucket: Bucket) -> None:
        nonlocal most
        prepare(bucket)
        in_flight = sum(result.untyped_storage().nbytes() for _, _, result in reducer._in_flight)
        most = max(most, in_flight + sum(bucket.gradients.nbytes for bucket in buckets))

    reducer.prepare = watched  # type: ignore[method-assign]
    for _ in range(2):
        reducer.begin(3)
        for _ in range(3):
            model(torch.ones(2, WIDTH, dtype=torch.float64)).backward()
        reducer.finish()
        assert not any(bucket.gradients.numel() for bucket in buckets), "nothing of them is left between steps"
    return most, whole, sum(bucket.shard_gradients.nbytes for bucket in buckets)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_2_holds_a_share_of_the_gradients_and_few_buckets_while_it_adds(backend: str) -> None:
    for most, whole, shards in run(backend, 2, alive, 600):
        assert shards == whole / 2
        assert most <= 4 * 1200 < whole, "two that are reduced, one that is added to, and that of scale"


class Ends(nn.Module):
    """A chain between two large matrices, such as those of an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(WIDTH, 200))
        self.chain = Chain(8)
        self.last = nn.Parameter(torch.empty(200, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.chain(x @ self.first.T) + (x @ self.last).sum()


def held_with_large_ends(communicator: Communicator) -> int:
    """Most bytes of tensors that exist while two micro-batches are computed, beyond what existed before and activations."""
    mesh = Mesh.build(Layout(data=communicator.size), communicator)
    with torch.device("meta"):
        model = Ends()
    parallelize(model, PLAN, mesh, False, torch.float64, values)
    buckets = build_buckets(list(model.named_parameters()), PLAN, mesh, 2, 400, treat=treat)
    reducer = GradientReducer(buckets, mesh)
    reducer.begin(2)
    with TensorMemory() as memory:
        for _ in range(2):
            model(torch.ones(1, 200, dtype=torch.float64)).backward()
        reducer.finish()
    return memory.peak


def test_of_large_buckets_only_one_is_held_under_zero_2() -> None:
    large = 200 * WIDTH * 8
    for most in run("gloo", 2, held_with_large_ends):
        assert most < 3 * large, "its gradients, half of them once more from the other rank, and those that autograd adds to them"


def updated(communicator: Communicator) -> None:
    model, buckets, _ = built(communicator, 1, 300)
    with gathering() as gather:
        for bucket in buckets:
            bucket.shard_weights.fill_(float(communicator.rank))
            gather(bucket)
    for bucket in buckets:
        shard = bucket.shard_gradients.numel()
        assert bucket.weights.tolist() == [float(rank) for rank in range(communicator.size) for _ in range(shard)]
    assert sum(prod(p.shape) for p in model.parameters()) == 6 * WIDTH * WIDTH + 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_gathering_gives_everybody_every_shard(backend: str) -> None:
    run(backend, 3, updated)


def one_parameter(communicator: Communicator, rows: int, bucket_bytes: int) -> float:
    model = Chain(0)
    model.weights.append(nn.Parameter(torch.empty(rows, WIDTH)))
    mesh = Mesh.build(Layout(), communicator)
    model.to("meta")
    parallelize(model, PLAN, mesh, False, torch.float32, values)
    buckets = build_buckets(list(model.named_parameters()), PLAN, mesh, zero=1, bucket_bytes=bucket_bytes)
    for bucket in buckets:
        bucket.gradients.fill_(0.1)
    elements = sum(entry.parameter.numel() for bucket in buckets for entry in bucket.entries)
    exact = float(torch.tensor(0.1)) * elements**0.5
    return abs(float(sum(norm_squared(bucket.shard_gradients) for bucket in buckets)) ** 0.5 - exact) / exact


def test_the_norm_of_a_large_float32_bucket_loses_no_digits() -> None:
    """One float32 sum over these 8 million equal squares is wrong in the fourth digit on one thread."""
    assert run("simulated", 1, one_parameter, 1_600_000, 2**40)[0] < 1e-6


def put_off_and_done(communicator: Communicator) -> None:
    """Products that are put off are counted, and their bucket reduced, when they are done, in whatever order."""
    mesh = Mesh.build(Layout(), communicator)
    with torch.device("meta"):
        model = Chain(2)
    parallelize(model, PLAN, mesh, False, torch.float64, values)
    buckets = build_buckets(list(model.named_parameters()), PLAN, mesh, zero=1, bucket_bytes=1)
    reducer = GradientReducer(buckets, mesh)
    left, right, sink = torch.randn(2, WIDTH, 3).double(), torch.randn(2, 3, WIDTH).double(), model.weights[0].gradient_sink
    reducer.begin(2)
    bucket = sink.bucket
    later = []
    for m in range(2):
        sink.view.fill_(7.0)
        with reducer.putting_off() as put_off:
            sink.add_products(torch_products, [left[m].T], [right[m]])
        assert (sink.view == 7.0).all()
        assert bucket.pending == 2
        later.append(put_off)
    for put_off in reversed(later):
        for do in put_off:
            do()
    assert bucket.pending == 0
    torch.testing.assert_close(sink.view, left[0] @ right[0] + left[1] @ right[1])


def test_gradients_of_weights_can_be_put_off() -> None:
    run("simulated", 1, put_off_and_done)
