"""Runs a training script again and again, each time killed at a given moment, and at last to its end.

    python tests/killed.py plan.json        # {"script": "bassl", "argv": [...], "kills": [["rename", 2], ["step", 5], ...]}

Every attempt is a child of this process, which has imported everything and computed nothing, so that a kill costs a second. A moment is
the n-th time since the attempt's start that the run is about to take a step, to serialise a checkpoint, to fsync, to rename, or is half
way through writing a checkpoint or a log line. The signal is SIGKILL. Prints the moments that came.
"""
import builtins
import collections
import functools
import importlib
import json
import os
import pathlib
import signal
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common  # noqa: E402


class Small(torch.nn.Sequential):
    """Stands in for a ResNet, so that a save takes no time."""
    dim = 16

    def __init__(self, *_):
        super().__init__(torch.nn.Conv2d(3, 16, 3, bias=False), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


class Torn:
    """A file that stops half way through every write."""

    def __init__(self, file, moment):
        self.file, self.moment = file, moment

    def write(self, data):
        self.file.write(data[:len(data) // 2])
        self.file.flush()
        self.moment("write")
        self.file.write(data[len(data) // 2:])

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def set_traps(phase, nth):
    counts = collections.Counter()

    def moment(name):
        counts[name] += 1
        if (name, counts[name]) == (phase, nth):
            os.kill(os.getpid(), signal.SIGKILL)

    def before(name, function):
        def stopped(*args, **options):
            moment(name)
            return function(*args, **options)
        return stopped

    common.Run.optimise = before("step", common.Run.optimise)
    torch.save, os.fsync, os.replace = before("serialise", torch.save), before("fsync", os.fsync), before("rename", os.replace)
    common.open = lambda *args: Torn(builtins.open(*args), moment)


def attempt(script, argv, phase, nth):
    """True where the kill came, False where the run reached its end first."""
    child = os.fork()
    if child == 0:
        try:
            set_traps(phase, nth)
            script.train(common.parse(script.Config, "", argv))
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status:
        raise SystemExit(f"the run ended with status {status} at {phase} {nth}")
    return False


if __name__ == "__main__":
    plan = json.loads(pathlib.Path(sys.argv[1]).read_text())
    script = importlib.import_module(plan["script"])
    common.resnet = Small
    common.draw_shapes = functools.cache(common.draw_shapes)
    common.draw_shapes(10_000, 0, size=16)
    came = [moment for moment in plan["kills"] if attempt(script, plan["argv"], *moment)]
    attempt(script, plan["argv"], "never", 0)
    print("came", json.dumps(came))
