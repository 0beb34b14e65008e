"""Single-branch instance discrimination with a memory bank and self-distillation (arXiv 2404.19289).

    python npid_distill.py --dataset cifar10       # on a CPU the small recipe, on a GPU the official run
    python npid_distill.py --init random --update ema --lambda-kl 0 --cutmix 0 --out runs/plain  # plain NPID
    torchrun --nproc-per-node=8 npid_distill.py --dataset imagenet100 --data DIR

Each image is its own class; a memory bank holds one unit row per image, and p = softmax(z . w / tau)
classifies the one crop of the image that a step sees. Cao & Wu add to plain NPID (Wu et al. 2018), each with
its switch:
- calibration (--init): rows start as a forward pass of the untrained network over every image;
- gradient update (--update grad): rows follow the cross-entropy's gradient, negatives too, see grad_update;
- self-distillation (--lambda-kl): KL(p' || u), u = p'^power renormalised, no gradient through u, see sqrt_kl.
The two softmaxes differ: the cross-entropy divides cosines by tau, p' of the KL term is of the cosines as
they are, as in the official code (--temper-kl divides them too).

Differences from the official code, whose numbers the recipe takes:
- The gradient update is not in it, and the paper's full text was not at hand: the use of the momentum is our
  reading. --update ema is the rule that is there. Under CutMix the gradient moves both labels' rows by their
  shares, the average the image's own row alone.
- The first pass leaves no image out (there the last batch is dropped, and its rows stay zero).
- The bank is in the checkpoint, and one over all processes (there it is lost at a restart, and each process
  has its own).
- The KL term carries its gradient through one softmax, see sqrt_kl. The logged loss holds it.
- One random box per batch for CutMix, as there; its pairs are made within a process.
- The blur of sets that have it (not CIFAR, not shapes) uses a kernel of a tenth of the view.

Shapes: B batch, N images, D embedding, K rows that a step looks at, L labels per sample (2 under CutMix).
"""
import functools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Config:
    init: Literal["augmented", "random"] = "augmented"  # bank rows at the start: a forward pass, or random
    update: Literal["grad", "ema"] = "grad"  # bank rule: cross-entropy's gradient (paper), or NPID's average
    lambda_kl: float = 20.0         # weight of the self-distillation term, 0 = off; official run.sh
    power: float = 0.5              # u = p^power renormalised; paper (square root)
    temper_kl: bool = False         # divide the KL term's logits by tau too; off in the official code
    cutmix: float | None = None     # alpha of CutMix's Beta distribution, 0 = off
    tau: float = 0.2                # softmax temperature of the cross-entropy; official run.sh
    bank_momentum: float = 0.5      # share of a row that its update keeps; official run.sh
    negatives: int | None = None    # rows sampled per step beside the batch's; 0 = all
    dim: int | None = None          # width of the embedding and of the bank


# Values of the flags that are not given, by --recipe; "imagenet imagenet1k": what differs for a data set.
RECIPES = {
    # Two CPU cores: the other methods' network and views, fewer images more often.
    "small": dict(arch="resnet10", stem="auto", view=16, batch=128, epochs=48, limit=5120,
                  optimizer="sgd", lr=0.5, wd=1e-4, warmup=0.0, cutmix=0.0, negatives=10_000, dim=512),
    # The demo.
    "small shapes": dict(stem="imagenet", view=24, batch=64, epochs=50, limit=1000),
    "small tinyimagenet": dict(stem="imagenet", view=64, epochs=15, limit=10_000),
    # The official code's run.sh for CIFAR: SGD 1.0 at batch 512.
    "cifar": dict(arch="resnet18", stem="auto", view=0, batch=512, epochs=200, limit=0,
                  optimizer="sgd", lr=0.5, wd=1e-4, warmup=0.0, cutmix=0.5, negatives=10_000, dim=2048),
    # Ours: the CIFAR run on larger images, as the official code has no ImageNet run.
    "imagenet": dict(arch="resnet18", stem="auto", view=0, batch=512, epochs=200, limit=0,
                     optimizer="sgd", lr=0.5, wd=1e-4, warmup=0.0, cutmix=0.5, negatives=10_000, dim=2048),
    "imagenet imagenet1k": dict(dim=128),  # Wu et al. 2018; a bank of 0.7 GB in place of 10.5
}
UNBLURRED = ("shapes", "cifar10", "cifar100")  # official code; shapes, ours, like CIFAR


# ---------------------------------------------------------------------------------------------- losses


def in_float32(loss: Callable) -> Callable:
    """The loss in float32 or better, whatever autocast is around it."""
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
def sqrt_kl(logits: Tensor, power: float = 0.5) -> Tensor:
    """Self-distillation: KL(p || u), p = softmax(logits), u = p^power / Z, Z = sum p^power, u held still.

    logits (B, K); mean over B. Zero where p is uniform. u is flatter than p for powers below 1, so descending
    the term flattens p: it holds the softmax back from certainty about rows that lag behind the network.
    As log u = power log p - log Z, the value is (1 - power) sum p log p + log Z; and with u held still the
    gradient is (1 - power) times that of sum p log p, so that one softmax carries it.
    """
    logp = F.log_softmax(logits, dim=1)                                             # (B, K)
    log_z = (power * logp.detach()).logsumexp(1)                                    # (B,)
    return ((1 - power) * (logp.exp() * logp).sum(1) + log_z).mean()


@in_float32
def instance_ce(logits: Tensor, positive: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy against the images' own rows, mean over B: logits (B, K), positive columns (B,), (B, L).

    One label is NPID's loss; two with CutMix's shares as weight (B, L) are -sum_l weight_l log p_l.
    """
    positive, weight = as_columns(positive, weight, logits)
    own = (weight * logits.gather(1, positive)).sum(1)                              # (B,)
    return (logits.logsumexp(1) * weight.sum(1) - own).mean()


def as_columns(positive: Tensor, weight: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """positive as (B, L), and its weight, ones where none is given."""
    positive = positive if positive.ndim == 2 else positive[:, None]
    weight = like.new_ones(()).expand(positive.shape) if weight is None else weight.to(like.dtype)
    return positive, weight


# ---------------------------------------------------------------------------------------------- bank


def grad_update(rows: Tensor, z: Tensor, prob: Tensor, positive: Tensor, momentum: float,
                weight: Tensor | None = None) -> Tensor:
    """The bank's gradient update, pure: rows (K, D), z (B, D), prob (B, K) -> new unit rows (K, D).

    With loss_i = -log p_ii and p_ik = exp(z_i . w_k / tau) / sum_j exp(z_i . w_j / tau):
        d loss_i / d w_k = (p_ik - 1[k = i]) z_i / tau
    so -tau * gradient summed over the batch is  d_k = sum_i (1[k = i] - p_ik) z_i:  row i moves toward z_i,
    every other row away from it by its probability. The step is  w <- normalise(m w + (1 - m) d):  m is the
    share of the old row, as in NPID's own average normalise(m w_i + (1 - m) z_i), which this becomes where
    prob is 0. positive (B,) or (B, L), weight (B, L): as in instance_ce, the label's share in place of the
    indicator. The product is in the type of z, the sum in float32 or better.
    """
    positive, weight = as_columns(positive, weight, prob)
    share = prob.neg().scatter_add(1, positive, weight)                             # (B, K)
    step = share.to(z.dtype).T @ ((1 - momentum) * z)                               # (K, D)
    exact = torch.promote_types(rows.dtype, torch.float32)
    return F.normalize(step.to(exact).add(rows.to(exact), alpha=momentum), dim=1).to(rows.dtype)


class MemoryBank(nn.Module):
    """One unit row per image. rows (size, dim): a buffer, so it moves with .to() and is in state_dict()."""

    def __init__(self, size: int, dim: int, momentum: float = 0.5, generator: torch.Generator | None = None):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("rows", F.normalize(torch.randn(size, dim, generator=generator), dim=1))

    @torch.no_grad()
    def fill(self, index: Tensor, z: Tensor) -> None:
        """Set the rows of images index (B,) to the directions of z (B, D)."""
        self.rows.index_copy_(0, index, F.normalize(z.to(self.rows.dtype), dim=1))

    @torch.no_grad()
    def sample(self, index: Tensor, negatives: int, generator: torch.Generator | None = None):
        """The rows that a step looks at, as their numbers (K,), and the place among them of each image's own
        row, its positive (B,).

        The rows of the batch's images index (B,), which are distinct, then negatives drawn uniformly from
        the others without replacement; all rows where negatives is 0 or more than there are.
        """
        size = len(self.rows)
        if negatives == 0 or negatives >= size - len(index):
            return torch.arange(size, device=index.device), index
        key = torch.rand(size, generator=generator, device=index.device).index_fill_(0, index, 2.0)
        others = key.topk(negatives, largest=False, sorted=False).indices
        return torch.cat([index, others]), torch.arange(len(index), device=index.device)

    @torch.no_grad()
    def average(self, index: Tensor, z: Tensor) -> None:
        """NPID's rule: the rows of images index (B,) alone move, toward their unit embeddings z (B, D)."""
        old = self.rows[index]
        self.fill(index, torch.lerp(z.to(old.dtype), old, self.momentum))

    @torch.no_grad()
    def step(self, columns: Tensor, rows: Tensor, z: Tensor, prob: Tensor, labels: Tensor,
             weight: Tensor | None = None) -> None:
        """The gradient's rule, see grad_update: rows (K, D), the bank's at columns (K,), after a step with
        unit embeddings z (B, D), prob (B, K) and labels (B,) or (B, L), which are places among these rows."""
        self.rows.index_copy_(0, columns, grad_update(rows, z.detach(), prob, labels, self.momentum, weight))


# ---------------------------------------------------------------------------------------------- CutMix


def cutmix(x: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """CutMix (Yun et al. 2019) as the official code has it: the image itself keeps the larger part.

    x (B, C, H, W) -> mixed x, each sample's partner (B,), and shares (B, 2) of its own and the partner's
    label. One box per batch, of area 1 - max(l, 1 - l) with l ~ Beta(alpha, alpha), its half sides rounded
    down, cut at the border, the shares corrected for that. generator: on the CPU. alpha 0 leaves x as it is.
    """
    b, _, h, w = x.shape
    partner = torch.randperm(b, generator=generator).to(x.device, non_blocking=True)
    draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
    own = draw.betavariate(alpha, alpha) if alpha else 1.0
    side = math.sqrt(1 - max(own, 1 - own))
    half_y, half_x = int(side * h) // 2, int(side * w) // 2
    cy, cx = draw.randrange(h), draw.randrange(w)
    y1, y2, x1, x2 = max(0, cy - half_y), min(h, cy + half_y), max(0, cx - half_x), min(w, cx + half_x)
    mixed = x.clone()
    mixed[:, :, y1:y2, x1:x2] = x[partner, :, y1:y2, x1:x2]
    other = (y2 - y1) * (x2 - x1) / (h * w)
    shares = [torch.full((b,), value, device=x.device) for value in (1 - other, other)]
    return mixed, partner, torch.stack(shares, 1)


# ---------------------------------------------------------------------------------------------- train


def projector(dim_in: int, dim: int) -> nn.Sequential:
    """The official head: three linear layers, BN and ReLU between; hidden widths of 2048 whatever dim is."""
    return nn.Sequential(nn.Linear(dim_in, 2048, bias=False), nn.BatchNorm1d(2048), nn.ReLU(inplace=True),
                         nn.Linear(2048, 2048, bias=False), nn.BatchNorm1d(2048), nn.ReLU(inplace=True),
                         nn.Linear(2048, dim))


@torch.no_grad()
def calibrate(bank: MemoryBank, model: nn.Module, augment: nn.Module, run) -> None:
    """Fill every row from a forward pass of the untrained network over every image, none missing.

    Of augmented views in train mode, as in the official code: in eval mode an untrained network's batch norms
    are the identity, and all rows nearly one point. --init random leaves the rows as they are, as NPID does.
    """
    from common import broadcast, gather

    began, count, batch = time.monotonic(), len(run.images), run.cfg.batch
    order = torch.arange(-(-count // batch) * batch) % count  # the first ones again fill up the last batch
    for n, (images, aspect, index) in enumerate(run.images.batches(order.split(batch), run.device)):
        with run.autocast():
            z = model(augment(images, run.generator(f"init {n}"), aspect))
        bank.fill(gather(index), gather(z.float()))
    broadcast(bank)
    run.seconds += time.monotonic() - began  # part of the method's cost


def train(cfg) -> None:
    """One pretraining run, start to finish; cfg as common.parse(Config, ...) gives it."""
    from common import BatchAugment, Run, UsageError, gather, rank, save_grid, seeded

    if cfg.tau <= 0:
        raise UsageError(f"--tau {cfg.tau}: want a temperature above 0")
    load_backbone = None
    if cfg.weights:
        from linear_probe import load_backbone
    run = Run(cfg, "npid_distill", name_variant(cfg), "npid", load_backbone=load_backbone)
    encoder = run.new_encoder()
    model = nn.Sequential(encoder, projector(encoder.dim, cfg.dim))
    bank = MemoryBank(len(run.images), cfg.dim, cfg.bank_momentum, seeded("bank", cfg.seed))
    augment = BatchAugment(run.view, blur_p=0.0 if cfg.dataset in UNBLURRED else 0.5).to(run.device)
    run.start(model, encoder, bank)
    if cfg.init != "random" and run.step == 0 and not cfg.preview:
        calibrate(bank, model, augment, run)

    for images, aspect, index in run.batches():
        generator = run.generator()
        x, partner, weight = cutmix(augment(images, generator, aspect), cfg.cutmix, generator)
        if cfg.preview:
            return save_grid(run.out / "preview.png", x[:64], 8)
        with run.autocast():
            z = model(x)
        z = gather(F.normalize(z.float(), dim=1))                                   # (B, D), of all processes
        index, partner, weight = gather(index), gather(partner + rank() * len(x)), gather(weight)
        columns, positive = bank.sample(index, cfg.negatives, run.generator("negatives", run.device))
        labels = torch.stack([positive, positive[partner]], 1)                      # (B, 2) places in columns
        rows = bank.rows[columns]                                                   # (K, D)
        cosines = (z.to(run.dtype) @ rows.to(run.dtype).T).float()                  # (B, K)
        logits = cosines / cfg.tau
        ce = instance_ce(logits, labels, weight)
        kl = sqrt_kl(logits if cfg.temper_kl else cosines, cfg.power)
        loss = ce + cfg.lambda_kl * kl
        run.optimise(loss)
        if cfg.update == "grad":
            bank.step(columns, rows, z.to(run.dtype), logits.detach().softmax(1), labels, weight)
        else:  # the image's own row alone, under CutMix too, as in the official code
            bank.average(index, z)
        run.log(loss=loss, ce=ce, kl=kl)


def name_variant(cfg) -> str:
    """What a result table calls this run: NPID and what is added to it."""
    parts = ["NPID"] + [f"calibration ({cfg.init})"] * (cfg.init != "random")
    parts += ["gradient update"] * (cfg.update == "grad")
    parts += [f"self-distillation {cfg.lambda_kl:g}"] * (cfg.lambda_kl > 0)
    parts += [f"CutMix {cfg.cutmix:g}"] * (cfg.cutmix > 0)
    return " + ".join(parts)


if __name__ == "__main__":
    from common import one_line_errors, parse

    with one_line_errors():
        train(parse(Config, __doc__, recipes=RECIPES))
