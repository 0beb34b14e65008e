"""BA-SSL: the fusion's algebra, losses against loops, the frameworks' targets and queue, the control."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bassl
import common
from bassl import (BYOL, BatchFusion, MoCo, SimSiam, cosine_loss, fuse_views, info_nce, nt_xent,
                   patch_partition, patch_restore)
from conftest import Small, assert_runs_on_cuda_and_compiles_once


def opened():
    """A fusion of six images of 8 pixels with open gates."""
    torch.manual_seed(0)
    fusion = BatchFusion(6, 8, layers=2, kernel=3)
    fusion.hold(0.7)
    return fusion


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_a_patch_holds_the_pixels_of_its_square_and_restore_inverts_partition(patch):
    x = torch.randn(3, 5, 8, 8)
    tokens = patch_partition(x, patch)
    assert torch.equal(tokens, F.unfold(x, patch, stride=patch).mT)
    assert torch.equal(patch_restore(tokens, patch, 5, 8), x)


def test_fusion_starts_as_the_identity_and_all_of_it_learns_once_a_gate_is_open():
    fusion, x = BatchFusion(6, 8, layers=2, kernel=3), torch.randn(6, 3, 8, 8)
    assert torch.equal(fusion(x), x)
    fusion(x).square().sum().backward()
    assert all(gate.grad.abs() > 0 for gate in fusion.gates)
    for gate in fusion.gates:
        nn.init.constant_(gate, 0.5)
    (fusion(x) * torch.randn_like(x)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in fusion.parameters())


def test_the_views_of_the_leak_free_kinds_share_no_rows_of_the_convolution():
    fusion, x, order = opened(), torch.randn(6, 3, 8, 8), torch.tensor([2, 0, 1, 5, 3, 4])
    one, shuffled, want = fusion(x), fusion(x, order), torch.empty_like(x)
    want[order] = fusion(x[order])                                     # applied before and undone after
    assert torch.equal(shuffled, want) and not torch.allclose(shuffled, one)
    for kind in ("plain", "one", "adversarial", "shuffled"):
        first, second = fuse_views(fusion, kind, x, x, common.seeded(0))
        assert torch.equal(first, one) == (kind != "shuffled")
        assert torch.equal(first, second) == (kind == "plain")         # the literal reading
        assert torch.equal(second, x) == (kind in ("one", "adversarial"))


def test_the_adversarys_convolutions_get_the_opposite_gradient():
    x, gradients = torch.randn(6, 3, 8, 8), []
    for adversarial in (False, True):
        fusion = opened()
        if adversarial:
            fusion.make_adversarial()
        fusion(x).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in fusion.convs.parameters()]))
    assert torch.equal(gradients[0], -gradients[1]) and (gradients[0] != 0).any()


def test_the_gate_keeps_the_value_that_it_is_held_at_and_learns_where_it_is_told_to(small, train):
    def gate(out, *flags):
        return common.read_checkpoint(train(out, *flags) / "checkpoint.pt")["model"]["fusion.gates.0"].item()
    assert gate("held") == pytest.approx(0.15)
    assert 0 < abs(gate("learned", "--gate", "0")) < 0.1


def test_losses_equal_their_loops_whatever_the_scale():
    torch.manual_seed(0)
    z1, z2, queue = (torch.randn(n, 7, dtype=torch.float64) for n in (5, 5, 9))
    z, contrast = F.normalize(torch.cat([z1, z2]), dim=1), 0
    for i in range(10):
        others = sum(math.exp(z[i] @ z[j] / 0.5) for j in range(10) if j != i)
        contrast -= math.log(math.exp(z[i] @ z[(i + 5) % 10] / 0.5) / others) / 10
    assert nt_xent(3 * z1, z2, 0.5).item() == pytest.approx(contrast, rel=1e-12)
    cosine = contrast = 0
    for a, b in zip(z1, z2):
        cosines = [(a @ row / a.norm() / row.norm()).item() for row in (b, *queue)]
        cosine += cosines[0] / 5
        contrast += (math.log(sum(math.exp(c / 0.2) for c in cosines)) - cosines[0] / 0.2) / 5
    assert info_nce(z1, 3 * z2, queue, 0.2).item() == pytest.approx(contrast, rel=1e-12)
    assert cosine_loss(3 * z1, z2).item() == pytest.approx(-cosine, rel=1e-12)


def test_mocos_queue_is_first_in_first_out_with_both_views_keys_and_none_of_its_own_batch():
    torch.manual_seed(0)
    moco, seen = MoCo(Small(), queue=12), []
    for _ in range(4):
        before, views = moco.queue.clone(), torch.randn(2, 5, 3, 8, 8)
        seen.append(F.normalize(moco.target(views.flatten(0, 1)), dim=1))
        moco(*views)
        assert torch.equal(moco.queue, before)                         # not during the step
        moco.after_step(0)
    assert {*map(tuple, moco.queue.tolist())} == {*map(tuple, torch.cat(seen)[-12:].tolist())}


@pytest.mark.parametrize("framework", [BYOL, MoCo])
@pytest.mark.parametrize("progress, momentum", [(0.0, 0.9), (0.5, 0.95), (1.0, 1.0)])
def test_targets_get_no_gradient_and_follow_by_a_momentum_that_grows(framework, progress, momentum):
    model = framework(Small(), momentum=0.9, momentum_end=1.0)
    online = [p.data.add_(1) for part in (model.encoder, model.projector) for p in part.parameters()]
    want = [momentum * t + (1 - momentum) * o for t, o in zip(model.target.parameters(), online)]
    model(*torch.randn(2, 4, 3, 8, 8)).backward()
    assert all((p.grad is None) == name.startswith("target") for name, p in model.named_parameters())
    model.after_step(progress)
    torch.testing.assert_close(list(model.target.parameters()), want)


@pytest.mark.parametrize("framework", [BYOL, SimSiam])
def test_the_gradient_is_that_of_the_mean_negative_cosine_over_both_directions(framework):
    """A rate belongs to a loss's scale: 2 - 2 cos, or a sum over the directions, would double every step."""
    model, x = framework(Small()).double(), torch.randn(8, 3, 8, 8, dtype=torch.float64)
    z = model.projector(model.encoder(x))
    target = (model.target(x) if framework is BYOL else z).detach().roll(4, 0)  # the other view's
    cosines = [(a @ b) / (a.norm() * b.norm()) for a, b in zip(model.predictor(z), target)]
    online = [p for p in model.parameters() if p.requires_grad]
    got, want = (torch.autograd.grad(loss, online) for loss in (model(*x.chunk(2)), -sum(cosines) / 8))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("framework", bassl.FRAMEWORKS)
def test_a_framework_and_a_fusion_run_on_cuda_tensors_and_compile_whole_and_once(framework):
    model = bassl.FRAMEWORKS[framework](Small())
    assert_runs_on_cuda_and_compiles_once(model, torch.randn(3, 2, 8, 3, 8, 8).unbind())
    steps = [(x, torch.randperm(6)) for x in torch.randn(3, 6, 3, 8, 8)]
    assert_runs_on_cuda_and_compiles_once(opened(), steps)


def test_the_control_pairs_every_image_with_another_in_an_order_of_its_own(small, train, monkeypatch):
    """A fixed order could be learned by the fusion, which sees the whole batch."""
    seen = []
    monkeypatch.setattr(bassl, "fuse_views", lambda _, kind, *views: seen.append(views[:2]) or views[:2])
    monkeypatch.setattr(common.BatchAugment, "forward",
                        lambda self, images, generator, aspect, views: images.repeat(views, 1, 1, 1).float())
    train("out", "--unpaired")
    orders = [tuple(next(j for j in range(16) if torch.equal(x1[j], row)) for row in x2) for x1, x2 in seen]
    assert all(sorted(order) == list(range(16)) for order in orders) and len({*orders}) == len(orders) == 6
