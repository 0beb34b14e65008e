"""The probe: protocols against independent computations, backbones that do not fit, rows and tables."""
import json

import pytest
import torch
import torchvision

import common
import linear_probe
from common import RunError, UsageError
from conftest import ROOT, read_log, run_script

PROBE = ["--dataset", "shapes", "--size", "16", "--epochs", "0", "--device", "cpu", "--fraction", "0.05"]


def test_knn_equals_a_loop_over_votes():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(50, 8, generator=generator), torch.randn(30, 8, generator=generator)
    train_y, test_y = torch.randint(0, 4, (50,), generator=generator), torch.randint(0, 4, (30,), generator=generator)
    right = 0
    for x, y in zip(test, test_y):
        cos = [torch.cosine_similarity(x, row, dim=0).item() for row in train]
        votes = [0.0] * 4
        for i in sorted(range(50), key=lambda i: -cos[i])[:7]:
            votes[train_y[i]] += torch.tensor(cos[i] / 0.1).exp().item()
        right += votes.index(max(votes)) == y
    assert linear_probe.knn(train, train_y, test, test_y, k=7) == pytest.approx(100 * right / 30)
    assert linear_probe.knn(train, train_y, train, train_y, k=1) == 100


def test_the_quick_probe_separates_what_is_separable_and_guesses_what_is_noise():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 3
    x = torch.randn(600, 20, generator=generator) + 6 * torch.eye(3, 20)[y]
    assert linear_probe.quick_probe(x[:400], y[:400], x[400:], y[400:], 3) > 98
    noise = torch.randn(600, 20, generator=generator)
    assert linear_probe.quick_probe(noise[:400], y[:400], noise[400:], y[400:], 3) < 50


def test_the_logistic_fit_is_at_a_stationary_point_of_its_objective():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 5, generator=generator), torch.randint(0, 3, (200,), generator=generator)
    head = linear_probe.fit_logistic(x, y, 3, 0.1)
    p = (x @ head.weight.T + head.bias).softmax(1).detach()
    gradient = (p - torch.eye(3)[y]).T @ x / 200 + 0.1 * head.weight                    # by hand, without autograd
    assert gradient.abs().max() < 1e-4


def test_a_label_fraction_keeps_every_class():
    images = common.ImageSet(torch.arange(1000) % 10, [str(i) for i in range(10)], torch.zeros(1000, 3, 2, 2, dtype=torch.uint8))
    assert linear_probe.label_fraction(images, 0.1, 0).labels.bincount().tolist() == [10] * 10
    assert linear_probe.label_fraction(images, 0.0001, 0).labels.bincount().tolist() == [1] * 10


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A backbone file as a run writes it."""
    path = tmp_path_factory.mktemp("backbone") / "backbone.pt"
    torch.manual_seed(0)
    state = common.resnet("resnet10", "cifar").state_dict()
    common.write_checkpoint(path, {**state, "arch": "resnet10", "stem": "cifar"})
    return path


def test_wrong_backbones_are_refused_by_name(backbone, tmp_path):
    with pytest.raises(UsageError, match="arch resnet10, not resnet18"):
        linear_probe.load_backbone(str(backbone), arch="resnet18")
    with pytest.raises(UsageError, match="stem cifar, not imagenet"):
        linear_probe.load_backbone(str(backbone), stem="imagenet")
    with pytest.raises(UsageError, match="no such file"):
        linear_probe.load_backbone(str(tmp_path / "none.pt"))
    state = {k: v for k, v in torch.load(backbone, weights_only=True).items() if k not in ("arch", "stem")}
    bare = tmp_path / "bare.pt"
    for change, words in (({}, "missing layer1.1.conv1.weight"),                         # taken for a resnet18
                          ({"head.weight": torch.zeros(1)}, "unexpected head.weight|missing")):
        torch.save({**state, **change}, bare)
        with pytest.raises(UsageError, match=words):
            linear_probe.load_backbone(str(bare))
    torch.save({k: v for k, v in state.items() if k != "bn1.running_var"}, bare)
    with pytest.raises(UsageError, match="missing bn1.running_var"):
        linear_probe.load_backbone(str(bare), arch="resnet10")
    with pytest.raises(UsageError, match="cifar stem .*not imagenet"):
        linear_probe.load_backbone(str(bare), arch="resnet10", stem="imagenet")
    bare.write_bytes(b"not a checkpoint at all")
    with pytest.raises(RunError, match="safely"):
        linear_probe.load_backbone(str(bare))


def test_torchvisions_own_state_dict_is_read_without_its_classifier(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    encoder, arch, stem = linear_probe.load_backbone(str(tmp_path / "theirs.pth"), arch="resnet18")
    assert (arch, stem) == ("resnet18", "imagenet")
    model.fc, x = torch.nn.Identity(), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder.eval()(x), model.eval()(x))


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path):
    trace = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return open, (str(trace), "w")

    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pt")
    status, _, err = run_script("linear_probe.py", "--backbone", tmp_path / "evil.pt", *PROBE)
    assert status == 1 and "safely" in err and "Traceback" not in err and not trace.exists()


def test_the_backbone_is_bit_identical_after_every_protocol(backbone, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(linear_probe, "fingerprint", lambda m, f=linear_probe.fingerprint: seen.append((f(m), m.training)) or seen[-1][0])
    cfg = common.parse(linear_probe.Config, "", [*PROBE, "--fraction", "0.02", "--epochs", "1", "--backbone", str(backbone), "--out", str(tmp_path)], shared=object)
    row = linear_probe.probe(cfg)
    assert seen[0] == seen[1] and set(linear_probe.METRICS) <= set(row)
    training = common.resnet("resnet10", "cifar")
    before = linear_probe.fingerprint(training)
    training.train()(torch.randn(4, 3, 16, 16))                                          # a forward pass in train mode moves BN buffers
    assert linear_probe.fingerprint(training) != before


def test_a_run_and_its_probe_make_a_row_and_the_row_a_table(tiny_run, tmp_path):
    out = tiny_run("bassl.py", "--knn-every", "1")
    status, stdout, err = run_script("linear_probe.py", "--backbone", out / "backbone.pt", *PROBE)
    assert status == 0, err
    row = json.loads((out / "results.jsonl").read_text())
    assert {"dataset", "method", "variant", "arch", "epochs", "batch", "seed", "minutes", "images_per_s", "device", "precision", "sha", "command",
            "knn_top1", "knn20_top1", "probe_top1"} <= set(row)
    assert row["method"] == "bassl" and row["epochs"] == 2 and row["images"] == 48 and "bassl.py" in row["command"]
    status, stdout, err = run_script("linear_probe.py", "--random", "--arch", "resnet10", *PROBE, "--out", tmp_path / "random")
    assert status == 0, err
    status, stdout, err = run_script("linear_probe.py", "--table", out / "results.jsonl", tmp_path / "random" / "results.jsonl")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in stdout.splitlines() if line.startswith("|")]
    head, body = lines[0], lines[2:]
    assert [line[head.index("method")] for line in body] == ["bassl", "random"]
    assert float(body[0][head.index("knn_top1")]) == row["knn_top1"]
    assert read_log(out)[0]["method"] == "bassl"


def test_tables_average_seeds_and_join_the_control_runs():
    base = {"dataset": "shapes", "method": "bassl", "variant": "simclr + fusion (one)", "arch": "resnet10", "stem": "imagenet", "images": 100,
            "epochs": 2, "batch": 64, "fraction": 1.0, "pretrained_on": "shapes", "minutes": 1.0, "images_per_s": 10, "gates": [0.25], "train_loss": 3.0}
    rows = [{**base, "seed": 0, "knn_top1": 40.0}, {**base, "seed": 1, "knn_top1": 50.0},
            {**base, "seed": 0, "variant": base["variant"] + ", unpaired", "knn_top1": 10.0, "train_loss": 4.84}]
    text = linear_probe.tables(rows)
    assert "45.00 ± 7.07" in text and "4.84 (4.84), gate 0.25" in text and "0.250" in text and text.count("simclr + fusion") == 1 and "10.00" not in text


def test_neighbours_are_drawn(backbone, tmp_path):
    from PIL import Image
    status, _, err = run_script("linear_probe.py", "--backbone", backbone, *PROBE, "--neighbours", tmp_path / "n.png")
    assert status == 0, err
    image = Image.open(tmp_path / "n.png")
    assert image.size[0] > 9 * 64 and image.size[1] > 10 * 64
    assert not (backbone.parent / "results.jsonl").exists() and (ROOT / "linear_probe.py").exists()
