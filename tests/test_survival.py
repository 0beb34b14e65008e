"""What happens to runs: kills at any moment, full disks, damaged and malicious files, overflowing losses."""
import contextlib
import fcntl
import json
import os
import random
import resource
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import aug_study
import bassl
import common
import npid_distill
from conftest import TINY, Died, Small, assert_same, parsed, run_script, same_run

MOST = {"step": 4, "serialise": 3, "write": 500, "fsync": 7, "rename": 7}  # up to an attempt's third save
KILLED = {"bassl": ["--framework", "moco", "--queue", "64"],
          "npid_distill": ["--dim", "16", "--negatives", "12"],
          "aug_study": ["--methods", "dino", "--augs", "simclr"]}
EVERY, flock = ["--save-every", "0"], fcntl.flock


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.soak)])
@pytest.mark.parametrize("script", KILLED)
def test_kills_in_every_phase_of_a_save_change_nothing(script, kills, tmp_path):
    """Parameters, norms, optimizer, bank, queue, centre and log are those of a run that was left alone."""
    draw, plan = random.Random(script), []
    for i in range(kills - 2):
        phase = list(MOST)[i % 5]
        lost = phase == "step" and i % 2  # the steps since the start are not saved: they come again
        plan.append([phase, draw.randint(1, MOST[phase]), [] if lost else EVERY])
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


@contextlib.contextmanager
def at_step(n, action):
    """action(loss) -> loss before the optimizer's step n."""
    def optimise(run, loss, optimise=common.Run.optimise):
        optimise(run, action(loss) if run.step == n else loss)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "optimise", optimise)
        yield


def dies(*_):
    raise Died


def train_until_it_dies(train):
    """A run that saves every step and dies in its fifth."""
    with at_step(4, dies), pytest.raises(Died):
        train("out", *EVERY)


@pytest.mark.parametrize("size, file", [(100_000, "checkpoint.pt"), (200, "log.jsonl")])
def test_a_full_disk_ends_a_run_with_a_message_and_it_goes_on_later(size, file, train, tmp_path, capsys):
    """A limit on the size of files stands in for the disk; capsys keeps what is printed out of a file."""
    train_until_it_dies(train)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(common.RunError, match=f"could not write .*{file} .File too large"):
            train("out", *EVERY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    same_run(train("whole", *EVERY), train("out", *EVERY))


def flip(path):
    """One bit in the middle, which is in the values of a parameter."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, lambda path: os.truncate(path, path.stat().st_size // 2),
                                    lambda path: path.write_bytes(b"")], ids=["flipped", "cut", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(damage, train, tmp_path, capsys):
    train_until_it_dies(train)
    damage(tmp_path / "out" / "checkpoint.pt")
    same_run(train("whole", *EVERY), train("out", *EVERY))
    printed = capsys.readouterr()
    assert "is damaged" in printed.err and "resumed at step 3 of 6 from " in printed.out
    for name in ("checkpoint.pt", "checkpoint.previous"):
        damage(tmp_path / "out" / name)
    with pytest.raises(common.RunError, match="no checkpoint in .* can be read; move the folder away"):
        train("out")


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_a_malicious_checkpoint_is_refused_and_not_run(train, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    torch.save({"model": Evil(tmp_path / "ran")}, tmp_path / "out" / "checkpoint.pt")
    with pytest.raises(common.RunError, match="no checkpoint in .* can be read"):
        train("out")
    assert "read safely" in capsys.readouterr().err and not (tmp_path / "ran").exists()


def test_a_folder_of_another_run_is_refused_by_naming_what_differs(train):
    out = train("out", "--lr", "0.2")
    for _ in range(2):
        with pytest.raises(common.UsageError, match=r": lr \(0.2, not 0.1\), seed \(0, not 3\)"):
            train("out", "--lr", "0.1", "--seed", "3")
        with pytest.raises(common.UsageError, match="is of bassl, not .*npid_distill"):
            train("out", "--dim", "8", script=npid_distill)
        (out / "checkpoint.pt").unlink(missing_ok=True)  # then the log alone says whose folder it is


def test_another_folder_is_another_run_but_another_place_of_the_same_set_is_not(train, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)).save(tmp_path / name / f"{i}.png")
    flags = f"--dataset folder --recipe cifar --batch 4 --cache {tmp_path}/cache --data".split()
    train("out", *flags, tmp_path / "a")
    with pytest.raises(common.UsageError, match="data .*a', not .*b'"):
        train("out", *flags, tmp_path / "b")
    train("shapes"), train("shapes", "--data", tmp_path / "b")


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
    for step in range(1, 7):  # a step an attempt, the last of an epoch among them
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
    def everything():
        state = [value for state in run.optimizer.state.values() for value in state.values()]
        return [value.clone() for value in [*model.parameters(), *state]]

    run = common.Run(parsed(bassl, *TINY, "--optimizer", optimizer, "--lr", "0.1", "--out", tmp_path), "test")
    run.dtype, model, x = torch.float16, torch.nn.Linear(4, 2), torch.ones(3, 4)
    run.start(model, model)
    run.optimise(model(x).sum())
    before = everything()
    for _ in range(4):
        run.optimise(model(x).sum() * 1e37)  # the loss is finite, its scaled gradient is not
        assert_same(before, everything())
    run.optimise(model(x).sum())
    assert not torch.equal(before[0], model.weight)
    before = everything()
    for _ in range(13):
        run.optimise(model(x).sum() * float("inf"))
    with pytest.raises(common.RunError, match="not finite"):
        run.optimise(model(x).sum())
    assert_same(before, everything())
