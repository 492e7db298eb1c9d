"""What is saved in any boxes is read back in any others, bit for bit; what is not whole is not saved."""

import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from bagualu.comm.group import Group
from bagualu.fault_tolerance.checkpoint.layout import blocks as blocks_module
from bagualu.fault_tolerance.checkpoint.layout import format
from bagualu.fault_tolerance.checkpoint.layout.format import DTYPES, CheckpointError
from bagualu.fault_tolerance.checkpoint.layout.manifest import encode, read_manifest
from bagualu.fault_tolerance.checkpoint.reading import load
from bagualu.fault_tolerance.checkpoint.reading.inspect import verify
from bagualu.fault_tolerance.checkpoint.reading.load import Checkpoint
from bagualu.fault_tolerance.checkpoint.saving.save import save
from bagualu.parallel.boxes import Box, TensorPiece

ALONE = Group("world", (0,), 0, None)


def random_bits(shape, dtype, seed):
    if dtype == "bool":
        return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).bool()
    bits = torch.randint(0, 256, (*shape, DTYPES[dtype][1]), generator=torch.Generator().manual_seed(seed))
    return bits.to(torch.uint8).view(getattr(torch, dtype)).view(shape)


def same_bits(a, b):
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def origin(shape):
    return (0,) * len(shape)


@st.composite
def partitions(draw, shape):
    """The tensor cut into boxes, again and again along any dim."""
    boxes = [Box(origin(shape), shape)]
    for _ in range(draw(st.integers(0, 7)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, box.shape[dim]))
        low, high = list(box.shape), list(box.shape)
        low[dim], high[dim] = cut, box.shape[dim] - cut
        offset = list(box.offset)
        offset[dim] += cut
        boxes += [Box(box.offset, tuple(low)), Box(tuple(offset), tuple(high))]
    return boxes


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_partition_over_four_ranks_reads_back_in_any_box(data, run_ranks):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), max_size=3)))
    dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    whole = random_bits(shape, dtype, data.draw(st.integers(0, 1000)))
    owned = [(box, data.draw(st.integers(0, 3))) for box in data.draw(partitions(shape))]
    block = data.draw(st.sampled_from([8, 24, 64, 16 * 2**20]))

    def pieces(rank):
        mine = [box for box, owner in owned if owner == rank]
        return [TensorPiece("t", shape, box.offset, whole[box.slices(origin(shape))]) for box in mine]

    with tempfile.TemporaryDirectory() as root, mock.patch.object(format, "BLOCK_BYTES", block):
        results = run_ranks(4, lambda group: save(Path(root), 3, pieces(group.rank), {}, group, 1))
        assert results == [Path(root, "step-00000003")] * 4
        assert verify(results[0]) == []
        checkpoint = Checkpoint(results[0])
        assert checkpoint.tensors == {"t": (shape, whole.dtype)}
        for _ in range(3):
            offset = tuple(data.draw(st.integers(0, n)) for n in shape)
            size = tuple(data.draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True))
            out = torch.zeros(size[::-1], dtype=whole.dtype).permute(tuple(range(len(size)))[::-1])  # any strides
            checkpoint.read("t", offset, out)
            assert same_bits(out, whole[Box(offset, size).slices(origin(shape))])


def test_metadata_and_special_shapes_come_back(tmp_path):
    metadata = {"layout": "one rank", "loss": 0.1 + 0.2, "list": [1, None, True], "big": 2**70}
    pieces = [TensorPiece("none", (0, 3), (0, 0), torch.empty(0, 3)), TensorPiece("scalar", (), (), torch.tensor(7))]
    checkpoint = Checkpoint(save(tmp_path / "deep" / "root", 0, pieces, metadata, ALONE, 1))
    assert (checkpoint.metadata, checkpoint.step) == (metadata, 0)
    checkpoint.read("none", (0, 0), torch.empty(0, 3))
    scalar = torch.tensor(0)
    checkpoint.read("scalar", (), scalar)
    assert scalar == 7


def test_shards_are_plain_safetensors(tmp_path, model, save_step):
    path = save_step(tmp_path, 4)[0]
    stored = load_file(path / "rank-00000.safetensors")
    assert stored.keys() == model(4).keys()
    assert all(same_bits(stored[name], tensor) for name, tensor in model(4).items())


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ({0: [(0, 2)], 1: [(3, 6)]}, "tensor w is not held exactly once: only 5 of 6"),
        ({0: [(0, 4)], 1: [(3, 6)]}, "tensor w is not held exactly once: .* overlap"),
        ({0: [(0, 3), (0, 3)], 1: [(3, 6)]}, "rank 0: .*tensor w: this rank gave the piece at .0,. twice"),
        ({0: [(0, 6)], 1: [(6, 8)]}, "rank 1: .*tensor w: the piece at .6,. of shape .2,. does not lie in .6,."),
    ],
)
def test_what_is_not_held_exactly_once_is_not_saved(tmp_path, run_ranks, left, pieces, message):
    def work(group):
        mine = [TensorPiece("w", (6,), (a,), torch.zeros(b - a)) for a, b in pieces[group.rank]]
        return save(tmp_path, 1, mine, {}, group, 1)

    for result in run_ranks(2, work):
        with pytest.raises(CheckpointError, match=message):
            raise result
    assert left(tmp_path) == []


def test_ranks_that_disagree_about_a_tensor_are_named(tmp_path, run_ranks):
    def work(group):
        half = torch.zeros(2, dtype=dtypes[group.rank])
        return save(tmp_path, 1, [TensorPiece("w", (4,), (2 * group.rank,), half)], {}, group, 1)

    dtypes = [torch.float32, torch.bfloat16]
    assert all("tensor w is" in str(error) and "on rank 1" in str(error) for error in run_ranks(2, work))


@pytest.mark.parametrize("metadata", [{"a": (1, 2)}, {1: "a"}, {"loss": float("nan")}, {"a": object()}])
def test_metadata_that_json_would_change_is_refused(tmp_path, metadata):
    with pytest.raises(CheckpointError, match="JSON"):
        save(tmp_path, 1, [], metadata, ALONE, 1)


@pytest.mark.parametrize(
    ("name", "offset", "out", "message"),
    [
        ("weight/b", (0, 0), torch.empty(6, 4), "tensor weight/b is not in it; the nearest is weight/a"),
        ("weight/a", (0, 0), torch.empty(7, 4), r"has shape \(6, 4\): no box of shape \(7, 4\)"),
        ("weight/a", (0,), torch.empty(6), r"has shape \(6, 4\)"),
        ("weight/a", (-1, 0), torch.empty(1, 4), r"no box of shape \(1, 4\) at \(-1, 0\)"),
        ("weight/a", (0, 0), torch.empty(6, 4).double(), "is stored as float32, not torch.float64"),
    ],
)
def test_reading_what_is_not_there_says_so(tmp_path, save_step, name, offset, out, message):
    checkpoint = Checkpoint(save_step(tmp_path, 4)[0])
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.read(name, offset, out)
    assert str(checkpoint.path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_region_nobody_holds_is_refused_before_anything_is_read(tmp_path, save_step):
    path = save_step(tmp_path, 4, 2)[0]
    manifest = read_manifest(path)
    tensor = manifest.tensors["weight/a"]
    manifest.tensors["weight/a"] = format.StoredTensor(tensor.shape, tensor.dtype, tensor.boxes[:1])
    (path / "manifest.json").write_bytes(encode(manifest))
    assert "only 12 of 24" in verify(path)[0]
    out = torch.zeros(6, 4)
    with pytest.raises(CheckpointError, match="tensor weight/a does not cover the tensor exactly once: only 12 of 24"):
        Checkpoint(path).read("weight/a", (0, 0), out)
    assert not out.any()


def test_a_few_rows_of_a_large_tensor_read_few_bytes(tmp_path):
    whole = torch.randn(64, 16)
    with mock.patch.object(format, "BLOCK_BYTES", 256):
        path = save(tmp_path, 1, [TensorPiece("w", (64, 16), (0, 0), whole)], {}, ALONE, 1)
    shard = path / "rank-00000.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1  # damage far from the rows that are wanted
    shard.write_bytes(raw)
    checkpoint, rows = Checkpoint(path), torch.zeros(2, 16)
    checkpoint.read("w", (5, 0), rows)
    assert same_bits(rows, whole[5:7])
    with pytest.raises(CheckpointError, match="does not match its hash in the block at byte"):
        checkpoint.read("w", (62, 0), rows)


def test_a_block_that_several_ask_for_is_read_once(tmp_path, monkeypatch):
    """The columns of a tensor, one by one: every block holds a part of each."""
    whole = torch.randn(64, 16)
    with mock.patch.object(format, "BLOCK_BYTES", 256):
        path = save(tmp_path, 1, [TensorPiece("w", (64, 16), (0, 0), whole)], {}, ALONE, 1)
    blocks = []

    def counted(*args):
        blocks.append(args[4])
        return blocks_module.read_blocks(*args)

    monkeypatch.setattr(load, "read_blocks", counted)
    columns = [torch.empty(64, 1) for _ in range(16)]
    Checkpoint(path).read_all([TensorPiece("w", (64, 16), (0, column), out) for column, out in enumerate(columns)])
    assert same_bits(torch.cat(columns, 1), whole)
    assert sorted(blocks) == list(range(16))


@pytest.mark.parametrize("threads", [1, 4])
def test_many_requests_in_many_threads(tmp_path, save_step, model, monkeypatch, threads):
    monkeypatch.setattr(load, "_RUN_BYTES", 1)  # every block is a piece of work of its own
    path = save_step(tmp_path, 10, 4)[0]
    outs = {name: torch.full_like(tensor, -1) for name, tensor in model(10).items()}
    rows = [TensorPiece(name, tuple(out.shape), (row, *origin(out.shape[1:])), out[row : row + 1])
            for name, out in outs.items() if out.dim() for row in range(len(out))]  # fmt: skip
    Checkpoint(path).read_all([*rows, TensorPiece("count", (), (), outs["count"])], threads)
    assert all(torch.equal(outs[name], tensor) for name, tensor in model(10).items())
    shard = path / "rank-00002.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"rank-00002\.safetensors does not match its hash"):
        Checkpoint(path).read_all(rows, threads)
