"""`bagualu generate`: continues prompts with the model of a run, in any layout. Torch is imported only when workers start."""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bagualu.comm.errors import RecipeError
from bagualu.launch.verbs.command_line import SEVERAL, CommandLine
from bagualu.launch.verbs.model_ranks import call, on_this_machine, report_failure
from bagualu.launch.workers.ended import Ended
from bagualu.trainer.generation.find import TrainedModel, compose_layout, find_model
from bagualu.trainer.generation.request import GenerateRequest, Sampling, require_tokens
from bagualu.trainer.generation.terminal import Terminal
from bagualu.trainer.process.failure import DONE, INTERRUPTED
from bagualu.trainer.recipe.config import Recipe

_ENTRYPOINT = "bagualu.trainer.generation.worker:generate_on_ranks"
_PROMPTS = ("--prompt", "--prompt-file", "--tokens")
Number = TypeVar("Number", int, float)


def generate(request: CommandLine) -> tuple[int, Any]:
    """Generates and prints what the command line asks for. Returns the exit code and the object that --json prints.

    The object has `samples` in the order of the prompts, each with its `prompt`, the `text` (null without a tokenizer) and `tokens`
    after it, and why it `ended` (end, stop, length or interrupted); and `seconds`, `tokens_per_second`, `checkpoint` and `layout`.
    Raises RecipeError."""
    if not request.overrides or request.overrides[0].partition("=")[0] in ("recipe", "run.dir"):
        raise RecipeError(
            "generate takes the directory of a run or a checkpoint first; e.g. bagualu generate runs/tiny --prompt 'def '"
        )
    sampling = read_sampling(request)
    sampling.validate()
    given, *overrides = request.overrides
    trained = find_model(Path(given).expanduser())
    with tempfile.TemporaryDirectory(prefix="bagualu-generate-") as folder:
        recipe = on_this_machine(compose_layout("generate", trained, overrides, folder, SEVERAL["generate"]))
        wanted = _wanted(request, trained, sampling)
        require_tokens(wanted.tokens, sampling, trained.recipe.model)
        wanted.save(Path(folder))
        ended = call(recipe, _ENTRYPOINT, request.json)
    return _result(ended, wanted, recipe, request.json)


def read_sampling(request: CommandLine) -> Sampling:
    """Returns how the options say that tokens are chosen. Raises RecipeError for a value that is no number, or given twice."""
    values: dict[str, list[str]] = {}
    for option, value in request.values:
        values.setdefault(option, []).append(value)
    default = Sampling()

    def one(option: str, kind: Callable[[str], Number], otherwise: Number) -> Number:
        given = values.get(option, [])
        if len(given) > 1:
            raise RecipeError(f"{option} is given twice, as {given[0]} and {given[1]}; give one")
        try:
            return kind(given[0]) if given else otherwise
        except ValueError as error:
            what = "a whole number" if kind is int else "a number"
            raise RecipeError(f"{option} {given[0]} is not {what}; give e.g. {option} {otherwise:g}") from error

    return Sampling(
        max_new_tokens=one("--max-new-tokens", int, default.max_new_tokens),
        temperature=one("--temperature", float, default.temperature),
        top_p=one("--top-p", float, default.top_p),
        min_p=one("--min-p", float, default.min_p),
        repetition_penalty=one("--repetition-penalty", float, default.repetition_penalty),
        seed=one("--seed", int, default.seed),
        stop=tuple(values.get("--stop", [])),
        ignore_eos=request.ignore_eos,
    )


def _wanted(request: CommandLine, trained: TrainedModel, sampling: Sampling) -> GenerateRequest:
    """Returns the request with its prompts as tokens. Raises RecipeError."""
    prompts = [prompt for option, value in request.values if option in _PROMPTS for prompt in _read(option, value)]
    if not prompts:
        raise RecipeError("there is no prompt; give --prompt TEXT, --prompt-file FILE (- for stdin) or --tokens 5,17,101")
    needs_text = "--prompt" if any(isinstance(prompt, str) for prompt in prompts) else "--stop" if sampling.stop else None
    if trained.tokenizer is None and needs_text:
        why = "its tokens are random" if trained.recipe.data.source == "random" else "it keeps no tokenizer.json"
        raise RecipeError(f"{needs_text} needs a tokenizer, and the run of {trained.checkpoint} has none ({why}); "
                          "give the prompt as --tokens 5,17,101, without --stop")  # fmt: skip
    return GenerateRequest(
        checkpoint=str(trained.checkpoint.resolve()),
        tokenizer=None if trained.tokenizer is None else str(trained.tokenizer.resolve()),
        prompts=tuple(prompt if isinstance(prompt, str) else None for prompt in prompts),
        tokens=tuple(_encoded(prompts, trained.tokenizer)),
        sampling=sampling,
        stream=not request.json,
    )


def _read(option: str, value: str) -> Sequence[str | tuple[int, ...]]:
    """Returns the prompts that an option gives, as text or as tokens. Raises RecipeError."""
    if option == "--prompt":
        return [value]
    if option == "--tokens":
        try:
            return [tuple(map(int, value.split(",")))]
        except ValueError as error:
            raise RecipeError(f"--tokens {value} are no numbers with commas between them; give e.g. --tokens 5,17,101") from error
    try:
        text = sys.stdin.read() if value == "-" else Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RecipeError(f"--prompt-file {value} cannot be read ({why}); give a file with one prompt a line") from error
    if not text.strip():
        raise RecipeError(f"--prompt-file {value} holds no prompt; give one a line")
    return text.removesuffix("\n").split("\n")


def _encoded(prompts: Sequence[str | tuple[int, ...]], tokenizer: Path | None) -> list[tuple[int, ...]]:
    """Returns the tokens of each prompt; an empty text is the token after which a document begins. Raises RecipeError if the
    tokenizer has none."""
    if tokenizer is None:
        return [prompt for prompt in prompts if not isinstance(prompt, str)]
    from bagualu.trainer.data.tokenizer import load_tokenizer
    from bagualu.trainer.data.tokenizer_files import end_token_of

    loaded = load_tokenizer(tokenizer, special_tokens=True)
    end = end_token_of(loaded, tokenizer)
    if end is None and "" in prompts:
        raise RecipeError(
            f"{tokenizer} does not say which token ends a document, after which an empty prompt begins; give a prompt"
        )
    first = () if end is None else (end,)
    return [tuple(loaded.encode(prompt).ids) or first if isinstance(prompt, str) else prompt for prompt in prompts]


def _result(ended: Ended, wanted: GenerateRequest, recipe: Recipe, quiet_stdout: bool) -> tuple[int, Any]:
    """Prints what the ranks have not printed, and returns the exit code and the object that --json prints."""
    if ended.failure is not None:
        return report_failure(ended.failure)
    assert ended.summary is not None
    samples, seconds, count = (ended.summary[key] for key in ("samples", "seconds", "new_tokens"))
    layout = recipe.validate(recipe.world_size())
    if not quiet_stdout:
        if layout.data > 1:  # else they were written while they grew
            texts = [" ".join(map(str, ["", *each["tokens"]])) if each["text"] is None else each["text"] for each in samples]
            Terminal(wanted.shown_prompts, sys.stdout).show(texts, [True] * len(texts))
        print(f"bagualu: {count} tokens in {seconds:.1f} s, {count / seconds:,.0f} tokens/s, {layout}", file=sys.stderr, flush=True)
    document = {
        "samples": [{"prompt": prompt, **sample} for prompt, sample in zip(wanted.prompts, samples, strict=True)],
        "seconds": seconds,
        "tokens_per_second": count / seconds,
        "checkpoint": wanted.checkpoint,
        "layout": str(layout),
    }
    return DONE if ended.summary["finished"] else INTERRUPTED, document
