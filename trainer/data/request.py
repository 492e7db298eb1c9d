"""What a run requires of its corpus: source, vocabulary, validation split and sequence length."""

from dataclasses import dataclass

from bagualu.trainer.data.config import DataConfig


@dataclass(frozen=True)
class CorpusRequest:
    """What a run requires of its corpus. `vocab`: the number of entries of the vocabulary."""

    data: DataConfig
    vocab: int
    validation: bool = True
    """Whether the run validates, so that a part of the text is kept for it; data.split=files keeps a part in any case."""
    length_multiple: int = 1
    """The layout needs data.sequence_length to be a multiple of this."""

    @property
    def keeps_validation(self) -> bool:
        return self.validation or self.data.split == "files"

    def longest_sequence(self, counts: tuple[int, int]) -> int:
        """Returns the longest data.sequence_length, a multiple of `length_multiple`, for which the training split and, if one is
        kept, the validation split hold a sequence; 0 if there is none. `counts`: the numbers of training and validation tokens."""
        shortest = min(counts if self.keeps_validation else counts[:1])
        return max(shortest - 1, 0) // self.length_multiple * self.length_multiple
