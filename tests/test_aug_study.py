"""The study: losses against formulas, the template's invariants."""
import dataclasses

import pytest
import torch
import torch.nn.functional as F

import aug_study
import bassl
import common
import npid_distill
from aug_study import (METHODS, Template, barlow_loss, dino_loss, mlp, sinkhorn, swav_loss, switched,
                       vicreg_loss)
from conftest import Small, assert_runs_on_cuda_and_compiles_once, read_log


def pair(b=6, d=5):
    return torch.randn(2, b, d, dtype=torch.float64, generator=common.seeded("pair"))


def test_barlow_equals_its_formula():
    z1, z2 = pair(64, 70)  # more columns than rows
    c = torch.corrcoef(torch.cat([z1, z2], 1).T)[:70, 70:]
    off_diagonal = c - c.diag().diag()
    want = (1 - c.diag()).square().sum() + 0.0051 * off_diagonal.square().sum()
    assert barlow_loss(z1, z2).item() == pytest.approx(want.item(), rel=1e-4)  # it adds 1e-5 to a variance


def test_vicreg_equals_its_formula():
    z1, z2 = pair(8, 12)
    want = 25 * (z1 - z2).square().mean()
    for z in (z1, z2):
        cov = torch.cov(z.T)
        want += 25 * (1 - (cov.diag() + 1e-4).sqrt()).clamp(min=0).mean() / 2
        want += (cov - cov.diag().diag()).square().sum() / 12
    torch.testing.assert_close(vicreg_loss(z1, z2), want)


def test_sinkhorn_is_the_papers_pseudo_code_and_balances_rows_and_columns():
    scores = F.normalize(pair(64, 8)[0], dim=1)
    q = scores.div(0.05).exp()
    for _ in range(3):
        q = q / q.sum(0, keepdim=True) / 8
        q = q / q.sum(1, keepdim=True) / 64
    torch.testing.assert_close(sinkhorn(scores), q * 64)
    torch.testing.assert_close(sinkhorn(scores).sum(1), torch.ones(64).double())
    torch.testing.assert_close(sinkhorn(scores, iterations=200).sum(0), torch.full((8,), 8.0).double())
    assert sinkhorn(1e4 * scores).isfinite().all()


def test_swav_and_dino_equal_their_formulas_and_leave_the_target_alone():
    s, t = pair().requires_grad_()
    center, swav, dino = torch.randn(1, 5, dtype=torch.float64), 0, 0
    for i, codes in enumerate(sinkhorn(t)):
        log_p = torch.log(torch.exp(s[i] / 0.1) / torch.exp(s[i] / 0.1).sum())
        teacher = torch.exp((t[i] - center[0]) / 0.04).detach()
        swav, dino = swav - (codes * log_p).sum() / 6, dino - (teacher / teacher.sum() * log_p).sum() / 6
    for loss, want in ((swav_loss(s, t), swav), (dino_loss(s, t, center), dino)):
        torch.testing.assert_close(loss, want)
        assert torch.autograd.grad(loss, t, allow_unused=True)[0] is None


@pytest.mark.parametrize("loss", [
    lambda x, y: bassl.nt_xent(z1=x, z2=y), bassl.cosine_loss,
    lambda x, y: bassl.info_nce(x, y, queue=y.roll(1, 0)),
    aug_study.barlow_loss, aug_study.vicreg_loss, aug_study.swav_loss,
    lambda x, y: aug_study.dino_loss(x, y, 0), lambda x, _: npid_distill.sqrt_kl(logits=x),
    lambda x, _: npid_distill.instance_ce(x, torch.arange(32)),
])
def test_a_loss_stays_in_float32_under_autocast(loss):
    pair = torch.randn(2, 32, 64).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(*pair)
    assert inside.dtype == torch.float32 and torch.equal(inside, loss(*pair.float()))


def template(*switches):
    torch.manual_seed(0)
    return Template(Small(), switched(*switches), queue=64)


OWN = [(name, "default", "default") for name in METHODS]
SWITCHED = [("simclr", "on", "default"), ("barlow", "on", "on"), ("moco", "on", "off"),
            ("byol", "off", "off")]


@pytest.mark.parametrize("switches", OWN + SWITCHED, ids=" ".join)
def test_the_loss_is_the_mean_over_all_pairs_of_a_view_and_a_global_one(switches):
    model = template(*switches)
    views, local = torch.randn(16, 3, 9, 9), torch.randn(16, 3, 6, 6)  # of eight images
    z = model.projector(model.encoder(views))
    online = model.predictor(z).split(8) + model.predictor(model.projector(model.encoder(local))).split(8)
    target = z if model.method.target_gradient else z.detach()
    target = model.target(views) if model.method.momentum else target
    buffer = model.queue if model.method.queue else model.center
    losses = [model.method.loss(online[v], target.split(8)[g], buffer, 0.2)
              for g in range(2) for v in range(4) if v != g]
    got, want = model(views, local), sum(losses) / 6
    torch.testing.assert_close(got, want)
    learning = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss, learning) for loss in (got, want)]  # raises where one has no part
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert all(p.requires_grad != key.startswith("target.") for key, p in model.named_parameters())


@pytest.mark.parametrize("switches", OWN, ids=" ".join)
def test_a_step_runs_on_cuda_tensors_and_compiles_whole_and_once(switches):
    steps = [(x, x) for x in torch.randn(3, 8, 3, 8, 8)]
    assert_runs_on_cuda_and_compiles_once(template(*switches).eval(), steps)  # one set of statistics


@pytest.mark.parametrize("name", ["moco", "byol", "dino"])
def test_a_step_moves_target_queue_and_centre(name):
    model, views = template(name, "default", "default"), torch.randn(16, 3, 9, 9)
    online = [p.data.add_(1) for part in (model.encoder, model.projector) for p in part.parameters()]
    want = [0.995 * t + 0.005 * o for t, o in zip(model.target.parameters(), online)]
    keys = model.target(views)
    model(views)
    model.after_step(0.5)                                              # from 0.99 half-way to 1
    torch.testing.assert_close(list(model.target.parameters()), want)
    if name == "moco":
        torch.testing.assert_close(model.queue[:16], F.normalize(keys))
    if name == "dino":
        torch.testing.assert_close(model.center, 0.1 * keys.mean(0, keepdim=True))


def test_views_of_up_to_64_pixels_are_not_blurred_and_byols_two_above_differ():
    for size, want in ((64, [0, 0, 0]), (65, [1, 0.1])):
        assert [view.blur_p for view in aug_study.make_augments("byol", size, 64)][:len(want)] == want


@pytest.mark.parametrize("name", [*METHODS, "alignment"])
def test_no_method_collapses_in_sixty_steps(name, small, train, monkeypatch):
    """The effective rank tells a method that holds its features apart from the pull of two views alone."""
    alignment = dataclasses.replace(METHODS["simclr"], loss=lambda z, t, *_: (z - t).square().sum(1).mean())
    monkeypatch.setitem(METHODS, "alignment", alignment)
    monkeypatch.setattr(aug_study, "mlp", lambda widths, *norm: mlp([min(w, 256) for w in widths], *norm))
    flags = "--limit 640 --batch 64 --epochs 6 --knn-every 6 --optimizer adamw --lr 0.008 --augs simclr"
    out = train("out", *flags.split(), "--methods", name, script=aug_study)
    rank = read_log(out)[-1]["effective_rank"]  # 5.1 to 7.6, and 3.5, over two seeds
    assert (rank > 4.3) == (name != "alignment"), rank
