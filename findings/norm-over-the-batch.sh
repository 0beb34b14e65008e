#!/usr/bin/env bash
# torch 2.14.1 on a CPU: a norm or a variance over the first dimension of a matrix takes about ten times as long
# as the same number by sums, which read the same memory; over the second dimension a norm is the faster one.
# Losses that standardise each feature over the batch (Barlow Twins, VICReg) call it so.
# Seen on one core of a Xeon with AMX, float32, 65536 x 64, the least of nine, in milliseconds:
#   norm(dim=0) 39.9, square().sum(0).sqrt() 3.8      norm(dim=1) 1.0, square().sum(1).sqrt() 3.2
#   var(0) 55.7, the variance by two sums 6.1
# Ends with status 1 where that has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.14.1 numpy
"$folder/env/bin/python" - <<'PYTHON'
import time

import torch

torch.set_num_threads(1)
x = torch.randn(65536, 64)


def milliseconds(function):
    function()
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return 1e3 * min(seconds)


def variance_by_sums():
    return (x.square().sum(0) - x.sum(0).square() / len(x)) / (len(x) - 1)


torch.testing.assert_close(x.norm(dim=0), x.square().sum(0).sqrt(), rtol=1e-4, atol=0)
torch.testing.assert_close(x.var(0), variance_by_sums(), rtol=1e-4, atol=0)
times = {
    "norm(dim=0)": milliseconds(lambda: x.norm(dim=0)),
    "square().sum(0).sqrt()": milliseconds(lambda: x.square().sum(0).sqrt()),
    "norm(dim=1)": milliseconds(lambda: x.norm(dim=1)),
    "square().sum(1).sqrt()": milliseconds(lambda: x.square().sum(1).sqrt()),
    "var(0)": milliseconds(lambda: x.var(0)),
    "var(0) by two sums": milliseconds(variance_by_sums),
}
print("torch", torch.__version__)
for name, value in times.items():
    print(f"{name:24} {value:7.2f} ms")
norms = times["norm(dim=0)"] / times["square().sum(0).sqrt()"]
variances = times["var(0)"] / times["var(0) by two sums"]
other = times["norm(dim=1)"] / times["square().sum(1).sqrt()"]
print(f"over rows: norm {norms:.0f} times, variance {variances:.0f} times; over columns: norm {other:.1f} times")
raise SystemExit(0 if norms > 5 and variances > 3 and other < 3 else "this has changed")
PYTHON
