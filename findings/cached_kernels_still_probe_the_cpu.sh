#!/bin/bash
# torch 2.13.0 (CPU build), g++ 12.2, Linux 6.18, a CPU with AVX-512
#
# Expected: a second process finds the kernels of torch.compile in the cache folder (the counters say so) and so needs neither the
#           compiler nor another program: its first call takes the time of imports and of loading one file.
# Instead:  before it loads the first kernel, each process asks anew which vector instructions the compiler and the CPU have: it asks
#           the compiler for its version and starts a Python for each instruction set, which imports torch and loads a test library.
#           Nothing of the answer is kept on disk. On two cores that is 1.2 of the 1.6 s of the first call, in every worker of every
#           restart. TORCHINDUCTOR_VEC_ISA_OK=1 (inductor's config cpp.vec_isa_ok) believes /proc/cpuinfo instead, but only as to
#           AVX-512 itself: its bfloat16 and VNNI parts are still tried out. Kernels made with and without it do not share their
#           keys, so the first process with it compiles once more.
# Seen:     cached, probed: hits 1 pythons 6 programs 11; cached, believed: hits 1 pythons 3 programs 8
# Here:     trainer/operators/kernel.py believes the CPU; a compiler that cannot follow leaves the plain function (test_generated.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy setuptools
cat > "$folder/first_call.py" <<'PYTHON'
import os
import subprocess
import sys

started = []
popen = subprocess.Popen.__init__


def counted(self, args, *others, **named):
    words = [str(word) for word in args] if isinstance(args, (list, tuple)) else str(args).split()
    started.append(os.path.basename(words[0]))
    popen(self, args, *others, **named)


import torch
from torch._dynamo.utils import counters


def gate(x, y):
    return torch.nn.functional.silu(x) * y


x = torch.ones(64, 64)
subprocess.Popen.__init__ = counted
torch.compile(gate, fullgraph=True)(x, x)
print("hits", counters["inductor"]["fxgraph_cache_hit"], "pythons", sum(name.startswith("python") for name in started),
      "programs", len(started))
PYTHON
run() {
    TORCHINDUCTOR_CACHE_DIR="$folder/$1" TORCHINDUCTOR_VEC_ISA_OK=${2:-} "$folder/venv/bin/python" "$folder/first_call.py"
}
run probed > /dev/null
probed=$(run probed)
run believed 1 > /dev/null
believed=$(run believed 1)
echo "cached, probed:   $probed"
echo "cached, believed: $believed"
[[ "$probed" == "hits 1 pythons 6 programs 11" && "$believed" == "hits 1 pythons 3 programs 8" ]]
