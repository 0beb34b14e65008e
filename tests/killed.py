"""Runs a training script again and again, each time killed at a given moment, and at last to its end.

    python tests/killed.py plan.json  # {"script": "bassl", "argv": [...], "kills": [["rename", 2, []], ...]}

A kill is SIGKILL the n-th time that an attempt is about to enter a phase, or is half way through a write.
Leaves killed/, and whole/ of a run that was left alone, and prints the kills that came. An attempt is a child
of this process, which has imported everything and computed nothing, so that a kill costs half a second.
"""
import collections
import functools
import importlib
import json
import os
import pathlib
import signal
import sys

import torch
import torch._dynamo  # else every attempt imports these two anew
import torch.utils.flop_counter  # noqa: F401

from conftest import Small, common, parsed


class Torn:
    """A file that stops half way through every write."""

    def __init__(self, file, moment):
        self.file, self.moment = file, moment

    def write(self, data):
        self.file.write(data[:len(data) // 2])
        self.file.flush()
        self.moment("write")
        self.file.write(data[len(data) // 2:])
        return len(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def set_traps(moment):
    """moment(name) is called right before, or half way through, everything that a save does."""
    def before(name, function):
        def stopped(*args, **options):
            moment(name)
            return function(*args, **options)
        return stopped

    common.Run.optimise = before("step", common.Run.optimise)
    torch.save = before("serialise", torch.save)
    os.fsync = before("fsync", os.fsync)
    os.replace = before("rename", os.replace)
    common.open = lambda *args: Torn(open(*args), moment)


def attempt(script, argv, phase, nth):
    """True where the kill came, False where the run reached its end first."""
    child = os.fork()
    if child == 0:
        counts = collections.Counter()

        def moment(name):
            counts[name] += 1
            if (name, counts[name]) == (phase, nth):
                os.kill(os.getpid(), signal.SIGKILL)
        set_traps(moment)
        script.train(parsed(script, *argv))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status not in (0, signal.SIGKILL):
        raise SystemExit(f"the run ended with status {status} at {phase} {nth}")
    return status == signal.SIGKILL


if __name__ == "__main__":
    path = pathlib.Path(sys.argv[1])
    plan = json.loads(path.read_text())
    script = importlib.import_module(plan["script"])
    common.resnet = Small
    os.fsync = lambda _: None  # what a killed process has written stays, and the disk need not be waited for
    common.origin = functools.cache(common.origin)
    common.origin(), common.draw_shapes(10_000, 0, size=16)
    attempt(script, [*plan["argv"], "--out", path.parent / "whole"], "never", 0)
    argv = [*plan["argv"], "--out", path.parent / "killed"]
    came = [[phase, n] for phase, n, flags in plan["kills"] if attempt(script, argv + flags, phase, n)]
    attempt(script, argv, "never", 0)
    print(json.dumps(came))
