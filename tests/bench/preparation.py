"""Preparing a corpus: seconds and memory for each byte of text, of this checkout and of another one in turns.

    python tests/bench/preparation.py --megabytes 100 --rounds 2 --against ../older-checkout --json out.json

Each preparation is a process of its own with an empty cache. The text is made anew: words of a vocabulary of 60,000, the commonest
first (Zipf), in lines, with punctuation; with --unicode some of its letters have accents; after 20 MB it repeats. `lone` is one
file, `many` are files of 20 kB. Memory is the peak of the resident set, and the same less what the process had after its imports.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

from contest.environment import machine, versions

_FOLDERS = ("comm", "parallel", "fault_tolerance", "trainer", "launch", "recipes")
_BLOCK_BYTES, _FILE_BYTES = 20_000_000, 20_000
_PREPARE = """
import json, re, sys, time
import bagualu.trainer.data.build
from bagualu.trainer.data.config import DataConfig
from bagualu.trainer.data.corpus import prepare
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024  # ru_maxrss counts the parent
before, started, cpu = peak(), time.perf_counter(), time.process_time()
corpus = prepare(DataConfig(source=sys.argv[1], cache=sys.argv[2]), int(sys.argv[3]))
print(json.dumps({"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu, "peak_bytes": peak(),
                  "added_bytes": peak() - before, "tokens": len(corpus.train) + len(corpus.validation),
                  "fingerprint": corpus.fingerprint}))
"""


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="of text (default 100)")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--shapes", nargs="+", choices=("lone", "many"), default=("lone", "many"))
    parser.add_argument("--unicode", action="store_true", help="text that is not ASCII")
    parser.add_argument("--rounds", type=int, default=2, help="times every contestant gets its turn (default 2)")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout, measured in the same run")
    parser.add_argument(
        "--folder", type=Path, help="where text and caches are written, and removed again (default: a new one in /tmp)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and every sample here")
    return parser.parse_args(argv)


def write_text(folder: Path, shape: str, size: int, accents: bool) -> Path:
    """About `size` bytes of text in one file or in many; returns the file or folder."""
    block = made_up(min(size, _BLOCK_BYTES), accents).encode()
    source = folder / shape
    source.mkdir()
    if shape == "lone":
        with (source / "text").open("wb") as stream:
            while stream.tell() < size:
                stream.write(block)
        return source / "text"
    for number, at in enumerate(range(0, size, _FILE_BYTES)):
        path = source / f"{number % 100:02}" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        start = at % (len(block) - _FILE_BYTES)
        path.write_bytes(block[start : start + _FILE_BYTES].decode(errors="ignore").encode())
    return source


def made_up(size: int, accents: bool) -> str:
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz" + ("éèßüñç" if accents else "")
    words = ["".join(draw.choices(letters, k=draw.randint(2, 11))) for _ in range(60_000)]
    weights = list(accumulate(1 / (rank + 3) for rank in range(len(words))))
    ends = [" "] * 8 + [", ", ". ", "\n", ".\n"]
    count = size // 8
    chosen = draw.choices(words, cum_weights=weights, k=count)
    return "".join(word + end for word, end in zip(chosen, draw.choices(ends, k=count), strict=True))


def importable(checkout: Path, folder: Path) -> Path:
    """A folder to put on PYTHONPATH, in which `bagualu` is that checkout."""
    root = folder / f"packages-{checkout.resolve().name}" / "bagualu"
    root.mkdir(parents=True)
    for name in _FOLDERS:
        (root / name).symlink_to((checkout / name).resolve())
    return root.parent


def prepare_once(packages: Path, source: Path, folder: Path, vocab: int) -> dict[str, Any]:
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    environment = os.environ | {"PYTHONPATH": str(packages), "HF_DATASETS_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, "-c", _PREPARE, str(source), str(cache), str(vocab)], env=environment, check=True,
                           stdout=subprocess.PIPE, text=True, cwd=folder)  # fmt: skip
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


def table(shape: str, size: int, samples: dict[str, list[dict[str, Any]]]) -> str:
    heads = ("seconds", "min..max", "cpu s", "MB/s", "peak MB", "peak/text", "added/text")
    lines = [f"{shape}: {size / 1e6:,.0f} MB of text", f"{'':<10}" + "".join(f"{head:>12}" for head in heads)]
    for name, taken in samples.items():
        middle = {key: statistics.median(sample[key] for sample in taken) for key in taken[0] if key != "fingerprint"}
        seconds = [sample["seconds"] for sample in taken]
        cells = [f"{middle['seconds']:.1f}", f"{min(seconds):.1f}..{max(seconds):.1f}", f"{middle['cpu_seconds']:.1f}",
                 f"{size / middle['seconds'] / 1e6:.1f}", f"{middle['peak_bytes'] / 1e6:,.0f}",
                 f"{middle['peak_bytes'] / size:.2f}", f"{middle['added_bytes'] / size:.2f}"]  # fmt: skip
        lines.append(f"{name:<10}" + "".join(f"{cell:>12}" for cell in cells))
    if len(samples) > 1:
        pairs = list(zip(samples["against"], samples["bagualu"], strict=True))
        ratios = {key: statistics.median(other[key] / own[key] for other, own in pairs) for key in ("seconds", "cpu_seconds")}
        same = all(other["fingerprint"] == own["fingerprint"] for other, own in pairs)
        lines.append(f"{ratios['seconds']:.2f} times as fast ({ratios['cpu_seconds']:.2f} in processor time), "
                     f"{'the same' if same else 'other'} tokens")  # fmt: skip
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    options = arguments(argv)
    folder = Path(tempfile.mkdtemp(prefix="bench-preparation-", dir=options.folder))
    results: dict[str, Any] = {}
    try:
        checkouts = {"against": options.against} if options.against else {}
        checkouts["bagualu"] = Path(__file__).resolve().parents[2]
        packages = {name: importable(checkout, folder / name) for name, checkout in checkouts.items()}
        for shape in options.shapes:
            source = write_text(folder, shape, options.megabytes * 10**6, options.unicode)
            size = sum(path.stat().st_size for path in ([source] if source.is_file() else source.rglob("*.txt")))
            samples: dict[str, list[dict[str, Any]]] = {name: [] for name in packages}
            for _ in range(options.rounds):
                for name in packages:
                    samples[name].append(prepare_once(packages[name], source, folder, options.vocab))
            print(table(shape, size, samples), flush=True)
            results[shape] = {"bytes": size, "samples": samples}
            shutil.rmtree(folder / shape)
    finally:
        shutil.rmtree(folder)
    if options.json:
        document = {"machine": machine(), "versions": versions(), "vocab": options.vocab, "shapes": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
