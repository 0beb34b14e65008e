"""Augmentation against torchvision's own operators, sample by sample; data; checkpoints."""
import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image

import common
from common import BatchAugment, ImageSet, RunError, UsageError

GREY = 1 / 255
BATCH = torch.rand(6, 3, 40, 40, generator=torch.Generator().manual_seed(0))


def column(*values):
    return torch.tensor(values)[:, None, None, None]


@pytest.mark.parametrize("size", [16, 64], ids=["down", "up"])
def test_crop_resize_and_flip_equal_torchvision(size):
    top, left = torch.tensor([0, 3, 10, 39, 0, 7]), torch.tensor([0, 5, 0, 39, 20, 13])
    height, width = torch.tensor([40, 30, 7, 1, 33, 21]), torch.tensor([40, 11, 40, 1, 20, 22])
    flip = torch.tensor([False, True, False, True, True, False])
    got = common.resized_crop(BATCH, top, left, height, width, flip, size)
    for i in range(6):
        want = TF.resized_crop(BATCH[i], top[i], left[i], height[i], width[i], [size, size], antialias=True)
        want = TF.horizontal_flip(want) if flip[i] else want
        assert (got[i] - want).abs().max() < 0.01 * GREY


@pytest.mark.parametrize("ours, theirs, values", [
    (common.brightness, TF.adjust_brightness, (0.6, 0.9, 1.0, 1.2, 1.4, 0.0)),
    (common.contrast, TF.adjust_contrast, (0.6, 0.9, 1.0, 1.2, 1.4, 0.0)),
    (common.saturation, TF.adjust_saturation, (0.6, 0.9, 1.0, 1.2, 1.4, 0.0)),
    (common.hue, TF.adjust_hue, (-0.5, -0.1, 0.0, 0.03, 0.1, 0.5)),
], ids=["brightness", "contrast", "saturation", "hue"])
def test_a_colour_operation_equals_torchvision(ours, theirs, values):
    batch = BATCH.clone()
    batch[:, :, 0] = torch.tensor([0.0, 1.0, 0.5, 1.0]).repeat(10)[None, None]           # black, white and grey pixels: no hue
    batch[:, 0, 1], batch[:, 1, 1], batch[:, 2, 1] = 1.0, 0.0, torch.linspace(0, 1, 40)  # along an edge of the colour cube
    got = ours(batch, column(*values))
    for i, value in enumerate(values):
        assert (got[i] - theirs(batch[i], value)).abs().max() < 0.01 * GREY


def test_grayscale_and_solarize_equal_torchvision():
    torch.testing.assert_close(common.grayscale(BATCH), TF.rgb_to_grayscale(BATCH), atol=0.01 * GREY, rtol=0)
    on = column(*[True, False] * 3)
    got = common.solarize(BATCH, on)
    for i in range(6):
        assert torch.equal(got[i], TF.solarize(BATCH[i], 0.5) if i % 2 == 0 else BATCH[i])


@pytest.mark.parametrize("radius", [1, 4])
def test_blur_equals_torchvision(radius):
    sigma, on = torch.tensor([0.1, 0.3, 0.7, 1.0, 1.5, 2.0]), torch.tensor([True, True, False, True, True, True])
    got = common.gaussian_blur(BATCH, sigma, on, common.blur_basis(radius, 40))
    for i in range(6):
        want = TF.gaussian_blur(BATCH[i], [2 * radius + 1] * 2, [sigma[i].item()] * 2) if on[i] else BATCH[i]
        assert (got[i] - want).abs().max() < 0.01 * GREY


def test_the_whole_augmentation_equals_torchvision_operator_by_operator():
    """The same uniforms, read here by a loop over samples that knows nothing of batches."""
    augment = BatchAugment(32, blur_p=0.5, solarize_p=0.3)
    images = torch.randint(0, 256, (32, 3, 48, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    u = torch.rand(32, common.UNIFORMS, generator=torch.Generator().manual_seed(2))
    order = [2, 0, 3, 1]
    got = augment.apply(images, u, order) * augment.std + augment.mean
    boxes = torch.stack(augment.boxes(u[:, :22], 48, 40), 1).int().tolist()
    for i in range(32):
        x = TF.resized_crop(images[i].float() / 255, *boxes[i], [32, 32], antialias=True)
        x = TF.horizontal_flip(x) if u[i, 22] < 0.5 else x
        if u[i, 23] < 0.8:
            for k in order:
                s = ((2 * u[i, 24 + k] - 1) * augment.jitter[k]).item()
                x = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue][k](x, s + (k < 3))
        x = TF.rgb_to_grayscale(x, 3) if u[i, 28] < 0.2 else x
        x = TF.gaussian_blur(x, [3, 3], [(0.1 + 1.9 * u[i, 30]).item()] * 2) if u[i, 29] < 0.5 else x
        x = TF.solarize(x, 0.5) if u[i, 31] < 0.3 else x
        # A pixel within rounding of solarize's threshold may fall on either side.
        far = (got[i] - x).abs() > 0.01 * GREY
        assert far.float().mean() < 1e-3, i


def test_a_sample_alone_equals_the_same_sample_in_a_batch():
    augment = BatchAugment(32, blur_p=0.5, solarize_p=0.2)
    images, u = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.rand(8, common.UNIFORMS)
    together = augment.apply(images, u, [3, 1, 0, 2])
    for i in range(8):
        torch.testing.assert_close(augment.apply(images[i:i + 1], u[i:i + 1], [3, 1, 0, 2])[0], together[i], atol=0.01 * GREY, rtol=0)


def test_crop_boxes_have_the_asked_area_and_ratio_and_stay_inside():
    u = torch.rand(20_000, 22, generator=torch.Generator().manual_seed(0))
    top, left, h, w = BatchAugment(32, scale=(0.2, 1.0)).boxes(u, 100, 80)
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 100).all() and (left + w <= 80).all() and (h > 0).all() and (w > 0).all()
    area, ratio = h * w / 8000, w / h
    assert 0.19 < area.min() and area.max() <= 1 and 0.73 < ratio.min() and ratio.max() < 1.36
    sides = np.array([[float(v) for v in common_get_params()] for _ in range(3000)])     # torchvision's own draws
    assert abs(area.mean().item() - (sides[:, 0] * sides[:, 1]).mean() / 8000) < 0.02
    narrow = BatchAugment(32, scale=(1.0, 1.0)).boxes(u[:4], 100, 10)                    # no proposal fits: the centred fallback
    assert [v[0].item() for v in narrow] == [43, 0, 13, 10]


def common_get_params():
    from torchvision.transforms import RandomResizedCrop
    _, _, h, w = RandomResizedCrop.get_params(torch.empty(3, 100, 80), [0.2, 1.0], [3 / 4, 4 / 3])
    return h, w


def test_views_depend_on_the_generator_alone():
    augment, images = BatchAugment(32), torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    a, b, c = (augment(images, common.seeded(0, step), views=2) for step in (7, 7, 8))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(a[:4], a[4:])


def test_augmentation_runs_on_cuda_tensors_without_touching_the_host():
    """FakeTensorMode stands in for a GPU: a CPU constant among CUDA tensors, `.item()` or a data-dependent branch raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        with torch.device("cuda"):
            augment, images, uniform = BatchAugment(32, blur_p=0.5, solarize_p=0.5), torch.zeros(8, 3, 40, 40, dtype=torch.uint8), torch.rand(8, common.UNIFORMS)
        views = augment.apply(images, uniform, [0, 1, 2, 3])
        assert views.device.type == "cuda" and views.shape == (8, 3, 32, 32)


def test_shapes_are_the_same_for_the_same_seed_and_balanced():
    x, y = common.draw_shapes(200, 3)
    assert torch.equal(x, common.draw_shapes(200, 3)[0]) and not torch.equal(x, common.draw_shapes(200, 4)[0])
    assert y.bincount().tolist() == [20] * 10 and x.dtype == torch.uint8 and x.shape == (200, 3, 32, 32)


def test_backbones_have_torchvisions_keys_and_dim():
    import torchvision
    for arch in ("resnet18", "resnet34", "resnet50"):
        theirs = {k for k in torchvision.models.get_model(arch).state_dict() if not k.startswith("fc.")}
        for stem in ("cifar", "imagenet"):
            model = common.resnet(arch, stem)
            assert set(model.state_dict()) == theirs
            assert model(torch.zeros(2, 3, 64, 64)).shape == (2, model.dim)
    assert common.resnet("resnet18", "cifar").conv1.stride == (1, 1)


def test_lars_equals_its_formula_in_float64():
    w, b = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64, requires_grad=True)
    want = {"w": w.detach().clone(), "b": b.detach().clone()}
    momentum = {"w": 0.0, "b": 0.0}
    optimizer = common.LARS([w, b], lr=0.5, weight_decay=0.1)
    for _ in range(3):
        w.grad, b.grad = torch.randn_like(w), torch.randn_like(b)
        g = w.grad + 0.1 * want["w"]
        momentum["w"] = 0.9 * momentum["w"] + 0.001 * want["w"].norm() / g.norm() * g
        momentum["b"] = 0.9 * momentum["b"] + b.grad
        for name in want:
            want[name] = want[name] - 0.5 * momentum[name]
        optimizer.step()
    torch.testing.assert_close(w.detach(), want["w"])
    torch.testing.assert_close(b.detach(), want["b"])


def test_the_schedule_warms_up_to_one_and_ends_at_zero():
    values = [common.cosine(step, 100, 10) for step in range(100)]
    assert values[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert values[10] == 1 and values[55] == pytest.approx(0.5) and 0 < values[99] < 0.001
    assert all(a > b for a, b in itertools.pairwise(values[10:]))


def test_spectrum_knows_a_collapse():
    spread_out = common.spectrum(torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)))
    assert spread_out["feature_std"] > 0.95 and spread_out["effective_rank"] > 15
    point = common.spectrum(torch.ones(100, 16) + 1e-7 * torch.randn(100, 16))
    assert point["feature_std"] < 0.01
    line = common.spectrum(torch.randn(500, 1) * torch.ones(1, 16))
    assert line["effective_rank"] < 1.5


def write_png(path, seed=0, mode="RGB", size=(40, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode).save(path)


def test_a_tree_of_classes_is_read_with_the_broken_file_named(tmp_path, capsys):
    for i in range(150):
        write_png(tmp_path / "train" / "ab"[i % 2] / f"{i:03}.png", seed=i, size=(32, 32))
    (tmp_path / "train" / "a" / "broken.png").write_bytes(b"\x89PNG not really")
    (tmp_path / "train" / ".hidden").mkdir()
    images = common.load_images("folder", str(tmp_path), "train", 32)
    assert len(images) == 150 and images.classes == ["a", "b"] and images.labels.bincount().tolist() == [75, 75]
    assert torch.equal(images[0], torch.from_numpy(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).permute(2, 0, 1))
    assert "broken.png" in capsys.readouterr().err
    (tmp_path / "train" / "b" / "too.png").write_bytes(b"")
    with pytest.raises(RunError, match="2 of 152.*broken.png"):
        common.load_images("folder", str(tmp_path), "train", 32)


def test_a_folder_without_classes_is_pretrainable(tmp_path):
    for i in range(4):
        write_png(tmp_path / "own" / "deep" / f"{i}.png", seed=i)
    assert common.load_images("folder", str(tmp_path / "own" / "deep"), "train", 32).labels.tolist() == [-1] * 4


def test_workers_do_not_change_a_batch(tmp_path):
    for i in range(12):
        write_png(tmp_path / f"{i}.png", seed=i, size=(50, 70))
    tree = common.read_tree(tmp_path, 32)
    assert tree.files is not None
    order = list(torch.randperm(12, generator=common.seeded(0)).split(4))
    runs = [[x for x, _ in tree.batches(order, torch.device("cpu"), workers)] for workers in (0, 1, 2)]
    for a, b, c in zip(*runs):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_a_missing_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(UsageError, match="--data"):
        common.load_images("imagenet1k", str(tmp_path), "train", 224)
    (tmp_path / "train").mkdir()
    with pytest.raises(RunError, match="no images"):
        common.load_images("imagenet1k", str(tmp_path), "train", 224)


def test_a_damaged_checkpoint_is_never_read(tmp_path):
    path = tmp_path / "checkpoint.pt"
    common.write_checkpoint(path, {"x": torch.arange(100), "n": 1})
    common.write_checkpoint(path, {"x": torch.arange(100) + 1, "n": 2})
    assert common.read_checkpoint(path)["n"] == 2 and common.read_checkpoint(path.with_suffix(".previous"))["n"] == 1
    assert torch.load(path, weights_only=True)["n"] == 2
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for n in (0, 1, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:n])
        with pytest.raises(RunError, match="damaged"):
            common.read_checkpoint(path)
    for bit in rng.integers(0, 8 * len(good), 50):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(flipped)
        with pytest.raises(RunError, match="damaged"):
            common.read_checkpoint(path)


def test_knn_monitor_sees_training_images_only(monkeypatch):
    asked = []
    real = common.load_images
    monkeypatch.setattr(common, "load_images", lambda *a, **k: asked.append(a[2]) or real(*a, **k))
    cfg = common.parse(common.RunConfig, "", ["--limit", "40", "--batch", "8", "--device", "cpu", "--arch", "resnet10", "--size", "16"], shared=object)
    run = common.Run(cfg, "test")
    run.encoder = common.resnet("resnet10", "imagenet")
    assert 0 <= run.monitor()["knn_top1"] <= 100 and asked == ["train"]
    assert isinstance(run.images, ImageSet)
