"""What a rank does for `bagualu generate`: the function that the launcher starts on each worker in place of the trainer."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bagualu.comm.group import Communicator
from bagualu.comm.objects import gather_json
from bagualu.trainer.data.tokenizer import load_tokenizer
from bagualu.trainer.data.tokenizer_files import end_tokens_of
from bagualu.trainer.generation.generate import generate
from bagualu.trainer.generation.request import GenerateRequest
from bagualu.trainer.generation.stages import load_stages
from bagualu.trainer.generation.terminal import Terminal
from bagualu.trainer.generation.text import GrowingText
from bagualu.trainer.recipe.config import Recipe


def generate_on_ranks(
    recipe: Recipe, communicator: Communicator, stop: Callable[[], bool], scratch: Path | None = None
) -> dict[str, Any]:
    """Does what the request in run.dir asks for. Returns `samples` in the order of the prompts, each with `text` and `tokens` after
    the prompt and why it `ended`; the `seconds` and `new_tokens` of all; and whether they are `finished`, not interrupted."""
    request = GenerateRequest.load(Path(recipe.run.dir))
    stages = load_stages(recipe, communicator, Path(request.checkpoint))
    stages.freeze()
    tokenizer = load_tokenizer(Path(request.tokenizer)) if request.tokenizer else None
    sampling, count, ranks = request.sampling, len(request.tokens), stages.mesh.layout.data
    share = -(-count // ranks)
    first = stages.mesh.at("data") * share
    prompts = [request.tokens[min(number, count - 1)] for number in range(first, first + share)]
    ends = end_tokens_of(tokenizer, Path(request.tokenizer or "")) if tokenizer and not sampling.ignore_eos else ()
    texts = [GrowingText(tokenizer, prompt, sampling.max_new_tokens, sampling.stop, ends) for prompt in prompts]
    shows = request.stream and ranks == 1 and communicator.rank == 0
    terminal = Terminal(request.shown_prompts, sys.stdout) if shows else None

    def after_token() -> None:
        if terminal is not None:
            terminal.show([text.settled for text in texts], [text.ended is not None for text in texts])

    started = time.perf_counter()
    finished = generate(stages, prompts, texts, sampling, first, after_token, stop)
    seconds = time.perf_counter() - started
    if terminal is not None:
        terminal.close()
    own = [{"text": text.text, "tokens": text.tokens, "ended": text.ended or "interrupted"} for text in texts]
    samples = [sample for part in gather_json(own, stages.mesh.group("fold")) for sample in part][:count]
    return {"samples": samples, "seconds": seconds, "new_tokens": sum(len(sample["tokens"]) for sample in samples),
            "finished": finished}  # fmt: skip
