"""What takes minutes to hours: `make soak`."""
import json
import random
import subprocess
import sys
import time

import pytest

import common
from conftest import ROOT, TINY, assert_same, read_log, run_script


@pytest.mark.soak
@pytest.mark.parametrize("script, kills, flags", [
    ("bassl.py", 25, ["--framework", "moco"]), ("npid_distill.py", 25, ["--dim", "16", "--negatives", "12"]), ("aug_study.py", 15, ["--methods", "dino"])])
def test_sigkill_at_any_moment_changes_nothing(script, kills, flags, tmp_path):
    """SIGKILL after a random time, start-up, saves and the end of epochs included; then the run goes on to its end."""
    flags = [*TINY, *flags, "--epochs", "40", "--knn-every", "10", "--save-every", "3steps", "--deterministic"]
    began = time.monotonic()
    assert run_script(script, *flags, "--out", tmp_path / "whole", timeout=900)[0] == 0
    length, draw = time.monotonic() - began, random.Random(0)
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, script, *flags, "--out", str(tmp_path / "killed")], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(2.0, 0.5 * length))
        process.kill()
        process.wait()
    status, _, stderr = run_script(script, *flags, "--out", tmp_path / "killed", timeout=900)
    assert status == 0, stderr
    whole, killed = (common.read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "killed"))
    for state in (whole, killed):
        state.pop("seconds"), state["config"].pop("out")
    assert_same(whole, killed)
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "killed")


@pytest.mark.soak
def test_the_demo_ends_in_its_table_with_every_method_above_the_random_network(tmp_path):
    done = subprocess.run(["make", "demo", f"PYTHON={sys.executable}", f"OUT={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for path in tmp_path.glob("*/probe*/results.jsonl") for line in path.read_text().splitlines()]
    knn = {(row["method"], row["variant"]): row["knn_top1"] for row in rows}
    floor = knn.pop(("random", "untrained"))
    assert len(knn) == 3
    assert all(value > floor + (10 if method == "npid_distill" else 15) for (method, _), value in knn.items()), (floor, knn)
