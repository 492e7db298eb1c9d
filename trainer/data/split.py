"""Decides which part of the text is kept for validation: whole files if these meet the requested share, else a file is cut.

Everything is a function of the names and sizes of the files, so it is the same on every machine.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from bagualu.trainer.data.listing import TextFile

MOST_OFF = 2.0
"""The factor by which the training or the validation part may miss its share of the tokens."""


@dataclass(frozen=True)
class TextSplit:
    """The names of the files kept whole for validation, and of the file that is cut: its beginning is for training, its end for
    validation."""

    kind: str
    """How the files kept for validation were chosen. files: by the hashes of their names alone; share: by their share of the text;
    none: nothing is kept."""
    validation: frozenset[str] = frozenset()
    cut: str | None = None
    """The name of the file that is cut; None if none is."""
    training_share: float = 1.0
    """The share of the cut file's characters that is for training."""


NOTHING = TextSplit("none")


def hash_fraction(name: str) -> float:
    """Returns a number in [0, 1) that depends on `name` alone: it is the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest()) / 2**48


def by_files(files: Sequence[TextFile], fraction: float) -> TextSplit:
    """Keeps for validation the files whose names' hashes lie below `fraction`, but at least one and never all; a single file is
    cut.

    The share of the text that this keeps depends on the sizes of the files: see `meets`.
    """
    if len(files) == 1:
        return TextSplit("files", cut=files[0].name, training_share=1 - fraction)
    names = [file.name for file in files]
    ordered = sorted(names, key=hash_fraction)
    below = sum(hash_fraction(name) < fraction for name in names)
    return TextSplit("files", frozenset(ordered[: min(max(below, 1), len(names) - 1)]))


def by_share(files: Sequence[TextFile], fraction: float) -> TextSplit:
    """Keeps files for validation, in the order of their names' hashes, until they make up `fraction` of the bytes; the file at that
    border is cut, unless less than an eighth of those bytes is missing."""
    wanted = fraction * sum(file.size_bytes for file in files)
    kept: set[str] = set()
    left = wanted
    for file in sorted(files, key=lambda file: hash_fraction(file.name)):
        if file.size_bytes > left:
            if left < wanted / 8:  # close enough without a cut
                break
            return TextSplit("share", frozenset(kept), file.name, 1 - left / file.size_bytes)
        kept.add(file.name)
        left -= file.size_bytes
    return TextSplit("share", frozenset(kept))


def meets(validation: int, total: int, fraction: float) -> bool:
    """Returns whether both parts are within a factor MOST_OFF of their shares, if `validation` of `total` (bytes or tokens) is kept
    for validation and its share should be `fraction`."""

    def near(part: float, share: float) -> bool:
        return share / MOST_OFF <= part <= share * MOST_OFF

    return total > 0 and near(validation / total, fraction) and near(1 - validation / total, 1 - fraction)


def bytes_of(files: Sequence[TextFile], split: TextSplit) -> int:
    """Returns the bytes of text that `split` keeps for validation, estimated from the sizes of the files."""
    return sum(file.size_bytes if file.name in split.validation else
               round((1 - split.training_share) * file.size_bytes) if file.name == split.cut else 0 for file in files)  # fmt: skip
