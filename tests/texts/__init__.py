"""Texts that tests train on. They stay as they are, so that what a model learns from them does: a page of docs does not."""

from pathlib import Path

FURNACE = Path(__file__).parent / "furnace.md"
LAKE = Path(__file__).parent / "lake.md"
