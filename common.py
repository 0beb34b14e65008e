"""What the method scripts share: data, batched augmentation, backbones, precision and schedule, and the run itself.

Nothing here belongs to a method: losses, heads, queues and banks live in the method's own file. Importing has no side effect.
Sections, in this order: errors and configuration, processes, data, augmentation, backbone, precision and optimisers, run.
Shapes: B batch, V views, C channels, H x W pixels of the stored image, S pixels of a view, N images.
"""
import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import inspect
import io
import json
import math
import os
import pathlib
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
import typing
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------- errors and configuration


class UsageError(Exception):
    """Wrong usage: a flag, a path or a combination of them. Ends a script with exit status 2."""


class RunError(Exception):
    """Right usage that could not be carried out: broken data, a diverged loss, a full disk. Ends a script with exit status 1."""


@contextlib.contextmanager
def one_line_errors():
    """Turns the errors that a user can cause into one line on stderr and an exit status; every other error keeps its traceback."""
    try:
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UsageError, RunError, OSError) as error:
        sys.stdout.flush()
        print(f"{pathlib.Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # torch raises this from a signal handler, wherever the run is at that moment
            raise
        print(f"{pathlib.Path(sys.argv[0]).name}: error: a process that decodes images died ({str(error).splitlines()[0]}); out of memory? "
              "try fewer --workers", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


Dataset = Literal["shapes", "cifar10", "cifar100", "tinyimagenet", "imagenet100", "imagenet1k", "folder"]
Arch = Literal["resnet10", "resnet18", "resnet34", "resnet50"]
Stem = Literal["auto", "cifar", "imagenet"]


@dataclass
class RunConfig:
    """The flags of every script. A method's own Config adds its fields and overrides these defaults."""

    dataset: Dataset = "shapes"  # what to train on
    data: str = "data"           # where the images are, or are downloaded to
    batch: int = 256             # images per step, over all processes
    epochs: int = 200            # passes over the training images
    arch: Arch = "resnet18"      # backbone
    stem: Stem = "auto"          # first layers: 3x3 without pooling, or 7x7 with; auto = cifar up to 64 px
    size: int = 0                # pixels of a global view; 0 = the dataset's own (32, 64 or 224)
    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"  # momentum 0.9 for sgd and lars
    lr: float = 0.06             # learning rate at batch 256; the run uses lr x batch / 256 and prints it
    wd: float = 5e-4             # weight decay
    warmup: float = 0.0          # epochs of linear warm-up before the cosine
    seed: int = 0                # of weights, order, augmentation; same seed, machine and versions: same result
    out: str = ""                # folder of this run; empty = runs/<dataset>/<method>
    workers: int = 2             # processes that decode images; sets that fit in memory are decoded once
    cache: str = ""              # folder that keeps decoded images between runs; empty = decode the files
    device: str = "auto"         # auto = cuda, then mps, then cpu; or cpu, cuda, cuda:1, mps
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # autocast; auto = bf16 where the hardware has it, else off
    compile: bool = False        # torch.compile the network; not bit-reproducible, so off with --deterministic
    limit: int = 0               # train on the first N images of a fixed shuffle; 0 = all
    knn_every: int = 5           # epochs between online kNN checks (on a held-out tenth of the training labels); 0 = never
    save_every: str = "10m"      # checkpoint interval: 90s, 10m, 2h or 500steps; the end of the run is always saved
    deterministic: bool = False  # torch's deterministic algorithms: bit-exact repeats on CUDA too, slower there
    preview: bool = False        # write OUT/preview.png, a grid of the network's inputs, and stop


# Fields that may differ between a checkpoint and the run that resumes it: where and how to compute, not what.
FREE_FIELDS = {"data", "out", "workers", "cache", "device", "save_every", "preview"}
SIZES = {"shapes": 32, "cifar10": 32, "cifar100": 32, "tinyimagenet": 64, "imagenet100": 224, "imagenet1k": 224, "folder": 224}
ALIASES = {"batch": ["-b", "--batch-size"], "data": ["--data-dir"]}


def parse(config_class: type, doc: str, argv: list[str] | None = None, shared: type = RunConfig):
    """Command line -> an instance of a dataclass with config_class's fields and those of shared, config_class's defaults first.

    A field's trailing comment in the source is its --help text, so that what a reader and a user are told cannot differ.
    Exits with status 2 and one line on wrong usage.
    """
    args_class, parser = _parser(config_class, shared)
    parser.description = doc
    cfg = args_class(**vars(parser.parse_args(argv)))
    for name, value in vars(cfg).items():
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"--{name.replace('_', '-')} {value}: want a finite number")
        if isinstance(value, (int, float)) and value < (least := {"batch": 2, "chunk": 1}.get(name, 0)):
            parser.error(f"--{name.replace('_', '-')} {value}: want {least} or more")
        if isinstance(value, int) and value > 2**53:
            parser.error(f"--{name.replace('_', '-')} {value}: want 2^53 or less")
    return cfg


@functools.cache
def _parser(config_class: type, shared: type) -> tuple[type, argparse.ArgumentParser]:
    args_class = dataclass(type("Args", (config_class, shared), {}))
    hints, comments = typing.get_type_hints(args_class), {}
    for base in args_class.__mro__[-2:0:-1]:
        comments.update(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(base), re.M))
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(args_class):
        flags = [f"--{field.name.replace('_', '-')}", *ALIASES.get(field.name, [])]
        kind, text = hints[field.name], f"{comments.get(field.name, '')} [{field.default}]".replace("%", "%%")
        if kind is bool:
            parser.add_argument(*flags, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        elif typing.get_origin(kind) is Literal:
            parser.add_argument(*flags, choices=typing.get_args(kind), default=field.default, help=text)
        else:
            parser.add_argument(*flags, type=kind, default=field.default, metavar=kind.__name__.upper(), help=text)
    return args_class, parser


# ------------------------------------------------------------------------------------------- processes
# Under torchrun every process holds the same weights and a slice of each batch. A loss sees the whole batch through gather() and is the
# same number everywhere; the mean over processes of its gradients is then the gradient of one process on the whole batch, because the
# backward passes of gather() and of the synchronised BN sum over the processes.


def join_processes() -> None:
    """Join the other processes of a torchrun job, which says who is who in the environment. Without torchrun nothing happens."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(hours=2))


def rank() -> int:
    """Number of this process in its job, 0 without one. Process 0 is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes in the job, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launched_by() -> str:
    """The command line of this run, torchrun and its processes included."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world()))  # processes on this node
    nodes = [f"--nnodes={world() // here}"] if world() > here else []
    launcher = ["torchrun", *nodes, f"--nproc-per-node={here}"] if world() > 1 else [pathlib.Path(sys.executable).name]
    return shlex.join([*launcher, *sys.argv])


def say(text: str) -> None:
    """print, from process 0 alone."""
    if rank() == 0:
        print(text, flush=True)


def meet() -> None:
    """Go on when all processes are here."""
    if world() > 1:
        dist.all_reduce(torch.zeros(1))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        pieces = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
        dist.all_gather(pieces, x.contiguous())
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(world())[rank()]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient


def gather(x: Tensor) -> Tensor:
    """(B / processes, ...) of every process -> (B, ...) in their order, with gradient; x itself where there is one process."""
    return x if world() == 1 else _Gather.apply(x)


def total(x: Tensor) -> Tensor:
    """Sum over the processes, with gradient; x itself where there is one."""
    return x if world() == 1 else _Sum.apply(x)


def gather_rows(x: Tensor) -> Tensor:
    """gather without gradient, of pieces (B_i, ...) that may differ in length."""
    if world() == 1:
        return x
    lengths = gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = torch.cat([x, x.new_zeros(max(lengths) - len(x), *x.shape[1:])])
    return torch.cat([piece[:n] for piece, n in zip(gather(padded.detach()).chunk(world()), lengths)])


def collect(x: Tensor) -> Tensor | None:
    """The pieces (B_i, ...) of all processes as one tensor in the memory of process 0's CPU; None on the others."""
    lengths = gather(torch.tensor([len(x)])).tolist()
    if rank():
        dist.send(x.cpu(), 0)
        return None
    pieces = [x.cpu(), *(torch.empty(n, *x.shape[1:], dtype=x.dtype) for n in lengths[1:])]
    for source in range(1, world()):
        dist.recv(pieces[source], source)
    return torch.cat(pieces)


class _Normalise(torch.autograd.Function):
    """Batch norm over all processes (Ioffe & Szegedy 2015, algorithm 1): x (B, C, ...), weight and bias (C,), count values
    of a channel over all processes -> y, mean, variance. Written out so that the backward pass keeps x alone, as that of torch's batch norm
    does, and no float32 copy of it."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, count):
        dims, shape = [d for d in range(x.ndim) if d != 1], [-1 if d == 1 else 1 for d in range(x.ndim)]
        y = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        mean = total(y.sum(dims)) / count
        y -= mean.view(shape)
        variance = total(torch.linalg.vector_norm(y, dim=dims).square()) / count
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.dims, ctx.shape, ctx.count = dims, shape, count
        ctx.mark_non_differentiable(mean, variance)
        return y.mul_((weight * scale).view(shape)).add_(bias.view(shape)).to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx, gradient, *_):
        (x, weight, mean, scale), dims, shape = ctx.saved_tensors, ctx.dims, ctx.shape
        g = gradient.to(mean.dtype, copy=True)
        y = x.to(mean.dtype, copy=True).sub_(mean.view(shape)).mul_(scale.view(shape))          # normalised
        own = torch.stack([g.sum(dims), (g * y).sum(dims)])                                     # (2, C)
        over_all = total(own) / ctx.count
        g -= over_all[0].view(shape)
        g -= y.mul_(over_all[1].view(shape))
        return g.mul_((weight * scale).view(shape)).to(x.dtype), own[1], own[0], None, None


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batch of all processes, for CPUs; torch's SyncBatchNorm, which CUDA gets, refuses them."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            count = world() * x.numel() // x.shape[1]
            y, mean, variance = _Normalise.apply(x, self.weight, self.bias, self.eps, count)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
                self.num_batches_tracked += 1
            return y


def synchronise_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch norms that see the batch of all processes; the model as it is where there is one process."""
    if world() == 1:
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = GlobalBatchNorm
    return model


def average_gradients(model: nn.Module) -> None:
    """Mean over the processes, in one message."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for g, mean in zip(gradients, (flat / world()).split([g.numel() for g in gradients])):
        g.copy_(mean.view_as(g))


# ------------------------------------------------------------------------------------------- data

SHAPES = ["disc", "ring", "square", "triangle", "star", "plus", "bar", "half disc", "crescent", "letter L"]


def _box(x, y, half_x, half_y):
    return np.maximum(np.abs(x) - half_x, np.abs(y) - half_y)


# Signed distance to each figure's outline, roughly and negative inside, from the figure's own x, y and radius r.
OUTLINES = [
    lambda x, y, r: r - 0.85,
    lambda x, y, r: np.abs(r - 0.75) - 0.2,
    lambda x, y, r: _box(x, y, 0.72, 0.72),
    lambda x, y, r: np.maximum(-y - 0.5, 0.5 * y + 0.866 * np.abs(x) - 0.5),
    lambda x, y, r: r - (0.62 + 0.36 * np.cos(5 * np.arctan2(y, x))),
    lambda x, y, r: np.minimum(_box(x, y, 0.95, 0.25), _box(x, y, 0.25, 0.95)),
    lambda x, y, r: _box(x, y, 0.98, 0.28),
    lambda x, y, r: np.maximum(r - 0.95, -y - 0.1),
    lambda x, y, r: np.maximum(r - 0.95, 0.7 - np.hypot(x - 0.5, y)),
    lambda x, y, r: np.minimum(_box(x + 0.55, y, 0.25, 0.9), _box(x - 0.05, y - 0.65, 0.85, 0.25)),
]


def draw_shapes(n: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """The embedded set: n images (n, 3, size, size) uint8 and labels (n,), the same for the same seed. Classes: SHAPES.

    An image is a figure and a ground in two shades of almost the same grey. Place, size, rotation, brightness, tint and noise are
    nuisance: nothing but the outline tells one class, or one image, from another once crop and jitter have passed. Free colours or
    textures here would let a network tell images apart without seeing the shape.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % len(SHAPES))
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    angle, radius = rng.uniform(0, 2 * np.pi, (n, 1, 1)), rng.uniform(0.65, 0.9, (n, 1, 1))
    cx, cy = rng.uniform(-1, 1, (2, n, 1, 1)) * (1 - radius)
    distance = np.empty((n, size, size), np.float32)
    for label, outline in enumerate(OUTLINES):
        of = labels == label
        dx, dy = grid[None, None, :] - cx[of], grid[None, :, None] - cy[of]
        x = (np.cos(angle[of]) * dx + np.sin(angle[of]) * dy) / radius[of]      # (m, S, S), the figure's own coordinates
        y = (np.cos(angle[of]) * dy - np.sin(angle[of]) * dx) / radius[of]
        distance[of] = outline(x, y, np.hypot(x, y))
    inside = np.clip(0.5 - distance * radius * size / 2, 0, 1)[:, None]     # (n, 1, S, S), one pixel of antialiasing
    ground = rng.uniform(0.25, 0.75, (n, 1, 1, 1))
    contrast = rng.uniform(0.2, 0.35, (n, 1, 1, 1)) * rng.choice([-1, 1], (n, 1, 1, 1))
    tint = rng.uniform(-0.03, 0.03, (n, 3, 1, 1))
    images = rng.standard_normal((n, 3, size, size), dtype=np.float32) * 0.03 + (ground + tint) + contrast * inside
    return torch.from_numpy((np.clip(images, 0, 1) * 255).round().astype(np.uint8)), torch.from_numpy(labels)


class ImageSet(torch.utils.data.Dataset):
    """Images of one split: labels (N,) int64, -1 where there is no class; classes, their names; and their pixels, (3, H, H) uint8 each:
    `pixels` (N, 3, H, H) in memory, or else `files`, which the workers of batches() decode: paths, or row numbers of `store`, the arguments
    of a map on disk that each worker opens for itself."""

    def __init__(self, labels: Tensor, classes: list[str], pixels: Tensor | None = None, files: list | None = None, size: int = 0, store=None):
        self.labels, self.classes, self.pixels, self.files, self.size, self.store = labels, classes, pixels, files, size, store
        self.broken: dict[int, str] = {}  # position -> file and reason, of the images that did not decode so far
        self.most = 0.01 * len(labels)    # of them, before a run ends; a part of a set may have as many as the whole

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Tensor:
        if self.files is None:
            return self.pixels[i]
        return decode(self.files[i], self.size) if self.store is None else torch.from_numpy(np.array(np.memmap(**self.store)[self.files[i]]))

    def subset(self, index: Tensor) -> "ImageSet":
        """The images at these positions (M,), in this order."""
        files = None if self.files is None else [self.files[i] for i in index.tolist()]
        pixels = None if self.pixels is None else self.pixels[index.to(self.pixels.device)]
        part = ImageSet(self.labels[index], self.classes, pixels, files, self.size, self.store)
        part.most = self.most
        return part

    def batches(self, order: list[Tensor], device: torch.device, workers: int = 0):
        """Yields (images (B, 3, H, H) uint8, index (B,)) on the device for each tensor of positions in order.

        Images that do not decode are left out (B may be 0) and noted in `broken`. Raises RunError where that is more than 1 % of all (of a
        process's share of them under torchrun).
        """
        if self.files is None:
            for index in order:
                yield self.pixels[index.to(self.pixels.device)].to(device), index.to(device)
            return
        loader = torch.utils.data.DataLoader(range(len(self)), batch_sampler=[i.tolist() for i in order], num_workers=workers,
                                             pin_memory=device.type == "cuda", collate_fn=_TryDecode(self))
        try:
            for index, images, bad in loader:
                self.broken.update(bad)
                if len(self.broken) > self.most / world():
                    raise RunError(f"{len(self.broken)} of {len(self)} images do not decode: {'; '.join([*self.broken.values()][:20])}")
                images = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8) if images is None else images
                yield images.to(device, non_blocking=True), index.to(device, non_blocking=True)
        except (ConnectionError, EOFError):  # from the socket of a worker that is dying; once it is dead, torch's signal handler says so here
            time.sleep(2)
            raise

    def report_broken(self, already: int = 0) -> int:
        """Name the images that did not decode, but for the first `already` of them; returns how many there are."""
        if len(self.broken) > already:
            print(f"skipped {len(self.broken)} of {len(self)} images that do not decode: {'; '.join([*self.broken.values()][already:])}", file=sys.stderr)
        return len(self.broken)


class _TryDecode:
    """Positions -> (those that decode, their pixels or None, position -> reason of the others). A class, so that workers can be sent it."""

    def __init__(self, images: ImageSet):
        self.images = images

    def __call__(self, positions: list[int]):
        good, pixels, bad = [], [], {}
        for i in positions:
            try:
                pixels.append(self.images[i])
                good.append(i)
            except Exception as error:  # Pillow raises many kinds for a broken file; each is reported with the file's name
                file, reason = str(self.images.files[i]), str(error) or type(error).__name__
                bad[i] = reason if file in reason else f"{file} ({reason})"
        return torch.tensor(good, dtype=torch.long), torch.stack(pixels) if pixels else None, bad


def decode(path: str, size: int) -> Tensor:
    """An image file as RGB, shorter side resized to size, centre square: (3, size, size) uint8."""
    from PIL import Image, ImageOps
    from torchvision.transforms import functional as TF

    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion clips instead of scaling
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        image = image.convert("RGB")
    if min(image.size) != size:
        image = TF.resize(image, size, antialias=True)
    return TF.pil_to_tensor(TF.center_crop(image, size))


def list_images(root: pathlib.Path) -> list[str]:
    """Image files below root, nested, sorted; hidden ones are ignored, and folders that links lead back up or a second time to."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found, seen = [], {os.path.realpath(root)}
    for folder, names, files in os.walk(root, followlinks=True):
        places = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(names) if not name.startswith(".")}
        above = os.path.realpath(folder) + os.sep
        names[:] = [name for name, place in places.items() if not above.startswith(place + os.sep) and place not in seen and not seen.add(place)]
        found += [os.path.join(folder, file) for file in files if file.lower().endswith(IMG_EXTENSIONS) and not file.startswith(".")]
    return sorted(found)


def read_tree(root: pathlib.Path, size: int, only: list[str] | None = None) -> ImageSet:
    """root/<class>/.../*.png and the like; a root without class folders gives one unlabelled set. Raises RunError where nothing is found."""
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")) if root.is_dir() else []
    if only is not None:
        found, classes = set(classes), [name for name in classes if name in set(only)]
        if len(classes) < len(only):
            print(f"{root} has {len(classes)} of the {len(only)} classes (missing: {', '.join(sorted(set(only) - found)[:3])}, ...)", file=sys.stderr)
    files = [(path, label) for label, name in enumerate(classes) for path in list_images(root / name)]
    if not files:
        classes, files = [], [(path, -1) for path in list_images(root)] if root.is_dir() and only is None else []
    if not files:
        raise RunError(f"{root} holds no images: want {root}/<class>/*.jpg (or .png, ...)")
    return ImageSet(torch.tensor([label for _, label in files]), classes, files=[path for path, _ in files], size=size)


IN_MEMORY = 2 << 30  # bytes of decoded images that are kept in memory


def load_images(dataset: str, data: str, split: str, size: int, workers: int = 0, limit: int = 0, cache: str = "") -> ImageSet:
    """A dataset's "train" or "test" images, stored at working_size(size) pixels; limit: the first of a fixed shuffle, 0 = all.

    Up to IN_MEMORY are decoded at once and kept; more are decoded by workers whenever they are read, or read from a cache on disk.
    Raises UsageError where the folder is missing, RunError where what it holds cannot be read.
    """
    root, stored = pathlib.Path(data), working_size(size)
    if dataset == "shapes":
        pixels, labels = draw_shapes(*{"train": (10_000, 0), "test": (2_000, 1)}[split], size=size)
        images = ImageSet(labels, SHAPES, pixels)
    elif dataset in ("cifar10", "cifar100") and not (root / dataset / split).is_dir():
        images = download_cifar(dataset, root, split, stored)
    elif dataset in ("cifar10", "cifar100"):
        images = read_tree(root / dataset / split, stored)
    else:
        images = find_tree(dataset, root, split, stored)
    if cache and images.files is not None:
        images = cached(images, pathlib.Path(cache) / f"{dataset}-{split}-{stored}", workers)
    if limit and limit < len(images):
        images = images.subset(torch.randperm(len(images), generator=seeded(0))[:limit])
    if images.files is None or len(images) * 3 * stored**2 > IN_MEMORY:
        return images
    pixels, positions = zip(*[(chunk.clone(), index) for chunk, index in   # the clone frees the worker's shared memory
                              images.batches(list(torch.arange(len(images)).split(256)), torch.device("cpu"), workers)])
    images.report_broken()
    positions = torch.cat(positions)
    return ImageSet(images.labels[positions], images.classes, torch.cat(pixels), size=stored)


def cached(images: ImageSet, path: pathlib.Path, workers: int) -> ImageSet:
    """The same images read from path.u8, a map of (N, 3, H, H) uint8 on disk that is made where there is none.

    path.pt, written last, holds a digest of the files' names and which of them decode. A map without it, of another size, or of files of
    other names is made anew, so one that was interrupted is never read; files that changed under the same names are not seen. Raises
    RunError where it cannot be written.
    """
    base = os.path.commonpath(images.files)
    names = hashlib.sha256("\n".join([os.path.realpath(base), *(file[len(base):] for file in images.files)]).encode()).hexdigest()
    shape, store, about = (len(images), 3, images.size, images.size), path.with_suffix(".u8"), path.with_suffix(".pt")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second run waits here until the first has made the map
            facts = {}
            if about.exists() and store.exists() and store.stat().st_size == math.prod(shape):
                with contextlib.suppress(RunError):  # a damaged one is made anew like one that is not there
                    facts = read_checkpoint(about)
            if facts.get("names") != names:
                print(f"writing {math.prod(shape) / 1e9:.1f} GB of decoded images to {store}", flush=True)
                about.unlink(missing_ok=True)
                whole = torch.zeros(len(images), dtype=torch.bool)
                new = path.with_suffix(".tmp")  # a run that has the old map open keeps it
                with open(new, "wb") as file:
                    for chunk, index in images.batches(list(torch.arange(len(images)).split(256)), torch.device("cpu"), workers):
                        whole[index] = True
                        for row, i in zip(chunk, index.tolist()):
                            file.seek(i * row.numel())
                            file.write(row.numpy().tobytes())
                    file.truncate(math.prod(shape))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(new, store)
                images.report_broken()
                facts = {"names": names, "whole": whole}
                write_checkpoint(about, facts)
    except OSError as error:
        raise RunError(f"could not write the cache {store} ({error.strerror})") from None
    rows = facts["whole"].nonzero()[:, 0]
    return ImageSet(images.labels[rows], images.classes, files=rows.tolist(), size=images.size, store=dict(filename=store, dtype=np.uint8, mode="r", shape=shape))


def working_size(size: int) -> int:
    """Pixels at which images for views of `size` pixels are stored: small images as they are, large ones at 8/7 (256 for 224)."""
    return size if size <= 64 else round(size * 8 / 7)


def download_cifar(dataset: str, root: pathlib.Path, split: str, size: int) -> ImageSet:
    """CIFAR-10 or -100 through torchvision, which checks the published digests before it unpickles anything."""
    import torchvision

    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[dataset]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(sys.stderr), open(root / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process downloads, the others then find it there
            loaded = kind(str(root), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"no {dataset} in {root}, and the download failed ({error}). Either download it where there is internet and copy its folder "
            f"to {root}, or lay the images out as {root / dataset}/{{train,test}}/<class>/*.png and pass --data {root}") from None
    pixels = torch.from_numpy(loaded.data).permute(0, 3, 1, 2).contiguous()
    if size != pixels.shape[-1]:
        pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    return ImageSet(torch.tensor(loaded.targets), loaded.classes, pixels, size=size)


def find_tree(dataset: str, root: pathlib.Path, split: str, size: int) -> ImageSet:
    """Tiny-ImageNet as published, or an ImageNet-like tree; ImageNet-100 is picked out of ImageNet-1k by its class list."""
    if dataset == "tinyimagenet":
        root = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
        if split == "test":
            return read_tiny_imagenet_val(root, size)
    folders = [root / dataset, root] if dataset != "folder" else [root]
    names = ["train"] if split == "train" else ["val", "test"]
    for folder in (f / name for f in folders for name in names):
        if folder.is_dir():
            return read_tree(folder, size, IMAGENET100 if dataset == "imagenet100" else None)
    if dataset == "folder" and split == "train" and root.is_dir():
        return read_tree(root, size)
    raise UsageError(f"no {split} images for {dataset}: {' or '.join(str(f / names[0]) for f in folders)} is not a folder (set --data)")


def read_tiny_imagenet_val(root: pathlib.Path, size: int) -> ImageSet:
    """val/images/*.JPEG with val_annotations.txt (file, wnid, box): the published layout, without moving a file."""
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise UsageError(f"{annotations} is missing: want Tiny-ImageNet as published, unzipped below --data")
    classes = sorted(p.name for p in (root / "train").iterdir() if p.is_dir())
    rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines() if line]
    rows = [(str(root / "val" / "images" / name), classes.index(wnid)) for name, wnid in rows if (root / "val" / "images" / name).exists()]
    if not rows:
        raise RunError(f"{root / 'val' / 'images'} holds none of the images that {annotations} names")
    return ImageSet(torch.tensor([label for _, label in rows]), classes, files=[path for path, _ in rows], size=size)


# Tian et al. 2020, "Contrastive Multiview Coding", imagenet100.txt of the official code
IMAGENET100 = """
n02869837 n01749939 n02488291 n02107142 n13037406 n02091831 n04517823 n04589890 n03062245 n01773797 n01735189 n07831146 n07753275
n03085013 n04485082 n02105505 n01983481 n02788148 n03530642 n04435653 n02086910 n02859443 n13040303 n03594734 n02085620 n02099849
n01558993 n04493381 n02109047 n04111531 n02877765 n04429376 n02009229 n01978455 n02106550 n01820546 n01692333 n07714571 n02974003
n02114855 n03785016 n03764736 n03775546 n02087046 n07836838 n04099969 n04592741 n03891251 n02701002 n03379051 n02259212 n07715103
n03947888 n04026417 n02326432 n03637318 n01980166 n02113799 n02086240 n03903868 n02483362 n04127249 n02089973 n03017168 n02093428
n02804414 n02396427 n04418357 n02172182 n01729322 n02113978 n03787032 n02089867 n02119022 n03777754 n04238763 n02231487 n03032252
n02138441 n02104029 n03837869 n03494278 n04136333 n03794056 n03492542 n02018207 n04067472 n03930630 n03584829 n02123045 n04229816
n02100583 n03642806 n04336792 n03259280 n02116738 n02108089 n03424325 n01855672 n02090622
""".split()

# ------------------------------------------------------------------------------------------- augmentation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's for every set, so that any backbone can be probed on any set


def crop_weights(start: Tensor, length: Tensor, flip: Tensor, source: int, size: int) -> Tensor:
    """Rows of the matrices that cut [start, start + length) out of `source` pixels and resize it to `size`: (..., size, source).

    Bilinear with antialiasing: a triangle of half-width max(length / size, 1) source pixels around each target pixel's centre, cut at
    the crop's edge and normalised, which is what torchvision's resize does. start, length and flip (bool, mirrors the result) are (...).
    """
    start, scale = start[..., None, None], (length / size)[..., None, None]                 # (..., 1, 1) source pixels per target pixel
    target = torch.arange(0.5, size, device=start.device)
    target = torch.where(flip[..., None], size - target, target)[..., None]                 # (..., S, 1)
    place = torch.arange(0.5, source, device=start.device) - start                          # (..., 1, W) in the crop
    weights = (1 - (place - target * scale).abs() / scale.clamp(min=1)).clamp(min=0)        # (..., S, W)
    weights = weights * ((place > 0) & (place < size * scale))
    return weights / weights.sum(-1, keepdim=True)


def resized_crop(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor, size: int) -> Tensor:
    """Crop (B,) boxes in whole pixels, resize to size x size, mirror where flip: (B, 3, H, W) -> (B, 3, size, size), two matmuls."""
    h, w = images.shape[2:]
    start, length, mirror = torch.stack([top, left]), torch.stack([height, width]), torch.stack([torch.zeros_like(flip), flip])
    rows, columns = crop_weights(start, length, mirror, max(h, w), size)[:, :, None]        # (B, 1, S, max(H, W)) each, 0 outside the box
    return rows[..., :h] @ images @ columns[..., :w].transpose(2, 3)


def grayscale(x: Tensor) -> Tensor:
    """ITU-R 601 luma as torchvision weighs it: (B, 3, H, W) -> (B, 1, H, W)."""
    return (x[:, 0:1] * 0.2989).add(x[:, 1:2], alpha=0.587).add(x[:, 2:3], alpha=0.114)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """x in [0, 1] (B, 3, H, W), factor (B, 1, 1, 1), 1 = unchanged; likewise contrast and saturation."""
    return (x * factor).clamp(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(grayscale(x).mean((2, 3), keepdim=True), x, factor).clamp(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(grayscale(x), x, factor).clamp(0, 1)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by shift (B, 1, 1, 1) of a full circle, in [-0.5, 0.5], through HSV without branches."""
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - low                                                                    # (B, 1, H, W)
    r, g, b = x.split(1, 1)
    sector = torch.where(value == r, g - b, torch.where(value == g, b - r, r - g)) / chroma.clamp(min=1e-12)
    sector = sector + torch.where(value == r, 0.0, torch.where(value == g, 2.0, 4.0)) + 6 * shift  # hue in sixths of a circle
    k = (sector + torch.arange(5, 0, -2, device=x.device)[:, None, None]) % 6               # (B, 3, H, W): 5, 3, 1 for R, G, B
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def blur_basis(radius: int, size: int) -> Tensor:
    """(2 radius + 1, size * size): which source pixel each target pixel reads at each offset, mirrored at the edges."""
    offset = torch.arange(-radius, radius + 1)[:, None]
    source = (torch.arange(size) + offset).abs()                                            # (K, S)
    source = torch.where(source >= size, 2 * (size - 1) - source, source)
    return F.one_hot(source, size).float().flatten(1)


def gaussian_blur(x: Tensor, sigma: Tensor, on: Tensor, basis: Tensor) -> Tensor:
    """Gaussian of sigma (B,) pixels where on (B,): the same two matmuls for rows and columns. basis from blur_basis."""
    offset = torch.arange(len(basis), device=x.device) - len(basis) // 2                    # (K,)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)                               # (B, K)
    kernel = torch.where(on[:, None], kernel / kernel.sum(1, keepdim=True), (offset == 0).float())
    band = (kernel @ basis).unflatten(1, (x.shape[2], x.shape[3]))[:, None]                 # (B, 1, S, S)
    return band @ x @ band.transpose(2, 3)


def solarize(x: Tensor, on: Tensor) -> Tensor:
    """Invert the pixels from 0.5 up where on (B, 1, 1, 1)."""
    return torch.where(on & (x >= 0.5), 1 - x, x)


UNIFORMS = 32  # numbers per sample: ten areas, ten ratios, two places, flip, jitter on and four strengths, gray, blur and sigma, solarize


class BatchAugment(nn.Module):
    """The augmentation of a whole batch on its own device, each sample with its own parameters, in float32.

    size: pixels of a view. scale: share of the area that a crop keeps. flip, jitter_p, gray_p, blur_p, solarize_p: probabilities per
    sample. jitter: strengths of brightness, contrast, saturation, hue, applied in an order drawn once per call. The defaults are
    SimCLR's for CIFAR (Chen et al. 2020, B.9: strength 0.5, no blur) up to 64 pixels, and MoCo v2's above: the same with blur at 0.5,
    which is what blur_p None means. blur uses a kernel of a tenth of the view.
    """

    def __init__(self, size: int, scale: tuple = (0.2, 1.0), flip: float = 0.5, jitter: tuple = (0.4, 0.4, 0.4, 0.1), jitter_p: float = 0.8,
                 gray_p: float = 0.2, blur_p: float | None = None, blur_sigma: tuple = (0.1, 2.0), solarize_p: float = 0.0):
        super().__init__()
        self.size, self.scale, self.flip, self.jitter, self.jitter_p = size, scale, flip, jitter, jitter_p
        self.gray_p, self.blur_sigma, self.solarize_p = gray_p, blur_sigma, solarize_p
        self.blur_p = (0.5 if size > 64 else 0.0) if blur_p is None else blur_p
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.register_buffer("strengths", torch.tensor(jitter, dtype=torch.float32), persistent=False)
        self.register_buffer("basis", blur_basis(max(1, size // 20), size), persistent=False)

    def forward(self, images: Tensor, generator: torch.Generator | None = None, views: int = 1) -> Tensor:
        """images (B, 3, H, W), uint8 or float in [0, 1] -> (views * B, 3, size, size) normalised float, view by view.

        generator: on the CPU, so that every device gets the same numbers; None is torch's own. The processes of a job take their
        parts of the numbers that one process would draw for the whole batch.
        """
        uniform = torch.rand(views, world(), len(images), UNIFORMS, generator=generator)[:, rank()].flatten(0, 1)
        order = torch.randperm(4, generator=generator).tolist()
        if images.is_cuda:
            uniform = uniform.pin_memory()  # from pageable memory the copy would wait for the device
        return self.apply(images.repeat(views, 1, 1, 1), uniform.to(images.device, non_blocking=True), order)

    def boxes(self, u: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """RandomResizedCrop.get_params, vectorised: u (B, 22) uniforms -> top, left, height, width (B,) in whole pixels.

        The first of ten proposals that fits is taken; where none does, the largest centred box within the aspect limits.
        """
        area = height * width * (self.scale[0] + u[:, :10] * (self.scale[1] - self.scale[0]))
        ratio = torch.exp(math.log(3 / 4) + u[:, 10:20] * math.log(16 / 9))
        w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()                 # (B, 10)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = fits.to(torch.uint8).argmax(1, keepdim=True)
        found = fits.gather(1, first).squeeze(1)
        w = torch.where(found, w.gather(1, first).squeeze(1), min(width, round(height * 4 / 3)))
        h = torch.where(found, h.gather(1, first).squeeze(1), min(height, round(width * 4 / 3)))
        top = torch.where(found, (u[:, 20] * (height - h + 1)).floor(), ((height - h) / 2).floor())
        left = torch.where(found, (u[:, 21] * (width - w + 1)).floor(), ((width - w) / 2).floor())
        return top, left, h, w

    def apply(self, images: Tensor, u: Tensor, order: list[int]) -> Tensor:
        """The deterministic part: u (B, UNIFORMS) in [0, 1), order a permutation of the four colour operations."""
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        x = resized_crop(x, *self.boxes(u[:, :22], *images.shape[2:]), u[:, 22] < self.flip, self.size)
        if any(self.jitter):
            strength = (2 * u[:, 24:28] - 1) * self.strengths * (u[:, 23:24] < self.jitter_p)  # (B, 4)
            factor = (1 + strength)[:, :, None, None, None]
            for i in order:
                if self.jitter[i]:
                    x = (brightness, contrast, saturation)[i](x, factor[:, i]) if i < 3 else hue(x, strength[:, 3, None, None, None])
        if self.gray_p:
            x = torch.where((u[:, 28] < self.gray_p)[:, None, None, None], grayscale(x), x)
        if self.blur_p:
            sigma = self.blur_sigma[0] + u[:, 30] * (self.blur_sigma[1] - self.blur_sigma[0])
            x = gaussian_blur(x, sigma, u[:, 29] < self.blur_p, self.basis)
        if self.solarize_p:
            x = solarize(x, (u[:, 31] < self.solarize_p)[:, None, None, None])
        return (x - self.mean) / self.std


def center_view(images: Tensor, size: int) -> Tensor:
    """Evaluation input: the centre size x size of (B, 3, H, H) uint8, normalised like BatchAugment's views."""
    margin = (images.shape[2] - size) // 2
    x = images[:, :, margin:margin + size, margin:margin + size].float() / 255
    return (x - x.new_tensor(MEAN)[:, None, None]) / x.new_tensor(STD)[:, None, None]


# ------------------------------------------------------------------------------------------- backbone


def resnet(arch: str, stem: str) -> nn.Module:
    """torchvision's ResNet without its classifier: (B, 3, H, W) -> (B, dim) average-pooled features, .dim beside it.

    arch: resnet10 (one basic block a stage), resnet18, resnet34, resnet50. stem: "imagenet" (7x7 stride 2, max-pool) or
    "cifar" (3x3 stride 1, no pool; He et al. 2016, 4.2). The state-dict keys are torchvision's, without fc.
    """
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    block, layers = {"resnet10": (BasicBlock, [1, 1, 1, 1]), "resnet18": (BasicBlock, [2, 2, 2, 2]),
                     "resnet34": (BasicBlock, [3, 4, 6, 3]), "resnet50": (Bottleneck, [3, 4, 6, 3])}[arch]
    model = ResNet(block, layers)
    model.dim = model.fc.in_features
    model.fc = nn.Identity()
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


def pick_size(size: int, dataset: str) -> int:
    """0 -> the dataset's own. Raises UsageError for views of which a ResNet's five halvings leave nothing to blur or crop."""
    if 0 < size < 8:
        raise UsageError(f"--size {size}: want 0 or 8 or more pixels")
    return size or SIZES[dataset]


def pick_stem(stem: str, size: int) -> str:
    """ "auto" -> the CIFAR stem up to 64 pixels, ImageNet's above."""
    return ("cifar" if size <= 64 else "imagenet") if stem == "auto" else stem


@torch.no_grad()
def outputs(module: nn.Module, images: ImageSet, size: int, device: torch.device, workers: int = 0, batch: int = 500):
    """Yields (module's outputs (B, dim) float32, positions (B,)) of an ImageSet's centre views in eval mode, batch by batch, for the images
    that decode. The processes of a job share the work and all get everything. The module's mode is put back."""
    mode = module.training
    module.eval()
    parts = [chunk.tensor_split(world())[rank()] for chunk in torch.arange(len(images)).split(batch)]
    for x, index in images.batches(parts, device, workers):
        x = center_view(x, size).contiguous(memory_format=torch.channels_last)
        yield gather_rows(module(x).float()), gather_rows(index)
    module.train(mode)
    images.report_broken()


def features(encoder: nn.Module, images: ImageSet, size: int, device: torch.device, workers: int = 0) -> tuple[Tensor, Tensor]:
    """Frozen features (N, dim) float32 of an ImageSet's centre views, and their labels (N,); N is the number of images that decode."""
    rows, positions = map(torch.cat, zip(*outputs(encoder, images, size, device, workers)))
    return rows, images.labels.to(device)[positions]


# ------------------------------------------------------------------------------------------- precision and optimisers


def pick_device(name: str) -> torch.device:
    """ "auto" -> cuda, then mps, then cpu; under torchrun the process's own GPU. Raises UsageError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda:") and world() > 1:
        raise UsageError(f"--device {name}: under torchrun each process takes its own GPU; want --device cuda")
    try:
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(name)
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from None


def pick_dtype(amp: str, device: torch.device) -> torch.dtype:
    """The autocast type; float32 means none. auto = bf16 where the hardware computes in it. Raises UsageError for fp16 without CUDA."""
    if amp == "auto":
        if device.type == "cuda":
            native = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            native = device.type == "cpu" and any(f in _cpu_flags() for f in ("avx512_bf16", "amx_bf16", "bf16"))
        return torch.bfloat16 if native else torch.float32
    if amp == "fp16" and device.type != "cuda":
        raise UsageError(f"--amp fp16 needs a CUDA device, not {device.type}")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]


def _cpu_flags() -> list[str]:
    info = pathlib.Path("/proc/cpuinfo")
    return info.read_text().split() if info.exists() else []


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled, per tensor, by trust * |w| / |g + wd w| (You et al. 2017, algorithm 1).

    Vectors and scalars (biases, norms, gates) get neither decay nor scaling, as in SimCLR's and Barlow Twins' official code.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.9, trust: float = 0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    w, g = p.norm(), update.norm()
                    update = update * torch.where((w > 0) & (g > 0), group["trust"] * w / g, 1.0)
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(update)
                p.add_(buffer, alpha=-group["lr"])


def make_optimizer(name: str, model: nn.Module, lr: float, wd: float, device: torch.device) -> torch.optim.Optimizer:
    """sgd decays every parameter but scalars, as the methods' official CIFAR code does; adamw and lars leave biases and norms alone."""
    params = [p for p in model.parameters() if p.requires_grad]
    if name == "lars":
        return LARS(params, lr, weight_decay=wd)
    bare = [p for p in params if p.ndim < (1 if name == "sgd" else 2)]
    groups = [{"params": [p for p in params if not any(p is q for q in bare)], "weight_decay": wd}, {"params": bare, "weight_decay": 0.0}]
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=0.9, fused=device.type in ("cuda", "cpu"))
    return torch.optim.AdamW(groups, lr, fused=device.type in ("cuda", "cpu"))


def cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the base rate at a step: linear to 1 over the warm-up, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ------------------------------------------------------------------------------------------- run


def write_checkpoint(path: pathlib.Path, state: dict) -> None:
    """Write a dict of tensors and plain values so that a crash at any moment leaves a whole file: temporary file, fsync, rename.

    The file that stood there is kept beside it as <name>.previous. A SHA-256 of the contents is stored as the zip file's own comment,
    so torch.load reads the file as any other. Raises RunError, the old file untouched, where it cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()[:-2]  # a zip file ends in the length of its comment, here 0
    data += DIGEST_BYTES.to_bytes(2, "little")
    data += hashlib.sha256(data).hexdigest().encode()
    new = path.with_suffix(".tmp")
    try:
        with open(new, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, path.with_suffix(".previous"))
        os.replace(new, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the renames too, so that they survive a power cut
        os.close(folder)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise RunError(f"could not save {path} ({error.strerror}); the checkpoint before it is untouched") from None


DIGEST_BYTES = 64


def read_checkpoint(path: pathlib.Path) -> dict:
    """The dict that write_checkpoint wrote. Raises RunError where the digest does not fit, or where the file holds more than tensors and
    plain values, which is never unpickled."""
    data = path.read_bytes()
    if len(data) < DIGEST_BYTES or hashlib.sha256(data[:-DIGEST_BYTES]).hexdigest().encode() != data[-DIGEST_BYTES:]:
        raise RunError(f"{path} is truncated, damaged, or no checkpoint of ours: its digest does not fit its contents")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise RunError(f"{path} is no checkpoint of ours: {str(error).splitlines()[0]}") from None


def seeded(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the numbers and names of its key and on nothing else."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def git_sha() -> str:
    """The commit of this file's repository, with -dirty behind it if files differ from it; "unknown" outside a repository."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=pathlib.Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() or "unknown"
    except FileNotFoundError:  # no git on this machine
        return "unknown"


def device_name(device: torch.device) -> str:
    """What a result row calls the hardware: the GPU's name, or the CPU's with the threads that were used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = pathlib.Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{model[1] if model else device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def spectrum(x: Tensor) -> dict[str, float]:
    """Two signs of collapse in features (N, D): `feature_std`, the mean over dimensions of the standard deviation of unit rows times
    sqrt(D) (1 = spread evenly, 0 = one point; Chen & He 2021, fig. 2), and `effective_rank`, exp of the entropy of the normalised
    singular values (Roy & Vetterli 2007)."""
    unit = F.normalize(x.float(), dim=1)
    singular = torch.linalg.svdvals(unit - unit.mean(0))
    p = singular / singular.sum().clamp(min=1e-12)
    return {"feature_std": round(unit.std(0).mean().item() * unit.shape[1] ** 0.5, 4),
            "effective_rank": round(torch.special.entr(p).sum().exp().item(), 2)}


def save_grid(path: pathlib.Path, views: Tensor, columns: int) -> None:
    """A PNG of normalised images (N, 3, S, S), `columns` to a row."""
    from torchvision.utils import save_image

    if rank():
        return
    x = views.float().cpu() * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(x.clamp(0, 1), path, nrow=columns)
    print(f"wrote {path}")


class Run:
    """One pretraining run: its data, device, precision, schedule, log and checkpoint. A training loop reads

        run = Run(cfg, "method", "variant"); ...build the modules...; run.start(model, encoder)
        for images, index in run.batches():             # uint8 (B, 3, H, H) on the device, positions (B,)
            with run.autocast(): loss = ...
            run.optimise(loss)
            run.log(loss=loss)
    and everything between two steps (schedule, log line, online kNN, checkpoint, signals) happens inside batches().
    """

    def __init__(self, cfg, method: str, variant: str = ""):
        join_processes()
        self.cfg, self.method, self.variant = cfg, method, variant
        self.out = pathlib.Path(cfg.out or f"runs/{cfg.dataset}/{method}")
        self.device = pick_device(cfg.device)
        self.dtype = pick_dtype(cfg.amp, self.device)
        self.save_every = parse_interval(cfg.save_every)
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = not cfg.deterministic
        self.size = pick_size(cfg.size, cfg.dataset)
        self.stem = pick_stem(cfg.stem, self.size)
        if self.device.type == "cpu" and self.stem == "imagenet" and self.size <= 16:
            # oneDNN leaves parts of the weight gradient of a strided bf16 convolution on 1 x 1 inputs unwritten.
            self.dtype = torch.float32
        images = load_images(cfg.dataset, cfg.data, "train", self.size, cfg.workers, cfg.limit, cfg.cache)
        if cfg.batch % world():
            raise UsageError(f"--batch {cfg.batch} is over all processes, and {world()} do not divide it")
        self.batch = cfg.batch // world()  # of this process
        if len(images) < cfg.batch:
            raise UsageError(f"--batch {cfg.batch} is larger than the {len(images)} training images")
        if images.files is None:
            images.pixels = images.pixels.to(self.device)
        torch.manual_seed(cfg.seed)  # after the images: workers that decode draw from the same generator
        self.images = images
        self.steps_per_epoch = len(images) // cfg.batch
        self.steps = self.steps_per_epoch * cfg.epochs
        self.lr = cfg.lr * cfg.batch / 256
        self.epoch = self.step = 0
        self.bad_steps = self.worst = torch.zeros((), dtype=torch.long, device=self.device)  # in a row, now and at most
        self.sums: dict[str, Tensor] = {}
        self.seconds, self.stopping = 0.0, 0

    def start(self, model: nn.Module, encoder: nn.Module, bank: nn.Module | None = None, sharded: bool = False) -> None:
        """Move the modules to the device, make the optimizer, claim the folder, and go on from its checkpoint if it has one.

        model holds all that is trained or averaged, encoder among it; bank is saved and restored beside it, put together from the
        processes' parts if it is sharded. Raises UsageError where the folder belongs to another configuration or to a run that is
        alive, RunError where its checkpoints are damaged.
        """
        self.sharded = sharded and world() > 1
        self.model = synchronise_norms(model, self.device).to(self.device, memory_format=torch.channels_last)
        self.encoder, self.bank = encoder, None if bank is None else bank.to(self.device)
        self.optimizer = make_optimizer(self.cfg.optimizer, model, self.lr, self.cfg.wd, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if self.cfg.compile and not self.cfg.deterministic:
            encoder.compile()
        if self.cfg.preview:
            return
        if rank() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / "lock", "w")  # the kernel lets go of it when the process ends, however it ends
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{self.out} belongs to a run that is alive; choose another --out") from None
        header = {"method": self.method, "variant": self.variant, "config": vars(self.cfg), "arch": self.cfg.arch, "stem": self.stem, "size": self.size,
                  "images": len(self.images), "steps": self.steps, "effective_lr": self.lr, "precision": str(self.dtype).removeprefix("torch."),
                  "device": device_name(self.device), "processes": world(), "parameters": sum(p.numel() for p in model.parameters()),
                  "encoder_parameters": sum(p.numel() for p in encoder.parameters()),
                  "sha": git_sha(), "torch": torch.__version__, "command": launched_by(),
                  "started": datetime.datetime.now().isoformat(timespec="seconds")}
        say(f"{self.method} {self.variant}: {self.cfg.dataset}, {len(self.images)} images, {self.steps} steps ({self.cfg.epochs} epochs), "
            f"lr {self.lr:.4g} = {self.cfg.lr:g} x {self.cfg.batch}/256, {header['device']}, {header['precision']}, "
            f"{header['parameters'] / 1e6:.1f} M parameters -> {self.out}")
        self._resume(header)
        if len(set(gather(torch.tensor([self.step])).tolist())) > 1:
            raise RunError(f"the processes found different checkpoints in {self.out}: want a folder that all of them see")

    def _resume(self, header: dict) -> None:
        path, log = self.out / "checkpoint.pt", self.out / "log.jsonl"
        candidates = [p for p in (path, path.with_suffix(".previous")) if p.exists()]
        for candidate in candidates:
            try:
                state = read_checkpoint(candidate)
                break
            except RunError as error:
                print(f"{error}; trying the one before it", file=sys.stderr)
        else:
            if candidates:
                raise RunError(f"no checkpoint in {self.out} can be read; move the folder away to start anew")
            if log.exists() and (keys := self._differing(json.loads(log.read_text().splitlines()[0])["config"])):
                raise UsageError(f"{self.out} holds the log of another run: {keys}; choose another --out")
            if rank() == 0:
                write_text(log, json.dumps(header) + "\n")
            return
        missing = [key for key in CHECKPOINT_KEYS if key not in state]
        if missing:
            raise RunError(f"{candidate} has no {', '.join(missing)}")
        if state["method"] != self.method:
            raise UsageError(f"{self.out} holds a checkpoint of {state['method']}, not of {self.method}; choose another --out")
        if keys := self._differing(state["config"]):
            raise UsageError(f"{self.out} holds a checkpoint of another configuration: {keys}; choose another --out, or the same flags")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.sharded:
                state["bank"]["rows"] = state["bank"]["rows"][self.bank.offset:self.bank.offset + len(self.bank.rows)]
            if self.bank is not None:
                self.bank.load_state_dict(state["bank"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise RunError(f"{candidate} does not fit this model: {error}") from None
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.bad_steps = state["bad_steps"].to(self.device)
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        # Lines written after the checkpoint are written again, so the log reads as if nothing had happened.
        if rank() == 0:
            lines = log.read_text().splitlines() if log.exists() else [json.dumps(header)]
            write_text(log, "\n".join(lines[:1 + self.epoch]) + "\n")
        say(f"resumed at step {self.step} of {self.steps} from {candidate}")

    def _differing(self, other: dict) -> str:
        """The fields in which another run's configuration differs, as "name (theirs, not ours)", or an empty string."""
        ours = vars(self.cfg)
        names = [n for n in sorted({*ours, *other} - FREE_FIELDS) if ours.get(n) != other.get(n)]
        return ", ".join(f"{n} ({other.get(n)!r}, not {ours.get(n)!r})" for n in names)

    def save(self) -> None:
        """Everything needed to go on bit for bit, to OUT/checkpoint.pt. Raises RunError, nothing written, where a value is not finite."""
        model, bank = self.model.state_dict(), {} if self.bank is None else self.bank.state_dict()
        if not torch.stack(torch._foreach_norm([v for v in (*model.values(), *bank.values()) if v.is_floating_point()])).sum().isfinite():
            raise RunError(f"parameters are not finite after step {self.step} (lr {self.optimizer.param_groups[0]['lr']:.4g}); {ADVICE}")
        self.saved = (time.monotonic(), self.step)
        if self.sharded:
            bank["rows"] = collect(bank["rows"])
        if rank():
            return
        write_checkpoint(self.out / "checkpoint.pt", {
            "method": self.method, "arch": self.cfg.arch, "stem": self.stem, "epoch": self.epoch, "step": self.step, "config": vars(self.cfg),
            "model": model, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "bank": bank,
            "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None},
            "sums": self.sums, "seconds": self.seconds, "bad_steps": self.bad_steps})

    def generator(self, purpose: str = "views", device: torch.device | str = "cpu") -> torch.Generator:
        """The random numbers of this step, the same after a restart; another purpose gives others."""
        return seeded(purpose, self.cfg.seed, self.step, device=device)

    def autocast(self):
        """The forward pass's precision."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def batches(self):
        """Yields (images, index) for every step that is left, and does what lies between two steps. Ends with the final files."""
        if self.epoch == self.cfg.epochs and (self.out / "backbone.pt").exists():
            say(f"nothing left to do: {self.out / 'backbone.pt'}")
            return
        self.saved, self.progress = (time.monotonic(), self.step), Progress(self)
        handlers = {n: signal.signal(n, lambda number, frame: setattr(self, "stopping", number)) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield from self._epochs()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _epochs(self):
        broken = 0
        while self.epoch < self.cfg.epochs:
            order = torch.randperm(len(self.images), generator=seeded("order", self.cfg.seed, self.epoch))
            order = order.to(self.device if self.images.files is None else "cpu").split(self.cfg.batch)[:self.steps_per_epoch]
            order = [batch.chunk(world())[rank()] for batch in order]
            began = time.monotonic()
            for images, index in self.images.batches(list(order[self.step - self.epoch * self.steps_per_epoch:]), self.device, self.cfg.workers):
                rate = self.lr * cosine(self.step, self.steps, round(self.cfg.warmup * self.steps_per_epoch))
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                if len(index) < self.batch:  # the place of an image that does not decode is taken by another of its batch
                    if not len(index):
                        raise RunError(f"no image of a batch decodes: {'; '.join([*self.images.broken.values()][:20])}")
                    again = torch.arange(self.batch, device=self.device) % len(index)
                    images, index = images[again], index[again]
                yield images, index
                self.step += 1
                self.progress.step()
                stopping, due = self._agreed()
                if stopping or due:
                    self.seconds, began = self.seconds + time.monotonic() - began, time.monotonic()
                    self.save()
                if stopping:
                    meet()  # torchrun kills the rest of a job soon after one of it has ended, process 0 at its save too
                    say(f"stopped by {signal.Signals(stopping).name}; saved at step {self.step} of {self.steps}: the same command goes on from here")
                    raise SystemExit(128 + stopping)
            self.seconds += time.monotonic() - began
            self.epoch += 1
            broken = self.images.report_broken(broken)
            self._end_epoch()
        self.save()
        if rank() == 0:
            tensors = {key: value.cpu() for key, value in self.encoder.state_dict().items()}
            write_checkpoint(self.out / "backbone.pt", {**tensors, "arch": self.cfg.arch, "stem": self.stem})
        say(f"done in {self.seconds / 60:.1f} min: {self.out / 'backbone.pt'}")

    def _agreed(self) -> tuple[int, bool]:
        """The signal that asks for an end (0 = none) and whether a checkpoint is due, the same on all processes."""
        seconds, steps = self.save_every
        due = time.monotonic() - self.saved[0] >= seconds or self.step - self.saved[1] >= steps
        if world() == 1:
            return self.stopping, due
        flags = torch.tensor([self.stopping, due])  # on the CPU, so that no GPU is waited for
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return int(flags[0]), bool(flags[1])

    def optimise(self, loss: Tensor) -> None:
        """Backward and one optimizer step. Raises RunError, nothing changed, on a loss that is not finite; in fp16, where the scaler skips a
        step with such a gradient and lowers its scale, on the fifth in a row. Skipped steps are counted in the log."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if world() > 1:
            average_gradients(self.model)
        fp16 = self.scaler.is_enabled()
        finite = loss.detach().isfinite()
        if fp16:
            self.scaler.unscale_(self.optimizer)
            finite &= torch.stack(torch._foreach_norm([p.grad for p in self.model.parameters() if p.grad is not None])).sum().isfinite()
            self.log(skipped_steps=self.steps_per_epoch * ~finite)  # the log's mean over the epoch is then their number
        self.bad_steps = torch.where(finite, 0, self.bad_steps + 1)
        self.worst = torch.maximum(self.worst, self.bad_steps)
        if self.device.type == "cpu" or self.step % 50 == 0:  # elsewhere the check waits for the device, so not at every step
            self._stop_if_bad(f"the loss is {loss.item()} at step {self.step}")
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _stop_if_bad(self, what: str) -> None:
        fp16 = self.scaler.is_enabled()
        if self.worst >= (5 if fp16 else 1):
            raise RunError(f"{what} (lr {self.optimizer.param_groups[0]['lr']:.4g})"
                           + (f", gradients were not finite in {self.worst.item()} steps in a row" if fp16 else "") + f"; {ADVICE}")

    @torch.no_grad()
    def log(self, **values: Tensor) -> None:
        """Add this step's values (scalars or small vectors) to the epoch's means; nothing leaves the device here."""
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def _end_epoch(self) -> None:
        self._stop_if_bad(f"the loss was not finite in epoch {self.epoch}")
        means = {name: rounded((value / self.steps_per_epoch).tolist()) for name, value in self.sums.items()}
        self.sums = {}
        line = {"epoch": self.epoch, "step": self.step, "lr": rounded(self.optimizer.param_groups[0]["lr"]), **means}
        if self.cfg.knn_every and (self.epoch % self.cfg.knn_every == 0 or self.epoch == self.cfg.epochs):
            line |= self.monitor()
        line |= {"images_per_s": round(self.progress.rate, 1), "minutes": round(self.seconds / 60, 3)}
        if rank() == 0:
            append_line(self.out / "log.jsonl", json.dumps(line))
        self.progress.epoch(line)

    @torch.no_grad()
    def monitor(self) -> dict[str, float]:
        """Online kNN and collapse signs on training images alone: at most 2,000 of a held-out tenth are classified by the labels of at
        most 10,000 others. The test split stays unseen. Without labels only the collapse signs."""
        order = torch.randperm(len(self.images), generator=seeded("monitor"))
        query = self.images.subset(order[:min(2000, max(1, len(order) // 10))])
        bank = self.images.subset(order[len(query):len(query) + 10_000])
        with self.autocast():
            test, train = (features(self.encoder, images, self.size, self.device, self.cfg.workers) for images in (query, bank))
        result = spectrum(test[0])
        if len(bank) and len(self.images.classes) > 1:
            from linear_probe import knn

            result = {"knn_top1": round(knn(*train, *test), 2), **result}
        return result


ADVICE = "the checkpoint before it is untouched; try a lower --lr or a longer --warmup, with another --out"
CHECKPOINT_KEYS = ["method", "arch", "stem", "epoch", "step", "config", "model", "optimizer", "scaler", "bank", "rng", "sums", "seconds", "bad_steps"]


class Progress:
    """The live line on a terminal, plain epoch lines elsewhere, and the estimate of the end."""

    def __init__(self, run: Run):
        self.run, self.live, self.first = run, sys.stdout.isatty() and rank() == 0, run.step
        self.clear = "\r\033[K" if self.live else ""
        self.began = self.mark = time.monotonic()
        self.mark_step = run.step
        self.rate = 0.0  # images/s since the last epoch ended; an image counts once, however many views are made of it

    def left(self) -> float:
        """Seconds to the end at the pace since this process started."""
        return (time.monotonic() - self.began) / max(1, self.run.step - self.first) * (self.run.steps - self.run.step)

    def step(self) -> None:
        run, now = self.run, time.monotonic()
        self.rate = (run.step - self.mark_step) * run.cfg.batch / max(1e-9, now - self.mark)
        if run.step - self.first == min(20, run.steps):
            line = f"estimated end in {duration(self.left())}"
            if run.device.type == "cpu" and self.left() > 86400:
                line += "; on a CPU use the small network: --arch resnet10 --stem imagenet, with --limit and fewer --epochs"
            say(line)
        if self.live:
            place = f"{run.epoch + 1}/{run.cfg.epochs} step {run.step}/{run.steps}"
            print(f"{self.clear}{place} {self.rate:.0f} images/s, {duration(self.left())} left", end="", flush=True)

    def epoch(self, line: dict) -> None:
        shown = " ".join(f"{k} {v}" for k, v in line.items() if k not in ("epoch", "step", "lr", "minutes"))
        say(f"{self.clear}epoch {line['epoch']}/{self.run.cfg.epochs} {shown}, {duration(self.left())} left")
        self.mark, self.mark_step = time.monotonic(), self.run.step


def parse_interval(text: str) -> tuple[float, float]:
    """ "90s", "10m", "2h" -> (seconds, inf); "500steps" -> (inf, steps). Raises UsageError for anything else."""
    match = re.fullmatch(r"(\d+)(s|m|h|steps)", text)
    if not match or int(match[1]) == 0:
        raise UsageError(f"--save-every {text}: want 90s, 10m, 2h or 500steps")
    if match[2] == "steps":
        return math.inf, int(match[1])
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]], math.inf


def append_line(path: pathlib.Path, line: str) -> None:
    """Add a line to a log, safe on the disk before anything that relies on it. Raises RunError where it cannot be written."""
    try:
        with open(path, "a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError(f"could not write {path} ({error.strerror})") from None


def write_text(path: pathlib.Path, text: str) -> None:
    """Replace a small text file in one step: a crash leaves the old one or the new one. Raises RunError where it cannot be written."""
    new = path.with_name(path.name + ".tmp")
    try:
        with open(new, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise RunError(f"could not write {path} ({error.strerror})") from None


def duration(seconds: float) -> str:
    """Seconds as a person reads them: 45s, 12m, 3h10m, 14d."""
    minutes = int(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f}s"
    if minutes < 120:
        return f"{minutes}m"
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes < 2880 else f"{minutes // 1440}d"


def rounded(value):
    """Six significant digits, for the log."""
    return [rounded(v) for v in value] if isinstance(value, list) else float(f"{value:.6g}")
