"""What a run wants of its corpus. Free of torch."""

from dataclasses import dataclass

from bagualu.trainer.data.config import DataConfig


@dataclass(frozen=True)
class CorpusRequest:
    """What a run wants of its corpus."""

    data: DataConfig
    vocab: int
    validation: bool = True
    """Whether a part is kept for validation."""
    length_multiple: int = 1
    """What the layout needs data.sequence_length to be a multiple of."""

    @property
    def keeps_validation(self) -> bool:
        return self.validation or self.data.split == "files"

    def longest_sequence(self, counts: tuple[int, int]) -> int:
        """The longest data.sequence_length that every part has a sequence of; `counts`: tokens that train, and that validate."""
        shortest = min(counts if self.keeps_validation else counts[:1])
        return max(shortest - 1, 0) // self.length_multiple * self.length_multiple
