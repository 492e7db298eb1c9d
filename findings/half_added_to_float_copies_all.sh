#!/bin/bash
# torch 2.13.0 (CPU build), Linux 6.18, one thread
#
# Expected: adding a bfloat16 gradient to a float32 sum in place, sum.add_(half), reads half as many bytes as adding a float32 one
#           and allocates nothing; the elements are widened in the loop. sum.copy_(half) does so, and so would sum.addcmul_(half, s).
# Instead:  every operation in place but copy_ first makes a float32 copy of the whole bfloat16 tensor: add_, mul_, addcmul_, with or
#           without alpha, out= or _foreach_. Where gradients are added up in float32, the memory for the largest one is needed once
#           more at its peak, and the addition takes 2.2 times as long as that of a float32 gradient; addcmul_ by a scalar takes 8 times
#           as long. It is quicker to have the product written in float32 to begin with.
# Seen:     bytes allocated for 4,194,304 elements: copy_ 0, add_ of float32 0, add_ 16777216, add_ alpha 16777216, mul_ 16777216,
#           addcmul_ 16777216, _foreach_add_ 16777216. Times on one core of an AMD EPYC: add_ of float32 1.25 ms, add_ 2.7 ms,
#           addcmul_ of float32 1.24 ms, addcmul_ 9.7 ms.
# Here:     parallel/vocabulary.py adds the head's weight gradient up in float32 from the first product on (test_vocabulary.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/allocations.py" <<'PYTHON'
import torch
from torch.profiler import ProfilerActivity, profile

torch.set_num_threads(1)
total, wide, scale = torch.zeros(8192, 512), torch.ones(8192, 512), torch.tensor(0.5)
half = wide.bfloat16()
calls = {
    "copy_": lambda: total.copy_(half),
    "add_ of float32": lambda: total.add_(wide),
    "add_": lambda: total.add_(half),
    "add_ alpha": lambda: total.add_(half, alpha=0.5),
    "mul_": lambda: total.mul_(half),
    "addcmul_": lambda: total.addcmul_(half, scale),
    "_foreach_add_": lambda: torch._foreach_add_([total], [half]),
}
for name, call in calls.items():
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    print(name, max(0, *(event.cpu_memory_usage for event in profiled.key_averages())), sep=": ")
PYTHON
seen=$("$folder/venv/bin/python" "$folder/allocations.py" 2> /dev/null | grep ': ')
echo "$seen"
[[ "$seen" == "copy_: 0
add_ of float32: 0
add_: 16777216
add_ alpha: 16777216
mul_: 16777216
addcmul_: 16777216
_foreach_add_: 16777216" ]]
