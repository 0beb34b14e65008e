"""Shared by the tests: the repository on the path, tiny runs and images, stand-ins, the `soak` marker."""
import collections
import contextlib
import functools
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import traceback

import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten_with_path

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import aug_study  # noqa: E402
import bassl  # noqa: E402
import common  # noqa: E402
import npid_distill  # noqa: E402

common.draw_shapes = functools.cache(common.draw_shapes)  # shared by the runs of this process
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))

# Seconds on a CPU: 48 images of shapes at 16 pixels, 6 steps.
TINY = ("--dataset shapes --size 16 --view 16 --arch resnet10 --stem imagenet --limit 48 --batch 16 "
        "--epochs 2 --knn-every 0 --device cpu --amp off").split()
BY = {"bassl": "framework", "npid_distill": "", "aug_study": "methods"}
METHODS = {
    **{name: (bassl, f"--framework {name} --queue 64") for name in ("simclr", "moco", "byol", "simsiam")},
    **{f"study {name}": (aug_study, f"--methods {name} --queue 64") for name in aug_study.METHODS},
    **{f"npid {rule}": (npid_distill, f"--update {rule} --dim 16 --negatives 0 --init random --cutmix 0.5")
       for rule in ("grad", "ema")},
}


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: takes minutes to hours; `make soak`, not `make test`")
    config.option.markexpr = config.option.markexpr or "not soak"


def parsed(script, *flags):
    """The configuration of a method's module for a command line."""
    return common.parse(script.Config, "", [*map(str, flags)], recipes=script.RECIPES, by=BY[script.__name__])


def run_script(*args, cwd=ROOT, timeout=400, fails=False):
    """What a script prints that is started as a user does; it must end with status 0, but where it fails."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert fails == (done.returncode != 0), done.stderr
    return done.stdout


class Small(torch.nn.Sequential):
    """Stands in for a ResNet, so that a step or a save takes no time."""
    dim = 16

    def __init__(self, *_):
        super().__init__(torch.nn.Conv2d(3, 16, 3, bias=False), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
                         torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(common, "resnet", Small)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("pretrained")
    bassl.train(parsed(bassl, *TINY, "--epochs", 1, "--seed", 3, "--out", out))
    return out


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(name, *flags, script): a tiny run in the folder of that name, whose path it returns."""
    monkeypatch.setattr(common.fcntl, "flock", lambda *_: None)  # a run that died is still in this process

    def start(name, *flags, script=bassl):
        script.train(parsed(script, *TINY, *flags, "--out", tmp_path / name))
        return tmp_path / name
    yield start
    torch.use_deterministic_algorithms(False)


def dies(*_):
    """Stands in for a kill: nothing in a training loop catches it."""
    raise KeyboardInterrupt


@contextlib.contextmanager
def at_step(n, action):
    """action(loss) -> loss before the optimizer's step n."""
    def optimise(run, loss, optimise=common.Run.optimise):
        optimise(run, action(loss) if run.step == n else loss)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "optimise", optimise)
        yield


def killed(run, function="", nth=0):
    """run() in a child that is killed where it is about to call a function of that name for the nth time."""
    child = os.fork()
    if child == 0:
        counts = collections.Counter()

        def called(frame, event, built_in):
            name = built_in.__name__ if event == "c_call" else frame.f_code.co_name
            of_text = isinstance(getattr(built_in, "__self__", None), str)  # "...".replace
            counts[name] += event in ("call", "c_call") and not of_text
            if (name, counts[name]) == (function, nth):
                os.kill(os.getpid(), signal.SIGKILL)
        sys.setprofile(called)
        try:
            run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == (signal.SIGKILL if function else 0), (function, nth, status)


@contextlib.contextmanager
def disk_of(size):
    """A limit on the size of files stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def saved(pixels, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def made_tree(folder, count=40):
    """Two classes of training images; image i is of the one grey i."""
    for i in range(count):
        saved(Image.new("RGB", (8, 8), (i, i, i)), folder / "train" / "ab"[i % 2] / f"{i:03}.png")
    return folder


def read_log(out):
    """log.jsonl without what depends on the clock or the folder."""
    lines = [json.loads(line) for line in (pathlib.Path(out) / "log.jsonl").read_text().splitlines()]
    clock = {"images_per_s", "minutes", "started", "command", "config", "sha"}
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def assert_same(a, b):
    """Nested dicts, lists, tensors and plain values, bit for bit."""
    a, b = (dict(tree_flatten_with_path(values)[0]) for values in (a, b))
    assert a.keys() == b.keys()
    for path, value in a.items():
        same = torch.equal(value, b[path]) if isinstance(value, torch.Tensor) else value == b[path]
        assert same, path


def same_run(a, b):
    """Two finished runs have the same checkpoint, backbone and log, but for clock and folder."""
    states = [common.read_checkpoint(pathlib.Path(out) / "checkpoint.pt") for out in (a, b)]
    for state in states:
        for key in ("seconds", "log"):
            state.pop(key)
        for key in ("out", "minutes"):
            state["config"].pop(key)
    assert_same(*states)
    assert_same(*(common.read_checkpoint(pathlib.Path(out) / "backbone.pt") for out in (a, b)))
    assert read_log(a) == read_log(b)


def assert_runs_on_cuda_and_compiles_once(module, steps):
    """The module compiles without a graph break or another graph for a later step, to the same values. On
    tensors that say they are on CUDA, a constant on the CPU, .item() or a branch on data would raise."""
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True,
                             backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for step in steps:
        torch.testing.assert_close(compiled(*step), module(*step))
    assert len(graphs) == 1
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module.to_empty(device="cuda")
        result = module(*(torch.empty_like(x, device="cuda") for x in steps[0]))
        if hasattr(module, "after_step"):
            module.after_step(0.5)
    torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert result.device.type == "cuda" and result.dtype == torch.float32
