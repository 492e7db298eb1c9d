"""Describes a published run: a recipe, a cluster and a number of ranks, by general rules from the columns of its row."""

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from math import prod

import yaml

from bagualu.comm.cluster_file import load_cluster
from bagualu.comm.errors import RecipeError
from bagualu.comm.topology import Cluster
from bagualu.trainer.models.decoder.shapes import parameter_shapes
from bagualu.trainer.recipe.compose import compose
from bagualu.trainer.recipe.config import Recipe

from .families import KERNELS, Framework, Unknown, family_of, framework_of
from .rows import Row

CHIPS = (
    (r"\bpcie|\bnvl\b|\bh100\b.*\b(94|96|64)gb|\b(94|96|64)gb\b.*\bh100\b", None),
    (r"\ba100\b.*\b40gb\b|\b40gb\b.*\ba100\b", "a100_40gb"),
    (r"\ba100\b", "a100"),
    (r"\b(h100|h800|h200|gb200|gb300|b200|b300|mi300x)\b", ""),
)
"""Patterns of the words of the column `hardware` (`_words`) and the cluster with this chip: "", that of the name that was found;
None: there is no file of it, only one of a chip of the same name with another memory or other links."""
DTYPES = ((r"fp16|amp_fp16|float16", "float16"), (r"bf16|amp_bf16|bfloat16", "bfloat16"), (r"fp32|float32", "float32"),
          (r"(mx|amp_)?fp8|float8", "float8"))  # fmt: skip
"""Patterns that begin the column `precision`, and the dtype of matrix products."""
SHARDINGS = (
    (r"fsdp shard_grad_op|zero-2", 2),
    (r"fsdp|zero-3", 3),
    (r"ddp/zero-1|zero-1|distributed optimizer", 1),
    (r"ddp|none|$", 0),
)
"""Patterns that begin the column `sharding`, and the stage of ZeRO."""
AXES = {"data": "dp", "tensor": "tp", "pipeline": "pp", "context": "cp"}
"""The column of each axis whose degrees multiply to the number of devices."""
SCHEDULES = {"none": "1f1b", "": "1f1b", "1f1b": "1f1b", "gpipe": "gpipe", "interleaved-1f1b": "interleaved_1f1b"}
LARGEST_DIFFERENCE = 0.05
"""By this fraction the parameters that a row states may differ from those of the model that its columns describe."""


@dataclass(frozen=True)
class Run:
    """A run as it can be predicted."""

    words: tuple[str, ...]
    """The overrides of its recipe."""
    recipe: Recipe
    cluster: Cluster
    world: int
    attention: str
    """fused | unfused | unfused_again: unfused, of which the backward pass computes the scores again."""
    attention_slower: float
    """How much longer its kernel of fused attention takes than the best for its chip."""
    overlap: str
    """What it computes beside collectives: see Framework."""
    recompute_known: bool
    """Whether the row says what is computed again; where it does not, nothing is."""
    stages: tuple[int, ...] | None
    """The pipeline ranks of which the memory is stated; None: all."""


def describe(row: Row) -> Run:
    """Returns the run of a row. Raises Unknown with the reason if it cannot be described."""
    world = _needed(row, "n_devices")
    framework = framework_of(row.text("framework"))
    words = [*_model(row, framework), *_batch(row), *_training(row), *_parallel(row, framework)]
    cluster = cluster_of(row).for_world(world)
    try:
        recipe = _with_keys(words)
        recipe.validate(world)
    except RecipeError as error:
        raise Unknown(f"the recipe is refused: {error}") from error
    _check_parameters(row, recipe)
    stages = (0, recipe.parallel.pipeline - 1) if "first/last stage" in row.text("mem_kind") else None
    chip = cluster.parts[0].chip.name.split()[0]
    slower = KERNELS.get(framework.kernel, {}).get(chip, 1.0)
    return Run(
        tuple(words),
        recipe,
        cluster,
        world,
        _attention(row, framework),
        slower,
        framework.overlap,
        bool(row.text("recompute")),
        stages,
    )


@lru_cache(1)
def _base() -> Recipe:
    return compose(["model=tiny_dense", "data=random"])


def _with_keys(words: Sequence[str]) -> Recipe:
    """Returns the recipe with keys changed as by overrides. To compose a thousand recipes would take minutes."""
    recipe = deepcopy(_base())
    for word in words:
        path, _, value = word.partition("=")
        *sections, key = path.split(".")
        section = reduce(getattr, sections, recipe)
        if not hasattr(section, key):
            raise AttributeError(f"{path} is no key of a recipe")
        setattr(section, key, yaml.safe_load(value))
    return recipe


def cluster_of(row: Row) -> Cluster:
    """Returns the cluster with the chip of a row and, if the row says so, its bandwidth between nodes. Links within a node belong
    to the chip. Raises Unknown if there is no file of the chip."""
    hardware = _words(row.text("hardware"))
    for pattern, name in CHIPS:
        if found := re.search(pattern, hardware):
            if name is None:
                break
            cluster = load_cluster(name or found.group(1))
            gigabits = row.number("inter_node_gbits_s_per_dev")
            return _with_network(cluster, gigabits * 1e9 / 8) if gigabits and not row.single_node else cluster
    raise Unknown(f"there is no cluster file of {row.text('hardware') or 'hardware that is not named'}")


def _words(hardware: str) -> str:
    """Returns the words of a text such as "8x A100_SXM4-80 GB" without the number of devices: "a100 sxm4 80gb"."""
    words = " ".join(re.findall(r"[a-z0-9]+", hardware.lower()))
    return re.sub(r"(\d) gb\b", r"\1gb", re.sub(r"\b\d+ ?x ?(?=[a-z])", "", words))


def _with_network(cluster: Cluster, bytes_per_second: float) -> Cluster:
    part = cluster.parts[0]
    tiers = (*part.tiers[:-1], replace(part.tiers[-1], bytes_per_second=bytes_per_second))
    return replace(cluster, parts=(replace(part, tiers=tiers),))


def _model(row: Row, framework: Framework) -> list[str]:
    family = family_of(row.text("model"))
    words = [f"model.{key}={_needed(row, key)}" for key in ("layers", "hidden", "heads")]
    multiple = framework.pads_vocabulary * row.degree("tp")
    words += [f"model.vocab={-(-_needed(row, 'vocab') // multiple) * multiple}"]
    words += [f"model.kv_heads={row.whole('kv_heads') or _needed(row, 'heads')}"]
    options = [option.format(seq_len=_needed(row, "seq_len")) for option in family.options]
    words += [f"model.tie_embeddings={str(family.tied).lower()}", *options]
    experts = row.whole("experts") or 0
    words.append(f"model.ffn={_needed(row, 'ffn') if not experts else row.whole('ffn') or _needed(row, 'moe_ffn')}")
    if experts:
        words += [f"model.moe.experts={experts}", f"model.moe.top_k={_needed(row, 'topk')}"]
        words += [f"model.moe.ffn={_needed(row, 'moe_ffn')}", f"model.moe.shared_experts={row.whole('shared_experts') or 0}"]
    return words


def _batch(row: Row) -> list[str]:
    return [
        f"data.sequence_length={_needed(row, 'seq_len')}",
        f"data.global_batch={_needed(row, 'gbs')}",
        f"train.micro_batch={_needed(row, 'mbs')}",
    ]


def _training(row: Row) -> list[str]:
    dtype = _first(DTYPES, row, "precision")
    recompute = row.text("recompute")
    if recompute not in ("", "none", "full", "selective"):
        raise Unknown(f"recompute={recompute}: a recipe cannot describe which operators are computed again")
    words = [f"train.dtype={dtype}", f"train.recompute={'full' if recompute == 'full' else 'none'}"]
    return [*words, "checkpoint.every=0", "train.validation_sequences=0", "train.deterministic=false", "comm.backend=nccl"]


def _attention(row: Row, framework: Framework) -> str:
    """Returns how attention is computed. Selective recomputation (arXiv 2205.05198) computes the scores again, as a fused kernel
    always does."""
    again = row.text("recompute") == "selective" and framework.attention == "unfused"
    return "unfused_again" if again else framework.attention


def _parallel(row: Row, framework: Framework) -> list[str]:
    degrees = {
        axis: row.degree(column) for axis, column in (("data", "dp"), ("tensor", "tp"), ("pipeline", "pp"), ("context", "cp"))
    }
    if prod(degrees.values()) != (world := _needed(row, "n_devices")):
        raise Unknown(f"the degrees {tuple(degrees.values())} do not multiply to {world} devices")
    words = [f"parallel.{axis}={degree}" for axis, degree in degrees.items()]
    words += [f"parallel.expert={row.degree('ep')}", f"parallel.zero={_first(SHARDINGS, row, 'sharding')}"]
    sequence = row.text("sp") == "1" or (not row.text("sp") and framework.sequence)
    words.append(f"parallel.sequence={str(sequence and degrees['tensor'] > 1).lower()}")
    if degrees["pipeline"] == 1:
        return words
    chunks = row.degree("vpp")
    schedule = SCHEDULES.get(row.text("schedule"))
    if schedule is None:
        raise Unknown(f"the schedule {row.text('schedule')} is not known")
    if chunks > 1:
        schedule = "interleaved_1f1b"
        words.append(f"parallel.virtual_stages={chunks}")
    elif schedule == "interleaved_1f1b":
        schedule = "1f1b"  # one chunk a rank is no interleaving
    stages = degrees["pipeline"] * chunks
    balance = _balance(_needed(row, "layers"), stages, row.text("pp_partition"))
    return [*words, f"parallel.schedule={schedule}", f"parallel.balance={balance}"]


def _balance(layers: int, stages: int, partition: str) -> str:
    """Returns the layers of each stage. DeepSpeed's partition "type:transformer" gives each stage the same number, rounded up,
    until none are left. Megatron-Core counts the embedding and the loss as a layer each, if layers then divide evenly."""
    if layers % stages == 0:
        return "uniform"
    if partition.startswith("type:"):
        each = -(-layers // stages)
        counts = [min(each, max(0, layers - index * each)) for index in range(stages)]
    elif (layers + 2) % stages == 0:
        each = (layers + 2) // stages
        counts = [each - 1, *[each] * (stages - 2), each - 1]
    else:
        raise Unknown(f"it is not known how {layers} layers divide over {stages} stages")
    if min(counts) < 1:
        raise Unknown(f"{layers} layers over {stages} stages leave a stage without layers, which no recipe can describe")
    return f"[{','.join(map(str, counts))}]"


def _check_parameters(row: Row, recipe: Recipe) -> None:
    """Raises Unknown if the row states another number of parameters than the recipe has."""
    stated = row.number("params_b")
    own = sum(prod(shape) for shape in parameter_shapes(recipe.model).values()) / 1e9
    if stated and abs(own / stated - 1) > LARGEST_DIFFERENCE:
        raise Unknown(f"the columns describe a model of {own:.3g} billion parameters, not of {stated:g}")


def _first(patterns: Sequence[tuple[str, int | str]], row: Row, column: str) -> int | str:
    """Returns the value of the first pattern that begins the text of a column. Raises Unknown if there is none."""
    text = row.text(column).lower()
    for pattern, value in patterns:
        if re.match(pattern, text):
            return value
    raise Unknown(f"{column}={row.text(column) or '(not given)'} is not known")


def _needed(row: Row, column: str) -> int:
    """Returns the whole number in a column. Raises Unknown if it is missing."""
    number = row.whole(column)
    if number is None:
        raise Unknown(f"the column {column} is missing")
    return number
