"""The counter of tensor bytes: against hand-made programs, against torch's profiler, and that it changes no bit."""

import threading
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bagualu.comm.group import Communicator
from bagualu.parallel.pipeline.layer_slice import LayerSlice
from bagualu.trainer.assemble import assemble
from bagualu.trainer.costs.tensor_memory import TensorMemory
from bagualu.trainer.data.corpus import prepare
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.decoder.model import Decoder
from bagualu.trainer.recipe.config import Recipe
from bagualu.trainer.step import train_step
from tests.harness import run
from tests.parity import pieces_of, small_recipe

KIB = 1024


def kib(count: int) -> torch.Tensor:
    return torch.zeros(count * KIB, dtype=torch.uint8)


def test_a_storage_counts_once_and_until_it_is_freed() -> None:
    before = kib(5)
    with TensorMemory() as memory:
        memory.hold([before, before[:10]])
        first = kib(10)
        views = first.view(2, -1), first[3:], first.detach()
        first.add_(1)
        assert memory.bytes == memory.peak == 15 * KIB
        second = kib(20)
        del second
        assert memory.bytes == 15 * KIB
        del first, views
        third = kib(2)
        assert memory.bytes == 7 * KIB
    kib(100)  # after the context
    del third
    assert (memory.bytes, memory.peak) == (5 * KIB, 35 * KIB)


def test_what_exists_already_belongs_to_another_rank_unless_it_is_held() -> None:
    lent = kib(50)
    with TensorMemory() as memory:
        lent[:10].fill_(1)
        torch.add(lent, 1, out=lent)
        assert memory.peak == 0


class _Large(torch.autograd.Function):
    """Takes memory in its backward pass only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        kib(300)
        return grads[0]


def test_the_inside_of_a_backward_pass_counts() -> None:
    with TensorMemory() as memory:
        _Large.apply(torch.zeros(4, requires_grad=True)).sum().backward()
    assert 300 * KIB < memory.peak < 301 * KIB


def test_a_storage_that_is_resized_counts_as_large_as_it_is() -> None:
    gathered = kib(100)
    gathered.untyped_storage().resize_(0)
    with TensorMemory() as memory:
        memory.hold([gathered])
        own = kib(30)
        assert (memory.bytes, memory.peak) == (30 * KIB, 30 * KIB)
        gathered.untyped_storage().resize_(90 * KIB)
        more = kib(10)
        assert memory.peak == 130 * KIB
        gathered.untyped_storage().resize_(0)
        large = kib(80)
        assert (memory.bytes, memory.peak) == (120 * KIB, 130 * KIB)
        del own, more, large
        kib(1)
    assert (memory.bytes, memory.peak) == (0, 130 * KIB)


def test_an_operation_that_resizes_its_result_is_seen() -> None:
    with TensorMemory() as memory:
        result = torch.empty(0, dtype=torch.uint8)
        torch.add(kib(20), 1, out=result)
        assert (memory.bytes, memory.peak) == (20 * KIB, 40 * KIB)
        result.resize_(50 * KIB)
    assert memory.peak == 50 * KIB


@pytest.mark.parametrize("living", [100, 200])
def test_a_tensor_costs_the_same_however_many_there_are(living: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one of them sets a new peak."""
    reads, nbytes = list[int](), torch.UntypedStorage.nbytes

    def counted(storage: torch.UntypedStorage) -> int:
        reads.append(nbytes(storage))
        return reads[-1]

    empty = [kib(1) for _ in range(3)]
    for tensor in empty:
        tensor.untyped_storage().resize_(0)
    monkeypatch.setattr(torch.UntypedStorage, "nbytes", counted)
    with TensorMemory() as memory:
        memory.hold(empty)
        reads.clear()
        tensors = [kib(1) for _ in range(living)]
    assert memory.peak == living * KIB == sum(tensor.nbytes for tensor in tensors)
    assert len(reads) <= (len(empty) + 2) * living


def test_another_thread_may_free_what_this_one_made() -> None:
    with TensorMemory() as memory:
        held = [kib(10)]
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        kib(4)
    assert (memory.bytes, memory.peak) == (0, 10 * KIB)


def test_it_counts_what_torchs_profiler_counts() -> None:
    model = Decoder(ModelConfig(2, 64, 4, 4, 160, 512), [LayerSlice.of_layers(range(2))])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.randint(0, 512, (2, 128))

    def passes() -> None:
        model(tokens, tokens)[0].backward()
        for parameter in model.parameters():
            parameter.grad = None

    passes()  # what is kept of it, such as the angles of positions, exists from now on
    with TensorMemory() as memory:
        passes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        passes()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        held += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, held)
    assert memory.peak == most


def steps(communicator: Communicator, recipe: Recipe, counts: bool) -> list[Any]:
    state = assemble(recipe, communicator, prepare(recipe.data, recipe.model.vocab))
    for step in range(2):
        if counts:
            with TensorMemory():
                train_step(state, step)
        else:
            train_step(state, step)
    return [piece[-1] for piece in pieces_of(state)]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_step_has_the_same_bits_while_it_is_counted(dtype: str, recompute: str) -> None:
    mixture = {"model__moe__experts": 4, "model__moe__ffn": 8, "model__moe__shared_experts": 1, "model__moe__every": 2}
    recipe = small_recipe(train__dtype=dtype, train__recompute=recompute, train__micro_batch=2, **mixture)
    (counted,), (plain,) = (run("gloo", 1, steps, recipe, counts) for counts in (True, False))
    assert all((one == other).all() for one, other in zip(counted, plain, strict=True))
