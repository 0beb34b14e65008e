"""The study: each loss against its formula written out, the template's invariants, effects from grids whose answer is known."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import aug_study
import bassl
import common
from aug_study import (AUGMENTATIONS, METHODS, Cell, Method, Template, barlow_loss, cosine_loss, dino_loss, effects, info_nce, nt_xent, sinkhorn, states,
                       swav_loss, switched, vicreg_loss)
from conftest import TINY, assert_dying_changes_nothing, assert_works_alone, read_log, run_script


def pair(b=6, d=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(b, d, dtype=torch.float64, generator=generator), torch.randn(b, d, dtype=torch.float64, generator=generator)


def test_contrastive_and_cosine_losses_equal_those_of_bassl_and_the_loop():
    z1, z2 = pair()
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    loop = sum(-math.log(math.exp(z[i] @ z[(i + 6) % 12] / 0.2) / sum(math.exp(z[i] @ z[j] / 0.2) for j in range(12) if j != i)) for i in range(12)) / 12
    assert nt_xent(z1, z2).item() == pytest.approx(loop) == bassl.nt_xent(z1, z2, 0.2).item()
    queue = pair(9)[0]
    assert info_nce(z1, z2, queue).item() == pytest.approx(bassl.info_nce(z1, z2, queue, 0.1).item())
    cos = sum((a @ b / (a.norm() * b.norm())).item() for a, b in zip(z1, z2)) / 6
    assert cosine_loss(z1, z2).item() == pytest.approx(2 - 2 * cos)


@pytest.mark.parametrize("dim", [5, 70])  # more rows than columns, and fewer
def test_barlow_equals_its_formula_and_ignores_the_order_of_the_batch(dim):
    z1, z2 = pair(64, dim)
    total = 0.0
    for i, j in itertools.product(range(dim), range(dim)):
        a, b = z1[:, i] - z1[:, i].mean(), z2[:, j] - z2[:, j].mean()
        c = ((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()).item()
        total += (1 - c) ** 2 if i == j else 0.0051 * c * c
    assert barlow_loss(z1, z2).item() == pytest.approx(total, rel=1e-4)
    order = torch.randperm(64)
    torch.testing.assert_close(barlow_loss(z1[order], z2[order]), barlow_loss(z1, z2))
    assert not math.isclose(barlow_loss(z1[order], z2).item(), barlow_loss(z1, z2).item())


@pytest.mark.parametrize("dim", [5, 12])
def test_vicreg_equals_its_formula_and_ignores_the_order_of_the_batch(dim):
    z1, z2 = pair(8, dim)
    total = 25 * sum((a - b) ** 2 for a, b in zip(z1.flatten().tolist(), z2.flatten().tolist())) / (8 * dim)
    for z in (z1, z2):
        means = [sum(z[:, j].tolist()) / 8 for j in range(dim)]
        cov = [[sum((z[n, i].item() - means[i]) * (z[n, j].item() - means[j]) for n in range(8)) / 7 for j in range(dim)] for i in range(dim)]
        total += 25 * sum(max(0, 1 - math.sqrt(cov[j][j] + 1e-4)) for j in range(dim)) / dim / 2
        total += sum(cov[i][j] ** 2 for i in range(dim) for j in range(dim) if i != j) / dim
    assert vicreg_loss(z1, z2).item() == pytest.approx(total)
    order = torch.randperm(8)
    torch.testing.assert_close(vicreg_loss(z1[order], z2[order]), vicreg_loss(z1, z2))


def test_sinkhorn_balances_rows_and_columns():
    scores = F.normalize(torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1)
    q = scores.div(0.05).exp()
    for _ in range(3):                                                                  # the paper's pseudo-code
        q = q / q.sum(0, keepdim=True) / 8
        q = q / q.sum(1, keepdim=True) / 64
    torch.testing.assert_close(sinkhorn(scores), q * 64)
    assert (sinkhorn(scores).sum(1) - 1).abs().max() < 1e-9
    assert (sinkhorn(scores, iterations=100).sum(0) - 8).abs().max() < 1e-3
    assert (sinkhorn(scores).sum(0) - 8).abs().max() < 1.5
    assert sinkhorn(1e4 * scores).isfinite().all()


def test_swav_and_dino_equal_their_formulas_and_leave_the_target_alone():
    s, t = pair()
    s.requires_grad_(), t.requires_grad_()
    q = sinkhorn(t)
    want = -sum(q[i, k] * torch.log(torch.exp(s[i, k] / 0.1) / torch.exp(s[i] / 0.1).sum()) for i in range(6) for k in range(5)) / 6
    torch.testing.assert_close(swav_loss(s, t), want)
    center = torch.randn(1, 5, dtype=torch.float64)
    want = 0
    for i in range(6):
        p = torch.exp((t[i] - center[0]) / 0.04).detach()
        want = want - (p / p.sum() * torch.log(torch.exp(s[i] / 0.1) / torch.exp(s[i] / 0.1).sum())).sum() / 6
    torch.testing.assert_close(dino_loss(s, t, center), want)
    for loss in (swav_loss(s, t), dino_loss(s, t, center), cosine_loss(s, t)):
        assert torch.autograd.grad(loss, t, allow_unused=True)[0] is None


def template(name, **options):
    torch.manual_seed(0)
    return Template(common.resnet("resnet10", "imagenet"), switched(name, **{"predictor": "default", "momentum": "default"} | options))


def test_the_queue_is_first_in_first_out_and_holds_no_key_of_its_own_batch():
    model = template("moco")
    before, seen = model.queue.clone(), []
    for _ in range(3):
        held = model.queue.clone()
        model(torch.randn(10, 3, 32, 32))
        assert torch.equal(model.queue, held)
        seen.append(F.normalize(model.keys[5:], dim=1))
        model.after_step(0.5)
    assert torch.equal(model.queue[:15], torch.cat(seen)) and torch.equal(model.queue[15:], before[15:])


def test_dinos_centre_moves_by_its_rate():
    model = template("dino")
    model(torch.randn(8, 3, 32, 32))
    model.after_step(0.0)
    torch.testing.assert_close(model.center, 0.1 * model.keys.mean(0, keepdim=True))


@pytest.mark.parametrize("name, options", [("simclr", {}), ("barlow", {}), ("vicreg", {}), ("simclr", {"predictor": "on"}), ("simclr", {"momentum": "on"}), ("byol", {})])
def test_the_loss_is_the_mean_over_all_pairs_of_a_view_and_a_global_one(name, options):
    model = template(name, **options)
    views = torch.randn(16, 3, 32, 32), torch.randn(8, 3, 18, 18)                        # two global views of eight images, one local
    z = model.projector(model.encoder(views[0]))
    online = [*model.predictor(z).chunk(2), model.predictor(model.projector(model.encoder(views[1])))]
    targets = (model.target(views[0]) if model.method.momentum else z).chunk(2)
    losses = [model.method.loss(online[v], targets[g], None) for g in range(2) for v in range(3) if v != g]
    torch.testing.assert_close(model(*views), sum(losses) / 4)


@pytest.mark.parametrize("name", METHODS)
def test_only_the_online_branch_gets_a_gradient_and_all_of_it_does(name):
    model = template(name)
    model(torch.randn(16, 3, 32, 32), torch.randn(16, 3, 18, 18)).backward()
    for key, p in model.named_parameters():
        assert (p.grad is None) == key.startswith("target."), key


def test_a_shared_target_passes_its_gradient_only_where_the_method_says_so():
    for name in ("byol", "simsiam"):
        model = template(name, momentum="off")
        z = torch.randn(8, 256 if name == "byol" else 2048, requires_grad=True)
        assert torch.autograd.grad(model.method.loss(z.sin(), z.cos(), None), z)[0].abs().sum() > 0
        assert not model.method.target_gradient
    assert METHODS["simclr"].target_gradient and METHODS["barlow"].target_gradient and METHODS["vicreg"].target_gradient


def test_pairings_without_meaning_are_refused_with_the_reason():
    for name, options in (("simsiam", {"predictor": "off"}), ("dino", {"momentum": "off"}), ("swav", {"predictor": "on"})):
        with pytest.raises(ValueError, match="collapses|no published form"):
            template(name, **options)
    status, _, err = run_script("aug_study.py", "--methods", "simsiam", "--predictor", "off", *TINY)
    assert status == 2 and "collapses" in err
    status, _, err = run_script("aug_study.py", "--methods", "mae", *TINY)
    assert status == 2 and "simclr, moco" in err


@pytest.mark.parametrize("name", METHODS)
def test_forward_runs_on_cuda_tensors_without_touching_the_host(name, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode
    monkeypatch.setattr("copy.deepcopy", lambda module: torch.nn.Sequential(common.resnet("resnet10", "cifar"), rebuilt(METHODS[name])))  # fake tensors cannot be copied
    with FakeTensorMode():
        with torch.device("cuda"):
            model, views, local = Template(common.resnet("resnet10", "cifar"), METHODS[name]), torch.randn(16, 3, 32, 32), torch.randn(16, 3, 18, 18)
        loss = model(views, local)
        model.after_step(0.5)
        assert loss.device.type == "cuda"


def rebuilt(method):
    layers = aug_study.mlp([512, *method.projector], method.last_norm)
    return layers.append(aug_study.Prototypes(method.projector[-1], method.prototypes)) if method.prototypes else layers


@pytest.mark.parametrize("aug", AUGMENTATIONS)
def test_every_augmentation_runs(aug, tmp_path):
    cfg = common.parse(aug_study.Config, "", [*TINY, "--size", "32", "--limit", "16", "--augs", aug, "--epochs", "1", "--out", str(tmp_path)])
    aug_study.train(cfg)
    assert math.isfinite(read_log(tmp_path)[-1]["loss"])


class Narrow(torch.nn.Sequential):
    """Stands in for a ResNet: sixty steps of a method take seconds."""
    dim = 64

    def __init__(self, *_):
        layers = [layer for a, b in ((3, 32), (32, 64)) for layer in (torch.nn.Conv2d(a, b, 3, 2, 1, bias=False), torch.nn.BatchNorm2d(b), torch.nn.ReLU())]
        super().__init__(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


def alignment_alone(z, t, _):
    """What every one of the losses becomes without the part that spreads the embeddings."""
    return (z - t).square().sum(1).mean()


@pytest.mark.parametrize("name", [*METHODS, "alignment"])
def test_no_method_collapses_in_sixty_steps(name, tmp_path, monkeypatch):
    """The log's effective rank tells a method that holds its features apart from one that does not; `make soak` has the demo's budget."""
    monkeypatch.setattr(common, "resnet", Narrow)
    monkeypatch.setitem(METHODS, "alignment", Method(alignment_alone, (512, 128), target_gradient=True))
    flags = "--dataset shapes --size 16 --limit 1280 --batch 128 --epochs 6 --knn-every 6 --optimizer adamw --lr 0.004 --augs simclr --device cpu".split()
    aug_study.train(common.parse(aug_study.Config, "", [*flags, "--methods", name, "--out", str(tmp_path)]))
    last = read_log(tmp_path)[-1]
    assert last["feature_std"] > 0.4
    assert last["effective_rank"] < 12 if name == "alignment" else last["effective_rank"] > 15


@pytest.mark.parametrize("name", ["moco", "dino"])
def test_a_run_that_dies_after_any_step_ends_as_if_it_had_not(name, tmp_path, monkeypatch):
    flags = [*TINY, "--methods", name, "--save-every", "2steps", "--deterministic"]
    assert_dying_changes_nothing(aug_study, flags, (1, 3), tmp_path, monkeypatch)


def synthetic(aug_effect, momentum_effect, arch_effect):
    """A full grid whose accuracies are sums of known effects, with a seed's own offset."""
    accuracy = {}
    for seed, method, aug, momentum in itertools.product((0, 1), ("simclr", "byol"), ("simclr", "byol", "multicrop"), ("on", "off")):
        cell = Cell(method, aug, "resnet10", "on" if method == "byol" else "off", momentum)
        accuracy[cell, seed] = 50 + seed + aug_effect[aug] + momentum_effect * (momentum == "on") + 4 * (method == "byol")
    for (cell, seed), value in list(accuracy.items()):
        if cell.aug == "simclr":
            accuracy[aug_study.dataclasses.replace(cell, arch="resnet18"), seed] = value + arch_effect
    return accuracy


def test_effects_of_a_grid_with_known_effects_come_out_exact():
    rows = {row["factor"]: row for row in effects(synthetic({"simclr": 0, "byol": 2, "multicrop": -1.5}, 0.75, 3))}
    assert rows["BYOL's augmentations over SimCLR's"]["mean"] == pytest.approx(2) and rows["BYOL's augmentations over SimCLR's"]["pairs"] == 4
    assert rows["multi-crop over SimCLR's augmentations"]["mean"] == pytest.approx(-1.5)
    assert rows["momentum target on"]["mean"] == pytest.approx(0.75) and rows["momentum target on"]["std"] == pytest.approx(0)
    assert rows["larger backbone: resnet18 over resnet10"]["mean"] == pytest.approx(3)
    # BYOL as it comes (momentum on) against SimCLR as it comes (momentum off): 4 + 0.75.
    assert rows["byol over simclr"]["mean"] == pytest.approx(4.75)
    assert "predictor on" not in rows                                                   # no two cells differ in it alone


def test_a_pair_with_a_missing_cell_is_left_out_not_averaged_over():
    accuracy = synthetic({"simclr": 0, "byol": 2, "multicrop": 0}, 0, 0)
    accuracy[next(key for key in accuracy if key[0].aug == "simclr")] += 1000            # an outlier that must vanish with its partner
    outlier = next(key for key in accuracy if key[0].aug == "simclr")
    del accuracy[aug_study.dataclasses.replace(outlier[0], aug="byol"), outlier[1]]
    row = next(row for row in effects(accuracy) if row["factor"].startswith("BYOL's"))
    assert row["mean"] == pytest.approx(2)


def test_a_cell_that_fails_is_named_and_a_killed_study_gives_the_same_table(tmp_path, monkeypatch):
    flags = [*TINY, "--limit", "32", "--epochs", "1", "--knn-every", "0", "--study", "--methods", "simclr,byol", "--augs", "simclr,byol", "--seeds", "0"]
    import linear_probe
    monkeypatch.setattr(linear_probe, "quick_probe", lambda *a: 12.5)

    def start(out, dies_in=None, fails_in=None):
        real = aug_study.train
        count = itertools.count()

        def train(cfg):
            n = next(count)
            if n == fails_in:
                raise common.RunError("the loss is nan")
            real(cfg)
            if n == dies_in:
                raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            patch.setattr(aug_study, "train", train)
            patch.setattr(common.fcntl, "flock", lambda *_: None)
            aug_study.study(common.parse(aug_study.Config, "", [*flags, "--out", str(out)]))

    start(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "killed", dies_in=1)
    start(tmp_path / "killed")
    # Accuracies and effects; the last column of the effects and the table behind them are speeds.
    tables = [[line.rsplit("|", 2)[0] for line in (tmp_path / name / "study.md").read_text().split("| images/s")[0].splitlines()] for name in ("whole", "killed")]
    assert tables[0] == tables[1] and any(line.startswith("| BYOL's augmentations over SimCLR's") for line in tables[0])
    start(tmp_path / "failed", fails_in=2)
    assert "Missing" in (tmp_path / "failed" / "study.md").read_text()


def test_the_file_alone_gives_its_losses(tmp_path):
    code = "from aug_study import nt_xent, vicreg_loss; import torch; print(vicreg_loss(*torch.randn(2, 4, 3)))"
    assert_works_alone("aug_study.py", code, tmp_path)


def test_switched_cells_pair_with_a_methods_own_row():
    assert states(Cell("byol", "simclr", "resnet10")) == Cell("byol", "simclr", "resnet10", "on", "on")
    assert states(Cell("simclr", "simclr", "resnet10", momentum="on")) == Cell("simclr", "simclr", "resnet10", "off", "on")
