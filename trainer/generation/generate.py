"""Continues prompts token by token.

Shapes: B sequences, S tokens of a pass, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch

from bagualu.comm.agree import maxima
from bagualu.parallel.pipeline.relay import share_from_last_stage
from bagualu.trainer.generation.request import Sampling
from bagualu.trainer.generation.sample import choose
from bagualu.trainer.generation.stages import Stages
from bagualu.trainer.generation.text import GrowingText
from bagualu.trainer.models.decoder.cache import cached


@torch.no_grad()
def generate(
    stages: Stages,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[GrowingText],
    sampling: Sampling,
    first: int = 0,
    after_token: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Adds tokens to the `texts` of `prompts` until all have ended, on every data rank; returns False if `stop()` was true on any
    rank before. Collective over all ranks.

    A data rank gives its own prompts, as many as every other; `first` is the number of the first of them. The other ranks of its
    layout give the same. `after_token` is called whenever each text has been given a token.
    """
    mesh, longest = stages.mesh, max(map(len, prompts))
    device = mesh.group("world").device
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    tokens = torch.tensor(rows, device=device)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    with cached(stages.model, padding) as columns:
        for number in range(sampling.max_new_tokens):
            logits = stages.logits(tokens, columns)
            chosen = padding.new_zeros(len(prompts))
            if logits is not None:
                histories = [[*prompt, *text.tokens] for prompt, text in zip(prompts, texts, strict=True)]
                chosen = choose(logits[:, -1], histories, sampling, range(first, first + len(prompts)), number)
            share_from_last_stage(mesh, chosen)
            for text, token in zip(texts, mesh.group("world").read(chosen), strict=True):
                if text.ended is None:
                    text.add(token)
            after_token()
            unfinished, stopped = maxima([any(text.ended is None for text in texts), stop()], mesh.group("world"))
            if stopped or not unfinished:
                return not (stopped and unfinished)
            tokens = chosen.unsqueeze(1)
    return True
