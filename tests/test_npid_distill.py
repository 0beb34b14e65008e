"""NPID with self-distillation: terms against loops and autograd, the bank, whole steps, runs that die."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import npid_distill
from conftest import TINY, Small, assert_dying_changes_nothing, assert_works_alone, parsed
from npid_distill import MemoryBank, cutmix, grad_update, instance_ce, sqrt_kl
from test_bassl import assert_compiles_once

NPID = [*TINY, "--dim", 16, "--negatives", 12]


def unit(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, dtype=dtype, generator=generator), dim=-1)


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


def test_losses_stay_in_float32_under_autocast():
    logits, labels = torch.randn(8, 300).bfloat16(), torch.arange(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [sqrt_kl(logits), instance_ce(logits, labels)]
    torch.testing.assert_close(inside, [sqrt_kl(logits.float()), instance_ce(logits.float(), labels)])


@pytest.mark.parametrize("labels", [1, 2])
def test_the_update_goes_down_autograds_gradient_of_the_rows(labels):
    z, rows = unit(4, 6), unit(9, 6, seed=1).requires_grad_()
    positive = torch.tensor([[0, 5], [3, 0], [3, 3], [8, 1]])[:, :labels]  # row 3 stands twice in the batch
    weight = torch.tensor([[0.8, 0.2]] * 4).double() if labels == 2 else None
    logits = z @ rows.T / 0.2
    gradient, = torch.autograd.grad(4 * instance_ce(logits, positive, weight), rows)
    new = grad_update(rows.detach(), z, logits.detach().softmax(1), positive, 0.3, weight)
    torch.testing.assert_close(new, F.normalize(0.3 * rows.detach() + 0.7 * (-0.2 * gradient), dim=1))


def test_negatives_are_fresh_distinct_foreign_and_uniform():
    bank, index = MemoryBank(60, 4), torch.tensor([3, 17, 42, 59])
    counts, generator = torch.zeros(60), torch.Generator().manual_seed(0)
    for _ in range(4000):
        columns, own = bank.in_play(index, 14, generator)
        assert columns[:4].tolist() == index.tolist() and own.tolist() == [0, 1, 2, 3]
        assert len(set(columns.tolist())) == 18
        counts[columns[4:]] += 1
    assert counts[index].sum() == 0
    # A count's variance is expected * (1 - 14/56), their sum is fixed: chi-square, 55 degrees of freedom.
    others, expected = counts[[i for i in range(60) if i not in index]], 4000 * 14 / 56
    chi_square = (others - expected).square().sum().item() / (expected * (1 - 14 / 56)) * 55 / 56
    assert 30 < chi_square < 90                                        # a tenth of a percent on either side


def test_rows_in_play_move_as_in_the_whole_bank_and_the_others_stay():
    bank, index, z = MemoryBank(30, 8), torch.tensor([4, 9, 25]), unit(3, 8, dtype=torch.float32)
    for negatives in (0, 27, 1000):
        columns, own = bank.in_play(index, negatives)
        assert columns.tolist() == list(range(30)) and torch.equal(own, index)
    columns, own = bank.in_play(index, 10, common.seeded(0))
    before, prob = bank.rows.clone(), torch.zeros(3, 30)               # 0 where a row is not in play
    prob[:, columns] = (z @ before[columns].T / 0.2).softmax(1)
    want = grad_update(before, z, prob, index, 0.5)
    bank.update(own, z, prob[:, columns], None, columns, before[columns])
    torch.testing.assert_close(bank.rows, want)
    rest = [i for i in range(30) if i not in columns]
    assert len(rest) == 17 and torch.equal(bank.rows[rest], before[rest])


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


def recorded(monkeypatch, *flags):
    """What went in and out of every step of a real run of one epoch, as a list of dicts."""
    steps = []

    def batches(run, batches=common.Run.batches):
        for images, aspect, index in batches(run):
            steps.append({"index": index, "before": run.parts["bank"].rows.double()})
            yield images, aspect, index

    def mix(*args):
        out = cutmix(*args)
        steps[-1].update(zip(("mixed", "partner", "weight"), out))
        return out

    def hooked(name, make):
        def made(*args):
            module = make(*args)
            module.register_forward_hook(lambda _, x, out: steps[-1].update({name: (x[0], out.detach())}))
            return module
        return made

    monkeypatch.setattr(common, "resnet", hooked("encoder", Small))
    monkeypatch.setattr(npid_distill, "projector", hooked("projector", npid_distill.projector))
    monkeypatch.setattr(npid_distill, "cutmix", mix)
    monkeypatch.setattr(common.Run, "batches", batches)

    def log(run, **values):
        steps[-1].update(values, after=run.parts["bank"].rows.double())
    monkeypatch.setattr(common.Run, "log", log)
    npid_distill.train(parsed(npid_distill, *NPID, "--epochs", 1, *flags))
    return steps


@pytest.mark.parametrize("update", ["grad", "ema"])
def test_a_step_of_a_run_has_the_loss_and_the_update_of_the_formulas(update, tmp_path, monkeypatch):
    """Under CutMix the gradient update moves both labels' rows by their shares and pushes all others away;
    NPID's average moves the image's own row, toward the mixed embedding, and leaves the partner's alone."""
    flags = ["--negatives", 0, "--lambda-kl", 3, "--cutmix", 0.5, "--init", "random"]
    steps = recorded(monkeypatch, "--update", update, *flags, "--out", tmp_path)
    assert len({*torch.cat([step["index"] for step in steps]).tolist()}) == 48  # every image once
    assert any(step["weight"][0, 0] < 1 for step in steps)
    for step in steps:
        index, before, z = step["index"], step["before"].requires_grad_(), step["projector"][1].double()
        labels, z = torch.stack([index, index[step["partner"]]], 1), F.normalize(z, dim=1)
        ce, kl = loop(z @ before.T, labels, step["weight"].double())
        assert torch.equal(step["encoder"][0], step["mixed"])
        for name, value in (("ce", ce), ("kl", kl), ("loss", ce + 3 * kl)):
            assert step[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
        want = before.detach().clone()
        if update == "grad":
            want = F.normalize(0.5 * want - 0.5 * 0.2 * torch.autograd.grad(16 * ce, before)[0], dim=1)
        else:
            want[index] = F.normalize(0.5 * want[index] + 0.5 * z, dim=1)
            assert (step["after"] == before).all(1).sum() == 32  # images that are not in the batch
        torch.testing.assert_close(step["after"], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("init", ["augmented", "forward", "random"])
def test_every_row_is_filled_by_the_calibration_that_was_asked_for(init, tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(common, "resnet", Small)
    monkeypatch.setattr(common.Run, "batches", lambda run: runs.append(run) or iter(()))
    flags = [*NPID, "--limit", 49, "--init", init, "--out", tmp_path]  # three batches and one image
    npid_distill.train(parsed(npid_distill, *flags))
    run, rows = runs[0], runs[0].parts["bank"].rows
    drawn = MemoryBank(49, 16, generator=common.seeded("bank", 0)).rows
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(49))
    assert (rows == drawn).all(1).sum() == (49 if init == "random" else 0)
    assert len(rows.unique(dim=0)) == 49 and run.model.training
    centre = common.center_view(run.images.pixels[run.images.rows], 16, run.images.aspect)
    want = F.normalize(run.model.eval()(centre), dim=1)
    assert torch.allclose(rows, want, atol=1e-4) == (init == "forward")


def step(bank, update, negatives, z, index, partner, weight):
    """A training step's losses and update."""
    columns, own = bank.in_play(index, negatives)
    labels, rows = torch.stack([own, own[partner]], 1), bank.rows[columns]
    cosines = z @ rows.T
    loss = instance_ce(cosines / 0.2, labels, weight) + 20 * sqrt_kl(cosines)
    prob = (cosines / 0.2).softmax(1)
    bank.update(*((labels, z, prob, weight, columns, rows) if update == "grad" else (index, z)))
    return loss


@pytest.mark.parametrize("update, negatives", [("grad", 40), ("grad", 0), ("ema", 40)])
def test_a_step_runs_on_cuda_tensors_and_compiles_whole_and_once(update, negatives):
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        with torch.device("cuda"):
            bank, index, x = MemoryBank(100, 16), torch.arange(8), torch.randn(8, 3, 9, 9)
            weight = torch.rand(8, 2)
            model = nn.Sequential(Small(), npid_distill.projector(16, 16))
        assert step(bank, update, negatives, model(x), index, index.flip(0), weight).device.type == "cuda"
    bank, z = MemoryBank(60, 16), unit(3, 8, 16, dtype=torch.float32)
    args = [(part, torch.randperm(60)[:8], torch.randperm(8), torch.rand(8, 2)) for part in z]
    assert_compiles_once(lambda *args: step(bank, update, negatives, *args).isfinite(), args)


@pytest.mark.parametrize("flags", [["--negatives", 0, "--cutmix", 0.5], ["--update", "ema"]])
def test_a_run_that_dies_after_any_step_ends_as_if_it_had_not(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "resnet", Small)
    monkeypatch.setattr(npid_distill, "projector", nn.Linear)
    flags = [*NPID, *flags, "--save-every", 0, "--knn-every", 1, "--deterministic"]
    assert_dying_changes_nothing(npid_distill, flags, (0, 1, 3, 5), tmp_path, monkeypatch)


def test_the_file_alone_gives_its_parts(tmp_path):
    code = ("from npid_distill import MemoryBank, sqrt_kl; import torch; b = MemoryBank(9, 4); z = b.rows[:2]"
            "; p = z @ b.rows.T; b.update(torch.tensor([1, 2]), z, p.softmax(1)); sqrt_kl(p)")
    assert_works_alone("npid_distill.py", code, tmp_path)
