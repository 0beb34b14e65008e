"""The command line as a user meets it: wrong usage, broken input, every documented command, and `make`."""
import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import torch
import torch.distributed.run
from PIL import Image

import aug_study
import bassl
import common
import linear_probe
import npid_distill
from conftest import ROOT, TINY, Small, parsed

SCRIPTS = [bassl, npid_distill, aug_study, linear_probe]
ENV = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}


def start(script, *flags):
    """Exit status of a script's own last lines, in this process; an error that gets out of them is a bug."""
    try:
        with common.one_line_errors():
            if script is linear_probe:
                linear_probe.probe(common.parse(linear_probe.Config, "", [*map(str, flags)]))
            else:
                script.train(parsed(script, *flags))
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.mark.parametrize("name, flags, words", [
    ("bassl", "--dataset mnist", "invalid choice: 'mnist'"),
    ("bassl", "--epoch 3", "unrecognized arguments: --epoch 3"),
    ("bassl", "--lr nan", "--lr nan: want a number"),
    ("bassl", "--batch 1", "--batch 1: want a number from 2"),
    ("bassl", "--size 4", "want 8 or more"),
    ("bassl", "--batch 64", "--batch 64 is larger than the 48"),
    ("bassl", "--device cuda:77", "--device cuda:77: "),
    ("bassl", "--dataset imagenet1k --data nowhere", "no folder .*nowhere.*--data"),
    ("bassl", "--patch 5", "patch 5 .*16"),
    ("bassl", "--dataset imagenet100 --recipe small", "--recipe small is for"),
    ("npid_distill", "--tau 0", "--tau 0.*above 0"),
    ("npid_distill", "--optimizer adamw", "give --lr"),
    ("aug_study", "--methods none", "--methods none: want one of simclr, "),
    ("aug_study", "--methods simsiam --predictor off", "collapses"),
    ("linear_probe", "", "either --backbone FILE or --random"),
    ("linear_probe", "--backbone none.pt", "none.pt: no such file"),
    ("linear_probe", "--random --fraction 0", "above 0 and up to 1"),
])
def test_wrong_usage_is_one_line_and_status_2(name, flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, tiny = importlib.import_module(name), [] if name == "linear_probe" else TINY
    assert start(script, *tiny, *flags.split(), "--out", "out") == 2 and not [*tmp_path.iterdir()]
    said = capsys.readouterr().err.strip().splitlines()
    assert re.search(words, said[-1]) and ": error: " in said[-1] and len(said[-1]) < 600
    assert len(said) == 1 or len(said) == 2 and said[0].startswith("usage: ")  # argparse's own line


def test_broken_data_is_named_with_status_1(tmp_path, capsys):
    for i, name in enumerate(["a/0.png", "a/1.png", "b/2.png"]):
        path = tmp_path / "tree" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 80 * i, np.uint8)).save(path)
    path.write_bytes(b"not a png")
    flags = [*TINY, "--dataset", "folder", "--batch", 2]
    flags += ["--cache", tmp_path / "cache", "--out", tmp_path / "out"]
    assert start(bassl, *flags, "--data", tmp_path / "tree") == 1
    assert "b/2.png" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "empty" / "train" / "class").mkdir(parents=True)
    assert start(bassl, *flags, "--data", tmp_path / "empty") == 1
    assert "holds no images: want" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_failed_download_says_both_ways_and_unpickles_nothing_foreign(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(urllib.request, "_opener", None)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    trace, folder = tmp_path / "ran", tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(f"cposix\nsystem\n(S'touch {trace}'\ntR.".encode())
    flags = [*TINY, "--dataset", "cifar10", "--data", tmp_path, "--out", tmp_path / "out"]
    assert start(bassl, *flags) == 1 and not trace.exists() and not (tmp_path / "out").exists()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"no cifar10 in {tmp_path}" in said and "download failed" in said and "downloaded folder" in said
    assert "cifar10/{train,test}/<class>/*.png and pass --data" in said


@pytest.mark.parametrize("script", SCRIPTS[:3])
def test_preview_draws_and_stops(script, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "resnet", Small)
    assert start(script, *TINY, "--preview", "--out", tmp_path) == 0
    image = np.asarray(Image.open(tmp_path / "preview.png"))
    assert min(image.shape[:2]) >= 2 * 16 and image.std() > 20
    assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]


# ------------------------------------------------------------------- what the documents tell a user to type


def commands(text):
    """The commands of a shell text that start Python, as words."""
    lines = re.findall(r"^ *((?:python|torchrun) .*)", text.replace("\\\n", " "), re.M)
    return [shlex.split(line, comments=True) for line in lines]


README = (ROOT / "README.md").read_text()
TYPED = commands("".join(re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)))


def taken_apart(words):
    """(script, flags) of a command; torchrun's own flags are read by torchrun's parser."""
    if words[0] == "torchrun":
        args = torch.distributed.run.get_args_parser().parse_args(words[1:])
        return args.training_script, args.training_script_args
    return words[1], words[2:]


def test_the_commands_of_make_and_of_docstrings_are_well_formed():
    every = ["make", "-n", "cifar10", "PYTHON=python", f"METHODS=bassl npid {' '.join(aug_study.METHODS)}"]
    texts = [subprocess.check_output(every, cwd=ROOT, env=ENV, text=True), *(s.__doc__ for s in SCRIPTS)]
    seen = set()
    for words in [*TYPED, *(words for text in texts for words in commands(text))]:
        script, flags = taken_apart(words)
        seen.add(script)
        if script == "linear_probe.py":
            common.parse(linear_probe.Config, "", flags)
        elif script != "results/tables.py":
            cfg = parsed(importlib.import_module(script.removesuffix(".py")), *flags, "--device", "cuda")
            assert cfg.optimizer != "sgd" or cfg.lr * cfg.batch / 256 <= 1.1, words  # beyond: LARS
    assert seen == {f"{script.__name__}.py" for script in SCRIPTS} | {"results/tables.py"}


SHORT = "--dataset shapes --size 16 --view 16 --limit 16 --batch 8 --epochs 1 --knn-every 0 --device cpu"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """The backbone of a tiny run."""
    out = tmp_path_factory.mktemp("tiny")
    assert start(bassl, *TINY, "--epochs", 1, "--out", out) == 0
    return out / "backbone.pt"


@pytest.mark.parametrize("words", TYPED, ids=" ".join)
def test_a_command_of_the_readme_runs_shortened_by_its_own_flags(words, tmp_path, backbone, monkeypatch):
    script, flags = taken_apart(words)
    load, few = common.load_images, lambda images: images.subset(torch.arange(len(images))[:40])
    monkeypatch.setattr(common, "load_images", lambda *args, **options: few(load(*args, **options)))
    if script == "linear_probe.py":
        flags += "--dataset shapes --size 16 --arch resnet10 --stem imagenet --epochs 0 --no-quick".split()
        flags += ["--device", "cpu", "--backbone", backbone, "--out", tmp_path]
    else:
        monkeypatch.setattr(common, "resnet", Small)
        flags += [*SHORT.split(), "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    runpy.run_path(str(ROOT / script), run_name="__main__")  # the file as it is started, in this process


def test_the_readmes_ninth_method_trains(tmp_path, monkeypatch):
    code = re.search(r"```python\n((?:(?!```).)*def uniform_loss.*?)```", README, re.S)[1]
    monkeypatch.setattr(aug_study, "METHODS", dict(aug_study.METHODS))
    monkeypatch.setattr(common, "resnet", Small)
    eight = {*aug_study.METHODS}
    exec(code, dict(vars(aug_study)))
    [ninth] = {*aug_study.METHODS} - eight
    flags = ["--augs", "multicrop", "--size", 32, "--view", 32, "--out", tmp_path]
    aug_study.train(parsed(aug_study, *TINY, "--methods", ninth, *flags))
    assert (tmp_path / "backbone.pt").exists()


def test_make_ends_in_a_table_and_does_nothing_new_when_called_again(tmp_path):
    for path in [*ROOT.glob("*.py"), ROOT / "Makefile", ROOT / "results" / "tables.py"]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    call = ["make", "demo", f"PYTHON={sys.executable}", "METHODS=bassl", f"ARGS={shlex.join(TINY)}",
            "PROBE=--size 16 --device cpu --fraction 0.02 --no-quick"]
    states = []
    for left in (0, 3):  # things that were done before: a run and two probes
        done = subprocess.run(call, cwd=tmp_path, env=ENV, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count("nothing left to do") == left, done.stderr
        files = [*tmp_path.rglob("log.jsonl"), *tmp_path.rglob("results.jsonl")]
        table = [line.split("|") for line in done.stdout.splitlines() if line.startswith("|")]
        states.append(({path: path.read_bytes() for path in files}, table))
    assert states[0] == states[1] and len(states[0][0]) == 3
    head, _, *rows = [[cell.strip() for cell in line] for line in states[0][1]]
    assert "kNN" in head and {row[head.index("method")] for row in rows} == {"bassl", "random"}
