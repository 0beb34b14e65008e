"""What a run does where the user gives no flag: the resolved values against the published ones."""
import importlib

import pytest
import torch

import aug_study
import bassl
import common
import npid_distill
from conftest import TINY, Small, parsed

# The flags and what they resolve to. `rate`: the effective one, as the source gives it at this batch.
CIFAR = dict(arch="resnet18", view=32, batch=512, epochs=200, limit=0, optimizer="sgd", warmup=0)
LIGHTLY = dict(CIFAR, rate=0.06 * 512 / 128, wd=5e-4)   # lightly's CIFAR-10 benchmark (with Adam for SwAV)
CHEN_HE = dict(LIGHTLY, rate=0.03 * 512 / 256)  # Chen & He 2021, appendix D; lightly: 0.06, not scaled
SOLO = dict(arch="resnet18", view=224, batch=256, epochs=400, limit=0, optimizer="lars", rate=0.3, wd=1e-4,
            warmup=10)                                  # solo-learn, scripts/pretrain/imagenet-100
SGD = dict(SOLO, optimizer="sgd")
QUEUE = dict(queue=65_536, temperature=0.2)
NPID = dict(CIFAR, rate=1.0, wd=1e-4, tau=0.2, bank_momentum=0.5, lambda_kl=20, power=0.5, negatives=10_000,
            dim=2048, cutmix=0.5)                       # official run.sh
IMAGENET = dict(NPID, view=224)                         # ours: no ImageNet run is in the official code
LIGHTLYS_MOCO = dict(LIGHTLY, temperature=0.1, queue=8192, momentum_end=0.99)
PUBLISHED = {
    "bassl --recipe cifar": dict(LIGHTLY, temperature=0.2),  # temperature: solo-learn's CIFAR; lightly: 0.5
    "bassl --recipe cifar --framework moco": dict(LIGHTLYS_MOCO, momentum=0.99),
    "bassl --recipe cifar --framework byol": dict(LIGHTLY, momentum=0.99, momentum_end=1),
    "bassl --recipe cifar --framework simsiam": CHEN_HE,
    "bassl --recipe imagenet": dict(SOLO, temperature=0.2),
    "bassl --recipe imagenet --framework moco": dict(SGD, **QUEUE, momentum=0.99, momentum_end=0.999),
    "bassl --recipe imagenet --framework byol": dict(SOLO, rate=0.5, wd=1e-6, momentum=0.99, momentum_end=1),
    "bassl --recipe imagenet --framework simsiam": dict(SGD, rate=0.5, wd=1e-5),
    "npid_distill --recipe cifar": NPID,
    "npid_distill --recipe imagenet": IMAGENET,
    "npid_distill --recipe imagenet --dataset imagenet1k": dict(IMAGENET, dim=128),  # Wu et al. 2018
    **{f"aug_study --recipe cifar --methods {m}": LIGHTLY for m in ("byol", "barlow", "vicreg", "dino")},
    "aug_study --recipe cifar --methods swav": LIGHTLY,  # the rate is ours
    "aug_study --recipe cifar": dict(LIGHTLY, temperature=0.2),
    "aug_study --recipe cifar --methods moco": LIGHTLYS_MOCO,
    "aug_study --recipe cifar --methods simsiam": CHEN_HE,
    "aug_study --recipe imagenet": dict(SOLO, temperature=0.2),
    "aug_study --recipe imagenet --methods moco": dict(SGD, **QUEUE, momentum_end=0.999),
    "aug_study --recipe imagenet --methods byol": dict(SOLO, rate=0.5, wd=1e-6, momentum_end=1),
    "aug_study --recipe imagenet --methods simsiam": dict(SGD, rate=0.5, wd=1e-5),
    **{f"aug_study --recipe imagenet --methods {m}": SOLO for m in ("barlow", "vicreg")},
    "aug_study --recipe imagenet --methods swav": dict(SOLO, rate=0.6, wd=1e-6),
    "aug_study --recipe imagenet --methods dino": dict(SOLO, wd=1e-6),
}


def resolved(line):
    script, *flags = line.split()
    cfg = parsed(importlib.import_module(script), *flags)
    return dict(vars(cfg), rate=cfg.lr * cfg.batch / 256)


@pytest.mark.parametrize("line", PUBLISHED)
def test_a_recipe_has_the_published_values(line):
    data = "" if "--dataset" in line else " --dataset " + ("cifar10" if "cifar" in line else "imagenet100")
    found, want = resolved(line + data), PUBLISHED[line]
    assert {name: found[name] for name in want} == pytest.approx(want) and found["view"] == want["view"]


def test_a_flag_that_is_given_beats_every_recipe():
    own = dict(batch=64, epochs=3, lr=0.25, wd=0.5, warmup=0.5, view=24, arch="resnet34", limit=7)
    flags = [word for name, value in own.items() for word in (f"--{name}", value)]
    for script in (bassl, npid_distill, aug_study):
        for recipe in ("small", "cifar", "imagenet"):
            cfg = vars(parsed(script, "--dataset", "cifar10", "--recipe", recipe, *flags))
            assert {name: cfg[name] for name in own} == own and None not in cfg.values()


def test_auto_takes_the_small_recipe_on_a_cpu_and_for_shapes_and_else_goes_by_the_pixels(monkeypatch):
    def recipe(dataset, device, *more):
        return parsed(bassl, "--dataset", dataset, "--device", device, *more).recipe

    for gpu, device in ((False, "cpu"), (True, "cpu"), (False, "auto"), (True, "auto"), (False, "cuda")):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
        fast = device == "cuda" or gpu and device == "auto"
        assert recipe("shapes", device) == "small"
        for name in ("cifar10", "cifar100", "tinyimagenet"):
            assert recipe(name, device) == ("cifar" if fast else "small")
        assert {recipe(name, device) for name in ("imagenet100", "imagenet1k", "folder")} == {"imagenet"}
        assert recipe("folder", device, "--size", 64) == "cifar"


def test_an_optimizer_without_a_rate_takes_one_that_was_made_for_it():
    adam = resolved("bassl --dataset cifar10 --recipe cifar --optimizer adamw")
    lars = resolved("bassl --dataset cifar10 --recipe cifar --optimizer lars")
    small, large = resolved("bassl --dataset cifar10 --recipe small"), resolved("bassl --dataset imagenet100")
    for name in ("lr", "wd", "warmup"):
        assert adam[name] == small[name] and lars[name] == large[name]
    assert adam["batch"] == lars["batch"] == 512 and adam["arch"] == "resnet18"
    assert resolved("bassl --dataset imagenet100 --optimizer sgd")["lr"] == 0.12
    assert resolved("npid_distill --dataset cifar10 --optimizer adamw --lr 0.002")["lr"] == 0.002


@pytest.mark.parametrize("warmup, steps", [(0, 0), (0.05, 1), (0.1, 2), (10, 2)])
def test_a_warm_up_is_never_longer_than_a_tenth_of_the_run(warmup, steps, tmp_path):
    flags = [*TINY, "--limit", 320, "--epochs", 1, "--warmup", warmup, "--out", tmp_path]
    run, model, rates = common.Run(parsed(bassl, *flags), "a"), Small(), []
    run.start(model, model)
    for _ in run.batches():
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.optimise(sum(p.sum() for p in model.parameters()) * 0)
    top = rates.index(max(rates))
    assert len(rates) == 20 and max(rates) == pytest.approx(run.lr) and top == max(0, steps - 1)
    assert rates[:top + 1] == pytest.approx([run.lr * (i + 1) / max(1, steps) for i in range(top + 1)])
    assert all(a > b for a, b in zip(rates[top + 1:], rates[top + 2:])) and rates[-1] < 0.1 * run.lr
