#!/bin/bash
# torch 2.13.0 (CPU, Gloo), Python 3.11
#
# Expected: FSDP2's set_gradient_divide_factor(1.0) makes gradients sums over the ranks, on every backend: it is the plainest reduction.
# Instead:  on Gloo the first backward pass fails, because the factor 1 is turned into a scaled sum (PREMUL_SUM), which only NCCL has.
#           The factor 2.0 on two ranks, an average, works. Only with set_force_sum_reduction_for_comms(True) in addition is 1.0 a
#           sum. So code that is right on GPUs fails on the CPUs where it is tested.
# Seen:     {'1.0': 'RuntimeError: Cannot use ReduceOp.PREMUL_SUM with Gloo', '1.0, forced': '3.0', '2.0': '1.5'}
# Here:     trainer/engine/fsdp_units.py asks for both; tests/trainer/engine/test_fsdp.py compares the sums with one process.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > look.py <<'PYTHON'
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

CASES = {"1.0": (1.0, False), "1.0, forced": (1.0, True), "2.0": (2.0, False)}


def gradient(rank, port, factor, forced, answers):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo")
    layer = torch.nn.Linear(4, 4, bias=False)
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    layer.set_gradient_divide_factor(factor)
    if forced:
        layer.set_force_sum_reduction_for_comms(True)
    try:
        layer(torch.ones(1, 4) * (rank + 1)).sum().backward()  # 1 on one rank, 2 on the other
        answer = str(float(layer.weight.grad.to_local()[0, 0]))
    except RuntimeError as error:
        answer = f"RuntimeError: {str(error).splitlines()[0]}"
    if rank == 0:
        answers.put(answer)


if __name__ == "__main__":
    seen = {}
    for number, (name, case) in enumerate(CASES.items()):
        answers = mp.get_context("spawn").SimpleQueue()
        mp.spawn(gradient, (29600 + number, *case, answers), 2)
        seen[name] = answers.get()
    print(seen)
    failed = "PREMUL_SUM" in seen.pop("1.0")
    sys.exit(0 if failed and seen == {"1.0, forced": "3.0", "2.0": "1.5"} else 1)
PYTHON
"$folder/venv/bin/python" look.py
