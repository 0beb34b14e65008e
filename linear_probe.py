"""How good are frozen features? Linear probe, kNN, result rows and the tables made from them.

    python linear_probe.py --backbone runs/cifar10/bassl/backbone.pt --dataset cifar10        # all protocols, 100 probe epochs
    python linear_probe.py --backbone runs/cifar10/bassl/backbone.pt --dataset cifar100       # transfer to another set
    python linear_probe.py --backbone resnet50.pth --arch resnet50 --stem imagenet --dataset imagenet100 --data DIR
    python linear_probe.py --random --arch resnet18 --dataset cifar10 --epochs 0              # untrained network, without the SGD probe
    python linear_probe.py --backbone runs/shapes/bassl/backbone.pt --dataset shapes --neighbours neighbours.png
    python linear_probe.py --table runs/cifar10/*/results.jsonl                               # Markdown from rows

Features are the average-pooled outputs of the bare backbone in eval mode. Metrics are top-1 in percent on the test split:
    knn_top1      cosine kNN, k = 200, T = 0.1 (lightly)
    knn20_top1    cosine kNN, k = 20, T = 0.07 (solo-learn)
    probe_top1    logistic regression on cached features; L-BFGS, L2 chosen on a held-out tenth of the training images
    linear_top1   SGD on augmented views: lr 0.1 x batch/256, momentum 0.9, no decay, cosine, crop (0.08, 1) and flip; last epoch
Nothing is chosen on the test split.
"""
import argparse
import glob
import hashlib
import io
import json
import math
import pathlib
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import BatchAugment, ImageSet, RunError, UsageError, features, gather_rows, load_images, rank, resnet, seeded, world


@dataclass
class Config:
    backbone: str = ""           # file: a backbone.pt of ours, or any state dict with torchvision's ResNet keys
    random: bool = False         # probe an untrained network instead
    dataset: common.Dataset = "shapes"  # what to probe on
    data: str = "data"           # where the images are, or are downloaded to
    arch: str = ""               # resnet10, resnet18, resnet34 or resnet50; known for a backbone.pt of ours, else resnet18
    stem: common.Stem = "auto"   # auto = the file's, or cifar up to 64 px
    size: int = 0                # pixels of the network's input; 0 = the dataset's own
    epochs: int = 100            # of the SGD probe; 0 = skip it (it costs a forward pass over the training images each)
    lr: float = 0.1              # SGD probe, at batch 256
    batch: int = 256             # SGD probe
    fraction: float = 1.0        # share of each class's training labels that probes and kNN may use, such as 0.01 or 0.1
    seed: int = 0                # of the SGD probe, the choice of labels, and the random network
    out: str = ""                # folder whose results.jsonl gets the row; empty = the backbone's, or runs/<dataset>/random
    workers: int = 2             # processes that decode images
    cache: str = ""              # folder that keeps decoded images between runs; empty = decode the files
    device: str = "auto"         # auto = cuda, then mps, then cpu
    neighbours: str = ""         # write a PNG: test images, each beside its eight nearest training images, and stop
    table: str = ""              # print Markdown tables from the results.jsonl files named behind it, and stop
    figure: str = ""             # with --table: also draw accuracy against minutes, images and parameters (needs matplotlib)


# Published numbers that tables show beside ours: (dataset, method, what was trained, metric, percent, source)
PUBLISHED = [
    *[("cifar10", m, "ResNet-18, 1000 epochs", "linear_top1", v, "solo-learn, online probe") for m, v in
      [("simclr", 90.74), ("moco v2+", 92.94), ("byol", 92.58), ("simsiam", 90.51), ("swav", 89.17), ("barlow", 92.10), ("vicreg", 92.07), ("dino", 89.52)]],
    *[("cifar100", m, "ResNet-18, 1000 epochs", "linear_top1", v, "solo-learn, online probe") for m, v in
      [("simclr", 65.78), ("moco v2+", 69.89), ("byol", 70.46), ("simsiam", 66.04), ("swav", 64.88), ("barlow", 70.90), ("vicreg", 68.54), ("dino", 66.76)]],
    ("cifar10", "bassl", "as published", "linear_top1", 92.12, "arXiv 2311.09974"),
    ("cifar100", "bassl", "as published", "linear_top1", 66.53, "arXiv 2311.09974"),
    ("imagenet1k", "bassl", "as published", "linear_top1", 59.41, "arXiv 2311.09974"),
    ("cifar100", "npid_distill", "ResNet-18, 200 epochs", "linear_top1", 67.9, "arXiv 2404.19289"),
    ("cifar100", "moco v2", "ResNet-18, 200 epochs", "linear_top1", 62.5, "arXiv 2404.19289"),
    ("tinyimagenet", "npid_distill", "ResNet-18", "linear_top1", 39.7, "arXiv 2404.19289"),
    ("tinyimagenet", "moco v2", "ResNet-18", "linear_top1", 35.8, "arXiv 2404.19289"),
]
PUBLISHED += [("cifar10", m, "ResNet-18, 200 epochs, batch 512", "knn_top1", v, "lightly") for m, v in
              [("simclr", 84.8), ("moco", 84.7), ("byol", 86.8), ("simsiam", 76.4), ("swav", 84.2), ("barlow", 81.9), ("dino", 81.3)]]
METRICS = ["knn_top1", "knn20_top1", "probe_top1", "linear_top1"]


# ------------------------------------------------------------------------------------------- protocols


@torch.no_grad()
def knn(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, k: int = 200, temperature: float = 0.1) -> float:
    """Weighted kNN by cosine (Wu et al. 2018, 3.4): the k nearest rows vote with exp(cos / temperature). Top-1 in percent.

    features (N, D) and (M, D), any scale; labels (N,) and (M,). k is lowered to N where the training set is smaller.
    """
    train = F.normalize(train_features.float(), dim=1)
    classes, right = int(train_labels.max()) + 1, 0
    for rows, labels in zip(F.normalize(test_features.float(), dim=1).split(1000), test_labels.split(1000)):
        similarity, index = (rows @ train.T).topk(min(k, len(train)), dim=1)             # (m, k)
        votes = torch.zeros(len(rows), classes, device=rows.device)
        votes.scatter_add_(1, train_labels[index], (similarity / temperature).exp())
        right += (votes.argmax(1) == labels).sum().item()
    return 100 * right / len(test_features)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    return 100 * (logits.argmax(1) == labels).float().mean().item()


def fit_logistic(x: Tensor, y: Tensor, classes: int, l2: float) -> nn.Linear:
    """Multinomial logistic regression on features (N, D), labels (N,): mean cross-entropy + l2 / 2 * |weight|^2, by L-BFGS from zero."""
    head = nn.Linear(x.shape[1], classes, device=x.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), y) + 0.5 * l2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head


def quick_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, classes: int) -> float:
    """probe_top1: standardised features, L2 of six decades chosen on a held-out tenth of the training rows, refitted on all of them."""
    mean, std = train_x.mean(0), train_x.std(0).clamp(min=1e-6)
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    order = torch.randperm(len(train_x), generator=seeded(0)).to(train_x.device)
    held, rest = order[:max(1, len(order) // 10)], order[max(1, len(order) // 10):]
    decades = [10.0**-d for d in range(6)]
    scores = [accuracy(fit_logistic(train_x[rest], train_y[rest], classes, l2)(train_x[held]), train_y[held]) for l2 in decades]
    best = decades[max(range(len(decades)), key=scores.__getitem__)]
    return accuracy(fit_logistic(train_x, train_y, classes, best)(test_x), test_y)


def sgd_probe(encoder: nn.Module, train: ImageSet, test_x: Tensor, test_y: Tensor, cfg: Config, size: int, device: torch.device) -> float:
    """linear_top1: a linear layer trained by SGD on features of augmented views; the encoder stays in eval mode, without gradient."""
    torch.manual_seed(cfg.seed)
    head = nn.Linear(encoder.dim, len(train.classes)).to(device)
    batch = min(cfg.batch, len(train)) // world() * world()
    optimizer = torch.optim.SGD(head.parameters(), lr=cfg.lr * batch / 256, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.epochs * (len(train) // batch))
    augment = BatchAugment(size, scale=(0.08, 1.0), jitter=(0, 0, 0, 0), gray_p=0, blur_p=0).to(device)
    labels = train.labels.to(device)
    if train.files is None:
        train.pixels = train.pixels.to(device)
    for epoch in range(cfg.epochs):
        order = torch.randperm(len(train), generator=seeded(cfg.seed, epoch)).split(batch)[:len(train) // batch]
        parts = [positions.chunk(world())[rank()] for positions in order]
        for step, (images, index) in enumerate(train.batches(parts, device, cfg.workers)):
            with torch.no_grad():
                x = gather_rows(encoder(augment(images, seeded(cfg.seed, epoch, step))))   # (B, D)
            loss = F.cross_entropy(head(x), labels[gather_rows(index)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        if sys.stdout.isatty() and rank() == 0:
            print(f"\r\033[KSGD probe: epoch {epoch + 1}/{cfg.epochs}, loss {loss.item():.3f}", end="\n" if epoch + 1 == cfg.epochs else "", flush=True)
    with torch.no_grad():
        return accuracy(head(test_x), test_y)


def label_fraction(images: ImageSet, fraction: float, seed: int) -> ImageSet:
    """The given share of every class's images, at least one each."""
    order = torch.randperm(len(images), generator=seeded(seed))
    labels = images.labels[order]
    keep = [order[labels == c][:max(1, round(fraction * int((labels == c).sum())))] for c in range(len(images.classes))]
    return images.subset(torch.cat(keep))


# ------------------------------------------------------------------------------------------- backbones


def load_backbone(path: str, arch: str = "", stem: str = "auto") -> tuple[nn.Module, str, str]:
    """A backbone file -> (encoder, arch, stem). arch and stem are the file's own where it is one of ours.

    Raises RunError where the file cannot be read safely, UsageError where its keys, shapes, stem or arch are not the asked ones,
    naming them. A classifier (fc.*) is left out; everything else must fit exactly.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise UsageError(f"--backbone {path}: no such file")
    data = file.read_bytes()
    try:
        ours = data[-common.DIGEST_BYTES - 2:-common.DIGEST_BYTES] == common.DIGEST_BYTES.to_bytes(2, "little")
        loaded = common.read_checkpoint(file) if ours else torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load and zipfile raise many kinds for bytes that are no checkpoint; the first line says which
        raise RunError(f"{path} is no state dict that can be read safely: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    if not isinstance(loaded, dict):
        raise UsageError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    for name, asked, default in (("arch", arch, ""), ("stem", stem, "auto")):
        if asked != default and loaded.get(name, asked) != asked:
            raise UsageError(f"{path} was trained with {name} {loaded[name]}, not {asked}")
    arch = loaded.pop("arch", arch or "resnet18")
    kernel = loaded["conv1.weight"].shape[-1] if isinstance(loaded.get("conv1.weight"), Tensor) else None
    found = {3: "cifar", 7: "imagenet"}.get(kernel, "unknown")
    stem = loaded.pop("stem", found if stem == "auto" else stem)
    if found != stem and kernel:
        raise UsageError(f"{path} has the {found} stem (conv1 of {kernel} x {kernel}), not {stem}")
    if stem == "unknown":
        raise UsageError(f"{path} has no conv1.weight: its keys are not torchvision's ResNet's ({', '.join(map(str, list(loaded)[:3]))}, ...)")
    encoder = make_encoder(arch, stem)
    own, state = encoder.state_dict(), {key: value for key, value in loaded.items() if key not in ("fc.weight", "fc.bias")}
    wrong = ([f"missing {key}" for key in own if key not in state] + [f"unexpected {key}" for key in state if key not in own]
             + [f"{key} of shape {tuple(state[key].shape)}, not {tuple(own[key].shape)}" for key in own if key in state and state[key].shape != own[key].shape])
    if wrong:
        raise UsageError(f"{path} is no {arch} with the {stem} stem: {'; '.join(wrong[:5])}" + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""))
    encoder.load_state_dict(state)
    return encoder, arch, stem


def make_encoder(arch: str, stem: str) -> nn.Module:
    """common.resnet, with an unknown arch said as wrong usage."""
    if arch not in ("resnet10", "resnet18", "resnet34", "resnet50"):
        raise UsageError(f"--arch {arch}: want resnet10, resnet18, resnet34 or resnet50")
    return resnet(arch, stem)


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over every parameter and buffer, BN statistics included."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------- rows and tables


def settings_digest(config: dict) -> str:
    """Eight hex digits that two runs share whose flags differ in the seed, or in where and how they computed, alone."""
    settings = {key: value for key, value in config.items() if key not in {*common.FREE_FIELDS, "seed", "unpaired"}}
    if config.get("unpaired"):
        settings["gate"] = 0.0  # a control run belongs to the runs with the fusion's own gate
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def run_facts(backbone: str) -> dict:
    """What the log beside a backbone.pt says of its pretraining: the fields of a result row, or an empty dict where there is no log."""
    log = pathlib.Path(backbone).parent / "log.jsonl"
    if not backbone or not log.exists():
        return {}
    header, *lines = [json.loads(line) for line in log.read_text().splitlines()]
    cfg, last = header["config"], lines[-1] if lines else {}
    return {"method": header["method"], "variant": header["variant"], "pretrained_on": cfg["dataset"], "images": header["images"],
            "epochs": cfg["epochs"], "batch": cfg["batch"], "seed": cfg["seed"], "minutes": last.get("minutes"),
            "images_per_s": last.get("images_per_s"), "device": header["device"], "precision": header["precision"], "sha": header["sha"],
            "torch": header["torch"], "command": header["command"], "train_loss": last.get("loss"), "effective_lr": header["effective_lr"],
            "settings": settings_digest(cfg),
            "gates": [value for name, value in last.items() if name.startswith("gate_")],
            "parameters": header["encoder_parameters"], "curve": [[line["minutes"], line["knn_top1"]] for line in lines if "knn_top1" in line]}


def read_rows(patterns: list[str]) -> list[dict]:
    """Rows of result files; of rows that describe the same run, the last one. Raises UsageError for files that are not there or no rows."""
    paths = [path for pattern in patterns for path in (sorted(glob.glob(pattern)) or [pattern])]
    rows = {}
    for path in paths:
        try:
            for line in pathlib.Path(path).read_text().splitlines():
                row = json.loads(line)
                if "dataset" not in row or "method" not in row:
                    raise UsageError(f"{path} holds lines that are no result rows: want results.jsonl, not log.jsonl")
                rows[json.dumps([row.get(key) for key in (*RUN_KEYS, "seed")])] = row
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise UsageError(f"{path} holds no result rows ({error})") from None
    return list(rows.values())


RUN_KEYS = ["dataset", "pretrained_on", "method", "variant", "arch", "stem", "images", "epochs", "batch", "fraction", "settings"]


def tables(rows: list[dict]) -> str:
    """Markdown: one table a dataset, one line a run; runs that differ in the seed alone share a line, mean ± standard deviation.

    The control runs of BA-SSL (variant "..., unpaired") give a column of their variant's line: the loss on unrelated pairs beside
    ln(2B - 1), which is what NT-Xent comes to when nothing can be matched.
    """
    text = []
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        groups: dict[str, list[dict]] = {}
        for row in rows:
            if row["dataset"] == dataset:
                group = {**row, "variant": (row.get("variant") or "").removesuffix(UNPAIRED)}
                groups.setdefault(json.dumps([group.get(key) for key in RUN_KEYS]), []).append(row)
        table = [table_line(group, dataset) for group in groups.values()]
        for _, method, what, metric, value, source in (p for p in PUBLISHED if p[0] == dataset):
            table.append({"method": method, "variant": f"*published: {what} ({source})*", metric: f"*{value:g}*"})
        head = [name for name in COLUMNS if any(line.get(name) not in (None, "") for line in table)]
        text += ([""] if text else []) + [f"**{dataset}**", "", *markdown(head, [[line.get(name) for name in head] for line in table])]
    return "\n".join(text)


UNPAIRED = ", unpaired"
COLUMNS = ["method", "variant", "network", "images", "epochs", "batch", "lr", "seeds", "gates", "unpaired loss (chance)", *METRICS, "minutes", "images/s"]


def table_line(group: list[dict], dataset: str) -> dict[str, str]:
    """The cells of one line: rows of one run, or of runs that differ in the seed alone, and their control runs."""
    control = [row for row in group if (row.get("variant") or "").endswith(UNPAIRED)]
    group = [row for row in group if row not in control]
    row = (group or control)[0]
    line = {"method": row["method"], "variant": (row.get("variant") or "").removesuffix(UNPAIRED), "network": f"{row['arch']}, {row['stem']} stem",
            "images": row.get("images"), "epochs": row.get("epochs"), "batch": row.get("batch"),
            "lr": f"{row['effective_lr']:g}" if row.get("effective_lr") else "", "seeds": " ".join(str(r["seed"]) for r in group or control)}
    if row.get("pretrained_on") not in (None, dataset):
        line["variant"] += f" (pretrained on {row['pretrained_on']})"
    if row.get("fraction", 1) < 1:
        line["variant"] += f" ({row['fraction']:.0%} of labels)"
    line["gates"] = " ".join(f"{value:.3f}" for value in row.get("gates", []))
    if control and row["variant"].startswith("simclr"):
        gate = "".join(f"{g:g}" for g in control[0].get("gates", [])[:1])
        line["unpaired loss (chance)"] = (f"{spread([r['train_loss'] for r in control], 2)} ({math.log(2 * row['batch'] - 1):.2f})"
                                          + (f", gate {gate}" if gate else ""))
    for metric in METRICS:
        line[metric] = spread([r[metric] for r in group if r.get(metric) is not None], 2)
    line["minutes"] = spread([r["minutes"] for r in group if r.get("minutes")], 1)
    line["images/s"] = spread([r["images_per_s"] for r in group if r.get("images_per_s")], 0)
    return line


def markdown(head: list[str], lines: list[list]) -> list[str]:
    """The lines of a Markdown table, padded so that it reads in a terminal too."""
    cells = [[str("" if cell is None else cell) for cell in line] for line in [head, *lines]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    rows = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    return [rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]]


def spread(values: list[float], digits: int) -> str:
    """Mean, with ± the standard deviation over runs where there are several."""
    if not values:
        return ""
    return f"{statistics.mean(values):.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def pyplot(what: str):
    """matplotlib.pyplot, drawing to files; None, with a line that there is no `what`, where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {what}: matplotlib is not installed", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw_figure(path: str, rows: list[dict]) -> None:
    """Accuracy against training minutes (the online kNN of the log), images and parameters: a PNG where matplotlib is there, else a line."""
    if not (plt := pyplot("figure")):
        return
    trained = [row for row in rows if row.get("curve")]
    if not trained:
        print("no figure: no row has an online kNN curve (--knn-every 0?)", file=sys.stderr)
        return
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    most = max(row["images"] for row in trained)
    for variant in dict.fromkeys(row["variant"] for row in trained):
        runs = [row for row in trained if row["variant"] == variant]
        whole = [row for row in runs if row["images"] == most]
        small = min(whole, key=lambda row: row["parameters"])
        axes[0].plot(*zip(*small["curve"]), marker="o", label=variant)
        for axis, group, key in ((axes[1], [r for r in runs if r["arch"] == small["arch"]], "images"), (axes[2], whole, "parameters")):
            points = sorted((row[key], row["probe_top1"]) for row in group)
            axis.plot(*zip(*points), marker="o", label=variant)
    for axis, x, y in zip(axes, ("training minutes", "training images", "parameters"), ("online kNN top-1, %", "probe top-1, %", "probe top-1, %")):
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
    for axis, key, unit in ((axes[1], "images", 1), (axes[2], "parameters", 1e6)):
        values = sorted({row[key] for row in trained})
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(values, [f"{value / unit:,.0f}" + " M" * (unit > 1) for value in values])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------- main


def draw_neighbours(path: str, train: ImageSet, test: ImageSet, train_x: Tensor, test_x: Tensor) -> None:
    """A PNG: ten test images, one a line, each beside its eight nearest training images; those of the right class framed in green."""
    from torchvision.utils import save_image

    labelled = [i for c in range(len(test.classes)) for i in (test.labels == c).nonzero()[:1, 0].tolist()][:10]
    nearest = (F.normalize(test_x[labelled], dim=1) @ F.normalize(train_x, dim=1).T).topk(8, 1).indices.cpu()  # (10, 8)
    tiles, side = [], 64
    for i, row in zip(labelled, nearest.tolist()):
        for source, j in [(test, i), *((train, j) for j in row)]:
            image = F.interpolate(source[j][None].float() / 255, size=(side, side), mode="nearest")[0]
            right = source is train and train.labels[j] == test.labels[i]
            frame = torch.tensor([0.1, 0.75, 0.2] if right else [1.0, 1.0, 1.0])[:, None, None].repeat(1, side + 8, side + 8)
            frame[:, 4:-4, 4:-4] = image
            tiles.append(frame)
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_image(torch.stack(tiles), path, nrow=9, padding=2, pad_value=1.0)
    print(f"wrote {path}")


def probe(cfg: Config) -> dict | None:
    """Run every protocol on one backbone, append the row to results.jsonl, and return it; or draw the neighbours and return None."""
    if bool(cfg.backbone) == cfg.random:
        raise UsageError("want either --backbone FILE or --random")
    if cfg.neighbours and not cfg.neighbours.endswith(".png"):
        raise UsageError(f"--neighbours {cfg.neighbours}: want a file name that ends in .png")
    if not 0 < cfg.fraction <= 1:
        raise UsageError(f"--fraction {cfg.fraction}: want a share above 0 and up to 1")
    common.join_processes()
    if cfg.neighbours and world() > 1:
        raise UsageError("--neighbours draws in one process: start it without torchrun")
    device = common.pick_device(cfg.device)
    size = common.pick_size(cfg.size, cfg.dataset)
    torch.manual_seed(cfg.seed)
    if cfg.random:
        arch, stem = cfg.arch or "resnet18", common.pick_stem(cfg.stem, size)
        encoder = make_encoder(arch, stem)
    else:
        encoder, arch, stem = load_backbone(cfg.backbone, cfg.arch, cfg.stem)
    encoder = encoder.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    before = fingerprint(encoder)
    train, test = (load_images(cfg.dataset, cfg.data, split, size, cfg.workers, cache=cfg.cache) for split in ("train", "test"))
    if len(train.classes) < 2:
        raise UsageError(f"{cfg.data} has no classes, so there is nothing to probe; want DIR/train/<class>/... and DIR/test/<class>/...")
    if train.classes != test.classes:
        raise UsageError(f"training and test classes differ: {sorted(set(train.classes) ^ set(test.classes))[:5]}")
    if cfg.fraction < 1:
        train = label_fraction(train, cfg.fraction, cfg.seed)
    began = time.monotonic()
    (train_x, train_y), (test_x, test_y) = (features(encoder, images, size, device, cfg.workers) for images in (train, test))
    if cfg.neighbours:
        train, test = (images.subset(torch.tensor([i for i in range(len(images)) if i not in images.broken])) for images in (train, test))
        return draw_neighbours(cfg.neighbours, train, test, train_x, test_x)
    metrics = {}
    if rank() == 0:  # the others wait at the SGD probe, which all share, or are done
        metrics = {"knn_top1": knn(train_x, train_y, test_x, test_y), "knn20_top1": knn(train_x, train_y, test_x, test_y, 20, 0.07),
                   "probe_top1": quick_probe(train_x, train_y, test_x, test_y, len(train.classes))}
    if cfg.epochs:
        metrics["linear_top1"] = sgd_probe(encoder, train, test_x, test_y, cfg, size, device)
    if fingerprint(encoder) != before:
        raise RunError("the backbone changed while it was probed: this is a bug, and no row is written")
    if rank():
        return None
    facts = {"method": "random" if cfg.random else pathlib.Path(cfg.backbone).stem, "variant": "untrained" if cfg.random else "", "seed": cfg.seed,
             "device": common.device_name(device), "precision": "float32", "sha": common.git_sha(), "torch": torch.__version__, "command": common.launched_by()}
    row = {"dataset": cfg.dataset, **facts, **run_facts(cfg.backbone), "arch": arch, "stem": stem, "fraction": cfg.fraction,
           **{name: round(value, 2) for name, value in metrics.items()}, "linear_epochs": cfg.epochs,
           "probe_minutes": round((time.monotonic() - began) / 60, 2),
           "probe_command": common.launched_by()}
    out = pathlib.Path(cfg.out or (f"runs/{cfg.dataset}/random" if cfg.random else pathlib.Path(cfg.backbone).parent))
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    common.write_text(results, (results.read_text() if results.exists() else "") + json.dumps(row) + "\n")
    print(f"{row['method']} {row['variant']} on {cfg.dataset}: " + ", ".join(f"{n} {row[n]:.2f}" for n in METRICS if n in row) + f" -> {results}")
    return row


def main(argv: list[str]) -> None:
    """The command line; --table takes several files, --figure goes with it."""
    if "--table" not in argv:
        cfg = common.parse(Config, __doc__, argv, shared=object)
        if cfg.figure:
            raise UsageError("--figure goes with --table")
        probe(cfg)
        return
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--table", nargs="+", required=True)
    parser.add_argument("--figure", default="")
    args = parser.parse_args(argv)
    rows = read_rows(args.table)
    print(tables(rows))
    if args.figure:
        draw_figure(args.figure, rows)


if __name__ == "__main__":
    with common.one_line_errors():
        main(sys.argv[1:])
