"""How fast a training step is, against the floor of its own network: `make bench`.

    python tests/bench.py                                         # the recipe of this machine, each method
    python tests/bench.py --methods simclr npid --recipe cifar --out results/bench/steps.jsonl
    python tests/bench.py --photos DIR                            # images/s of decoding, map, augmentation
    python tests/bench.py --convs                                 # convolutions, the library's and by matmul

of matmul: the share of the machine that a step uses, its FLOPs (counted once, by torch's counter, with the
library's convolutions) over its time, divided by the rate of a product of two matrices of 4096 x 4096 in the
same process, threads and precision.
step: a step of the real training loop of CIFAR-10, all between two updates included, on random pixels.
floor: forward and backward of the same network on as many resident random views at the same precision, and
the target network's forward where there is one. Steps and floors take turns, so that a machine's drift
cancels (ten of each on a GPU, with a wait at their end alone); the ratio is the median over neighbours.
The split is of further steps, which wait for the device around every part; a loss inside the network's
forward counts for the network. Flags that are not of this script are the method's, as --batch 256.
"""
import argparse
import collections
import contextlib
import json
import pathlib
import statistics
import sys
import tempfile
import time
from unittest import mock

import numpy
import torch
from PIL import Image, JpegImagePlugin
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import aug_study  # noqa: E402
import bassl  # noqa: E402
import common  # noqa: E402
import npid_distill  # noqa: E402

METHODS = {  # name -> script and flags
    "bassl": (bassl, ""),
    "npid": (npid_distill, ""),
    **{name: (bassl, f"--layers 0 --framework {name}") for name in ("simclr", "moco", "byol", "simsiam")},
    **{f"study-{name}": (aug_study, f"--methods {name}") for name in aug_study.METHODS},
}
BY = {bassl: "framework", npid_distill: "", aug_study: "methods"}
COUNT = 10  # steps that are timed, by blocks on a GPU


class Done(BaseException):
    """Leaves a training loop after enough steps."""


def wait(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def floor(run: common.Run, model: torch.nn.Module, inputs: list[torch.Tensor]):
    """A function that does the network's part of a step alone, on random numbers of the inputs' shapes."""
    online = torch.nn.Sequential(*[part for name, part in model.named_children() if name != "target"])
    inputs = [torch.randn_like(x).contiguous(memory_format=torch.channels_last) for x in inputs]

    def one_step():
        with run.autocast():
            loss = sum(online(x).float().square().mean() for x in inputs)
            if hasattr(model, "target"):
                with torch.no_grad():
                    model.target(inputs[0])
        loss.backward()
        run.model.zero_grad(set_to_none=True)

    return one_step


def split(run: common.Run, model: torch.nn.Module):
    """Is resumed after every update; returns the percent of a step that each part takes."""
    seconds, bank = collections.Counter(), npid_distill.MemoryBank
    parts = {"augmentation": [(common.BatchAugment, "forward"), (npid_distill, "cutmix")],
             "fusion": [(bassl, "fuse_views")], "network": [(model, "forward"), (torch.Tensor, "backward")],
             "bank": [(bank, name) for name in ("sample", "step", "average")],
             "optimizer": [(run.optimizer, "step")]}

    def timed(part, function):
        def wrapper(*args, **options):
            start = wait(run.device)
            result = function(*args, **options)
            seconds[part] += wait(run.device) - start
            return result
        return wrapper

    with contextlib.ExitStack() as patches:
        for part, places in parts.items():
            for owner, name in places:
                wrapper = timed(part, getattr(owner, name))
                patches.enter_context(mock.patch.object(owner, name, wrapper))
        yield
        seconds.clear()
        began = wait(run.device)
        for _ in range(COUNT):
            yield
        whole = wait(run.device) - began
    seconds["rest"] = whole - sum(seconds.values())
    return {f"{part} %": round(100 * spent / whole, 1) for part, spent in seconds.most_common()}


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 4096) -> float:
    """FLOP/s of a product of two square matrices, the median of three."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds = []
    for _ in range(4):
        began = wait(device)
        a @ b
        seconds.append(wait(device) - began)
    return 2 * size**3 / statistics.median(seconds[1:])


def measure(name: str):
    """Is resumed with the run after every update; returns the row of a method."""
    run, inputs, pairs = (yield), [], []
    hook = run.encoder.register_forward_pre_hook(lambda _, x: inputs.extend(x))
    yield
    hook.remove()
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"), \
            mock.patch.object(common.Conv2d, "forward", torch.nn.Conv2d.forward):
        yield
    model = run.model["framework"] if run.method == "bassl" else run.model
    one_floor, block = floor(run, model, inputs), 10 if run.device.type == "cuda" else 1
    yield
    one_floor()
    for _ in range(COUNT):
        began = wait(run.device)
        for _ in range(block):
            yield
        middle = wait(run.device)
        for _ in range(block):
            one_floor()
        pairs.append(((middle - began) / block, (wait(run.device) - middle) / block))
    step, least = (statistics.median(seconds) for seconds in zip(*pairs))
    ratio = statistics.median(floor / step for step, floor in pairs)
    rate, flops = matmul_rate(run.device, run.dtype), counter.get_total_flops()
    return {"method": name, "network": f"{run.cfg.arch}, {run.stem} stem, {run.view} px",
            "batch": run.cfg.batch, "images_per_s": round(run.cfg.batch / step, 1),
            "of matmul": round(flops / step / rate, 3), "GFLOP": round(flops / 1e9, 1),
            "matmul GFLOP/s": round(rate / 1e9),
            "step_ms": round(1e3 * step, 2), "floor_ms": round(1e3 * least, 2),
            "floor/step": round(ratio, 3), **(yield from split(run, model)),
            "device": common.device_name(run.device), "precision": str(run.dtype).removeprefix("torch.")}


def bench_method(name: str, flags: list[str]) -> dict:
    """The method's own train(), on as many random images as its recipe takes, until measure() has its row."""
    (script, own), rows, measuring = METHODS[name], [], measure(name)
    next(measuring)

    def optimise(run, loss, optimise=common.Run.optimise):
        optimise(run, loss)
        try:
            measuring.send(run)
        except StopIteration as end:
            rows.append(end.value)
            raise Done from None

    def random_images(dataset, data, split, size, cache, workers, limit):
        count = limit or common.DATASETS["cifar10"].images
        pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
        return common.ImageSet(pixels, torch.zeros(count, dtype=torch.long), ["one"])

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr), \
            mock.patch.multiple(common, load_images=random_images), \
            mock.patch.multiple(common.Run, optimise=optimise), contextlib.suppress(Done):
        flags = [*flags, *own.split(), *"--dataset cifar10 --epochs 1000 --knn-every 0 --out".split(), out]
        script.train(common.parse(script.Config, "", flags, script.RECIPES, BY[script]))
    return rows[0]


def enlarged(path: str, times: int, folder: pathlib.Path) -> str:
    """A photo with times its width and height, as a JPEG in the folder."""
    with Image.open(path) as photo:
        large = photo.convert("RGB").resize((times * photo.width, times * photo.height))
    large.save(folder / f"{times}x-{pathlib.Path(path).stem}.jpg", quality=90)
    return str(folder / f"{times}x-{pathlib.Path(path).stem}.jpg")


def bench_photos(folder: str, batch: int = 128) -> list[dict]:
    """Images/s of each stage of 224-pixel training by itself."""
    place = pathlib.Path(folder).resolve()
    files, classes, _ = common.list_tree(place)
    device, rows = common.pick_device("auto"), []
    augment = common.BatchAugment(224, blur_p=0.5).to(device)

    def stage(name, count, function):
        began = wait(device)
        result = function()
        rows.append({"stage": name, "images_per_s": round(count / (wait(device) - began), 1),
                     "device": common.device_name(device), "precision": "float32"})
        return result

    with tempfile.TemporaryDirectory() as cache:
        args = (place, files, classes, 256, pathlib.Path(cache) / "photos")
        photos = stage("decode into the map, a thread a core", len(files), lambda: common.decoded(*args))
        large = [enlarged(path, 8, pathlib.Path(cache)) for path, _ in files[:8]]
        decode_large = lambda: [common.decode(path, 256)[0] for path in large]  # noqa: E731
        drafts = stage("decode photos 8 times as large, one thread", len(large), decode_large)
        with mock.patch.object(JpegImagePlugin.JpegImageFile, "draft"):
            whole = stage("the same, every pixel of them", len(large), decode_large)
        apart = numpy.abs(numpy.int32(drafts) - numpy.int32(whole)).mean()
        rows[-1]["mean difference in grey levels"] = round(float(apart), 2)
        order = [index % len(photos) for index in torch.arange(batch * 8).split(batch)]
        stage("read the map", 8 * batch, lambda: [*photos.batches(order, torch.device("cpu"))])
        x = next(photos.batches(order, device))[0]
        augment(x)
        stage("augment, one view", 4 * batch, lambda: [augment(x) for _ in range(4)])
    return rows


def shapes_of_convs(arch: str, stem: str, view: int) -> set[tuple]:
    """(channels in, out, kernel, stride, pixels of the map) of every convolution of a network."""
    found, network = set(), common.resnet(arch, stem).to("meta")

    def note(conv, inputs):
        pixels = inputs[0].shape[-1]
        found.add((conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], pixels))

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(note)
    network(torch.zeros(2, 3, view, view, device="meta"))
    return found


def bench_convs(batch: int = 256, largest: int = 12):
    """Milliseconds of each convolution of ResNet-10 and 18 on maps of up to `largest` pixels: forward, both
    gradients, the one into the weight alone; the library's and by matmul, in turns."""
    device = torch.device("cpu")
    shapes = set().union(*(shapes_of_convs(arch, stem, view) for arch in ("resnet10", "resnet18")
                           for stem in ("cifar", "imagenet") for view in (16, 24, 32)))
    for dtype in (torch.bfloat16, torch.float32):
        for channels, filters, kernel, stride, pixels in sorted(shapes, key=lambda shape: shape[::-1]):
            if pixels > largest:
                continue
            of_both = (batch, channels, pixels, pixels), (filters, channels, kernel, kernel)
            x, weight = (torch.randn(shape).to(dtype, memory_format=torch.channels_last) for shape in of_both)
            weight.requires_grad_()
            options = stride, kernel // 2
            forms = {"": lambda x: torch.nn.functional.conv2d(x, weight, None, *options),
                     ", by matmul": lambda x: common.MatmulConv.apply(x, weight, *options, True)}
            seconds, grad = collections.defaultdict(list), torch.randn_like(forms[""](x))
            for name, form in [*forms.items()] * 8:
                for part, needs in (("both gradients", True), ("weight alone", False)):
                    began = wait(device)
                    y = form(x.requires_grad_(needs))
                    middle = wait(device)
                    torch.autograd.grad(y, (x, weight) if needs else weight, grad)
                    seconds[f"{part} ms{name}"].append(wait(device) - middle)
                seconds[f"forward ms{name}"].append(middle - began)
            yield {"convolution": f"{channels} -> {filters}, {kernel}x{kernel}, stride {stride}, {pixels} px",
                   **{name: round(1e3 * statistics.median(times[1:]), 2) for name, times in seconds.items()},
                   "device": common.device_name(device), "precision": str(dtype).removeprefix("torch.")}


def main() -> None:
    it = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    it.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    it.add_argument("--photos", metavar="DIR", help="photos: stages in place of steps")
    it.add_argument("--convs", action="store_true", help="the convolutions of the networks in place of steps")
    it.add_argument("--out", metavar="FILE", help="append the rows to this .jsonl file")
    args, flags = it.parse_known_args()
    rows = (bench_method(name, flags) for name in args.methods)
    if args.photos:
        rows = bench_photos(args.photos)
    if args.convs:
        rows = bench_convs()
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(row | common.origin()) + "\n")


if __name__ == "__main__":
    with common.one_line_errors():
        main()
