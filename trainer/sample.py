"""Shows what the model says while it is trained."""

import sys
import textwrap
from contextlib import nullcontext

import torch

from bagualu.comm.monitor import Phase
from bagualu.trainer.assemble import TrainerState
from bagualu.trainer.data.tokenizer import load_tokenizer
from bagualu.trainer.generation.generate import generate
from bagualu.trainer.generation.request import Sampling
from bagualu.trainer.generation.stages import Stages
from bagualu.trainer.generation.text import GrowingText

_TOKENS = 48


def show_sample(state: TrainerState, step: int) -> None:
    """Prints on rank 0 the beginning of a document that the model makes up after `step` steps. Does nothing if the tokens stand for
    no text. Collective."""
    path, model = state.corpus.tokenizer_path, state.recipe.model
    if path is None:
        return
    state.mesh.monitor.at(Phase.VALIDATE)
    prompt = [state.corpus.end_token]  # after it, a document begins
    count = min(_TOKENS, (model.max_positions or sys.maxsize) - len(prompt))
    sampling = Sampling(max_new_tokens=max(1, count), temperature=0.8, top_p=0.95, seed=state.recipe.run.seed)
    text = GrowingText(None, prompt, sampling.max_new_tokens, end_token=prompt[0])
    stages = Stages(state.recipe, state.mesh, state.engine.model, state.engine.slices)
    # Compiling for every length of the cache would take far longer than the sample.
    with torch.compiler.set_stance("force_eager") if state.recipe.train.compile else nullcontext():
        generate(stages, [prompt], [text], sampling)
    if state.mesh.at("world") == 0:
        words = load_tokenizer(path).decode(text.tokens, skip_special_tokens=True)
        print(f"step {step}: a sample", textwrap.indent(words, "    ", lambda line: True), sep="\n", file=sys.stderr, flush=True)
