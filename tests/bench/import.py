"""Bringing a model of Hugging Face in and out: bytes per second of `model.from` on several ranks against `safetensors`, and memory.

    python tests/bench/import.py [--bytes 2e9] [--ranks 2] [--rounds 3] [--json FILE]

Makes random Llama weights in several files. In turn (A B A B ...), `safetensors` reads all of them into one process, and `--ranks`
processes read their halves of all of them as `model.from` does under parallel.tensor. Then imports and exports the model, each in a
process of its own. Memory is the peak of a process (VmHWM) above what it had after its imports."""

import argparse
import json
import multiprocessing
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from math import prod
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bagualu.parallel.layout import Layout
from bagualu.trainer.conversion.export_model import export_model
from bagualu.trainer.conversion.import_model import import_model
from bagualu.trainer.models.decoder.config import ModelConfig
from bagualu.trainer.models.decoder.plan import decoder_plan
from bagualu.trainer.models.decoder.shapes import parameter_shapes
from bagualu.trainer.models.hugging_face.config import write_config
from bagualu.trainer.models.hugging_face.directory import open_model
from bagualu.trainer.models.hugging_face.families import FAMILIES
from bagualu.trainer.models.hugging_face.names import parts_of
from bagualu.trainer.models.hugging_face.read import Reader

FILES = 4


def make(folder: Path, size: float) -> ModelConfig:
    """Writes a Llama of about `size` bytes in bfloat16."""
    layers = max(1, round((size / 2 - 2 * 32000 * 2048) / 50_331_648))
    model = ModelConfig(layers=layers, hidden=2048, heads=16, kv_heads=8, ffn=6144, vocab=32000)
    (folder / "config.json").write_text(json.dumps(write_config(model, "bfloat16", {}, 2048)))
    parts, places = parts_of(model, FAMILIES["llama"]), {}
    for number in range(FILES):
        name = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        own = parts[number * len(parts) // FILES : (number + 1) * len(parts) // FILES]
        save_file({part.tensor: torch.randn(part.shape, dtype=torch.bfloat16) for part in own}, folder / name, {"format": "pt"})
        places |= {part.tensor: name for part in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return model


def by_library(folder: Path, rank: int, ranks: int) -> int:
    """Reads all tensors into memory of this process; returns their bytes."""
    held = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            held += [tensors.get_tensor(name).clone() for name in tensors.keys()]  # noqa: SIM118  # no dictionary
    return sum(tensor.nbytes for tensor in held)


def by_rank(folder: Path, rank: int, ranks: int) -> int:
    """Reads this rank's part of all tensors; returns its bytes."""
    found = open_model(folder)
    reader, layout, model = Reader(found), Layout(tensor=ranks), found.description.model
    plan, held = decoder_plan(model, False), []
    for name, shape in parameter_shapes(model).items():
        held.append(reader.fill(name, shape, plan.placement(name).box(name, shape, layout, layout.coordinates(rank))))
    return sum(tensor.nbytes for tensor in held)


def bring_in(folder: Path, rank: int, ranks: int) -> int:
    return int(import_model(folder, folder.parent / "run")["bytes"])


def take_out(folder: Path, rank: int, ranks: int) -> int:
    return int(export_model(folder.parent / "run", folder.parent / "exported")["bytes"])


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def work(function: Callable[[Path, int, int], int], folder: Path, rank: int, ranks: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    torch.zeros(8).to(torch.bfloat16)  # what every process needs is loaded
    before = peak_bytes()
    connection.send(None)
    connection.recv()
    size = function(folder, rank, ranks)
    connection.send((size, peak_bytes() - before))


def timed(function: Callable[[Path, int, int], int], folder: Path, ranks: int) -> tuple[float, int, list[int]]:
    """Runs `function` in `ranks` fresh processes at once; returns the seconds, the bytes of all and the peaks of memory."""
    context, ends, processes = multiprocessing.get_context("spawn"), [], []
    for rank in range(ranks):
        own, theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(function, folder, rank, ranks, theirs)))
        processes[-1].start()
        ends.append(own)
    for end in ends:
        end.recv()
    begun = time.perf_counter()
    for end in ends:
        end.send(None)
    results = [end.recv() for end in ends]
    seconds = time.perf_counter() - begun
    for process in processes:
        process.join()
    return seconds, sum(size for size, _ in results), [peak for _, peak in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=float, default=2e9)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "published"
        folder.mkdir()
        model = make(folder, given.bytes)
        result = measured(folder, model, given.ranks, given.rounds)
        shutil.rmtree(folder)
    result["machine"] = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    print("\n".join(f"{key:<34}{value}" for key, value in result.items()))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2))


def measured(folder: Path, model: ModelConfig, ranks: int, rounds: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"safetensors": [], "ranks": []}
    by_library(folder, 0, 1)  # the files are in the page cache for both
    for _ in range(rounds):
        seconds, whole, _ = timed(by_library, folder, 1)
        rates["safetensors"].append(whole / seconds)
        seconds, _, peaks = timed(by_rank, folder, ranks)
        rates["ranks"].append(whole / seconds)
    largest = max(2 * prod(shape) for shape in parameter_shapes(model).values())
    found = open_model(folder)
    plan, layout = decoder_plan(model, False), Layout(tensor=ranks)
    boxes = [
        plan.placement(name).box(name, shape, layout, layout.coordinates(0)) for name, shape in parameter_shapes(model).items()
    ]
    share = 2 * sum(box.elements for box in boxes)
    _, _, (imported,) = timed(bring_in, folder, 1)
    _, _, (exported,) = timed(take_out, folder, 1)
    library, own = (statistics.median(rates[key]) for key in ("safetensors", "ranks"))
    return {
        "bytes": found.bytes,
        "safetensors_bytes_per_second": round(library),
        "model_from_bytes_per_second": round(own),
        "ratio": round(own / library, 3),
        "peak_of_a_rank_bytes": max(peaks),
        "its_share_and_one_tensor_bytes": share + largest,
        "largest_tensor_bytes": largest,
        "peak_of_import_bytes": imported,
        "peak_of_export_bytes": exported,
    }


if __name__ == "__main__":
    main()
