"""How fast a training step is, against the floor of its own network: `make bench`.

    python tests/bench.py                                         # the recipe of this machine, every method
    python tests/bench.py --methods simclr npid --recipe cifar --out results/bench/steps.jsonl
    python tests/bench.py --methods study                         # aug_study's eight
    python tests/bench.py --photos DIR                            # images/s of decoding, map, augmentation

step: a step of the real training loop, all between two updates included, on images of `shapes`.
floor: forward and backward of the same network on as many resident random views at the same precision, and
the target network's forward where there is one; no loss, fusion, bank or optimizer. Steps and floors take
turns, so that a machine's drift cancels (ten of each on a GPU, with a wait at their end alone); the ratio is
the median over neighbours. The split is of a second pass that waits for the device around every part.
"""
import argparse
import collections
import contextlib
import functools
import importlib
import json
import pathlib
import statistics
import sys
import tempfile
import time
from unittest import mock

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import aug_study  # noqa: E402
import common  # noqa: E402
import npid_distill  # noqa: E402

METHODS = {  # name -> script and flags
    "bassl": ("bassl", ""), "npid": ("npid_distill", ""), "npid-ema": ("npid_distill", "--update ema"),
    **{name: ("bassl", f"--layers 0 --framework {name}") for name in ("simclr", "moco", "byol", "simsiam")},
}
STUDY = {f"study-{name}": ("aug_study", f"--methods {name}") for name in aug_study.METHODS}
BY = {"bassl": "framework", "npid_distill": "update", "aug_study": "methods"}
LOSSES = ["nt_xent", "info_nce", "cosine_loss", "barlow_loss", "vicreg_loss", "swav_loss", "dino_loss",
          "instance_ce", "sqrt_kl"]


class Done(BaseException):
    """Leaves a training loop after enough steps."""


def wait(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train_until(name: str, flags: list[str], after) -> None:
    """The method's own train(), with after(run) at the end of every update, until that raises Done."""
    script_name, own = (METHODS | STUDY)[name]
    script = importlib.import_module(script_name)

    def optimise(run, loss, optimise=common.Run.optimise):
        optimise(run, loss)
        after(run)

    with tempfile.TemporaryDirectory() as out, mock.patch.object(common.Run, "optimise", optimise):
        every = [*flags, *own.split(), "--epochs", "1000", "--knn-every", "0", "--out", out]
        with contextlib.suppress(Done), contextlib.redirect_stdout(sys.stderr):
            script.train(common.parse(script.Config, "", every, recipes=script.RECIPES, by=BY[script_name]))


def trained(run: common.Run) -> torch.nn.Module:
    """The module whose forward pass is the network's part of a step."""
    return run.model["framework"] if run.method == "bassl" else run.model


def floor(run: common.Run):
    """A function that does the network's part of a step alone."""
    model = online = trained(run)
    target, sizes = getattr(model, "target", None), [(run.view, 1 if run.method == "npid_distill" else 2)]
    if run.method != "npid_distill":
        parts = [getattr(model, part, None) for part in ("encoder", "projector", "predictor")]
        online = torch.nn.Sequential(*filter(None, parts))
    if run.method == "aug_study":
        views = aug_study.AUGMENTATIONS[run.cfg.augs or aug_study.METHODS[run.cfg.methods].aug]
        sizes += [(aug_study.local_size(run.view), views.locals)] if views.locals else []
    inputs = [torch.randn(count * run.batch, 3, size, size, device=run.device) for size, count in sizes]
    inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]

    def one_step():
        with run.autocast():
            loss = sum(online(x).float().square().mean() for x in inputs)
            if target is not None:
                with torch.no_grad():
                    target(inputs[0])
        loss.backward()
        run.model.zero_grad(set_to_none=True)

    return one_step


def step_and_floor(name: str, flags: list[str], count: int) -> tuple[common.Run, list[float], list[float]]:
    """Seconds of a step and of its floor, side by side, `count` times."""
    steps, floors, state = [], [], {"n": -4}

    def after(run):
        block = 10 if run.device.type == "cuda" else 1
        state["n"] += 1
        if state["n"] == 0:  # three steps to warm up
            state.update(run=run, floor=floor(run))
            state["floor"]()
            state["began"] = wait(run.device)
        elif state["n"] > 0 and state["n"] % block == 0:
            middle = wait(run.device)
            for _ in range(block):
                state["floor"]()
            steps.append((middle - state["began"]) / block)
            state["began"] = wait(run.device)
            floors.append((state["began"] - middle) / block)
            if len(steps) == count:
                raise Done

    train_until(name, flags, after)
    return state["run"], steps, floors


def split(name: str, flags: list[str], count: int) -> dict[str, float]:
    """Percent of a step by part; what is inside another part counts for the inner one."""
    seconds, inner, state, device = collections.Counter(), [], {"n": -3}, common.pick_device("auto")

    def timed(part, function):
        @functools.wraps(function)
        def wrapper(*args, **options):
            began = wait(device)
            inner.append(0.0)
            result = function(*args, **options)
            spent = wait(device) - began
            seconds[part] += spent - inner.pop()
            if inner:
                inner[-1] += spent
            return result
        return wrapper

    def start(run, *modules, start=common.Run.start):
        start(run, *modules)
        trained(run).forward = timed("network", trained(run).forward)
        run.optimizer.step = timed("optimizer", run.optimizer.step)

    def batches(self, *args, batches=common.ImageSet.batches):
        following = timed("data", functools.partial(next, batches(self, *args), None))
        yield from iter(following, None)

    def after(run):
        state["n"] += 1
        if state["n"] == 0:
            seconds.clear()
            state["began"] = wait(device)
        elif state["n"] == count:
            state["whole"] = wait(device) - state["began"]
            raise Done

    script = importlib.import_module((METHODS | STUDY)[name][0])
    targets = [("augmentation", common.BatchAugment, "forward"), ("network", torch.Tensor, "backward")]
    targets += [("loss", script, loss) for loss in LOSSES if hasattr(script, loss)]
    if script is npid_distill:
        targets += [("augmentation", script, "cutmix"), ("bank", script.MemoryBank, "in_play")]
        targets += [("bank", script.MemoryBank, "update")]
    elif script.__name__ == "bassl":
        targets.append(("fusion", script, "fuse_views"))
    with contextlib.ExitStack() as patches:
        for part, owner, key in targets:
            patches.enter_context(mock.patch.object(owner, key, timed(part, getattr(owner, key))))
        patches.enter_context(mock.patch.object(common.Run, "start", start))
        patches.enter_context(mock.patch.object(common.ImageSet, "batches", batches))
        train_until(name, flags, after)
    seconds["rest"] = state["whole"] - sum(seconds.values())
    return {f"{part} %": round(100 * spent / state["whole"], 1) for part, spent in seconds.most_common()}


def bench_method(name: str, flags: list[str], count: int) -> dict:
    run, steps, floors = step_and_floor(name, flags, count)
    ratio = statistics.median(least / step for step, least in zip(steps, floors))
    step, least = statistics.median(steps), statistics.median(floors)
    network = f"{run.cfg.arch}, {run.stem} stem, {run.view} px"
    return {"method": name, "network": network, "batch": run.cfg.batch,
            "images_per_s": round(run.cfg.batch / step, 1), "step_ms": round(1e3 * step, 2),
            "floor_ms": round(1e3 * least, 2), "floor/step": round(ratio, 3), **split(name, flags, count),
            "device": common.device_name(run.device), "precision": str(run.dtype).removeprefix("torch.")}


def bench_photos(folder: str, batch: int, device: torch.device) -> list[dict]:
    """Images/s of each stage of 224-pixel training by itself."""
    files, classes = common.list_tree(pathlib.Path(folder).resolve())
    stored, augment, rows = 256, common.BatchAugment(224, blur_p=0.5).to(device), []

    def stage(name, count, function):
        began = wait(device)
        result = function()
        rows.append({"stage": name, "images_per_s": round(count / (wait(device) - began), 1),
                     "device": common.device_name(device), "precision": "float32"})
        return result

    some = files[:100]
    stage("decode, one thread", len(some), lambda: [common.decode(file, stored) for file, _ in some])
    with tempfile.TemporaryDirectory() as cache:
        args = (files, classes, stored, pathlib.Path(cache) / "photos", 0)
        photos = stage("decode into the map, a thread a core", len(files), lambda: common.decoded(*args))
        order = [index % len(photos) for index in torch.arange(batch * 8).split(batch)]
        stage("read the map", 8 * batch, lambda: [*photos.batches(order, torch.device("cpu"))])
        x = next(photos.batches(order, device))[0]
        augment(x)
        stage("augment, one view", 4 * batch, lambda: [augment(x) for _ in range(4)])
    return rows


def parser() -> argparse.ArgumentParser:
    it = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    it.add_argument("--methods", nargs="+", choices=[*METHODS, *STUDY, "study"], default=[*METHODS],
                    metavar="NAME", help=", ".join([*METHODS, *STUDY, "study (these eight)"]))
    it.add_argument("--recipe", choices=["auto", "small", "cifar"], default="auto")
    it.add_argument("--batch", type=int, default=0, help="0 = the recipe's")
    it.add_argument("--steps", type=int, default=10, help="pairs of step and floor; on a GPU tens of them")
    it.add_argument("--photos", default="", metavar="DIR", help="photos: stages in place of steps")
    it.add_argument("--out", default="", metavar="FILE", help="append the rows to this .jsonl file")
    return it


def main() -> None:
    args = parser().parse_args()
    device = common.pick_device("auto")
    recipe = ("cifar" if device.type == "cuda" else "small") if args.recipe == "auto" else args.recipe
    flags = ["--recipe", recipe] + (["--batch", str(args.batch)] if args.batch else [])
    names = [name for word in args.methods for name in (STUDY if word == "study" else [word])]
    rows = bench_photos(args.photos, args.batch or 128, device) if args.photos else \
        (bench_method(name, flags, args.steps) for name in names)
    for row in rows:
        hidden = ("device", "precision", "network")
        print(", ".join(f"{key} {value}" for key, value in row.items() if key not in hidden), flush=True)
        if args.out:
            pathlib.Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            with open(args.out, "a") as file:
                file.write(json.dumps(row | common.origin()) + "\n")


if __name__ == "__main__":
    with common.one_line_errors():
        main()
