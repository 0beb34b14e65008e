#!/usr/bin/env bash
# torch 2.14.1, lightly 1.5.22: autocast to bf16 leaves softmax, log_softmax and logsumexp of bf16 logits in
# bf16 on a CPU; on CUDA it makes them in float32. A loss that leaves precision to autocast, as lightly's
# of DINO, is then a bf16 number on a CPU: near 8 it knows sixteenths alone, and its curve is a staircase.
# Cross-entropy is made in float32 on both.
# Seen:
#   softmax       of bf16: on a CPU torch.bfloat16, on CUDA torch.float32
#   log_softmax   of bf16: on a CPU torch.bfloat16, on CUDA torch.float32
#   logsumexp     of bf16: on a CPU torch.bfloat16, on CUDA torch.float32
#   cross_entropy of bf16: on a CPU torch.float32, on CUDA torch.float32
#   DINOLoss of 20 batches: torch.float32, 20 values, 8.4934 to 8.5003
#   DINOLoss of 20 batches: torch.bfloat16, 1 values, 8.5000 to 8.5000
# Ends with status 1 where that has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.14.1 lightly==1.5.22
"$folder/env/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F
from lightly.loss import DINOLoss
from torch._subclasses.fake_tensor import FakeTensorMode

torch.set_num_threads(1)
functions = {
    "softmax": lambda x, label: x.softmax(1),
    "log_softmax": lambda x, label: x.log_softmax(1),
    "logsumexp": lambda x, label: x.logsumexp(1),
    "cross_entropy": F.cross_entropy,
}


def types(device):
    """What each function makes of bf16 logits; of tensors without values, so that no GPU is needed."""
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.bfloat16)
    with FakeTensorMode():
        logits = torch.empty(64, 4096, dtype=torch.bfloat16, device=device)
        label = torch.zeros(64, dtype=torch.long, device=device)
        found = {name: function(logits, label).dtype for name, function in functions.items()}
    torch.set_autocast_enabled(device, False)
    return found


def losses(autocast, batches=20):
    """DINO's loss of the same bf16 scores, inside autocast or, in float32, outside of it."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(batches):
        scores = torch.randn(2, 64, 4096, generator=generator).mul(0.06).to(torch.bfloat16)
        criterion = DINOLoss(output_dim=4096)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            views = list(scores if autocast else scores.float())
            found.append(criterion(views, views, epoch=0))
    return torch.stack(found)


on_cpu, on_cuda = types("cpu"), types("cuda")
for name in functions:
    print(f"{name:14}of bf16: on a CPU {on_cpu[name]}, on CUDA {on_cuda[name]}")
exact, rounded = losses(False), losses(True)
for found in (exact, rounded):
    values = found.unique()
    print(f"DINOLoss of 20 batches: {found.dtype}, {len(values)} values, {values[0]:.4f} to {values[-1]:.4f}")
narrow = all(on_cpu[name] == torch.bfloat16 for name in ("softmax", "log_softmax", "logsumexp"))
wide = on_cpu["cross_entropy"] == torch.float32 and {*on_cuda.values()} == {torch.float32}
few = rounded.dtype == torch.bfloat16 and len(rounded.unique()) < 5 and len(exact.unique()) == 20
raise SystemExit(0 if narrow and wide and few else "this has changed")
PYTHON
