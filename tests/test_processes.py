"""Two gloo processes under torchrun against one process with the same global batch: the same loss, parameters, bank and queue."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

import aug_study
import common
from conftest import ROOT, TINY, read_log, run_script

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# Five steps of one epoch by SGD (AdamW divides rounding noise by its own size where a gradient is 0).
STEPS = [*TINY, "--size", "24", "--limit", "80", "--epochs", "1", "--amp", "off", "--knn-every", "1", "--lr", "0.02"]
NPID = [*STEPS, "--dim", "16", "--cutmix", "0"]
RUNS = {
    **{name: ["bassl", [*STEPS, "--framework", name, "--layers", "0"]] for name in ("simclr", "moco", "byol", "simsiam")},
    **{f"study {name}": ["aug_study", [*STEPS, "--methods", name, "--augs", "multicrop" if name == "dino" else "simclr",
                                       *(["--lr", "0.002"] if name in ("barlow", "vicreg") else [])]] for name in aug_study.METHODS},   # larger losses
    "npid sampled": ["npid_distill", [*NPID, "--negatives", "12"]],
    "npid ema": ["npid_distill", [*NPID, "--negatives", "12", "--update", "ema"]],
    "npid whole": ["npid_distill", [*NPID, "--negatives", "0", "--chunk", "7"]],
    "npid sharded": ["npid_distill", [*NPID, "--negatives", "0", "--chunk", "7", "--shard-bank"]],
    "npid odd": ["npid_distill", [*NPID, "--negatives", "0", "--limit", "81", "--shard-bank", "--update", "ema"]],
}


def torchrun(*args, timeout=400):
    return subprocess.run([*TORCHRUN, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Folder of all runs: <run>-1 by one process, <run>-2 by two."""
    folder = tmp_path_factory.mktemp("jobs")
    for n in (1, 2):
        (folder / f"{n}.json").write_text(json.dumps([[script, [*argv, "--out", str(folder / f"{name}-{n}")]] for name, (script, argv) in RUNS.items()]))
    status, _, stderr = run_script("tests/job.py", folder / "1.json", timeout=400)
    assert status == 0, stderr
    done = torchrun("tests/job.py", folder / "2.json")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_like_one(name, jobs):
    one, two = (common.read_checkpoint(jobs / f"{name}-{n}" / "checkpoint.pt") for n in (1, 2))
    assert one["step"] == two["step"] == 5
    losses = [json.loads((jobs / f"{name}-{n}" / "losses.json").read_text()) for n in (1, 2)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    start = common.read_checkpoint(jobs / f"{name}-1" / "start.pt")
    moved = sum((one["model"][key] - value).square().sum() for key, value in start.items()).sqrt()
    apart = sum((one["model"][key] - two["model"][key]).square().sum() for key in start).sqrt()
    assert apart < 1e-5 * moved, (apart, moved)                       # a gradient that is off by its scale would show here
    for part in ("model", "bank"):
        assert one[part].keys() == two[part].keys()
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=1e-6, atol=1e-6, msg=lambda text: f"{part}.{key}: {text}")
    ranks = [read_log(jobs / f"{name}-{n}")[-1]["effective_rank"] for n in (1, 2)]
    assert ranks[1] == pytest.approx(ranks[0], rel=1e-3)


def test_fusion_is_of_each_process_own_batch_and_the_probe_is_shared(tmp_path):
    flags = [*TINY, "--out", tmp_path]
    done = torchrun("bassl.py", *flags)
    assert done.returncode == 0 and "1/2" in done.stdout, done.stderr
    assert done.stdout.count("epoch 1/2") == 1                                          # one process speaks
    state = common.read_checkpoint(tmp_path / "checkpoint.pt")
    assert state["model"]["fusion.convs.0.weight"].shape[:2] == (8, 8)
    probe = ["linear_probe.py", "--backbone", tmp_path / "backbone.pt", "--size", "16", "--epochs", "2", "--fraction", "0.02", "--device", "cpu"]
    done = torchrun(*probe)
    assert done.returncode == 0, done.stderr
    status, _, stderr = run_script(*probe)
    assert status == 0, stderr
    two, one = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert all(two[key].startswith("torchrun --nproc-per-node=2 ") for key in ("command", "probe_command"))
    for metric in ("knn_top1", "knn20_top1", "probe_top1", "linear_top1"):
        assert two[metric] == pytest.approx(one[metric], abs=0.3)                       # of 2,000 images; sums in another order


def test_wrong_batches_and_studies_are_refused_under_torchrun(tmp_path):
    done = torchrun("bassl.py", *TINY, "--batch", "15", "--out", tmp_path)
    assert done.returncode != 0 and "--batch 15 is over all processes, and 2 do not divide it" in done.stderr


def children(pid):
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in out.split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_ends_the_job_and_a_stopped_job_saves(number, tmp_path):
    log = tmp_path / "log.jsonl"
    job = subprocess.Popen([*TORCHRUN, "bassl.py", *map(str, TINY), "--epochs", "5000", "--knn-every", "0", "--out", str(tmp_path)], cwd=ROOT,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert job.poll() is None
        time.sleep(0.2)
    os.kill(children(job.pid)[1] if number == signal.SIGKILL else job.pid, number)
    stdout, _ = job.communicate(timeout=60)
    assert job.returncode != 0
    if number == signal.SIGTERM:
        assert "stopped by SIGTERM; saved at step" in stdout and common.read_checkpoint(tmp_path / "checkpoint.pt")["step"] > 0


def test_gathered_and_summed_tensors_pass_the_gradient_of_the_whole():
    """One process is the identity: what two do is the first test's."""
    x = torch.randn(4, 3, requires_grad=True)
    assert common.gather(x) is x and common.total(x) is x


def test_the_norm_over_all_processes_is_torchs_norm_where_there_is_one():
    x, norm = torch.randn(8, 5, 3, 3, requires_grad=True), torch.nn.BatchNorm2d(5)
    ours = torch.nn.BatchNorm2d(5)
    ours.__class__ = common.GlobalBatchNorm
    want, got = norm(x), ours(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(F.mse_loss(y, torch.ones_like(y)), x)[0] for y in (got, want)))
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
