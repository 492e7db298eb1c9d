"""Writes token files as the programs do that they come from."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bagualu.trainer.data.tokenizer import train_tokenizer
from tests.trainer.data.conftest import words

CODES = {"uint8": 1, "int32": 4, "int64": 5, "uint16": 8}


def write_megatron(prefix: Path, documents: Sequence[Sequence[int]], dtype: str = "uint16") -> None:
    """The layout of 2021 (megatron/data/indexed_dataset.py), with one sequence a document."""
    lengths = np.array([len(document) for document in documents], np.int32)
    item = np.dtype(dtype).itemsize
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(lengths) + 1))
        stream.write(lengths.tobytes())
        stream.write((np.cumsum([0, *lengths[:-1]], dtype=np.int64) * item).tobytes())
        stream.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
    np.concatenate([np.array(document, dtype) for document in documents]).tofile(f"{prefix}.bin")


def write_llmc(path: Path, tokens: Sequence[int], magic: int = 20240520, version: int = 1, dtype: str = "uint16") -> None:
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype).tobytes())


def write_examples(folder: Path) -> None:
    """Writes the files that docs/guides/data.md names: token files with a few thousand ids below 64 each, records and a
    tokenizer."""
    draw = np.random.default_rng(0)
    for name in ("tokens", "megatron", "olmo"):
        (folder / name).mkdir()
    write_llmc(folder / "tokens/train.bin", draw.integers(0, 64, 5000).tolist())
    write_llmc(folder / "tokens/val.bin", draw.integers(0, 64, 1000).tolist())
    write_megatron(folder / "megatron/corpus_text_document", draw.integers(1, 64, (100, 90)).tolist())
    for number in range(2):
        draw.integers(0, 64, 8000).astype(np.uint16).tofile(folder / f"olmo/part-{number}.npy")
    (folder / "records").mkdir()
    texts = [words(200, seed) for seed in range(40)]
    (folder / "records/documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "tokenizer").mkdir()
    train_tokenizer(texts, 300).save(str(folder / "tokenizer/tokenizer.json"))
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (folder / "chats").mkdir()
    chats = [[{"role": "user", "content": "why?"}, {"role": "assistant", "content": text[:20]}] for text in texts]
    (folder / "chats/chats.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
