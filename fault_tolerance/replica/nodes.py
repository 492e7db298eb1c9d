"""Which ranks share a node's memory, and who keeps a copy of whose state."""

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_TOKEN = ".node"


@dataclass(frozen=True)
class Nodes:
    """Node of each position of a group. Nodes are numbered in the order of their first position."""

    of: tuple[int, ...]

    @staticmethod
    def by_token(tokens: Sequence[str]) -> "Nodes":
        """Positions with the same token are on the same node."""
        numbers = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
        return Nodes(tuple(numbers[token] for token in tokens))

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Positions of every node, in order."""
        found: list[list[int]] = [[] for _ in range(max(self.of) + 1)]
        for position, node in enumerate(self.of):
            found[node].append(position)
        return tuple(map(tuple, found))

    @property
    def count(self) -> int:
        return len(self.members)

    def beside(self, position: int) -> tuple[int, ...]:
        """Positions on the node of `position`, itself among them."""
        return self.members[self.of[position]]

    def leads(self, position: int) -> bool:
        """Whether it is the one that acts for its node."""
        return self.beside(position)[0] == position

    @cached_property
    def partners(self) -> tuple[int | None, ...]:
        """Who keeps the copy of each position: the one in the same place on the next node; nobody where there is only one node."""
        if self.count == 1:
            return (None,) * len(self.of)
        found: list[int | None] = [None] * len(self.of)
        for node, members in enumerate(self.members):
            there = self.members[(node + 1) % self.count]
            for place, position in enumerate(members):
                found[position] = there[place % len(there)]
        return tuple(found)

    @cached_property
    def kept_for(self) -> tuple[tuple[int, ...], ...]:
        """The positions whose copies each position keeps."""
        found: list[list[int]] = [[] for _ in self.of]
        for position, partner in enumerate(self.partners):
            if partner is not None:
                found[partner].append(position)
        return tuple(map(tuple, found))


def node_token(folder: Path) -> str:
    """The same for all who share `folder`: made by whoever comes first, kept as long as the folder. Raises OSError."""
    path = folder / _TOKEN
    own = folder / f"{_TOKEN}-{secrets.token_hex(8)}"
    own.write_text(own.name)
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    finally:
        own.unlink()
    return path.read_text()
