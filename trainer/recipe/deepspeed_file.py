"""The file of parallel.deepspeed.config: which of its keys DeepSpeed gets, and which of them do not go with the recipe."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from bagualu.comm.errors import RecipeError

_KEY = "parallel.deepspeed.config"
_NAMED = 20
"""The number of unknown keys that a message names."""


@dataclass(frozen=True)
class Allowed:
    """The values that DeepSpeed can use for a key."""

    text: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True)
class Decision:
    """What the recipe decides of a key of DeepSpeed's configuration."""

    value: object
    """The value that agrees with the recipe, or `Allowed` if several do."""
    reason: str
    """The recipe's key and value, or why no other value is possible."""
    default: object = None
    """The value that DeepSpeed would use if the file left the key out, where training would differ by it; otherwise None."""

    def agrees(self, value: object) -> bool:
        if value == "auto":
            return True
        if isinstance(self.value, Allowed):
            return self.value.accepts(value)
        return value == self.value and isinstance(value, bool) == isinstance(self.value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(least: int, multiple: int = 1) -> Allowed:
    """Returns the whole numbers of at least `least` that `multiple` divides, also if written as 5e8."""

    def accepts(value: Any) -> bool:
        return _is_number(value) and least <= value < 2**63 and value % multiple == 0

    text = "a whole number" if multiple == 1 else f"a multiple of {multiple}"
    return Allowed(f"{text} of at least {least}", accepts)


def text_in(*names: str, capitals: bool = False) -> Allowed:
    """Returns the texts `names`; with `capitals`, their letters may also be capital."""

    def accepts(value: Any) -> bool:
        return isinstance(value, str) and (value.lower() if capitals else value) in names

    return Allowed(f"one of {', '.join(names)}", accepts)


_SWITCH = Allowed("true or false", lambda value: isinstance(value, bool))
_TEXT = Allowed("a text", lambda value: isinstance(value, str))
_TEXTS = Allowed("a list of texts", lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value))
_SWITCHES = (
    *("dump_state", "memory_breakdown", "wall_clock_breakdown", "csv_monitor.enabled", "tensorboard.enabled"),
    *(f"comms_logger.{key}" for key in ("debug", "enabled", "prof_all", "verbose")),
    *(f"flops_profiler.{key}" for key in ("detailed", "enabled")),
    *(f"zero_optimization.{key}" for key in (
        "allgather_partitions", "contiguous_gradients", "enable_sanity_checks", "log_trace_cache_warnings", "overlap_comm",
        "offload_optimizer.pin_memory", "offload_param.pin_memory", "reduce_scatter", "use_multi_rank_bucket_allreduce",
        "stage3_allgather_sequential", "stage3_use_all_reduce_for_fetch_params",
    )),
)  # fmt: skip
_SIZES = (
    *("max_live_parameters", "max_reuse_distance", "model_persistence_threshold", "module_granularity_threshold"),
    *("param_persistence_threshold", "prefetch_bucket_size"),
)
PASSED: dict[str, Allowed] = {
    **dict.fromkeys(_SWITCHES, _SWITCH),
    "log_level": text_in("debug", "info", "warning", "error", "critical"),
    "steps_per_print": number(1),
    "comms_logger.prof_ops": _TEXTS,
    "flops_profiler.module_depth": number(-1),
    "flops_profiler.output_file": _TEXT,
    "flops_profiler.profile_step": number(1),
    "flops_profiler.recompute_fwd_factor": Allowed("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1),
    "flops_profiler.top_modules": number(1),
    **{f"{section}.{key}": _TEXT for section in ("csv_monitor", "tensorboard") for key in ("job_name", "output_path")},
    **{f"zero_optimization.stage3_{key}": number(0) for key in _SIZES},
    "zero_optimization.allgather_bucket_size": number(2, multiple=2),
    "zero_optimization.reduce_bucket_size": number(1),
}
"""DeepSpeed's keys that a file may hold whatever the recipe says: they change how DeepSpeed works, not its results."""
_IDLE = {
    *(f"fp16.{key}" for key in (
        "auto_cast", "consecutive_hysteresis", "fp16_master_weights_and_grads", "hysteresis", "initial_scale_power", "loss_scale",
        "loss_scale_window", "min_loss_scale",
    )),
    *("zero_optimization.stage3_gather_16bit_weights_on_model_save", "zero_allow_untested_optimizer"),
}  # fmt: skip
"""DeepSpeed's keys that have no effect here: they are about float16, which fp16.enabled refuses, about DeepSpeed's own checkpoints,
which are not written, and about the optimizer's class."""
_OWN_KEYS = {
    "activation_checkpointing": "train.recompute", "amp": "train.dtype", "torch_autocast": "train.dtype", "wandb": "log.wandb",
    "checkpoint": "checkpoint.*", "compile": "train.compile", "expert_parallel": "parallel.expert", "pipeline": "parallel.pipeline",
    "sequence_parallel_size": "parallel.context", "tensor_parallel": "parallel.tensor",
}  # fmt: skip
"""The recipe's key for what a section of DeepSpeed's configuration does."""


@dataclass(frozen=True)
class DeepSpeedFile:
    """A file of DeepSpeed's configuration."""

    name: str
    values: dict[str, Any]
    """The value of each key, named with its sections, e.g. "zero_optimization.stage". A key whose value is null is left out."""

    @staticmethod
    def read(name: str) -> "DeepSpeedFile":
        """Raises RecipeError if `name` holds no configuration."""
        try:
            whole = json.loads(Path(name).read_text(encoding="utf-8"))
            if isinstance(whole, dict):
                return DeepSpeedFile(name, {key: value for key, value in _flat(whole) if value is not None})
            problem = "holds no JSON object"
        except RecursionError:
            problem = "holds sections or lists that are nested too deep"
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({error})"
        raise RecipeError(f"{_KEY}={name} {problem}; give a file of DeepSpeed's configuration in JSON")

    def passed(self, decided: Mapping[str, Decision]) -> dict[str, Any]:
        """Returns the keys that DeepSpeed is to have, in their sections. Raises RecipeError that names every key which does not go
        with the recipe, `decided`, or cannot be used."""
        differ, wrong, unknown = [], [], []
        for key, value in self.values.items():
            if key in decided and not decided[key].agrees(value):
                differ.append(f"{key}={_shown(value)} but {decided[key].reason}")
            elif key in PASSED and value != "auto" and not PASSED[key].accepts(value):
                wrong.append(f"{key}={_shown(value)} is not {PASSED[key].text}")
            elif not (key in decided or key in PASSED or key in _IDLE or key.startswith("scheduler.params.")):  # see scheduler.type
                unknown.append(key)
        problems = []
        if differ:
            problems.append(f"contradicts the recipe: {'; '.join(differ)}; make them agree, or leave these keys of the file out")
        if wrong:
            problems.append(f"has values that DeepSpeed cannot use: {'; '.join(wrong)}; change them, or leave these keys out")
        if unknown:
            named = "; ".join(dict.fromkeys(_unknown(key, decided) for key in unknown[:_NAMED]))
            more = f"; and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
            problems.append(f"has keys that cannot be used here: {named}{more}; leave them out of the file")
        if problems:
            said = " ".join(". It ".join(problems).split())  # a key may hold a line break
            raise RecipeError(f"{_KEY}={self.name} {said}")
        return _nested({key: value for key, value in self.values.items() if key in PASSED and value != "auto"})

    def replaced_defaults(self, decided: Mapping[str, Decision]) -> str | None:
        """Returns a line that names the defaults of DeepSpeed on which this file relies and which the recipe replaces by other
        values; None if there are none. A file without an optimizer leaves its settings to a program that we do not know."""
        optimizer = any(key.startswith("optimizer.") for key in self.values)
        replaced = [
            f"{decision.reason}, not DeepSpeed's default {key}={_shown(decision.default)}"
            for key, decision in decided.items()
            if key not in self.values and decision.default is not None and not decision.agrees(decision.default)
            if optimizer or "." not in key
        ]
        return f"{_KEY}={self.name} leaves out keys that the recipe decides: {'; '.join(replaced)}" if replaced else None


def _shown(value: object) -> str:
    """Returns `value` as in JSON, cut off where it is long or nested, which no value that can be used is."""
    if isinstance(value, list) and any(isinstance(one, list | dict) for one in value):
        return "[...]"
    shown = json.dumps(value)
    return shown if len(shown) <= 100 else f"{shown[:100]}..."


def _unknown(key: str, decided: Mapping[str, object]) -> str:
    """Returns what the recipe has in place of `key`, or which key may be meant."""
    section = key.partition(".")[0]
    if section in _OWN_KEYS:
        return f"{section}, which is decided by {_OWN_KEYS[section]} of the recipe"
    near = get_close_matches(key, [*decided, *PASSED], 1)
    return key + (f" (did you mean {near[0]}?)" if near else "")


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (key with its sections, value) for every value of a configuration that is not a section."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration of which `flat` has the values, as `_flat` yields them."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        section = nested
        for one in path:
            section = section.setdefault(one, {})
        section[last] = value
    return nested
