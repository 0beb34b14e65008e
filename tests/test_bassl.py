"""BA-SSL: the fusion's algebra, losses against loops, the frameworks' targets and queue, runs that die."""
import math
import typing

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bassl
import common
from bassl import (BYOL, BatchFusion, MoCo, SimSiam, cosine_loss, fuse_views, info_nce, mlp, nt_xent,
                   patch_partition, patch_restore)
from conftest import TINY, Small, assert_dying_changes_nothing, assert_works_alone, parsed, read_log

HINTS = typing.get_type_hints(bassl.Config)
FRAMEWORKS, KINDS = typing.get_args(HINTS["framework"]), typing.get_args(HINTS["fuse"])


def assert_compiles_once(function, arguments):
    """Without a graph break, without another graph for the second and third step, and to the same values."""
    torch._dynamo.reset()
    graphs = []
    backend = lambda module, _: graphs.append(module) or module.forward
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for args in arguments:
        torch.testing.assert_close(compiled(*args), function(*args))
    assert len(graphs) == 1


@pytest.fixture
def quick(monkeypatch):
    """Runs take no time: a small network, and heads with few hidden units."""
    monkeypatch.setattr(common, "resnet", Small)
    monkeypatch.setattr(bassl, "mlp", lambda widths, **norm: mlp([widths[0], 16, widths[-1]], **norm))


def opened():
    """A fusion of six images of 8 pixels with open gates."""
    torch.manual_seed(0)
    fusion = BatchFusion(6, 8)
    fusion.hold(0.7)
    return fusion


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_a_patch_holds_the_pixels_of_its_square_and_restore_inverts_partition(patch):
    x = torch.randn(3, 5, 8, 8)
    tokens = patch_partition(x, patch)
    assert tokens.shape == (3, (8 // patch) ** 2, 5 * patch**2)
    assert torch.equal(tokens[1, -1], x[1, :, -patch:, -patch:].flatten())
    assert torch.equal(tokens[1, 8 // patch - 1], x[1, :, :patch, -patch:].flatten())  # first row, last
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


def test_an_order_is_applied_before_and_undone_after():
    fusion, x, order = opened(), torch.randn(6, 3, 8, 8), torch.tensor([2, 0, 1, 5, 3, 4])
    want = torch.empty_like(x)
    want[order] = fusion(x[order])
    assert torch.equal(fusion(x, order), want) and not torch.allclose(want, fusion(x))


def test_the_views_of_the_leak_free_kinds_share_no_rows_of_the_convolution():
    fusion, x = opened(), torch.randn(6, 3, 8, 8)
    views = {kind: fuse_views(fusion, kind, x, x, common.seeded(0)) for kind in KINDS}
    assert torch.equal(*views["plain"])                                # the literal reading
    assert views["one"][1] is x and views["adversarial"][1] is x
    assert not torch.allclose(*views["shuffled"])


def test_the_adversarys_convolutions_get_the_opposite_gradient():
    x, gradients = torch.randn(6, 3, 8, 8), []
    for adversarial in (False, True):
        fusion = opened()
        if adversarial:
            fusion.make_adversarial()
        fusion(x).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in fusion.convs.parameters()]))
    assert torch.equal(gradients[0], -gradients[1]) and (gradients[0] != 0).any()


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


@pytest.mark.parametrize("loss", [nt_xent, cosine_loss, lambda z1, z2: info_nce(z1, z2, z2.sin().roll(1, 0))])
def test_a_loss_stays_in_float32_under_autocast_and_compiles_whole_and_once(loss):
    pairs = torch.randn(3, 2, 64, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(*pairs[0])
    assert inside.dtype == torch.float32 and torch.equal(inside, loss(*pairs[0]))
    assert_compiles_once(loss, pairs)


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


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_forward_runs_on_cuda_tensors_without_touching_the_host(framework, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode
    widths = [16, 1024, 256] if framework == "byol" else [16, 512, 128]
    monkeypatch.setattr("copy.deepcopy", lambda _: nn.Sequential(Small(), mlp(widths)))  # of fake tensors
    with FakeTensorMode():
        with torch.device("cuda"):
            model, fusion = bassl.FRAMEWORKS[framework](Small()), BatchFusion(8, 16, layers=2)
            order, (x1, x2) = torch.randperm(8), torch.randn(2, 8, 3, 16, 16)
        loss = model(fusion(x1), fusion(x2, order))                    # a constant made here lands on the CPU
        model.after_step(0.5)
        assert loss.device.type == "cuda" and loss.dtype == torch.float32


@pytest.mark.parametrize("framework, kind", [*zip(FRAMEWORKS, KINDS)])
def test_a_run_that_dies_after_any_step_ends_as_if_it_had_not(framework, kind, quick, tmp_path, monkeypatch):
    flags = f"--framework {framework} --fuse {kind} --layers 2 --knn-every 1 --save-every 0 --deterministic"
    assert_dying_changes_nothing(bassl, [*TINY, *flags.split()], (0, 1, 3, 5), tmp_path, monkeypatch)
    last = read_log(tmp_path / "died")[-1]
    assert (last["gate_2"] == 0.15) == (kind == "adversarial") and math.isfinite(last["loss"])


def test_the_control_pairs_every_image_with_another_in_an_order_of_its_own(quick, tmp_path, monkeypatch):
    """A fixed order could be learned by the fusion, which sees the whole batch."""
    seen = []
    monkeypatch.setattr(bassl, "fuse_views", lambda _, kind, *views: seen.append(views[:2]) or views[:2])
    monkeypatch.setattr(common.BatchAugment, "forward",
                        lambda self, images, generator, aspect, views: images.repeat(views, 1, 1, 1).float())
    bassl.train(parsed(bassl, *TINY, "--unpaired", "--out", tmp_path))
    orders = [tuple(next(j for j in range(16) if torch.equal(x1[j], row)) for row in x2) for x1, x2 in seen]
    assert all(sorted(order) == list(range(16)) for order in orders) and len({*orders}) == len(orders) == 6


def test_the_file_alone_gives_its_parts(tmp_path):
    code = ("from bassl import BatchFusion, nt_xent; import torch; x = torch.ones(4, 3, 8, 8); "
            "nt_xent(*BatchFusion(4, 8)(x).flatten(1).chunk(2), 0.2)")
    assert_works_alone("bassl.py", code, tmp_path)
