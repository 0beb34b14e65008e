"""What only a GPU can show. Without one these tests are skipped."""
import math
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # --deterministic wants it before CUDA starts

import pytest  # noqa: E402
import torch  # noqa: E402

import aug_study  # noqa: E402
import bassl  # noqa: E402
import common  # noqa: E402
import npid_distill  # noqa: E402
from conftest import METHODS, at_step, dies, read_log, same_run  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GPU = ["--device", "cuda"]


def losses(out):
    """The mean loss of every epoch of a run."""
    return [line["loss"] for line in read_log(out)[1:]]


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
@pytest.mark.parametrize("name", METHODS)
def test_the_first_loss_is_the_cpus_and_the_next_steps_are_finite(name, amp, train):
    """An epoch is one step here; the same seed gives the same weights, views, boxes and orders."""
    script, flags = METHODS[name]
    flags = [*flags.split(), *"--size 40 --view 40 --limit 32 --batch 32".split()]
    [want] = losses(train("cpu", *flags, "--epochs", 1, script=script))
    got = losses(train("gpu", *flags, *GPU, "--epochs", 8, "--amp", amp, script=script))
    assert got[0] == pytest.approx(want, rel=1e-3 if amp == "off" else 0.05, abs=0.02)
    assert len(got) == 8 and all(map(math.isfinite, got))


def test_views_are_those_of_the_cpu():
    images = torch.randint(0, 256, (16, 3, 40, 40), dtype=torch.uint8, generator=common.seeded(0))
    aspect = torch.linspace(0.5, 2, 16)
    augment = common.BatchAugment(32, blur_p=0.5, solarize_p=0.5)
    want = augment(images, common.seeded(1), aspect, views=2), common.center_view(images, 32, aspect)
    images, aspect = images.cuda(), aspect.cuda()
    got = augment.cuda()(images, common.seeded(1), aspect, views=2), common.center_view(images, 32, aspect)
    for theirs, ours in zip(want, got):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=2e-3)  # a tenth of a grey level


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
@pytest.mark.parametrize("script, flags", [
    (bassl, "--framework moco --queue 64"), (aug_study, "--methods dino"),
    (npid_distill, "--cutmix 0.5 --negatives 12")])
def test_dying_and_going_on_is_bit_for_bit_the_same(script, flags, amp, train):
    flags = [*GPU, *flags.split(), "--amp", amp, "--save-every", "0", "--deterministic"]
    for step in (1, 4):
        with at_step(step, dies), pytest.raises(KeyboardInterrupt):
            train("died", *flags, script=script)
    same_run(train("whole", *flags, script=script), train("died", *flags, script=script))


def test_images_that_are_read_ahead_into_pinned_memory_are_those_in_memory(train, monkeypatch):
    flags = [*GPU, "--deterministic", "--knn-every", "1"]
    near = train("near", *flags)
    monkeypatch.setattr(common, "IN_MEMORY", 0)
    same_run(near, train("far", *flags))


def test_a_compiled_backbone_is_compiled_once_and_gives_the_same_loss(train):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = losses(train("compiled", *GPU, "--compile", "--knn-every", "1"))
    assert compiled == pytest.approx(losses(train("plain", *GPU)), rel=1e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    torch._dynamo.reset()


def test_a_loss_that_is_not_finite_is_never_saved_though_no_step_waits_for_it(train, tmp_path):
    with at_step(2, lambda loss: loss * float("nan")), pytest.raises(common.RunError, match="not finite"):
        train("out", *GPU, "--save-every", "0")
    state = common.read_checkpoint(tmp_path / "out" / "checkpoint.pt")
    assert state["step"] == 2 and all(value.isfinite().all() for value in state["model"].values())
