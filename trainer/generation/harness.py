"""Lets EleutherAI's lm-evaluation-harness drive a checkpoint (`pip install bagualu[harness]`).

import lm_eval
from bagualu.trainer.generation.harness import HarnessModel

print(lm_eval.simple_evaluate(HarnessModel("runs/tiny"), tasks=["hellaswag"])["results"])
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from bagualu.comm import simulated
from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.tokenizer import load_tokenizer
from bagualu.trainer.data.tokenizer_files import begin_token_of, end_tokens_of
from bagualu.trainer.generation.find import compose_layout, find_model
from bagualu.trainer.generation.generate import generate
from bagualu.trainer.generation.request import Sampling, require_tokens
from bagualu.trainer.generation.stages import load_stages
from bagualu.trainer.generation.text import GrowingText
from bagualu.trainer.models.decoder.cache import cached

_MAX_NEW_TOKENS = 256


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the library has no types
    """The model of a run or a checkpoint, computed in this process."""

    def __init__(self, given: str, batch: int = 8, dtype: str | None = None, max_length: int | None = None) -> None:
        """`batch`: the most sequences that are computed together. `dtype`: as train.dtype; left out, that of the run. `max_length`:
        the most tokens that are read at once, of which a long text has several windows and a long context loses its beginning; left
        out, all positions that the model knows. Raises RecipeError."""
        super().__init__()
        for name, value in (("batch", batch), ("max_length", max_length)):
            if value is not None and value < 1:
                raise RecipeError(f"{name}={value} must be at least 1; give e.g. {name}=8, or leave it out")
        trained = find_model(Path(given).expanduser())
        if trained.tokenizer is None:
            raise RecipeError(f"{given} keeps no tokenizer.json, and the harness gives text; train on text")
        words = [] if dtype is None else [f"train.dtype={dtype}"]
        self._recipe = compose_layout("evaluate", trained, words, str(trained.run_dir), "give one dtype")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        (self._stages,) = simulated.run(
            1, lambda rank: load_stages(self._recipe, rank, trained.checkpoint), threads=torch.get_num_threads(), device=device
        )
        self._stages.freeze()
        if (most := self._recipe.model.max_positions) and (max_length or 0) > most:
            raise RecipeError(f"max_length={max_length} is more than model.max_positions={most}; give that or less")
        self._text, self._batch = load_tokenizer(trained.tokenizer, special_tokens=True), batch
        self._length = trained.context if max_length is None else max_length
        self._ends = end_tokens_of(self._text, trained.tokenizer)
        if not self._ends:
            raise RecipeError(f"{trained.tokenizer} does not say which token ends a document, which the harness needs")
        begin = begin_token_of(self._text, trained.tokenizer)
        self._begin = self._ends[0] if begin is None else begin

    @property
    def eot_token_id(self) -> int:
        return self._ends[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the one that begins texts; if the tokenizer has none, the one that ends them."""
        return self._begin

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads at once."""
        return self._length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the tokens of a text, with those that its tokenizer adds, unless `add_special_tokens` is False, or is left out
        and the text spells the token that begins texts itself."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._text.id_to_token(self._begin) or "\0")
        tokens: list[int] = self._text.encode(string, add_special_tokens=add_special_tokens).ids
        return tokens

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each text, in windows as long as the model's context, or `max_length`."""
        totals = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)  # the first window begins with the prefix
            windows = map(make_disjoint_window, get_rolling_token_windows(tokens, self.prefix_token_id, self._length, 1))
            totals.append(sum(value for value, _ in self._score(list(windows))))
        return totals

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Returns for each pair (context, continuation) the log-likelihood of the continuation, and whether each of its tokens is
        the most probable one. Of what is longer than `max_length`, the beginning of the context is left out. Raises RecipeError for
        a continuation that is longer."""
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        if longest > self._length:
            raise RecipeError(f"a continuation has {longest} tokens, and the model reads max_length={self._length} at once; give "
                              f"shorter ones, or HarnessModel(..., max_length={longest})")  # fmt: skip
        results: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(pairs)), key=lambda number: -sum(map(len, pairs[number])))
        for start in range(0, len(order), self._batch):
            numbers = order[start : start + self._batch]
            results |= dict(zip(numbers, self._score_together([pairs[number] for number in numbers]), strict=True))
        return [results[number] for number in range(len(pairs))]

    @torch.no_grad()
    def _score_together(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        inputs = [(context + continuation)[-(self._length + 1) :][:-1] for context, continuation in pairs]
        last, longest = max(len(continuation) for _, continuation in pairs), max(map(len, inputs))
        device = self._stages.mesh.group("world").device
        padding = torch.tensor([longest - len(tokens) for tokens in inputs], device=device)
        rows = torch.tensor([[0] * (longest - len(tokens)) + tokens for tokens in inputs], device=device)
        with cached(self._stages.model, padding, last) as columns:
            logits = self._stages.logits(rows, columns)
        assert logits is not None
        results = []
        for row, (_, continuation) in zip(logits, pairs, strict=True):
            of_tokens, wanted = row[-len(continuation) :], torch.tensor(continuation, device=device)
            values = of_tokens.log_softmax(-1).gather(-1, wanted.unsqueeze(-1))
            results.append((float(values.sum()), bool((of_tokens.argmax(-1) == wanted).all())))
        return results

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Returns what follows each context. Requests in a row with the same options are computed in batches."""
        texts: list[str] = []
        for options, alike in groupby(requests, lambda request: request.args[1]):
            contexts = [request.args[0] for request in alike]
            for start in range(0, len(contexts), self._batch):
                texts += self._continue(contexts[start : start + self._batch], options, len(texts))
        return texts

    def _continue(self, contexts: Sequence[str], options: dict[str, Any], first: int) -> list[str]:
        """Returns what follows each of `contexts`; `first` is the number of the first of them among all requests."""
        until = options.get("until") or []
        sampling = Sampling(
            max_new_tokens=options.get("max_gen_toks", min(_MAX_NEW_TOKENS, max(1, self._length // 2))),
            temperature=float(options.get("temperature") or 1.0) if options.get("do_sample") else 0.0,
            top_p=float(options.get("top_p") or 1.0) if options.get("do_sample") else 1.0,
            stop=(until,) if isinstance(until, str) else tuple(filter(None, until)),
        )
        sampling.validate()
        prompts = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
        room = self._length - sampling.max_new_tokens
        if room < 1:
            raise RecipeError(f"max_gen_toks={sampling.max_new_tokens} of the task leaves no room for a context, since the model "
                              f"reads max_length={self._length} at once; give max_gen_toks={self._length - 1} or less")  # fmt: skip
        prompts = [prompt[-room:] for prompt in prompts]
        require_tokens(prompts, sampling, self._recipe.model)
        texts = [GrowingText(self._text, prompt, sampling.max_new_tokens, sampling.stop, self._ends) for prompt in prompts]
        generate(self._stages, prompts, texts, sampling, first)
        return [text.text or "" for text in texts]
