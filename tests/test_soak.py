"""What takes minutes to hours: `make soak`. Two hundred kills are in test_survival.py."""
import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import aug_study
import common
from conftest import ROOT, run_script

pytestmark = pytest.mark.soak


def test_the_demo_ends_with_every_method_above_the_random_network(tmp_path):
    done = subprocess.run(["make", "demo", f"PYTHON={sys.executable}", f"OUT={tmp_path}"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for path in tmp_path.rglob("results.jsonl") for line in path.open()]
    probe = {(row["method"], row["variant"]): row["probe_top1"] for row in rows}
    floor = probe.pop(("random", "untrained"))
    assert len(probe) == 3 and all(value > floor + 10 for value in probe.values()), (floor, probe)


@pytest.mark.parametrize("name", aug_study.METHODS)
def test_no_method_collapses_at_the_small_recipes_budget(name, tmp_path):
    flags = f"--dataset shapes --device cpu --methods {name} --knn-every 1 --out {tmp_path}".split()
    for command in (["aug_study.py", *flags],
                    ["linear_probe.py", "--backbone", tmp_path / "backbone.pt"],
                    ["linear_probe.py", "--random", "--out", tmp_path / "random"]):
        status, _, stderr = run_script(*command, timeout=7200)
        assert status == 0, stderr
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][1:]
    row, floor = (json.loads((out / "results.jsonl").read_text()) for out in (tmp_path, tmp_path / "random"))
    signs = [(line["feature_std"], line["effective_rank"]) for line in log]
    print(name, row["knn_top1"], row["probe_top1"], floor["probe_top1"], signs)
    assert min(std for std, _ in signs) > 0.4 and min(rank for _, rank in signs) > 15
    assert row["probe_top1"] > floor["probe_top1"]


def corrupted(path, draw):
    """One thing that happens to a file or to the folder around it."""
    data = path.read_bytes()
    flipped = bytearray(data)
    for _ in range(draw.randint(1, 20)):
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    name = path.with_suffix(draw.choice([".jpg", ".txt", "", ".PNG", ".webp"]))
    draw.choice([
        lambda: path.write_bytes(data[:draw.randrange(len(data))]),
        lambda: path.write_bytes(flipped),
        lambda: path.write_bytes(draw.randbytes(draw.randrange(200))),
        lambda: path.unlink(),
        lambda: (path.unlink(), path.mkdir()),
        lambda: path.rename(name),
        lambda: (path.unlink(), path.symlink_to(draw.choice([path.name, "nowhere.png"]))),
        lambda: shutil.rmtree(path.parent),
    ])()


def test_five_hundred_corrupted_trees_are_read_or_refused(tmp_path):
    draw, ends, whole = random.Random(0), {}, tmp_path / "whole"
    for i in range(12):
        folder = whole / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    for n in range(500):
        root, cache = (tmp_path / f"{name}-{n}" for name in ("tree", "cache"))
        shutil.copytree(whole, root)
        for _ in range(draw.randint(1, 3)):
            if files := sorted(p for p in root.rglob("*.png") if p.is_file() and not p.is_symlink()):
                corrupted(draw.choice(files), draw)
        try:
            images = common.load_images("folder", str(root), "train", 8, cache=str(cache))
            assert 0 < len(images) <= 12 and images.pixels.shape[1:] == (3, 8, 8)
            assert int(images.rows.max()) < len(images.pixels) and set(images.classes) <= {"a", "b"}
            end = "read"
        except (common.RunError, common.UsageError) as error:
            assert str(root) in str(error) and {path.suffix for path in cache.glob("*")} <= {".lock"}
            end = type(error).__name__
        ends[end] = ends.get(end, 0) + 1
    assert min(ends.get("read", 0), ends.get("RunError", 0)) > 50, ends
