"""What happens to runs: killed at any moment, full disks, damaged and malicious files, losses that overflow."""
import contextlib
import fcntl
import json
import os
import random
import resource
import signal
import types

import numpy as np
import pytest
import torch
from PIL import Image

import aug_study
import bassl
import common
import linear_probe
import npid_distill
from conftest import TINY, Died, Small, assert_same, parsed, run_script, same_run
from killed import set_traps

PHASES = ["step", "serialise", "write", "fsync", "rename"]
MOST = {"step": 4, "serialise": 3, "write": 500, "fsync": 7, "rename": 7}  # up to the third save of an attempt
KILLED = {"bassl": ["--framework", "moco", "--queue", "64"], "npid_distill": ["--dim", "16", "--negatives", "12"],
          "aug_study": ["--methods", "dino", "--augs", "simclr"]}


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.soak)])
@pytest.mark.parametrize("script", KILLED)
def test_kills_in_every_phase_of_a_save_change_nothing(script, kills, tmp_path):
    """Parameters, norms, optimizer, bank, queue, centre and log are those of a run that nothing happened to."""
    draw, plan = random.Random(script), []
    for i in range(kills - 2):
        phase = PHASES[i % 5]
        lost = phase == "step" and i % 2  # the steps since the start are not saved: they come again
        plan.append([phase, draw.randint(1, MOST[phase]), [] if lost else ["--save-every", "0"]])
    plan += [["serialise", 1, []], ["serialise", 2, []]]  # the last checkpoint, and the backbone after it
    argv = [*TINY, "--epochs", str(kills), "--knn-every", "10", "--save-every", "1000", *KILLED[script]]
    (tmp_path / "plan.json").write_text(json.dumps({"script": script, "argv": argv, "kills": plan}))
    status, stdout, stderr = run_script("tests/killed.py", tmp_path / "plan.json", timeout=60 + 10 * kills,
                                        env={"OMP_NUM_THREADS": "1"})
    assert status == 0, stderr
    assert json.loads(stdout.splitlines()[-1]) == [kill[:2] for kill in plan]
    same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(name, *flags, script): a tiny run in the folder of that name, whose path it returns."""
    monkeypatch.setattr(common, "resnet", Small)
    monkeypatch.setattr(common.fcntl, "flock", lambda *_: None)  # a run that died is still in this process

    def start(name, *flags, script=bassl):
        script.train(parsed(script, *TINY, *flags, "--out", tmp_path / name))
        return tmp_path / name
    return start


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action): action(run, loss) in place of the optimizer's step n, by a `with`; it may return a loss."""
    @contextlib.contextmanager
    def patched(n, action):
        def optimise(run, loss, optimise=common.Run.optimise):
            optimise(run, action(run, loss) if run.step == n else loss)
        with monkeypatch.context() as patch:
            patch.setattr(common.Run, "optimise", optimise)
            yield
    return patched


def dies(*_):
    raise Died


@contextlib.contextmanager
def files_of_at_most(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size, file", [(100_000, "checkpoint.pt"), (200, "log.jsonl")])
def test_a_full_disk_ends_the_run_with_a_message_and_the_run_goes_on_later(size, file, train, at_step, tmp_path, capsys):
    """A limit on the size of files stands in for the disk; capsys keeps what is printed out of a file."""
    whole = train("whole", "--save-every", "0")
    with at_step(4, dies), pytest.raises(Died):
        train("full", "--save-every", "0")
    before = {path.name: path.read_bytes() for path in (tmp_path / "full").iterdir()}
    with files_of_at_most(size), pytest.raises(common.RunError, match=f"could not write .*{file} .File too large"):
        train("full", "--save-every", "0")
    assert {path.name: path.read_bytes() for path in (tmp_path / "full").iterdir()} == before
    same_run(whole, train("full", "--save-every", "0"))


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """One bit in the middle, which is in the values of a parameter."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.write_bytes(b"")], ids=["cut", "flip", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(damage, train, at_step, tmp_path, capsys):
    whole = train("whole", "--save-every", "0")
    with at_step(4, dies), pytest.raises(Died):
        train("out", "--save-every", "0")
    damage(tmp_path / "out" / "checkpoint.pt")
    same_run(whole, train("out", "--save-every", "0"))
    printed = capsys.readouterr()
    assert "is damaged" in printed.err and f"resumed at step 3 of 6 from {tmp_path}" in printed.out
    for name in ("checkpoint.pt", "checkpoint.previous"):
        damage(tmp_path / "out" / name)
    with pytest.raises(common.RunError, match="no checkpoint in .* can be read; move the folder away"):
        train("out", "--save-every", "0")


def rewrite(path, state):
    with common.replacing(path) as file:
        torch.save(state, file)


def test_a_checkpoint_that_lacks_a_key_or_is_something_else_is_one_error(train, tmp_path):
    path = train("out") / "checkpoint.pt"
    state = common.read_checkpoint(path)
    read = state.keys() - {"arch", "stem"}  # these two are for people and probes
    assert len(read) == 12
    for part in [{k: v for k, v in state.items() if k != key} for key in read] + [[1, 2], torch.ones(3)]:
        rewrite(path, part)
        with pytest.raises(common.RunError, match="does not fit this run|no checkpoint"):
            train("out")


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_a_malicious_checkpoint_is_refused_and_not_run(train, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    rewrite(tmp_path / "out" / "checkpoint.pt", {"model": Evil(tmp_path / "ran")})
    with pytest.raises(common.RunError, match="no checkpoint in .* can be read"):
        train("out")
    assert "read safely" in capsys.readouterr().err and not (tmp_path / "ran").exists()


def test_a_folder_of_another_run_is_refused_by_naming_what_differs(train, tmp_path):
    out = train("out")
    want = r"another configuration: lr \(0.008, not 0.1\), seed \(0, not 3\); choose another --out"
    for _ in range(2):
        with pytest.raises(common.UsageError, match=want):
            train("out", "--lr", "0.1", "--seed", "3")
        with pytest.raises(common.UsageError, match="is of bassl, not .*npid_distill"):
            train("out", "--dim", "8", script=npid_distill)
        (out / "checkpoint.pt").unlink(missing_ok=True)  # then the log alone says whose folder it is
    (out / "log.jsonl").unlink()


def test_another_folder_of_images_is_another_run_but_another_place_of_the_same_set_is_not(train, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(8):
            pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    folder = ["--dataset", "folder", "--recipe", "cifar", "--batch", "4", "--cache", tmp_path / "cache", "--data"]
    train("out", *folder, tmp_path / "a")
    with pytest.raises(common.UsageError, match="data .*a', not .*b'"):
        train("out", *folder, tmp_path / "b")
    same_run(train("shapes"), train("shapes", "--data", tmp_path / "b"))


def test_two_runs_on_one_folder_are_refused_until_the_first_has_ended(train, at_step, tmp_path, monkeypatch):
    monkeypatch.setattr(common.fcntl, "flock", fcntl_flock)

    def second(run, loss):
        with pytest.raises(common.UsageError, match="belongs to a run that is alive"):
            train("out")
        return loss

    with at_step(1, second):
        out = train("out")
    assert common.read_checkpoint(out / "checkpoint.pt")["step"] == 6


fcntl_flock = fcntl.flock


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_says_so_and_the_run_goes_on(number, train, at_step, capsys):
    def stop(run, loss):
        os.kill(os.getpid(), number)
        return loss

    handler = signal.getsignal(number)
    with at_step(1, stop), pytest.raises(SystemExit) as end:
        train("out")
    assert end.value.code == 128 + number and signal.getsignal(number) is handler
    assert f"stopped by {number.name}; saved at step 2 of 6: the same command goes on" in capsys.readouterr().out
    same_run(train("whole"), train("out"))


def test_a_run_of_so_many_minutes_saves_and_ends_with_3_and_the_same_command_goes_on(train, capsys):
    for step in range(1, 7):  # a step an attempt, the last of an epoch among them
        with pytest.raises(SystemExit) as end:
            train("out", "--minutes", "1e-9")
        assert end.value.code == 3
        assert f"stopped by --minutes 1e-09; saved at step {step} of 6" in capsys.readouterr().out
    same_run(train("whole", "--minutes", "1000"), train("out", "--minutes", "1000"))


@pytest.mark.parametrize("script", [bassl, npid_distill, aug_study])
def test_a_loss_that_is_not_finite_ends_the_run_and_what_is_saved_stays_finite(script, train, at_step, tmp_path):
    flags = ["--dim", "8"] if script is npid_distill else []
    with at_step(4, lambda run, loss: loss * float("nan")), pytest.raises(common.RunError, match="not finite"):
        train("out", "--save-every", "0", *flags, script=script)
    state = common.read_checkpoint(tmp_path / "out" / "checkpoint.pt")
    assert state["step"] == 4 and len(state["log"]) == 2  # header and the first epoch
    for value in [*state["model"].values(), *state.get("bank", {}).values()]:
        assert value.isfinite().all()


def bare_run(tmp_path, monkeypatch, dtype, optimizer="adamw"):
    """A run of one linear layer. On a CPU fp16 is float32 arithmetic under a scaler that works as on a GPU."""
    monkeypatch.setattr(common, "pick_dtype", lambda *_: dtype)
    run = common.Run(parsed(bassl, *TINY, "--optimizer", optimizer, "--lr", "0.1", "--out", tmp_path / "run"), "test")
    run.dtype = dtype
    model = torch.nn.Linear(4, 2)
    run.start(model, model)
    run.saved = 0.0
    return run, model


def test_where_the_loss_is_looked_at_rarely_nothing_after_a_bad_step_is_saved(tmp_path, monkeypatch):
    """As on a GPU, where a step does not wait; the weights may look well again."""
    run, model = bare_run(tmp_path, monkeypatch, torch.float32)
    run.device, run.step, x = types.SimpleNamespace(type="elsewhere"), 1, torch.ones(3, 4)
    run.optimise(model(x).sum() * float("nan"))
    with torch.no_grad():
        model.weight.fill_(1.0), model.bias.fill_(1.0)
    run.optimise(model(x).sum())
    with pytest.raises(common.RunError, match="not finite"):
        run.save()
    assert not (run.out / "checkpoint.pt").exists()


def test_parameters_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    run, model = bare_run(tmp_path, monkeypatch, torch.float32)
    model.weight.data[0, 0] = float("inf")
    with pytest.raises(common.RunError, match="parameters are not finite"):
        run.save()
    assert not (run.out / "checkpoint.pt").exists()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_an_overflowing_gradient_changes_nothing_and_the_fifth_in_a_row_ends_the_run(optimizer, tmp_path, monkeypatch):
    run, model = bare_run(tmp_path, monkeypatch, torch.float16, optimizer)
    x = torch.ones(3, 4)
    run.optimise(model(x).sum())
    before = [value.clone() for value in everything(run, model)]
    for n in range(1, 5):
        run.optimise(model(x).sum() * 1e37)  # the loss is finite, its scaled gradient is not
        assert_same(before, [value.clone() for value in everything(run, model)])
        assert run.bad == n and run.sums["skipped"] == n
    run.optimise(model(x).sum())
    assert run.bad == 0 and not torch.equal(before[0], model.weight)
    kept = model.weight.clone()
    with pytest.raises(common.RunError, match=r"not finite .*\(lr 0.006"):
        for _ in range(5):
            run.optimise(model(x).sum() * float("inf"))
    assert torch.equal(kept, model.weight)


def everything(run, model):
    """Parameters and the optimizer's state."""
    return [*model.parameters(), *(value for state in run.optimizer.state.values() for value in state.values())]


@pytest.mark.parametrize("phase, n", [("write", 2), ("fsync", 3), ("rename", 1)])
def test_a_probe_that_is_killed_while_it_writes_leaves_whole_rows(phase, n, tmp_path, monkeypatch):
    def features(encoder, images, *_):
        return images.pixels[images.rows].flatten(1)[:, :8].float(), images.labels

    monkeypatch.setattr(linear_probe, "features", features)
    monkeypatch.setattr(linear_probe, "quick_probe", lambda *_: 50.0)
    path, counts = tmp_path / "results.jsonl", dict.fromkeys(PHASES, 0)

    def moment(name):
        counts[name] += 1
        if (name, counts[name]) == (phase, n):
            raise Died

    def probe(seed):
        flags = ["--random", "--arch", "resnet10", "--size", "16", "--fraction", "0.01", "--seed", seed]
        argv = [*flags, "--device", "cpu", "--out", tmp_path]
        linear_probe.probe(common.parse(linear_probe.Config, "", [*map(str, argv)], shared=object))
        return [json.loads(line) for line in path.read_text().splitlines()]

    first = probe(0)
    with monkeypatch.context() as patch, pytest.raises(Died):
        set_traps(patch.setattr, moment)
        probe(1)
    left = [json.loads(line) for line in path.read_text().splitlines()]
    assert left[:1] == first and len(left) == (1 if n == 1 else 2)
    rows = probe(1)
    assert rows[:1] == first and len(rows) == 2
    assert {"knn_top1", "knn20_top1", "probe_top1"} <= rows[1].keys()
