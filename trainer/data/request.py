"""The requirements of a run for its corpus."""

from dataclasses import dataclass

from bagualu.trainer.data.config import DataConfig


@dataclass(frozen=True)
class CorpusRequest:
    """The requirements of a run for its corpus."""

    data: DataConfig
    vocab: int
    validation: bool = True
    """Whether a part is kept for validation."""
    length_multiple: int = 1
    """The layout needs data.sequence_length to be a multiple of this."""

    @property
    def keeps_validation(self) -> bool:
        return self.validation or self.data.split == "files"

    def longest_sequence(self, counts: tuple[int, int]) -> int:
        """Returns the longest data.sequence_length for which every part holds a sequence. `counts`: training and validation
        tokens."""
        shortest = min(counts if self.keeps_validation else counts[:1])
        return max(shortest - 1, 0) // self.length_multiple * self.length_multiple
