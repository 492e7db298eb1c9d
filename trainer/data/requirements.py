"""Checks that a corpus has what its sequences need."""

import logging

import numpy as np

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.config import DataConfig
from bagualu.trainer.data.request import CorpusRequest
from bagualu.trainer.data.split import NOTHING
from bagualu.trainer.data.tokenised import Corpus
from bagualu.trainer.data.whole import Documented

log = logging.getLogger(__name__)


def require_sequence(corpus: Corpus, config: DataConfig, length_multiple: int = 1) -> None:
    """Raises RecipeError unless the training split, and the validation split if one is kept, hold at least one sequence
    (`sequence_length` + 1 tokens)."""
    counts = (len(corpus.train), len(corpus.validation))
    request = CorpusRequest(config, corpus.vocab, corpus.split != NOTHING.kind, length_multiple=length_multiple)
    longest = request.longest_sequence(counts)
    if longest >= config.sequence_length:
        return
    part, tokens = ("validation", counts[1]) if request.validation and counts[1] < counts[0] else ("training", counts[0])
    advice = f"data.sequence_length={longest} or more text" if longest else "more text"
    raise RecipeError(f"the {part} split of data.source={config.source} has {tokens} tokens but one sequence reads "
                      f"{config.sequence_length + 1}; give {advice}")  # fmt: skip


def require_documented(corpus: Corpus, config: DataConfig) -> None:
    """Raises RecipeError unless documents are listed, as data.packing=whole needs, and for conversations that all lose their
    answers."""
    if corpus.whole is None:
        raise RecipeError("data.packing=whole is for records, for conversations, and for text with data.tokenizer, and "
                          f"data.source={config.source} is none of them; give data.packing=documents")  # fmt: skip
    for part, documents in zip(("training", "validation"), corpus.whole, strict=True):
        _require_labels(documents, part, config)


def _require_labels(documents: Documented, part: str, config: DataConfig) -> None:
    """Raises RecipeError for conversations that all lose their answers; says how many documents are cut off."""
    length, sizes = config.sequence_length, np.diff(documents.starts[:]) - 1
    count, cut, lost = len(sizes), int((sizes > length).sum()), documents.without_labels(length)
    if lost and lost == count:
        longer = f"data.sequence_length={sizes.max()}, which cuts nothing off, or shorter questions"
        raise RecipeError(f"none of the {count} conversations of data.source={config.source} for {part} has an answer within "
                          f"data.sequence_length={length} ({cut} are cut off there), so there is nothing to learn; give "
                          f"{longer if cut else 'answers that are not empty'}")  # fmt: skip
    if cut:
        answers = f", {lost} of them all their answers, so that nothing is learned from these" if lost else ""
        log.warning("%d of %d documents for %s are longer than data.sequence_length=%d and lose their ends%s",
                    cut, count, part, length, answers)  # fmt: skip
