"""NPID with self-distillation: every term against loops and autograd, the bank's invariants, runs that die and go on."""
import math

import pytest
import torch
import torch.nn.functional as F

import common
import npid_distill
from conftest import TINY, assert_dying_changes_nothing, assert_works_alone, read_log
from npid_distill import MemoryBank, chunked_losses, cutmix, dense_losses, grad_update, instance_ce, sqrt_kl

NPID = [*TINY, "--dim", "16", "--negatives", "12"]


def unit(*shape, dtype=torch.float64, seed=0):
    return F.normalize(torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)), dim=-1)


def loop(z, rows, positive, weight, tau, power, temper=False):
    """Cross-entropy and KL term of one batch, sample by sample and class by class."""
    ce = kl = 0
    for i in range(len(z)):
        cos = [z[i] @ w for w in rows]
        total = sum(torch.exp(c / tau) for c in cos)
        ce = ce - sum(weight[i][l] * torch.log(torch.exp(cos[positive[i][l]] / tau) / total) for l in range(len(positive[i])))
        s = 1 / tau if temper else 1
        p = [torch.exp(s * c) for c in cos]
        p = [v / sum(p) for v in p]
        u = [v.detach() ** power for v in p]
        u = [v / sum(u) for v in u]
        kl = kl + sum(a * torch.log(a / b) for a, b in zip(p, u))
    return ce / len(z), kl / len(z)


@pytest.mark.parametrize("temper", [False, True])
@pytest.mark.parametrize("chunk", [None, 4, 64])
def test_losses_and_gradients_equal_the_naive_loop(temper, chunk):
    z, rows = unit(5, 6).requires_grad_(), unit(11, 6, seed=1)
    positive, weight = torch.tensor([[0, 3], [1, 1], [2, 9], [10, 0], [4, 5]]), torch.tensor([[0.7, 0.3]] * 5, dtype=torch.float64)
    want = loop(z, rows, positive.tolist(), weight, 0.2, 0.5, temper)
    args = (positive, weight, *(() if chunk else (None,)), 0.2, 0.5, temper)
    got = chunked_losses(z, rows, *args, chunk) if chunk else dense_losses(z, rows, *args)
    for a, b in zip(got[:2], want):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(*(torch.autograd.grad(v, z, retain_graph=True)[0] for v in (a, b)))
    cos = z.detach() @ rows.T / 0.2
    torch.testing.assert_close(got[2], cos.logsumexp(1) if chunk else cos.softmax(1))


def test_sqrt_kl_is_zero_when_uniform_positive_otherwise_and_still_through_u():
    assert sqrt_kl(torch.full((3, 7), 2.0)).item() == pytest.approx(0, abs=1e-6)
    logits = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert sqrt_kl(logits).item() > 0 and sqrt_kl(logits, power=1.0).item() == pytest.approx(0, abs=1e-12)
    gradient, = torch.autograd.grad(sqrt_kl(logits), logits)
    p = logits.detach().softmax(1)
    u = p.sqrt() / p.sqrt().sum(1, keepdim=True)                                        # held fixed by the formula below
    log_ratio = (p / u).log()
    torch.testing.assert_close(gradient, p * (log_ratio - (p * log_ratio).sum(1, keepdim=True)) / 4)


@pytest.mark.parametrize("labels", [1, 2])
def test_the_update_goes_down_autograds_gradient_of_the_rows(labels):
    """Direction of the step = -tau * gradient of the summed cross-entropy with respect to the rows."""
    z, rows = unit(4, 6), unit(9, 6, seed=1).requires_grad_()
    positive = torch.tensor([[0, 5], [3, 0], [3, 3], [8, 1]])[:, :labels]               # row 3 stands twice in the batch
    weight = torch.tensor([[0.8, 0.2]] * 4, dtype=torch.float64)[:, :labels] if labels == 2 else None
    logits = z @ rows.T / 0.2
    gradient, = torch.autograd.grad(4 * instance_ce(logits, positive, weight), rows)
    new = grad_update(rows.detach(), z, logits.detach().softmax(1), positive, 0.5, weight)
    want = F.normalize(0.5 * rows.detach() + 0.5 * (-0.2 * gradient), dim=1)
    torch.testing.assert_close(new, want)


def test_the_update_is_npids_average_where_prob_is_zero():
    z, rows = unit(3, 6), unit(9, 6, seed=1)
    new = grad_update(rows, z, torch.zeros(3, 9, dtype=torch.float64), torch.tensor([2, 4, 8]), 0.3)
    want = rows.clone()
    want[[2, 4, 8]] = F.normalize(0.3 * rows[[2, 4, 8]] + 0.7 * z, dim=1)
    torch.testing.assert_close(new, want, atol=1e-6, rtol=0)
    bank = MemoryBank(9, 6, momentum=0.3)
    bank.rows.copy_(rows)
    bank.update(torch.tensor([2, 4, 8]), z.float(), None)
    torch.testing.assert_close(bank.rows.double(), want, atol=1e-6, rtol=0)


def test_negatives_are_fresh_distinct_foreign_and_uniform():
    bank, index = MemoryBank(60, 4), torch.tensor([3, 17, 42, 59])
    counts, generator = torch.zeros(60), torch.Generator().manual_seed(0)
    for _ in range(4000):
        columns, own, repeated = bank.in_play(index, 14, generator)
        assert columns[:4].tolist() == index.tolist() and own.tolist() == [0, 1, 2, 3] and not repeated.any()
        assert len(set(columns.tolist())) == 18
        counts[columns[4:]] += 1
    assert counts[index].sum() == 0
    expected = 4000 * 14 / 56
    others = counts[[i for i in range(60) if i not in index]]
    # A count has variance expected * (1 - 14/56) and the counts sum to a constant: divided by it, chi-square with 55 degrees of freedom.
    chi2 = ((others - expected) ** 2).sum().item() / (expected * (1 - 14 / 56)) * 55 / 56
    assert 30 < chi2 < 90, chi2                                                         # beyond 0.1 % on either side


def test_all_other_rows_as_negatives_equal_the_whole_bank():
    bank, index, z = MemoryBank(30, 8), torch.tensor([4, 9, 25]), unit(3, 8, dtype=torch.float32)
    columns, own, repeated = bank.in_play(index, 27)
    assert sorted(columns.tolist()) == list(range(30))
    sampled = dense_losses(z, bank.rows[columns], own, None, repeated, 0.2, 0.5, False)
    full = dense_losses(z, bank.rows, index, None, None, 0.2, 0.5, False)
    for a, b in zip(sampled[:2], full[:2]):
        torch.testing.assert_close(a, b)
    other = MemoryBank(30, 8)
    other.load_state_dict(bank.state_dict())
    bank.update(index, z, sampled[2], None, columns, own)
    other.update(index, z, full[2])
    torch.testing.assert_close(bank.rows, other.rows)


def test_a_repeated_image_counts_as_one_class_and_moves_its_row_by_both():
    bank, index, z = MemoryBank(20, 8), torch.tensor([4, 9, 4]), unit(3, 8, dtype=torch.float32)
    columns, own, repeated = bank.in_play(index, 10)
    assert own.tolist() == [0, 1, 0] and repeated.tolist() == [False, False, True] + [False] * 10
    got = dense_losses(z, bank.rows[columns], own, None, repeated, 0.2, 0.5, False)
    once = torch.cat([columns[:2], columns[3:]])                                        # the same rows, each named once
    want = dense_losses(z, bank.rows[once], own, None, None, 0.2, 0.5, False)
    torch.testing.assert_close(got[:2], want[:2])
    rows = grad_update(bank.rows[once], z, want[2], own, 0.5)
    bank.update(index, z, got[2], None, columns, own)
    torch.testing.assert_close(bank.rows[once], rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_stay_unit_after_every_update_in_both_types(dtype):
    bank = MemoryBank(40, 16, dtype)
    for step in range(20):
        index, z = torch.randperm(40)[:8], unit(8, 16, dtype=torch.float32, seed=step)
        columns, own, repeated = bank.in_play(index, 20)
        prob = dense_losses(z, bank.rows[columns], own, None, repeated, 0.2, 0.5, False)[2]
        bank.update(index, z, prob, None, columns, own)
        tolerance = 1e-5 if dtype == torch.float32 else 2**-8
        assert ((bank.rows.float().norm(dim=1) - 1).abs() < tolerance).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_equals_dense_in_value_gradient_and_update(dtype):
    z, bank = unit(16, 32, dtype=dtype).requires_grad_(), MemoryBank(1000, 32, dtype)
    index, weight = torch.stack([torch.arange(16), torch.arange(16).flip(0)], 1) * 7, torch.tensor([[0.6, 0.4]] * 16, dtype=dtype)
    dense = dense_losses(z, bank.rows, index, weight, None, 0.07, 0.5, False)
    chunked = chunked_losses(z, bank.rows, index, weight, 0.07, 0.5, False, 96)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    # In float32 the loss as it is trained, with the default lambda: the KL term alone is a small difference of large logarithms.
    for a, b in zip(*((ce + 20 * kl, ce, *((kl,) if dtype == torch.float64 else ())) for ce, kl, _ in (dense, chunked))):
        torch.testing.assert_close(a, b, **tolerance)
        torch.testing.assert_close(*(torch.autograd.grad(v, z, retain_graph=True)[0] for v in (a, b)), **tolerance)
    want = grad_update(bank.rows, z.detach(), dense[2], index, 0.5, weight)
    bank.update_in_chunks(index, z, chunked[2], 0.07, 96, weight)
    torch.testing.assert_close(bank.rows, want, rtol=1e-5, atol=1e-6)


def test_chunked_sums_refuse_a_temperature_at_which_they_underflow():
    with pytest.raises(ValueError, match="0.008"):
        chunked_losses(unit(4, 8), unit(9, 8), torch.arange(4), None, 0.008, 0.5, False, 4)


def test_cutmix_shares_are_the_pixels_that_are_seen():
    x = torch.arange(8.0)[:, None, None, None].expand(8, 3, 32, 32)
    for seed in range(20):
        mixed, partner, weight = cutmix(x, 0.5, common.seeded(seed))
        for i in range(8):
            seen = torch.stack([(mixed[i] == i).float().mean(), (mixed[i] == partner[i]).float().mean()])
            torch.testing.assert_close(seen if partner[i] != i else torch.tensor([1.0, 0.0]), weight[i] if partner[i] != i else torch.tensor([1.0, 0.0]))
    assert torch.equal(cutmix(x, 0.0, common.seeded(0))[0], x)


@pytest.mark.parametrize("update", ["grad", "ema", "whole bank"])
def test_forward_runs_on_cuda_tensors_without_touching_the_host(update):
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        with torch.device("cuda"):
            bank, index, x = MemoryBank(100, 16), torch.arange(8), torch.randn(8, 3, 32, 32)
            model, partner = torch.nn.Sequential(common.resnet("resnet10", "cifar"), npid_distill.projector(512, 16)), torch.randperm(8)
        weight = npid_distill.shares(0.7, x)
        z = F.normalize(model(x), dim=1)
        assert z.device.type == weight.device.type == "cuda"
        if update == "whole bank":
            labels = torch.stack([index, index[partner]], 1)
            ce, kl, log_z = chunked_losses(z, bank.rows, labels, weight, 0.2, 0.5, False, 30)
            bank.update_in_chunks(labels, z, log_z, 0.2, 30, weight)
            return
        columns, own, repeated = bank.in_play(index, 40)
        own = torch.stack([own, own[partner]], 1)
        ce, kl, prob = dense_losses(z, bank.rows[columns], own, weight, repeated, 0.2, 0.5, False)
        bank.update(*((index, z, prob, weight, columns, own) if update == "grad" else (torch.stack([index, index[partner]], 1), z, None, weight)))
        assert ce.device.type == kl.device.type == bank.rows.device.type == "cuda"


@pytest.mark.parametrize("flags", [["--negatives", "0", "--chunk", "7"], ["--update", "ema", "--negatives", "12", "--cutmix", "0"], ["--bank-dtype", "bf16"]],
                         ids=["whole bank", "npid", "sampled bf16"])
def test_a_run_that_dies_after_any_step_ends_as_if_it_had_not(flags, tmp_path, monkeypatch):
    assert_dying_changes_nothing(npid_distill, [*NPID, *flags, "--save-every", "2steps", "--knn-every", "1", "--deterministic"], (0, 1, 3, 5), tmp_path, monkeypatch)


@pytest.mark.parametrize("limit, batch", [(48, 16), (49, 16)])
def test_an_epoch_touches_every_row_once_and_none_is_zero(limit, batch, tmp_path, monkeypatch):
    touched = []
    update = MemoryBank.update
    monkeypatch.setattr(MemoryBank, "update", lambda self, index, *rest: touched.extend(index[:, 0].tolist()) or update(self, index, *rest))
    npid_distill.train(common.parse(npid_distill.Config, "", [*NPID, "--limit", str(limit), "--batch", str(batch), "--epochs", "1", "--update", "ema",
                                                               "--cutmix", "0", "--out", str(tmp_path / "run")]))
    assert len(touched) == 48 == len(set(touched))
    rows = common.read_checkpoint(tmp_path / "run" / "checkpoint.pt")["bank"]["rows"]
    assert rows.shape == (limit, 16) and (rows.norm(dim=1) - 1).abs().max() < 1e-5
    assert math.isfinite(read_log(tmp_path / "run")[-1]["kl"])


def test_calibration_is_a_forward_pass_of_the_untrained_network_in_eval_mode(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(common.Run, "batches", lambda self: seen.update(run=self) or iter(()))
    npid_distill.train(common.parse(npid_distill.Config, "", [*NPID, "--out", str(tmp_path / "run")]))
    run = seen["run"]
    model = run.model.eval()
    want = F.normalize(model(common.center_view(run.images.pixels, 16)), dim=1)
    torch.testing.assert_close(run.bank.rows, want, atol=1e-4, rtol=0)


def test_the_file_alone_gives_its_parts(tmp_path):
    code = "from npid_distill import MemoryBank, sqrt_kl, grad_update; import torch; b = MemoryBank(9, 4); z = torch.randn(2, 4); " \
           "b.update(torch.tensor([1, 2]), z, (z @ b.rows.T).softmax(1)); print(sqrt_kl(z @ b.rows.T))"
    assert_works_alone("npid_distill.py", code, tmp_path)
