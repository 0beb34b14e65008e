"""BA-SSL: the fusion's algebra, the losses against loops, runs that are killed and resumed."""
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import bassl
import common
from bassl import BYOL, FRAMEWORKS, BatchFusion, MoCo, cosine_loss, fuse_views, info_nce, mlp, nt_xent, patch_partition, patch_restore
from conftest import ROOT, TINY, assert_dying_changes_nothing, assert_works_alone, read_log


def opened(batch=6, size=8, **options):
    """A fusion with open gates."""
    torch.manual_seed(0)
    fusion = BatchFusion(batch, size, **{"patch": 4, **options})
    fusion.hold(0.7)
    return fusion


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_restore_inverts_partition_exactly(patch):
    x = torch.randn(3, 5, 8, 8)
    tokens = patch_partition(x, patch)
    assert tokens.shape == (3, (8 // patch) ** 2, 5 * patch**2)
    assert torch.equal(patch_restore(tokens, patch, 5, 8), x)


def test_a_patch_holds_the_pixels_of_its_square():
    x = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    assert torch.equal(patch_partition(x, 4)[1, 2], x[1, :, 4:8, 0:4].flatten())       # third patch: second row, first column


def test_fusion_starts_as_the_identity_and_learns_its_way_out():
    fusion, x = BatchFusion(6, 8, layers=2), torch.randn(6, 3, 8, 8)
    assert torch.equal(fusion(x), x)
    fusion(x).square().sum().backward()
    assert all(gate.grad.abs() > 0 for gate in fusion.gates)


def test_gradients_reach_every_parameter_once_the_gates_are_open():
    fusion = BatchFusion(6, 8, layers=3, kernel=3)
    for gate in fusion.gates:
        torch.nn.init.constant_(gate, 0.5)
    (fusion(torch.randn(6, 3, 8, 8)) * torch.randn(6, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fusion.parameters())


@pytest.mark.parametrize("gate", [0.0, 0.3])
def test_an_image_depends_on_the_others_exactly_when_a_gate_is_open(gate):
    fusion = opened()
    fusion.hold(gate)
    x = torch.randn(6, 3, 8, 8)
    other = x.clone()
    other[4] += 1
    assert torch.equal(fusion(x)[0], fusion(other)[0]) == (gate == 0)


def test_an_order_is_applied_before_and_undone_after():
    fusion, x, order = opened(), torch.randn(6, 3, 8, 8), torch.randperm(6)
    assert torch.equal(fusion(x, order), fusion(x[order])[order.argsort()])
    assert not torch.allclose(fusion(x, order), fusion(x))


def test_wrong_sizes_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="5.*32"):
        BatchFusion(8, 32, patch=5)
    with pytest.raises(ValueError, match="kernel 2"):
        BatchFusion(8, 32, kernel=2)
    with pytest.raises(ValueError, match="4.*8"):
        BatchFusion(8, 32)(torch.zeros(4, 3, 32, 32))
    with pytest.raises(ValueError, match="16.*32"):
        BatchFusion(8, 32)(torch.zeros(8, 3, 16, 16))
    with pytest.raises(ValueError, match="3.*8 x 8"):
        patch_partition(torch.zeros(1, 3, 8, 8), 3)
    with pytest.raises(ValueError, match="16 pixels"):
        patch_restore(torch.zeros(1, 4, 48), 4, 3, 16)


def test_the_second_view_of_the_leak_free_kinds_knows_nothing_of_the_fusion():
    x1, x2 = torch.randn(2, 6, 3, 8, 8)
    for kind in ("one", "adversarial"):
        assert fuse_views(opened(), kind, x1, x2, common.seeded(0))[1] is x2


def test_shuffling_gives_each_view_its_own_rows_of_the_convolution():
    fusion, x = opened(), torch.randn(6, 3, 8, 8)
    v1, v2 = fuse_views(fusion, "plain", x, x, common.seeded(0))
    assert torch.equal(v1, v2)                                                          # the shared signature of the literal reading
    v1, v2 = fuse_views(fusion, "shuffled", x, x, common.seeded(0))
    assert not torch.allclose(v1, v2)


def test_the_adversary_climbs_the_loss():
    x, target = torch.randn(6, 3, 8, 8), torch.randn(6, 3, 8, 8)
    losses = {}
    for adversarial in (False, True):
        fusion = opened()
        if adversarial:
            fusion.make_adversarial()
        optimizer = torch.optim.SGD([p for p in fusion.parameters() if p.requires_grad], 0.1)
        for _ in range(30):
            loss = F.mse_loss(fusion(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[adversarial] = loss.item()
    start = F.mse_loss(opened()(x), target).item()
    assert losses[False] < start < losses[True]


def test_nt_xent_equals_the_double_loop():
    z1, z2 = torch.randn(2, 5, 7, dtype=torch.float64)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    terms = []
    for i in range(10):
        others = torch.stack([torch.exp(z[i] @ z[j] / 0.5) for j in range(10) if j != i])
        terms.append(-torch.log(torch.exp(z[i] @ z[(i + 5) % 10] / 0.5) / others.sum()))
    torch.testing.assert_close(nt_xent(z1, z2, 0.5), torch.stack(terms).mean())
    torch.testing.assert_close(nt_xent(z2, z1, 0.5), nt_xent(z1, z2, 0.5))
    torch.testing.assert_close(nt_xent(3 * z1, z2, 0.5), nt_xent(z1, z2, 0.5))


def test_nt_xent_passes_a_finite_difference_check():
    z1, z2 = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3), (z1, z2))


def test_losses_stay_in_float32_under_autocast():
    z1, z2, queue = torch.randn(64, 32), torch.randn(64, 32), torch.randn(128, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nt_xent(z1, z2, 0.1), info_nce(z1, z2, queue, 0.1), cosine_loss(z1, z2)
    for a, b in zip(inside, (nt_xent(z1, z2, 0.1), info_nce(z1, z2, queue, 0.1), cosine_loss(z1, z2))):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_info_nce_equals_the_loop():
    q, k, queue = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    terms = []
    for i in range(4):
        cos = [F.cosine_similarity(q[i], row, dim=0) for row in (k[i], *queue)]
        terms.append(math.log(sum(math.exp(c / 0.2) for c in cos)) - cos[0].item() / 0.2)
    assert info_nce(q, k, queue, 0.2).item() == pytest.approx(sum(terms) / 4, rel=1e-12)


def test_mocos_queue_is_first_in_first_out_and_holds_no_key_of_its_own_batch():
    torch.manual_seed(0)
    moco = MoCo(common.resnet("resnet10", "imagenet"), queue=12)
    seen = []
    for step in range(4):
        before = moco.queue.clone()
        moco(*torch.randn(2, 5, 3, 16, 16)).backward()
        assert torch.equal(moco.queue, before)                                          # not during the step
        seen.append(moco.keys)
        moco.after_step(0)
        assert moco.oldest.item() == 5 * (step + 1) % 12
    newest = torch.cat(seen)[-12:]
    assert {tuple(row.tolist()) for row in moco.queue} == {tuple(row.tolist()) for row in newest}


def test_targets_get_no_gradient_and_follow_by_momentum():
    torch.manual_seed(0)
    byol = BYOL(common.resnet("resnet10", "imagenet"), momentum=0.9)
    online = torch.nn.Sequential(byol.encoder, byol.projector)
    for p in online.parameters():
        p.data += 1
    want = [0.9 * t + 0.1 * o for t, o in zip(byol.target.parameters(), online.parameters())]
    byol(*torch.randn(2, 4, 3, 16, 16)).backward()
    assert all(p.grad is None for p in byol.target.parameters()) and all(p.grad is not None for p in byol.predictor.parameters())
    byol.after_step(0.0)
    for got, expected in zip(byol.target.parameters(), want):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_forward_runs_on_cuda_tensors_without_touching_the_host(framework, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode
    widths = {"moco": [512, 512, 128], "byol": [512, 1024, 256]}.get(framework)
    monkeypatch.setattr("copy.deepcopy", lambda module: torch.nn.Sequential(common.resnet("resnet10", "cifar"), mlp(widths)))  # fake tensors cannot be copied
    with FakeTensorMode():
        with torch.device("cuda"):
            model = FRAMEWORKS[framework](common.resnet("resnet10", "cifar"))
            fusion, order, (x1, x2) = BatchFusion(8, 32, layers=2), torch.randperm(8), torch.randn(2, 8, 3, 32, 32)
        loss = model(fusion(x1), fusion(x2, order))                                     # outside: a constant made here lands on the CPU
        model.after_step(0.5)
        assert loss.device.type == "cuda" and loss.dtype == torch.float32


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_run_that_dies_after_any_step_ends_as_if_it_had_not(framework, tmp_path, monkeypatch):
    flags = [*TINY, "--framework", framework, "--save-every", "2steps", "--knn-every", "1", "--deterministic"]     # 6 steps, 2 epochs
    assert_dying_changes_nothing(bassl, flags, (0, 1, 2, 3, 4, 5), tmp_path, monkeypatch)


def test_sigterm_saves_and_says_so(tmp_path):
    import signal, time
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "bassl.py", *TINY, "--epochs", "1000", "--out", str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().splitlines()) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "saved at step" in stdout
    assert common.read_checkpoint(out / "checkpoint.pt")["step"] > 0


@pytest.mark.parametrize("kind", ["plain", "shuffled", "one", "adversarial"])
def test_every_fusion_trains_and_logs_its_gates(kind, tmp_path):
    bassl.train(common.parse(bassl.Config, "", [*TINY, "--fuse", kind, "--layers", "2", "--epochs", "1", "--out", str(tmp_path)]))
    lines = read_log(tmp_path)
    assert (lines[-1]["gate_1"] == 0.15) == (kind == "adversarial") and "gate_2" in lines[-1]


def test_the_control_pairs_every_image_with_another_in_an_order_of_its_own(tmp_path, monkeypatch):
    """A fixed order could be learned by the fusion, which sees the whole batch."""
    seen = []

    def record(fusion, kind, x1, x2, generator):
        seen.append((x1, x2))
        return x1, x2
    monkeypatch.setattr(bassl, "fuse_views", record)
    monkeypatch.setattr(common.BatchAugment, "forward", lambda self, images, generator, views: images.repeat(views, 1, 1, 1).float())
    bassl.train(common.parse(bassl.Config, "", [*TINY, "--unpaired", "--out", str(tmp_path)]))
    orders = [[next(j for j in range(16) if torch.equal(x1[j], x2[i])) for i in range(16)] for x1, x2 in seen]
    assert all(sorted(order) == list(range(16)) for order in orders) and len({tuple(order) for order in orders}) == len(orders) == 6


def test_the_file_alone_gives_its_parts(tmp_path):
    code = "from bassl import BatchFusion, nt_xent; import torch; print(float(nt_xent(*BatchFusion(4, 8)(torch.randn(4, 3, 8, 8)).flatten(1).chunk(2), 0.2)))"
    assert_works_alone("bassl.py", code, tmp_path)
