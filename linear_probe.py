"""How good are frozen features? kNN and linear probes of a backbone, as one result row.

    python linear_probe.py --backbone runs/cifar10/bassl/backbone.pt        # data set and data as in its log
    python linear_probe.py --backbone runs/cifar10/bassl/backbone.pt --dataset cifar100         # transfer
    python linear_probe.py --backbone resnet50.pth --arch resnet50 --dataset imagenet100 --data DIR
    python linear_probe.py --random --dataset cifar10                       # an untrained network
    python linear_probe.py --backbone runs/shapes/bassl/backbone.pt --neighbours neighbours.png

Features are the average-pooled outputs of the bare backbone in eval mode, in bf16 where the hardware has it
(--amp); heads are fitted in float32. Metrics are top-1 in percent:
    knn_top1      cosine kNN, k = 200, T = 0.1 (lightly)
    knn20_top1    cosine kNN, k = 20, T = 0.07 (solo-learn)
    knn10_top1    cosine kNN, k = 10, every neighbour one vote (single-file repos)
    probe_top1    logistic regression on cached features; L-BFGS, L2 chosen on a tenth of the training images
    linear_top1   SGD on normalised features: lr 0.1 x batch/256, momentum 0.9, no decay, cosine, views by
                  crop (0.08, 1) and flip
Nothing is chosen on the test split; --split held-out leaves it alone and tests on a tenth of the training
images, for choices. The row is appended to results.jsonl beside the backbone, and rewritten as its metrics
come.
"""
import dataclasses
import hashlib
import json
import math
import pathlib
import time
import typing
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import BatchAugment, ImageSet, RunError, UsageError, features, knn, rank, resnet, seeded, world


@dataclass
class Config:
    backbone: str = ""           # file: a backbone.pt of ours, or a state dict with torchvision's ResNet keys
    random: bool = False         # probe an untrained network; with --backbone, one like the one in that file
    dataset: common.Dataset | None = None  # what to probe on; without: the backbone's own set, or shapes
    data: str | None = None      # where the images are; without: where they were for the pretraining, or data
    arch: common.Arch | None = None  # without: the backbone's; --random: the small or full recipe's
    stem: common.Stem = "auto"   # auto = the file's, or cifar up to 64 px
    size: int | None = None      # pixels of the network's input; without: the set's own
    split: Literal["test", "held-out"] = "test"  # held-out: fit on 9/10 of the training images, test on 1/10
    fraction: float = 1.0        # share of each class's training labels for probes and kNN, as 0.01 or 0.1
    quick: bool = True           # compute probe_top1, by L-BFGS; ImageNet-1k with ResNet-50 takes 20 GB
    epochs: int | None = None    # of the SGD probe, 0 = skip it; without: 100, and 0 after the small recipe
    lr: float = 0.1              # SGD probe, at batch 256
    batch: int = 256             # SGD probe
    seed: int | None = None      # of SGD probe, labels, random network; without: the pretraining's, or 0
    out: str = ""                # folder of results.jsonl; empty = the backbone's, or runs/<dataset>/random
    cache: str | None = None     # folder that keeps decoded images; without: the pretraining's, or cache
    workers: int = 0             # threads that decode images, once per set; 0 = one a core
    device: str = "auto"         # auto = the accelerator that torch finds, else cpu
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # of features; auto = bf16 where the hardware has it
    neighbours: str = ""         # write a PNG, test images beside their nearest training images, and stop


METRICS = ["knn_top1", "knn20_top1", "knn10_top1", "probe_top1", "linear_top1"]


# ---------------------------------------------------------------------------------------------- protocols


def autocast(cfg: Config, device: torch.device) -> torch.autocast:
    """The precision of features."""
    dtype = common.pick_dtype(cfg.amp, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


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
                x = augment(images, seeded(cfg.seed, epoch, step), aspect)
                with autocast(cfg, device):
                    x = encoder(x)
                x = common.gather(x.float())                                        # (B, D)
            loss = F.cross_entropy(head(x), labels[common.gather(index)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        common.live(f"SGD probe: epoch {epoch + 1}/{cfg.epochs}, loss {loss.item():.3f}")
    with autocast(cfg, device):
        x, y = features(encoder, test, cfg.size, device)
    return accuracy(head.eval()(x), y)


def label_fraction(images: ImageSet, fraction: float, seed: int) -> ImageSet:
    """The given share of every class's images, at least one each."""
    order = torch.randperm(len(images), generator=seeded(seed)).to(images.labels.device)
    labels = images.labels[order]
    of_class = [order[labels == c] for c in range(len(images.classes))]
    return images.subset(torch.cat([rows[:max(1, round(fraction * len(rows)))] for rows in of_class]))


# ---------------------------------------------------------------------------------------------- backbones


def load_backbone(path: str, arch: str | None = None, stem: str = "auto") -> tuple[nn.Module, str, str]:
    """A backbone file -> (encoder, arch, stem). arch and stem are the file's own where it is one of ours.

    Raises RunError where the file cannot be read safely, UsageError where its keys, shapes, stem or arch are
    not the asked ones, naming them. A classifier (fc.*) is left out; everything else must fit exactly.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"--backbone {path}: no such file")
    loaded = common.read_checkpoint(file)
    if not isinstance(loaded, dict):
        raise UsageError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    for name, asked in (("arch", arch), ("stem", stem)):
        if asked not in (None, "auto") and loaded.get(name, asked) != asked:
            raise UsageError(f"{path} was trained with {name} {loaded[name]}, not {asked}")
    first = loaded.get("conv1.weight")
    if not isinstance(first, Tensor) or first.ndim != 4:
        raise UsageError(f"{path} has no conv1.weight: its keys are not torchvision's ResNet's "
                         f"({', '.join(map(str, list(loaded)[:3]))}, ...)")
    found = {3: "cifar", 7: "imagenet"}.get(first.shape[-1], "unknown")
    arch = loaded.pop("arch", arch or "resnet18")
    stem = loaded.pop("stem", found if stem == "auto" else stem)
    if found != stem:
        raise UsageError(f"{path} has the {found} stem (conv1 of {first.shape[-1]} pixels), not {stem}")
    if arch not in typing.get_args(common.Arch):
        raise UsageError(f"{path} is of an unknown arch, {arch}")
    encoder = resnet(arch, stem)
    own = encoder.state_dict()
    state = {key: value for key, value in loaded.items() if key not in ("fc.weight", "fc.bias")}
    wrong = [f"missing {key}" for key in own if key not in state]
    wrong += [f"unexpected {key}" for key in state if key not in own]
    for key, value in own.items():
        shape, want = tuple(getattr(state.get(key), "shape", ())), tuple(value.shape)
        if key in state and shape != want:
            wrong.append(f"{key} of shape {shape}, not {want}")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UsageError(f"{path} is no {arch} with the {stem} stem: {'; '.join(wrong[:5])}{more}")
    encoder.load_state_dict(state)
    return encoder, arch, stem


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over every parameter and buffer, BN statistics included."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- the row


def log_beside(backbone: str) -> list[dict]:
    """The lines of the log beside a backbone.pt of ours, header first; none where there is no log."""
    log = pathlib.Path(backbone).expanduser().parent / "log.jsonl"
    return common.read_log(log) if backbone and log.exists() else []


def run_facts(backbone: str, lines: list[dict]) -> dict:
    """What a log says of the pretraining, and its checkpoint of how far it went: fields of a result row."""
    if not lines:
        return {}
    header, cfg, epochs = lines[0], lines[0]["config"], [line for line in lines if "epoch" in line]
    facts = {name: header.get(name) for name in ("method", "variant", "images", "sha", "torch", "command")}
    for name in ("device", "precision"):  # of every part of a run that went on elsewhere
        facts[name] = ", then ".join(dict.fromkeys(line[name] for line in lines if name in line))
    last, checkpoint = epochs[-1] if epochs else {}, pathlib.Path(backbone).with_name("checkpoint.pt")
    steps = header.get("steps")
    step = common.read_checkpoint(checkpoint)["step"] if checkpoint.exists() else last.get("step", 0)
    common.say(f"{backbone}: step {step} of {steps}")
    facts |= {"pretrained_on": cfg["dataset"], "recipe": cfg["recipe"], "epochs": cfg["epochs"],
              "batch": cfg["batch"], "seed": cfg["seed"], "effective_lr": header["effective_lr"],
              "parameters": header["encoder_parameters"], "minutes": last.get("minutes"),
              "train_loss": last.get("loss"), "step": step, "steps": steps}
    gates = [value for name, value in last.items() if name.startswith("gate_")]
    curve = [[line["minutes"], line["epoch"], line["knn_top1"]] for line in epochs if "knn_top1" in line]
    return facts | {"gates": gates, "curve": curve, "config": cfg}


def fill_in(cfg: Config, lines: list[dict]) -> None:
    """Every field that was not given: what the log beside the backbone says, or the default."""
    trained = lines[0]["config"] if lines else {}
    cfg.dataset = cfg.dataset or trained.get("dataset", "shapes")
    same = cfg.dataset == trained.get("dataset")
    cfg.data = cfg.data or (trained["data"] if same else "data")
    cfg.cache = cfg.cache or trained.get("cache", "cache")
    cfg.size = cfg.size or (same and trained["size"]) or common.DATASETS[cfg.dataset].pixels
    cfg.seed = trained.get("seed", 0) if cfg.seed is None else cfg.seed
    small = trained.get("recipe") == "small"
    if cfg.random and not cfg.backbone:  # the network of the methods' recipes for this set
        small = common.prefers_small(cfg.dataset, cfg.device)
        cfg.arch = cfg.arch or ("resnet10" if small else "resnet18")
        if cfg.stem == "auto" and small:
            cfg.stem = common.DATASETS[cfg.dataset].small
    if cfg.epochs is None:
        cfg.epochs = 0 if small else 100
        if small and not cfg.neighbours:
            common.say("no linear_top1: 100 epochs of SGD cost more than the small recipe; "
                       "--epochs 100 brings it back")


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
        foreign = sorted({*test.classes} - {*train.classes})
        if foreign:
            raise UsageError(f"test images of classes that the training images have not: {foreign[:5]}")
        place = torch.tensor([train.classes.index(name) for name in test.classes])  # an empty class is none
        test = dataclasses.replace(test, labels=place[test.labels], classes=train.classes)
    return (label_fraction(train, cfg.fraction, cfg.seed) if cfg.fraction < 1 else train), test


def draw_neighbours(path: str, train: ImageSet, test: ImageSet, train_x: Tensor, test_x: Tensor) -> None:
    """A PNG of ten test images, each beside its eight nearest training images, green if of its class."""
    from torchvision.utils import save_image

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


def probe(cfg: Config) -> dict | None:
    """Every protocol on one backbone; the row in results.jsonl is rewritten as metrics come, and returned."""
    if not cfg.backbone and not cfg.random:
        raise UsageError("want --backbone FILE or --random")
    if cfg.neighbours and not cfg.neighbours.endswith(".png"):
        raise UsageError(f"--neighbours {cfg.neighbours}: want a file name that ends in .png")
    if not 0 < cfg.fraction <= 1:
        raise UsageError(f"--fraction {cfg.fraction}: want a share above 0 and up to 1")
    common.join_processes()
    if cfg.neighbours and world() > 1:
        raise UsageError("--neighbours draws in one process: start it without torchrun")
    device, lines = common.pick_device(cfg.device), log_beside(cfg.backbone)
    fill_in(cfg, lines)
    if cfg.backbone:
        encoder, arch, stem = load_backbone(cfg.backbone, cfg.arch, cfg.stem)
    else:
        arch, stem = cfg.arch, common.pick_stem(cfg.stem, cfg.size)
    if cfg.random:
        torch.manual_seed(cfg.seed)
        encoder, lines = resnet(arch, stem), []
    encoder = encoder.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    digest, precision = fingerprint(encoder), str(common.pick_dtype(cfg.amp, device)).removeprefix("torch.")

    beside = f"runs/{cfg.dataset}/random" if cfg.random else pathlib.Path(cfg.backbone).parent
    results = pathlib.Path(cfg.out or beside).expanduser() / "results.jsonl"
    rows = read_rows(results)
    requested = {"knn_top1", "knn20_top1", "knn10_top1"}
    requested |= {"probe_top1"} if cfg.quick else set()
    requested |= {"linear_top1"} if cfg.epochs else set()
    key = {"dataset": cfg.dataset, "backbone": digest[:16], "split": cfg.split, "fraction": cfg.fraction,
           "probe_seed": cfg.seed, "size": cfg.size, "probe_lr": cfg.lr, "probe_batch": cfg.batch,
           "probe_data": cfg.data if cfg.dataset == "folder" else "", "probe_precision": precision}
    absent = key | {"probe_precision": "float32"}  # what a field counts as that an older row has not
    same = [row for row in rows if all(row.get(name, absent[name]) == value for name, value in key.items())]
    if cfg.epochs:  # a row has one SGD probe: those of other lengths are other rows
        same = [row for row in same if row.get("linear_epochs", 0) in (0, cfg.epochs)]
    complete = [row for row in same if requested <= row.keys()]
    if complete and not cfg.neighbours:
        common.say(f"nothing left to do: {results} has this probe's row")
        return complete[0]
    replaced = same if cfg.epochs else same[:1]

    train, test = (images.to(device) for images in load_splits(cfg))
    began = time.monotonic()
    with autocast(cfg, device):
        train_x, train_y = features(encoder, train, cfg.size, device)
        test_x, test_y = features(encoder, test, cfg.size, device)
    if not (train_x.isfinite().all() and test_x.isfinite().all()):
        raise RunError(f"{cfg.backbone}: features are not finite, so nothing can be probed")
    if cfg.neighbours:
        return draw_neighbours(cfg.neighbours, train, test, train_x, test_x)
    made = common.origin()
    row = {**key, "linear_epochs": cfg.epochs, "seed": cfg.seed,
           "method": "random" if cfg.random else pathlib.Path(cfg.backbone).stem,
           "variant": "untrained" if cfg.random else "",
           "device": common.device_name(device), "precision": "float32", **made, "probe_sha": made["sha"],
           "probe_command": made["command"], **run_facts(cfg.backbone, lines), "arch": arch, "stem": stem}
    kept = {*METRICS} - requested | (set() if cfg.epochs else {"linear_epochs"})
    for old in replaced:  # what an earlier call found and this one does not make anew stays in the row
        row |= {name: value for name, value in old.items() if name in kept}

    def add(metric: str, value: float) -> None:
        if fingerprint(encoder) != digest:
            raise RunError("the backbone changed while it was probed: this is a bug, and no row is written")
        row.update({metric: round(value, 2), "probe_minutes": round((time.monotonic() - began) / 60, 2)})
        if rank() == 0:
            results.parent.mkdir(parents=True, exist_ok=True)
            with common.replacing(results) as file:
                lines = [json.dumps(r) for r in rows if r not in replaced] + [json.dumps(row)]
                file.write(("\n".join(lines) + "\n").encode())

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
    common.say(f"{row['method']} {row['variant']} on {cfg.dataset}: {shown} -> {results}")
    return row


if __name__ == "__main__":
    with common.one_line_errors():
        probe(common.parse(Config, __doc__))
