"""The machine's matmul ceiling: the best of a few square products. A program: `python -m contest.ceiling`."""

import json
import os
import time

SIZE = 2048


def main() -> None:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
        seconds = []
        for _ in range(12):
            start = time.perf_counter()
            a @ b
            seconds.append(time.perf_counter() - start)
        best[str(dtype).removeprefix("torch.")] = 2 * SIZE**3 / min(seconds)
    print(json.dumps(best))


if __name__ == "__main__":
    main()
