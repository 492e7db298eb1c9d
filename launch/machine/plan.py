"""What `bagualu doctor` measures on each rank, and on which shapes. A product is [m, k] x [k, n]."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

DTYPES = ("float64", "float32", "bfloat16", "float16")
TRAINED = ("float32", "bfloat16")
"""The dtypes whose products are measured on all shapes; others only on a few."""
MIB = 2**20


@dataclass(frozen=True)
class Grid:
    """Shapes of matrix products: every m with every n and k, and every m with each of `wide` as n or k beside `narrow`."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    wide: tuple[int, ...] = ()
    narrow: tuple[int, ...] = ()

    def shapes(self) -> Iterator[tuple[int, int, int]]:
        """Yields each (m, n, k) once."""
        yield from product(self.rows, self.columns, self.columns)
        for m, wide, narrow in product(self.rows, self.wide, self.narrow):
            yield from ((m, wide, narrow), (m, narrow, wide))


@dataclass(frozen=True)
class Sample:
    """A small model, a step of which is timed operator by operator."""

    hidden: int
    ffn: int
    vocab: int
    micro_batch: int
    dtype: str
    experts: int = 0
    layers: int = 2
    sequence_length: int = 256


_OF_A_CPU = Grid((16, 64, 256, 1024, 2048), (64, 256, 512, 1280), wide=(8192, 8), narrow=(512,))
_OF_A_GPU = Grid((128, 512, 2048, 8192), (512, 1024, 2048, 4096, 8192), wide=(32768, 64), narrow=(2048, 4096))
_SMALL = Sample(320, 960, 4096, 1, "bfloat16", layers=4)
_SAMPLES = (
    Sample(16, 16, 300, 1, "bfloat16", experts=2, sequence_length=8),
    Sample(384, 1024, 6144, 4, "bfloat16"),
    Sample(768, 1600, 10240, 8, "bfloat16", layers=1),
    Sample(640, 576, 5120, 8, "bfloat16", experts=8, layers=1),
    Sample(320, 448, 4096, 1, "bfloat16", experts=4),
    _SMALL,
    Sample(384, 1024, 6144, 4, "float32"),
    Sample(640, 576, 5120, 4, "float32", experts=8, layers=1),
)
_OF_VARIANTS = (
    Sample(512, 1408, 8192, 8, "bfloat16"),
    Sample(2048, 5632, 32768, 1, "bfloat16", sequence_length=2048),
    Sample(512, 1408, 8192, 8, "float32"),
)


@dataclass(frozen=True)
class MeasuringPlan:
    """Shapes, sizes and repetitions of all that is measured. The models of `samples` have other sizes than the recipes that come
    with Bagualu, so what is predicted for these was not measured for them."""

    cpu: Grid = _OF_A_CPU
    gpu: Grid = _OF_A_GPU
    few: Grid = Grid((256, 1024), (256, 1024))
    """The shapes for dtypes that are not `TRAINED`."""
    rounds: int = 2
    """How often everything is measured; the median counts."""
    product_seconds: float = 0.004
    """The least time for which a product is repeated in a round."""
    copied_bytes: int = 256 * MIB
    samples: tuple[Sample, ...] = _SAMPLES
    between: Sample = _SMALL
    """The model whose step shows what passes between operators."""
    variants: tuple[Sample, ...] = _OF_VARIANTS
    """Models whose operators are timed in each variant that is registered for the chip."""
    message_bytes: tuple[int, ...] = (2**10, 2**14, 2**17, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
    message_seconds: float = 0.05
    """The least time for which a communication is repeated."""
    disk_bytes: int = 256 * MIB


FULL = MeasuringPlan()
_TINY = Sample(64, 128, 512, 1, "bfloat16", experts=4, layers=1, sequence_length=64)
QUICK = MeasuringPlan(
    cpu=Grid((64, 512), (128, 512)),
    gpu=Grid((512, 4096), (1024, 4096)),
    few=Grid((256,), (256,)),
    rounds=2,
    product_seconds=0.001,
    copied_bytes=32 * MIB,
    samples=(_TINY,),
    between=_TINY,
    variants=(Sample(256, 704, 4096, 1, "bfloat16"),),
    message_bytes=(2**10, MIB, 8 * MIB),
    message_seconds=0.01,
    disk_bytes=16 * MIB,
)
