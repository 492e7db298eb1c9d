"""What was measured on this machine, as plain values: between the ranks that measure, the report and the cluster file."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, median
from typing import Any


@dataclass(frozen=True)
class ProductTime:
    """The time of a matrix product [m, k] x [k, n]."""

    dtype: str
    m: int
    n: int
    k: int
    seconds: float

    @property
    def flops_per_second(self) -> float:
        return 2.0 * self.m * self.n * self.k / self.seconds


@dataclass(frozen=True)
class OperatorSample:
    """The time of an operator, by torch's name, in a step of a model."""

    name: str
    dtype: str
    work: float
    """Floating-point operations of matrix products; of other operators bytes read and written."""
    seconds: float


@dataclass(frozen=True)
class VariantTime:
    """The time of a call of one of the model's operators, with its backward pass, in one of its variants (trainer/operators)."""

    name: str
    """The operator."""
    variant: str
    dtype: str
    shape: dict[str, Any]
    """As in trainer/costs/operator_cases.py."""
    seconds: float


@dataclass(frozen=True)
class LinkTime:
    """The time of a communication between all ranks or, for p2p, of a message between the first two."""

    kind: str
    bytes: int
    ranks: int
    seconds: float


@dataclass(frozen=True)
class RankFigures:
    """What each rank is capable of while as many ranks as there were do the same."""

    ranks: int
    device: str
    """cpu | cuda | the type of another accelerator."""
    name: str
    """The product."""
    threads: int
    """CPU threads of the rank."""
    memory_bytes: int
    context_bytes: int
    products: list[ProductTime] = field(default_factory=list)
    copy_bytes_per_second: float = 0.0
    launch_seconds: float = 0.0
    operators: list[OperatorSample] = field(default_factory=list)
    variants: list[VariantTime] = field(default_factory=list)
    """Of the first rank, alone."""
    links: list[LinkTime] = field(default_factory=list)
    cores: int | None = None
    """Units of an accelerator that compute tiles of a product side by side; None for a CPU, or if they are not known."""
    spread: float = 0.0
    """By which fraction the time of a product differed between rounds, in the median."""

    def peaks(self) -> dict[str, float]:
        """Returns, for each dtype, the most FLOP/s that a product reached."""
        found: dict[str, float] = {}
        for product in self.products:
            found[product.dtype] = max(found.get(product.dtype, 0.0), product.flops_per_second)
        return found

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def usual(seconds: Iterable[float]) -> float:
    """Returns the lower quartile: what something takes when nothing else disturbs it, which only makes it take longer."""
    ordered = sorted(seconds)
    return ordered[(len(ordered) - 1) // 4]


def rank_figures(values: dict[str, Any]) -> RankFigures:
    """Returns the figures that `as_dict` wrote."""
    lists = {
        "products": [ProductTime(**one) for one in values["products"]],
        "operators": [OperatorSample(**one) for one in values["operators"]],
        "variants": [VariantTime(**one) for one in values["variants"]],
        "links": [LinkTime(**one) for one in values["links"]],
    }
    return RankFigures(**{**values, **lists})


def of_all(ranks: Sequence[RankFigures]) -> RankFigures:
    """Returns the mean rank: medians of what several ranks measured at the same time. All have measured the same list."""
    first = ranks[0]
    products = [
        ProductTime(rows[0].dtype, rows[0].m, rows[0].n, rows[0].k, median(row.seconds for row in rows))
        for rows in zip(*(rank.products for rank in ranks), strict=True)
    ]
    return RankFigures(
        ranks=first.ranks,
        device=first.device,
        name=first.name,
        threads=first.threads,
        memory_bytes=min(rank.memory_bytes for rank in ranks),
        context_bytes=max(rank.context_bytes for rank in ranks),
        products=products,
        copy_bytes_per_second=median(rank.copy_bytes_per_second for rank in ranks),
        launch_seconds=median(rank.launch_seconds for rank in ranks),
        operators=by_octave([sample for rank in ranks for sample in rank.operators]),
        variants=first.variants,
        links=first.links,
        cores=first.cores,
        spread=max(rank.spread for rank in ranks),
    )


def by_octave(samples: Sequence[OperatorSample]) -> list[OperatorSample]:
    """Returns one sample for each operator, dtype and octave of work: the median work, and the mean time for a unit of work. The
    mean, because an operator is called in different ways, e.g. on tensors that are contiguous and on others."""
    groups: dict[tuple[str, str, int], list[OperatorSample]] = {}
    for sample in samples:
        groups.setdefault((sample.name, sample.dtype, int(max(1.0, sample.work)).bit_length()), []).append(sample)
    return [
        OperatorSample(name, dtype, work, work * mean(one.seconds / max(1.0, one.work) for one in group))
        for (name, dtype, _), group in sorted(groups.items())
        if (work := max(1.0, median(one.work for one in group)))
    ]
