"""Batch-adaptive self-supervised learning: fuse the images of a batch before a contrastive method sees them
(arXiv 2311.09974).

    python bassl.py --dataset cifar10              # CPU: the small recipe; GPU: ResNet-18 for 200 epochs
    python bassl.py --dataset cifar10 --layers 0   # the plain framework, SimCLR
    python bassl.py --dataset imagenet100 --batch 256 --data DIR
    python bassl.py --fuse plain --unpaired --gate 3 --out runs/control       # does an open gate cheat?

The paper: Patch Partition, Conv Embedding and Patch Restore turn a batch of images into one of the same shape
in which every image carries something of the others; the module sits in front of SimCLR, MoCo, BYOL or
SimSiam and is dropped after pretraining. No official code is public and the text leaves the layer open. Our
reading, which no number of the paper vouches for: the batch becomes patches (B, N, D), then L times
x + gate * GELU(norm(conv(x))), a convolution over the (N, D) plane whose channels are the batch's positions,
then images again. The convolution has no bias and the norm no per-position parameters, so that a position has
as little of its own to sign with as possible.

Fused plainly, both views of an image get the same row of the convolution, and with an open gate the network
can match the rows in place of the images: unrelated images are then "matched" far above chance. --fuse says
what is done about that:
  plain        both views, as written above; leaks
  shuffled     the batch is permuted independently for each view, and put back after
  one          only the first view is fused: nothing is shared, so nothing can leak
  adversarial  the same, with the gradient into the convolution reversed: it learns to disturb

With the gate open and unpaired images, where only a shortcut can help, the loss of plain falls from 5.54,
chance at batch 128, to 4.98 and that of the others stays (results/bassl-fusion.sh). Heads are those of
lightly's CIFAR-10 benchmark on every set, and all frameworks get SimCLR's symmetric views.

Shapes: B batch, C channels, N patches, D values per patch or embedding dimension.
"""
import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Config:
    framework: Literal["simclr", "moco", "byol", "simsiam"] = "simclr"  # what the fused views go into
    layers: int = 1              # Embedding Layers, 0 = the plain framework; the number is ours
    patch: int = 0               # pixels of a patch's side, 0 = an eighth of the view or less; ours
    kernel: int = 1              # side of the convolution over (patches, values), odd; ours
    fuse: Literal["one", "adversarial", "shuffled", "plain"] = "one"  # see above; this cannot leak
    gate: float = 0.15           # hold the gates at this value; 0 = learned, from 0 on; ours
    unpaired: bool = False       # control: the second view is of another image, only a shortcut can help
    temperature: float | None = None   # of simclr and moco
    queue: int | None = None           # moco's keys that serve as negatives
    momentum: float = 0.99             # of moco's and byol's target at the start; lightly, solo-learn
    momentum_end: float | None = None  # and at the end, by a cosine


# Values of the flags that are not given, by --recipe; "cifar moco": what differs for a framework or a set.
# Where both do, the framework's counts.
RECIPES = {
    # Two CPU cores: views of 16 px cut at the image's own resolution, through a stem that keeps them.
    "small": dict(arch="resnet10", stem="auto", view=16, batch=128, epochs=4, limit=0,
                  optimizer="adamw", lr=0.004, wd=5e-4, warmup=0.0,
                  temperature=0.2, queue=4096, momentum_end=1.0),
    # The demo.
    "small shapes": dict(stem="imagenet", view=24, batch=64, epochs=6, lr=0.008, limit=5120),
    "small tinyimagenet": dict(stem="imagenet", view=64, epochs=3, limit=20_000),
    # lightly's CIFAR-10 benchmark: SGD 0.06 at batch 128. Temperature: solo-learn's CIFAR.
    "cifar": dict(arch="resnet18", stem="auto", view=0, batch=512, epochs=200, limit=0,
                  optimizer="sgd", lr=0.12, wd=5e-4, warmup=0.0,
                  temperature=0.2, queue=8192, momentum_end=1.0),
    # solo-learn's ImageNet-100 (SimCLR 77.64, online probe).
    "imagenet": dict(arch="resnet18", stem="auto", view=0, batch=256, epochs=400, limit=0,
                     optimizer="lars", lr=0.3, wd=1e-4, warmup=10.0,
                     temperature=0.2, queue=65_536, momentum_end=1.0),
    # Rates where another than 0.004 was better in a short sweep on held-out images: results/rates.sh.
    "small moco": dict(lr=0.002, temperature=0.1, momentum_end=0.99),
    "small simsiam": dict(lr=0.002),
    "cifar moco": dict(temperature=0.1, momentum_end=0.99),       # lightly
    "cifar simsiam": dict(lr=0.03),                               # Chen & He 2021, D; lightly: 0.06 at 512
    "imagenet moco": dict(optimizer="sgd", momentum_end=0.999),   # solo-learn: 78.20
    "imagenet byol": dict(lr=0.5, wd=1e-6),                       # solo-learn: 80.16
    "imagenet simsiam": dict(optimizer="sgd", lr=0.5, wd=1e-5),   # solo-learn
}
SHARP = 64  # pixels up to which images are not blurred, as lightly and solo-learn do; above: MoCo v2's blur


# ---------------------------------------------------------------------------------------------- fusion


def patch_partition(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, D): N = (H / P)(W / P) patches, row by row, of D = C P^2 values. ValueError
    where P does not divide H and W."""
    height, width = x.shape[2:]
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"patch {patch} does not divide the image's {height} x {width}")
    return F.pixel_unshuffle(x, patch).flatten(2).mT                             # (B, N, D)


def patch_restore(tokens: Tensor, patch: int, channels: int, image_size: int) -> Tensor:
    """(B, N, D) -> (B, C, S, S), the exact inverse of patch_partition on square images;
    ValueError where N, D do not fit."""
    n, d = tokens.shape[1:]
    if n * patch**2 != image_size**2 or d != channels * patch**2:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} are no images of {image_size} pixels and "
                         f"{channels} channels in patches of {patch}")
    side = image_size // patch
    return F.pixel_shuffle(tokens.mT.unflatten(2, (side, side)), patch)


class BatchFusion(nn.Module):
    """Lets the images of a batch exchange information: partition, `layers` gated convolutions, restore.

    batch and image_size are fixed: the convolution has one channel per position in the batch. patch must
    divide image_size, kernel be odd; ValueError otherwise. With gates at 0, where they start, the module is
    the identity.
    """

    def __init__(self, batch: int, image_size: int, patch: int = 4, layers: int = 1, kernel: int = 1):
        super().__init__()
        if patch < 1 or image_size % patch:
            raise ValueError(f"patch {patch} does not divide the image's {image_size} pixels")
        if kernel % 2 == 0:
            raise ValueError(f"kernel {kernel} is even; want an odd one")
        self.batch, self.image_size, self.patch = batch, image_size, patch
        convs = [nn.Conv2d(batch, batch, kernel, padding=kernel // 2, bias=False) for _ in range(layers)]
        self.convs = nn.ModuleList(convs)
        self.gates = nn.ParameterList(torch.zeros(()) for _ in range(layers))

    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W). order (B,): a permutation, applied before and undone after."""
        if len(x) != self.batch or x.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(f"images {tuple(x.shape)}, but the fusion was made for {self.batch} of "
                             f"{self.image_size} x {self.image_size} pixels")
        tokens = patch_partition(x if order is None else x[order], self.patch)   # (B, N, D)
        for conv, gate in zip(self.convs, self.gates):
            mixed = conv(tokens[None])[0]                                        # (B, N, D), B as channels
            tokens = tokens + gate * F.gelu(F.layer_norm(mixed, mixed.shape[1:]))
        x = patch_restore(tokens, self.patch, x.shape[1], self.image_size)
        return x if order is None else x[order.argsort()]

    def hold(self, value: float) -> None:
        """Fix every gate at a value: the strength of the fusion is then chosen, not learned."""
        for gate in self.gates:
            gate.requires_grad_(False).fill_(value)

    def make_adversarial(self) -> None:
        """Reverse the convolutions' gradient (Ganin & Lempitsky 2015): they learn to raise the loss."""
        for weight in self.convs.parameters():
            weight.register_hook(torch.neg)


def fuse_views(fusion: BatchFusion, kind: str, x1: Tensor, x2: Tensor, generator: torch.Generator):
    """The two views (B, C, H, W) of a batch as the framework gets them; kind as in Config.fuse."""
    if kind == "plain":
        return fusion(x1), fusion(x2)
    if kind == "shuffled":
        orders = torch.stack([torch.randperm(len(x1), generator=generator) for _ in range(2)])
        one, two = orders.to(x1.device, non_blocking=True)
        return fusion(x1, one), fusion(x2, two)
    return fusion(x1), x2


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


# ---------------------------------------------------------------------------------------------- frameworks
# Each maps two views (B, C, H, W) to a loss. Widths are those of lightly's CIFAR-10 benchmark.


def mlp(widths: list[int], last_norm: bool = False) -> nn.Sequential:
    """Linear layers with BN and ReLU between; BN after the last one if last_norm."""
    layers = []
    for a, b in zip(widths, widths[1:-1]):
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=not last_norm))
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1]))
    return nn.Sequential(*layers)


class Framework(nn.Module):
    """What the four below share. All take the same options; each uses those that it has a use for.

    target: a copy of encoder and projector that follows them by a momentum, which goes to momentum_end by a
    cosine. queue: the target's latest keys. gather collects the embeddings of all processes under torchrun,
    so that losses and queue see the whole batch; alone it changes nothing.
    """

    projector_widths, predictor_widths = [512, 128], []
    last_norm = has_target = has_queue = False

    def __init__(self, encoder: nn.Module, temperature: float = 0.2, queue: int = 8192,
                 momentum: float = 0.99, momentum_end: float = 1.0, gather: Callable = lambda x: x):
        super().__init__()
        self.temperature, self.momentum, self.momentum_end = temperature, momentum, momentum_end
        self.encoder, self.gather = encoder, gather
        self.projector = mlp([encoder.dim, *self.projector_widths], last_norm=self.last_norm)
        width = self.projector_widths[-1]
        if self.predictor_widths:
            self.predictor = mlp([width, *self.predictor_widths])
        if self.has_target:
            self.target = copy.deepcopy(nn.Sequential(encoder, self.projector)).requires_grad_(False)
        if self.has_queue:
            self.register_buffer("queue", F.normalize(torch.randn(queue, width), dim=1))
            self.register_buffer("oldest", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """What moves without a gradient: the target, and the queue, first in, first out: a step's keys are
        negatives from the next step on. progress: share of the run, 0 to 1."""
        if self.has_target:
            cosine = (math.cos(math.pi * progress) + 1) / 2
            momentum = self.momentum_end - (self.momentum_end - self.momentum) * cosine
            online = [*self.encoder.parameters(), *self.projector.parameters()]
            torch._foreach_lerp_(list(self.target.parameters()), online, 1 - momentum)
        if self.has_queue:
            keys = self.keys[-len(self.queue):]
            place = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.queue)
            self.queue.index_copy_(0, place, keys)
            self.oldest.copy_((self.oldest + len(keys)) % len(self.queue))


class SimCLR(Framework):
    """Chen et al. 2020."""

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        z1, z2 = self.projector(self.encoder(torch.cat([x1, x2]))).chunk(2)      # (B, 128) each
        return nt_xent(self.gather(z1), self.gather(z2), self.temperature)


class MoCo(Framework):
    """MoCo v2 (Chen et al. 2020b) with the loss in both directions; both views' keys enter the queue."""

    has_target = has_queue = True

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        x = torch.cat([x1, x2])
        q1, q2 = map(self.gather, self.projector(self.encoder(x)).chunk(2))      # (B, 128) each
        with torch.no_grad():
            k1, k2 = map(self.gather, F.normalize(self.target(x).float(), dim=1).chunk(2))
        self.keys = torch.cat([k1, k2])                                          # (2B, 128)
        losses = [info_nce(q, k, self.queue, self.temperature) for q, k in ((q1, k2), (q2, k1))]
        return sum(losses) / 2


class BYOL(Framework):
    """Grill et al. 2020."""

    projector_widths, predictor_widths, has_target = [1024, 256], [1024, 256], True

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        x = torch.cat([x1, x2])
        p1, p2 = map(self.gather, self.predictor(self.projector(self.encoder(x))).chunk(2))  # (B, 256) each
        with torch.no_grad():
            z1, z2 = map(self.gather, self.target(x).chunk(2))
        return 0.5 * (cosine_loss(p1, z2) + cosine_loss(p2, z1))


class SimSiam(Framework):
    """Chen & He 2021, 4.6 (CIFAR): a two-layer projector of width 2048, a predictor that narrows to 512."""

    projector_widths, predictor_widths, last_norm = [2048, 2048], [512, 2048], True

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        z = self.projector(self.encoder(torch.cat([x1, x2])))                    # (2B, 2048)
        z1, z2, p1, p2 = map(self.gather, (*z.chunk(2), *self.predictor(z).chunk(2)))
        return 0.5 * (cosine_loss(p1, z2) + cosine_loss(p2, z1))


FRAMEWORKS = {"simclr": SimCLR, "moco": MoCo, "byol": BYOL, "simsiam": SimSiam}

# ---------------------------------------------------------------------------------------------- train


def name_variant(cfg) -> str:
    """What a result table calls this run."""
    name = cfg.framework
    if cfg.layers:
        parts = [cfg.fuse] + [f"gate {cfg.gate:g}"] * (cfg.gate != 0)
        parts += [f"{cfg.layers} layer{'s' * (cfg.layers > 1)}"]
        parts += [f"kernel {cfg.kernel}"] * (cfg.kernel > 1)
        name += f" + fusion ({', '.join(parts)})"
    return name + ", unpaired" * cfg.unpaired


def train(cfg) -> None:
    """One pretraining run, start to finish; cfg as common.parse(Config, ...) gives it."""
    from common import BatchAugment, Run, UsageError, gather, save_grid

    if FRAMEWORKS[cfg.framework].has_queue and not cfg.queue:
        raise UsageError("--queue 0: want one key or more")
    folder = f"{'bassl' if cfg.layers else 'plain'}-{cfg.framework}"
    folder = {"bassl-simclr": "bassl", "plain-simclr": "simclr"}.get(folder, folder)  # as make names them
    load_backbone = None
    if cfg.weights:
        from linear_probe import load_backbone
    run = Run(cfg, "bassl", name_variant(cfg), folder, load_backbone=load_backbone)
    encoder = run.new_encoder()
    framework = FRAMEWORKS[cfg.framework](encoder, cfg.temperature, cfg.queue, cfg.momentum,
                                          cfg.momentum_end, gather)
    patch = cfg.patch or max(p for p in range(1, run.view // 8 + 1) if run.view % p == 0)
    try:
        fusion = BatchFusion(run.batch, run.view, patch, cfg.layers, cfg.kernel)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if cfg.fuse == "adversarial":
        fusion.make_adversarial()
    if cfg.gate:
        fusion.hold(cfg.gate)
    augment = BatchAugment(run.view, blur_p=0.5 if run.size > SHARP else 0.0).to(run.device)
    run.start(nn.ModuleDict({"framework": framework, "fusion": fusion}), encoder)

    for images, aspect, _ in run.batches():
        generator = run.generator()
        x1, x2 = augment(images, generator, aspect, views=2).chunk(2)            # (B, 3, S, S) each
        if cfg.unpaired:  # an order of its own at every step: the fusion can learn a fixed one
            x2 = x2[torch.randperm(len(x2), generator=generator).to(x2.device, non_blocking=True)]
        with run.autocast():
            v1, v2 = fuse_views(fusion, cfg.fuse, x1, x2, generator)
            loss = framework(v1, v2)
        if cfg.preview:
            return save_grid(run.out / "preview.png", torch.stack([x1, v1, x2, v2], 1)[:16].flatten(0, 1), 8)
        run.optimise(loss)
        framework.after_step(run.step / run.steps)
        run.log(loss=loss, **{f"gate_{i}": gate for i, gate in enumerate(fusion.gates, 1)})


if __name__ == "__main__":
    from common import one_line_errors, parse

    with one_line_errors():
        train(parse(Config, __doc__, recipes=RECIPES, by="framework"))
