"""Two processes under torchrun against one with the same global batch: losses, parameters, bank, queue."""
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import aug_study
import bassl
import common
import linear_probe
from conftest import ROOT, TINY, parsed, read_log, run_script

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ALONE = {"OMP_NUM_THREADS": "1"}
# Five steps of one epoch by SGD (AdamW divides rounding noise by its own size where a gradient is 0).
STEPS = [*TINY, "--limit", "80", "--epochs", "1", "--knn-every", "1", "--optimizer", "sgd", "--lr", "0.02"]
NPID = ["npid_distill", [*STEPS, "--dim", "16", "--cutmix", "0"]]  # CutMix pairs images within a process


def study(name):
    views, large = "multicrop" if name in ("swav", "dino") else "simclr", name in ("barlow", "vicreg")
    return [*STEPS, "--methods", name, "--augs", views, "--lr", "0.002" if large else "0.02", "--queue", "64"]


RUNS = {
    **{name: ["bassl", [*STEPS, "--framework", name, "--layers", "0", "--queue", "64"]]
       for name in ("simclr", "moco", "byol", "simsiam")},
    **{f"study {name}": ["aug_study", study(name)] for name in aug_study.METHODS},
    "npid sampled": [NPID[0], [*NPID[1], "--negatives", "12"]],
    "npid ema": [NPID[0], [*NPID[1], "--negatives", "12", "--update", "ema", "--init", "random"]],
    "npid whole": [NPID[0], [*NPID[1], "--negatives", "0", "--init", "random"]],
}


def torchrun(*args):
    return subprocess.run([*TORCHRUN, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=400,
                          env={**os.environ, **ALONE})


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Folder of all runs: <run>-1 by one process, <run>-2 by two that start from different random numbers."""
    folder = tmp_path_factory.mktemp("jobs")
    for n in (1, 2):
        runs = [[script, [*argv, "--out", str(folder / f"{name}-{n}")]]
                for name, (script, argv) in RUNS.items()]
        (folder / f"{n}.json").write_text(json.dumps(runs))
    status, _, stderr = run_script("tests/job.py", folder / "1.json", env=ALONE)
    assert status == 0, stderr
    done = torchrun("tests/job.py", folder / "2.json")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_like_one(name, jobs):
    one, two = (common.read_checkpoint(jobs / f"{name}-{n}" / "checkpoint.pt") for n in (1, 2))
    records = [common.read_checkpoint(jobs / f"{name}-{n}" / "record.pt") for n in (1, 2)]
    assert one["step"] == two["step"] == 5
    assert records[1]["losses"] == pytest.approx(records[0]["losses"], rel=1e-8)
    start = records[0]["start"]
    moved = sum((one["model"][key] - value).square().sum() for key, value in start.items()).sqrt()
    apart = sum((one["model"][key] - two["model"][key]).square().sum() for key in start).sqrt()
    assert apart < 1e-6 * moved, (apart, moved)  # a gradient that is off by its scale would show here
    for part in {"model", "bank"} & one.keys():
        assert one[part].keys() == two[part].keys()
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=1e-7, atol=1e-7,
                                       msg=lambda text: f"{part}.{key}: {text}")
    lines = [read_log(jobs / f"{name}-{n}")[-1] for n in (1, 2)]  # the collapse signs and kNN among them
    assert lines[1] == pytest.approx(lines[0], rel=1e-4)


def test_a_batch_that_the_processes_do_not_divide_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "world", lambda: 2)
    with pytest.raises(common.UsageError, match="--batch 15 is over all processes, and 2 do not divide it"):
        bassl.train(parsed(bassl, *TINY, "--batch", "15", "--out", tmp_path))


def test_the_probe_of_two_processes_is_that_of_one_and_they_decode_once(tmp_path):
    for split, count in (("train", 60), ("test", 40)):
        for i in range(count):
            folder = tmp_path / "data" / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([i, count]).integers(0, 200 + 40 * (i % 2), (16, 24, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    probe = (f"--random --dataset folder --data {tmp_path}/data --cache {tmp_path}/cache --size 16 "
             "--arch resnet10 --epochs 3 --batch 20 --device cpu").split()
    done = torchrun("linear_probe.py", *probe, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("decoding 60 images") == done.stdout.count("decoding 40 images") == 1
    two, = [json.loads(line) for line in (tmp_path / "two" / "results.jsonl").read_text().splitlines()]
    argv = [*probe, "--out", str(tmp_path / "one")]
    one = linear_probe.probe(common.parse(linear_probe.Config, "", argv))
    assert two["command"].startswith("torchrun --nnodes=1 --nproc-per-node=2 linear_probe.py --random ")
    for metric in linear_probe.METRICS:
        assert two[metric] == pytest.approx(one[metric], abs=2.6), metric  # one of 40 images


def test_a_stopped_job_saves_and_goes_on(tmp_path):
    """Each process fuses its own part of a batch."""
    flags = [*TINY, "--epochs", "5000", "--save-every", "1000", "--out", str(tmp_path)]
    log = tmp_path / "log.jsonl"
    job = subprocess.Popen([*TORCHRUN, "bassl.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                           stderr=subprocess.STDOUT, env={**os.environ, **ALONE})
    while not log.exists() or len(log.read_text().splitlines()) < 4:
        assert job.poll() is None, job.communicate()
        time.sleep(0.1)
    job.terminate()
    output, _ = job.communicate(timeout=120)
    state = common.read_checkpoint(tmp_path / "checkpoint.pt")
    assert job.returncode != 0 and state["step"] >= 6
    assert f"stopped by SIGTERM; saved at step {state['step']} of 15000" in output
    assert output.count("epoch 1/5000") == 1  # one process speaks
    assert state["model"]["fusion.convs.0.weight"].shape[:2] == (8, 8)
    done = torchrun("bassl.py", *flags, "--minutes", "1e-9")
    assert f"resumed at step {state['step']}" in done.stdout
