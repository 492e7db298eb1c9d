import random
from pathlib import Path

import pytest


def words(count: int, seed: int) -> str:
    """Lines of made-up words: text that a tokenizer finds something to merge in."""
    draw = random.Random(seed)
    syllables = ["ba", "gua", "lu", "ten", "sor", "pipe", "line", "ex", "pert", "é", "炉"]
    return "".join("".join(draw.choices(syllables, k=draw.randint(1, 3))) + draw.choice("      \n") for _ in range(count))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty small text files in two folders."""
    for i in range(40):
        path = tmp_path / "text" / f"part{i % 2}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(words(200, seed=i).encode())
    return tmp_path / "text"
