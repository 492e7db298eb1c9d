"""One process of a baseline contestant: builds its Step once, runs as many steps as it is told to, sleeps in between.

Started as `python -m contest.worker`. Reads one JSON object per line on stdin, {"steps": n}; answers on stdout with
{"step_seconds": [...], "cpu_seconds": [...], "losses": [...], "peak_memory_bytes": n}; end of input ends it. Libraries
print to stderr.
"""

import argparse
import gc
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

from contest.entry import PLAIN
from contest.environment import cores_of
from contest.shapes import SHAPES


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--framework", required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--recipe", required=True, choices=SHAPES)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--tensors", action="store_true", help="the peak is that of the tensors' bytes in the steps")
    return parser.parse_args()


def private_stdout() -> IO[str]:
    """The real stdout for answers only; from here on fd 1 is stderr, so that no library can garble them."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    return answers


def counter_of_tensors() -> Any:
    """Returns a counter that knows all tensors of this process."""
    import torch
    from torch.distributed.tensor import DTensor

    from bagualu.trainer.costs.tensor_memory import TensorMemory

    counter = TensorMemory()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    counter.hold(tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return counter


def peak_memory_bytes(device: str) -> int:
    """Most memory of the GPU held at once so far, or the highest resident memory of this process (VmHWM)."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def serve(options: argparse.Namespace, answers: IO[str]) -> None:
    import torch
    import torch.distributed as dist

    from contest.frameworks import SHARE_THE_MODEL, build

    torch.set_num_threads(options.threads)
    distributed = options.framework not in PLAIN
    if distributed:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(options.port), "RANK": str(options.rank),
                       "WORLD_SIZE": str(options.processes), "LOCAL_RANK": str(options.rank)}  # fmt: skip
        dist.init_process_group("gloo")
    shape = SHAPES[options.recipe]
    step = build(options.framework, shape, options.precision, options.compiled, options.device)
    together = options.framework in SHARE_THE_MODEL
    generator = torch.Generator().manual_seed(0 if together else options.rank)
    mine = shape.batch if together else shape.batch // options.processes
    counter = counter_of_tensors() if options.tensors else nullcontext()
    for line in sys.stdin:
        seconds, cpu_seconds, losses = [], [], []
        for _ in range(json.loads(line)["steps"]):
            if distributed:
                dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            tokens = torch.randint(shape.vocab, (mine, shape.sequence + 1), generator=generator)
            tokens = tokens.to(options.device)
            with counter:
                losses.append(step(tokens[:, :-1], tokens[:, 1:]))  # a number: whatever a GPU was given is done
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
        times = {"step_seconds": seconds, "cpu_seconds": cpu_seconds}
        peak = counter.peak if options.tensors else peak_memory_bytes(options.device)
        answers.write(json.dumps({**times, "losses": losses, "peak_memory_bytes": peak}) + "\n")
    if distributed:
        dist.destroy_process_group()


def main() -> None:
    answers = private_stdout()
    options = arguments()
    if not options.tensors:
        os.sched_setaffinity(0, cores_of(options.rank, options.processes, options.threads))  # before torch counts the cores
    serve(options, answers)


if __name__ == "__main__":
    main()
