"""What only a GPU can show. Without one these tests are skipped."""
import json
import math
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # --deterministic wants it before CUDA starts

import pytest  # noqa: E402
import torch  # noqa: E402

import aug_study  # noqa: E402
import bassl  # noqa: E402
import common  # noqa: E402
import npid_distill  # noqa: E402
from conftest import TINY, assert_dying_changes_nothing, parsed, same_run  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GPU = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cuda")
ON_GPU = [*TINY, "--device", "cuda"]
METHODS = {
    **{name: (bassl, f"--framework {name} --queue 64") for name in ("simclr", "moco", "byol", "simsiam")},
    **{f"study {name}": (aug_study, f"--methods {name} --queue 64") for name in aug_study.METHODS},
    **{f"npid {rule}": (npid_distill, f"--update {rule} --cutmix 0.5 --negatives 0 --dim 64 --init random")
       for rule in ("grad", "ema")},
}


def losses(script, flags, out):
    """The mean loss of every epoch of a run."""
    script.train(parsed(script, *flags, "--out", out))
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()[1:]]


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
@pytest.mark.parametrize("name", METHODS)
def test_the_first_loss_is_the_cpus_and_the_next_steps_are_finite(name, amp, tmp_path):
    """An epoch is one step here; the same seed gives the same weights, views, boxes and orders."""
    script, flags = METHODS[name]
    flags = [*flags.split(), *"--size 40 --view 40 --limit 32 --batch 32".split()]
    want = losses(script, [*TINY, *flags, "--epochs", "1"], tmp_path / "cpu")
    got = losses(script, [*ON_GPU, *flags, "--epochs", "8", "--amp", amp], tmp_path / "gpu")
    assert got[0] == pytest.approx(want[0], rel=1e-3 if amp == "off" else 0.05, abs=0.02)
    assert len(got) == 8 and all(map(math.isfinite, got))


def test_views_are_those_of_the_cpu():
    images = torch.randint(0, 256, (16, 3, 40, 40), dtype=torch.uint8, generator=common.seeded(0))
    aspect = torch.linspace(0.5, 2, 16)
    augment = common.BatchAugment(32, blur_p=0.5, solarize_p=0.5)
    want = augment(images, common.seeded(1), aspect, views=2)
    got = augment.to(GPU)(images.to(GPU), common.seeded(1), aspect.to(GPU), views=2)
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=2e-3)  # a tenth of a grey level
    center = common.center_view(images.to(GPU), 32, aspect.to(GPU))
    torch.testing.assert_close(center.cpu(), common.center_view(images, 32, aspect), rtol=0, atol=2e-3)


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
@pytest.mark.parametrize("script, flags", [(bassl, ["--framework", "moco", "--queue", "64"]), (aug_study,
                         ["--methods", "dino"]), (npid_distill, ["--cutmix", "0.5", "--negatives", "12"])],
                         ids=["bassl", "aug_study", "npid_distill"])
def test_dying_and_going_on_is_bit_for_bit_the_same(script, flags, amp, tmp_path, monkeypatch):
    flags = [*ON_GPU, *flags, "--amp", amp, "--save-every", "0", "--deterministic"]
    assert_dying_changes_nothing(script, flags, [1, 4], tmp_path, monkeypatch)


def test_images_that_are_read_ahead_into_pinned_memory_are_those_in_memory(tmp_path, monkeypatch):
    flags = [*ON_GPU, "--deterministic", "--knn-every", "1"]
    bassl.train(parsed(bassl, *flags, "--out", tmp_path / "near"))
    monkeypatch.setattr(common, "IN_MEMORY", 0)
    bassl.train(parsed(bassl, *flags, "--out", tmp_path / "far"))
    torch.use_deterministic_algorithms(False)
    same_run(tmp_path / "near", tmp_path / "far")


def test_a_compiled_backbone_is_compiled_once_and_gives_the_same_loss(tmp_path):
    torch._dynamo.reset()
    plain = losses(bassl, ON_GPU, tmp_path / "plain")
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = losses(bassl, [*ON_GPU, "--compile"], tmp_path / "compiled")
    assert compiled == pytest.approx(plain, rel=1e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    torch._dynamo.reset()


def test_a_loss_that_is_not_finite_is_never_saved_though_no_step_waits_for_it(tmp_path, monkeypatch):
    def optimise(run, loss, optimise=common.Run.optimise):
        optimise(run, loss * float("nan") if run.step == 2 else loss)

    monkeypatch.setattr(common.Run, "optimise", optimise)
    with pytest.raises(common.RunError, match="not finite"):
        bassl.train(parsed(bassl, *ON_GPU, "--save-every", "0", "--out", tmp_path))
    state = common.read_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] == 2 and all(value.isfinite().all() for value in state["model"].values())
