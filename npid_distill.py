"""Single-branch instance discrimination with a memory bank and self-distillation (arXiv 2404.19289).

    python npid_distill.py --dataset cifar10                                           # the official CIFAR recipe; wants a GPU
    python npid_distill.py --dataset cifar10 --init random --update ema --lambda-kl 0 --cutmix 0        # plain NPID
    python npid_distill.py --dataset cifar10 --negatives 0                             # softmax over the whole bank

Each image is its own class; a memory bank holds one unit row per image, and p = softmax(z . w / tau) classifies the one crop of the
image that a step sees. Against plain NPID (Wu et al. 2018), each with its switch:
- calibration (--init forward): rows start as a forward pass of the untrained network over every image, in eval mode;
- gradient update (--update grad): rows follow the loss's own gradient, negatives included, see grad_update;
- self-distillation (--lambda-kl): KL(p' || u), u = p'^power renormalised, no gradient through u, see sqrt_kl.
The two softmaxes differ: the cross-entropy divides cosines by tau, the KL term takes them as they are, as the official code does
(--temper-kl divides them too). The paper's full text was not at hand: the meaning of the momentum in the update is our reading.
What the official code does and this file does not: fill the bank in train mode with the last batch dropped (rows of zeros), leave the
bank out of the checkpoint, keep a bank of its own per process, log a loss without the KL term.

Memory, measured (float32, B 512, CPU; `make bench BENCH="--banks ..."`, results/bench/banks.jsonl): on top of a bank of 50,000 x 2048
(410 MB) the losses, their gradient and the update take 616 MB with 10,000 sampled rows and 383 MB with --negatives 0; on top of one of
1.28 million x 128 (655 MB), 355 MB with --negatives 0, where nothing larger than (B, --chunk) is made. --bank-dtype bf16 halves the bank.
Shapes: B batch, N images, D embedding, K rows in play, L labels per sample (2 under CutMix).
"""
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
    init: Literal["forward", "random"] = "forward"  # bank rows at the start: a forward pass (paper), or random unit vectors (NPID)
    update: Literal["grad", "ema"] = "grad"         # bank rule: the loss's gradient (paper), or NPID's average of row and embedding
    lambda_kl: float = 20.0      # weight of the self-distillation term, 0 = off; official run.sh
    power: float = 0.5           # u = p^power renormalised; paper (square root)
    temper_kl: bool = False      # divide the KL term's logits by tau too; off in the official code
    cutmix: float = 0.5          # alpha of CutMix's Beta distribution, 0 = off; official run.sh
    tau: float = 0.2             # softmax temperature of the cross-entropy; official run.sh
    bank_momentum: float = 0.5   # m of the bank update; official run.sh
    negatives: int = 10_000      # rows sampled per step beside the batch's own, 0 = the whole bank; official run.sh
    dim: int = 2048              # width of the projector and of the bank; official run.sh
    bank_dtype: Literal["fp32", "bf16"] = "fp32"    # of the stored rows; products are in the precision of the run; ours
    shard_bank: bool = False     # under torchrun each process keeps a part of the rows; needs --negatives 0; ours
    chunk: int = 8_192           # rows per block when the whole bank is in play; ours
    batch: int = 512             # images per step; official run.sh
    epochs: int = 200            # passes over the training images; official run.sh
    lr: float = 0.5              # learning rate at batch 256, scaled linearly; official run.sh (1.0 at 512, SGD)
    wd: float = 1e-4             # weight decay; official run.sh


# ------------------------------------------------------------------------------------------- losses


def sqrt_kl(logits: Tensor, power: float = 0.5) -> Tensor:
    """Self-distillation: KL(p || u), p = softmax(logits), u = p^power / sum p^power, no gradient through u; mean over B.

    logits (B, K), computed in float32 or better. Zero where p is uniform. u is flatter than p for powers below 1, so descending the
    term flattens p: it holds the softmax back from certainty about rows that are an epoch old.
    """
    logp = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)  # (B, K)
    logu = F.log_softmax(power * logp.detach(), dim=1)
    return (logp.exp() * (logp - logu)).sum(1).mean()


def instance_ce(logits: Tensor, positive: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy against the images' own rows, mean over B: logits (B, K); positive (B,) or (B, L) columns, weight (B, L) their shares.

    One label is NPID's loss; two with CutMix's shares are the mixed target -sum_l weight_l log p_l.
    """
    logp = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)
    positive, weight = as_columns(positive, weight, logp)
    return -(weight * logp.gather(1, positive)).sum(1).mean()


def as_columns(positive: Tensor, weight: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """positive as (B, L), and its weight, ones where none is given."""
    positive = positive if positive.ndim == 2 else positive[:, None]
    return positive, like.new_ones(()).expand(positive.shape) if weight is None else weight.to(like.dtype)


def dense_losses(z: Tensor, rows: Tensor, positive: Tensor, weight: Tensor | None, repeated: Tensor | None, tau: float, power: float,
                 temper_kl: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, KL term, and p (B, K) without gradient, of unit embeddings z (B, D) against rows (K, D) held as constants.

    The product is in the type of rows, all else in float32 or better. repeated (K,) bool marks columns that are a second copy of a row:
    they count as absent.
    """
    with torch.autocast(z.device.type, enabled=False):
        cosine = cosines(z, rows)                                                                # (B, K)
        if repeated is not None:
            cosine = cosine - 1e4 * repeated  # finite, so that 0 * log 0 stays 0
        logits = cosine / tau
        ce = instance_ce(logits, positive, weight)
        kl = sqrt_kl(logits if temper_kl else cosine, power)
        return ce, kl, F.softmax(logits.detach(), dim=1)


def cosines(z: Tensor, rows: Tensor) -> Tensor:
    """z (B, D) times rows (K, D): (B, K) in float32 or better, from a product in the type of rows."""
    return (z.to(rows.dtype) @ rows.T).to(torch.promote_types(rows.dtype, torch.float32))


class RowSums(torch.autograd.Function):
    """Sums over all rows (N, D) of what both terms need, block by block: z (B, D) -> (5, B). The backward pass computes each block again.

    With c = s cos, s = 1 / tau_kl, shifted by the largest possible cosine (1) so that no running maximum is needed:
        sum e^((cos - 1) / tau),   sum e^(c - s),   sum c e^(c - s),   the same again with c held,   sum e^(power (c - s)), without gradient
    product: type of the matrix products, None = that of rows.
    """

    @staticmethod
    def forward(ctx, z: Tensor, rows: Tensor, tau: float, tau_kl: float, power: float, chunk: int, product: torch.dtype | None) -> Tensor:
        ctx.save_for_backward(z, rows)
        ctx.tau, ctx.s, ctx.chunk, ctx.product = tau, 1 / tau_kl, chunk, product or rows.dtype
        sums = 0
        for block in rows.split(chunk):
            cos = cosines(z, block.to(ctx.product))                                                  # (B, chunk)
            c = ctx.s * cos
            e = torch.exp(c - ctx.s)
            ec = (e * c).sum(1)
            sums = sums + torch.stack([torch.exp((cos - 1) / tau).sum(1), e.sum(1), ec, ec, torch.exp(power * (c - ctx.s)).sum(1)])
        return sums

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (z, rows), dz = ctx.saved_tensors, 0
        g = gradient[:, :, None]                                                                     # (5, B, 1)
        for block in rows.split(ctx.chunk):
            block = block.to(ctx.product)
            cos = cosines(z, block)
            c = ctx.s * cos
            dcos = g[0] / ctx.tau * torch.exp((cos - 1) / ctx.tau) + ctx.s * torch.exp(c - ctx.s) * (g[1] + g[2] * (1 + c) + g[3] * c)
            dz = dz + (dcos.to(block.dtype) @ block).to(z.dtype)
        return dz, None, None, None, None, None, None


def chunked_losses(z: Tensor, rows: Tensor, positive: Tensor, weight: Tensor | None, tau: float, power: float, temper_kl: bool,
                   chunk: int, product: torch.dtype | None = None, total: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[Tensor, Tensor, Tensor]:
    """dense_losses without a (B, N) tensor: cross-entropy, KL term and log of p's normaliser (B,), the same to rounding.

    Both terms are functions of RowSums, product as there. tau from 0.02 up (ValueError below: the sums underflow). Where rows are one
    process's part of the bank, positive counts from their first, beyond either end for rows of others, and total sums over the processes
    with gradient.
    """
    if tau < 0.02:
        raise ValueError(f"tau {tau} is below 0.02: without a running maximum the sums underflow")
    tau_kl = tau if temper_kl else 1.0
    with torch.autocast(z.device.type, enabled=False):
        z_ce, z_kl, ec, ec_fixed, z_u = total(RowSums.apply(z, rows, tau, tau_kl, power, chunk, product))
        log_z = z_ce.log() + 1 / tau                                                                 # (B,)
        positive, weight = as_columns(positive, weight, log_z)
        here = (positive >= 0) & (positive < len(rows))
        own = torch.einsum("bd,bld->bl", z.to(rows.dtype), rows[torch.where(here, positive, 0)]).to(log_z.dtype)  # (B, L)
        ce = (weight * (log_z[:, None] - total(own * here) / tau)).sum(1).mean()
        log_zkl, log_zu = z_kl.log() + 1 / tau_kl, z_u.detach().log() + power / tau_kl
        kl = ec / z_kl - log_zkl - (power * ec_fixed / z_kl - log_zu)                                # sum p log p - sum p log u
        return ce, kl.mean(), log_z.detach()


# ------------------------------------------------------------------------------------------- bank


def grad_update(rows: Tensor, z: Tensor, prob: Tensor, positive: Tensor, momentum: float, weight: Tensor | None = None) -> Tensor:
    """The bank's gradient update as a pure function: rows (K, D), z (B, D), prob (B, K) -> new unit rows (K, D).

    With loss_i = -log p_ii and p_ik = exp(z_i . w_k / tau) / sum_j exp(z_i . w_j / tau):
        d loss_i / d w_k = (p_ik - 1[k = i]) z_i / tau
    so -tau * gradient summed over the batch is  d_k = sum_i (1[k = i] - p_ik) z_i:  row i moves toward z_i, every other row away from it
    by its probability. The step is  w <- normalise(m w + (1 - m) d):  m is the share of the old row, as in NPID's own average
    normalise(m w_i + (1 - m) z_i), which this becomes where prob is 0. positive (B,) or (B, L), weight (B, L): as in instance_ce, with
    the indicator replaced by the label's share; an image that stands in the batch twice contributes twice. The product is in the type
    of z, the sum in float32 or better.
    """
    positive, weight = as_columns(positive, weight, prob)
    share = prob.neg().scatter_add(1, positive, weight)                                # (B, K)
    exact = torch.promote_types(rows.dtype, torch.float32)
    step = (share.to(z.dtype).T @ ((1 - momentum) * z)).to(exact)                      # (K, D); scaling z is cheaper than scaling this
    return F.normalize(step.add(rows.to(exact), alpha=momentum), dim=1).to(rows.dtype)


class MemoryBank(nn.Module):
    """One unit row per image. rows (size, dim), float32 or bf16; a buffer, so it moves with .to() and is in state_dict().

    offset: number of the image that the first row stands for, where several processes each keep a part of the bank; generator: of the
    random rows that it starts with.
    """

    def __init__(self, size: int, dim: int, dtype: torch.dtype = torch.float32, momentum: float = 0.5, offset: int = 0,
                 generator: torch.Generator | None = None):
        super().__init__()
        self.momentum, self.offset = momentum, offset
        self.register_buffer("rows", F.normalize(torch.randn(size, dim, generator=generator), dim=1).to(dtype))

    @torch.no_grad()
    def fill(self, index: Tensor, z: Tensor) -> None:
        """Set the rows of images index (B,), those that are here, to the directions of z (B, D)."""
        place = index - self.offset
        here = (place >= 0) & (place < len(self.rows))
        self.rows.index_copy_(0, place[here], F.normalize(z.float(), dim=1).to(self.rows.dtype)[here])

    @torch.no_grad()
    def in_play(self, index: Tensor, negatives: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Which rows a step looks at: columns (B + K,), the column of each image's own row (B,), and which columns repeat another (B + K,).

        The batch's own rows, then K drawn uniformly from the others without replacement, on the bank's device. An image that stands in
        the batch twice owns its first column; the second is marked as repeated. K is lowered to N - B where it is larger.
        """
        size = len(self.rows)
        negatives = min(negatives, size - len(index))
        key = torch.rand(size, generator=generator, device=self.rows.device).index_fill_(0, index, 2.0)
        columns = torch.cat([index, key.topk(negatives, largest=False, sorted=False).indices])
        own = (index[:, None] == index).to(torch.uint8).argmax(1)                      # first column with the same image
        first = torch.cat([own, torch.arange(len(index), len(columns), device=index.device)])
        return columns, own, first != torch.arange(len(columns), device=index.device)

    @torch.no_grad()
    def update(self, index: Tensor, z: Tensor, prob: Tensor | None = None, weight: Tensor | None = None, columns: Tensor | None = None,
               own: Tensor | None = None, rows: Tensor | None = None) -> None:
        """Move the rows by grad_update, z (B, D) unit embeddings without need of a gradient.

        Over the whole bank: index (B,) or (B, L) image numbers and prob (B, N). Over rows in play: columns (K,) and prob (B, K) from
        in_play, own (B,) or (B, L) the columns of the images' own rows, rows (K, D) the rows in play where the caller has them at hand.
        prob None is NPID's rule: only the images' own rows move, toward the embeddings.
        """
        z = z.detach()
        if prob is None:
            columns = index if index.ndim == 1 else index[:, 0]                         # under CutMix the second labels are the same images
            own = (index.reshape(len(z), -1)[:, :, None] == columns).to(torch.uint8).argmax(2)   # (B, L)
            prob = z.new_zeros(len(z), len(columns))
        if columns is None:
            self.rows.copy_(grad_update(self.rows, z, prob, index, self.momentum, weight))
            return
        rows = self.rows.index_select(0, columns) if rows is None else rows
        new = grad_update(rows, z, prob, own, self.momentum, weight)
        first = (columns[:len(z), None] == columns[:len(z)]).to(torch.uint8).argmax(1)
        new[:len(z)] = new[first]                                                       # every copy of a repeated row writes the same values
        self.rows.index_copy_(0, columns, new)

    @torch.no_grad()
    def update_in_chunks(self, index: Tensor, z: Tensor, log_z: Tensor, tau: float, chunk: int, weight: Tensor | None = None) -> None:
        """update over the whole bank with p recomputed block by block from log_z (B,), so that nothing is larger than (B, chunk). Products are
        in the type of z."""
        z = z.detach()
        index, weight = as_columns(index - self.offset, weight, log_z)
        for start in range(0, len(self.rows), chunk):
            block = self.rows[start:start + chunk]
            prob = torch.exp(cosines(z, block.to(z.dtype)) / tau - log_z[:, None])                  # (B, chunk)
            inside = (index >= start) & (index < start + len(block))
            column = torch.where(inside, index - start, 0)
            block.copy_(grad_update(block, z, prob, column, self.momentum, weight * inside))


# ------------------------------------------------------------------------------------------- CutMix


def cutmix(x: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """CutMix (Yun et al. 2019): x (B, C, H, W) -> mixed x, each sample's partner (B,) and the share (B, 2) of its own and the partner's label.

    One box per batch, its area 1 - lambda with lambda ~ Beta(alpha, alpha), cut at the border and the share corrected for that.
    generator: on the CPU. alpha 0 leaves x as it is.
    """
    b, _, h, w = x.shape
    partner = torch.randperm(b, generator=generator).to(x.device, non_blocking=True)
    if alpha == 0:
        return x, partner, shares(1.0, x)
    draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
    side = math.sqrt(1 - draw.betavariate(alpha, alpha))
    cy, cx, half_y, half_x = draw.randrange(h), draw.randrange(w), side * h / 2, side * w / 2
    y1, y2, x1, x2 = max(0, round(cy - half_y)), min(h, round(cy + half_y)), max(0, round(cx - half_x)), min(w, round(cx + half_x))
    mixed = x.clone()
    mixed[:, :, y1:y2, x1:x2] = x[partner, :, y1:y2, x1:x2]
    return mixed, partner, shares(1 - (y2 - y1) * (x2 - x1) / (h * w), x)


def shares(own: float, x: Tensor) -> Tensor:
    """(B, 2): the label's own share and the rest, made on x's device."""
    return torch.stack([torch.full((len(x),), value, device=x.device) for value in (own, 1 - own)], 1)


# ------------------------------------------------------------------------------------------- train


def projector(dim_in: int, dim: int) -> nn.Sequential:
    """The official CIFAR run's head: three linear layers of one width, BN and ReLU between them."""
    return nn.Sequential(nn.Linear(dim_in, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(inplace=True),
                         nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(inplace=True), nn.Linear(dim, dim))


def calibrate(bank: MemoryBank, model: nn.Module, run) -> None:
    """Fill every row from a forward pass in eval mode over the centre views of every image."""
    from common import outputs

    began = time.monotonic()
    for z, index in outputs(model, run.images, run.size, run.device, run.cfg.workers, run.cfg.batch):
        bank.fill(index, z)
    run.seconds += time.monotonic() - began  # part of the method's cost


def train(cfg) -> None:
    """One pretraining run, start to finish; cfg as common.parse(Config, ...) gives it."""
    from common import BatchAugment, Run, UsageError, gather, rank, resnet, save_grid, seeded, total, world

    if cfg.tau < 0.02:
        raise UsageError(f"--tau {cfg.tau}: want 0.02 or more")
    run = Run(cfg, "npid_distill", name_variant(cfg))
    whole = cfg.negatives == 0 or cfg.negatives >= len(run.images) - cfg.batch
    if cfg.shard_bank and not whole:
        raise UsageError("--shard-bank needs the whole bank as negatives: --negatives 0")
    encoder = resnet(cfg.arch, run.stem)
    model = nn.Sequential(encoder, projector(encoder.dim, cfg.dim))
    part, parts = (rank(), world()) if cfg.shard_bank else (0, 1)
    first, end = len(run.images) * part // parts, len(run.images) * (part + 1) // parts
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.bank_dtype]
    bank = MemoryBank(end - first, cfg.dim, dtype, cfg.bank_momentum, first, seeded("bank", cfg.seed, first))
    over_parts = total if cfg.shard_bank else nn.Identity()
    augment = BatchAugment(run.size, blur_p=0).to(run.device)
    run.start(model, encoder, bank, sharded=cfg.shard_bank)
    if cfg.init == "forward" and run.step == 0 and not cfg.preview:
        calibrate(bank, model, run)

    for images, index in run.batches():
        generator = run.generator()
        x, partner, weight = cutmix(augment(images, generator), cfg.cutmix, generator)
        if cfg.preview:
            return save_grid(run.out / "preview.png", x[:64], 8)
        with run.autocast():
            z = model(x)
        z = gather(F.normalize(z.float(), dim=1))                                       # (B, D), B now over all processes
        index, partner, weight = gather(index), gather(partner + rank() * len(x)), gather(weight)
        labels = torch.stack([index, index[partner]], 1)                                # (B, 2)
        if whole:
            ce, kl, log_z = chunked_losses(z, bank.rows, labels - bank.offset, weight, cfg.tau, cfg.power, cfg.temper_kl, cfg.chunk, run.dtype, over_parts)
        else:
            columns, own, repeated = bank.in_play(index, cfg.negatives, run.generator("negatives", run.device))
            own = torch.stack([own, own[partner]], 1)                                   # (B, 2)
            rows = bank.rows.index_select(0, columns)                                   # (B + K, D)
            ce, kl, prob = dense_losses(z, rows.to(run.dtype), own, weight, repeated, cfg.tau, cfg.power, cfg.temper_kl)
        loss = ce + cfg.lambda_kl * kl
        run.optimise(loss)
        if whole:  # with log_z infinite p is 0, and the update is NPID's
            log_z = log_z if cfg.update == "grad" else torch.full_like(log_z, math.inf)
            bank.update_in_chunks(labels, z.to(run.dtype), log_z, cfg.tau, cfg.chunk, weight)
        elif cfg.update == "ema":
            bank.update(labels, z, None, weight)
        else:
            bank.update(index, z.to(run.dtype), prob, weight, columns, own, rows)
        run.log(loss=loss, ce=ce, kl=kl)


def name_variant(cfg) -> str:
    """What a result table calls this run: NPID and what is added to it."""
    parts = ["NPID"] + ["calibration"] * (cfg.init == "forward") + ["gradient update"] * (cfg.update == "grad")
    parts += [f"self-distillation {cfg.lambda_kl:g}"] * (cfg.lambda_kl > 0) + [f"CutMix {cfg.cutmix:g}"] * (cfg.cutmix > 0)
    return " + ".join(parts)


if __name__ == "__main__":
    from common import one_line_errors, parse

    with one_line_errors():
        train(parse(Config, __doc__))
