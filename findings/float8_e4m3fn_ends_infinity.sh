#!/bin/bash
# torch 2.13.0 (CPU build), ml_dtypes 0.7.0 (the float8 of JAX and NumPy), Python 3.11
#
# Expected: float8_e4m3fn has NaN but no infinity, so what overflows becomes NaN, as ml_dtypes does it, and as torch makes an infinity
#           of what overflows in float8_e5m2. A guard that looks for numbers that are not finite finds the overflow after the cast as
#           before it.
# Instead:  torch casts an infinity to 448, the largest number, as it does with every number above 448, in eager mode and compiled.
#           With scales that are not computed from the tensor itself (delayed or static scaling), an activation or gradient that is
#           infinite leaves the cast as an ordinary number, and the loss stays finite. Only NaN stays NaN. Filling a tensor of that
#           dtype with an infinity raises an error instead. The same array cast by ml_dtypes has NaN from 465 on, so the two
#           libraries do not agree about values just above the largest either.
# Seen:     torch e4m3fn: 448 -448 nan 448 448 448, compiled: 448 -448 nan 448 448 448, e5m2: inf -inf nan 448 512 inf,
#           ml_dtypes e4m3fn: nan nan nan 448 nan nan, of inf, -inf, nan, 464, 500, 1e30.
# Here:     trainer/operators/float8.py computes each scale from what it rounds, so that an infinity makes it infinite and the product
#           NaN, which the guard sees (tests/trainer/operators/test_float8.py, tests/trainer/test_float8_runs.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 ml_dtypes==0.7.0 numpy==2.4.6
cat > "$folder/casts.py" <<'PYTHON'
import ml_dtypes
import torch

x = torch.tensor([float("inf"), -float("inf"), float("nan"), 464.0, 500.0, 1e30])
cast = lambda values: values.to(torch.float8_e4m3fn)
found = {
    "torch e4m3fn": cast(x).float(),
    "compiled": torch.compile(cast)(x).float(),
    "torch e5m2": x.to(torch.float8_e5m2).float(),
    "ml_dtypes e4m3fn": x.numpy().astype(ml_dtypes.float8_e4m3fn).astype("float32"),
}
for name, values in found.items():
    print(f"{name}:", *(f"{value:g}" for value in values.tolist()))
PYTHON
seen=$("$folder/venv/bin/python" "$folder/casts.py" 2> /dev/null | grep ': ')
echo "$seen"
[[ "$seen" == "torch e4m3fn: 448 -448 nan 448 448 448
compiled: 448 -448 nan 448 448 448
torch e5m2: inf -inf nan 448 512 inf
ml_dtypes e4m3fn: nan nan nan 448 nan nan" ]]
