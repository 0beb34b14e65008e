"""Augmentation against torchvision's own, sample by sample; LARS, neighbours, the monitor."""
import math

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torch._subclasses.fake_tensor import FakeTensorMode

import common
from common import BatchAugment
from conftest import read_log

THEIRS = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]


def box_by_hand(u, height, width, aspect):
    """RandomResizedCrop of a photo of height x (aspect width), in pixels of what it is squashed into."""
    tall, wide = height, aspect * width
    for share, turn in zip(u[:10].tolist(), u[10:20].tolist()):
        area = (0.2 + share * 0.8) * tall * wide
        ratio = math.exp(math.log(3 / 4) + turn * (math.log(4 / 3) - math.log(3 / 4)))
        h, w = round(math.sqrt(area / ratio) * height / tall), round(math.sqrt(area * ratio) * width / wide)
        if 0 < h <= height and 0 < w <= width:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    h, w = min(height, round(wide * 4 / 3)), min(width, round(tall * 4 / 3 * width / wide))
    return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w  # torchvision: at the centre


@pytest.mark.parametrize("view, kernel, aspects", [(32, 3, None), (80, 9, (0.125, 0.5, 1.0, 2.5, 8.0))],
                         ids=["as they are", "squashed"])
def test_the_whole_augmentation_equals_torchvision_and_autocast_changes_nothing(view, kernel, aspects):
    """The same uniforms, read here by a loop over samples that knows nothing of batches."""
    augment, order = BatchAugment(view, blur_p=0.5, solarize_p=0.3), [2, 0, 3, 1]
    draw, width = common.seeded("photos"), 48 if aspects else 40
    images = torch.randint(0, 256, (40, 3, 48, width), dtype=torch.uint8, generator=draw)
    images[..., :16] = images[:, :1, :, :16]                          # grey, black and white have no hue
    images[:, :, :8, :16], images[:, :, 40:, :16] = 0, 255
    images[:, :2, :, 32:] = torch.tensor([255, 0])[:, None, None]     # an edge of the colour cube
    u = torch.rand(40, common.UNIFORMS, generator=draw)
    aspect = torch.tensor(aspects).repeat(8) if aspects else None
    got = augment.augment_with(images, u, order, aspect)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment.augment_with(images, u, order, aspect), got)
    got = got * torch.tensor(common.STD)[:, None, None] + torch.tensor(common.MEAN)[:, None, None]
    for i in range(40):
        box = box_by_hand(u[i], *images.shape[2:], aspects[i % 5] if aspects else 1.0)
        x = TF.resized_crop(images[i].float() / 255, *box, [view, view], antialias=True)
        x = TF.horizontal_flip(x) if u[i, 22] < 0.5 else x
        if u[i, 23] < 0.8:
            for k in order:
                x = THEIRS[k](x, ((2 * u[i, 24 + k] - 1) * (0.4, 0.4, 0.4, 0.1)[k]).item() + (k < 3))
        x = TF.rgb_to_grayscale(x, 3) if u[i, 28] < 0.2 else x
        if u[i, 29] < 0.5:
            x = TF.gaussian_blur(x, [kernel, kernel], [(0.1 + 1.9 * u[i, 30]).item()] * 2)
        x = TF.solarize(x, 0.5) if u[i, 31] < 0.3 else x
        right = (got[i] - x).abs() < 0.01 / 255  # a hundredth of a grey level
        assert right.float().mean() > 0.999, i  # within rounding of solarize's threshold either side is right


def test_augmentation_runs_on_cuda_tensors_without_touching_the_host():
    """FakeTensorMode stands in for a GPU: a CPU constant, .item() or a branch on data raises."""
    with FakeTensorMode():
        with torch.device("cuda"):
            augment, aspect = BatchAugment(32, blur_p=0.5, solarize_p=0.5), torch.ones(8)
            images, u = torch.zeros(8, 3, 40, 40, dtype=torch.uint8), torch.rand(8, common.UNIFORMS)
        for views in (augment.augment_with(images, u, [0, 1, 2, 3], aspect),
                      common.center_view(images, 32, aspect)):
            assert views.device.type == "cuda" and views.shape == (8, 3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("kernel, stride, padding", [(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1), (7, 2, 3)])
def test_a_convolution_of_few_pixels_equals_float64_with_both_gradients(kernel, stride, padding, dtype):
    """On a CPU they are computed by matmul where that is faster; the library's own gradient into the weights
    of a strided convolution of one pixel is wrong in bf16."""
    draw, close = common.seeded("convolution"), 1e-2 if dtype == torch.bfloat16 else 1e-5
    for height, width, filters in [*((n, n, 8) for n in range(1, 6)), (1, 3, 8), (4, 2, 8), (3, 4, 4096)]:
        conv = torch.nn.Conv2d(16, filters, kernel, stride, padding, bias=False)
        conv.__class__ = common.Conv2d
        x = torch.randn(6, 16, height, width, generator=draw).to(dtype)
        exact_x, exact_weight = (t.detach().to(dtype).double().requires_grad_() for t in (x, conv.weight))
        want = torch.nn.functional.conv2d(exact_x, exact_weight, None, stride, padding)
        grad = torch.randn(want.shape, generator=draw).to(dtype)
        x.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            got = conv(x)
        for ours, exact in zip((got, *torch.autograd.grad(got, (x, conv.weight), grad)),
                               (want, *torch.autograd.grad(want, (exact_x, exact_weight), grad.double()))):
            scale = exact.detach().abs().max().item()
            torch.testing.assert_close(ours.double(), exact, rtol=close, atol=close * scale)


def test_a_model_that_holds_an_augmentation_can_be_walked():
    seen = []
    torch.nn.Sequential(BatchAugment(8), torch.nn.Linear(2, 2)).apply(seen.append)
    assert len(seen) == 3


def test_lars_is_sgd_on_a_scaled_gradient_and_is_clipped_at_the_global_rate():
    draw, clipped = common.seeded("lars"), []
    ours = [torch.randn(shape, dtype=torch.float64, generator=draw) for shape in ((4, 3), (3,), ())]
    theirs = [p.clone() for p in ours]
    lars, sgd = common.LARS(ours, lr=0.0, weight_decay=0.01), torch.optim.SGD(theirs, lr=0.0, momentum=0.9)
    for lr, size in ((0.5, 1.0), (0.5, 1e-3), (0.3, 100.0), (0.3, 1e-4)):  # size of the gradient
        lars.param_groups[0]["lr"] = sgd.param_groups[0]["lr"] = lr
        for p, q in zip(ours, theirs):
            p.grad = q.grad = size * torch.randn(p.shape, dtype=torch.float64, generator=draw)
        weight, step = theirs[0], theirs[0].grad                       # vectors and scalars: plain SGD
        local = 0.02 * weight.norm() / (step.norm() + 0.01 * weight.norm())
        clipped.append(bool(local > lr))
        weight.grad = (step + 0.01 * weight) * min(local.item() / lr, 1)
        lars.step(), sgd.step()
        torch.testing.assert_close(ours, theirs)
    assert clipped == [False, True, False, True]


@pytest.mark.parametrize("k, temperature", [(7, 0.1), (200, 0.1), (10, math.inf)])
def test_knn_equals_a_loop_over_votes_and_of_equal_classes_takes_the_lowest(k, temperature):
    draw = common.seeded("knn")
    train, test = (torch.randn(n, 5, dtype=torch.float64, generator=draw) for n in (60, 200))
    labels, truth = (torch.randint(0, 4, (n,), generator=draw) for n in (60, 200))
    right = ties = 0
    for x, label in zip(test, truth.tolist()):
        cosines = [(x @ y / x.norm() / y.norm()).item() for y in train]
        votes = [0.0] * 4
        for i in sorted(range(60), key=cosines.__getitem__)[-k:]:
            votes[labels[i]] += math.exp(cosines[i] / temperature)
        ties += votes.count(max(votes)) > 1
        right += votes.index(max(votes)) == label
    assert common.knn(train, labels, 3 * test, truth, k, temperature) == pytest.approx(right / 2)
    assert ties > 20 or temperature < math.inf


def test_spectrum_knows_a_collapse():
    draw = common.seeded("spectrum")
    spread_out = common.spectrum(torch.randn(2000, 16, generator=draw))
    assert spread_out["feature_std"] > 0.95 and spread_out["effective_rank"] > 15
    assert common.spectrum(1 + 1e-7 * torch.randn(100, 16, generator=draw))["feature_std"] < 0.01
    assert common.spectrum(torch.randn(500, 1, generator=draw).expand(-1, 16))["effective_rank"] < 1.5


def test_the_monitor_sees_training_images_alone_and_holds_its_queries_out(small, train, monkeypatch):
    asked, seen, load, features = [], [], common.load_images, common.features
    monkeypatch.setattr(common, "load_images", lambda *args: asked.append(args[2]) or load(*args))
    monkeypatch.setattr(common, "features", lambda net, x, *rest: seen.append({*x.rows.tolist()})
                        or features(net, x, *rest))
    line = read_log(train("out", "--epochs", 1, "--knn-every", 1, "--limit", 208))[-1]
    query, bank = seen
    assert asked == ["train"] and len(query) == 20 and len(bank) == 188 and not query & bank
    assert 0 <= line["knn_top1"] <= 100 and line["feature_std"] > 0 and line["effective_rank"] >= 1
    few = read_log(train("few", "--epochs", 1, "--knn-every", 1))[-1]  # four queries tell of no collapse
    assert "knn_top1" in few and "feature_std" not in few
