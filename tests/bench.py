"""How fast a training step is, against the floor of its own network: `make bench`.

    python tests/bench.py                                         # the recipe of this machine, each method
    python tests/bench.py --methods simclr npid --recipe cifar --out results/bench/steps.jsonl
    python tests/bench.py --photos DIR                            # images/s of decoding, map, augmentation

step: a step of the real training loop of CIFAR-10, all between two updates included, on random pixels.
floor: forward and backward of the same network on as many resident random views at the same precision, and
the target network's forward where there is one. Steps and floors take turns, so that a machine's drift
cancels (ten of each on a GPU, with a wait at their end alone); the ratio is the median over neighbours.
The split is of a second pass that waits for the device around every part.
"""
import argparse
import collections
import contextlib
import importlib
import itertools
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
import bassl  # noqa: E402
import common  # noqa: E402
import npid_distill  # noqa: E402

METHODS = {  # name -> script and flags
    "bassl": ("bassl", ""),
    "npid": ("npid_distill", ""),
    **{name: ("bassl", f"--layers 0 --framework {name}") for name in ("simclr", "moco", "byol", "simsiam")},
    **{f"study-{name}": ("aug_study", f"--methods {name}") for name in aug_study.METHODS},
}
BY = {"bassl": "framework", "npid_distill": "update", "aug_study": "methods"}


class Done(BaseException):
    """Leaves a training loop after enough steps."""


def wait(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def random_images(dataset, data, split, size, cache, workers, limit) -> common.ImageSet:
    """As many images as CIFAR-10 has, or as the recipe takes of them."""
    count = limit or common.IMAGES["cifar10"]
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    return common.ImageSet(pixels, torch.zeros(count, dtype=torch.long), ["one"])


def train_until(name: str, flags: list[str], after) -> None:
    """The method's own train(), with after(run, n) after update n, from -3, until that raises Done."""
    script_name, own = METHODS[name]
    script, updates = importlib.import_module(script_name), itertools.count(-3)

    def optimise(run, loss, optimise=common.Run.optimise):
        optimise(run, loss)
        after(run, next(updates))

    with tempfile.TemporaryDirectory() as out, mock.patch.object(common.Run, "optimise", optimise), \
            mock.patch.object(common, "load_images", random_images):
        every = [*flags, *own.split(), "--dataset", "cifar10"]
        every += ["--epochs", "1000", "--knn-every", "0", "--out", out]
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


def step_and_floor(name: str, flags: list[str], count: int = 10) -> tuple[common.Run, list]:
    """The run, and pairs of seconds: a step, and its floor right after it."""
    pairs, state = [], {}

    def after(run, n):
        block = 10 if run.device.type == "cuda" else 1
        if n == 0:
            state.update(run=run, floor=floor(run))
            state["floor"]()
        elif n > 0 and n % block == 0:
            middle = wait(run.device)
            for _ in range(block):
                state["floor"]()
            pairs.append(((middle - state["began"]) / block, (wait(run.device) - middle) / block))
        if n >= 0 and n % block == 0:
            state["began"] = wait(run.device)
        if len(pairs) == count:
            raise Done

    train_until(name, flags, after)
    return state["run"], pairs


def split(name: str, flags: list[str], count: int = 10) -> dict[str, float]:
    """Percent of a step by part; a loss inside the network's forward counts for the network."""
    seconds, began, device = collections.Counter(), [], common.pick_device("auto")
    parts = {(common.BatchAugment, "forward"): "augmentation", (torch.Tensor, "backward"): "network",
             (bassl, "fuse_views"): "fusion", (npid_distill, "cutmix"): "augmentation",
             (npid_distill.MemoryBank, "in_play"): "bank", (npid_distill.MemoryBank, "update"): "bank"}

    def timed(part, function):
        def wrapper(*args, **options):
            start = wait(device)
            result = function(*args, **options)
            seconds[part] += wait(device) - start
            return result
        return wrapper

    def start(run, *modules, start=common.Run.start):
        start(run, *modules)
        trained(run).forward = timed("network", trained(run).forward)
        run.optimizer.step = timed("optimizer", run.optimizer.step)

    def after(run, n):
        if n == 0:
            seconds.clear()
            began.append(wait(device))
        elif n == count:
            seconds["rest"] = wait(device) - began[0] - sum(seconds.values())
            raise Done

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(common.Run, "start", start))
        for (owner, key), part in parts.items():
            patches.enter_context(mock.patch.object(owner, key, timed(part, getattr(owner, key))))
        train_until(name, flags, after)
    whole = sum(seconds.values())
    return {f"{part} %": round(100 * spent / whole, 1) for part, spent in seconds.most_common()}


def bench_method(name: str, flags: list[str]) -> dict:
    run, pairs = step_and_floor(name, flags)
    step, least = (statistics.median(seconds) for seconds in zip(*pairs))
    ratio = statistics.median(floor / step for step, floor in pairs)
    return {"method": name, "network": f"{run.cfg.arch}, {run.stem} stem, {run.view} px",
            "batch": run.cfg.batch, "images_per_s": round(run.cfg.batch / step, 1),
            "step_ms": round(1e3 * step, 2), "floor_ms": round(1e3 * least, 2),
            "floor/step": round(ratio, 3), **split(name, flags),
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

    with tempfile.TemporaryDirectory() as cache:
        args = (files, classes, stored, pathlib.Path(cache) / "photos", 0)
        photos = stage("decode into the map, a thread a core", len(files), lambda: common.decoded(*args))
        order = [index % len(photos) for index in torch.arange(batch * 8).split(batch)]
        stage("read the map", 8 * batch, lambda: [*photos.batches(order, torch.device("cpu"))])
        x = next(photos.batches(order, device))[0]
        augment(x)
        stage("augment, one view", 4 * batch, lambda: [augment(x) for _ in range(4)])
    return rows


def main() -> None:
    device = common.pick_device("auto")
    usual = "cifar" if device.type == "cuda" else "small"
    it = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    it.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    it.add_argument("--recipe", choices=["small", "cifar"], default=usual)
    it.add_argument("--batch", type=int, default=0, help="0 = the recipe's")
    it.add_argument("--photos", default="", metavar="DIR", help="photos: stages in place of steps")
    it.add_argument("--out", default="", metavar="FILE", help="append the rows to this .jsonl file")
    args = it.parse_args()
    flags = ["--recipe", args.recipe] + (["--batch", str(args.batch)] if args.batch else [])
    rows = bench_photos(args.photos, args.batch or 128, device) if args.photos else \
        (bench_method(name, flags) for name in args.methods)
    for row in rows:
        hidden = ("device", "precision", "network")
        print(", ".join(f"{key} {value}" for key, value in row.items() if key not in hidden), flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(row | common.origin()) + "\n")


if __name__ == "__main__":
    with common.one_line_errors():
        main()
