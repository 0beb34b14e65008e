"""What takes minutes to hours: `make soak`."""
import json
import subprocess
import sys

import pytest

import aug_study
from conftest import ROOT, run_script


@pytest.mark.soak
def test_the_demo_ends_in_its_table_with_every_method_above_the_random_network(tmp_path):
    done = subprocess.run(["make", "demo", f"PYTHON={sys.executable}", f"OUT={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for path in tmp_path.glob("*/probe*/results.jsonl") for line in path.read_text().splitlines()]
    knn = {(row["method"], row["variant"]): row["knn_top1"] for row in rows}
    floor = knn.pop(("random", "untrained"))
    assert len(knn) == 3
    assert all(value > floor + (10 if method == "npid_distill" else 15) for (method, _), value in knn.items()), (floor, knn)


DEMO_NPID = "--dataset shapes --arch resnet10 --stem imagenet --batch 128 --dim 512 --cutmix 0 --limit 1000 --epochs 60 --knn-every 0".split()
PLAIN = "--init random --update ema --lambda-kl 0".split()


def pretrain_and_probe(script, flags, out):
    for command in ([script, *flags, "--out", out], ["linear_probe.py", "--backbone", out / "backbone.pt", "--dataset", "shapes", "--epochs", "0"]):
        status, _, stderr = run_script(*command, timeout=1800)
        assert status == 0, stderr
    return json.loads((out / "results.jsonl").read_text().splitlines()[-1])


@pytest.mark.soak
def test_the_full_npid_beats_plain_npid_and_the_random_network_on_three_seeds(tmp_path):
    """At the demo's budget, by knn_top1."""
    for seed in ("0", "1", "2"):
        full, plain = (pretrain_and_probe("npid_distill.py", [*DEMO_NPID, *flags, "--seed", seed], tmp_path / f"{name}-{seed}")["knn_top1"]
                       for name, flags in (("full", []), ("plain", PLAIN)))
        random = tmp_path / f"random-{seed}"
        assert run_script("linear_probe.py", "--random", "--arch", "resnet10", "--stem", "imagenet", "--epochs", "0", "--seed", seed, "--out", random)[0] == 0
        floor = json.loads((random / "results.jsonl").read_text())["knn_top1"]
        print(f"seed {seed}: random {floor}, plain {plain}, full {full}")
        assert full > plain + 4 and full > floor + 20


DEMO = "--dataset shapes --arch resnet10 --stem imagenet --batch 128 --limit 5120 --epochs 8 --optimizer adamw --lr 0.001 --knn-every 1".split()


@pytest.mark.soak
@pytest.mark.parametrize("name", aug_study.METHODS)
def test_no_method_collapses_at_the_demos_budget(name, tmp_path):
    """Every method in the template, under simclr's views: spread features, and better ones than the random network's. The rate is a quarter of
    the demo's, at which SwAV and Barlow Twins end below the random network."""
    row = pretrain_and_probe("aug_study.py", [*DEMO, "--methods", name, "--augs", "simclr"], tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][1:]
    signs = [(line["feature_std"], line["effective_rank"]) for line in log]
    print(name, row["knn_top1"], row["probe_top1"], signs)
    assert min(std for std, _ in signs) > 0.4 and min(rank for _, rank in signs) > 15
    assert row["probe_top1"] > 62.0                                                     # the random network's, results/shapes-demo.jsonl
