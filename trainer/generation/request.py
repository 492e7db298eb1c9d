"""What is to be generated, checked without torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bagualu.comm.errors import RecipeError
from bagualu.trainer.models.decoder.config import LONGEST_ALIBI, ModelConfig
from bagualu.trainer.recipe.config import SEEDS

_FILE = "request.json"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when a text ends."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """Logits are divided by it before one token is drawn; 0: the most probable token is taken."""
    top_p: float = 1.0
    """Tokens are drawn from the fewest most probable ones that have this probability together (arXiv 1904.09751, section 3.1)."""
    min_p: float = 0.0
    """Tokens less probable than this fraction of the most probable one are not drawn (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """The positive logits of tokens that the prompt or the text holds are divided by it, the negative ones multiplied (arXiv
    1909.05858, section 4.1)."""
    seed: int = 0
    """What is drawn is a function of this, the number of the prompt and that of the token; not of the layout or other prompts."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these that it holds."""
    ignore_eos: bool = False
    """Whether a text goes on after the token that ends a document."""

    def validate(self) -> None:
        """Raises RecipeError for a value that has no meaning, with one that has."""
        if self.max_new_tokens < 1:
            raise RecipeError(f"--max-new-tokens {self.max_new_tokens} generates nothing; give 1 or more")
        if not 0 <= self.temperature < math.inf:
            raise RecipeError(f"--temperature {self.temperature:g} must be 0 (the most probable token) or more, e.g. 0.8")
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"--top-p {self.top_p:g} must be more than 0 and at most 1, e.g. 0.95")
        if not 0 <= self.min_p <= 1:
            raise RecipeError(f"--min-p {self.min_p:g} must lie between 0 and 1, e.g. 0.05")
        if not 0 < self.repetition_penalty < math.inf:
            raise RecipeError(f"--repetition-penalty {self.repetition_penalty:g} must be more than 0, e.g. 1.1; 1 changes nothing")
        if self.seed not in SEEDS:
            raise RecipeError(f"--seed {self.seed} must lie between -2**63 and 2**64 - 1, e.g. {self.seed % 2**32}")
        if "" in self.stop:
            raise RecipeError("--stop '' would end every text before it begins; give the text to stop at")
        if self.temperature == 0 and (self.top_p < 1 or self.min_p > 0):
            name = "--top-p" if self.top_p < 1 else "--min-p"
            raise RecipeError(f"{name} changes nothing where the most probable token is taken; give --temperature too, e.g. 1")


@dataclass(frozen=True)
class GenerateRequest:
    """Everything that the ranks need to know besides the recipe of the layout."""

    checkpoint: str
    tokenizer: str | None
    """The file of the tokenizer; None if the model's tokens stand for no text."""
    prompts: tuple[str | None, ...]
    """The text of each prompt; None where it was given as tokens."""
    tokens: tuple[tuple[int, ...], ...]
    """The tokens of each prompt."""
    sampling: Sampling
    stream: bool
    """Whether the text is written to stdout while it is generated."""

    @property
    def shown_prompts(self) -> list[str]:
        """The prompts as they are shown: those that were given as tokens, as numbers."""
        both = zip(self.prompts, self.tokens, strict=True)
        return [" ".join(map(str, tokens)) if text is None else text for text, tokens in both]

    def save(self, folder: Path) -> None:
        (folder / _FILE).write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(folder: Path) -> "GenerateRequest":
        raw = json.loads((folder / _FILE).read_text())
        sampling = raw.pop("sampling")
        return GenerateRequest(
            **{**raw, "prompts": tuple(raw["prompts"]), "tokens": tuple(map(tuple, raw["tokens"]))},
            sampling=Sampling(**{**sampling, "stop": tuple(sampling["stop"])}),
        )


def require_tokens(tokens: Sequence[Sequence[int]], sampling: Sampling, model: ModelConfig) -> None:
    """Raises RecipeError for a prompt with a token that is not in the vocabulary, or that is longer, with what is to be generated,
    than the positions that the model knows."""
    positions = model.max_positions or (LONGEST_ALIBI if model.positions == "alibi" else None)
    key = "model.max_positions" if model.max_positions else "the positions of model.positions=alibi"
    for number, prompt in enumerate(tokens, 1):
        which = f"prompt {number}" if len(tokens) > 1 else "the prompt"
        if outside := [token for token in prompt if not 0 <= token < model.vocab]:
            raise RecipeError(f"{which} has token {outside[0]}, but the model has model.vocab={model.vocab}; give tokens from 0 to "
                              f"{model.vocab - 1}")  # fmt: skip
        if positions and len(prompt) >= positions:
            raise RecipeError(f"{which} has {len(prompt)} tokens, which leave none of {key}={positions} for new ones; give a "
                              "shorter prompt")  # fmt: skip
        if positions and len(prompt) + sampling.max_new_tokens > positions:
            raise RecipeError(f"{which} of {len(prompt)} tokens and --max-new-tokens {sampling.max_new_tokens} are more than "
                              f"{key}={positions}; give --max-new-tokens {positions - len(prompt)}, or less text")  # fmt: skip
