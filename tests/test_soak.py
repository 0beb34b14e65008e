"""What takes minutes: `make soak`. Two hundred kills are in test_survival.py."""
import collections
import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import common
from conftest import ROOT

pytestmark = pytest.mark.soak


def test_the_demo_ends_with_every_method_above_the_random_network(tmp_path):
    done = subprocess.run(["make", "demo", f"PYTHON={sys.executable}", f"OUT={tmp_path}"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for path in tmp_path.rglob("results.jsonl") for line in path.open()]
    probe = {(row["method"], row["variant"]): row["probe_top1"] for row in rows}
    floor = probe.pop(("random", "untrained"))
    assert len(probe) == 3 and all(value > floor + 10 for value in probe.values()), (floor, probe)


def test_five_hundred_damaged_trees_are_read_or_refused(tmp_path):
    draw, ends = random.Random(0), collections.Counter()
    for n in range(500):
        root, cache = (tmp_path / f"{name}-{n}" for name in ("tree", "cache"))
        for i in range(12):
            path = root / "train" / "ab"[i % 2] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(path)
        for path in draw.sample(sorted(root.rglob("*.png")), draw.randint(1, 3)):
            data = path.read_bytes() if path.exists() else b""
            draw.choice([
                lambda: path.write_bytes(data[:draw.randrange(len(data))]),
                lambda: path.write_bytes(draw.randbytes(draw.randrange(200))),
                lambda: path.rename(path.with_suffix(draw.choice([".jpg", ".txt", ""]))),
                lambda: (path.unlink(), path.symlink_to("nowhere.png")),
                lambda: (path.unlink(), path.mkdir()),
                lambda: shutil.rmtree(path.parent),
            ] if data else [lambda: None])()
        try:
            images = common.load_images("folder", str(root), "train", 8, cache=str(cache))
            assert 0 < len(images) <= 12 and set(images.classes) <= {"a", "b"}
            ends["read"] += 1
        except (common.RunError, common.UsageError) as error:
            assert str(root) in str(error) and {path.suffix for path in cache.glob("*")} <= {".lock"}
            ends["refused"] += 1
    assert min(ends["read"], ends["refused"]) > 50, ends
