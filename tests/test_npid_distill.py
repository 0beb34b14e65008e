"""NPID with self-distillation: terms against loops and autograd, the bank, CutMix, whole steps."""
import sys

import pytest
import torch
import torch.nn.functional as F

import common
import npid_distill
from conftest import assert_runs_on_cuda_and_compiles_once
from npid_distill import MemoryBank, cutmix, instance_ce, sqrt_kl


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=dtype, generator=common.seeded(*shape)), dim=-1)


def loop(cosines, positive, weight, power=0.5):
    """Cross-entropy at tau 0.2 and KL term of a batch, class by class; two softmaxes, u held still."""
    ce = kl = 0
    for row, labels, shares in zip(cosines, positive, weight):
        total = sum(torch.exp(c / 0.2) for c in row)
        for label, share in zip(labels, shares):
            ce = ce - share * torch.log(torch.exp(row[label] / 0.2) / total)
        p = torch.exp(row) / sum(torch.exp(c) for c in row)
        u = torch.stack([v.detach() ** power for v in p])
        kl = kl + sum(a * torch.log(a / b) for a, b in zip(p, u / u.sum()))
    return ce / len(cosines), kl / len(cosines)


@pytest.mark.parametrize("power", [0.25, 0.5, 0.9, 1.0, 2.0])
def test_losses_and_gradients_equal_the_naive_loop(power):
    cosines, weight = (3 * unit(5, 11)).requires_grad_(), torch.tensor([[0.7, 0.3]] * 5).double()
    positive = torch.tensor([[0, 3], [1, 1], [2, 9], [10, 0], [4, 5]])
    got = instance_ce(cosines / 0.2, positive, weight), sqrt_kl(cosines, power)
    for a, b in zip(got, loop(cosines, positive, weight, power)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        gradients = [torch.autograd.grad(value, cosines, retain_graph=True)[0] for value in (a, b)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    one = positive[:, 0]
    torch.testing.assert_close(instance_ce(cosines, one), F.cross_entropy(cosines, one))


def test_negatives_are_fresh_distinct_foreign_and_uniform():
    bank, index = MemoryBank(60, 4), torch.tensor([3, 17, 42, 59])
    counts, generator = torch.zeros(60), common.seeded(0)
    for _ in range(4000):
        columns, own = bank.sample(index, 14, generator)
        assert columns[:4].tolist() == index.tolist() and own.tolist() == [0, 1, 2, 3]
        assert len(set(columns.tolist())) == 18
        counts[columns[4:]] += 1
    assert counts[index].sum() == 0
    others = counts[[i for i in range(60) if i not in index]]
    assert (others - 1000).abs().max() < 150                           # 5 standard deviations


@pytest.mark.parametrize("labels", [1, 2])
def test_sampled_rows_go_down_autograds_gradient_and_the_others_stay(labels):
    bank, index, z = MemoryBank(30, 8, momentum=0.3).double(), torch.tensor([4, 9, 25]), unit(3, 8)
    for negatives in (0, 27, 1000):
        columns, own = bank.sample(index, negatives)
        assert columns.tolist() == list(range(30)) and torch.equal(own, index)
    columns, own = bank.sample(index, 10, common.seeded(0))
    positive = torch.stack([own, own.flip(0)], 1)[:, :labels]
    weight = torch.tensor([[0.8, 0.2]] * 3).double() if labels == 2 else None
    before = bank.rows.clone().requires_grad_()
    logits = z @ before[columns].T / 0.2
    gradient, = torch.autograd.grad(3 * instance_ce(logits, positive, weight), before)
    bank.step(columns, bank.rows[columns], z, logits.detach().softmax(1), positive, weight)
    want = F.normalize(0.3 * before + 0.7 * (-0.2 * gradient), dim=1).detach()
    torch.testing.assert_close(bank.rows, want)
    assert (bank.rows == before).all(1).sum() == 30 - 13


def test_cutmix_leaves_an_image_its_larger_part_and_shares_are_the_pixels_that_are_seen():
    x, generator = torch.arange(2.0)[:, None, None, None].expand(2, 1, 8, 6), common.seeded(0)
    draws = [cutmix(x, 0.5, generator) for _ in range(20_000)]
    mixed, partner, shares = map(torch.stack, zip(*draws))
    torch.testing.assert_close(shares.sum(2), torch.ones(20_000, 2))
    assert shares[..., 0].min() >= 0.5 and shares[..., 1].min() == 0
    swapped, seen = partner[:, 0] == 1, mixed.flatten(2).mean(2)       # (M, 2): how much of image 1 is seen
    torch.testing.assert_close(seen[swapped, 1], shares[swapped, 1, 0])
    torch.testing.assert_close(seen[swapped, 0], shares[swapped, 0, 1])
    assert torch.equal(seen[~swapped], torch.tensor([0.0, 1.0]).expand(len(seen[~swapped]), 2))
    assert 9_700 < swapped.sum() < 10_300                              # four standard deviations
    assert torch.equal(cutmix(x, 0.0, generator)[0], x)


@pytest.mark.parametrize("update", ["grad", "ema"])
def test_a_step_of_a_run_has_the_loss_and_the_update_of_the_formulas(update, small, train, monkeypatch):
    """Under CutMix the gradient update moves both labels' rows by their shares and pushes all others away;
    NPID's average moves the image's own row, toward the mixed embedding, and leaves the partner's alone."""
    steps, before = [], MemoryBank(48, 16, generator=common.seeded("bank", 0)).rows.double()

    def log(run, **_):  # what the names in the training loop stand for
        local = dict(sys._getframe(1).f_locals)
        torch.testing.assert_close(local["z"], F.normalize(local["model"](local["x"]), dim=1))
        steps.append(local | {"after": local["bank"].rows.double()})

    monkeypatch.setattr(common.Run, "log", log)
    flags = "--epochs 1 --lr 0 --dim 16 --negatives 0 --lambda-kl 3 --cutmix 0.5 --init random --update"
    train("out", *flags.split(), update, script=npid_distill)
    assert len({*torch.cat([step["index"] for step in steps]).tolist()}) == 48  # every image once
    assert any(step["weight"][0, 0] < 1 for step in steps)
    for step in steps:
        index, z, before = step["index"], step["z"].detach().double(), before.requires_grad_()
        labels = torch.stack([index, index[step["partner"]]], 1)
        ce, kl = loop(z @ before.T, labels, step["weight"].double())
        for name, value in (("ce", ce), ("kl", kl), ("loss", ce + 3 * kl)):
            assert step[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
        want = before.detach().clone()
        if update == "grad":
            want = F.normalize(0.5 * want - 0.5 * 0.2 * torch.autograd.grad(16 * ce, before)[0], dim=1)
        else:
            want[index] = F.normalize(0.5 * want[index] + 0.5 * z, dim=1)
            assert (step["after"] == before).all(1).sum() == 32  # images that are not in the batch
        torch.testing.assert_close(step["after"], want, atol=1e-5, rtol=0)
        before = step["after"]


@pytest.mark.parametrize("init", ["augmented", "random"])
def test_every_row_is_filled_by_the_calibration_that_was_asked_for(init, small, train, monkeypatch):
    runs = []
    monkeypatch.setattr(common.Run, "batches", lambda run: runs.append(run) or iter(()))
    flags = ["--dim", 16, "--limit", 49, "--init", init]  # three batches and one image
    train("out", *flags, script=npid_distill)
    run, rows = runs[0], runs[0].parts["bank"].rows
    drawn = MemoryBank(49, 16, generator=common.seeded("bank", 0)).rows
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(49))
    assert (rows == drawn).all(1).sum() == (49 if init == "random" else 0)
    assert len(rows.unique(dim=0)) == 49 and run.model.training


@pytest.mark.parametrize("update, negatives", [("grad", 40), ("ema", 0)])
def test_a_step_runs_on_cuda_tensors_and_compiles_whole_and_once(update, negatives):
    bank = MemoryBank(60, 16)

    def step(z, index, partner, weight):
        columns, own = bank.sample(index, negatives)
        labels, rows = torch.stack([own, own[partner]], 1), bank.rows[columns]
        cosines = z @ rows.T
        loss = instance_ce(cosines / 0.2, labels, weight) + 20 * sqrt_kl(cosines)
        if update == "grad":
            bank.step(columns, rows, z, (cosines / 0.2).softmax(1), labels, weight)
        else:
            bank.average(index, z)
        return loss.isfinite().float()                                 # negatives differ from call to call

    bank.forward = step
    steps = [(z, torch.randperm(60)[:8], torch.randperm(8), torch.rand(8, 2))
             for z in unit(3, 8, 16, dtype=torch.float32)]
    assert_runs_on_cuda_and_compiles_once(bank, steps)
