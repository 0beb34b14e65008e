"""The study: losses against formulas, the template's invariants, effects of grids whose answer is known."""
import ast
import dataclasses
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import aug_study
import common
from aug_study import (METHODS, Cell, Template, barlow_loss, dino_loss, effects, mlp, sinkhorn,
                       swav_loss, switched, vicreg_loss)
from conftest import (ROOT, TINY, Small, assert_dying_changes_nothing, assert_works_alone, parsed, read_log,
                      run_script)
from test_bassl import assert_compiles_once


def pair(b=6, d=5):
    return torch.randn(2, b, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def functions(script, docstrings):
    """Name -> source of the functions at the top of a file, decorators included, comments not."""
    found = {}
    for node in ast.parse((ROOT / script).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name not in ("train", "name_variant"):
            node.body = node.body[0 if docstrings or not ast.get_docstring(node) else 1:]
            found[node.name] = ast.unparse(node)
    return found


def test_a_function_that_stands_in_several_files_is_the_same_in_all():
    ours, theirs = (functions(script, True) for script in ("bassl.py", "aug_study.py"))
    assert {*ours} & {*theirs} == {"in_float32", "nt_xent", "info_nce", "cosine_loss", "mlp"}
    assert all(ours[name] == theirs[name] for name in {*ours} & {*theirs})
    ours, theirs = (functions(script, False) for script in ("bassl.py", "npid_distill.py"))
    assert {*ours} & {*theirs} == {"in_float32"} and ours["in_float32"] == theirs["in_float32"]


@pytest.mark.parametrize("dim", [5, 70])  # fewer columns than rows, and more
def test_barlow_equals_its_formula(dim):
    z1, z2 = pair(64, dim)
    total = 0.0
    for i, j in itertools.product(range(dim), range(dim)):
        a, b = z1[:, i] - z1[:, i].mean(), z2[:, j] - z2[:, j].mean()
        c = ((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()).item()
        total += (1 - c) ** 2 if i == j else 0.0051 * c * c
    assert barlow_loss(z1, z2).item() == pytest.approx(total, rel=1e-4)  # it adds 1e-5 to a variance


@pytest.mark.parametrize("dim", [5, 12])
def test_vicreg_equals_its_formula(dim):
    z1, z2 = pair(8, dim)
    total = 25 * sum((a - b) ** 2 for a, b in zip(z1.flatten().tolist(), z2.flatten().tolist())) / (8 * dim)
    for z in (z1, z2):
        centred = [[x - sum(column) / 8 for x in column] for column in z.T.tolist()]
        cov = [[sum(x * y for x, y in zip(a, b)) / 7 for b in centred] for a in centred]
        total += 25 * sum(max(0, 1 - math.sqrt(cov[j][j] + 1e-4)) for j in range(dim)) / dim / 2
        total += sum(cov[i][j] ** 2 for i in range(dim) for j in range(dim) if i != j) / dim
    assert vicreg_loss(z1, z2).item() == pytest.approx(total)


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
        assert torch.autograd.grad(loss, t, allow_unused=True)[0] is None or not loss.grad_fn


def template(name, predictor="default", momentum="default", queue=64):
    torch.manual_seed(0)
    return Template(Small(), switched(name, predictor, momentum), queue=queue)


SWITCHED = [("simclr", "on", "default"), ("simclr", "default", "on"), ("barlow", "on", "on"),
            ("moco", "on", "off"), ("byol", "off", "off")]
SWITCHED += [(name, "default", "default") for name in METHODS]


@pytest.mark.parametrize("name, predictor, momentum", SWITCHED)
def test_the_loss_is_the_mean_over_all_pairs_of_a_view_and_a_global_one(name, predictor, momentum):
    model = template(name, predictor, momentum)
    views, local = torch.randn(16, 3, 9, 9), torch.randn(16, 3, 6, 6)  # of eight images
    z = model.projector(model.encoder(views))
    online = model.predictor(z).split(8) + model.predictor(model.projector(model.encoder(local))).split(8)
    target = z if model.method.target_gradient else z.detach()
    target = model.target(views) if model.method.momentum else target
    memory = model.queue if model.method.queue else model.center
    losses = [model.method.loss(online[v], target.split(8)[g], memory, 0.2)
              for g in range(2) for v in range(4) if v != g]
    got, want = model(views, local), sum(losses) / 6
    torch.testing.assert_close(got, want)
    learning = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss, learning) for loss in (got, want)]  # raises where one has no part
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert all(p.requires_grad != key.startswith("target.") for key, p in model.named_parameters())


def test_switches_without_meaning_are_refused_with_the_reason():
    for flags in (("simsiam", "off", "default"), ("dino", "default", "off"), ("swav", "on", "default")):
        with pytest.raises(ValueError, match="collapses|no published form"):
            switched(*flags)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_runs_on_cuda_tensors_and_compiles_whole_and_once(name, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode
    method, make = METHODS[name], lambda: Template(Small(), METHODS[name], queue=64)
    model = make().eval()                                              # two calls have the same statistics
    assert_compiles_once(model, [(x, x) for x in torch.randn(3, 8, 3, 8, 8)])
    widths = [16, *method.projector]

    def copied(_):                                                     # fake tensors cannot be copied
        head = mlp(widths, method.last_norm)
        return nn.Sequential(Small(), head.append(aug_study.Prototypes(widths[-1], method.prototypes))
                             if method.prototypes else head)
    monkeypatch.setattr("copy.deepcopy", copied)
    with FakeTensorMode():
        with torch.device("cuda"):
            model, x = make(), torch.randn(8, 3, 8, 8)
        loss = model(x, x)
        model.after_step(0.5)
        assert loss.device.type == "cuda" and loss.dtype == torch.float32


def test_views_of_up_to_64_pixels_are_not_blurred_and_byols_two_above_differ():
    for size, want in ((64, [0, 0, 0]), (65, [1, 0.1])):
        assert [view.blur_p for view in aug_study.make_augments("byol", size, 64)][:len(want)] == want


class Narrow(nn.Sequential):
    """Stands in for a ResNet: sixty steps of a method take a second."""
    dim = 64

    def __init__(self, *_):
        layers = [(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in ((3, 32), (32, 64))]
        super().__init__(*itertools.chain(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("name", [*METHODS, "alignment"])
def test_no_method_collapses_in_sixty_steps(name, tmp_path, monkeypatch):
    """The effective rank tells a method that holds its features apart from the pull of two views alone."""
    alignment = dataclasses.replace(METHODS["simclr"], loss=lambda z, t, *_: (z - t).square().sum(1).mean())
    monkeypatch.setitem(METHODS, "alignment", alignment)
    monkeypatch.setattr(common, "resnet", Narrow)
    monkeypatch.setattr(aug_study, "mlp", lambda widths, *norm: mlp([min(w, 256) for w in widths], *norm))
    flags = "--limit 640 --batch 64 --epochs 6 --knn-every 6 --optimizer adamw --lr 0.008 --augs simclr --out"
    cfg = parsed(aug_study, *TINY, *flags.split(), tmp_path)
    cfg.methods = name
    aug_study.train(cfg)
    rank = read_log(tmp_path)[-1]["effective_rank"]  # 16 to 28, and 9 to 10, over four seeds
    assert (rank > 13) == (name != "alignment"), rank


@pytest.mark.parametrize("name", ["moco", "dino"])
def test_a_run_that_dies_after_any_step_ends_as_if_it_had_not(name, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "resnet", Small)
    flags = [*TINY, "--methods", name, "--save-every", 0, "--deterministic"]
    assert_dying_changes_nothing(aug_study, flags, (1, 3), tmp_path, monkeypatch)


def grid(byol=2.0, multicrop=-1.5, momentum=0.75, arch=3.0):
    """A grid whose accuracies are sums of known effects, with an offset of each seed's own."""
    accuracy, augs = {}, {"simclr": 0, "byol": byol, "multicrop": multicrop}
    factors = (0, 1), ("simclr", "byol"), augs, ("off", "on"), ("resnet10", "resnet18")
    for seed, method, aug, target, network in itertools.product(*factors):
        cell = Cell(method, aug, network, "on" if method == "byol" else "off", target)
        value = 50 + seed + augs[aug] + momentum * (target == "on") + arch * (network == "resnet18")
        accuracy[cell, seed] = value + 4 * (method == "byol")
    return accuracy


def test_effects_of_a_grid_with_known_effects_come_out_exact():
    rows = {row["factor"]: row for row in effects(grid())}
    want = {"BYOL's augmentations over SimCLR's": 2, "multi-crop over SimCLR's augmentations": -1.5,
            "momentum target on": 0.75, "larger backbone: resnet18 over resnet10": 3,
            "byol over simclr": 4.75}  # as they come: one has a momentum target
    assert rows.keys() == want.keys()                                  # none differ in the predictor alone
    for factor, effect in want.items():
        assert rows[factor]["per_seed"] == pytest.approx([effect, effect])
    assert [rows[factor]["pairs"] for factor in want] == [8, 8, 12, 12, 6]


def test_a_pair_with_a_missing_cell_is_left_out_not_averaged_over():
    accuracy = grid()
    outlier, seed = next(key for key in accuracy if key[0].aug == "simclr")
    accuracy[outlier, seed] += 1000                                    # must vanish with its partner
    del accuracy[dataclasses.replace(outlier, aug="byol"), seed]
    row = next(row for row in effects(accuracy) if row["factor"].startswith("BYOL's"))
    assert row["per_seed"] == pytest.approx([2, 2])


def test_the_effects_of_a_file_of_rows_are_a_table_and_of_another_file_an_error_of_one_line(tmp_path, capsys):
    study, runs = tmp_path / "study.jsonl", [("", 0, 60), ("", 1, 62), ("byol", 0, 63), ("byol", 1, 64.0)]
    rows = [{"config": vars(parsed(aug_study, *TINY, "--augs", augs)), "seed": seed, "probe_top1": value,
             "fraction": 1.0, "split": "test"} for augs, seed, value in runs]
    study.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, err = run_script(ROOT / "aug_study.py", "--effects", study, cwd=tmp_path)
    assert (status, err) == (0, "")
    assert "| BYOL's augmentations over SimCLR's | +2.50 ± 0.71 | 1 x 2 | +2.3 |" in out.splitlines()
    for text in ("words", '{"seed": 0}', json.dumps(rows[0] | {"config": {"framework": "simclr"}})):
        study.write_text(f"{text}\n")
        with pytest.raises(SystemExit) as end, common.one_line_errors():
            aug_study.print_effects(str(study))
        out, err = capsys.readouterr()
        assert end.value.code == 2 and out == "" and err.count("\n") == 1 and str(study) in err


def test_a_switched_run_pairs_with_a_methods_own_row():
    own = {"methods": "byol", "augs": "", "arch": "resnet10", "predictor": "default", "momentum": "default"}
    cell = Cell("byol", "byol", "resnet10", "on", "on")
    assert cell == aug_study.cell_of(own) == aug_study.cell_of(own | {"augs": "byol", "momentum": "on"})
    assert dataclasses.replace(cell, momentum="off") == aug_study.cell_of(own | {"momentum": "off"})


def test_the_file_alone_gives_its_losses(tmp_path):
    code = "from aug_study import nt_xent, vicreg_loss; import torch; vicreg_loss(*torch.randn(2, 4, 3))"
    assert_works_alone("aug_study.py", code, tmp_path)
