"""What makes a step slow on a GPU, seen without one: operators launched outside the network, graph breaks, recompilation.

(Host synchronisation and device mix-ups are seen by the tests named ..._on_cuda_tensors_without_touching_the_host.)
"""
import pytest
import torch
import torch.nn.functional as F

import aug_study
import bassl
import common
import npid_distill
from bench import count_operators, npid_step

AUGMENT_LIMIT, LOSS_LIMIT, NPID_LIMIT = 150, 25, 60  # launches of a forward pass at batch 512 and 32 px; a plain augmentation needs 280


@pytest.mark.parametrize("views", ["simclr", "byol"])
def test_two_views_take_few_launches(views):
    images, augmentation = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8), aug_study.AUGMENTATIONS[views]
    first, second = (common.BatchAugment(32, **options) for options in (augmentation.first, augmentation.second))
    if views == "simclr":
        assert count_operators(lambda: first(images, views=2))[0] <= AUGMENT_LIMIT
    else:  # two kinds of views are two calls
        assert count_operators(lambda: (first(images), second(images)))[0] <= 2 * AUGMENT_LIMIT + 40


QUEUE = torch.randn(4096, 128)
LOSSES = {
    "bassl.nt_xent": lambda z1, z2: bassl.nt_xent(z1, z2, 0.2), "bassl.info_nce": lambda z1, z2: bassl.info_nce(z1, z2, QUEUE, 0.1),
    "bassl.cosine_loss": bassl.cosine_loss, "nt_xent": aug_study.nt_xent, "cosine_loss": aug_study.cosine_loss, "barlow_loss": aug_study.barlow_loss,
    "vicreg_loss": aug_study.vicreg_loss, "swav_loss": aug_study.swav_loss, "info_nce": lambda z1, z2: aug_study.info_nce(z1, z2, QUEUE),
    "dino_loss": lambda z1, z2: aug_study.dino_loss(z1, z2, torch.zeros(1, 128)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_two_views_takes_few_launches_and_compiles_whole_and_once(name):
    loss, pairs = LOSSES[name], torch.randn(3, 2, 512, 128)
    assert count_operators(lambda: loss(*pairs[0]))[0] <= LOSS_LIMIT
    assert_compiles_once(loss, [tuple(pair) for pair in pairs])


def compiled_whole(function):
    """The function compiled without a graph break, and the list of the graphs that its calls have made."""
    torch._dynamo.reset()
    graphs = []
    return torch.compile(function, fullgraph=True, backend=lambda module, _: graphs.append(module) or module.forward), graphs


def assert_compiles_once(function, arguments):
    """Without a graph break, and without another graph for the second and third step."""
    compiled, graphs = compiled_whole(function)
    for args in arguments:
        got = compiled(*args)
        if isinstance(got, torch.Tensor):
            torch.testing.assert_close(got, function(*args))
    assert len(graphs) == 1


@pytest.mark.parametrize("update", ["grad", "ema"])
def test_npids_losses_and_update_take_few_launches_and_compile_whole_and_once(update):
    bank = npid_distill.MemoryBank(20_000, 64)
    steps = [(F.normalize(torch.randn(512, 64), dim=1), torch.randperm(20_000)[:512], torch.randperm(512), torch.full((512, 2), 0.5)) for _ in range(3)]

    def whole(*step):
        loss, update_bank = npid_step(bank, update, 10_000, *step)
        update_bank()
        return loss

    assert count_operators(lambda: whole(*steps[0]))[0] <= NPID_LIMIT
    compiled, graphs = compiled_whole(whole)
    for step in steps:
        assert compiled(*step).isfinite()
    assert len(graphs) == 1


def test_augmentation_and_network_compile_whole_and_once():
    augment, images = common.BatchAugment(32), torch.randint(0, 256, (3, 16, 3, 32, 32), dtype=torch.uint8)
    uniforms = torch.rand(3, 16, common.UNIFORMS)
    assert_compiles_once(lambda x, u: augment.apply(x, u, [2, 0, 3, 1]), list(zip(images, uniforms)))
    encoder = common.resnet("resnet10", "imagenet").eval()
    assert_compiles_once(encoder, [(x,) for x in torch.randn(3, 4, 3, 32, 32)])


@pytest.mark.parametrize("name", aug_study.METHODS)
def test_the_step_of_a_method_compiles_whole_and_once(name):
    model = aug_study.Template(common.resnet("resnet10", "imagenet"), aug_study.METHODS[name])
    step, graphs = compiled_whole(lambda x: (model(x), model.keys)[0])
    for x in torch.randn(3, 8, 3, 32, 32):
        assert step(x).isfinite()
        model.after_step(0.5)
    assert len(graphs) == 1
