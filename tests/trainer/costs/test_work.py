"""What is known of the machine without torch is what torch knows."""

from pathlib import Path

import pytest
import torch

from bagualu.parallel.precision import multiply_dtype
from bagualu.trainer.costs.work import cpu_multiplies


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_cpu_multiplies_what_torch_says(dtype: str) -> None:
    wanted = getattr(torch, dtype)
    assert cpu_multiplies(dtype) == (multiply_dtype(torch.empty(0, dtype=wanted)) == wanted)


def test_the_flags_of_the_processor_tell(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    assert not cpu_multiplies("bfloat16", cpuinfo)
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx512_bf16 sse\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert cpu_multiplies("bfloat16", cpuinfo)
    assert not cpu_multiplies("float16", cpuinfo)
