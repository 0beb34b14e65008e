"""What happens to runs: killed at any moment, full disks, damaged and malicious files, gradients that overflow, nonsense on the command line."""
import copy
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import typing

import numpy as np
import pytest
import torch
from PIL import Image

import bassl
import common
import linear_probe
import npid_distill
import aug_study
from conftest import ROOT, TINY, assert_same, read_log, run_script
from killed import Torn

PHASES = ["step", "serialise", "write", "fsync", "rename"]
KILLED = {
    "bassl": ["--framework", "moco"],
    "npid_distill": ["--dim", "16", "--negatives", "12"],
    "aug_study": ["--methods", "dino", "--augs", "simclr"],
}


def assert_killing_changes_nothing(script, kills, folder):
    """`kills` SIGKILLs of one run, at random moments of every kind; then parameters, BN, optimizer, bank, queue, centre and log are those of
    a run that nothing happened to."""
    most = {"step": 4, "serialise": 2, "write": 3, "fsync": 5, "rename": 4}              # up to the second save since the start
    draw, epochs = random.Random(script), ["--epochs", str(kills), "--knn-every", str(kills // 2)]
    flags = [*TINY, *epochs, "--save-every", "2steps", "--deterministic", *KILLED[script]]
    for name, moments in ("whole", []), ("killed", [[PHASES[i % 5], draw.randint(1, most[PHASES[i % 5]])] for i in range(kills)]):
        (folder / f"{name}.json").write_text(json.dumps({"script": script, "argv": [*flags, "--out", str(folder / name)], "kills": moments}))
        status, stdout, stderr = run_script("tests/killed.py", folder / f"{name}.json", timeout=30 * kills, env={"OMP_NUM_THREADS": "1"})
        assert status == 0, stderr
    came = json.loads(stdout.splitlines()[-1].removeprefix("came "))
    assert len(came) == kills, came
    whole, killed = (common.read_checkpoint(folder / name / "checkpoint.pt") for name in ("whole", "killed"))
    for state in (whole, killed):
        state.pop("seconds"), state["config"].pop("out")
    assert_same(whole, killed)
    assert_same(*(common.read_checkpoint(folder / name / "backbone.pt") for name in ("whole", "killed")))
    assert read_log(folder / "whole") == read_log(folder / "killed")


@pytest.mark.parametrize("script", KILLED)
def test_twenty_kills_in_every_phase_of_a_save_change_nothing(script, tmp_path):
    assert_killing_changes_nothing(script, 20, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("script", KILLED)
def test_two_hundred_kills_change_nothing(script, tmp_path):
    assert_killing_changes_nothing(script, 200, tmp_path)


def small_files(limit):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def start(argv, limit=None):
    return subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=200,
                          preexec_fn=small_files(limit) if limit else None)


def test_a_full_disk_ends_the_run_with_a_message_and_keeps_the_checkpoint(tmp_path):
    """A limit on the size of files stands in for the disk."""
    out = tmp_path / "out"
    flags = ["bassl.py", *TINY, "--save-every", "4steps", "--knn-every", "0", "--out", out]
    assert start([*flags, "--epochs", "2"]).returncode == 0
    assert common.read_checkpoint(out / "checkpoint.previous")["step"] == 4
    (out / "checkpoint.pt").unlink()                                                    # go on from step 4, and fail at the save of step 6
    before = (out / "checkpoint.previous").read_bytes()
    done = start([*flags, "--epochs", "2"], limit=1_000_000)
    assert done.returncode == 1 and "could not save" in done.stderr and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert (out / "checkpoint.previous").read_bytes() == before and not (out / "checkpoint.tmp").exists()
    done = start([*flags, "--epochs", "2"])
    assert done.returncode == 0 and "resumed at step 4" in done.stdout
    header = len((out / "log.jsonl").read_text().splitlines()[0])
    done = start(["bassl.py", *TINY, "--knn-every", "0", "--out", tmp_path / "log", "--epochs", "2"], limit=header + 100)  # half an epoch's line
    assert done.returncode == 1 and "could not write" in done.stderr and "log.jsonl" in done.stderr and "Traceback" not in done.stderr


def tree(root, images=12, size=8):
    for i in range(images):
        folder = root / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return root


def test_a_cache_is_read_only_when_it_is_whole(tmp_path, monkeypatch, capsys):
    data, cache = tree(tmp_path / "data", images=300), tmp_path / "cache"
    load = lambda: common.load_images("folder", str(data), "train", 8, cache=str(cache))  # noqa: E731
    want = common.load_images("folder", str(data), "train", 8)
    code = "import common, sys; common.load_images('folder', sys.argv[1], 'train', 8, cache=sys.argv[2])"
    done = subprocess.run([sys.executable, "-c", code, str(data), str(cache)], cwd=ROOT, capture_output=True, text=True, preexec_fn=small_files(20_000))
    assert "could not write the cache" in done.stderr and not list(cache.glob("*.pt"))
    decode, calls = common.decode, []

    def dies(path, size):
        calls.append(path)
        if len(calls) == 270:
            raise KeyboardInterrupt
        return decode(path, size)

    monkeypatch.setattr(common, "decode", dies)
    with pytest.raises(KeyboardInterrupt):
        load()
    calls.clear(), calls.extend([""] * 1000)
    got = load()
    assert torch.equal(got.pixels, want.pixels) and torch.equal(got.labels, want.labels) and len(calls) == 1300
    assert torch.equal(load().pixels, want.pixels) and len(calls) == 1300              # the second time nothing is decoded
    store = next(cache.glob("*.u8"))
    store.write_bytes(store.read_bytes()[:-1])
    capsys.readouterr()
    assert torch.equal(load().pixels, want.pixels) and "writing" in capsys.readouterr().out
    (data / "train" / "a" / "00.png").rename(data / "train" / "a" / "000.png")
    assert len(load()) == 300 and "writing" in capsys.readouterr().out                  # other files, so another cache


def test_a_cached_set_too_large_for_memory_is_read_from_the_map(tmp_path, monkeypatch):
    data = tree(tmp_path / "data", images=220)
    (data / "train" / "a" / "05.png").write_bytes(b"broken")
    want = common.load_images("folder", str(data), "train", 8, limit=150)
    monkeypatch.setattr(common, "IN_MEMORY", 0)
    got = common.load_images("folder", str(data), "train", 8, limit=150, cache=str(tmp_path / "cache"))
    assert got.store is not None and abs(len(got) - 150) <= 1
    plain = common.load_images("folder", str(data), "train", 8)
    order = [torch.arange(40)]
    streamed = next(plain.batches(order, torch.device("cpu")))[0]
    mapped = next(common.load_images("folder", str(data), "train", 8, cache=str(tmp_path / "cache")).batches(order, torch.device("cpu")))[0]
    assert want.pixels.shape[1:] == (3, 8, 8) and torch.equal(streamed[:2], mapped[:2])


@pytest.mark.parametrize("phase", ["write", "fsync", "rename"])
def test_a_probe_that_is_killed_while_it_writes_leaves_whole_rows(phase, tmp_path, monkeypatch):
    class Died(BaseException):
        pass

    def dies(*_):
        raise Died

    monkeypatch.setattr(linear_probe, "features", lambda encoder, images, *_: (images.pixels.flatten(1)[:, :8].float(), images.labels))
    monkeypatch.setattr(linear_probe, "quick_probe", lambda *_: 50.0)
    probe = lambda: linear_probe.main(["--random", "--arch", "resnet10", "--size", "16", "--epochs", "0", "--out", str(tmp_path)])  # noqa: E731
    probe()
    row = (tmp_path / "results.jsonl").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(common, "open", lambda *args: Torn(open(*args), dies), raising=False) if phase == "write" else \
            patch.setattr(os, {"fsync": "fsync", "rename": "replace"}[phase], dies)
        with pytest.raises(Died):
            probe()
    assert (tmp_path / "results.jsonl").read_text() == row
    probe()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(rows[0][key] == rows[1][key] for key in ("knn_top1", "knn20_top1", "probe_top1", "seed"))


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_a_malicious_checkpoint_is_refused_and_not_run(tmp_path, capsys):
    """Even with a digest that fits, which anyone can compute."""
    out, trace = tmp_path / "out", tmp_path / "ran"
    out.mkdir()
    common.write_checkpoint(out / "checkpoint.pt", {"model": Evil(trace)})
    with pytest.raises(common.RunError, match="no checkpoint in .* can be read"):
        bassl.train(common.parse(bassl.Config, "", [*TINY, "--out", str(out)]))
    assert "no checkpoint of ours" in capsys.readouterr().err and not trace.exists()


def run_in_fp16(tmp_path, monkeypatch, name="fp16"):
    """A run whose scaler works as in fp16, on a CPU: float32 arithmetic under loss scaling."""
    cfg = common.parse(common.RunConfig, "", ["--limit", "48", "--batch", "16", "--epochs", "4", "--device", "cpu", "--arch", "resnet10", "--size", "16",
                                              "--knn-every", "0", "--out", str(tmp_path / name)], shared=object)
    monkeypatch.setattr(common, "pick_dtype", lambda *_: torch.float16)
    run = common.Run(cfg, "test")
    run.dtype = torch.float16
    model = torch.nn.Linear(4, 2)
    run.start(model, model)
    return run, model


def test_an_overflowing_gradient_changes_nothing_and_is_counted_and_five_in_a_row_end_the_run(tmp_path, monkeypatch):
    run, model = run_in_fp16(tmp_path, monkeypatch)
    x, state = torch.ones(3, 4), lambda: copy.deepcopy([dict(model.state_dict()), run.optimizer.state_dict()["state"]])
    run.optimise(model(x).sum())
    before = state()
    run.optimise(model(x).sum() * torch.tensor(1e37))                                   # the loss is finite, its scaled gradient is not
    assert_same(before, state())
    assert run.bad_steps == 1 and run.sums["skipped_steps"] == run.steps_per_epoch
    run.optimise(model(x).sum())
    assert run.bad_steps == 0 and not torch.equal(before[0]["weight"], model.weight)
    kept = model.weight.clone()
    with pytest.raises(common.RunError, match=r"at step 0 \(lr .*not finite in 5 steps in a row"):
        for n in range(5):
            assert run.bad_steps == n
            run.optimise(model(x).sum() * float("inf"))
    assert torch.equal(kept, model.weight)


WORDS = ["", "0", "1", "2", "7", "16", "-1", "1e9", "1e400", "nan", "-inf", "9" * 400, "3.5", "shapes", "cifar10", "imagenet1k", "folder", "tinyimagenet", "resnet18",
         "resnet9000", "cifar", "imagenet", "adamw", "10m", "0s", "7steps", "bf16", "fp16", "off", "cpu", "cuda:9", "mps", "plain", "grad", "moco,byol", "simclr",
         "multicrop", "on", "/dev/null", "/nowhere/at/all", "tests", "a b", "ä\u2028", "--", "-b", "--batch", "--help me", "@file", "*"]


def random_lines(config, shared, count, seed):
    """Flags of the script with values that mostly fit their kind, and sometimes are anything."""
    draw, hints = random.Random(seed), {**typing.get_type_hints(shared), **typing.get_type_hints(config)}
    names = [name for name in hints if name not in ("out", "cache", "seed")]
    for _ in range(count):
        line = []
        for name in draw.choices(names, k=draw.randint(0, 5)):
            fitting = {bool: [], int: ["0", "1", "2", "16", "64"], float: ["0", "0.5", "1e-3", "20"], str: WORDS}.get(hints[name], typing.get_args(hints[name]))
            kind = draw.random()
            line += [f"--{name.replace('_', '-')}"]
            line += draw.choices(fitting or [""], k=bool(fitting)) if kind < 0.8 else draw.choices(WORDS, k=draw.choice([0, 1, 1, 2]))
        yield line


class Small(torch.nn.Module):
    """Stands in for a backbone, so that building one costs nothing."""
    dim = 8

    def __init__(self, *_):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


@pytest.mark.parametrize("script, count", [(bassl, 3000), (npid_distill, 3000), (aug_study, 3000), (linear_probe, 1000)])
def test_random_command_lines_end_as_documented(script, count, tmp_path, monkeypatch, capsys):
    """Everything up to the first step, on images that are there at once. Documented: 0, 1 or 2, and no other error gets out."""
    reached, shapes = [], common.ImageSet(torch.arange(600) % 2, ["a", "b"], torch.zeros(600, 3, 8, 8, dtype=torch.uint8))
    load = common.load_images
    quick = lambda dataset, data, split, size, *rest, **more: shapes if dataset == "shapes" and size < 65 else \
        load(dataset if dataset != "shapes" else "folder", data, split, min(size, 64))  # noqa: E731
    for module in (common, script):
        monkeypatch.setattr(module, "load_images", quick, raising=False)
        monkeypatch.setattr(module, "resnet", Small, raising=False)
    monkeypatch.setattr(common, "download_cifar", lambda *_: (_ for _ in ()).throw(common.RunError("no internet")))
    monkeypatch.setattr(common.Run, "start", lambda run, *_, **__: reached.append(run))
    monkeypatch.setattr(common.Run, "batches", lambda _: iter(()))
    monkeypatch.setattr(npid_distill, "calibrate", lambda *_: None)
    monkeypatch.setattr(npid_distill, "projector", lambda *_: torch.nn.Identity())
    monkeypatch.setattr(common, "resnet", Small)
    monkeypatch.chdir(tmp_path)
    statuses = {}
    for line in random_lines(script.Config, object if script is linear_probe else common.RunConfig, count, script.__name__):
        try:
            with common.one_line_errors():
                if script is linear_probe:
                    linear_probe.main([*line, "--random", "--epochs", "0"])
                else:
                    cfg = common.parse(script.Config, script.__doc__, [*line, "--out", str(tmp_path / "out")])
                    script.train(cfg)
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException as error:
            raise AssertionError(f"{line}") from error
        statuses[status] = statuses.get(status, 0) + 1
        torch.use_deterministic_algorithms(False)
    assert statuses.keys() <= {0, 1, 2} and min(statuses[0], statuses[2]) > count / 10 and (len(reached) == statuses[0] or script is linear_probe), statuses
    capsys.readouterr()


def corrupted(path, draw):
    """One thing that happens to a file or folder."""
    data = path.read_bytes()
    what = draw.randrange(8)
    if what == 0:
        path.write_bytes(data[:draw.randrange(len(data))])
    elif what == 1:
        changed = bytearray(data)
        for _ in range(draw.randint(1, 20)):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
    elif what == 2:
        path.unlink()
    elif what == 3:
        path.unlink(), path.mkdir()
    elif what == 4:
        path.rename(path.with_suffix(draw.choice([".jpg", ".txt", "", ".PNG", ".webp"])))
    elif what == 5:
        path.unlink(), path.symlink_to(draw.choice([path.name, "nowhere.png", ".."]))
    elif what == 6:
        path.write_bytes(draw.randbytes(draw.randrange(200)))
    else:
        shutil.rmtree(path.parent)


def test_random_corruptions_of_a_tree_end_as_documented(tmp_path):
    """500 trees: every one is read, or refused with one of our two errors."""
    draw, ends, root = random.Random(0), {}, tmp_path / "tree"
    for _ in range(500):
        shutil.rmtree(root, ignore_errors=True)
        tree(root)
        for _ in range(draw.randint(1, 3)):
            if files := sorted(p for p in root.rglob("*.png") if p.is_file() and not p.is_symlink()):
                corrupted(draw.choice(files), draw)
        try:
            images = common.load_images("folder", str(root), "train", 8)
            assert images.pixels.shape == (len(images), 3, 8, 8) and len(images) > 0
            end = "read"
        except (common.RunError, common.UsageError) as error:
            assert str(root) in str(error)
            end = type(error).__name__
        ends[end] = ends.get(end, 0) + 1
    assert min(ends.get("read", 0), ends.get("RunError", 0)) > 50, ends
