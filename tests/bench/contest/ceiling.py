"""The machine's matmul ceiling on all cores, by dtype. A program: `python -m contest.ceiling`."""

import json
import os

SECONDS = 2.0


def main() -> None:
    import torch

    from bagualu.trainer.flops import matmul_ceiling

    threads = len(os.sched_getaffinity(0))
    rates = {
        dtype: matmul_ceiling(getattr(torch, dtype), torch.device("cpu"), threads, SECONDS) for dtype in ("float32", "bfloat16")
    }
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
