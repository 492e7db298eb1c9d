"""Reading token files: tokens per second of the loader, of Megatron's indexed dataset and of torch's DataLoader over a dataset
that Hugging Face's library saved, in turns, and the seconds to resume far inside a run.

    python tests/bench/data.py --megabytes 200 --rounds 5 --megatron /folder/of/megatron-core --json out.json

All read the same ids, in sequences of the same length in a random order, into pairs of int64 tensors (inputs, labels), in one
process and without workers. Megatron's file has one document for each sequence. `--megatron` is a folder in which `import
megatron.core` works, e.g. from `pip install --no-deps --target FOLDER megatron-core==0.16.1`; without it that row is left out.
Resuming is a process of its own, which opens the file that was opened before and reads the batch with sample 10^9; its time is
without imports.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contest.environment import machine, versions

from bagualu.trainer.data.batches import Batches
from bagualu.trainer.data.config import DataConfig
from bagualu.trainer.data.corpus import prepare

VOCAB, FAR = 50257, 10**9
_RESUME = """
import json, sys, time
from bagualu.trainer.data.batches import Batches
from bagualu.trainer.data.config import DataConfig
from bagualu.trainer.data.corpus import prepare
data = DataConfig(**json.loads(sys.argv[1]))
started = time.perf_counter()
batches = Batches(prepare(data, int(sys.argv[2]), validation=False), data, 0)
batches.batch(int(sys.argv[3]) // data.global_batch, 0, data.global_batch)
print(time.perf_counter() - started)
"""


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="size of the token file (default 200)")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32, help="sequences per batch (default 32)")
    parser.add_argument("--batches", type=int, default=50, help="batches that a contestant reads in each turn (default 50)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contestant (default 5)")
    parser.add_argument("--megatron", type=Path, metavar="FOLDER", help="where megatron-core is installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and every sample here")
    return parser.parse_args(argv)


def write_tokens(folder: Path, sequences: int, length: int) -> Path:
    """Writes `sequences` documents of `length` + 1 ids in Megatron's format; returns the prefix."""
    ids = np.random.default_rng(0).integers(0, VOCAB, (sequences, length + 1), np.uint16)
    prefix = folder / "ids"
    ids.tofile(f"{prefix}.bin")
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + bytes([8]))
        stream.write(np.array([sequences, sequences + 1], "<u8").tobytes())
        stream.write(np.full(sequences, length + 1, np.int32).tobytes())
        stream.write((np.arange(sequences, dtype=np.int64) * (length + 1) * 2).tobytes())
        stream.write(np.arange(sequences + 1, dtype=np.int64).tobytes())
    return prefix


Turn = Callable[[int], None]
"""Reads a number of batches."""


def ours(data: DataConfig) -> Turn:
    batches, done = Batches(prepare(data, VOCAB, validation=False), data, 0), [0]

    def read(count: int) -> None:
        for step in range(done[0], done[0] + count):
            batches.batch(step, 0, data.global_batch)
        done[0] += count

    return read


def megatron(prefix: Path, folder: Path, batch: int) -> Turn:
    sys.path.insert(0, str(folder))
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset, draw = IndexedDataset(str(prefix), mmap=True), np.random.default_rng(0)

    def read(count: int) -> None:
        order = draw.permutation(len(dataset))[: count * batch].reshape(-1, batch)
        for indices in order.tolist():
            rows = torch.stack([torch.from_numpy(dataset[index].astype(np.int64)) for index in indices])
            rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    return read


def data_loader(prefix: Path, folder: Path, sequences: int, length: int, batch: int) -> Turn:
    import datasets

    ids = np.fromfile(f"{prefix}.bin", np.uint16).reshape(sequences, length + 1)
    datasets.Dataset.from_dict({"ids": ids}).save_to_disk(str(folder / "saved"))
    saved = datasets.load_from_disk(str(folder / "saved")).with_format("torch", columns=["ids"])

    def read(count: int) -> None:
        loader = torch.utils.data.DataLoader(saved, batch_size=batch, shuffle=True)
        for _, found in zip(range(count), loader, strict=False):
            rows = found["ids"].to(torch.int64)
            rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    return read


def resume_seconds(data: DataConfig) -> float:
    own = json.dumps({"source": data.source, "cache": data.cache, "sequence_length": data.sequence_length, "global_batch": 32})
    ended = subprocess.run([sys.executable, "-c", _RESUME, own, str(VOCAB), str(FAR)], check=True, capture_output=True, text=True)
    return float(ended.stdout)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    length, batch = options.sequence_length, options.batch
    sequences = max(options.batches * batch, options.megabytes * 10**6 // (2 * (length + 1)))
    prefix = write_tokens(folder, sequences, length)
    data = DataConfig(source=str(prefix), cache=str(folder / "cache"), sequence_length=length, global_batch=batch)
    contestants = {"bagualu": ours(data), "DataLoader": data_loader(prefix, folder, sequences, length, batch)}
    if options.megatron:
        contestants["Megatron"] = megatron(prefix, options.megatron, batch)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(options.rounds + 1):  # the first is not counted: pages come into memory
        for name, read in contestants.items():
            started = time.perf_counter()
            read(options.batches)
            if turn:
                rates[name].append(options.batches * batch * length / (time.perf_counter() - started))
    return {"file_bytes": sequences * (length + 1) * 2, "tokens_per_second": rates,
            "resume_seconds": [resume_seconds(data) for _ in range(options.rounds)]}  # fmt: skip


def table(result: dict[str, Any]) -> str:
    rates = result["tokens_per_second"]
    lines = [f"{result['file_bytes'] / 1e6:,.0f} MB of ids", f"{'':<12}{'Mtokens/s':>12}{'min..max':>16}{'ours / it':>12}"]
    for name, taken in rates.items():
        ratio = statistics.median(own / other for own, other in zip(rates["bagualu"], taken, strict=True))
        spread = f"{min(taken) / 1e6:,.1f}..{max(taken) / 1e6:,.1f}"
        lines.append(f"{name:<12}{statistics.median(taken) / 1e6:>12,.1f}{spread:>16}{ratio:>12.2f}")
    seconds = result["resume_seconds"]
    lines.append(f"resume at sample {FAR:,}: {statistics.median(seconds):.4f} s ({min(seconds):.4f}..{max(seconds):.4f})")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    options = arguments(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        result = measure(options, Path(folder))
    print(table(result))
    if options.json:
        settings = {key: getattr(options, key) for key in ("sequence_length", "batch", "batches", "rounds")}
        document = {"machine": machine(), "versions": versions(), "settings": settings, **result}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
