"""What happens to runs: kills at any moment, full disks, damaged and malicious files, overflowing losses."""
import contextlib
import fcntl
import functools
import importlib
import os
import random
import signal
import sys

import pytest
import torch

import aug_study
import bassl
import common
import npid_distill
from conftest import (TINY, Small, assert_same, at_step, dies, disk_of, killed, made_tree, parsed, run_script,
                      same_run)

pytestmark = pytest.mark.usefixtures("small")
EVERY, flock = ["--save-every", "0"], fcntl.flock
# Functions that a step or a save calls, and how often at most it has done so in an attempt's third save.
MOST = {"optimise": 4, "_save": 3, "write_record": 100, "fsync": 7, "replace": 7}


def be_killed(name, folder, kills, *flags):
    """Leaves the folders whole, of a run that was left alone, and killed. In a process that has imported
    everything and computed nothing, so that an attempt, a fork of it, takes half a second."""
    import torch._dynamo  # else every attempt imports these two anew
    import torch.utils.flop_counter  # noqa: F401

    script, draw, kills = importlib.import_module(name), random.Random(name), int(kills)
    common.resnet, common.origin = Small, functools.cache(common.origin)
    common.origin(), common.draw_shapes(10_000, 0, size=16)

    def attempt(out, *at, more=()):
        argv = [*TINY, "--epochs", kills, "--knn-every", 10, "--save-every", 1000, *flags, *more]
        killed(lambda: script.train(parsed(script, *argv, "--out", f"{folder}/{out}")), *at)

    attempt("whole")
    for i in range(kills - 2):
        function = list(MOST)[i % 5]
        lost = function == "optimise" and i % 2  # the steps since the start are not saved: they come again
        attempt("killed", function, draw.randint(1, MOST[function]), more=[] if lost else EVERY)
    for nth in (1, 2):  # the last checkpoint, and the backbone after it
        attempt("killed", "_save", nth)
    attempt("killed")


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.soak)])
@pytest.mark.parametrize("script, flags", [
    ("bassl", "--framework moco --queue 64 --fuse shuffled --layers 2"),
    ("npid_distill", "--dim 16 --negatives 12 --cutmix 0.5"),
    ("aug_study", "--methods dino --augs byol --deterministic")])
def test_kills_in_every_phase_of_a_save_change_nothing(script, flags, kills, tmp_path):
    """Parameters, norms, optimizer, bank, queue, centre and log are those of a run that was left alone."""
    run_script("tests/test_survival.py", script, tmp_path, kills, *flags.split(), timeout=60 + 10 * kills)
    same_run(tmp_path / "whole", tmp_path / "killed")


def train_until_it_dies(train):
    """A run that saves every step and dies in its fifth."""
    with at_step(4, dies), pytest.raises(KeyboardInterrupt):
        train("out", *EVERY)


@pytest.mark.parametrize("size, file", [(100_000, "checkpoint.pt"), (200, "log.jsonl")])
def test_a_full_disk_ends_a_run_with_a_message_and_it_goes_on_later(size, file, train, tmp_path, capsys):
    """capsys keeps what is printed out of a file."""
    train_until_it_dies(train)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with disk_of(size), pytest.raises(common.RunError, match=f"could not write .*{file} .File too large"):
        train("out", *EVERY)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    same_run(train("whole", *EVERY), train("out", *EVERY))


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def poison(path):
    """A pickle that makes a folder where it is read."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "made"),)
    torch.save({"model": Evil()}, path)


@pytest.mark.parametrize("damage", [cut, poison])
def test_a_damaged_or_malicious_checkpoint_gives_way_to_the_one_before_it(damage, train, tmp_path, capsys):
    train_until_it_dies(train)
    damage(tmp_path / "out" / "checkpoint.pt")
    same_run(train("whole", *EVERY), train("out", *EVERY))
    printed = capsys.readouterr()
    assert "is damaged, or " in printed.err and "resumed at step 3 of 6 from " in printed.out
    for name in ("checkpoint.pt", "checkpoint.previous"):
        damage(tmp_path / "out" / name)
    with pytest.raises(common.RunError, match="no checkpoint in .* can be read; move the folder away"):
        train("out")
    assert not (tmp_path / "out" / "made").exists()


def test_a_flipped_bit_of_a_checkpoint_is_refused_or_changes_nothing(tmp_path):
    path, draw, refused = tmp_path / "checkpoint.pt", random.Random(0), 0
    state = {"x": torch.arange(3000), "n": 2, "log": ["one", "two"]}
    torch.save(state, path)
    good = path.read_bytes()
    for _ in range(200):
        flipped = bytearray(good)
        flipped[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            assert_same(common.read_checkpoint(path), state)  # a bit of the padding or of a time stamp
        except common.RunError:
            refused += 1
    assert refused > 180


def test_a_folder_of_another_run_is_refused_by_naming_what_differs(train):
    out = train("out", "--lr", "0.2")
    for _ in range(2):
        with pytest.raises(common.UsageError, match=r": lr \(0.2, not 0.1\), seed \(0, not 3\)"):
            train("out", "--lr", "0.1", "--seed", "3")
        with pytest.raises(common.UsageError, match="is of bassl, not .*npid_distill"):
            train("out", "--dim", "8", script=npid_distill)
        (out / "checkpoint.pt").unlink(missing_ok=True)  # then the log alone says whose folder it is


def test_a_flag_that_a_checkpoint_does_not_know_counts_as_its_default(train):
    """One that the scripts know no more is left alone where it was off."""
    out = train("out")
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    del state["config"]["fuse"], state["config"]["wd"]
    state["config"]["effects"] = ""
    torch.save(state, out / "checkpoint.pt")
    train("out")
    for flag, value in (("fuse", "plain"), ("wd", "0.3")):
        with pytest.raises(common.UsageError, match=f": {flag} .*, not .?{value}"):
            train("out", f"--{flag}", value)


def test_a_run_that_goes_on_elsewhere_says_so_and_torch_draws_the_same_numbers(train, tmp_path, monkeypatch):
    """What torch's own generator gives the steps, as it would a dropout."""
    drawn, optimise = [], common.Run.optimise
    monkeypatch.setattr(common.Run, "optimise",
                        lambda run, loss: drawn.append(torch.rand(1).item()) or optimise(run, loss))
    monkeypatch.setattr(common, "device_name", lambda _: "one")
    train("whole", *EVERY)
    for step, device in ((2, "one"), (3, "one"), (6, "two")):  # the step at which it dies; the last ends
        monkeypatch.setattr(common, "device_name", lambda _, device=device: device)
        with at_step(step, dies), contextlib.suppress(KeyboardInterrupt):
            train("parts", *EVERY)
    assert drawn[6:] == drawn[:6] and len({*drawn}) == 6
    log = common.read_log(tmp_path / "parts" / "log.jsonl")
    assert [line for line in log if "resumed" in line] == [
        {"resumed": 3, "device": "two", "precision": "float32", "processes": 1}]


def test_a_backbone_is_there_from_the_first_save_on_and_written_again_where_nothing_is_left(train, tmp_path):
    train_until_it_dies(train)
    state, backbone = (torch.load(tmp_path / "out" / f"{name}.pt", weights_only=True)
                       for name in ("checkpoint", "backbone"))
    assert state["step"] == 4
    for key, value in state["model"].items():
        if key.startswith("framework.encoder."):
            assert torch.equal(backbone[key.removeprefix("framework.encoder.")], value)
    whole = train("out", *EVERY)
    made = (whole / "backbone.pt").read_bytes()
    (whole / "backbone.pt").unlink()
    assert (train("out", *EVERY) / "backbone.pt").read_bytes() == made


@pytest.mark.parametrize("call, words", [("os.fsync", "the new file stands there"),
                                         ("os.replace", "what stood there is untouched")])
def test_an_error_while_a_file_takes_its_place_says_what_stands_there(call, words, tmp_path, monkeypatch):
    path, calls = tmp_path / "file", []
    path.write_bytes(b"old")

    def fail(*args, real=getattr(os, call.removeprefix("os."))):
        calls.append(args)
        if call == "os.replace" or len(calls) == 2:  # of fsync: first of the file, then of its folder
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(call, fail)
    with pytest.raises(common.RunError, match=f"could not write .*No space left.*{words}"):
        with common.replacing(path) as file:
            file.write(b"new")
    assert path.read_bytes() == (b"new" if "new file" in words else b"old")


def test_another_folder_or_other_images_are_refused_but_not_another_place_of_the_same_set(train, tmp_path):
    a, b = (made_tree(tmp_path / name, count=8) for name in "ab")
    flags = f"--dataset folder --recipe cifar --batch 4 --limit 0 --cache {tmp_path}/cache --data".split()
    train("out", *flags, a)
    with pytest.raises(common.UsageError, match="data .*a', not .*b'"):
        train("out", *flags, b)
    first = a / "train" / "a" / "000.png"
    renamed = first.rename(first.with_name("renamed.png"))
    with pytest.raises(common.UsageError, match=": file names;"):
        train("out", *flags, a)
    renamed.unlink()
    with pytest.raises(common.UsageError, match=r": file names, images \(8, not 7\)"):
        train("out", *flags, a)
    train("shapes"), train("shapes", "--data", b)


def test_two_runs_on_one_folder_are_refused_while_the_first_is_alive(train, monkeypatch):
    monkeypatch.setattr(common.fcntl, "flock", flock)

    def second(loss):
        with pytest.raises(common.UsageError, match="belongs to a run that is alive"):
            train("out")
        return loss

    with at_step(1, second):
        assert common.read_checkpoint(train("out") / "checkpoint.pt")["step"] == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_says_so_and_the_run_goes_on(number, train, capsys):
    handler = signal.getsignal(number)
    with at_step(1, lambda loss: os.kill(os.getpid(), number) or loss), pytest.raises(SystemExit) as end:
        train("out")
    assert end.value.code == 128 + number and signal.getsignal(number) is handler
    assert f"stopped by {number.name}; saved at step 2 of 6: " in capsys.readouterr().out
    same_run(train("whole"), train("out"))


def test_a_run_of_so_many_minutes_saves_and_ends_with_3_and_the_same_command_goes_on(train, capsys):
    for step in range(1, 6):  # a step an attempt, the last of an epoch among them; the sixth ends the run
        with pytest.raises(SystemExit) as end:
            train("out", "--minutes", "1e-9")
        assert end.value.code == 3
        assert f"stopped by --minutes 1e-09; saved at step {step} of 6" in capsys.readouterr().out
    same_run(train("whole", "--minutes", "1000"), train("out", "--minutes", "1000"))


@pytest.mark.parametrize("script", [bassl, npid_distill, aug_study])
def test_a_loss_that_is_not_finite_ends_the_run_and_what_is_saved_stays_finite(script, train, tmp_path):
    with at_step(4, lambda loss: loss * float("nan")), pytest.raises(common.RunError, match="not finite"):
        train("out", *EVERY, script=script)
    state = common.read_checkpoint(tmp_path / "out" / "checkpoint.pt")
    assert state["step"] == 4 and len(state["log"]) == 2  # header and the first epoch
    for value in [*state["model"].values(), *state.get("bank", {}).values()]:
        assert value.isfinite().all()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_an_overflowing_gradient_changes_nothing_and_too_many_end_the_run(optimizer, tmp_path):
    """On a CPU fp16 is float32 arithmetic under a scaler that works as ever, from 65,536 and halved."""
    run = common.Run(parsed(bassl, *TINY, "--optimizer", optimizer, "--lr", 0.1, "--out", tmp_path), "test")
    run.dtype, model = torch.float16, torch.nn.Linear(4, 2)
    run.start(model, model)

    def step(factor=1.0):
        """A step on a loss that is finite, by a gradient that may not be; whether it changed anything."""
        before = [p.clone() for p in model.parameters()]
        run.optimise(model(torch.ones(3, 4)).sum() * factor)
        return not all(map(torch.equal, before, model.parameters()))

    assert step() and not any([step(1e37) for _ in range(4)]) and step()
    state = [value.clone() for values in run.optimizer.state.values() for value in values.values()]
    with pytest.raises(common.RunError, match="not finite"):
        for _ in range(17):
            assert not step(float("inf"))
    assert_same(state, [value for values in run.optimizer.state.values() for value in values.values()])


if __name__ == "__main__":
    be_killed(*sys.argv[1:])
