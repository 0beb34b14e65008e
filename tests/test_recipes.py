"""What a run does where the user gives no flag: the resolved values against the published ones."""
import importlib
import math

import pytest
import torch

import bassl
import common
from conftest import TINY, Small, parsed

# The flags and what they resolve to. `rate`: the effective one, as the source gives it at this batch.
CIFAR = dict(arch="resnet18", view=32, batch=512, epochs=200, limit=0, optimizer="sgd", warmup=0)
LIGHTLY = dict(CIFAR, rate=0.06 * 512 / 128, wd=5e-4)   # lightly's CIFAR-10 benchmark (with Adam for SwAV)
SOLO = dict(arch="resnet18", view=224, batch=256, epochs=400, limit=0, optimizer="lars", rate=0.3, wd=1e-4,
            warmup=10)                                  # solo-learn, scripts/pretrain/imagenet-100
SGD = dict(SOLO, optimizer="sgd")
NPID = dict(CIFAR, rate=1.0, wd=1e-4, tau=0.2, bank_momentum=0.5, lambda_kl=20, power=0.5, negatives=10_000,
            dim=2048, cutmix=0.5)                       # official run.sh
IMAGENET = dict(NPID, view=224)                         # ours: no ImageNet run is in the official code
BOTH = {  # of aug_study.py, and of bassl.py where it has the method
    "cifar simclr": dict(LIGHTLY, temperature=0.2),         # solo-learn's, on CIFAR too; lightly: 0.5
    "cifar moco": dict(LIGHTLY, temperature=0.1, queue=8192, momentum_end=0.99),
    "cifar byol": dict(LIGHTLY, momentum_end=1),
    "cifar simsiam": dict(LIGHTLY, rate=0.03 * 512 / 256),  # Chen & He 2021, D; lightly: 0.06, not scaled
    "cifar vicreg": dict(SOLO, view=32, epochs=200, batch=512, rate=0.6),
    **{f"cifar {name}": LIGHTLY for name in ("barlow", "dino", "swav")},  # SwAV's rate is ours
    "imagenet simclr": dict(SOLO, temperature=0.2),
    "imagenet moco": dict(SGD, temperature=0.2, queue=65_536, momentum_end=0.999),
    "imagenet byol": dict(SOLO, rate=0.5, wd=1e-6, momentum_end=1),
    "imagenet simsiam": dict(SGD, rate=0.5, wd=1e-5),
    **{f"imagenet {name}": SOLO for name in ("barlow", "vicreg")},
    "imagenet swav": dict(SOLO, rate=0.6, wd=1e-6),
    "imagenet dino": dict(SOLO, wd=1e-6),
}
PUBLISHED = {
    "npid_distill --recipe cifar": NPID,
    "npid_distill --recipe imagenet": IMAGENET,
    "npid_distill --recipe imagenet --dataset imagenet1k": dict(IMAGENET, dim=128),  # Wu et al. 2018
    **{f"aug_study --recipe {' --methods '.join(key.split())}": values for key, values in BOTH.items()},
    **{f"bassl --recipe {' --framework '.join(key.split())} --optimizer {values['optimizer']}":
       dict(values, momentum=0.99) for key, values in BOTH.items() if key.split()[1] in bassl.FRAMEWORKS},
}


def resolved(line):
    """The flags that a command line leaves to its recipe; of the set that the recipe is for."""
    script, *flags = line.split()
    dataset = "cifar10" if "cifar" in line else "imagenet100"
    cfg = parsed(importlib.import_module(script), "--dataset", dataset, "--device", "cuda", *flags)
    return dict(vars(cfg), rate=cfg.lr * cfg.batch / 256)


@pytest.mark.parametrize("line", PUBLISHED)
def test_a_recipe_has_the_published_values(line):
    found, want = resolved(line), PUBLISHED[line]
    assert {name: found[name] for name in want} == pytest.approx(want)


def test_auto_takes_the_small_recipe_on_a_cpu_and_for_shapes_and_else_goes_by_the_pixels(monkeypatch):
    def recipe(dataset, *more):
        return parsed(bassl, "--dataset", dataset, "--device", device, *more).recipe

    for gpu, device in ((False, "cpu"), (True, "cpu"), (False, "auto"), (True, "auto"), (False, "cuda")):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
        fast = device == "cuda" or gpu and device == "auto"
        assert recipe("shapes") == "small" and recipe("folder", "--size", 64) == "cifar"
        for name in ("cifar10", "cifar100", "tinyimagenet"):
            assert recipe(name) == ("cifar" if fast else "small")
        assert {recipe(name) for name in ("imagenet100", "imagenet1k", "folder")} == {"imagenet"}


@pytest.mark.parametrize("warmup, steps", [(0, 0), (0.05, 1), (0.1, 2), (10, 2)])
def test_a_warm_up_is_never_longer_than_a_tenth_of_the_run(warmup, steps, tmp_path):
    flags = [*TINY, "--limit", 320, "--epochs", 1, "--warmup", warmup, "--out", tmp_path]
    run, model, rates = common.Run(parsed(bassl, *flags), "a"), Small(), []
    run.start(model, model)
    for _ in run.batches():
        rates.append(run.optimizer.param_groups[0]["lr"] / run.lr)
    want = [(i + 1) / steps for i in range(steps)]
    want += [0.5 + 0.5 * math.cos(math.pi * i / (20 - steps)) for i in range(20 - steps)]
    assert rates == pytest.approx(want)
