"""Shared by the tests: the repository on the path, tiny runs as subprocesses, and the `soak` marker for what takes long."""
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

common.draw_shapes = functools.cache(common.draw_shapes)  # runs inside this process share the pixels, which nothing writes to

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))  # one where two halves of the suite run side by side

# Seconds on a CPU: 48 images of shapes at 16 pixels.
TINY = ["--dataset", "shapes", "--arch", "resnet10", "--stem", "imagenet", "--size", "16", "--limit", "48", "--batch", "16", "--epochs", "2", "--device", "cpu"]


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: takes minutes to hours; run by `make soak`, not by `make test`")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("soak")])
        items[:] = [item for item in items if not item.get_closest_marker("soak")]


def run_script(*args, cwd=ROOT, timeout=300, env=None):
    """A script as a user starts it: (exit status, stdout, stderr)."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})})
    return done.returncode, done.stdout, done.stderr


def assert_works_alone(script, code, folder):
    """The file copied into an empty folder runs the code, without torchvision or the rest of the repository."""
    shutil.copy(ROOT / script, folder)
    code += "; import sys; assert 'common' not in sys.modules and 'torchvision' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def read_log(out):
    """log.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (pathlib.Path(out) / "log.jsonl").read_text().splitlines()]
    clock = {"images_per_s", "minutes", "started", "command"}
    lines[0] = {key: value for key, value in lines[0].items() if key != "config"}
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


def assert_dying_changes_nothing(script, flags, steps, tmp_path, monkeypatch):
    """A run that dies before the update of each of the steps, started again each time, ends bit for bit like one that never died."""
    def start(out, dies_at):
        def optimise(run, loss, optimise=common.Run.optimise):
            if run.step == dies_at:
                raise Died
            optimise(run, loss)
        with monkeypatch.context() as patch:
            patch.setattr(common.Run, "optimise", optimise)
            patch.setattr(common.fcntl, "flock", lambda *_: None)                       # the dead run is still in this process
            script.train(common.parse(script.Config, "", [*flags, "--out", str(out)]))

    start(tmp_path / "whole", -1)
    for step in steps:
        with pytest.raises(Died):
            start(tmp_path / "died", step)
    start(tmp_path / "died", -1)
    whole, died = (common.read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "died"))
    for state in (whole, died):
        state.pop("seconds"), state["config"].pop("out")
    assert_same(whole, died)
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "died")
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tiny_run(tmp_path):
    """tiny_run(script, *flags, name="run") -> the OUT folder of a finished run."""
    def run(script, *flags, name="run"):
        out = tmp_path / name
        status, _, stderr = run_script(script, *TINY, *flags, "--out", out)
        assert status == 0, stderr
        return out
    return run
