"""Augmentations against algorithms: eight methods in one template, and a factorial study of what buys accuracy (arXiv 2403.05726).

    python aug_study.py --methods simclr --augs simclr --dataset cifar10            # pretrain one baseline, like the other scripts
    python aug_study.py --methods moco --augs multicrop --dataset cifar10
    python aug_study.py --study --dataset shapes                                    # the grid, its effects, and the published ones

The template: augment -> encoder -> projector -> predictor or none on the online branch; a target branch that shares the online weights
(with or without its gradient) or follows them by momentum; a loss of one online view against one target view, averaged over every pair
of a target (global) view and another online view. A method is one row of METHODS, an augmentation one row of AUGMENTATIONS.

The study trains methods x augmentations x seeds and, for --switch-methods, each with its predictor and its momentum target switched.
The effect of a factor is the mean of paired differences: with a(c) the accuracy of cell c and P the set of pairs (c, c') that differ in
this factor alone,    effect = 1 / |P| sum over P of a(c') - a(c),    taken per seed; the table gives mean and standard deviation over
seeds and |P|, and beside it what the factor costs: the ratio of images/s of the same pairs. Cells that are missing are named; no pair is
made from them.
Shapes: B batch, V views (global ones first), D embedding, K queue rows or prototypes.
"""
import copy
import dataclasses
import fcntl
import json
import math
import os
import pathlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Config:
    methods: str = "simclr"      # one method to pretrain; with --study a comma-separated list: simclr,moco,byol,simsiam,swav,barlow,vicreg,dino
    augs: str = ""               # one of AUGMENTATIONS, empty = the method's own; with --study a comma-separated list
    predictor: Literal["default", "on", "off"] = "default"  # switch the method's predictor
    momentum: Literal["default", "on", "off"] = "default"   # switch the method's momentum target; off = its own weights without gradient
    study: bool = False          # run the grid and print its tables
    seeds: str = "0,1"           # of the study
    switch_methods: str = ""     # methods whose predictor and momentum the study switches as well, under their first augmentation
    archs: str = ""              # backbones of the study, the larger ones under the first augmentation; empty = --arch alone
    probe_fraction: float = 1.0  # share of the training labels that the study's probes see
    lr: float = 0.0              # at batch 256, 0 = the method's own (column lr of METHODS)
    wd: float = 5e-4             # lightly's CIFAR-10 benchmark
    batch: int = 512             # lightly's CIFAR-10 benchmark
    epochs: int = 200            # lightly's CIFAR-10 benchmark


# ------------------------------------------------------------------------------------------- losses


def full(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float32 or better, whatever autocast made of them."""
    return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.2) -> Tensor:
    """SimCLR (Chen et al. 2020, eq. 1): z1, z2 (B, D), row i of one is the positive of row i of the other; mean over 2B anchors."""
    with torch.autocast(z1.device.type, enabled=False):
        z = F.normalize(torch.cat(full(z1, z2)), dim=1)                                 # (2B, D)
        logits = z @ z.T / temperature                                                  # (2B, 2B)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        positive = torch.arange(len(z), device=z.device).roll(len(z1))
        return F.cross_entropy(logits.masked_fill(itself, float("-inf")), positive)


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    """MoCo (He et al. 2020, eq. 1): q (B, D) against its key k (B, D) and the rows of queue (K, D)."""
    with torch.autocast(q.device.type, enabled=False):
        q, k, queue = (F.normalize(t, dim=1) for t in full(q, k, queue))
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature  # (B, 1 + K)
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def cosine_loss(p: Tensor, z: Tensor) -> Tensor:
    """BYOL (Grill et al. 2020, eq. 2) and, up to scale and offset, SimSiam: 2 - 2 cos(p, z), no gradient into z; (B, D) each."""
    with torch.autocast(p.device.type, enabled=False):
        p, z = full(p, z.detach())
        return 2 - 2 * F.cosine_similarity(p, z, dim=1).mean()


def barlow_loss(z1: Tensor, z2: Tensor, weight: float = 0.0051) -> Tensor:
    """Barlow Twins (Zbontar et al. 2021, eq. 1): the views' cross-correlation (D, D) toward the identity; weight of the off-diagonal 0.0051."""
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.stack(full(z1, z2))                                                   # (2, B, D)
        z = (z - z.mean(1, keepdim=True)) / (z.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        on = (z[0] * z[1]).mean(0)                                                      # (D,), the diagonal of c = z1.T @ z2 / B
        if z.shape[1] < z.shape[2]:  # |z1.T z2|^2 is also the inner product of z1 z1.T and z2 z2.T: a sixteenth of the work at B 128, D 2048
            g1, g2 = z @ z.mT                                                           # (B, B) each
            squares = (g1 * g2).sum()
        else:
            squares = (z[0].T @ z[1]).square().sum()
        return (1 - on).square().sum() + weight * (squares / z.shape[1] ** 2 - on.square().sum())


def vicreg_loss(z1: Tensor, z2: Tensor, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0) -> Tensor:
    """VICReg (Bardes et al. 2022, eq. 6): mean squared distance, hinge on the standard deviation at 1, off-diagonal covariance; (B, D)."""
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.stack(full(z1, z2))                                                   # (2, B, D)
        x = (z - z.mean(1, keepdim=True)) / math.sqrt(z.shape[1] - 1)                   # c = x.T @ x is the covariance
        on = x.square().sum(1)                                                          # (2, D), its diagonal
        small = x if z.shape[1] < z.shape[2] else x.mT                                  # x.T @ x and x @ x.T have the same sum of squares
        off_diagonal = (small @ small.mT).square().sum() - on.square().sum()
        return invariance * F.mse_loss(*z) + variance * F.relu(1 - (on + 1e-4).sqrt()).mean() + covariance / z.shape[2] * off_diagonal


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """SwAV's codes (Caron et al. 2020, eq. 3 and A.1): scores (B, K) -> (B, K), rows sum to 1 and columns to B / K as iterations grow.

    In log space, so that a small epsilon does not overflow. The last scaling is the rows', so these are exact.
    """
    q = full(scores)[0] / epsilon
    for _ in range(iterations):
        q = q - q.logsumexp(0, keepdim=True)                                            # every prototype gets the same share
        q = q - q.logsumexp(1, keepdim=True)                                            # every sample has one unit
    return q.exp()


def swav_loss(scores: Tensor, target_scores: Tensor, temperature: float = 0.1, epsilon: float = 0.05) -> Tensor:
    """SwAV (Caron et al. 2020, eq. 2): cross-entropy of one view's prototype scores (B, K) against the codes of another's."""
    with torch.autocast(scores.device.type, enabled=False):
        scores, target_scores = full(scores, target_scores)
        return -(sinkhorn(target_scores, epsilon) * F.log_softmax(scores / temperature, dim=1)).sum(1).mean()


def dino_loss(student: Tensor, teacher: Tensor, center: Tensor, temperature: float = 0.1, teacher_temperature: float = 0.04) -> Tensor:
    """DINO (Caron et al. 2021, algorithm 1): cross-entropy of the student's outputs (B, K) against the centred, sharpened teacher's."""
    with torch.autocast(student.device.type, enabled=False):
        student, teacher, center = full(student, teacher.detach(), center)
        target = F.softmax((teacher - center) / teacher_temperature, dim=1)
        return -(target * F.log_softmax(student / temperature, dim=1)).sum(1).mean()


# ------------------------------------------------------------------------------------------- methods and augmentations


@dataclass(frozen=True)
class Method:
    """One row of the study. loss(online (B, D), target (B, D), queue or centre) is called for every pair of views; it is symmetric where
    target_gradient is set."""
    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    projector: tuple[int, ...]           # widths after the encoder's
    predictor: tuple[int, ...] = ()      # widths; () = none
    momentum: float = 0.0                # of the target branch at the start, 1 at the end if it ramps; 0 = shared weights
    ramp: bool = False                   # cosine ramp of the momentum to 1
    target_gradient: bool = False        # a shared target passes its gradient on
    queue: int = 0                       # keys kept as negatives
    prototypes: int = 0                  # rows of a last layer on the unit sphere
    center: float = 0.0                  # rate at which the mean teacher output is tracked
    last_norm: bool = False              # BN after the projector's last layer
    aug: str = "simclr"                  # default augmentation
    lr: float = 0.12                     # SGD at batch 256
    source: str = "lightly, CIFAR-10 benchmark"


METHODS = {
    "simclr": Method(lambda z, t, _: nt_xent(z, t), (512, 128), target_gradient=True, source="lightly; temperature 0.2: solo-learn"),
    "moco": Method(lambda q, k, queue: info_nce(q, k, queue), (512, 128), momentum=0.99, queue=4096),
    "byol": Method(lambda p, t, _: cosine_loss(p, t), (1024, 256), (1024, 256), momentum=0.99, ramp=True, aug="byol"),
    "simsiam": Method(lambda p, t, _: cosine_loss(p, t), (2048, 2048), (512, 2048), last_norm=True, lr=0.03, source="Chen & He 2021, 4.6 and D; lightly"),
    "swav": Method(lambda s, t, _: swav_loss(s, t), (512, 128), prototypes=512, aug="multicrop", source="lightly, SGD in place of its Adam; Caron et al. 2020"),
    "barlow": Method(lambda z, t, _: barlow_loss(z, t), (2048, 2048), target_gradient=True, aug="byol", lr=0.06,
                     source="lightly, at half its rate, which starts faster; Zbontar et al. 2021"),
    "vicreg": Method(lambda z, t, _: vicreg_loss(z, t), (2048, 2048), target_gradient=True, aug="byol", lr=0.06,
                     source="Bardes et al. 2022; widths and rate: barlow's"),
    "dino": Method(lambda s, t, c: dino_loss(s, t, c), (2048, 256), momentum=0.99, ramp=True, prototypes=2048, center=0.9, aug="multicrop",
                   source="lightly; Caron et al. 2021"),
}

SIMCLR = dict(scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2)  # Chen et al. 2020, B.9: blur above 64 px alone
BYOL = dict(scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2)    # Grill et al. 2020, table 6


@dataclass(frozen=True)
class Augmentation:
    """BatchAugment's options for the two global views, and for local views if there are any."""
    first: dict
    second: dict
    local: dict = field(default_factory=dict)
    locals: int = 0


AUGMENTATIONS = {
    "crop": Augmentation(*[dict(scale=(0.2, 1.0), jitter=(0, 0, 0, 0), gray_p=0, blur_p=0)] * 2),
    "simclr": Augmentation(SIMCLR, SIMCLR),
    "byol": Augmentation(BYOL | dict(blur_p=1.0), BYOL | dict(blur_p=0.1, solarize_p=0.2)),
    "multicrop": Augmentation(*[SIMCLR | dict(scale=(0.3, 1.0))] * 2, SIMCLR | dict(scale=(0.05, 0.3)), 6),  # scales: DINO, 2 + 6 views
    **{f"no-{name}": Augmentation(*[SIMCLR | change] * 2) for name, change in {                                 # leave one of simclr's out
        "crop": dict(scale=(1.0, 1.0)), "flip": dict(flip=0), "brightness": dict(jitter=(0, 0.4, 0.4, 0.1)), "contrast": dict(jitter=(0.4, 0, 0.4, 0.1)),
        "saturation": dict(jitter=(0.4, 0.4, 0, 0.1)), "hue": dict(jitter=(0.4, 0.4, 0.4, 0)), "jitter": dict(jitter=(0, 0, 0, 0)), "gray": dict(gray_p=0)}.items()},
}


def local_size(size: int) -> int:
    """Pixels of a local view: SwAV's 96 of 224, and 18 of 32 so that a small network's last stage still sees 2 x 2."""
    return max(18, round(size * 96 / 224))


# ------------------------------------------------------------------------------------------- template


def mlp(widths: list[int], last_norm: bool = False) -> nn.Sequential:
    """Linear layers with BN and ReLU between; BN after the last one if last_norm."""
    layers = []
    for i, (a, b) in enumerate(zip(widths, widths[1:])):
        last = i == len(widths) - 2
        layers += [nn.Linear(a, b, bias=last and not last_norm)]
        layers += [nn.BatchNorm1d(b)] if last_norm or not last else []
        layers += [] if last else [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Prototypes(nn.Module):
    """Cosines to K unit vectors: (B, D) -> (B, K). SwAV's prototypes and DINO's weight-normalised last layer."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, dim) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


class Template(nn.Module):
    """Every method: an online branch, a target branch, and one loss over pairs of views.

    gather collects the embeddings of all processes under torchrun, so that losses, queue and centre see the whole batch.
    """

    def __init__(self, encoder: nn.Module, method: Method, gather: Callable[[Tensor], Tensor] = lambda x: x):
        super().__init__()
        self.method, self.encoder, self.gather = method, encoder, gather
        self.projector = mlp([encoder.dim, *method.projector], method.last_norm)
        width = method.projector[-1]
        if method.prototypes:
            self.projector.append(Prototypes(width, method.prototypes))
            width = method.prototypes
        self.predictor = mlp([width, *method.predictor]) if method.predictor else nn.Identity()
        if method.momentum:
            self.target = copy.deepcopy(nn.Sequential(encoder, self.projector)).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(method.queue, width), dim=1) if method.queue else None)
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))
        self.register_buffer("center", torch.zeros(1, width) if method.center else None)
        self.keys: Tensor | None = None

    def forward(self, global_views: Tensor, local_views: Tensor | None = None) -> Tensor:
        """global_views (2B, 3, S, S), view by view; local_views (L * B, 3, s, s) or None -> scalar loss."""
        batch = len(global_views) // 2
        z = self.projector(self.encoder(global_views))                                  # (2B, D)
        online = list(self.predictor(z).split(batch))
        if local_views is not None:
            online += self.predictor(self.projector(self.encoder(local_views))).split(batch)
        if self.method.momentum:
            with torch.no_grad():
                z = self.target(global_views)
        shared = self.method.target_gradient and not self.method.momentum                # the target is the online branch
        targets = (z if shared else z.detach()).split(batch)
        online, targets = list(map(self.gather, online)), list(map(self.gather, targets))
        self.keys = torch.cat(targets).detach()                                         # (2B, D), B now of all processes
        memory = self.queue if self.method.queue else self.center
        loss = lambda v, g: self.method.loss(online[v], targets[g], memory)  # noqa: E731
        alike = shared and not self.method.predictor                                    # then both pairs of global views give one number
        losses = [loss(1, 0)] * 2 if alike else [loss(1, 0), loss(0, 1)]
        losses += [loss(v, g) for g in range(2) for v in range(2, len(online))]          # local views
        return torch.stack(losses).mean()

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """What moves without a gradient: the momentum target, the queue (first in, first out), the centre."""
        method = self.method
        if method.momentum:
            m = 1 - (1 - method.momentum) * (math.cos(math.pi * progress) + 1) / 2 if method.ramp else method.momentum
            torch._foreach_lerp_(list(self.target.parameters()), [*self.encoder.parameters(), *self.projector.parameters()], 1 - m)
        if method.queue:
            keys = F.normalize(self.keys.float(), dim=1).chunk(2)[1][-len(self.queue):]  # one view's keys: the other's say the same
            place = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.queue)
            self.queue.index_copy_(0, place, keys)
            self.oldest.copy_((self.oldest + len(keys)) % len(self.queue))
        if method.center:
            self.center.lerp_(self.keys.float().mean(0, keepdim=True), 1 - method.center)


def switched(name: str, predictor: str, momentum: str) -> Method:
    """A row of METHODS with its predictor and momentum as asked. Raises ValueError, with the reason, for what has no meaning."""
    method = METHODS[name]
    if predictor == "off" and name == "simsiam":
        raise ValueError("simsiam without its predictor has a constant output as its exact optimum (Chen & He 2021, table 1): it collapses")
    if momentum == "off" and name == "dino":
        raise ValueError("dino without its momentum teacher trains on its own sharpened output (Caron et al. 2021, table 7): it collapses")
    if predictor == "on" and name in ("swav", "dino"):
        raise ValueError(f"{name} compares scores over prototypes; a predictor on top of scores has no published form")
    if predictor != "default":
        width = method.projector[-1]
        method = dataclasses.replace(method, predictor=(method.predictor or (4 * width if width < 1024 else width // 4, width)) if predictor == "on" else ())
    if momentum != "default":
        method = dataclasses.replace(method, momentum=(method.momentum or 0.99) if momentum == "on" else 0.0)
    return method


# ------------------------------------------------------------------------------------------- train


def train(cfg):
    """One pretraining run, start to finish; cfg as common.parse(Config, ...) gives it, with one method and one augmentation."""
    from common import BatchAugment, Run, UsageError, gather, resnet, save_grid

    name, aug = cfg.methods, cfg.augs or (METHODS[cfg.methods].aug if cfg.methods in METHODS else "")
    if name not in METHODS or aug not in AUGMENTATIONS:
        raise UsageError(f"--methods {name} --augs {aug}: want one of {', '.join(METHODS)} and one of {', '.join(AUGMENTATIONS)}")
    try:
        method = switched(name, cfg.predictor, cfg.momentum)
    except ValueError as error:
        raise UsageError(str(error)) from None
    cfg.lr = cfg.lr or method.lr
    run = Run(cfg, "aug_study", name_variant(name, aug, cfg.predictor, cfg.momentum))
    views = AUGMENTATIONS[aug]
    first, second, local = (BatchAugment(size, **options).to(run.device) for size, options in
                            ((run.size, views.first), (run.size, views.second), (local_size(run.size), views.local)))
    model = Template(resnet(cfg.arch, run.stem), method, gather)
    run.start(model, model.encoder)

    for images, _ in run.batches():
        generator = run.generator()
        if views.first == views.second:
            global_views = first(images, generator, views=2)                                 # (2B, 3, S, S)
        else:
            global_views = torch.cat([first(images, generator), second(images, generator)])
        local_views = local(images, generator, views=views.locals) if views.locals else None  # (6B, 3, s, s)
        if cfg.preview:
            return save_grid(run.out / "preview.png", torch.stack(global_views.chunk(2), 1)[:32].flatten(0, 1), 8)
        with run.autocast():
            loss = model(global_views, local_views)
        run.optimise(loss)
        model.after_step(run.step / run.steps)
        run.log(loss=loss)


def name_variant(method: str, aug: str, predictor: str, momentum: str) -> str:
    """What a result table calls this run."""
    return f"{method}, {aug} views" + "".join(f", {part} {state}" for part, state in (("predictor", predictor), ("momentum", momentum)) if state != "default")


# ------------------------------------------------------------------------------------------- study


@dataclass(frozen=True)
class Cell:
    """One run of the grid, without its seed."""
    method: str
    aug: str
    arch: str
    predictor: str = "default"
    momentum: str = "default"


# Factor -> (field of Cell, from, to); published mean effects in points, arXiv 2403.05726.
FACTORS = {
    "BYOL's augmentations over SimCLR's": ("aug", "simclr", "byol", 2.3),
    "multi-crop over SimCLR's augmentations": ("aug", "simclr", "multicrop", 2.5),
    "momentum target on": ("momentum", "off", "on", 1.8),
    "predictor on": ("predictor", "off", "on", 0.3),
}


def states(cell: Cell) -> Cell:
    """A cell with "default" switches spelled out, so that a method's own row pairs with its switched one."""
    method = METHODS[cell.method]
    return dataclasses.replace(cell, predictor=("on" if method.predictor else "off") if cell.predictor == "default" else cell.predictor,
                               momentum=("on" if method.momentum else "off") if cell.momentum == "default" else cell.momentum)


def paired_effect(accuracy: dict[tuple[Cell, int], float], name: str, low: str, high: str) -> tuple[list[float], int]:
    """Mean paired difference, one per seed, and the number of pairs per seed.

    accuracy: (cell, seed) -> percent, cells with their switches spelled out. A pair is two cells of one seed that differ in field
    `name` alone, low against high.
    """
    differences: dict[int, list[float]] = {}
    for (cell, seed), value in accuracy.items():
        partner = (dataclasses.replace(cell, **{name: high}), seed)
        if getattr(cell, name) == low and partner in accuracy:
            differences.setdefault(seed, []).append(accuracy[partner] - value)
    return [statistics.mean(d) for d in differences.values()], max((len(d) for d in differences.values()), default=0)


def effects(accuracy: dict[tuple[Cell, int], float]) -> list[dict]:
    """Every factor that the cells can tell: FACTORS, each method over simclr, each backbone over the smallest."""
    factors = dict(FACTORS)
    for method in dict.fromkeys(cell.method for cell, _ in accuracy):
        if method != "simclr":
            factors[f"{method} over simclr"] = ("method", "simclr", method, None)
    archs = sorted({cell.arch for cell, _ in accuracy}, key=lambda a: int(a.removeprefix("resnet")))
    for arch in archs[1:]:
        factors[f"larger backbone: {arch} over {archs[0]}"] = ("arch", archs[0], arch, None)
    rows = []
    for label, (name, low, high, published) in factors.items():
        # A method is compared as it comes: its switches are part of it.
        table = {(dataclasses.replace(cell, predictor="", momentum=""), seed): value for (cell, seed), value in accuracy.items()
                 if states(Cell(cell.method, cell.aug, cell.arch)) == cell} if name == "method" else accuracy
        per_seed, pairs = paired_effect(table, name, low, high)
        if per_seed:
            rows.append({"factor": label, "mean": statistics.mean(per_seed), "std": statistics.stdev(per_seed) if len(per_seed) > 1 else None,
                         "seeds": len(per_seed), "pairs": pairs, "published": published})
    return rows


def grid(cfg) -> list[tuple[Cell, int]]:
    """The cells of a study with their seeds: methods x augmentations, then switches, then larger backbones; impossible switches left out."""
    methods, augs, archs = (text.split(",") for text in (cfg.methods, cfg.augs or "simclr,byol,multicrop", cfg.archs or cfg.arch))
    cells = [Cell(method, aug, archs[0]) for method in methods for aug in augs]
    for method in cfg.switch_methods.split(",") if cfg.switch_methods else []:
        own = states(Cell(method, augs[0], archs[0]))
        for change in ({"predictor": "off" if own.predictor == "on" else "on"}, {"momentum": "off" if own.momentum == "on" else "on"}):
            try:
                switched(method, **{"predictor": "default", "momentum": "default"} | change)
                cells.append(dataclasses.replace(Cell(method, augs[0], archs[0]), **change))
            except ValueError as error:
                print(f"left out: {error}")
    cells += [Cell(method, augs[0], arch) for arch in archs[1:] for method in methods]
    return [(cell, int(seed)) for seed in cfg.seeds.split(",") for cell in dict.fromkeys(cells)]


def study(cfg) -> None:
    """Run every cell that has no row yet, then print the tables and write them to OUT; a cell that fails is named and the others go on.

    Several processes may be started with the same command: each takes cells that no other is at, and waits for the rest at the end.
    """
    import common

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise common.UsageError("--study runs without torchrun: start the same command once per device, and they share the cells")
    out = pathlib.Path(cfg.out or f"runs/{cfg.dataset}/study")
    cells, rows, failed = grid(cfg), {}, {}
    for wait in (False, True):
        for number, (cell, seed) in enumerate(cells, 1):
            if (cell, seed) in rows or (cell, seed) in failed:
                continue
            folder = out / "-".join([cell.method, cell.aug, cell.arch, f"p{cell.predictor}", f"m{cell.momentum}", f"s{seed}"])
            try:
                row = run_cell(cfg, cell, seed, folder, wait, f"cell {number} of {len(cells)}: {folder.name}")
                rows |= {(cell, seed): row} if row else {}
            except common.RunError as error:
                failed[cell, seed] = f"{folder.name} ({error})"
    finished = [(cell, seed) for cell, seed in cells if (cell, seed) in rows]  # in the order of the grid, whoever made them
    accuracy, rates = ({(states(cell), seed): rows[cell, seed][key] for cell, seed in finished} for key in ("probe_top1", "images_per_s"))
    text = report(cfg, accuracy, rates, list(failed.values()))
    common.write_text(out / "study.md", text + "\n")
    print(text)
    draw_effects(out / "effects.png", effects(accuracy))


def run_cell(cfg, cell: Cell, seed: int, folder: pathlib.Path, wait: bool, title: str) -> dict | None:
    """The result row of one cell: read if it is there, else made by pretraining and probing; None where another process is at it and wait
    is False. Raises UsageError where the row that is there was made with other settings, RunError where the run fails."""
    import common
    import linear_probe

    run = dataclasses.replace(cfg, methods=cell.method, augs=cell.aug, arch=cell.arch, predictor=cell.predictor, momentum=cell.momentum, seed=seed,
                              lr=cfg.lr or METHODS[cell.method].lr, out=str(folder), study=False, seeds="", switch_methods="", archs="")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "cell.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return None
        results = folder / "results.jsonl"
        if not results.exists():
            print(title, flush=True)
            train(run)
            linear_probe.probe(linear_probe.Config(backbone=str(folder / "backbone.pt"), dataset=cfg.dataset, data=cfg.data, size=cfg.size, epochs=0,
                                                   fraction=cfg.probe_fraction, workers=cfg.workers, cache=cfg.cache, device=cfg.device))
        row = json.loads(results.read_text().splitlines()[-1])
        if row["settings"] != linear_probe.settings_digest(vars(run)):
            raise common.UsageError(f"{folder} holds a row that was made with other flags; choose another --out")
        return row


def report(cfg, accuracy: dict, rates: dict, missing: list[str]) -> str:
    """Markdown: the grid, the effects beside the published ones and what each costs in images/s, the images/s of every cell, what is missing."""
    from linear_probe import markdown, spread

    cells = list(dict.fromkeys(cell for cell, _ in accuracy))
    augs = list(dict.fromkeys(cell.aug for cell in cells))

    def label(cell: Cell) -> str:
        own = states(Cell(cell.method, cell.aug, cell.arch))
        changes = [f"{part} {getattr(cell, part)}" for part in ("predictor", "momentum") if getattr(cell, part) != getattr(own, part)]
        return ", ".join([cell.method, cell.arch, *changes])

    def by_views(values: dict, what: str, digits: int) -> list[str]:
        lines: dict[str, dict[str, str]] = {}
        for cell in cells:
            lines.setdefault(label(cell), {})[cell.aug] = spread([value for (other, _), value in values.items() if other == cell], digits)
        return markdown([what, *(f"{aug} views" for aug in augs)], [[name, *[line.get(aug, "") for aug in augs]] for name, line in lines.items()])

    # A ratio is the exponential of a difference of logarithms, so the cost of a factor comes out of the same pairs as its effect.
    speed = {row["factor"]: math.exp(row["mean"]) for row in effects({key: math.log(rate) for key, rate in rates.items()})}
    limit = f"{cfg.limit} images" if cfg.limit else "all images"
    text = [f"Study on {cfg.dataset}: {limit}, {cfg.epochs} epochs, batch {cfg.batch}, seeds {cfg.seeds}; probe_top1 in percent, mean ± standard deviation over seeds."
            + (" A reduced budget: effects, not records." if cfg.limit or cfg.epochs < 100 else ""), "", *by_views(accuracy, "probe_top1", 2), ""]
    text += markdown(["factor", "effect, points", "pairs x seeds", "published", "speed"],
                     [[r["factor"], f"{r['mean']:+.2f}" + (f" ± {r['std']:.2f}" if r["std"] is not None else ""), f"{r['pairs']} x {r['seeds']}",
                       f"{r['published']:+.1f}" if r["published"] is not None else "", f"x {speed[r['factor']]:.2f}"] for r in effects(accuracy)])
    text += ["", *by_views(rates, "images/s", 0)]
    if missing:
        text += ["", "Missing, and in no pair: " + "; ".join(missing)]
    return "\n".join(text)


def draw_effects(path: pathlib.Path, rows: list[dict]) -> None:
    """A bar chart of the effects where matplotlib is there; a line that says so where it is not."""
    from linear_probe import pyplot

    if not (plt := pyplot("chart")):
        return
    figure, axis = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.2), layout="constrained")
    places = range(len(rows))
    axis.barh(places, [r["mean"] for r in rows], xerr=[r["std"] or 0 for r in rows], label="ours")
    published = [(i, r["published"]) for i, r in enumerate(rows) if r["published"] is not None]
    axis.plot([value for _, value in published], [i for i, _ in published], "D", color="black", label="published")
    axis.set_yticks(places, [r["factor"] for r in rows])
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("mean paired difference in probe top-1, points")
    axis.legend()
    axis.invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    from common import one_line_errors, parse

    with one_line_errors():
        cfg = parse(Config, __doc__)
        (study if cfg.study else train)(cfg)
