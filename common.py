"""What the method scripts share: images, augmentation, backbones, precision, processes, and the run itself.

Nothing here belongs to a method: losses, heads, queues and banks live in the method's own file.
Shapes: B batch, N images, H pixels of a stored image, S pixels of a view.
"""
import argparse
import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import inspect
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Callable, Iterable, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision import datasets
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.transforms.v2.functional import rgb_to_grayscale
from torchvision.utils import save_image

# ----------------------------------------------------------------------------------------- errors and flags


class UsageError(Exception):
    """Wrong usage: a flag, a path or a combination of them. Ends a script with exit status 2."""


class RunError(Exception):
    """Right usage that could not be carried out: broken data, a diverged loss, a full disk. Exit status 1."""


@contextlib.contextmanager
def one_line_errors():
    """A user's errors become one line on stderr and an exit status; others keep their traceback."""
    try:
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UsageError, RunError, OSError) as error:
        print(f"{pathlib.Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


class DataSet(NamedTuple):
    """What is known of a set before it is read; list_images and load_images say how it is found."""

    pixels: int                      # of a whole image, as networks see it
    images: int                      # training images; 0 = as many as there are
    small: str                       # stem of its small recipe (in RECIPES), for probes; empty = it has none
    folder: str                      # below --data, where it may lie: DIR/<folder>/{train,val,test}/<class>/


DATASETS = {
    "shapes": DataSet(32, 10_000, "imagenet", ""),  # drawn
    "cifar10": DataSet(32, 50_000, "cifar", "cifar10"),
    "cifar100": DataSet(32, 50_000, "cifar", "cifar100"),
    "tinyimagenet": DataSet(64, 100_000, "imagenet", "tiny-imagenet-200"),
    "imagenet100": DataSet(224, 126_689, "", "imagenet100"),
    "imagenet1k": DataSet(224, 1_281_167, "", "imagenet1k"),
    "folder": DataSet(224, 0, "", ""),  # your own
}
Dataset = Literal[tuple(DATASETS)]
Arch = Literal["resnet10", "resnet18", "resnet34", "resnet50"]
Stem = Literal["auto", "cifar", "imagenet"]


@dataclass
class RunConfig:
    """The flags of every pretraining script. One that is None takes its value from the recipe."""

    dataset: Dataset = "shapes"      # what to train on
    data: str = "data"               # where the images are, or are downloaded to
    recipe: Literal["auto", "small", "cifar", "imagenet"] = "auto"  # auto: README, Recipes
    batch: int | None = None         # images per step, over all processes
    epochs: int | None = None        # passes over the training images
    arch: Arch | None = None         # backbone
    stem: Stem | None = None         # first layers: 3x3 without pool, or 7x7 with; auto = cifar up to 64 px
    size: int = 0                    # pixels of a whole image, as probes see it; 0 = the set's: 32, 64 or 224
    view: int | None = None          # pixels of a training view, cut from the stored image; 0 = size
    weights: str = ""                # warm start: begin with the ResNet in this file; arch and stem are its
    optimizer: Literal["sgd", "lars", "adamw"] | None = None  # momentum 0.9 for sgd and lars
    lr: float | None = None          # learning rate at batch 256; the run uses lr x batch / 256 and prints it
    wd: float | None = None          # weight decay
    warmup: float | None = None      # epochs of linear warm-up before the cosine; at most a tenth of the run
    limit: int | None = None         # train on the first N images of a fixed shuffle; 0 = all
    seed: int = 0                    # of weights, order, views; repeats a run, on CUDA with --deterministic
    out: str = ""                    # folder of this run; empty = runs/<dataset>/<method>, as make names it
    cache: str = "cache"             # folder that keeps decoded images for later runs
    workers: int = 0                 # threads that decode images, once per set; 0 = one a core
    device: str = "auto"             # auto = the accelerator that torch finds, else cpu; or cuda:1, mps
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # autocast; auto = bf16 where the hardware has it
    compile: bool = False            # torch.compile the backbone into CUDA graphs; off with --deterministic
    sync_bn: bool = True             # torchrun on CUDA: batch norm over all processes; waits at each norm
    knn_every: int = 5               # epochs between online kNN checks on training images; 0 = never
    save_every: float = 10.0         # minutes between checkpoints; 0 = every step. The end is always saved
    minutes: float = 0.0             # save and stop with status 3 after this many minutes; 0 = run to the end
    deterministic: bool = False      # torch's deterministic algorithms: bit-exact repeats on CUDA too
    preview: bool = False            # write OUT/preview.png, a grid of training views, and stop


# May differ between a checkpoint and the run that resumes it. Another device is noted in the log.
FREE_FIELDS = {"data", "out", "workers", "cache", "device", "save_every", "minutes", "preview"}
ALIASES = {"batch": ["-b", "--batch-size"], "data": ["--data-dir"]}


def flag(name: str) -> str:
    """knn_every -> --knn-every."""
    return "--" + name.replace("_", "-")


def parse(config_class: type, doc: str, argv: list[str] | None = None, recipes: dict[str, dict] | None = None,
          by: str = "") -> argparse.Namespace:
    """Command line -> the fields of config_class, and of RunConfig where there are recipes (see resolve).
    A field's trailing comment is its --help text; wrong usage exits."""
    owners = [config_class, RunConfig] if recipes else [config_class]
    defaults = {}
    epilog = show_recipes(recipes) if recipes else ""
    parser = argparse.ArgumentParser(description=doc, epilog=epilog, allow_abbrev=False,
                                     usage="%(prog)s [flags]; --help lists them",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, owner in zip(("flags of this script", "flags of every script"), owners):
        group = parser.add_argument_group(title)
        comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(owner), re.M))
        for name, kind in get_type_hints(owner).items():
            default = defaults[name] = getattr(owner, name)
            shown = f" [{default}]"
            if default is None:  # a script without recipes says it in the comment
                shown = " [recipe]" if recipes else ""
            options = {"default": default, "help": (comments.get(name, "") + shown).replace("%", "%%")}
            if type(None) in get_args(kind):  # int | None -> int
                kind = get_args(kind)[0]
            if kind is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif get_origin(kind) is Literal:
                options["choices"] = get_args(kind)
            else:
                options |= {"type": kind, "metavar": kind.__name__.upper()}
            group.add_argument(flag(name), *ALIASES.get(name, []), **options)
    flags = type("Flags", (argparse.Namespace,), {"defaults": defaults})  # beside the flags, none of them
    cfg = parser.parse_args(argv, flags())
    for name, value in vars(cfg).items():
        least = 2 if name == "batch" else 0
        if isinstance(value, (int, float)) and not least <= value <= 2**53:  # refuses nan too
            parser.error(f"{flag(name)} {value}: want a number from {least} up")
    if recipes:
        resolve(cfg, recipes, by)
    return cfg


def prefers_small(dataset: str, device: str) -> bool:
    """Whether the recipe of itself is the small one: for shapes, and on a CPU for every set that has one."""
    on_cpu = device == "cpu" or device == "auto" and not torch.accelerator.is_available()
    return dataset == "shapes" or on_cpu and DATASETS[dataset].small != ""


def resolve(cfg, recipes: dict[str, dict], by: str) -> None:
    """Fill every field of cfg that is None from its recipe: "cifar" has the values of all, "cifar shapes" and
    "cifar moco" what differs for a set, and for a method, which cfg's field `by` names."""
    size = cfg.size or DATASETS[cfg.dataset].pixels
    if cfg.recipe == "auto":
        small = prefers_small(cfg.dataset, cfg.device)
        cfg.recipe = "small" if small else "cifar" if size <= 64 else "imagenet"
    if cfg.recipe == "small" and not DATASETS[cfg.dataset].small:
        have = ", ".join(name for name, known in DATASETS.items() if known.small)
        raise UsageError(f"--recipe small is for {have}, not for {cfg.dataset}")
    values = {}
    for key in (cfg.recipe, f"{cfg.recipe} {cfg.dataset}", f"{cfg.recipe} {getattr(cfg, by, '')}"):
        values |= recipes.get(key, {})
    if cfg.optimizer not in (None, values["optimizer"]) and cfg.lr is None:  # a rate belongs to its optimizer
        raise UsageError(f"--optimizer {cfg.optimizer}: give --lr too")
    cfg.defaults.update(values)  # what a flag counts as that a checkpoint does not know
    for name, value in vars(cfg).items():
        if value is None and not (cfg.weights and name in ("arch", "stem")):  # which the file has: see Run
            setattr(cfg, name, values[name])
    cfg.view = cfg.view or size


def show_recipes(recipes: dict[str, dict]) -> str:
    """The recipes for --help: a line a flag, a column a recipe; below, what differs by method or set."""
    columns = [key for key in recipes if " " not in key]
    table = [["recipe", *columns]]
    for name in dict.fromkeys(name for key in columns for name in recipes[key]):
        table.append([flag(name), *(str(recipes[key].get(name, "")) for key in columns)])
    lines = ["".join(cell.ljust(16) for cell in line) for line in table]
    for key in [key for key in recipes if key not in columns]:
        lines.append(f"{key}: " + " ".join(f"{flag(name)} {value}" for name, value in recipes[key].items()))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ processes
# Under torchrun every process holds the same weights and a slice of each batch. A loss sees the whole batch
# through gather() and is the same everywhere. Each process has the gradient through its own slice, and their
# sum is the gradient of one process on the whole batch.


def join_processes() -> None:
    """Join the other processes of a torchrun job, which are named in the environment; else do nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))


def rank() -> int:
    """Number of this process in its job, 0 without one. Process 0 is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes in the job, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text: str) -> None:
    """print, from process 0 alone, over a line of progress if there is one."""
    live("")
    if rank() == 0:
        print(text, flush=True)


def live(text: str) -> None:
    """A line of progress that the next one replaces; nothing where no terminal shows it."""
    if rank() == 0 and sys.stdout.isatty():
        print(f"\r\033[K{text}", end="\r", flush=True)


def gather(x: Tensor) -> Tensor:
    """(B / processes, ...) of each process -> (B, ...) in their order; the gradient flows into one's own."""
    if world() == 1:
        return x
    pieces = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(pieces, x.detach().contiguous())
    pieces[rank()] = x
    return torch.cat(pieces)


def sum_gradients(model: nn.Module) -> None:
    """Sum over processes, in one message, so that a restart does not change the order of summation."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for g, total in zip(gradients, flat.split([g.numel() for g in gradients])):
        g.copy_(total.view_as(g))


def broadcast(module: nn.Module) -> None:
    """Process 0's parameters and buffers for all."""
    if world() > 1:
        for value in module.state_dict().values():
            dist.broadcast(value, 0)


def origin() -> dict:
    """What made a log or a row: commit, -dirty where a script differs from it, torch's version, command."""
    git = "git rev-parse --short=12 HEAD && (git diff --quiet HEAD -- '*.py' || echo -dirty)"
    said = subprocess.run(git, shell=True, cwd=pathlib.Path(__file__).absolute().parent, capture_output=True,
                          text=True).stdout  # by a shell, which is no error where git is not
    launcher = [pathlib.Path(sys.executable).name]
    if world() > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world()))  # processes on this node
        launcher = ["torchrun", f"--nnodes={world() // here}", f"--nproc-per-node={here}"]
    command = shlex.join([*launcher, *sys.argv])
    return {"sha": "".join(said.split()) or "unknown", "torch": torch.__version__, "command": command}


# --------------------------------------------------------------------------------------------------- images
# Every set is one uint8 tensor of pixels (N, 3, H, H): drawn, downloaded, or decoded once into a mapped file.


def _box(x, y, half_x, half_y):
    return np.maximum(np.abs(x) - half_x, np.abs(y) - half_y)


# Class -> signed distance to its outline, roughly, negative inside, from the figure's own x, y and radius r.
SHAPES = {
    "disc": lambda x, y, r: r - 0.85,
    "ring": lambda x, y, r: np.abs(r - 0.75) - 0.2,
    "square": lambda x, y, r: _box(x, y, 0.72, 0.72),
    "triangle": lambda x, y, r: np.maximum(-y - 0.5, 0.5 * y + 0.866 * np.abs(x) - 0.5),
    "star": lambda x, y, r: r - (0.62 + 0.36 * np.cos(5 * np.arctan2(y, x))),
    "plus": lambda x, y, r: np.minimum(_box(x, y, 0.95, 0.25), _box(x, y, 0.25, 0.95)),
    "bar": lambda x, y, r: _box(x, y, 0.98, 0.28),
    "half disc": lambda x, y, r: np.maximum(r - 0.95, -y - 0.1),
    "crescent": lambda x, y, r: np.maximum(r - 0.95, 0.7 - np.hypot(x - 0.5, y)),
    "letter L": lambda x, y, r: np.minimum(_box(x + 0.55, y, 0.25, 0.9),
                                           _box(x - 0.05, y - 0.65, 0.85, 0.25)),
}


def draw_shapes(n: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """The embedded set: n images (n, 3, size, size) uint8 and labels (n,), the same for the same seed.

    Figure and ground are shades of almost the same grey, so that only the outline tells images apart after
    crop and jitter: free colours or textures would do so without the shape.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % len(SHAPES))
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    angle, radius = rng.uniform(0, 2 * np.pi, (n, 1, 1)), rng.uniform(0.65, 0.9, (n, 1, 1))
    cx, cy = rng.uniform(-1, 1, (2, n, 1, 1)) * (1 - radius)
    distance = np.empty((n, size, size), np.float32)
    for label, outline in enumerate(SHAPES.values()):
        of = labels == label
        dx, dy = grid[None, None, :] - cx[of], grid[None, :, None] - cy[of]
        x = (np.cos(angle[of]) * dx + np.sin(angle[of]) * dy) / radius[of]  # (m, S, S), the figure's own
        y = (np.cos(angle[of]) * dy - np.sin(angle[of]) * dx) / radius[of]
        distance[of] = outline(x, y, np.hypot(x, y))
    inside = np.clip(0.5 - distance * radius * size / 2, 0, 1)[:, None]     # (n, 1, S, S), antialiased
    ground = rng.uniform(0.25, 0.75, (n, 1, 1, 1))
    contrast = rng.uniform(0.2, 0.35, (n, 1, 1, 1)) * rng.choice([-1, 1], (n, 1, 1, 1))
    tint = rng.uniform(-0.03, 0.03, (n, 3, 1, 1))
    noise = rng.standard_normal((n, 3, size, size), dtype=np.float32) * 0.03
    images = noise + (ground + tint) + contrast * inside
    return torch.from_numpy((np.clip(images, 0, 1) * 255).round().astype(np.uint8)), torch.from_numpy(labels)


Files = list[tuple[str, int]]  # of images, each with its label
IN_MEMORY = 2 << 30  # bytes of pixels that move to the training device; a thread reads a larger set ahead


@dataclass
class ImageSet:
    """The images of one split."""

    pixels: Tensor                  # (M, 3, H, H) uint8, in memory or a mapped file
    labels: Tensor                  # (N,) int64, -1 where there is no class
    classes: list[str]              # their names
    rows: Tensor | None = None      # (N,), where each image stands in pixels; None = in their order
    aspect: Tensor | None = None    # (N,), width / height of photos squashed into H x H; None = all square
    files: list[str] = dataclasses.field(default_factory=list)  # their names below the split's folder

    def __post_init__(self):
        if self.rows is None:
            self.rows = torch.arange(len(self.labels))
        if self.aspect is None:
            self.aspect = torch.ones(len(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> "ImageSet":
        """The images at these positions (M,), in this order; no pixel is copied."""
        index = index.to(self.rows.device)
        files = [self.files[i] for i in index.tolist()] if self.files else []
        return dataclasses.replace(self, labels=self.labels[index], rows=self.rows[index],
                                   aspect=self.aspect[index], files=files)

    def to(self, device: torch.device) -> "ImageSet":
        """On the device where the pixels fit, else as it is."""
        if self.pixels.nbytes > IN_MEMORY:
            return self
        moved = {name: getattr(self, name).to(device) for name in ("pixels", "labels", "rows", "aspect")}
        return dataclasses.replace(self, **moved)

    def batches(self, order: list[Tensor], device: torch.device):
        """This process's part of each index (B,): images (b, 3, H, H) uint8, aspect and index (b,)."""
        near = self.pixels.device.type == device.type and self.pixels.nbytes <= IN_MEMORY

        def read(index: Tensor) -> list[Tensor]:
            share = -(-len(index) // world())  # of each process; the last images may be read by two
            index = index.roll(-rank() * share)[:share].to(self.rows.device)
            parts = [self.pixels[self.rows[index]], self.aspect[index], index]
            if near or device.type != "cuda":
                return parts
            return [x.pin_memory() for x in parts]

        if near:
            yield from map(read, order)
            return
        with ThreadPoolExecutor(1) as thread:
            ahead = [thread.submit(read, index) for index in order[:2]]
            for n in range(len(order)):  # two batches are being read while one is used
                parts = ahead.pop(0).result()
                if n + 2 < len(order):
                    ahead.append(thread.submit(read, order[n + 2]))
                yield [x.to(device, non_blocking=True) for x in parts]


def load_images(dataset: str, data: str, split: str, size: int, cache: str = "cache", workers: int = 0,
                limit: int = 0) -> ImageSet:
    """A set's "train" or "test" images for views of `size`; limit: the first of a fixed shuffle, 0 = all."""
    root = pathlib.Path(data).expanduser().resolve()
    stored = size if size <= 64 else round(size * 8 / 7)  # small images as they are, 256 pixels for 224
    if dataset == "shapes":
        count, seed = {"train": (DATASETS["shapes"].images, 0), "test": (2_000, 1)}[split]
        images = ImageSet(*draw_shapes(count, seed, size=stored), list(SHAPES))
    elif dataset in ("cifar10", "cifar100") and not (root / dataset / split).is_dir():
        images = download_cifar(dataset, root, split, stored)
    else:
        place, files, classes = list_images(dataset, root, split)
        store = pathlib.Path(cache).expanduser() / f"{dataset}-{split}-{stored}px"
        return decoded(place, files, classes, stored, store, workers, limit)
    where = "drawn, no file is read" if dataset == "shapes" else f"below {root}"
    say(f"{split}: {len(images)} images of {dataset}, {where}")
    if limit and limit < len(images):
        images = images.subset(torch.randperm(len(images), generator=seeded(0))[:limit])
    return images


def download_cifar(dataset: str, root: pathlib.Path, split: str, size: int) -> ImageSet:
    """CIFAR through torchvision, which checks the published digests before it unpickles anything."""
    load = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
    try:
        try:
            loaded = load(str(root), split == "train")
        except RuntimeError:  # not there, or not whole
            root.mkdir(parents=True, exist_ok=True)
            with contextlib.redirect_stdout(sys.stderr), open(root / ".lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # one process downloads, the others then find it there
                loaded = load(str(root), split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise RunError(f"no {dataset} in {root}, and the download failed ({error}). Either copy a downloaded "
                       f"folder there, or lay the images out as {root / dataset}/{{train,test}}/<class>/"
                       f"*.png and pass --data {root}") from None
    pixels = torch.from_numpy(loaded.data).permute(0, 3, 1, 2).contiguous()
    if size != pixels.shape[-1]:
        pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    return ImageSet(pixels, torch.tensor(loaded.targets), loaded.classes)


EXTENSIONS = (*datasets.folder.IMG_EXTENSIONS, ".gif", ".jfif", ".jpe", ".avif", ".jp2")
SPLITS = {"train": ("train", "training"), "test": ("val", "valid", "validation", "test", "testing")}


def hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's."""
    return name.startswith(".") or name == "__MACOSX"


def folders_in(root: pathlib.Path) -> list[pathlib.Path]:
    """The folders right below, by name, but hidden ones."""
    return [path for path in sorted(root.glob("*")) if path.is_dir() and not hidden(path.name)]


def list_images(dataset: str, root: pathlib.Path, split: str) -> tuple[pathlib.Path, Files, list[str]]:
    """The folder of a split that lies on disk, its files with their labels, and the names of its classes.
    Says what was taken and what was not. Validation goes before test."""
    names, own = SPLITS[split], dataset == "folder"  # your own may have these names in any case
    if not own:
        names = [split] if split == "train" or dataset.startswith("cifar") else ["val", "test"]
    if not root.is_dir():
        raise UsageError(f"--data {root}: no such folder")
    places, roots = [], list(dict.fromkeys((root / DATASETS[dataset].folder, root)))
    for folder in roots:
        below = {path.name.lower() if own else path.name: path for path in folders_in(folder)}
        places += [below[name] for name in names if name in below]
    unread = places[1:]
    if own and {*SPLITS["train"]} & {*below}:
        unread += [path for name, path in below.items() if name not in SPLITS["train"] + SPLITS["test"]]
    elif own and split == "train":  # DIR itself, but for what a probe is tested on
        places, unread = [root], [path for name, path in below.items() if name in SPLITS["test"]]
    if not places:
        raise UsageError(f"no {split} images for {dataset}: no folder {' or '.join(names)} in "
                         f"{' or '.join(map(str, roots))}; see --data")
    place = places[0]
    annotated = (place / "val_annotations.txt").is_file()
    if annotated and folders_in(place / "images"):  # sorted by class there, as many scripts do
        place = place / "images"
    if annotated and any((place / "images").glob("*.JPEG")):
        files, classes, note = list_tiny_imagenet_val(place)
    else:
        files, classes, note = list_tree(place, IMAGENET100 if dataset == "imagenet100" else None, unread)
    named = f" in {len(classes)} classes ({', '.join(classes[:5])}{', ...' * (len(classes) > 5)})"
    note += [f"not read: {', '.join(map(str, unread))}"] if unread else []
    taken = f"{len(files)} images{named if classes else ' without classes'} below {place}"
    say("; ".join([f"{split}: {taken}", *note]))
    return place, files, classes


def list_tree(root: pathlib.Path, only: list[str] | None = None,
              unread: Iterable[pathlib.Path] = ()) -> tuple[Files, list[str], list[str]]:
    """root/<class>/.../*.jpg and the like, but hidden ones; without class folders one unlabelled set (-1).
    A folder without images is no class, nor is one that is not to be read. Third: what was left out, in
    words.
    """
    found, loose, passed = {}, [], collections.Counter()
    for folder, _, names in sorted(os.walk(root, followlinks=True)):
        parts = pathlib.Path(folder).relative_to(root).parts
        if parts and root / parts[0] in unread:
            continue
        for name in sorted(names):
            if any(map(hidden, (*parts, name))):
                continue
            if name.lower().endswith(EXTENSIONS):
                group = found.setdefault(parts[0], []) if parts else loose
                group.append(os.path.join(folder, name))
            else:
                passed[os.path.splitext(name)[1].lower() or "without extension"] += 1
    classes = sorted(only or found)
    missing = sorted({*classes} - {*found})
    if missing:
        raise UsageError(f"{root} lacks {len(missing)} of {len(classes)} classes ({missing[0]}, ...)")
    files = [(file, label) for label, name in enumerate(classes) for file in found[name]]
    note = [f"not read: {len(loose)} images in {root} itself"] if loose and classes else []
    if passed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in passed.most_common(5))
        note += [f"passed over {passed.total()} files: {kinds}"]
    files = files or [(file, -1) for file in loose]
    if not files:
        wanted = f"{root} holds no images: want {root}/<class>/*.jpg (or .png, ...)"
        raise RunError("; ".join([wanted, *note, *(f"not read: {path}" for path in unread)]))
    return files, classes, note


def list_tiny_imagenet_val(root: pathlib.Path) -> tuple[Files, list[str], list[str]]:
    """images/*.JPEG with val_annotations.txt (file, wnid, box): the published layout, no file moved."""
    annotations = root / "val_annotations.txt"
    _, classes, _ = list_tree(root.parent / "train")
    files = []
    for name, wnid in re.findall(r"^(\S+)\t(\w+)", annotations.read_text(errors="replace"), re.M):
        if wnid in classes and (root / "images" / name).exists():
            files.append((str(root / "images" / name), classes.index(wnid)))
    if not files:
        raise RunError(f"{root / 'images'} holds no image that {annotations} gives a class of {root.parent}")
    return files, classes, []


def stretch(values: np.ndarray) -> np.ndarray:
    """Grey values of any type -> uint8: from their 0.1st to their 99.9th percentile, larger is lighter. NaN
    is the smallest. ValueError where none is finite."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        raise ValueError("no finite value")
    low, high = np.percentile(finite, (0.1, 99.9))
    if low == high:
        low, high = finite.min(), finite.max()
    if low == high:
        return np.full(values.shape, 128, np.uint8)
    numbers = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    return ((numbers - low) / (high - low) * 255).clip(0, 255).round().astype(np.uint8)


# (bits, white is zero, kind of number) of grey TIFFs that Pillow reads as other numbers without a word.
MISREAD = {(16, True, 1): "16 bits, white is zero", (8, False, 2): "signed 8 bits",
           (32, False, 1): "unsigned 32 bits"}


def decode(path: str, size: int) -> tuple[np.ndarray, float, bool]:
    """An image file as RGB, squashed to a square: (3, size, size) uint8, the photo's width / height, and
    whether it was grey of more than 8 bits, which is stretched to its own range. What is transparent is laid
    over white; of a stack the first page is read."""
    with Image.open(path) as image:
        if image.format == "TIFF":  # tags: bits, what zero is, kind of number
            bits, kind = (image.tag_v2.get(tag, (1,))[0] for tag in (258, 339))
            misread = MISREAD.get((bits, image.tag_v2.get(262) == 0, kind))
            if misread and len(image.getbands()) == 1:
                raise ValueError(f"TIFF of {misread}; convert it to unsigned 8 or 16 bits, black is zero")
        image.draft(None, (size, size))  # a JPEG of twice the pixels or more is decoded at a part of them
        image = ImageOps.exif_transpose(image)
        deep = image.mode.startswith("I") or image.mode == "F"
        if deep:
            image = Image.fromarray(stretch(np.asarray(image)))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    aspect = image.width / image.height
    image = image.resize((size, size), Image.Resampling.BILINEAR)  # antialiased, as torchvision's
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)), aspect, deep


def decoded(place: pathlib.Path, files: Files, classes: list[str], size: int, path: pathlib.Path,
            workers: int = 0, limit: int = 0) -> ImageSet:
    """The files as pixels, mapped from path-<digest>.npy, which is made once and shared by all runs; limit:
    the first of a fixed shuffle, out of the whole set's map where that is there.

    Beside it a file of aspects, 0 = does not decode, negative = of more than 8 bits. The digest is of the
    files' names; a map that is older than its newest file is made again.
    """
    order = torch.arange(len(files))
    store = path.with_name(f"{path.name}-{digest_of(dict(files))}.npy")
    if limit and limit < len(files):
        order = torch.randperm(len(files), generator=seeded(0))[:limit]
    chosen = [files[i] for i in order.tolist()]
    if len(chosen) < len(files) and not store.exists():
        files, order = chosen, torch.arange(limit)
        store = path.with_name(f"{path.name}-first-{limit}-{digest_of(dict(files))}.npy")
    store.parent.mkdir(parents=True, exist_ok=True)
    newest = max(0, max(modified(file) for file, _ in files))  # of 100,000 files: a third of a second
    if modified(store) < newest:
        with open(store.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second run waits here until the first has made the map
            if modified(store) < newest:
                write_map([file for file, _ in files], size, store, workers)
                os.utime(store, (max(newest, time.time()),) * 2)  # a file's time may lie ahead
    try:
        pixels = torch.from_numpy(np.load(store, mmap_mode="c"))                    # (N, 3, size, size)
        aspect = torch.from_numpy(np.load(store.with_suffix(".aspect.npy")))        # (N,)
        decodes, deep = aspect[order] != 0, (aspect[order] < 0).sum().item()
    except (OSError, ValueError, IndexError) as error:
        raise RunError(f"{store} is not as it was written ({error}); remove it") from None
    if deep:
        say(f"{deep} images of more than 8 bits, each stretched to its own range")
    if not decodes.all():
        say(f"left out {(~decodes).sum()} of {len(chosen)} images that do not decode")
    rows, labels = order[decodes], torch.tensor([label for _, label in chosen])[decodes]
    names = [chosen[i][0].removeprefix(f"{place}{os.sep}") for i in decodes.nonzero()[:, 0].tolist()]
    return ImageSet(pixels, labels, classes, rows, aspect[rows].abs(), names)


def modified(file: str | pathlib.Path) -> float:
    """When a file was last written, -inf for one that is not there, as behind a broken link."""
    try:
        return os.stat(file).st_mtime
    except OSError:
        return -math.inf


def digest_of(names: Iterable[str]) -> str:
    """Twelve hexadecimal digits that depend on the names and their order."""
    return hashlib.sha256(b"\n".join(map(os.fsencode, names))).hexdigest()[:12]


def write_map(files: list[str], size: int, store: pathlib.Path, workers: int) -> None:
    """Decode every file into its row of store. Where more than five do not decode and more than 1 %, or none
    does, RunError, nothing written."""
    shape = len(files), 3, size, size
    total = math.prod(shape) / 1e9
    aspects, bad, began = [], [], time.monotonic()

    def read(path: str) -> tuple[np.ndarray, float, bool]:
        try:
            return decode(path, size)
        except Exception as error:  # Pillow raises many kinds for a broken file; each is reported by name
            bad.append(f"{path} ({str(error) or type(error).__name__})")
            return np.zeros((3, size, size), np.uint8), 0.0, False

    with replacing(store) as file, ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        free = shutil.disk_usage(store.parent).free / 1e9
        if total > free:
            raise RunError(f"{len(files)} decoded images take {total:.2f} GB, and {store.parent} has "
                           f"{free:.2f} GB left; --cache DIR may be on another disk, --limit N takes fewer")
        why = "anew, as files are newer," if store.exists() else "once"
        print(f"decoding {len(files)} images {why} into {total:.2f} GB: {store}", flush=True)
        # Written, not mapped: on a full disk a write is an error with a name, a mapped page's touch SIGBUS.
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for first in range(0, len(files), 1000):
            for pixels, aspect, stretched in pool.map(read, files[first:first + 1000]):
                file.write(pixels)
                aspects.append(-aspect if stretched else aspect)
            done, rate = len(aspects), len(aspects) / (time.monotonic() - began)
            left = timedelta(seconds=round((len(files) - done) / rate))
            show = say if done % 20_000 == 0 or done == len(files) else live
            show(f"{done}/{len(files)} images, {rate:.0f}/s, {left} left")
            if len(bad) > max(5, 0.01 * len(files)) or len(bad) == len(files):
                raise RunError(f"{len(bad)} of {len(files)} images do not decode, want RGB or grey that "
                               f"Pillow reads: {'; '.join(bad[:20])}")
        with replacing(store.with_suffix(".aspect.npy")) as beside:  # the pixels take their name after it
            np.save(beside, np.array(aspects, np.float32))
    if bad:
        print(f"not decodable, {len(bad)} of {len(files)} images: {'; '.join(bad)}", file=sys.stderr)


# Tian et al. 2020, "Contrastive Multiview Coding", imagenet100.txt of the official code
IMAGENET100 = """
n02869837 n01749939 n02488291 n02107142 n13037406 n02091831 n04517823 n04589890 n03062245 n01773797 n01735189
n07831146 n07753275 n03085013 n04485082 n02105505 n01983481 n02788148 n03530642 n04435653 n02086910 n02859443
n13040303 n03594734 n02085620 n02099849 n01558993 n04493381 n02109047 n04111531 n02877765 n04429376 n02009229
n01978455 n02106550 n01820546 n01692333 n07714571 n02974003 n02114855 n03785016 n03764736 n03775546 n02087046
n07836838 n04099969 n04592741 n03891251 n02701002 n03379051 n02259212 n07715103 n03947888 n04026417 n02326432
n03637318 n01980166 n02113799 n02086240 n03903868 n02483362 n04127249 n02089973 n03017168 n02093428 n02804414
n02396427 n04418357 n02172182 n01729322 n02113978 n03787032 n02089867 n02119022 n03777754 n04238763 n02231487
n03032252 n02138441 n02104029 n03837869 n03494278 n04136333 n03794056 n03492542 n02018207 n04067472 n03930630
n03584829 n02123045 n04229816 n02100583 n03642806 n04336792 n03259280 n02116738 n02108089 n03424325 n01855672
n02090622
""".split()

# --------------------------------------------------------------------------------------------- augmentation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for all sets


def crop_weights(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """Matrices (B, size, source) that cut [start, start + length) out of `source` pixels and resize it.

    Bilinear with antialiasing, as torchvision's resize: a triangle of half-width max(length / size, 1) source
    pixels around each target pixel's centre, cut at the crop's edge and normalised.
    """
    start, scale = start[:, None, None], (length / size)[:, None, None]             # (B, 1, 1)
    target = torch.arange(0.5, size, device=start.device)[:, None]                  # (S, 1)
    place = torch.arange(0.5, source, device=start.device) - start                  # (B, 1, H) in the crop
    weights = (1 - (place - target * scale).abs() / scale.clamp(min=1)).clamp(min=0)    # (B, S, H)
    weights = weights * ((place > 0) & (place < size * scale))
    return weights / weights.sum(-1, keepdim=True)


def resized_crop(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor,
                 size: int) -> Tensor:
    """Crop boxes (B,) in pixels, resize to size x size, mirror where flip: two matmuls on (B, 3, H, W)."""
    rows = crop_weights(top, height, images.shape[2], size)                         # (B, S, H)
    columns = crop_weights(left, width, images.shape[3], size)                      # (B, S, W)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return rows[:, None] @ images @ columns[:, None].mT


def adjust(x: Tensor, what: int, strength: Tensor) -> Tensor:
    """torchvision's brightness, contrast, saturation (0 to 2) by 1 + strength (B, 1, 1, 1), hue (3) by it."""
    if what == 3:
        return hue(x, strength)
    base = 0.0 if what == 0 else rgb_to_grayscale(x)
    base = base.mean((2, 3), keepdim=True) if what == 1 else base
    return (x + strength * (x - base)).clamp(0, 1)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by shift (B, 1, 1, 1) of a full circle, in [-0.5, 0.5], through HSV without branches."""
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)                                        # (B, 1, H, W)
    r, g, b = x.split(1, 1)
    sector = torch.where(value == r, g - b, torch.where(value == g, b - r, r - g)) / chroma.clamp(min=1e-12)
    sector = sector + torch.where(value == r, 0.0, torch.where(value == g, 2.0, 4.0)) + 6 * shift
    k = (sector + torch.arange(5, 0, -2, device=x.device)[:, None, None]) % 6       # (B, 3, H, W)
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def blur_basis(radius: int, size: int) -> Tensor:
    """(2 radius + 1, size^2): the source pixel of each target pixel at each offset, mirrored at edges."""
    offset = torch.arange(-radius, radius + 1)[:, None]
    source = (torch.arange(size) + offset).abs()                                    # (K, S)
    source = torch.where(source >= size, 2 * (size - 1) - source, source)
    return F.one_hot(source, size).float().flatten(1)


def gaussian_blur(x: Tensor, sigma: Tensor, on: Tensor, basis: Tensor) -> Tensor:
    """Gaussian of sigma (B, 1) pixels where on (B, 1), one matmul for rows and one for columns."""
    offset = torch.arange(len(basis), device=x.device) - len(basis) // 2            # (K,)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)                                # (B, K)
    kernel = torch.where(on, kernel / kernel.sum(1, keepdim=True), (offset == 0).float())
    band = (kernel @ basis).unflatten(1, (x.shape[2], x.shape[3]))[:, None]         # (B, 1, S, S)
    return band @ x @ band.transpose(2, 3)


# Uniform numbers per sample, in this order: of the ten proposed boxes area and ratio, then place and flip,
# whether there is jitter and its four strengths, gray, blur and its sigma, solarize.
COLUMNS = {"area": 10, "ratio": 10, "top": 1, "left": 1, "flip": 1, "jitter": 1, "strength": 4, "gray": 1,
           "blur": 1, "sigma": 1, "solarize": 1}
UNIFORMS = sum(COLUMNS.values())


def named_columns(uniforms: Tensor) -> dict[str, Tensor]:
    """(B, UNIFORMS) -> name -> (B, number of columns)."""
    return dict(zip(COLUMNS, uniforms.split([*COLUMNS.values()], 1)))


class BatchAugment(nn.Module):
    """The augmentation of a whole batch on its own device, each sample with its own parameters, in float32.

    size: pixels of a view. scale: share of the area that a crop keeps. jitter: strengths of brightness,
    contrast, saturation and hue, in an order drawn once per call. flip and *_p: probabilities per sample.
    Defaults: MoCo v2's crops, SimCLR's colours at strength 0.5 (Chen et al. 2020, B.9).
    The blur's kernel is a tenth of the view.
    """

    def __init__(self, size: int, scale: tuple = (0.2, 1.0), flip: float = 0.5,
                 jitter: tuple = (0.4, 0.4, 0.4, 0.1), jitter_p: float = 0.8, gray_p: float = 0.2,
                 blur_p: float = 0.0, blur_sigma: tuple = (0.1, 2.0), solarize_p: float = 0.0):
        super().__init__()
        self.size, self.scale, self.flip, self.jitter, self.jitter_p = size, scale, flip, jitter, jitter_p
        self.gray_p, self.blur_p, self.blur_sigma, self.solarize_p = gray_p, blur_p, blur_sigma, solarize_p
        for name, values in (("mean", MEAN), ("std", STD), ("strengths", jitter)):  # no copies in a step
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)
        self.register_buffer("basis", blur_basis(max(1, size // 20), size), persistent=False)

    def forward(self, images: Tensor, generator: torch.Generator | None = None, aspect: Tensor | None = None,
                views: int = 1) -> Tensor:
        """images (B, 3, H, W), uint8 or in [0, 1] -> (views * B, 3, size, size) normalised, view by view.

        aspect (B,): width / height of photos squashed into H x W, None = as they are. generator: on the CPU,
        so that every device gets the same numbers; processes take their parts of one process's numbers.
        """
        uniforms = torch.rand(views, world(), len(images), UNIFORMS, generator=generator)
        uniforms = uniforms[:, rank()].flatten(0, 1)                                # (views * B, UNIFORMS)
        order = torch.randperm(4, generator=generator).tolist()
        if images.is_cuda:
            uniforms = uniforms.pin_memory()  # from pageable memory the copy would wait for the device
        uniforms = uniforms.to(images.device, non_blocking=True)
        aspect = None if aspect is None else aspect.repeat(views)
        return self.augment_with(images.repeat(views, 1, 1, 1), uniforms, order, aspect)

    def boxes(self, uniforms: Tensor, height: int, width: int, aspect: Tensor | None = None):
        """RandomResizedCrop.get_params, vectorised: uniforms -> top, left, height, width (B,), whole pixels.

        The first of ten proposals that fits is taken; where none does, the largest box within the ratios, at
        a random place (torchvision's is at the centre, so that most of a panorama is never seen). A ratio is
        of the photo: in pixels squashed by aspect it is divided by it.
        """
        u = named_columns(uniforms)
        squash = torch.ones_like(u["top"]) if aspect is None else aspect[:, None]   # (B, 1)
        area = height * width * (self.scale[0] + u["area"] * (self.scale[1] - self.scale[0]))
        ratio = torch.exp(math.log(3 / 4) + u["ratio"] * math.log(16 / 9)) / squash
        w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()         # (B, 10)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = fits.to(torch.uint8).argmax(1, keepdim=True)
        found = fits.gather(1, first)                                               # (B, 1)
        w = torch.where(found, w.gather(1, first), (height * 4 / 3 / squash).round().clamp(1, width))
        h = torch.where(found, h.gather(1, first), (width * 4 / 3 * squash).round().clamp(1, height))
        top, left = (u["top"] * (height - h + 1)).floor(), (u["left"] * (width - w + 1)).floor()
        return top[:, 0], left[:, 0], h[:, 0], w[:, 0]

    def augment_with(self, images: Tensor, uniforms: Tensor, order: list[int], aspect: Tensor | None = None):
        """The deterministic part, from uniforms (B, UNIFORMS) in [0, 1) and the order of the colour steps."""
        u = named_columns(uniforms)
        with torch.autocast(images.device.type, enabled=False):
            x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
            boxes = self.boxes(uniforms, *x.shape[2:], aspect)
            x = resized_crop(x, *boxes, u["flip"][:, 0] < self.flip, self.size)
            strength = (2 * u["strength"] - 1) * self.strengths * (u["jitter"] < self.jitter_p)     # (B, 4)
            for i in order:
                if self.jitter[i]:
                    x = adjust(x, i, strength[:, i, None, None, None])
            if self.gray_p:
                x = torch.where((u["gray"] < self.gray_p)[:, :, None, None], rgb_to_grayscale(x), x)
            if self.blur_p:
                sigma = self.blur_sigma[0] + u["sigma"] * (self.blur_sigma[1] - self.blur_sigma[0])
                x = gaussian_blur(x, sigma, u["blur"] < self.blur_p, self.basis)
            if self.solarize_p:
                solarized = (u["solarize"] < self.solarize_p)[:, :, None, None] & (x >= 0.5)
                x = torch.where(solarized, 1 - x, x)
            return (x - self.mean[:, None, None]) / self.std[:, None, None]


def center_view(images: Tensor, size: int, aspect: Tensor) -> Tensor:
    """Evaluation input: the centre of (B, 3, H, H) uint8 at size x size, normalised like BatchAugment's:
    size / H of a photo's shorter side, as torchvision's resize and centre crop."""
    height, width = size * aspect.clamp(2 / size, 1), size / aspect.clamp(1, size / 2)  # (B,), squashed
    top, left = (images.shape[2] - height) / 2, (images.shape[3] - width) / 2
    with torch.autocast(images.device.type, enabled=False):
        x = resized_crop(images.float() / 255, top, left, height, width, torch.zeros_like(top) > 0, size)
    return (x - x.new_tensor(MEAN)[:, None, None]) / x.new_tensor(STD)[:, None, None]


def save_grid(path: pathlib.Path, views: Tensor, columns: int) -> None:
    """A PNG of normalised images (N, 3, S, S), `columns` to a row."""
    if rank() == 0:
        x = views.float().cpu() * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        x = F.interpolate(x.clamp(0, 1), scale_factor=max(1, 64 // x.shape[-1]))  # so that a person sees it
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(x, path, nrow=columns)
        print(f"wrote {path}")


# --------------------------------------------------------------------------------------- backbone, features


# torch's convolution on a CPU, oneDNN's, reads all weights once an image: where they are large and images
# have few pixels it waits for memory. There one matmul for each pixel of the result is several times as fast.


@functools.cache
def conv_terms(x_shape: torch.Size, weight_shape: torch.Size, stride: int, padding: int) -> list[dict]:
    """The (output, tap, input) whose products make a convolution, as dicts from each output, each tap and
    each input to its own. Positions count row by row; what a tap sees of the padding is no term."""
    height, width, kernel = *x_shape[2:], weight_shape[2]
    outputs = [(size + 2 * padding - kernel) // stride + 1 for size in (height, width)]
    groups = [{}, {}, {}]
    for y, x, v, u in np.ndindex(*outputs, kernel, kernel):
        i, j = y * stride + v - padding, x * stride + u - padding
        if 0 <= i < height and 0 <= j < width:
            term = y * outputs[1] + x, v * kernel + u, i * width + j
            for group, position in zip(groups, term):
                group.setdefault(position, []).append(term)
    return groups


def positions(x: Tensor) -> Tensor:
    """(B, C, H, W), channels last -> (H W, B, C), a view; a weight (D, C, K, K) -> (K K, D, C)."""
    return x.permute(2, 3, 0, 1).view(-1, *x.shape[:2])


class MatmulConv(torch.autograd.Function):
    """A convolution of x (B, C, H, W) with weight (D, C, K, K), channels last, without bias.

    The gradient into the weight is a loop over the kernel's taps, one matmul each. The result and the
    gradient into x are the library's, or, where all_parts is set, such loops too: over the pixels of the
    result, and over those of x. A matmul has the terms of its tap or pixel side by side (conv_terms).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int, padding: int, all_parts: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = stride, padding, all_parts
        if not all_parts:
            return F.conv2d(x, weight, None, stride, padding)
        height, width = ((size + 2 * padding - weight.shape[2]) // stride + 1 for size in x.shape[2:])
        y = x.new_empty(len(x), len(weight), height, width).to(memory_format=torch.channels_last)
        xs, weights, ys = positions(x), positions(weight), positions(y)
        for output, terms in conv_terms(x.shape, weight.shape, stride, padding)[0].items():
            inputs = torch.cat([xs[i] for _, _, i in terms], 1)                     # (B, C a term)
            ys[output] = inputs @ torch.cat([weights[t] for _, t, _ in terms], 1).T
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, weight), (stride, padding, all_parts) = ctx.saved_tensors, ctx.options
        grad = grad.contiguous(memory_format=torch.channels_last)
        xs, weights, grads = positions(x), positions(weight), positions(grad)
        _, of_taps, of_inputs = conv_terms(x.shape, weight.shape, stride, padding)
        x_grad, weight_grad = None, torch.zeros_like(weight)
        if ctx.needs_input_grad[0] and all_parts:
            x_grad = torch.zeros_like(x)
            for i, terms in of_inputs.items():
                outputs = torch.cat([grads[o] for o, _, _ in terms], 1)             # (B, D a term)
                positions(x_grad)[i] = outputs @ torch.cat([weights[t] for _, t, _ in terms])
        elif ctx.needs_input_grad[0]:
            x_grad = torch.nn.grad.conv2d_input(x.shape, weight, grad, stride, padding)
        for t, terms in of_taps.items():
            outputs = torch.cat([grads[o] for o, _, _ in terms])                    # (B a term, D)
            positions(weight_grad)[t] = outputs.T @ torch.cat([xs[i] for _, _, i in terms])
        return x_grad, weight_grad, None, None, None


class Conv2d(nn.Conv2d):
    """nn.Conv2d without bias; on a CPU by MatmulConv where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        side = (max(x.shape[2:]) + 2 * self.padding[0] - self.kernel_size[0]) // self.stride[0] + 1
        # The rule that results/bench/convs.jsonl tells: 256 views, one core of a Xeon with AMX or an EPYC
        # without. In float32 the Xeon alone would gain by more.
        weight_alone = side <= 4 and dtype == torch.bfloat16
        all_parts = side <= 2 or weight_alone and self.weight.numel() > 2**20
        if not (x.is_cpu and (all_parts or weight_alone)):
            return super().forward(x)
        x, weight = (t.to(dtype, memory_format=torch.channels_last) for t in (x, self.weight))
        return MatmulConv.apply(x, weight, self.stride[0], self.padding[0], all_parts)


def resnet(arch: str, stem: str) -> nn.Module:
    """torchvision's ResNet without classifier: (B, 3, H, W) -> (B, dim) average-pooled features, with .dim.

    arch: resnet10 (one basic block a stage), resnet18, resnet34, resnet50. stem: "imagenet" (7x7 stride 2,
    max-pool) or "cifar" (3x3 stride 1, no pool; He et al. 2016, 4.2). Keys: torchvision's, without fc.
    """
    block, layers = {"resnet10": (BasicBlock, [1, 1, 1, 1]), "resnet18": (BasicBlock, [2, 2, 2, 2]),
                     "resnet34": (BasicBlock, [3, 4, 6, 3]), "resnet50": (Bottleneck, [3, 4, 6, 3])}[arch]
    model = ResNet(block, layers)
    model.dim = model.fc.in_features
    model.fc = nn.Identity()
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Conv2d  # weights, keys and initial values stay as they are
    return model


def pick_stem(stem: str, size: int) -> str:
    """ "auto" -> the CIFAR stem up to 64 pixels, ImageNet's above."""
    return ("cifar" if size <= 64 else "imagenet") if stem == "auto" else stem


@torch.no_grad()
def features(encoder: nn.Module, images: ImageSet, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Frozen features (N, dim) float32 of an ImageSet's centre views in eval mode, and their labels (N,)."""
    mode = encoder.training
    encoder.eval()
    order, rows = torch.arange(len(images)).split(500), []
    for index, (x, aspect, _) in zip(order, images.batches(order, device)):
        x = center_view(x, size, aspect).contiguous(memory_format=torch.channels_last)
        rows.append(gather(encoder(x).float())[:len(index)])
        live(f"features of {index[-1] + 1}/{len(images)} images")
    encoder.train(mode)
    return torch.cat(rows), images.labels.to(device)


@torch.no_grad()
def knn(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor,
        k: int = 200, temperature: float = 0.1) -> float:
    """Weighted kNN by cosine (Wu et al. 2018, 3.4): the k nearest, or all of fewer, vote with
    exp(cos / temperature), at temperature inf with 1 each; of equal classes the lowest is taken, as
    scikit-learn does. Features (N, D) and (M, D) of any scale -> top-1 in percent."""
    train = F.normalize(train_features.float(), dim=1)
    classes, right = int(train_labels.max()) + 1, 0
    for rows, labels in zip(test_features.split(1000), test_labels.split(1000)):
        cosines = F.normalize(rows.float(), dim=1) @ train.T                        # (m, N)
        similarity, index = cosines.topk(min(k, len(train)), dim=1)                 # (m, k)
        votes = torch.zeros(len(rows), classes, device=rows.device)
        votes.scatter_add_(1, train_labels[index], (similarity / temperature).exp())
        right += (votes.argmax(1) == labels).sum().item()
    return 100 * right / len(test_features)


def spectrum(x: Tensor) -> dict[str, float]:
    """Two signs of collapse in features (N, D): feature_std, standard deviation of unit rows times sqrt(D)
    (1 = spread evenly, 0 = one point; Chen & He 2021, fig. 2), and effective_rank, exp of the entropy of the
    normalised singular values (Roy & Vetterli 2007)."""
    unit = F.normalize(x.float(), dim=1)
    singular = torch.linalg.svdvals(unit - unit.mean(0))
    p = singular / singular.sum().clamp(min=1e-12)
    return {"feature_std": round(unit.std(0, correction=0).mean().item() * unit.shape[1] ** 0.5, 6),
            "effective_rank": round(torch.special.entr(p).sum().exp().item(), 6)}


# ------------------------------------------------------------------------------------ precision, optimisers


def pick_device(name: str) -> torch.device:
    """ "auto" -> the accelerator that torch finds, else the CPU; UsageError for one that is not there."""
    if name == "auto":
        name = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    if name.startswith("cuda:") and world() > 1:
        raise UsageError(f"--device {name}: under torchrun each process takes its own; want --device cuda")
    try:
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(name)
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from None


@functools.cache
def cpu_info(pattern: str) -> str:
    """What the pattern finds in /proc/cpuinfo, or an empty text."""
    info = pathlib.Path("/proc/cpuinfo")
    found = re.search(pattern, info.read_text()) if info.exists() else None
    return found[1] if found else ""


def device_name(device: torch.device) -> str:
    """What a result row calls the hardware: the GPU's name, or the CPU's with the threads that were used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = cpu_info(r"model name\s*: (.*)") if device.type == "cpu" else device.type
    return f"{model or 'CPU'}, {torch.get_num_threads()} threads"


def pick_dtype(amp: str, device: torch.device) -> torch.dtype:
    """The autocast type; float32 means none."""
    if amp == "fp16" and device.type != "cuda":
        raise UsageError(f"--amp fp16 needs a CUDA device, not {device.type}")
    if amp == "auto":
        native = device.type == "cpu" and cpu_info(r"\b((avx512_|amx_)?bf16)\b")
        if device.type == "cuda":
            native = torch.cuda.get_device_capability(device) >= (8, 0)
        amp = "bf16" if native else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled per tensor (You et al. 2017), as solo-learn has it.

    The local rate eta |w| / (|g| + wd |w|) is clipped at the global one.
    Biases, norms and gates get neither decay nor scaling.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=0.9, eta=0.02))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    wd, norm = group["weight_decay"], p.norm()
                    local = group["eta"] * norm / (update.norm() + wd * norm) / group["lr"]
                    update = update.add(p, alpha=wd) * torch.where(local > 0, local, 1.0).clamp(max=1)
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(update)
                p.add_(buffer, alpha=-group["lr"])


def make_optimizer(name: str, model: nn.Module, lr: float, wd: float, fused: bool):
    """sgd decays all but scalars, as the official CIFAR code does; adamw and lars spare biases and norms."""
    params = [p for p in model.parameters() if p.requires_grad]
    if name == "lars":
        return LARS(params, lr, weight_decay=wd)
    least = 1 if name == "sgd" else 2
    groups = [{"params": [p for p in params if p.ndim >= least], "weight_decay": wd},
              {"params": [p for p in params if p.ndim < least], "weight_decay": 0.0}]
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=0.9, fused=fused)
    return torch.optim.AdamW(groups, lr, fused=fused)


def cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the base rate at a step: linear to 1 over the warm-up, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ------------------------------------------------------------------------------------------------------ run


@contextlib.contextmanager
def replacing(path: pathlib.Path, keep: bool = False):
    """A file for writing that takes path's place when it is whole; keep: the old one stays as .previous.
    RunError where it cannot be written, which says what stands there then."""
    new, stands = path.with_name(path.name + ".tmp"), "what stood there is untouched"
    try:
        with open(new, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, path.with_suffix(".previous"))
            stands = f"what stood there is {path.with_suffix('.previous')}"
        os.replace(new, path)
        stands = "the new file stands there"
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the renames too, so that they survive a power cut
        os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__ or error
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise RunError(f"could not write {path} ({reason}); {stands}") from None
    finally:
        new.unlink(missing_ok=True)


def read_checkpoint(path: pathlib.Path, verify: bool = True) -> dict:
    """What torch.save wrote, of tensors, plain values and argparse.Namespace; tensors stay on the disk until
    copied. RunError where a checksum does not fit (if verify, which reads all of the file), or for anything
    else in it, which is never unpickled."""
    try:
        zipped = zipfile.is_zipfile(path)  # torch before 1.6 wrote another format, without checksums
        if zipped and verify:
            with zipfile.ZipFile(path) as container:
                if container.testzip() is not None:
                    raise zipfile.BadZipFile("a checksum does not fit")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # zipfile and torch raise many kinds for damaged bytes
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        reason = str(error) or type(error).__name__
        if foreign:
            reason = f"it holds a {foreign[1]}; want a state dict, of tensors alone"
        reason = reason.splitlines()[0]
        raise RunError(f"{path} is damaged, or no checkpoint that can be read safely: {reason}") from None


def read_log(path: pathlib.Path) -> list[dict]:
    """The lines of a run's log.jsonl, header first. UsageError where the file is something else."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if {"method", "config"} <= lines[0].keys():
            return lines
    except (ValueError, LookupError, AttributeError):
        pass
    raise UsageError(f"{path} is not the log of a pretraining")


def key_seed(*key: int | str) -> int:
    """A number that depends on the numbers and names of its key and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def seeded(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that starts from its key."""
    return torch.Generator(device).manual_seed(key_seed(*key))


class Run:
    """One pretraining run: its data, device, precision, schedule, log and checkpoint. A training loop reads

        run = Run(cfg, "method", "variant")
        encoder = run.new_encoder(); ...build the model around it...; run.start(model, encoder)
        for images, aspect, index in run.batches():     # uint8 (B, 3, H, H), (B,), positions (B,)
            views = augment(images, run.generator(), aspect)
            if cfg.preview: return save_grid(run.out / "preview.png", views, 8)
            with run.autocast(): loss = ...
            run.optimise(loss)                          # backward, sum over processes, optimizer
            run.log(loss=loss)

    Between two steps batches() counts the step (_count), shows progress (_show_progress), at the end of an
    epoch writes a line of the log with the online kNN (_log_epoch), saves or stops where it is time to
    (_save_or_stop), and sets rate and seed of the next one (_prepare).
    """

    def __init__(self, cfg, method: str, variant: str = "", folder: str = "", smallest: int = 0,
                 load_backbone: Callable | None = None):
        """folder: its name below runs/<dataset>, where --out does not say another; smallest: pixels of the
        smallest view, where a method has views of several sizes; load_backbone: linear_probe's, which reads
        --weights."""
        join_processes()
        self.cfg, self.method, self.variant = cfg, method, variant
        self.out = pathlib.Path(cfg.out or f"runs/{cfg.dataset}/{folder or method}").expanduser()
        self.device = pick_device(cfg.device)
        self.dtype = pick_dtype(cfg.amp, self.device)
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = not cfg.deterministic
        self.size, self.view = cfg.size or DATASETS[cfg.dataset].pixels, cfg.view
        self.warm = None  # the encoder of --weights; a resume has it in its checkpoint
        if cfg.weights and (self.out / "checkpoint.pt").exists():
            begun = read_log(self.out / "log.jsonl")[0]["config"]
            cfg.arch, cfg.stem = cfg.arch or begun["arch"], cfg.stem or begun["stem"]
        elif cfg.weights:
            self.warm, cfg.arch, cfg.stem = load_backbone(cfg.weights, cfg.arch, cfg.stem or "auto")
        self.stem = pick_stem(cfg.stem, self.size)
        smallest = smallest or self.view
        if min(self.size, smallest) < 8:
            raise UsageError(f"images of {self.size} and views of {smallest} pixels: want 8 or more of each")
        if smallest <= (8 if self.stem == "cifar" else 32):
            say(f"note: a view of {smallest} px is one pixel in the network's last stage")
        limit = cfg.limit or (cfg.batch if cfg.preview else 0)
        images = load_images(cfg.dataset, cfg.data, "train", self.size, cfg.cache, cfg.workers, limit)
        if cfg.preview:  # of few images too
            cfg.batch = min(cfg.batch, len(images))
        if len(images) < cfg.batch:
            raise UsageError(f"--batch {cfg.batch} is larger than the {len(images)} training images; give a "
                             "smaller one")
        if cfg.batch % world():
            raise UsageError(f"--batch {cfg.batch} is over all processes, and {world()} do not divide it")
        self.batch = cfg.batch // world()  # of this process
        self.images = images.to(self.device)
        torch.manual_seed(cfg.seed)
        self.steps_per_epoch = len(images) // cfg.batch
        self.steps = self.steps_per_epoch * cfg.epochs
        self.warmup = min(round(cfg.warmup * self.steps_per_epoch), self.steps // 10)
        self.lr = cfg.lr * cfg.batch / 256
        self.step = self.stopping = 0
        self.bad = torch.zeros((), dtype=torch.bool, device=self.device)  # whether a loss was not finite
        self.seconds, self.sums = 0.0, {}  # of training in all; of this epoch's logged values
        self.started = self.last_save = self.last_step = time.monotonic()  # of this process
        self.first_step, self.earlier = 0, 0.0  # where this process began: step, and seconds until then

    def new_encoder(self) -> nn.Module:
        """The backbone to train, untrained or as --weights has it."""
        return resnet(self.cfg.arch, self.stem) if self.warm is None else self.warm

    def start(self, model: nn.Module, encoder: nn.Module, bank: nn.Module | None = None) -> None:
        """Move the modules to the device, claim the folder, go on from its checkpoint. model holds all that
        is trained or averaged, encoder among it; bank is saved beside it."""
        cfg = self.cfg
        if world() > 1 and self.device.type == "cuda" and cfg.sync_bn:  # on CPUs each normalises its own part
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model, self.encoder = model.to(self.device, memory_format=torch.channels_last), encoder
        # On a step that the scaler skips, torch's fused SGD keeps a momentum that it never wrote.
        fused = self.device.type in ("cuda", "cpu") and self.dtype != torch.float16
        self.optimizer = make_optimizer(cfg.optimizer, model, self.lr, cfg.wd, fused)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        if bank is not None:
            self.parts["bank"] = bank.to(self.device)
            broadcast(bank)
        broadcast(self.model)
        if cfg.compile and not cfg.deterministic:
            encoder.compile(mode="reduce-overhead")  # as CUDA graphs: launches, not arithmetic, bound a GPU
        if cfg.preview:
            return
        if rank() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / "lock", "w")  # the kernel lets go of it however the process ends
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{self.out} belongs to a run that is alive; choose another --out") from None
        size, encoder_size = (sum(p.numel() for p in m.parameters()) for m in (model, encoder))
        self.where = {"device": device_name(self.device), "processes": world(),
                      "precision": str(self.dtype).removeprefix("torch.")}
        self.header = {"method": self.method, "variant": self.variant, "arch": cfg.arch, "stem": self.stem,
                       "size": self.size, "images": len(self.images), "names": digest_of(self.images.files),
                       "steps": self.steps, "effective_lr": self.lr, "config": vars(cfg), "parameters": size,
                       "encoder_parameters": encoder_size, **origin(), **self.where,
                       "started": datetime.now().isoformat(timespec="seconds")}
        if self.warm is not None:
            data = pathlib.Path(cfg.weights).expanduser().read_bytes()
            self.header["weights_digest"] = hashlib.sha256(data).hexdigest()[:16]
        self.lines = [json.dumps(self.header)]
        other = " (--recipe cifar is the full one)" if cfg.recipe == "small" else ""
        say(f"{self.method} {self.variant}: {cfg.dataset}, {len(self.images)} images, {self.steps} steps "
            f"({cfg.epochs} epochs), recipe {cfg.recipe}{other}, {cfg.optimizer}, lr {self.lr:.4g} = "
            f"{cfg.lr:g} x {cfg.batch}/256, {cfg.arch}, {self.stem} stem, views of {self.view} px, "
            f"{self.where['device']}, {self.where['precision']}, {size / 1e6:.1f} M parameters -> {self.out}")
        self._resume()
        if len(set(gather(torch.tensor([self.step])).tolist())) > 1:
            raise RunError(f"the processes found different checkpoints: {self.out} must be one folder")
        self._write_log()

    def _resume(self) -> None:
        path, log = self.out / "checkpoint.pt", self.out / "log.jsonl"
        found = [p for p in (path, path.with_suffix(".previous")) if p.exists()]
        if not found:
            if log.exists():
                self._refuse_other(read_log(log)[0])
            return
        for candidate in found:
            try:
                state = read_checkpoint(candidate)
                break
            except RunError as error:
                print(f"{error}; trying the one before it", file=sys.stderr)
        else:
            raise RunError(f"no checkpoint in {self.out} can be read; move the folder away to start anew")
        header = json.loads(state["log"][0])
        self._refuse_other(header | state)
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step, self.lines, self.seconds = state["step"], state["log"], state["seconds"]
            self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
            where = state.get("where") or {name: header.get(name) for name in self.where}
            if where != self.where and self.step < self.steps:
                self.lines.append(json.dumps({"resumed": self.step, **self.where}))
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            begun = header.get("processes", world())
            if begun != world():
                raise UsageError(f"{self.out} was begun by {begun} processes, and what they hold of a batch "
                                 f"does not fit {world()}; start as many, or choose another --out") from None
            raise RunError(f"{candidate} does not fit this run: {error}") from None
        if candidate != path and rank() == 0:
            path.unlink(missing_ok=True)  # damaged: the next save must not keep it in place of the good one
        say(f"resumed at step {self.step} of {self.steps} from {candidate}")

    def _refuse_other(self, other: dict) -> None:
        """UsageError where a log or a checkpoint is not this run's, naming what differs. A flag that one of
        the two does not know counts as one that was not given."""
        if other["method"] != self.method:
            raise UsageError(f"{self.out} is of {other['method']}, not {self.method}; choose another --out")
        free = FREE_FIELDS - ({"data"} if self.cfg.dataset == "folder" else set())  # data is the set there
        ours = vars(self.cfg) | {"images": len(self.images), "file names": self.header["names"]}
        theirs = {n: value for n, value in other["config"].items() if n in ours or value}
        theirs = self.cfg.defaults | theirs
        theirs |= {"images": other.get("images"), "file names": other.get("names", ours["file names"])}
        names = [n for n in sorted({*ours, *theirs} - free) if ours.get(n) != theirs.get(n)]
        if names:
            values = {n: f" ({theirs.get(n)!r}, not {ours.get(n)!r})" for n in names if n != "file names"}
            keys = ", ".join(f"{n}{values.get(n, '')}" for n in names)
            more = f", and --weights {self.out}/backbone.pt to begin there" if names == ["epochs"] else ""
            raise UsageError(f"{self.out} is of another configuration: {keys}; choose another --out{more}")

    def save(self) -> None:
        """All that is needed to go on bit for bit, to OUT/checkpoint.pt, then the bare backbone to
        OUT/backbone.pt; RunError where something is not finite."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        values = [*state["model"].values(), *state.get("bank", {}).values()]
        self._stop_if_bad([value for value in values if value.is_floating_point()])
        if rank():
            return
        state |= {"method": self.method, "arch": self.cfg.arch, "stem": self.stem, "config": vars(self.cfg),
                  "epoch": self.step // self.steps_per_epoch, "step": self.step, "seconds": self.seconds,
                  "log": self.lines, "sums": self.sums, "where": self.where}
        with replacing(self.out / "checkpoint.pt", keep=True) as file:
            torch.save(state, file)
        self._save_backbone()

    def _save_backbone(self) -> None:
        if rank() == 0:
            weights = {key: value.cpu() for key, value in self.encoder.state_dict().items()}
            with replacing(self.out / "backbone.pt") as file:
                torch.save(weights, file)

    def _write_log(self) -> None:
        if rank() == 0:
            with replacing(self.out / "log.jsonl") as file:
                file.write(("\n".join(self.lines) + "\n").encode())

    def generator(self, purpose: str = "views", device: torch.device | str = "cpu") -> torch.Generator:
        """The random numbers of this step, the same after a restart; another purpose gives others."""
        return seeded(purpose, self.cfg.seed, self.step, device=device)

    def autocast(self):
        """The forward pass's precision."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def batches(self):
        """Yields (images, aspect, index) for every step that is left; ends with the final files. Exit status
        128 + n after signal n, 3 after --minutes, both with a checkpoint."""
        if self.step == self.steps:
            self._save_backbone()
            say(f"nothing left to do: {self.out / 'backbone.pt'}")
            return

        def stop(number, _):
            self.stopping = 128 + number

        handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        self.started = self.last_save = time.monotonic()
        self.first_step, self.earlier = self.step, self.seconds
        try:
            while self.step < self.steps:
                epoch, done = divmod(self.step, self.steps_per_epoch)  # done: steps of this epoch
                order = torch.randperm(len(self.images), generator=seeded("order", self.cfg.seed, epoch))
                whole = order.to(self.images.rows.device).split(self.cfg.batch)[:self.steps_per_epoch]
                self.last_step = time.monotonic()
                for images in self.images.batches(whole[done:], self.device):
                    self._prepare()
                    yield images
                    self._count()
                    self._show_progress()
                    if self.step % self.steps_per_epoch == 0:
                        self._log_epoch(epoch + 1)
                    self._save_or_stop()
            self.save()
            say(f"done in {self.seconds / 60:.1f} min: {self.out / 'backbone.pt'}")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _prepare(self) -> None:
        """The next step's rate; and the seed of what draws from torch's own generators, as a dropout does."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * cosine(self.step, self.steps, self.warmup)
        torch.manual_seed(key_seed("torch", self.cfg.seed, self.step, rank()))

    def _count(self) -> None:
        now = time.monotonic()
        self.seconds += now - self.last_step
        self.last_step = now
        self.step += 1

    def _log_epoch(self, epoch: int) -> None:
        self._stop_if_bad()
        line = {"epoch": epoch, "step": self.step, "lr": self.optimizer.param_groups[0]["lr"]}
        line |= {name: round(x.item() / self.steps_per_epoch, 6) for name, x in self.sums.items()}
        self.sums = {}
        if self.cfg.knn_every and (epoch % self.cfg.knn_every == 0 or epoch == self.cfg.epochs):
            line |= self.monitor()
        rate, left = self._pace()
        line |= {"images_per_s": round(rate, 1), "minutes": round(self.seconds / 60, 3)}
        self.lines.append(json.dumps(line))
        self._write_log()
        shown = " ".join(f"{k} {v}" for k, v in line.items() if k not in ("epoch", "step", "lr", "minutes"))
        say(f"epoch {epoch}/{self.cfg.epochs} {shown}, {left} left")
        self.last_step = time.monotonic()  # the monitor is no training

    def _pace(self) -> tuple[float, timedelta]:
        """Images (not views) per second since the process began, without the monitor; the time to go."""
        pace = (self.seconds - self.earlier) / (self.step - self.first_step)
        return self.cfg.batch / pace, timedelta(seconds=round(pace * (self.steps - self.step)))

    def _show_progress(self) -> None:
        rate, left = self._pace()
        live(f"step {self.step}/{self.steps} {rate:.0f} images/s, {left} left")
        if self.step - self.first_step == 20 and self.step < self.steps:
            say(f"estimated end in {left}")

    def _save_or_stop(self) -> None:
        """Save where it is time to, stop where a signal or --minutes asks for it, in all processes alike."""
        now = time.monotonic()
        if self.cfg.minutes and now - self.started >= 60 * self.cfg.minutes:
            self.stopping = self.stopping or 3
        flags = torch.tensor([self.stopping, now - self.last_save >= 60 * self.cfg.save_every])
        if world() > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)  # on the CPU, so that no GPU is waited for
        status, due = flags.tolist()
        if status or due:
            self.save()
            self.last_save = time.monotonic()
        if status and self.step < self.steps:  # after the last step the run ends by itself
            gather(torch.zeros(1))  # torchrun kills a job once one process ends, and process 0 may be saving
            why = signal.Signals(status - 128).name if status > 128 else f"--minutes {self.cfg.minutes:g}"
            say(f"stopped by {why}; saved at step {self.step} of {self.steps}: "
                "the same command goes on from there")
            raise SystemExit(status)

    def optimise(self, loss: Tensor) -> None:
        """Backward and one optimizer step. RunError on a loss that is not finite: at once on a CPU, elsewhere
        within 50 steps, so that no step waits for the device; nothing of it is ever saved. In fp16 the scaler
        skips a step whose gradient overflowed; RunError where its scale falls below 1."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if world() > 1:
            sum_gradients(self.model)
        self.bad |= ~loss.detach().isfinite()
        if self.device.type == "cpu" or self.step % 50 == 0:
            self._stop_if_bad()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _stop_if_bad(self, values: list[Tensor] = ()) -> None:
        bad = self.bad  # in fp16 an overflow is no fault, as long as a smaller scale ends it
        if self.scaler.is_enabled():
            bad = self.scaler.get_scale() < 1
        if bad or not torch.nn.utils.get_total_norm(values).isfinite():
            lr = self.optimizer.param_groups[0]["lr"]
            raise RunError(f"loss, gradients or parameters are not finite at step {self.step} (lr {lr:.4g}); "
                           "the last checkpoint is untouched; try a lower --lr or longer --warmup, and --out")

    @torch.no_grad()
    def log(self, **values: Tensor) -> None:
        """Add this step's values (scalars) to the epoch's means, on the device."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.float()

    @torch.no_grad()
    def monitor(self) -> dict[str, float]:
        """Online kNN and collapse signs on the run's own training images, centre views without augmentation:
        a tenth of them, at most 1,000, are classified by their neighbours among at most 5,000 others. Without
        classes only the signs."""
        order = torch.randperm(len(self.images), generator=seeded("monitor"))
        query = order[:min(1000, max(1, len(order) // 10))]
        bank = order[len(query):len(query) + 5000]
        with self.autocast(), torch.compiler.set_stance("force_eager"):  # --compile is for a step's batches
            test, train = (features(self.encoder, self.images.subset(index), self.size, self.device)
                           for index in (query, bank))
        signs = spectrum(test[0]) if len(query) >= 20 else {}  # a few points say nothing of a collapse
        if len(self.images.classes) < 2:
            return signs
        return {"knn_top1": round(knn(*train, *test), 2), **signs}
