"""Shared by the tests: the repository on the path, tiny runs, a stand-in for a ResNet, the `soak` marker."""
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

common.draw_shapes = functools.cache(common.draw_shapes)  # shared by the runs of this process
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))

# Seconds on a CPU: 48 images of shapes at 16 pixels, 6 steps.
TINY = ("--dataset shapes --size 16 --view 16 --arch resnet10 --stem imagenet --limit 48 --batch 16 "
        "--epochs 2 --knn-every 0 --device cpu --amp off").split()
BY = {"bassl": "framework", "npid_distill": "update", "aug_study": "methods"}


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: takes minutes to hours; `make soak`, not `make test`")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("soak")])
        items[:] = [item for item in items if not item.get_closest_marker("soak")]


def parsed(script, *flags):
    """The configuration of a method's module for a command line."""
    return common.parse(script.Config, "", [*map(str, flags)], recipes=script.RECIPES, by=BY[script.__name__])


def run_script(*args, cwd=ROOT, timeout=300, env=None):
    """A script as a user starts it: (exit status, stdout, stderr)."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, **(env or {})})
    return done.returncode, done.stdout, done.stderr


def assert_works_alone(script, code, folder):
    """The file copied into an empty folder runs the code, without torchvision or the other files."""
    shutil.copy(ROOT / script, folder)
    code += "; import sys; assert 'common' not in sys.modules and 'torchvision' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Small(torch.nn.Sequential):
    """Stands in for a ResNet, so that a step or a save takes no time."""
    dim = 16

    def __init__(self, *_):
        super().__init__(torch.nn.Conv2d(3, 16, 3, bias=False), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
                         torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


def read_log(out):
    """log.jsonl without what depends on the clock or the folder."""
    lines = [json.loads(line) for line in (pathlib.Path(out) / "log.jsonl").read_text().splitlines()]
    clock = {"images_per_s", "minutes", "started", "command", "config", "sha", "blobs"}
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def assert_same(a, b, where=""):
    """Nested dicts, lists, tensors and plain values, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


class Died(BaseException):
    """Stands in for a kill: nothing in the script catches it."""


def same_run(a, b):
    """Two finished runs have the same checkpoint, backbone and log, but for clock and folder."""
    states = [common.read_checkpoint(pathlib.Path(out) / "checkpoint.pt") for out in (a, b)]
    for state in states:
        for key in ("seconds", "log"):
            state.pop(key)
        state["config"].pop("out")
    assert_same(*states)
    assert_same(*(common.read_checkpoint(pathlib.Path(out) / "backbone.pt") for out in (a, b)))
    assert read_log(a) == read_log(b)


def assert_dying_changes_nothing(script, flags, steps, tmp_path, monkeypatch):
    """A run that dies before each of the steps and is started again ends like one that never died."""
    def start(out, dies_at):
        def optimise(run, loss, optimise=common.Run.optimise):
            if run.step == dies_at:
                raise Died
            optimise(run, loss)
        with monkeypatch.context() as patch:
            patch.setattr(common.Run, "optimise", optimise)
            patch.setattr(common.fcntl, "flock", lambda *_: None)  # the dead run is still in this process
            script.train(parsed(script, *flags, "--out", out))

    start(tmp_path / "whole", -1)
    for step in steps:
        with pytest.raises(Died):
            start(tmp_path / "died", step)
    start(tmp_path / "died", -1)
    same_run(tmp_path / "whole", tmp_path / "died")
    torch.use_deterministic_algorithms(False)
