"""Two processes under torchrun against one with the same global batch: losses, parameters, bank, queue."""
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

import aug_study
import bassl
import common
import linear_probe
import npid_distill
from conftest import METHODS, ROOT, TINY, Small, parsed, read_log, run_script, saved

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# Five steps of one epoch by SGD (AdamW divides rounding noise by its own size where a gradient is 0).
STEPS = [*TINY, *"--limit 80 --epochs 1 --knn-every 1 --optimizer sgd --lr 0.002".split()]
# A fusion and CutMix mix the images within a process.
ALIKE = {bassl: " --layers 0", npid_distill: " --cutmix 0", aug_study: ""}
RUNS = {name: (script, flags + ALIKE[script]) for name, (script, flags) in METHODS.items()}
RUNS["npid sampled"] = npid_distill, "--dim 16 --negatives 12 --cutmix 0"


class Total(torch.autograd.Function):
    """The sum over the processes; each has the gradient of the one loss through its own use of the sum."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    backward = forward


class WholeNorm(torch.nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all processes, which torch has on GPUs alone."""

    def forward(self, x):
        axes, shape = [a for a in range(x.ndim) if a != 1], [1, -1, *[1] * (x.ndim - 2)]
        mean, var = self.running_mean, self.running_var
        if self.training:
            count = x.numel() // x.shape[1] * common.world()
            mean = Total.apply(x.sum(axes)) / count
            var = Total.apply((x - mean.view(shape)).square().sum(axes)) / count
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(var.detach() * count / (count - 1), self.momentum)
        x = (x - mean.view(shape)) / (var + self.eps).sqrt().view(shape)
        return x * self.weight.view(shape) + self.bias.view(shape)


def train_all(folder):
    """Every run, as one of the job's processes, which draws weights, queue and bank of its own.

    In float64: in float32 rounding noise would hide a wrong gradient.
    """
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    seed, seeded = torch.manual_seed, common.seeded
    torch.manual_seed = lambda number: seed(number + common.rank())
    common.seeded = lambda *key, **at: seeded(*key, *[common.rank()] * (key[0] == "bank"), **at)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.nn.BatchNorm1d = torch.nn.BatchNorm2d = WholeNorm
    common.resnet = Small
    for name, (script, flags) in RUNS.items():
        script.train(parsed(script, *STEPS, *flags.split(), "--out", f"{folder}/{name}"))
    if common.world() > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The folders of all runs by one process, and by two that start from different random numbers."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    run_script("tests/test_processes.py", one)
    run_script(*TORCHRUN, "tests/test_processes.py", two)
    return one, two


def momentum(state):
    """The optimizer's, in which every gradient of the run has its part, as one vector."""
    return torch.cat([part["momentum_buffer"].flatten() for part in state["optimizer"]["state"].values()])


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_like_one(name, jobs):
    one, two = (common.read_checkpoint(folder / name / "checkpoint.pt") for folder in jobs)
    assert one["step"] == two["step"] == 5
    apart = (momentum(one) - momentum(two)).norm() / momentum(one).norm()
    assert apart < 1e-6, apart  # a gradient that is off by its scale would show here
    for part in {"model", "bank"} & one.keys():
        torch.testing.assert_close(dict(two[part]), dict(one[part]), rtol=1e-7, atol=1e-7)
    lines = [read_log(folder / name)[-1] for folder in jobs]  # losses, the collapse signs and kNN among them
    assert lines[1] == pytest.approx(lines[0], rel=1e-5)


def test_a_batch_that_the_processes_do_not_divide_is_refused(train, monkeypatch):
    monkeypatch.setattr(common, "world", lambda: 2)
    with pytest.raises(common.UsageError, match="--batch 15 is over all processes, and 2 do not divide it"):
        train("out", "--batch", "15")


def test_the_probe_of_two_processes_is_that_of_one_and_they_decode_once(tmp_path):
    draw = np.random.default_rng(0)
    for i in range(100):
        folder = tmp_path / "data" / ("train" if i < 60 else "test") / "ab"[i % 2]
        saved(draw.integers(0, 200 + 40 * (i % 2), (16, 24, 3), np.uint8), folder / f"{i}.png")
    probe = (f"--random --dataset folder --data {tmp_path}/data --cache {tmp_path}/cache --size 16 "
             "--arch resnet10 --epochs 3 --batch 20 --device cpu --amp off --out").split()
    printed = run_script(*TORCHRUN, "linear_probe.py", *probe, tmp_path / "two")
    assert printed.count("decoding 60 images") == printed.count("decoding 40 images") == 1
    [two] = map(json.loads, (tmp_path / "two" / "results.jsonl").read_text().splitlines())
    one = linear_probe.probe(common.parse(linear_probe.Config, "", [*probe, str(tmp_path / "one")]))
    assert two["command"].startswith("torchrun --nnodes=1 --nproc-per-node=2 linear_probe.py --random ")
    for metric in linear_probe.METRICS:
        assert two[metric] == pytest.approx(one[metric], abs=2.6), metric  # one of 40 images


def test_a_stopped_job_saves_and_goes_on(tmp_path):
    """Each process fuses its own part of a batch."""
    flags = [*TINY, "--epochs", "5000", "--save-every", "1000", "--out", str(tmp_path)]
    log = tmp_path / "log.jsonl"
    job = subprocess.Popen([sys.executable, *TORCHRUN, "bassl.py", *flags], cwd=ROOT, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not log.exists() or len(log.read_text().splitlines()) < 4:
        assert job.poll() is None, job.communicate()
        time.sleep(0.1)
    job.terminate()
    output, _ = job.communicate(timeout=120)
    state = common.read_checkpoint(tmp_path / "checkpoint.pt")
    assert f"stopped by SIGTERM; saved at step {state['step']} of 15000" in output
    assert job.returncode != 0 and output.count("epoch 1/5000") == 1  # one process speaks
    assert state["model"]["fusion.convs.0.weight"].shape[:2] == (8, 8)
    printed = run_script(*TORCHRUN, "bassl.py", *flags, "--minutes", "1e-9", fails=True)
    assert f"resumed at step {state['step']}" in printed
    with pytest.raises(common.UsageError, match="begun by 2 processes, .* does not fit 1"):
        bassl.train(parsed(bassl, *flags))


if __name__ == "__main__":
    train_all(sys.argv[1])
