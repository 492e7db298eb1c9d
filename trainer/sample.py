"""Shows what the model says while it is trained."""

import sys
import textwrap

from bagualu.comm.monitor import Phase
from bagualu.parallel.vocabulary import IGNORED
from bagualu.trainer.assemble import TrainerState
from bagualu.trainer.data.batches import Batches
from bagualu.trainer.data.config import STREAM
from bagualu.trainer.data.tokenised import Corpus
from bagualu.trainer.data.tokenizer import load_tokenizer
from bagualu.trainer.data.tokenizer_files import end_token_of
from bagualu.trainer.generation.generate import generate
from bagualu.trainer.generation.request import Sampling
from bagualu.trainer.generation.stages import Stages
from bagualu.trainer.generation.text import GrowingText
from bagualu.trainer.operators.kernel import left_to_functions

_TOKENS = 48


def show_sample(state: TrainerState, step: int) -> None:
    """Prints on rank 0 the beginning of a document that the model makes up after `step` steps, or its answer in a conversation of
    the data. Does nothing if the tokens stand for no text. Collective."""
    path, model = state.corpus.tokenizer_path, state.recipe.model
    if path is None:
        return
    state.mesh.monitor.at(Phase.VALIDATE)
    most = model.max_positions or sys.maxsize
    prompt, end = beginning(state.corpus, state.batches, state.recipe.data.packing, step)
    prompt = prompt[-max(1, most - _TOKENS) :]
    count = max(1, min(_TOKENS, most - len(prompt)))
    sampling = Sampling(max_new_tokens=count, temperature=0.8, top_p=0.95, seed=state.recipe.run.seed)
    text = GrowingText(None, prompt, sampling.max_new_tokens, end_tokens=() if end is None else (end,))
    stages = Stages(state.recipe, state.mesh, state.engine.model, state.engine.slices)
    with left_to_functions():  # generating kernels for each length of a prompt would take far longer than the sample
        generate(stages, [prompt], [text], sampling)
    if state.mesh.at("world") == 0:
        words = load_tokenizer(path).decode([*prompt, *text.tokens], skip_special_tokens=not state.corpus.conversations)
        print(f"step {step}: a sample", textwrap.indent(words, "    ", lambda line: True), sep="\n", file=sys.stderr, flush=True)


def beginning(corpus: Corpus, batches: Batches, packing: str, step: int) -> tuple[list[int], int | None]:
    """Returns the tokens that a sample after `step` steps goes on from, and the token that ends it; None: none does. `corpus` has a
    tokenizer.

    In a stream, a document begins after the token that ends the one before. Where each is trained on by itself, its first token is
    never predicted, so that of a document of the data is taken: of a conversation, all tokens up to its first answer, which ends
    with the mark that the template writes or, if that is no special token, with the tokenizer's eos_token.
    """
    assert corpus.tokenizer_path is not None
    tokenizer, end = load_tokenizer(corpus.tokenizer_path), corpus.end_token
    if end is None or corpus.conversations:
        end = end_token_of(tokenizer, corpus.tokenizer_path)
    if packing == STREAM:
        return [end or 0], end
    rows = batches.validation(0, 1) if batches.validation_count else batches.batch(step, 0, 1)
    inputs, labels, begins = (tensor[0].tolist() for tensor in rows)
    predicted = [place for place, label in enumerate(labels) if label != IGNORED] or [0]
    if corpus.conversations:
        special = {index for index, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        end = next((labels[place] for place in predicted if labels[place] in special), end)
    return inputs[begins[predicted[0]] : predicted[0] + 1], end
