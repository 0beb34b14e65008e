"""Augmentations against algorithms: eight methods in one template (arXiv 2403.05726).

    python aug_study.py --methods simclr --augs simclr --dataset cifar10    # pretrain one baseline
    python aug_study.py --methods moco --augs multicrop --dataset cifar10 --out runs/cifar10/moco-multicrop
    python results/tables.py --effects results/study.jsonl                  # what the rows of a study tell

The template: augment -> encoder -> projector -> predictor or none on the online branch; a target branch that
shares the online weights (with or without its gradient) or follows them by momentum; a loss of one online
view against one target view, averaged over every pair of a target (global) view and another online view. A
method is one row of METHODS, an augmentation one row of AUGMENTATIONS. A study is a list of runs:
results/study.sh.

Differences from the peers' recipes: SwAV on CIFAR by SGD (lightly: Adam) and without a queue; SwAV and DINO
with six local views, BYOL, Barlow Twins and VICReg with BYOL's pair of views (lightly on CIFAR: two SimCLR
views); at most 64 px nothing is blurred; one rate per method and recipe, whatever the augmentation.

Shapes: B batch, V views (global ones first), D embedding, K queue rows or prototypes.
"""
import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Config:
    methods: str = "simclr"      # one of METHODS: simclr, moco, byol, simsiam, swav, barlow, vicreg, dino
    augs: str = ""               # one of AUGMENTATIONS, empty = the method's own
    predictor: Literal["default", "on", "off"] = "default"  # switch the method's predictor
    momentum: Literal["default", "on", "off"] = "default"   # and its momentum target; off = shared weights
    temperature: float | None = None   # of simclr and moco
    queue: int | None = None           # moco's keys that serve as negatives
    momentum_end: float | None = None  # the momentum goes there from 0.99, by a cosine


# Values of the flags that are not given, by --recipe; "cifar moco": what differs for a method or a set. Where
# both do, the method's counts.
RECIPES = {
    # Two CPU cores: views of 16 px cut at the image's own resolution, through a stem that keeps them.
    "small": dict(arch="resnet10", stem="auto", view=16, batch=128, epochs=4, limit=0,
                  optimizer="adamw", lr=0.004, wd=5e-4, warmup=0.0,
                  temperature=0.2, queue=4096, momentum_end=1.0),
    # The demo.
    "small shapes": dict(stem="imagenet", view=24, batch=64, epochs=6, lr=0.008, limit=5120),
    "small tinyimagenet": dict(stem="imagenet", view=64, epochs=3, limit=20_000),
    # lightly's CIFAR-10 benchmark: SGD 0.06 at batch 128 (SwAV: Adam there). Temperature: solo-learn's CIFAR.
    "cifar": dict(arch="resnet18", stem="auto", view=0, batch=512, epochs=200, limit=0,
                  optimizer="sgd", lr=0.12, wd=5e-4, warmup=0.0,
                  temperature=0.2, queue=8192, momentum_end=1.0),
    # solo-learn's ImageNet-100.
    "imagenet": dict(arch="resnet18", stem="auto", view=0, batch=256, epochs=400, limit=0,
                     optimizer="lars", lr=0.3, wd=1e-4, warmup=10.0,
                     temperature=0.2, queue=65_536, momentum_end=1.0),
    # Rates where another than 0.004 was better in a short sweep on held-out images: results/rates.sh.
    "small moco": dict(lr=0.002, temperature=0.1, momentum_end=0.99),
    "small simsiam": dict(lr=0.002),
    "small barlow": dict(lr=0.002),
    "small vicreg": dict(lr=0.001),
    "cifar moco": dict(temperature=0.1, momentum_end=0.99),       # lightly
    "cifar simsiam": dict(lr=0.03),                               # Chen & He 2021, D; lightly: 0.06 at 512
    "cifar vicreg": dict(optimizer="lars", lr=0.3, wd=1e-4, warmup=10.0),  # solo-learn; SGD 0.12 diverges
    "imagenet moco": dict(optimizer="sgd", momentum_end=0.999),   # solo-learn, and so on
    "imagenet byol": dict(lr=0.5, wd=1e-6),
    "imagenet simsiam": dict(optimizer="sgd", lr=0.5, wd=1e-5),
    "imagenet swav": dict(lr=0.6, wd=1e-6),
    "imagenet dino": dict(wd=1e-6),
}
SHARP = 64  # pixels up to which images are not blurred, as lightly and solo-learn do on CIFAR


# ---------------------------------------------------------------------------------------------- losses


def in_float32(loss: Callable) -> Callable:
    """The loss in float32 or better, whatever autocast is around it: bf16 cosines over 0.1 lose too much."""
    def widen(x):
        wide = isinstance(x, Tensor) and x.is_floating_point()
        return x.to(torch.promote_types(x.dtype, torch.float32)) if wide else x

    @functools.wraps(loss)
    def guarded(*args, **options):
        args, options = [*map(widen, args)], {name: widen(x) for name, x in options.items()}
        device = next(x.device for x in (*args, *options.values()) if isinstance(x, Tensor))
        with torch.autocast(device.type, enabled=False):
            return loss(*args, **options)
    return guarded


@in_float32
def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.2) -> Tensor:
    """Normalised temperature-scaled cross-entropy (Chen et al. 2020, eq. 1), mean over 2B anchors.

    z1, z2: (B, D) embeddings of two views, any scale. Row i of one is the positive of row i of the other.
    """
    z = F.normalize(torch.cat([z1, z2]), dim=1)                                  # (2B, D)
    logits = z @ z.T / temperature                                               # (2B, 2B)
    logits.fill_diagonal_(float("-inf"))                                         # no view is its own negative
    positive = torch.arange(len(z), device=z.device).roll(len(z1))               # row i's partner
    return F.cross_entropy(logits, positive)


@in_float32
def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    """MoCo (He et al. 2020, eq. 1): query q (B, D) against its own key k (B, D) and the queue (K, D)."""
    q, k, queue = (F.normalize(x, dim=1) for x in (q, k, queue))
    own = (q * k).sum(1, keepdim=True)                                           # (B, 1)
    logits = torch.cat([own, q @ queue.T], 1) / temperature                      # (B, 1 + K)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


@in_float32
def cosine_loss(p: Tensor, z: Tensor) -> Tensor:
    """Mean of -cos(p, z) over (B, D), no gradient into z (Chen & He 2021, eq. 1). BYOL's 2 - 2 cos (Grill et
    al. 2020, eq. 2) has twice the gradient; the rates here, lightly's and SimSiam's, are for this scale."""
    return -F.cosine_similarity(p, z.detach(), dim=1).mean()


@in_float32
def barlow_loss(z1: Tensor, z2: Tensor, weight: float = 0.0051) -> Tensor:
    """Barlow Twins (Zbontar et al. 2021, eq. 1) of two views (B, D), standardised over the batch, with
    c = z1.T @ z2 / B (D, D): sum_i (1 - c_ii)^2 + weight * sum_{i != j} c_ij^2."""
    z = torch.stack([z1, z2])                                                    # (2, B, D)
    z = (z - z.mean(1, keepdim=True)) / (z.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    diagonal = (z[0] * z[1]).mean(0)                                             # (D,)
    gram1, gram2 = z @ z.mT                                                      # (B, B) each
    squares = (gram1 * gram2).sum() / z.shape[1] ** 2        # sum of all c_ij^2, without the larger (D, D)
    return (1 - diagonal).square().sum() + weight * (squares - diagonal.square().sum())


@in_float32
def vicreg_loss(z1: Tensor, z2: Tensor, invariance: float = 25.0, variance: float = 25.0,
                covariance: float = 1.0) -> Tensor:
    """VICReg (Bardes et al. 2022, scaled as its code) of two views (B, D), with the covariance c (D, D) of
    each: invariance * mean (z1 - z2)^2 + variance * mean_i max(0, 1 - sqrt(c_ii)), mean over views,
    + covariance * sum_{i != j} c_ij^2 / D, sum over views."""
    z = torch.stack([z1, z2])                                                    # (2, B, D)
    x = (z - z.mean(1, keepdim=True)) / math.sqrt(z.shape[1] - 1)                # x.T @ x is the covariance
    diagonal = x.square().sum(1)                                                 # (2, D)
    squares = (x @ x.mT).square().sum()                      # sum of all c_ij^2, without the larger (D, D)
    spread = F.relu(1 - (diagonal + 1e-4).sqrt()).mean()
    off_diagonal = (squares - diagonal.square().sum()) / z.shape[2]
    return invariance * F.mse_loss(*z) + variance * spread + covariance * off_diagonal


@torch.no_grad()
@in_float32
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """SwAV's codes (Caron et al. 2020, eq. 3 and A.1): scores (B, K) -> (B, K), rows sum to 1, columns to
    B / K as iterations grow. In log space, so that a small epsilon does not overflow."""
    q = scores / epsilon
    for _ in range(iterations):
        q = q - q.logsumexp(0, keepdim=True)                 # every prototype gets the same share
        q = q - q.logsumexp(1, keepdim=True)                 # every sample has one unit
    return q.exp()


@in_float32
def swav_loss(scores: Tensor, target_scores: Tensor, temperature: float = 0.1) -> Tensor:
    """SwAV (Caron et al. 2020, eq. 2): one view's prototype scores (B, K) against the codes of another's."""
    return -(sinkhorn(target_scores) * F.log_softmax(scores / temperature, dim=1)).sum(1).mean()


@in_float32
def dino_loss(student: Tensor, teacher: Tensor, center: Tensor, temperature: float = 0.1,
              teacher_temperature: float = 0.04) -> Tensor:
    """DINO (Caron et al. 2021, algorithm 1): the student (B, K) against the centred, sharpened teacher."""
    target = F.softmax((teacher.detach() - center) / teacher_temperature, dim=1)
    return -(target * F.log_softmax(student / temperature, dim=1)).sum(1).mean()


# ------------------------------------------------------------------------------- methods, augmentations


@dataclass(frozen=True)
class Method:
    """One row of the study. loss(online (B, D), target (B, D), buffer: queue or centre, temperature) is
    called for every pair of views; it is symmetric where target_gradient is set."""

    loss: Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
    projector: tuple[int, ...]           # widths after the encoder's
    predictor: tuple[int, ...] = ()      # widths; () = none
    momentum: float = 0.0                # of the target branch at the start; 0 = shared weights
    target_gradient: bool = False        # a shared target passes its gradient on
    queue: bool = False                  # keys are kept as negatives
    prototypes: int = 0                  # rows of a last layer on the unit sphere
    center: float = 0.0                  # share of the old mean teacher output that a step keeps
    last_norm: bool = False              # BN after the projector's last layer
    aug: str = "simclr"                  # default augmentation


# Widths and rates: lightly's CIFAR-10 benchmark; SimSiam: Chen & He 2021, 4.6; VICReg: Barlow Twins'.
METHODS = {
    "simclr": Method(lambda z, t, _, tau: nt_xent(z, t, tau), (512, 128), target_gradient=True),
    "moco": Method(info_nce, (512, 128), momentum=0.99, queue=True),
    "byol": Method(lambda p, t, *_: cosine_loss(p, t), (1024, 256), (1024, 256), momentum=0.99, aug="byol"),
    "simsiam": Method(lambda p, t, *_: cosine_loss(p, t), (2048, 2048), (512, 2048), last_norm=True),
    "swav": Method(lambda s, t, *_: swav_loss(s, t), (512, 128), prototypes=512, aug="multicrop"),
    "barlow": Method(lambda z, t, *_: barlow_loss(z, t), (2048, 2048), target_gradient=True, aug="byol"),
    "vicreg": Method(lambda z, t, *_: vicreg_loss(z, t), (2048, 2048), target_gradient=True, aug="byol"),
    "dino": Method(lambda s, t, center, _: dino_loss(s, t, center), (2048, 256), momentum=0.99,
                   prototypes=2048, center=0.9, aug="multicrop"),
}

SIMCLR = dict(jitter=(0.4, 0.4, 0.4, 0.1), blur_p=0.5)  # Chen et al. 2020, B.9, strength 0.5
BYOL = dict(jitter=(0.4, 0.4, 0.2, 0.1))                # Grill et al. 2020, table 6


@dataclass(frozen=True)
class Augmentation:
    """BatchAugment's options for the two global views, and for local views if there are any."""

    first: dict
    second: dict
    local: dict = field(default_factory=dict)
    locals: int = 0


LEFT_OUT = {  # one operation of simclr's each
    "crop": dict(scale=(1.0, 1.0)), "flip": dict(flip=0), "brightness": dict(jitter=(0, 0.4, 0.4, 0.1)),
    "contrast": dict(jitter=(0.4, 0, 0.4, 0.1)), "saturation": dict(jitter=(0.4, 0.4, 0, 0.1)),
    "hue": dict(jitter=(0.4, 0.4, 0.4, 0)), "jitter": dict(jitter=(0, 0, 0, 0)), "gray": dict(gray_p=0),
}
AUGMENTATIONS = {
    "crop": Augmentation(*[dict(jitter=(0, 0, 0, 0), gray_p=0)] * 2),
    "simclr": Augmentation(SIMCLR, SIMCLR),
    "byol": Augmentation(BYOL | dict(blur_p=1.0), BYOL | dict(blur_p=0.1, solarize_p=0.2)),
    # 2 + 6 views, scales of DINO
    "multicrop": Augmentation(*[SIMCLR | dict(scale=(0.3, 1.0))] * 2, SIMCLR | dict(scale=(0.05, 0.3)), 6),
    **{f"no-{name}": Augmentation(*[SIMCLR | change] * 2) for name, change in LEFT_OUT.items()},
}


def local_size(view: int) -> int:
    """Pixels of a local view: SwAV's 96 of 224, and no less than 10."""
    return max(10, round(view * 96 / 224))


def make_augments(aug: str, size: int, view: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The first global, the second global and the local views of an augmentation, as modules."""
    from common import BatchAugment

    row, no_blur = AUGMENTATIONS[aug], {}
    if size <= SHARP:
        no_blur = dict(blur_p=0.0)
    return (BatchAugment(view, **row.first | no_blur), BatchAugment(view, **row.second | no_blur),
            BatchAugment(local_size(view), **row.local | no_blur))


# ---------------------------------------------------------------------------------------------- template


def mlp(widths: list[int], last_norm: bool = False) -> nn.Sequential:
    """Linear layers with BN and ReLU between; BN after the last one if last_norm."""
    layers = []
    for a, b in zip(widths, widths[1:-1]):
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=not last_norm))
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1]))
    return nn.Sequential(*layers)


class Prototypes(nn.Module):
    """Cosines to K unit vectors: (B, D) -> (B, K). SwAV's prototypes, DINO's weight-normalised last layer."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, dim) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


class Template(nn.Module):
    """Every method: an online branch, a target branch, and one loss over pairs of views.

    queue: rows of it, where the method has one; momentum_end: where its momentum goes by a cosine; gather
    collects the embeddings of all processes under torchrun, so that losses, queue and centre see the whole
    batch.
    """

    def __init__(self, encoder: nn.Module, method: Method, temperature: float = 0.2, queue: int = 8192,
                 momentum_end: float = 1.0, gather: Callable = lambda x: x):
        super().__init__()
        self.method, self.encoder, self.gather = method, encoder, gather
        self.temperature, self.momentum_end = temperature, momentum_end
        self.projector = mlp([encoder.dim, *method.projector], method.last_norm)
        width = method.projector[-1]
        if method.prototypes:
            self.projector.append(Prototypes(width, method.prototypes))
            width = method.prototypes
        self.predictor = mlp([width, *method.predictor]) if method.predictor else nn.Identity()
        if method.momentum:
            self.target = copy.deepcopy(nn.Sequential(encoder, self.projector)).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue, width), dim=1) if method.queue else None)
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))
        self.register_buffer("center", torch.zeros(1, width) if method.center else None)

    def forward(self, global_views: Tensor, local_views: Tensor | None = None) -> Tensor:
        """global_views (2B, 3, S, S), view by view; local_views (L * B, 3, s, s) or None -> scalar loss."""
        batch = len(global_views) // 2
        z = self.projector(self.encoder(global_views))                           # (2B, D)
        online = list(self.predictor(z).split(batch))
        if local_views is not None:
            online += self.predictor(self.projector(self.encoder(local_views))).split(batch)
        if self.method.momentum:
            with torch.no_grad():
                z = self.target(global_views)
        shared = self.method.target_gradient and not self.method.momentum        # one branch is both
        targets = (z if shared else z.detach()).split(batch)
        online, targets = list(map(self.gather, online)), list(map(self.gather, targets))
        self.keys = torch.cat(targets).detach()                                  # (2B, D), B of all processes
        buffer = self.queue if self.method.queue else self.center
        pairs = [(v, g) for g in range(2) for v in range(len(online)) if v != g]
        symmetric = shared and not self.method.predictor                         # (0, 1) equals (1, 0)
        if symmetric:
            pairs.remove((0, 1))
        losses = [self.method.loss(online[v], targets[g], buffer, self.temperature) for v, g in pairs]
        if symmetric:
            losses.append(losses[0])                  # (1, 0), the first pair, counts twice in the mean
        return torch.stack(losses).mean()

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """What moves without a gradient: the momentum target, the queue (first in, first out), the centre."""
        method = self.method
        if method.momentum:
            cosine = (math.cos(math.pi * progress) + 1) / 2
            momentum = self.momentum_end - (self.momentum_end - method.momentum) * cosine
            online = [*self.encoder.parameters(), *self.projector.parameters()]
            torch._foreach_lerp_(list(self.target.parameters()), online, 1 - momentum)
        if method.queue:
            keys = F.normalize(self.keys.float(), dim=1)[-len(self.queue):]
            place = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.queue)
            self.queue.index_copy_(0, place, keys)
            self.oldest.copy_((self.oldest + len(keys)) % len(self.queue))
        if method.center:
            self.center.lerp_(self.keys.float().mean(0, keepdim=True), 1 - method.center)


def switched(name: str, predictor: str, momentum: str) -> Method:
    """A row of METHODS with its predictor and momentum as asked; ValueError for what has no meaning."""
    method = METHODS[name]
    if predictor == "off" and name == "simsiam":
        raise ValueError("simsiam without its predictor collapses to a constant (Chen & He 2021, table 1)")
    if momentum == "off" and name == "dino":
        raise ValueError("dino without its momentum teacher collapses (Caron et al. 2021, table 7)")
    if predictor == "on" and name in ("swav", "dino"):
        raise ValueError(f"{name} compares scores over prototypes: a predictor on top has no published form")
    width = method.projector[-1]
    if predictor == "off":
        method = dataclasses.replace(method, predictor=())
    if predictor == "on" and not method.predictor:  # as wide as BYOL's on 256, as narrow as SimSiam's on 2048
        method = dataclasses.replace(method, predictor=(4 * width if width < 1024 else width // 4, width))
    if momentum != "default":
        method = dataclasses.replace(method, momentum=0.99 if momentum == "on" else 0.0)
    return method


# ---------------------------------------------------------------------------------------------- train


def train(cfg) -> None:
    """One pretraining run, start to finish; cfg as common.parse(Config, ...) gives it."""
    from common import Run, UsageError, gather, save_grid

    if cfg.methods not in METHODS:
        raise UsageError(f"--methods {cfg.methods}: want one of {', '.join(METHODS)}")
    aug = cfg.augs or METHODS[cfg.methods].aug
    if aug not in AUGMENTATIONS:
        raise UsageError(f"--augs {aug}: want one of {', '.join(AUGMENTATIONS)}")
    try:
        method = switched(cfg.methods, cfg.predictor, cfg.momentum)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if method.queue and not cfg.queue:
        raise UsageError("--queue 0: want one key or more")
    views = AUGMENTATIONS[aug]
    folder = "study-simclr" if cfg.methods == "simclr" else cfg.methods  # runs/<dataset>/simclr is bassl.py's
    smallest = local_size(cfg.view) if views.locals else cfg.view
    load_backbone = None
    if cfg.weights:
        from linear_probe import load_backbone
    run = Run(cfg, "aug_study", name_variant(cfg, aug), folder, smallest, load_backbone)
    first, second, local = (augment.to(run.device) for augment in make_augments(aug, run.size, run.view))
    model = Template(run.new_encoder(), method, cfg.temperature, cfg.queue, cfg.momentum_end, gather)
    run.start(model, model.encoder)

    for images, aspect, _ in run.batches():
        generator = run.generator()
        if views.first == views.second:
            global_views = first(images, generator, aspect, views=2)             # (2B, 3, S, S)
        else:
            global_views = torch.cat([augment(images, generator, aspect) for augment in (first, second)])
        local_views = local(images, generator, aspect, views.locals) if views.locals else None
        if cfg.preview:
            grid = torch.stack(global_views.chunk(2), 1)[:32].flatten(0, 1)
            return save_grid(run.out / "preview.png", grid, 8)
        with run.autocast():
            loss = model(global_views, local_views)
        run.optimise(loss)
        model.after_step(run.step / run.steps)
        run.log(loss=loss)


def name_variant(cfg, aug: str) -> str:
    """What a result table calls this run."""
    switches = {"predictor": cfg.predictor, "momentum": cfg.momentum}
    changed = [f", {name} {value}" for name, value in switches.items() if value != "default"]
    return f"{cfg.methods}, {aug} views" + "".join(changed)


if __name__ == "__main__":
    from common import one_line_errors, parse

    with one_line_errors():
        train(parse(Config, __doc__, recipes=RECIPES, by="methods"))
