"""The matmul ceiling by dtype, on all cores or on the GPU. A program: `python -m contest.ceiling cpu|cuda`."""

import json
import os
import sys

SECONDS = 2.0


def main() -> None:
    import torch

    from bagualu.trainer.costs.throughput import matmul_ceiling

    threads = len(os.sched_getaffinity(0))
    rates = {
        dtype: matmul_ceiling(getattr(torch, dtype), torch.device(sys.argv[1]), threads, SECONDS)
        for dtype in ("float32", "bfloat16")
    }
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
