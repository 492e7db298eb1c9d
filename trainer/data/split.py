"""Which part of the text is kept for validation: whole files where that meets the share asked for, else one file is cut.

Everything is a function of the names and sizes of the files, so it is the same on every machine. Free of torch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from bagualu.trainer.data.listing import TextFile

MOST_OFF = 2.0
"""Factor by which either part may miss its share of the tokens."""


@dataclass(frozen=True)
class TextSplit:
    """Files kept for validation, by name, and the file that is cut: its beginning trains and its end validates."""

    kind: str
    """files: by the hashes of the names alone; share: by the share of the text; none: nothing is kept for validation."""
    validation: frozenset[str] = frozenset()
    cut: str | None = None
    training_share: float = 1.0
    """Of the characters of the file that is cut."""


NOTHING = TextSplit("none")


def hash_fraction(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone: the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest()) / 2**48


def by_files(files: Sequence[TextFile], fraction: float) -> TextSplit:
    """Files whose names' hashes lie below `fraction`, but at least one and never all; a lone file is cut.

    What share of the text that is depends on the sizes of the files: see `meets`.
    """
    if len(files) == 1:
        return TextSplit("files", cut=files[0].name, training_share=1 - fraction)
    names = [file.name for file in files]
    ordered = sorted(names, key=hash_fraction)
    below = sum(hash_fraction(name) < fraction for name in names)
    return TextSplit("files", frozenset(ordered[: min(max(below, 1), len(names) - 1)]))


def by_share(files: Sequence[TextFile], fraction: float) -> TextSplit:
    """Files in the order of their names' hashes until they are `fraction` of the bytes; the file at that border is cut."""
    wanted = fraction * sum(file.size_bytes for file in files)
    kept: set[str] = set()
    left = wanted
    for file in sorted(files, key=lambda file: hash_fraction(file.name)):
        if file.size_bytes > left:
            if left < wanted / 8:  # near enough without a cut
                break
            return TextSplit("share", frozenset(kept), file.name, 1 - left / file.size_bytes)
        kept.add(file.name)
        left -= file.size_bytes
    return TextSplit("share", frozenset(kept))


def meets(validation: int, total: int, fraction: float) -> bool:
    """Whether `validation` of `total` (bytes or tokens) leaves both parts within MOST_OFF of their shares."""

    def near(part: float, share: float) -> bool:
        return share / MOST_OFF <= part <= share * MOST_OFF

    return total > 0 and near(validation / total, fraction) and near(1 - validation / total, 1 - fraction)


def bytes_of(files: Sequence[TextFile], split: TextSplit) -> int:
    """Bytes of text that `split` keeps for validation, as near as sizes tell."""
    return sum(file.size_bytes if file.name in split.validation else
               round((1 - split.training_share) * file.size_bytes) if file.name == split.cut else 0 for file in files)  # fmt: skip
