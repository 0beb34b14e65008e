"""Augmentation against torchvision's own, sample by sample; backbones, LARS, checkpoints, neighbours."""
import math
import os
import random

import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from torch._subclasses.fake_tensor import FakeTensorMode

import bassl
import common
from common import BatchAugment, RunError
from conftest import TINY, Small, parsed, read_log

TINY_ERROR = 0.01 / 255  # a hundredth of a grey level
BATCH = torch.rand(6, 3, 40, 40, generator=common.seeded("batch"))
THEIRS = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]


def photos(n, height, width):
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=common.seeded("photos"))


def uniforms(n, columns=common.UNIFORMS):
    return torch.rand(n, columns, generator=common.seeded("uniforms"))


@pytest.mark.parametrize("what", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_a_colour_operation_equals_torchvision(what):
    batch = BATCH.clone()
    batch[:, :, 0] = torch.tensor([0.0, 1.0, 0.5, 1.0]).repeat(10)    # black, white and grey have no hue
    batch[:, 0, 1], batch[:, 1, 1] = 1.0, 0.0                         # an edge of the colour cube
    strength = torch.tensor([-0.5, -0.1, 0.0, 0.03, 0.4, -1.0 if what < 3 else 0.5])
    got = common.adjust(batch, what, strength[:, None, None, None])
    for i, s in enumerate(strength.tolist()):
        assert (got[i] - THEIRS[what](batch[i], s + (what < 3))).abs().max() < TINY_ERROR, s


def box_by_hand(u, height, width, aspect, scale):
    """RandomResizedCrop of a photo of height x (aspect width), in pixels of what it is squashed into."""
    tall, wide = height, aspect * width
    for share, turn in zip(u[:10].tolist(), u[10:20].tolist()):
        area = (scale[0] + share * (scale[1] - scale[0])) * tall * wide
        ratio = math.exp(math.log(3 / 4) + turn * (math.log(4 / 3) - math.log(3 / 4)))
        h, w = round(math.sqrt(area / ratio) * height / tall), round(math.sqrt(area * ratio) * width / wide)
        if 0 < h <= height and 0 < w <= width:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    h, w = min(height, round(wide * 4 / 3)), min(width, round(tall * 4 / 3 * width / wide))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("view, kernel, aspects", [(32, 3, None), (80, 9, (0.5, 0.75, 1.0, 1.5, 2.5))],
                         ids=["as they are", "squashed"])
def test_the_whole_augmentation_equals_torchvision_and_autocast_changes_nothing(view, kernel, aspects):
    """The same uniforms, read here by a loop over samples that knows nothing of batches."""
    augment = BatchAugment(view, blur_p=0.5, solarize_p=0.3)
    images, u, order = photos(40, 48, 40 if aspects is None else 48), uniforms(40), [2, 0, 3, 1]
    aspect = None if aspects is None else torch.tensor(aspects).repeat(8)
    got = augment.apply(images, u, order, aspect)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment.apply(images, u, order, aspect), got)
    got = got * augment.std[:, None, None] + augment.mean[:, None, None]
    for i in range(40):
        box = box_by_hand(u[i], *images.shape[2:], 1.0 if aspect is None else aspect[i].item(), (0.2, 1.0))
        x = TF.resized_crop(images[i].float() / 255, *box, [view, view], antialias=True)
        x = TF.horizontal_flip(x) if u[i, 22] < 0.5 else x
        if u[i, 23] < 0.8:
            for k in order:
                x = THEIRS[k](x, ((2 * u[i, 24 + k] - 1) * (0.4, 0.4, 0.4, 0.1)[k]).item() + (k < 3))
        x = TF.rgb_to_grayscale(x, 3) if u[i, 28] < 0.2 else x
        if u[i, 29] < 0.5:
            x = TF.gaussian_blur(x, [kernel, kernel], [(0.1 + 1.9 * u[i, 30]).item()] * 2)
        x = TF.solarize(x, 0.5) if u[i, 31] < 0.3 else x
        wrong = (got[i] - x).abs() > TINY_ERROR
        assert wrong.float().mean() < 1e-3, i  # within rounding of solarize's threshold either side is right


def test_augmentation_runs_on_cuda_tensors_without_touching_the_host():
    """FakeTensorMode stands in for a GPU: a CPU constant, .item() or a branch on data raises."""
    with FakeTensorMode():
        with torch.device("cuda"):
            augment, aspect = BatchAugment(32, blur_p=0.5, solarize_p=0.5), torch.ones(8)
            images, u = torch.zeros(8, 3, 40, 40, dtype=torch.uint8), torch.rand(8, common.UNIFORMS)
        for views in (augment.apply(images, u, [0, 1, 2, 3], aspect), common.center_view(images, 32, aspect)):
            assert views.device.type == "cuda" and views.shape == (8, 3, 32, 32)


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_backbones_have_torchvisions_keys_and_dim(arch):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(arch).state_dict()
        want = {key: v.shape for key, v in theirs.items() if not key.startswith("fc.")}
        for stem, side in (("imagenet", 7), ("cifar", 3)):
            model, want["conv1.weight"] = common.resnet(arch, stem), (64, 3, side, side)
            assert {key: v.shape for key, v in model.state_dict().items()} == want
            assert model(torch.zeros(2, 3, 64, 64)).shape == (2, model.dim)


def test_lars_equals_its_formula_and_is_clipped_at_the_global_rate():
    draw = common.seeded("lars")
    want = [torch.randn(shape, dtype=torch.float64, generator=draw) for shape in ((4, 3), (3,), ())]
    ours, momentum = [p.clone().requires_grad_() for p in want], [0.0, 0.0, 0.0]
    optimizer, clipped = common.LARS(ours, lr=0.0, weight_decay=0.01), []
    for lr, size in ((0.5, 1.0), (0.5, 1e-3), (0.3, 100.0), (0.3, 1e-4)):    # size of the gradient
        optimizer.param_groups[0]["lr"] = lr
        for i, p in enumerate(want):
            ours[i].grad = step = size * torch.randn(p.shape, dtype=torch.float64, generator=draw)
            if i == 0:                                                # vectors and scalars: plain SGD
                local = 0.02 * p.norm() / (step.norm() + 0.01 * p.norm())
                clipped.append(bool(local > lr))
                step = (step + 0.01 * p) * min(local.item() / lr, 1)
            momentum[i] = 0.9 * momentum[i] + step
            want[i] = p - lr * momentum[i]
        optimizer.step()
        torch.testing.assert_close([p.detach() for p in ours], want)
    assert clipped == [False, True, False, True]


def test_spectrum_knows_a_collapse():
    draw = common.seeded("spectrum")
    spread_out = common.spectrum(torch.randn(2000, 16, generator=draw))
    assert spread_out["feature_std"] > 0.95 and spread_out["effective_rank"] > 15
    assert common.spectrum(1 + 1e-7 * torch.randn(100, 16, generator=draw))["feature_std"] < 0.01
    assert common.spectrum(torch.randn(500, 1, generator=draw).expand(-1, 16))["effective_rank"] < 1.5


def test_a_damaged_checkpoint_is_never_read_as_something_else(tmp_path):
    path, draw = tmp_path / "checkpoint.pt", random.Random(0)
    for n in (1, 2):
        with common.replacing(path, keep=True) as file:
            torch.save({"x": torch.arange(3000) + n, "n": n, "log": ["one", "two"]}, file)
    state, good = common.read_checkpoint(path), path.read_bytes()
    assert state["n"] == 2 and common.read_checkpoint(path.with_suffix(".previous"))["n"] == 1
    path.unlink()  # the tensors of `state` are still mapped from it
    for n in (0, 1, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:n])
        with pytest.raises(RunError, match="checkpoint.pt is damaged"):
            common.read_checkpoint(path)
    refused = 0
    for _ in range(200):
        flipped = bytearray(good)
        flipped[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            same = common.read_checkpoint(path)  # a bit of the padding or of a time stamp
            assert same.keys() == state.keys() and same["n"] == 2 and same["log"] == ["one", "two"]
            assert torch.equal(same["x"], state["x"])
        except RunError:
            refused += 1
    assert refused > 180


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"model": Trap()}, tmp_path / "checkpoint.pt")
    with pytest.raises(RunError, match="safely"):
        common.read_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "sprung").exists()


def test_knn_equals_a_loop_over_votes():
    draw = common.seeded("knn")
    train, test = (torch.randn(n, 5, dtype=torch.float64, generator=draw) for n in (60, 40))
    labels, truth = (torch.randint(0, 4, (n,), generator=draw) for n in (60, 40))
    for k in (7, 200):
        right = 0
        for x, label in zip(test, truth.tolist()):
            cosines = [(x @ y / x.norm() / y.norm()).item() for y in train]
            votes = [0.0] * 4
            for i in sorted(range(60), key=cosines.__getitem__)[-k:]:
                votes[labels[i]] += math.exp(cosines[i] / 0.1)
            right += votes.index(max(votes)) == label
        assert common.knn(train, labels, 3 * test, truth, k=k) == pytest.approx(100 * right / 40)


def test_the_monitor_sees_training_images_alone_and_holds_its_queries_out(monkeypatch, tmp_path):
    asked, seen, load, features = [], [], common.load_images, common.features
    monkeypatch.setattr(common, "resnet", Small)
    monkeypatch.setattr(common, "load_images", lambda *args: asked.append(args[2]) or load(*args))
    monkeypatch.setattr(common, "features", lambda net, x, *rest: seen.append({*x.rows.tolist()})
                        or features(net, x, *rest))
    bassl.train(parsed(bassl, *TINY, "--epochs", 1, "--knn-every", 1, "--out", tmp_path))
    (query, bank), line = seen, read_log(tmp_path)[-1]
    assert asked == ["train"] and len(query) == 4 and len(bank) == 44 and not query & bank
    assert 0 <= line["knn_top1"] <= 100 and line["feature_std"] > 0 and line["effective_rank"] >= 1
