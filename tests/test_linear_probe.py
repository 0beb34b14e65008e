"""The probe: protocols against independent computations, backbones that do not fit, and the row."""
import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
from fractions import Fraction

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import aug_study
import bassl
import common
import linear_probe
import npid_distill
import tables
from common import UsageError
from conftest import ROOT, saved


def probe(*flags):
    return linear_probe.probe(common.parse(linear_probe.Config, "", [*map(str, flags)]))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture
def few(monkeypatch):
    """Sets of 60 images, so that a probe takes no time; the list of the splits that were asked for."""
    asked, load = [], common.load_images

    def images(*args, split, **options):
        asked.append(split)
        return load(*args, split=split, **options, limit=60)

    monkeypatch.setattr(common, "load_images", images)
    return asked


@pytest.fixture
def backbone(pretrained, tmp_path):
    """A run's backbone and log, in a folder of the test's own."""
    shutil.copytree(pretrained, tmp_path / "run")
    return tmp_path / "run" / "backbone.pt"


def test_the_quick_probe_separates_what_is_separable_guesses_noise_and_standardises_in_place():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 3
    x = 7 + 5 * (torch.randn(600, 20, generator=generator) + 6 * torch.eye(3, 20)[y])
    train, test = x[:400], x[400:].clone()
    assert linear_probe.quick_probe(train, y[:400], test, y[400:], 3) > 98
    torch.testing.assert_close(train.mean(0), torch.zeros(20), atol=1e-4, rtol=0)  # no copy was made
    torch.testing.assert_close(train.std(0), torch.ones(20))
    noise = torch.randn(600, 20, generator=generator)
    assert linear_probe.quick_probe(noise[:400], y[:400], noise[400:], y[400:], 3) < 50


def test_the_logistic_fit_is_at_a_stationary_point_of_its_objective_whatever_the_blocks():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 5, generator=generator), torch.randint(0, 3, (200,), generator=generator)
    for block in (200, 64, 7):
        head = linear_probe.fit_logistic(x, y, 3, 0.1, block)
        p = (x @ head.weight.T + head.bias).softmax(1).detach()
        gradient = (p - torch.eye(3)[y]).T @ x / 200 + 0.1 * head.weight  # by hand, without autograd
        assert gradient.abs().max() < 1e-4 and (p - torch.eye(3)[y]).mean(0).abs().max() < 1e-4


@pytest.mark.parametrize("scale", [0.03, 1.0, 30.0])
def test_the_sgd_probe_fits_features_of_any_scale(scale):
    """At one rate a bare linear layer stays at its start where features are small, and leaps where large."""
    class MeanColour(torch.nn.Module):
        dim = 3

        def forward(self, x):
            return scale * x.mean((2, 3))

    labels = torch.arange(640) % 4
    colours = torch.randint(60, 200, (4, 3), generator=torch.Generator().manual_seed(0))
    noise = torch.randint(-20, 20, (640, 3), generator=torch.Generator().manual_seed(1))
    pixels = (colours[labels] + noise)[:, :, None, None].expand(-1, -1, 8, 8).to(torch.uint8).contiguous()
    images = common.ImageSet(pixels, labels, list("abcd"))
    cfg = linear_probe.Config(epochs=5, batch=64, size=8, seed=0)
    assert linear_probe.sgd_probe(MeanColour(), images, images, cfg, torch.device("cpu")) > 95


def test_a_label_fraction_keeps_every_class():
    pixels, labels = torch.zeros(1000, 3, 2, 2, dtype=torch.uint8), torch.arange(1000) % 10
    images = common.ImageSet(pixels, labels, list("abcdefghij"))
    for fraction, each in ((0.1, 10), (0.0001, 1)):
        assert linear_probe.label_fraction(images, fraction, 0).labels.bincount().tolist() == [each] * 10
    first, again, other = (linear_probe.label_fraction(images, 0.1, seed).rows for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_wrong_backbones_are_refused_by_name(backbone):
    state = torch.load(backbone, weights_only=True)
    lacks = {key: value for key, value in state.items() if key != "layer3.0.bn1.running_var"}
    deeper = state | {f"layer4.1.{key.removeprefix('layer4.0.')}": value for key, value in state.items()
                      if key.startswith("layer4.0.")}
    two = {f"{name}.{key}": value for key, value in state.items() for name in ("left", "right")}
    for held, options, words in [
        (state, dict(arch="resnet18"), "arch resnet10, not resnet18"),
        (state, dict(stem="cifar"), "stem imagenet, not cifar"), ([1], {}, "holds a list"),
        ({"net": {"0.weight": torch.ones(3)}}, {}, "holds no ResNet.*net.0.weight"),
        (lacks, {}, "Missing key.*layer3.0.bn1.running_var"),
        (deeper, {}, r"a ResNet of \(1, 1, 1, 2\) blocks"),
        (state | {"layer1.0.se.weight": torch.ones(3)}, {}, "Unexpected key.*layer1.0.se.weight"),
        (state | {"layer2.0.bn1.bias": torch.ones(3)}, {}, "size mismatch for layer2.0.bn1.bias"),
        (two, {}, "several ResNets.*left., right"),
        (state | {"loss": Fraction(1)}, {}, "holds a fractions.Fraction"),
    ]:
        torch.save(held, backbone)
        with pytest.raises((UsageError, common.RunError), match=words):
            linear_probe.load_backbone(str(backbone), **options)
    with pytest.raises(UsageError, match="safetensors; convert it"):
        linear_probe.load_backbone(str(backbone.rename(backbone.with_suffix(".safetensors"))))


@pytest.mark.parametrize("wrap, said", [
    (lambda s: s, "resnet10, imagenet stem"),
    (lambda s: s | {"arch": "resnet10", "stem": "imagenet"}, "resnet10, imagenet stem"),
    (lambda s: {"state_dict": {f"module.encoder_{n}.{k}": v * (n == "q")
                               for n in "kq" for k, v in s.items()}},
     "from 'state_dict.module.encoder_q.'; not read: 'state_dict.module.encoder_k.'"),
    (lambda s: {"model": {f"{n}.{k}": v * (n == "base_encoder") for n in ("momentum_encoder", "base_encoder")
                          for k, v in s.items()} | {"base_encoder.fc.0.weight": torch.ones(3)}, "epoch": 3},
     "from 'model.base_encoder.', without fc; not read: 'model.momentum_encoder.'"),
    (lambda s: {n: {f"module.backbone.{k}": v * (n == "teacher") for k, v in s.items()}
                for n in ("student", "teacher")},
     "from 'teacher.module.backbone.'; not read: 'student.module.backbone.'"),
    (lambda s: {f"{n}.{k}": v * (n == "backbone") for n in ("backbone", "momentum_backbone")
                for k, v in s.items()} | {"projector.0.weight": torch.ones(3)},
     "from 'backbone.'; not read: 'momentum_backbone.'"),
    (lambda s: {"net": {k: v for k, v in s.items() if "tracked" not in k}, "args": argparse.Namespace(lr=1)},
     "from 'net.'"),
    (lambda s: s | {"projection_head.weight": torch.ones(3), "fc.bias": torch.ones(3)},
     "without fc, projection_head"),
], ids=["ours", "of before", "MoCo", "MoCo v3", "DINO", "solo-learn", "old, with args", "heads"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_what_the_field_saves_is_read_and_said(wrap, said, zipped, backbone, tmp_path, capsys):
    state = torch.load(backbone, weights_only=True)
    torch.save(wrap(state), tmp_path / "theirs.pth", _use_new_zipfile_serialization=zipped)
    encoder, *kind = linear_probe.load_backbone(str(tmp_path / "theirs.pth"))
    assert kind == ["resnet10", "imagenet"] and said in capsys.readouterr().out
    got = encoder.state_dict()
    assert all(torch.equal(got[key], value) for key, value in state.items() if "tracked" not in key)


@pytest.mark.parametrize("script, flags", [(bassl, "--framework byol"), (npid_distill, "--dim 16"),
                                           (aug_study, "--methods dino --augs simclr")])
def test_a_warm_start_begins_with_the_files_weights_and_a_resume_does_not_ask_for_the_file(
        script, flags, backbone, train, tmp_path, monkeypatch):
    weights, begun = shutil.copy(backbone, tmp_path / "w.pth"), []
    optimise = common.Run.optimise
    monkeypatch.setattr(common.Run, "optimise", lambda run, loss: begun.append(
        {key: value.clone() for key, value in run.model.state_dict().items()}) or optimise(run, loss))
    flags = [*flags.split(), "--lr", 0, "--weights", weights]
    with pytest.raises(SystemExit):
        train("out", *flags, "--minutes", 1e-9, script=script)
    state = torch.load(backbone, weights_only=True)
    for prefix in {key.removesuffix("conv1.weight") for key in begun[0] if key.endswith("conv1.weight")
                   and "layer" not in key}:                          # the encoder's, and a target's
        assert torch.equal(begun[0][f"{prefix}layer4.0.conv2.weight"], state["layer4.0.conv2.weight"]), prefix
    header = common.read_log(tmp_path / "out" / "log.jsonl")[0]
    digest = hashlib.sha256(backbone.read_bytes()).hexdigest()[:16]
    assert (header["arch"], header["config"]["weights"], header["weights_digest"]) == (
        "resnet10", str(weights), digest)
    (tmp_path / "w.pth").unlink()
    out = train("out", *flags, script=script)
    assert probe("--backbone", out / "backbone.pt", "--no-quick")["weights_digest"] == digest
    shutil.copy(backbone, weights)
    with pytest.raises(UsageError, match="arch resnet10, not resnet18"):
        train("other", *flags, "--arch", "resnet18", script=script)
    with pytest.raises(UsageError, match=r"epochs \(2, not 5\).*--weights .*out/backbone.pt to begin there"):
        train("out", *flags, "--epochs", 5, script=script)


@pytest.mark.parametrize("classes, splits", [(["a", "b"], ("train", "test")), ([""], ("train",))])
def test_embeddings_of_a_folder_are_arrays_with_the_files_names_and_no_row(
        classes, splits, backbone, tmp_path, capsys):
    root = tmp_path / "set"
    for split in splits:
        for name in classes:
            for i in range(3):
                saved(Image.new("RGB", (16, 16), (60 * i, 9, 9)), root / split / name / f"{i}.png")
    where = ["--dataset", "folder", "--data", root, "--cache", tmp_path / "cache", "--size", 16]
    probe("--backbone", backbone, *where, "--features", tmp_path / "f.npz")
    arrays = np.load(tmp_path / "f.npz")
    assert {name.split("_")[0] for name in arrays} - {"classes"} == {*splits}
    assert arrays["classes"].tolist() == [name for name in classes if name]
    for split in splits:
        names = arrays[f"{split}_files"].tolist()
        assert names == [f"{name}/{i}.png".removeprefix("/") for name in classes for i in range(3)]
        labels = [classes.index(file.split("/")[0]) if "/" in file else -1 for file in names]
        assert arrays[f"{split}_labels"].tolist() == labels
        assert arrays[f"{split}_features"].shape == (len(names), 512)
    assert not backbone.with_name("results.jsonl").exists()
    if len(splits) == 2:                                             # other classes in the test split
        (root / "test" / "a").rename(root / "test" / "z")
        probe("--backbone", backbone, *where, "--features", tmp_path / "f.npz")
        arrays = np.load(tmp_path / "f.npz")
        assert arrays["classes"].tolist() == ["a", "b", "z"]
        assert arrays["test_labels"].tolist() == [1, 1, 1, 2, 2, 2] and arrays["train_labels"].max() == 1
    with pytest.raises(UsageError, match="give --dataset too"):
        probe("--backbone", shutil.copy(backbone, tmp_path / "b.pt"), "--data", root)


def test_a_network_with_the_cifar_stem_is_probed_at_the_size_it_was_trained_for():
    for trained, stem, dataset, want in ((32, "cifar", "folder", 32), (32, "imagenet", "folder", 224),
                                         (48, "cifar", "tinyimagenet", 48), (48, "imagenet", "shapes", 48),
                                         (None, "cifar", "folder", 32)):  # without a log
        cfg = common.parse(linear_probe.Config, "", ["--dataset", dataset])
        log = [{"size": trained, "config": {"dataset": "shapes"}}] if trained else []
        linear_probe.fill_in_size(cfg, log, stem)
        assert cfg.size == want


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_torchvisions_own_state_dict_is_read_without_its_classifier_and_ours_goes_back(arch, tmp_path):
    model = torchvision.models.get_model(arch)
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    encoder, *kind = linear_probe.load_backbone(str(tmp_path / "theirs.pth"), arch)
    state = encoder.state_dict()
    assert model.load_state_dict(state, strict=False) == (["fc.weight", "fc.bias"], [])
    if importlib.util.find_spec("timm"):
        importlib.import_module("timm").create_model(arch, num_classes=0).load_state_dict(state)
    model.fc, x = torch.nn.Identity(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    want = model.double().eval()(x)
    torch.testing.assert_close(encoder.double().eval()(x), want)
    assert kind == [arch, "imagenet"] and encoder.dim == want.shape[1]
    assert common.resnet(arch, "cifar").conv1.weight.shape == (64, 3, 3, 3)


def test_a_backbone_is_a_whole_command_and_a_second_call_does_nothing(backbone, few, monkeypatch, capsys):
    row = probe("--backbone", backbone)
    assert "no linear_top1" in capsys.readouterr().out and rows_of(backbone.parent) == [row]
    want = dict(dataset="shapes", method="bassl", arch="resnet10", stem="imagenet", size=16, seed=3)
    want |= dict(probe_seed=3, epochs=1, batch=16, images=48, fraction=1.0, split="test", recipe="small")
    assert {key: row[key] for key in want} == want and "linear_top1" not in row
    assert all(0 <= row[name] <= 100 for name in ("knn_top1", "knn20_top1", "probe_top1"))
    head = subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, text=True).strip()
    assert row["sha"].removesuffix("-dirty") == row["probe_sha"].removesuffix("-dirty") == head
    monkeypatch.setattr(linear_probe, "features", None)
    assert probe("--backbone", backbone) == row and "nothing left to do" in capsys.readouterr().out


def test_a_probe_that_dies_is_completed_and_one_of_more_protocols_takes_its_rows_place(
        backbone, few, monkeypatch):
    """Else a table would count one backbone as two seeds."""
    with monkeypatch.context() as patch:
        patch.setattr(linear_probe, "knn", lambda *args: 1 / 0 if 20 in args[4:] else common.knn(*args))
        with pytest.raises(ZeroDivisionError):
            probe("--backbone", backbone, "--no-quick")
    [half] = rows_of(backbone.parent)
    assert "knn_top1" in half and "knn20_top1" not in half
    row = probe("--backbone", backbone, "--no-quick")
    assert rows_of(backbone.parent) == [row] and row["knn_top1"] == half["knn_top1"] and "knn20_top1" in row
    row = probe("--backbone", backbone, "--no-quick", "--epochs", 1)
    assert rows_of(backbone.parent) == [row] and row["linear_epochs"] == 1 and "linear_top1" in row
    longer = probe("--backbone", backbone, "--no-quick", "--epochs", 2)
    both = probe("--backbone", backbone, "--epochs", 0)
    assert rows_of(backbone.parent) == [longer, both] and both["linear_top1"] == row["linear_top1"]
    assert "probe_top1" in both and both["linear_epochs"] == 1
    probe("--backbone", backbone, "--no-quick", "--epochs", 1, "--lr", 0.3)
    assert len(rows_of(backbone.parent)) == 3, "another rate is another probe"
    probe("--backbone", backbone, "--no-quick", "--fraction", 0.5)
    assert len(rows_of(backbone.parent)) == 4


def test_an_untrained_network_like_a_files_has_its_arch_stem_size_set_and_seed_alone(backbone, few, tmp_path):
    row = probe("--random", "--backbone", backbone, "--no-quick", "--out", tmp_path / "random")
    want = dict(method="random", variant="untrained", dataset="shapes", arch="resnet10", stem="imagenet")
    want |= dict(size=16, seed=3)
    assert {key: row[key] for key in want} == want and not {"epochs", "images", "config"} & row.keys()
    assert row["backbone"] != probe("--backbone", backbone, "--no-quick")["backbone"]
    torch.manual_seed(3)
    fresh = common.resnet("resnet10", "imagenet").to(memory_format=torch.channels_last)
    assert row["backbone"] == linear_probe.fingerprint(fresh)[:16]


def test_a_run_that_goes_on_can_be_probed_and_stays_out_of_tables(backbone, few, capsys):
    state = torch.load(backbone.with_name("checkpoint.pt"), weights_only=True)
    torch.save(state | {"step": 1}, backbone.with_name("checkpoint.pt"))
    row = probe("--backbone", backbone, "--no-quick")
    assert (row["step"], row["steps"]) == (1, 3) and "step 1 of 3" in capsys.readouterr().out
    results = backbone.with_name("results.jsonl")
    assert tables.read_rows([results]) == []
    results.write_text(json.dumps(row | {"step": 3}))
    assert len(tables.read_rows([results])) == 1
    backbone.with_name("checkpoint.pt").write_bytes(b"damaged")  # while backbone.pt is whole
    assert probe("--backbone", backbone, "--no-quick", "--seed", 9)["step"] == 3
    assert "checkpoint.pt is damaged" in capsys.readouterr().out


def test_features_in_bf16_make_a_probe_of_their_own_and_a_row_without_a_precision_is_float32(backbone, few):
    exact = probe("--backbone", backbone, "--no-quick", "--amp", "off")
    rows = rows_of(backbone.parent)
    del rows[0]["probe_precision"]
    backbone.with_name("results.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert probe("--backbone", backbone, "--no-quick", "--amp", "off") == rows[0]
    rough = probe("--backbone", backbone, "--no-quick", "--amp", "bf16")
    assert (exact["probe_precision"], rough["probe_precision"]) == ("float32", "bfloat16")
    assert len(rows_of(backbone.parent)) == 2


@pytest.mark.parametrize("name, text, words", [
    ("log.jsonl", "step 1\nstep 2\n", "log.jsonl is not the log of a pretraining"),
    ("log.jsonl", '{"loss": 1.5}\n', "log.jsonl is not the log of a pretraining"),
    ("log.jsonl", "", "log.jsonl is not the log of a pretraining"),
    ("results.jsonl", '{"knn_top1": 3', "has lines that are no result rows"),
    ("results.jsonl", '[1]\n', "has lines that are no result rows")])
def test_a_foreign_log_and_a_damaged_row_are_one_line(name, text, words, backbone, few):
    backbone.with_name(name).write_text(text)
    with pytest.raises(UsageError, match=words):
        probe("--backbone", backbone, "--no-quick")


def test_features_that_are_not_finite_are_named_before_the_first_metric(backbone, few):
    state = torch.load(backbone, weights_only=True)
    state["layer4.0.bn2.weight"][:] = float("nan")
    torch.save(state, backbone)
    with pytest.raises(common.RunError, match="features are not finite"):
        probe("--backbone", backbone)
    assert not backbone.with_name("results.jsonl").exists()


def test_held_out_never_asks_for_the_test_split_and_its_parts_are_disjoint(few):
    cfg = common.parse(linear_probe.Config, "", "--random --split held-out --size 16".split())
    linear_probe.fill_in(cfg, [])
    train, test = linear_probe.load_splits(cfg)
    assert few == ["train"] and len(test) == 6
    whole = common.load_images("shapes", "", split="train", size=16)
    assert sorted([*train.rows.tolist(), *test.rows.tolist()]) == sorted(whole.rows.tolist())


def test_test_labels_go_by_the_training_sets_names_and_a_missing_split_says_what_works(tmp_path):
    def probe_folder(*more):
        return probe("--random", "--arch", "resnet10", "--dataset", "folder", "--data", root, "--size", 16,
                     "--out", tmp_path, "--cache", tmp_path / "cache", "--epochs", 0, *more)

    root = tmp_path / "set"
    for name, grey in (("a", 20), ("b", 120), ("c", 220)):
        for i in range(6):
            saved(Image.new("RGB", (16, 16), (grey + i, grey, grey)), root / "train" / name / f"{i}.png")
    with pytest.raises(UsageError, match="no test images .*--split held-out tests on a tenth"):
        probe_folder()
    shutil.copytree(root / "train" / "c", root / "test" / "c")       # "c" is the first name here, not there
    (root / "test" / "a").mkdir()                                    # and this one holds no images
    row = probe_folder()
    assert row["knn20_top1"] == 100 and (row["probe_images"], row["test_images"]) == (18, 6)
    shutil.copytree(root / "test" / "c", root / "test" / "b")        # the same flags, other images
    probe_folder("--no-quick")                                       # takes the place of that row
    assert probe_folder()["test_images"] == 12 and len(rows_of(tmp_path)) == 1
    shutil.rmtree(root / "test" / "b")
    shutil.copytree(root / "train" / "c", root / "test" / "d")
    with pytest.raises(UsageError, match=r"training images have not: \['d'\]"):
        probe_folder("--seed", 1)
    shutil.rmtree(root / "test")
    shutil.copytree(root / "train" / "c", root / "test")             # images without classes
    with pytest.raises(UsageError, match="test images have no classes; --split held-out"):
        probe_folder("--seed", 2)
    for path in sorted((root / "train").rglob("*.png"))[8:]:
        path.unlink()
    with pytest.raises(UsageError, match="takes a tenth of the training images, of 8 none"):
        probe_folder("--split", "held-out")


def test_of_two_probes_of_one_folder_at_once_both_rows_stay(backbone, few, monkeypatch):
    knn, other = linear_probe.knn, ["--backbone", backbone, "--no-quick", "--fraction", 0.5]

    def meanwhile(*args):
        if other:
            flags = other[:]
            other.clear()
            probe(*flags)
        return knn(*args)

    monkeypatch.setattr(linear_probe, "knn", meanwhile)
    probe("--backbone", backbone, "--no-quick")
    rows = rows_of(backbone.parent)
    assert [row["fraction"] for row in rows] == [0.5, 1.0] and all("knn10_top1" in row for row in rows)
    other[:] = ["--backbone", backbone, "--no-quick", "--seed", 5]  # and of one probe twice at once one
    probe(*other)
    assert len(rows_of(backbone.parent)) == 3


def test_neighbours_are_drawn_and_no_row_is_written(backbone, few, tmp_path):
    probe("--backbone", backbone, "--neighbours", tmp_path / "n.png")
    assert min(Image.open(tmp_path / "n.png").size) > 9 * 64
    assert not (backbone.parent / "results.jsonl").exists()
