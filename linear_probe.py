"""How good are frozen features? kNN and linear probes of a backbone, as one result row.

    python linear_probe.py --backbone runs/cifar10/bassl/backbone.pt        # data set and data as in its log
    python linear_probe.py --backbone runs/cifar10/bassl/backbone.pt --dataset cifar100         # transfer
    python linear_probe.py --backbone resnet50.pth --arch resnet50 --dataset imagenet100 --data DIR
    python linear_probe.py --random --dataset cifar10                       # an untrained network
    python linear_probe.py --backbone runs/shapes/bassl/backbone.pt --neighbours neighbours.png
    python linear_probe.py --backbone FILE --dataset folder --data DIR --features features.npz  # embeddings

Features are the average-pooled outputs of the bare backbone in eval mode, in bf16 where the hardware has it
(--amp); heads are fitted in float32. Metrics are top-1 in percent:
    knn_top1      cosine kNN, k = 200, T = 0.1 (lightly)
    knn20_top1    cosine kNN, k = 20, T = 0.07 (solo-learn)
    knn10_top1    cosine kNN, k = 10, every neighbour one vote (dkobak/simclr-cifar10)
    probe_top1    logistic regression on cached features; L-BFGS, L2 chosen on a tenth of the training images
    linear_top1   SGD on normalised features: lr 0.1 x batch/256, momentum 0.9, no decay, cosine, views by
                  crop (0.08, 1) and flip
Nothing is chosen on the test split; --split held-out leaves it alone and tests on a tenth of the training
images, for choices. The row goes to results.jsonl beside the backbone, in place of an older one of the same
probe, and is rewritten as its metrics come.
"""
import dataclasses
import fcntl
import hashlib
import json
import math
import pathlib
import re
import textwrap
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import save_image

import common
from common import BatchAugment, ImageSet, RunError, UsageError, features, knn, rank, resnet, seeded, world


@dataclass
class Config:
    backbone: str = ""           # file of a ResNet's weights, torchvision's keys below any prefix
    random: bool = False         # probe an untrained network; with --backbone, one like the one in that file
    dataset: common.Dataset | None = None  # what to probe on; without: the backbone's own set, or shapes
    data: str | None = None      # where the images are; without: where the pretraining had them, or ./data
    arch: common.Arch | None = None  # without: the file's; --random: the small or full recipe's
    stem: common.Stem = "auto"   # auto = the file's, or cifar up to 64 px
    size: int | None = None      # pixels of the input; without: the set's, with the CIFAR stem the training's
    split: Literal["test", "held-out"] = "test"  # held-out: fit on 9/10 of the training images, test on 1/10
    fraction: float = 1.0        # share of each class's training labels for probes and kNN, as 0.01 or 0.1
    quick: bool = True           # compute probe_top1, by L-BFGS; ImageNet-1k with ResNet-50 takes 20 GB
    epochs: int | None = None    # of the SGD probe, 0 = skip it; without: 100, and 0 after the small recipe
    lr: float = 0.1              # SGD probe, at batch 256
    batch: int = 256             # SGD probe
    seed: int | None = None      # of SGD probe, labels, random network; without: the pretraining's, or 0
    out: str = ""                # folder of results.jsonl; empty = the backbone's, or runs/<dataset>/random
    cache: str | None = None     # folder that keeps decoded images; without: the pretraining's, or ./cache
    workers: int = 0             # threads that decode images, once per set; 0 = one a core
    device: str = "auto"         # auto = the accelerator that torch finds, else cpu
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # of features; auto = bf16 where the hardware has it
    features: str = ""           # write features, labels and file names to this .npz, and stop
    neighbours: str = ""         # write a PNG, test images beside their nearest training images, and stop


METRICS = ["knn_top1", "knn20_top1", "knn10_top1", "probe_top1", "linear_top1"]


# ---------------------------------------------------------------------------------------------- protocols


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    return 100 * (logits.argmax(1) == labels).float().mean().item()


def fit_logistic(x: Tensor, y: Tensor, classes: int, l2: float, block: int = 100_000) -> nn.Linear:
    """Multinomial logistic regression on x (N, D), y (N,): mean cross-entropy + l2 / 2 |weight|^2, L-BFGS.

    In blocks of rows, so that the logits of a large set are never there at once.
    """
    head = nn.Linear(x.shape[1], classes, device=x.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * l2 * head.weight.square().sum()
        loss.backward()
        for rows, labels in zip(x.split(block), y.split(block)):
            part = F.cross_entropy(head(rows), labels, reduction="sum") / len(x)
            part.backward()
            loss = loss.detach() + part.detach()
        return loss

    optimizer.step(closure)
    return head


def quick_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, classes: int) -> float:
    """probe_top1: standardised features (in place), L2 of six decades chosen on a tenth of the training rows
    that is held out, refitted on all of them."""
    mean, std = train_x.mean(0), train_x.std(0).clamp(min=1e-6)
    for x in (train_x, test_x):
        x.sub_(mean).div_(std)
    order = torch.randperm(len(train_x), generator=seeded(0)).to(train_x.device)
    held, rest = order.tensor_split([max(1, len(order) // 10)])
    fit_x, fit_y = train_x[rest], train_y[rest]  # copied once for all six

    def held_out(l2: float) -> float:
        head = fit_logistic(fit_x, fit_y, classes, l2)
        return accuracy(head(train_x[held]), train_y[held])

    best = max([10.0**-d for d in range(6)], key=held_out)
    del fit_x
    return accuracy(fit_logistic(train_x, train_y, classes, best)(test_x), test_y)


def sgd_probe(encoder: nn.Module, train: ImageSet, test: ImageSet, cfg: Config,
              device: torch.device) -> float:
    """linear_top1: a linear layer trained by SGD on features of augmented views; last epoch.

    A BatchNorm without weights comes first, as in MAE's linear probe (arXiv 2111.06377, A.1): so one rate
    fits features of every scale. It stays a linear probe: the two layers fold into one.
    """
    torch.manual_seed(cfg.seed)
    linear = nn.Linear(encoder.dim, len(train.classes))
    head = nn.Sequential(nn.BatchNorm1d(encoder.dim, eps=1e-6, affine=False), linear).to(device)
    batch = min(cfg.batch, len(train)) // world() * world()
    optimizer = torch.optim.SGD(head.parameters(), lr=cfg.lr * batch / 256, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.epochs * (len(train) // batch))
    augment = BatchAugment(cfg.size, scale=(0.08, 1.0), jitter=(0, 0, 0, 0), gray_p=0).to(device)
    labels = train.labels.to(device)
    for epoch in range(cfg.epochs):
        order = torch.randperm(len(train), generator=seeded(cfg.seed, epoch))
        whole = order.split(batch)[:len(train) // batch]
        for step, (images, aspect, index) in enumerate(train.batches(whole, device)):
            with torch.no_grad():
                x = encoder(augment(images, seeded(cfg.seed, epoch, step), aspect))
                x = common.gather(x.float())                                        # (B, D)
            loss = F.cross_entropy(head(x), labels[common.gather(index)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        common.live(f"SGD probe: epoch {epoch + 1}/{cfg.epochs}, loss {loss.item():.3f}")
    x, y = features(encoder, test, cfg.size, device)
    return accuracy(head.eval()(x), y)


def label_fraction(images: ImageSet, fraction: float, seed: int) -> ImageSet:
    """The given share of every class's images, at least one each."""
    order = torch.randperm(len(images), generator=seeded(seed)).to(images.labels.device)
    labels = images.labels[order]
    of_class = [order[labels == c] for c in range(len(images.classes))]
    return images.subset(torch.cat([rows[:max(1, round(fraction * len(rows)))] for rows in of_class]))


# ---------------------------------------------------------------------------------------------- backbones


LAYERS = {(False, (1, 1, 1, 1)): "resnet10", (False, (2, 2, 2, 2)): "resnet18",
          (False, (3, 4, 6, 3)): "resnet34", (True, (3, 4, 6, 3)): "resnet50"}  # (bottleneck, blocks a stage)
SECOND = re.compile(r"momentum|target|(^|[._])ema[._]|encoder_k|student")  # of two networks the one not meant


def tensors_in(loaded: dict, above: str = "") -> dict[str, Tensor]:
    """Every tensor of nested dicts, under its keys joined by dots."""
    found = {}
    for key, value in loaded.items():
        if isinstance(value, dict):
            found |= tensors_in(value, f"{above}{key}.")
        elif isinstance(value, Tensor):
            found[f"{above}{key}"] = value
    return found


def load_backbone(path: str, arch: str | None = None, stem: str = "auto") -> tuple[nn.Module, str, str]:
    """A file that holds a ResNet -> (encoder, arch, stem), which are read from the shapes of its tensors.

    The ResNet may stand below any keys, as "state_dict", "model", "module.encoder_q."; of two the query,
    online or teacher's is taken. What is not of a ResNet, as fc, is left out; everything else must fit
    exactly, but num_batches_tracked, which old files lack. All of that is said. RunError where the file can't
    be read safely, UsageError where it holds no ResNet of ours or not the asked one.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"{path}: no such file")
    if file.suffix == ".safetensors":
        convert = f"torch.save(safetensors.torch.load_file('{path}'), '{file.stem}.pth')"
        raise UsageError(f"{path} is of safetensors; convert it: import torch, safetensors.torch; {convert}")
    loaded = common.read_checkpoint(file)
    if not isinstance(loaded, dict):
        raise UsageError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    tensors = tensors_in(loaded)
    above = [key.removesuffix("conv1.weight") for key in tensors if key.endswith("conv1.weight")]
    above = [prefix for prefix in above if f"{prefix}layer1.0.conv1.weight" in tensors]
    if not above:
        raise UsageError(f"{path} holds no ResNet: no conv1.weight beside a layer1.0.conv1.weight "
                         f"({', '.join(list(tensors)[:3])}, ...)")
    meant = [prefix for prefix in above if not SECOND.search(prefix)] or above
    if len(meant) > 1:
        raise UsageError(f"{path} holds several ResNets, and no name says which to take: {', '.join(meant)}")
    prefix = meant[0]
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    blocks = tuple(len({key.split(".")[1] for key in state if key.startswith(f"layer{n}.")})
                   for n in (1, 2, 3, 4))
    kernel, bottleneck = state["conv1.weight"].shape[-1], "layer1.0.conv3.weight" in state
    found = {"arch": LAYERS.get((bottleneck, blocks)), "stem": {3: "cifar", 7: "imagenet"}.get(kernel)}
    if None in found.values():
        raise UsageError(f"{path} is a ResNet of {blocks} blocks with a stem of {kernel} pixels; want one of "
                         f"{', '.join(LAYERS.values())} with a stem of 3 or 7")
    for name, asked in (("arch", arch), ("stem", stem)):
        if asked not in (None, "auto", found[name]):
            raise UsageError(f"{path} has {name} {found[name]}, not {asked}")
    encoder = resnet(found["arch"], found["stem"])
    own = {key.split(".")[0] for key in encoder.state_dict()}
    heads = sorted({key.split(".")[0] for key in state} - own)
    state = {key: value for key, value in state.items() if key.split(".")[0] in own}
    try:
        encoder.load_state_dict(state)  # strict, but it fills in num_batches_tracked, which old files lack
    except RuntimeError as error:
        told = textwrap.shorten(str(error), 400, placeholder=" ...")
        raise UsageError(f"{path} is no {found['arch']} of torchvision's: {told}") from None
    said = f"{path}: {found['arch']}, {found['stem']} stem"
    if prefix:
        said += f" from '{prefix}'"
    if heads:
        said += f", without {', '.join(heads)}"
    if len(above) > 1:
        said += f"; not read: {', '.join(repr(other) for other in above if other != prefix)}"
    common.say(said)
    return encoder, found["arch"], found["stem"]


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over every parameter and buffer, BN statistics included."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- the row


def run_facts(backbone: str, lines: list[dict]) -> dict:
    """What a log says of the pretraining, and its checkpoint of how far it went: fields of a result row."""
    if not lines:
        return {}
    header, cfg, epochs = lines[0], lines[0]["config"], [line for line in lines if "epoch" in line]
    facts = {name: header.get(name) for name in ("method", "variant", "images", "sha", "torch", "command")}
    facts |= {"weights_digest": header["weights_digest"]} if "weights_digest" in header else {}
    for name in ("device", "precision"):  # of every part of a run that went on elsewhere
        facts[name] = ", then ".join(dict.fromkeys(line[name] for line in lines if name in line))
    last = epochs[-1] if epochs else {}
    checkpoint = pathlib.Path(backbone).expanduser().with_name("checkpoint.pt")
    step, steps = last.get("step", 0), header.get("steps")
    if checkpoint.exists():
        try:
            step = common.read_checkpoint(checkpoint, verify=False)["step"]
        except RunError as error:
            common.say(f"{error}; the step is that of the log's last line")
    common.say(f"{backbone}: step {step} of {steps}")
    facts |= {"pretrained_on": cfg["dataset"], "recipe": cfg["recipe"], "epochs": cfg["epochs"],
              "batch": cfg["batch"], "seed": cfg["seed"], "effective_lr": header["effective_lr"],
              "parameters": header["encoder_parameters"], "minutes": last.get("minutes"),
              "train_loss": last.get("loss"), "step": step, "steps": steps}
    gates = [value for name, value in last.items() if name.startswith("gate_")]
    curve = [[line["minutes"], line["epoch"], line["knn_top1"]] for line in epochs if "knn_top1" in line]
    signs = {name: last[name] for name in ("feature_std", "effective_rank") if name in last}
    return facts | signs | {"gates": gates, "curve": curve, "config": cfg}


def fill_in(cfg: Config, lines: list[dict]) -> None:
    """Every field that was not given: what the log beside the backbone says, or the default."""
    trained = lines[0]["config"] if lines else {}
    if cfg.data and not cfg.dataset and not trained:
        raise UsageError(f"--data {cfg.data}: give --dataset too, as --dataset folder")
    cfg.dataset = cfg.dataset or trained.get("dataset", "shapes")
    same = cfg.dataset == trained.get("dataset")
    cfg.data = cfg.data or (trained["data"] if same else "data")
    cfg.cache = cfg.cache or trained.get("cache", "cache")
    cfg.seed = trained.get("seed", 0) if cfg.seed is None else cfg.seed
    small = trained.get("recipe") == "small"
    if cfg.random and not cfg.backbone:  # the network of the methods' recipes for this set
        small = common.prefers_small(cfg.dataset, cfg.device)
        cfg.arch = cfg.arch or ("resnet10" if small else "resnet18")
        if cfg.stem == "auto" and small:
            cfg.stem = common.DATASETS[cfg.dataset].small
    if cfg.epochs is None:
        cfg.epochs = 0 if small else 100
        if small and not (cfg.neighbours or cfg.features):
            common.say("no linear_top1: 100 epochs of SGD cost more than the small recipe; "
                       "--epochs 100 brings it back")


def fill_in_size(cfg: Config, lines: list[dict], stem: str) -> None:
    """A network with the CIFAR stem is probed at the size that it was trained for, whatever the set: at 224
    px its maps are 49 times as large."""
    trained = lines[0]["size"] if lines else 32
    same = lines and cfg.dataset == lines[0]["config"]["dataset"]
    own = trained if stem == "cifar" or same else common.DATASETS[cfg.dataset].pixels
    cfg.size = cfg.size or own


def read_rows(results: pathlib.Path) -> list[dict]:
    """The rows of a results.jsonl, none where there is none; UsageError where a line is no row."""
    try:
        rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        if all("dataset" in row for row in rows):
            return rows
    except (ValueError, TypeError):
        pass
    raise UsageError(f"{results} has lines that are no result rows; move it away, or choose another --out")


def load_splits(cfg: Config) -> tuple[ImageSet, ImageSet]:
    """What probes are fitted on and what they are tested on. Raises UsageError where there are no classes."""
    options = dict(size=cfg.size, cache=cfg.cache, workers=cfg.workers)
    train = common.load_images(cfg.dataset, cfg.data, split="train", **options)
    if len(train.classes) < 2:
        raise UsageError(f"{cfg.data} has no classes to probe; "
                         "want DIR/train/<class>/... and DIR/test/<class>/...")
    if cfg.split == "held-out":
        held = len(train) // 10
        if not held:
            raise UsageError(f"--split held-out takes a tenth of the training images, of {len(train)} none")
        order = torch.randperm(len(train), generator=seeded("held-out"))
        train, test = train.subset(order[held:]), train.subset(order[:held])
    else:
        try:
            test = common.load_images(cfg.dataset, cfg.data, split="test", **options)
        except UsageError as error:
            raise UsageError(f"{error}; --split held-out tests on a tenth of the training images") from None
        if not test.classes:
            raise UsageError("the test images have no classes; --split held-out tests on a tenth of the "
                             "training images")
        foreign = sorted({*test.classes} - {*train.classes})
        if foreign:
            raise UsageError(f"test images of classes that the training images have not: {foreign[:5]}")
        place = torch.tensor([train.classes.index(name) for name in test.classes])  # an empty class is none
        test = dataclasses.replace(test, labels=place[test.labels], classes=train.classes)
    return (label_fraction(train, cfg.fraction, cfg.seed) if cfg.fraction < 1 else train), test


def draw_neighbours(path: str, train: ImageSet, test: ImageSet, train_x: Tensor, test_x: Tensor) -> None:
    """A PNG of ten test images, each beside its eight nearest training images, green if of its class."""
    first = [(test.labels == c).nonzero()[:1, 0] for c in range(len(test.classes))]
    labelled = torch.cat(first)[:10].tolist()
    cosines = F.normalize(test_x[labelled], dim=1) @ F.normalize(train_x, dim=1).T
    tiles, side = [], 64
    for i, row in zip(labelled, cosines.topk(8, 1).indices.tolist()):
        for source, j in [(test, i), *((train, j) for j in row)]:
            image = source.pixels[source.rows[j]][None].float() / 255
            right = source is train and train.labels[j] == test.labels[i]
            colour = torch.tensor([0.1, 0.75, 0.2] if right else [1.0, 1.0, 1.0])
            frame = colour[:, None, None].repeat(1, side + 8, side + 8)
            frame[:, 4:-4, 4:-4] = F.interpolate(image.cpu(), size=(side, side), mode="nearest")[0]
            tiles.append(frame)
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_image(torch.stack(tiles), path, nrow=9, padding=2, pad_value=1.0)
    print(f"wrote {path}")


def write_features(cfg: Config, encoder: nn.Module, device: torch.device) -> None:
    """An .npz of {train,test}_features (N, dim) float32, _labels (N,), places in classes or -1 without any,
    _files (N,), names below the split's folder, and classes of both; no test_* without a test split."""
    arrays, classes = {}, []
    for split in ("train", "test"):
        try:
            images = common.load_images(cfg.dataset, cfg.data, split, cfg.size, cfg.cache, cfg.workers)
        except UsageError as error:
            if split == "train":
                raise
            common.say(f"no test_*: {error}")
            continue
        classes += [name for name in images.classes if name not in classes]
        place = np.array([*map(classes.index, images.classes), -1])  # of each label, the last one of -1
        x, labels = features(encoder, images.to(device), cfg.size, device)
        arrays |= {f"{split}_features": x.cpu().numpy(), f"{split}_labels": place[labels.cpu().numpy()],
                   f"{split}_files": np.array(images.files)}
    arrays["classes"] = np.array(classes)
    file = pathlib.Path(cfg.features).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    with common.replacing(file) as out:
        np.savez(out, **arrays)
    shapes = ", ".join(f"{name} {value.shape}" for name, value in arrays.items())
    common.say(f"wrote {file}: {shapes}")


def probe(cfg: Config) -> dict | None:
    """Every protocol on one backbone; the row in results.jsonl is rewritten as metrics come, and returned."""
    if not cfg.backbone and not cfg.random:
        raise UsageError("want --backbone FILE or --random")
    for name, value, suffix in (("neighbours", cfg.neighbours, ".png"), ("features", cfg.features, ".npz")):
        if value and not value.endswith(suffix):
            raise UsageError(f"--{name} {value}: want a file name that ends in {suffix}")
    if not 0 < cfg.fraction <= 1:
        raise UsageError(f"--fraction {cfg.fraction}: want a share above 0 and up to 1")
    common.join_processes()
    if (cfg.neighbours or cfg.features) and world() > 1:
        raise UsageError("--neighbours and --features work in one process: start without torchrun")
    device = common.pick_device(cfg.device)
    log = pathlib.Path(cfg.backbone).expanduser().parent / "log.jsonl"  # of a backbone of ours
    lines = common.read_log(log) if cfg.backbone and log.exists() else []
    fill_in(cfg, lines)
    if cfg.backbone:
        encoder, arch, stem = load_backbone(cfg.backbone, cfg.arch, cfg.stem)
        fill_in_size(cfg, lines, stem)
    else:
        cfg.size = cfg.size or common.DATASETS[cfg.dataset].pixels
        arch, stem = cfg.arch, common.pick_stem(cfg.stem, cfg.size)
    if cfg.random:
        torch.manual_seed(cfg.seed)
        encoder, lines = resnet(arch, stem), []
    encoder = encoder.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    dtype = common.pick_dtype(cfg.amp, device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    encoder.forward = autocast(encoder.forward)  # the precision of all features
    if cfg.features:
        return write_features(cfg, encoder, device)
    digest, precision = fingerprint(encoder), str(dtype).removeprefix("torch.")

    beside = f"runs/{cfg.dataset}/random" if cfg.random else pathlib.Path(cfg.backbone).parent
    results = pathlib.Path(cfg.out or beside).expanduser() / "results.jsonl"
    rows = read_rows(results)
    train, test = load_splits(cfg)
    requested = {"knn_top1", "knn20_top1", "knn10_top1"}
    requested |= {"probe_top1"} if cfg.quick else set()
    requested |= {"linear_top1"} if cfg.epochs else set()
    key = {"dataset": cfg.dataset, "backbone": digest[:16], "split": cfg.split, "fraction": cfg.fraction,
           "probe_seed": cfg.seed, "size": cfg.size, "probe_lr": cfg.lr, "probe_batch": cfg.batch,
           "probe_data": cfg.data if cfg.dataset == "folder" else "", "probe_precision": precision}
    names = common.digest_of([*train.files, *test.files])
    absent = key | {"probe_precision": "float32"}  # what a field counts as that an older row has not
    same = [row for row in rows if all(row.get(name, absent[name]) == value for name, value in key.items())]
    if cfg.epochs:  # a row has one SGD probe: those of other lengths are other rows
        same = [row for row in same if row.get("linear_epochs", 0) in (0, cfg.epochs)]
    of_these = [row for row in same if row.get("probe_names", names) == names]  # and not of other images
    complete = [row for row in of_these if requested <= row.keys()]
    if complete and not cfg.neighbours:
        common.say(f"nothing left to do: {results} has this probe's row")
        return complete[0]
    completed = of_these if cfg.epochs else of_these[:1]  # whose metrics the new row takes over
    replaced = completed + [row for row in same if row not in of_these]

    began = time.monotonic()
    train, test = train.to(device), test.to(device)
    train_x, train_y = features(encoder, train, cfg.size, device)
    test_x, test_y = features(encoder, test, cfg.size, device)
    if not (train_x.isfinite().all() and test_x.isfinite().all()):
        raise RunError(f"{cfg.backbone}: features are not finite, so nothing can be probed")
    if cfg.neighbours:
        return draw_neighbours(cfg.neighbours, train, test, train_x, test_x)
    made = common.origin()
    row = {**key, "probe_names": names, "probe_images": len(train), "test_images": len(test),
           "linear_epochs": cfg.epochs, "seed": cfg.seed,
           "method": "random" if cfg.random else pathlib.Path(cfg.backbone).stem,
           "variant": "untrained" if cfg.random else "",
           "device": common.device_name(device), "precision": "float32", **made, "probe_sha": made["sha"],
           "probe_command": made["command"], **run_facts(cfg.backbone, lines), "arch": arch, "stem": stem}
    kept = {*METRICS} - requested  # what an earlier call found and this one does not make anew
    if not cfg.epochs:
        kept.add("linear_epochs")
    for old in completed:
        row |= {name: value for name, value in old.items() if name in kept}

    def superseded(old: dict) -> bool:
        """Whether an older row is of the same probe, with no metric more."""
        same = all(old.get(name) == row[name] for name in (*key, "probe_names", "linear_epochs"))
        return same and old.keys() <= row.keys()

    def add(metric: str, value: float) -> None:
        if fingerprint(encoder) != digest:
            raise RunError("the backbone changed while it was probed: this is a bug, and no row is written")
        row.update({metric: round(value, 2), "probe_minutes": round((time.monotonic() - began) / 60, 2)})
        if rank() == 0:
            results.parent.mkdir(parents=True, exist_ok=True)
            with open(results.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # of two probes at once both rows stay
                others = [old for old in read_rows(results) if old not in replaced and not superseded(old)]
                with common.replacing(results) as file:
                    file.write("".join(json.dumps(line) + "\n" for line in [*others, row]).encode())

    if rank() == 0:  # the others wait at the SGD probe, which all share, or are done
        add("knn_top1", knn(train_x, train_y, test_x, test_y))
        add("knn20_top1", knn(train_x, train_y, test_x, test_y, 20, 0.07))
        add("knn10_top1", knn(train_x, train_y, test_x, test_y, 10, math.inf))
        if cfg.quick:
            add("probe_top1", quick_probe(train_x, train_y, test_x, test_y, len(train.classes)))
    del train_x, test_x
    if cfg.epochs:
        add("linear_top1", sgd_probe(encoder, train, test, cfg, device))
    shown = ", ".join(f"{name} {row[name]:.2f}" for name in METRICS if name in row)
    common.say(f"{row['method']} {row['variant']} on {cfg.dataset}, fitted on {len(train)} images, tested on "
               f"{len(test)}: {shown} -> {results}")
    return row


if __name__ == "__main__":
    with common.one_line_errors():
        probe(common.parse(Config, __doc__))
