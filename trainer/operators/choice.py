"""Which variant computes each operator of a run, and why: decided once, recorded in the run's directory, kept when it resumes. Does
not import torch."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bagualu.trainer.operators.config import OperatorsConfig
from bagualu.trainer.operators.registry import AUTO, DEFAULT_VARIANTS, FLOAT8, GENERATED, is_float8, variants

ALIKE = 0.02
"""The usual variant is kept unless another takes less time than it by more than this fraction."""
GIVEN, COMPILED, MEASURED, USUAL = "given", "compiled", "measured", "usual"


@dataclass(frozen=True)
class Chosen:
    """The variant of an operator; auto: of each call the usual one, where calls of several kinds have different ones."""

    variant: str
    why: str
    """given: the recipe names it. compiled: train.compile chose it. measured: it was quicker here.
    usual: nothing was measured, or nothing better was found."""
    seconds: dict[str, float] = field(default_factory=dict)
    """The measured times of all calls in a micro-batch, or in an update, by variant."""


@dataclass(frozen=True)
class ChosenOperators:
    """The variants of a run's operators, and the product name of the chip on which they were chosen."""

    chip: str
    operators: dict[str, Chosen]

    @property
    def variants(self) -> dict[str, str]:
        return {operator: chosen.variant for operator, chosen in self.operators.items()}

    @property
    def compiled(self) -> bool:
        """Whether train.compile has chosen generated kernels."""
        return any(chosen.why == COMPILED for chosen in self.operators.values())

    def as_config(self) -> OperatorsConfig:
        return OperatorsConfig(**self.variants)

    def without(self, reason: str) -> "ChosenOperators":
        """Returns the same without the choices made for this reason."""
        return replace(self, operators={name: chosen for name, chosen in self.operators.items() if chosen.why != reason})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: Any) -> "ChosenOperators":
        """Raises KeyError, TypeError, AttributeError or ValueError for what `to_json` has not made."""
        operators = {operator: Chosen(**chosen) for operator, chosen in values["operators"].items()}
        return ChosenOperators(str(values["chip"]), {name: operators[name] for name in DEFAULT_VARIANTS if name in operators})

    @staticmethod
    def read(path: Path) -> "ChosenOperators | None":
        """Returns what is recorded in `path`; None if there is no such file. Raises OSError, and ValueError if it is damaged."""
        try:
            return ChosenOperators.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


def quickest(usual: Sequence[str], times: Sequence[Mapping[str, float]]) -> Chosen:
    """Returns the variant with which all calls of an operator together take least, given the total times of each kind of calls by
    variant, and the usual variant of each kind."""
    names = [name for name in times[0] if all(name in of_kind for of_kind in times)]
    totals = {name: sum(of_kind[name] for of_kind in times) for name in names}
    before = sum(of_kind.get(name, math.inf) for of_kind, name in zip(times, usual, strict=True))  # one that fails has no time
    best = min(totals, key=lambda name: totals[name])
    if totals[best] >= before * (1 - ALIKE):
        return replace(by_rule(usual), seconds=totals)
    return Chosen(best, MEASURED, totals)


def by_rule(usual: Sequence[str]) -> Chosen:
    """Returns the choice without measurements, given the usual variant of each kind of calls."""
    return Chosen(usual[0] if len(set(usual)) == 1 else AUTO, USUAL)


def changes_float8(recorded: ChosenOperators | None, config: OperatorsConfig, dtype: str) -> bool:
    """Returns whether the variant of `linear` that a run has recorded does not go with train.dtype=`dtype`, and none is named."""
    was = recorded.operators.get("linear") if recorded is not None else None
    return config.linear == AUTO and was is not None and is_float8(was.variant) != (dtype == "float8")


def kept(
    recorded: ChosenOperators | None, config: OperatorsConfig, chip: str, product: str, dtype: str
) -> tuple[dict[str, Chosen], list[str]]:
    """Returns the choices that are settled without measuring, and what is to be said about them: variants that the recipe names,
    and for the other operators those that the run has recorded, if it has, unless they do not go with train.dtype=`dtype`. `chip`:
    the type of the ranks' device, `product` its product name."""
    settled, remarks = {}, []
    before = dict(recorded.operators) if recorded is not None else {}
    if changes_float8(recorded, config, dtype):
        before.pop("linear")
    if config.linear == AUTO and dtype == "float8" and "linear" not in before:
        settled["linear"] = Chosen(FLOAT8[0], USUAL)
    for operator, variant in config.as_dict().items():
        was = before.get(operator)
        if operator in settled:
            continue
        if variant != AUTO:
            settled[operator] = Chosen(variant, GIVEN) if was is None or was.variant != variant else was
            if was is not None and was.variant != variant:
                remarks.append(f"operators.{operator}={variant}, as given; so far the run had {was.variant}")
        elif was is not None and (was.variant == AUTO or was.variant in variants(operator, chip)):
            settled[operator] = was
        elif was is not None:
            usual = FLOAT8[0] if operator == "linear" and dtype == "float8" else DEFAULT_VARIANTS[operator]
            settled[operator] = Chosen(usual, USUAL)
            remarks.append(f"operators.{operator}={usual}: {product} has no {was.variant}, with which the run "
                           "began")  # fmt: skip
    if recorded is not None and recorded.chip != product:
        same = [f"operators.{name}={one.variant}" for name, one in settled.items() if one is before.get(name)]
        keeps = f" and keeps {', '.join(same)}; name another to change it" if same else ""
        remarks.append(f"the run chose its operators on {recorded.chip}, is on {product} now{keeps}")
    return settled, remarks


def as_recorded(path: Path, config: OperatorsConfig, chip: str, dtype: str) -> OperatorsConfig:
    """Returns `config` with the variants that a run has recorded in `path` in place of auto, as far as `chip` has them, they go
    with train.dtype=`dtype` and they need not be generated, which takes longer than most texts. Raises OSError, and ValueError if
    the file is damaged."""
    recorded = ChosenOperators.read(path)
    settled, _ = kept(recorded, config, chip, recorded.chip if recorded is not None else "", dtype)
    generated = [name for name, chosen in settled.items() if chosen.variant == GENERATED and getattr(config, name) == AUTO]
    return replace(config, **{name: AUTO if name in generated else chosen.variant for name, chosen in settled.items()})
