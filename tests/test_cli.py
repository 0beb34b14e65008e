"""The command line as a user meets it: wrong usage, broken input, every documented command, and `make`."""
import functools
import importlib
import json
import os
import pathlib
import random
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import typing
import urllib.request

import numpy as np
import pytest
import torch
import torch.distributed.run
from PIL import Image

import aug_study
import bassl
import bench
import common
import linear_probe
import npid_distill
from conftest import BY, ROOT, TINY, Small, parsed

sys.path.append(str(ROOT / "results"))
import tables  # noqa: E402

SCRIPTS = [bassl, npid_distill, aug_study, linear_probe]
ENV = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}


def start(script, *flags):
    """Exit status of a script's own last lines, in this process; an error that gets out of them is a bug."""
    try:
        with common.one_line_errors():
            if script is linear_probe:
                linear_probe.probe(common.parse(linear_probe.Config, "", [*map(str, flags)], shared=object))
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
    ("bassl", "--limit 1.5", "invalid int value"),
    ("bassl", "--size 4", "want 8 or more"),
    ("bassl", "--batch 64", "--batch 64 is larger than the 48"),
    ("bassl", "--device cuda:77", "--device cuda:77: "),
    ("bassl", "--dataset imagenet1k --data nowhere", "no folder .*nowhere.*--data"),
    ("bassl", "--patch 5", "patch 5 .*16"),
    ("bassl", "--kernel 2", "kernel 2 is even"),
    ("npid_distill", "--tau 0", "--tau 0.*above 0"),
    ("aug_study", "--methods none", "--methods none: want one of simclr, "),
    ("aug_study", "--augs none", "--augs none: want one of crop, "),
    ("aug_study", "--methods simsiam --predictor off", "collapses"),
    ("linear_probe", "", "either --backbone FILE or --random"),
    ("linear_probe", "--backbone none.pt", "none.pt: no such file"),
    ("linear_probe", "--random --fraction 0", "above 0 and up to 1"),
    ("linear_probe", "--random --neighbours n", "ends in .png"),
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


WORDS = ["", "0", "1", "2", "16", "-1", "1e9", "1e400", "nan", "-inf", "9" * 400, "3.5", "shapes", "folder",
         "adamw", "plain", "moco,byol", "multicrop", "/dev/null", "/no/where",
         "ä\u2028", "--", "--batch", "@file", "*"]
FITTING = {int: ["0", "1", "2", "16", "64"], float: ["0", "0.5", "20"], str: WORDS, bool: [], type(None): []}


def fitting(kind):
    """Values for a flag of this kind."""
    if kind in FITTING or isinstance(kind, str):
        return FITTING.get(kind, [kind])
    return [value for part in typing.get_args(kind) for value in fitting(part)]


@pytest.mark.parametrize("script, count", [*zip(SCRIPTS, (300, 300, 300, 100))])
def test_random_command_lines_end_with_0_1_or_2(script, count, tmp_path, monkeypatch):
    """Flags whose values mostly fit and sometimes are anything; all that a run does but its steps."""
    def images(dataset, data, split, size, *rest, load=common.load_images, **more):
        if dataset != "shapes":
            return load(dataset, data, split, size, *rest, **more)
        pixels = torch.zeros(600, 3, size, size, dtype=torch.uint8)
        return common.ImageSet(pixels, torch.arange(600) % 2, ["a", "b"])

    def no_internet(*_):
        raise common.RunError("no internet")

    for owner, name, stand_in in [
        (common, "load_images", images), (common, "download_cifar", no_internet),
        (common.Run, "start", lambda *_: None), (common.Run, "batches", lambda _: iter(())),
        (npid_distill, "calibrate", lambda *_: None), (npid_distill, "projector", torch.nn.Identity),
        (linear_probe, "features", lambda _, found, *__: (torch.randn(len(found), 4), found.labels)),
        (linear_probe, "quick_probe", lambda *_: 50.0), (linear_probe, "resnet", Small),
        (common, "resnet", Small),
    ]:
        monkeypatch.setattr(owner, name, stand_in)
    monkeypatch.chdir(tmp_path)
    hints = {} if script is linear_probe else typing.get_type_hints(common.RunConfig)
    hints |= typing.get_type_hints(script.Config)
    draw, ends, names = random.Random(script.__name__), [], sorted({*hints} - {"out", "cache"})
    for _ in range(count):
        line = []
        for name in draw.choices(names, k=draw.randint(0, 4)):
            values = fitting(hints[name]) if draw.random() < 0.8 else WORDS
            line += [f"--{name.replace('_', '-')}", *draw.choices(values or [""], k=bool(values))]
        ends.append(start(script, *line, *["--random", "--epochs", "0"] * (script is linear_probe)))
        torch.use_deterministic_algorithms(False)
    assert {*ends} <= {0, 1, 2} and min(ends.count(0), ends.count(2)) > count / 10


# ------------------------------------------------------------------- what the documents tell a user to type


def commands(text):
    """The commands of a shell text that start make or Python, as words, without variables before them."""
    for line in re.split(r"\n|&&|;", text.replace("\\\n", " ")):
        words = shlex.split(line, comments=True)
        while words and (words[0] == "do" or re.match(r"\w+=", words[0])):
            words.pop(0)
        if words and re.fullmatch(r"(\S*/)?(python3?|torchrun|make)", words[0]):
            yield words


README = (ROOT / "README.md").read_text()
TYPED = "\n".join(re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S))
EVERY = "METHODS=bassl npid simclr moco byol simsiam swav barlow vicreg dino"


@functools.cache
def dry_run(*words):
    """What a make command would start."""
    done = subprocess.run([*words, "-n", "PYTHON=python"], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, (words, done.stderr)
    return [words for words in commands(done.stdout) if words[0] != "make" and "-m" not in words]


def recorded(path):
    """What a file of results/ starts, by programs in Python's place that write down how they are called."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "results", folder + "/results")
        for name in ("python", "torchrun"):
            stub = pathlib.Path(folder, name)
            stub.write_text(f'#!/bin/bash\n(printf "{name}"; printf " %q" "$@"; echo) >> {folder}/calls\n')
            stub.chmod(0o755)
        subprocess.run(["bash", f"results/{path.name}"], cwd=folder, check=True, stdout=subprocess.DEVNULL,
                       env=dict(ENV, PATH=f"{folder}:{os.environ['PATH']}"))
        return [*commands(pathlib.Path(folder, "calls").read_text())]


@functools.cache
def documented():
    """Every command of the README, of the scripts' own docstrings, of make's targets and of results/*.sh."""
    found = [*commands(TYPED)]
    for script in SCRIPTS:
        found += commands(re.sub(r"^(?!    )", "#", script.__doc__, flags=re.M))
    found += [["make", name, EVERY] for name in ("demo", *common.SIZES) if name != "folder"]
    found = [call for words in found for call in (dry_run(*words) if words[0] == "make" else [words])]
    return found + [call for path in sorted((ROOT / "results").glob("*.sh")) for call in recorded(path)]


def taken_apart(words):
    """(script, flags) of a command; torchrun's own flags are read by torchrun's parser."""
    if words[0] == "torchrun":
        args = torch.distributed.run.get_args_parser().parse_args(words[1:])
        return args.training_script, args.training_script_args
    return words[1], words[2:]


def test_every_documented_command_is_well_formed():
    started = sum(any(word.endswith(".py") for word in words) for words in commands(TYPED))
    pattern = r"^[^#\n]*(?:python|torchrun) [^#\n]*\b\w+\.py\b"
    assert started == len(re.findall(pattern, TYPED, re.M))  # none is passed over
    scripts = set()
    for words in documented():
        script, flags = taken_apart(words)
        scripts.add(script)
        if script.removesuffix(".py") in BY:
            parsed(importlib.import_module(script.removesuffix(".py")), *flags)
        elif script == "linear_probe.py":
            common.parse(linear_probe.Config, "", flags, shared=object)
        elif script == "results/tables.py":
            assert flags[0] in ("--rows", "--check", "--readme", *tables.TABLES), words
        else:
            assert script == "tests/bench.py", words
            bench.parser().parse_args(flags)
    assert scripts >= {"bassl.py", "npid_distill.py", "aug_study.py", "linear_probe.py", "results/tables.py"}


SHORT = "--dataset shapes --size 16 --view 16 --limit 16 --batch 8 --epochs 1 --knn-every 0 --device cpu"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a tiny run, with a row of a study beside it."""
    out = tmp_path_factory.mktemp("tiny") / "run"
    assert start(bassl, *TINY, "--epochs", 1, "--out", out) == 0
    row = {"config": vars(parsed(aug_study)), "seed": 0, "probe_top1": 50.0}
    (out / "study.jsonl").write_text(json.dumps(row) + "\n")
    return out


@pytest.mark.parametrize("words", [call for call in commands(TYPED) if "make" != call[0]], ids=" ".join)
def test_a_command_of_the_readme_runs_shortened_by_its_own_flags(words, tmp_path, finished, monkeypatch):
    script, flags = taken_apart(words)
    load, few = common.load_images, lambda images: images.subset(torch.arange(len(images))[:40])
    monkeypatch.setattr(common, "load_images", lambda *args, **options: few(load(*args, **options)))
    if script == "linear_probe.py":
        there = {"--backbone": finished / "backbone.pt", "--neighbours": tmp_path / "n.png"}
        flags = [there.get(before, flag) for before, flag in zip(["", *flags], flags)]
        flags += "--dataset shapes --size 16 --arch resnet10 --stem imagenet --epochs 0 --no-quick".split()
        flags += ["--device", "cpu", "--out", tmp_path]
    elif "--effects" in flags:
        flags = ["--effects", finished / "study.jsonl"]
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
