#!/bin/bash
# deepspeed 0.19.8, torch 2.13.0 (CPU, Gloo, one rank), Python 3.11
#
# Expected: after engine.destroy(), and once engine and model are deleted and collected, their memory is free, whatever the ZeRO
#           stage: a process may train one model after the other, as tests, sweeps and notebooks do.
# Instead:  ZeRO-1 and 2 free everything. ZeRO-3 frees nothing: weights, master weights and moments of every engine stay for the life
#           of the process, because lists and hooks of the library still refer to the model (FWD_MODULE_STACK in
#           runtime/zero/parameter_offload.py is one of them). Each further engine adds as much again.
# Seen:     parameters alive afterwards, of 4 for each engine: {'ZeRO-1': 0, 'ZeRO-2': 0, 'ZeRO-3': 4, 'ZeRO-3, three engines': 12}
# Here:     trainer/engine/deepspeed_zero.py takes the model out of that list, and no process builds a second engine with ZeRO-3:
#           layers move, which needs one, under ZeRO-1 only (tests/trainer/engine/test_deepspeed.py counts the bytes that stay).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy setuptools wheel
"$folder/venv/bin/pip" install -q --no-build-isolation deepspeed==0.19.8
cd "$folder"
cat > look.py <<'PYTHON'
import gc
import os
import sys
import weakref

os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617"}
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}

import torch
import torch.distributed as dist

dist.init_process_group("gloo")

import deepspeed
from deepspeed.ops import __compatible_ops__

__compatible_ops__["deepspeed_shm_comm"] = False  # or the import would compile an operation that training does not use


def trained(stage):
    """Trains a step, destroys the engine, and returns references that do not keep the parameters alive."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    parameters = [weakref.ref(parameter) for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = {"train_batch_size": 4, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    engine.backward(engine(torch.ones(4, 64)).square().mean())
    engine.step()
    engine.destroy()
    return parameters


def alive(parameters):
    for _ in range(3):
        gc.collect()
    return sum(parameter() is not None for parameter in parameters)


seen = {f"ZeRO-{stage}": alive(trained(stage)) for stage in (1, 2, 3)}
seen["ZeRO-3, three engines"] = seen["ZeRO-3"] + alive(trained(3) + trained(3))
print(f"parameters alive afterwards, of 4 for each engine: {seen}")
sys.exit(0 if seen == {"ZeRO-1": 0, "ZeRO-2": 0, "ZeRO-3": 4, "ZeRO-3, three engines": 12} else 1)
PYTHON
"$folder/venv/bin/python" look.py 2> "$folder/errors" | tail -n 1
exit "${PIPESTATUS[0]}"
