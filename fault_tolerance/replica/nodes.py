"""Determines which ranks share the memory of a node, and which rank keeps the copy of each rank's state."""

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_TOKEN = ".node"


@dataclass(frozen=True)
class NodeMap:
    """The node of each position of a group. Nodes are numbered in the order of their first positions."""

    of: tuple[int, ...]

    @staticmethod
    def by_token(tokens: Sequence[str]) -> "NodeMap":
        """Returns the map in which positions with the same token are on the same node."""
        numbers = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
        return NodeMap(tuple(numbers[token] for token in tokens))

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """The positions on each node, by number of the node."""
        members: list[list[int]] = [[] for _ in range(max(self.of) + 1)]
        for position, node in enumerate(self.of):
            members[node].append(position)
        return tuple(map(tuple, members))

    @property
    def count(self) -> int:
        return len(self.members)

    def beside(self, position: int) -> tuple[int, ...]:
        """Returns the positions on the node of `position`, including itself."""
        return self.members[self.of[position]]

    def leads(self, position: int) -> bool:
        """Returns whether `position` is the first on its node; that rank acts for the node."""
        return self.beside(position)[0] == position

    @cached_property
    def partners(self) -> tuple[int | None, ...]:
        """For each position, the position on the next node that keeps the copy of that position's state; None for all if there is
        only one node."""
        if self.count == 1:
            return (None,) * len(self.of)
        partners: list[int | None] = [None] * len(self.of)
        for node, members in enumerate(self.members):
            next_members = self.members[(node + 1) % self.count]
            for index, position in enumerate(members):
                partners[position] = next_members[index % len(next_members)]
        return tuple(partners)

    @cached_property
    def kept_for(self) -> tuple[tuple[int, ...], ...]:
        """For each position, the positions on other nodes whose state it keeps a copy of."""
        kept: list[list[int]] = [[] for _ in self.of]
        for position, partner in enumerate(self.partners):
            if partner is not None:
                kept[partner].append(position)
        return tuple(map(tuple, kept))


def node_token(folder: Path) -> str:
    """Returns a token that all processes with the same `folder` share; the first process creates it. Raises OSError."""
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
