"""The command line as a user meets it: wrong usage, every documented command, `make`."""
import collections
import dataclasses
import importlib
import inspect
import json
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
from conftest import ROOT, TINY, Small, parsed, run_script

FILES = [bassl, npid_distill, aug_study]
SCRIPTS = [*FILES, linear_probe]


def start(script, *flags):
    """The exit status of a script that is started with these flags, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            return end.code
    return 0


@pytest.mark.parametrize("script, flags, words", [
    ("bassl.py", "--dataset mnist", "invalid choice: 'mnist'"),
    ("bassl.py", "--epoch 3", "unrecognized arguments: --epoch 3"),
    ("bassl.py", "--lr nan", "--lr nan: want a number"),
    ("bassl.py", "--batch 1", "--batch 1: want a number from 2"),
    ("bassl.py", "--size 4", "want 8 or more"),
    ("bassl.py", "--batch 64", "--batch 64 is larger than the 48"),
    ("bassl.py", "--device cuda:77", "--device cuda:77: "),
    ("bassl.py", "--dataset imagenet1k --data nowhere", "--data .*nowhere: no such folder"),
    ("bassl.py", "--patch 5", "patch 5 .*16"),
    ("bassl.py", "--framework moco --queue 0", "--queue 0: want one key"),
    ("bassl.py", "--dataset imagenet100 --recipe small", "--recipe small is for"),
    ("npid_distill.py", "--tau 0", "--tau 0.*above 0"),
    ("npid_distill.py", "--optimizer adamw", "give --lr"),
    ("aug_study.py", "--methods none", "--methods none: want one of simclr, "),
    ("aug_study.py", "--methods moco --queue 0", "--queue 0: want one key"),
    ("aug_study.py", "--methods simsiam --predictor off", "collapses"),
    ("aug_study.py", "--methods dino --momentum off", "collapses"),
    ("aug_study.py", "--methods swav --predictor on", "no published form"),
    ("linear_probe.py", "", "want --backbone FILE or --random"),
    ("linear_probe.py", "--backbone none.pt", "none.pt: no such file"),
    ("linear_probe.py", "--random --fraction 0", "above 0 and up to 1"),
])
def test_wrong_usage_is_one_line_and_status_2(script, flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = [] if script == "linear_probe.py" else TINY
    assert start(script, *tiny, *flags.split(), "--out", "out") == 2 and not [*tmp_path.iterdir()]
    *usage, said = capsys.readouterr().err.strip().splitlines()
    assert re.search(words, said) and said.startswith(f"{script}: error: ") and len(said) < 600
    assert len(usage) <= 1 and all(line.startswith("usage: ") for line in usage)  # argparse's own line


def test_a_failed_download_says_both_ways_and_unpickles_nothing_foreign(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(urllib.request, "_opener", None)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    trace, folder = tmp_path / "ran", tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(f"cposix\nsystem\n(S'touch {trace}'\ntR.".encode())
    flags = [*TINY, "--dataset", "cifar10", "--data", tmp_path, "--out", tmp_path / "out"]
    assert start("bassl.py", *flags) == 1 and not trace.exists() and not (tmp_path / "out").exists()
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"no cifar10 in {tmp_path}" in said and "download failed" in said and "downloaded folder" in said
    assert "cifar10/{train,test}/<class>/*.png and pass --data" in said


@pytest.mark.parametrize("file", FILES)
def test_preview_draws_and_stops(file, small, train):
    out = train("out", "--preview", script=file)
    image = np.asarray(Image.open(out / "preview.png"))
    assert min(image.shape[:2]) >= 2 * 16 and image.std() > 20
    assert [path.name for path in out.iterdir()] == ["preview.png"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_shown_and_the_probes_names_no_recipe(script, capsys):
    assert start(f"{script.__name__}.py", "--help") == 0
    printed = capsys.readouterr().out
    assert "--dataset" in printed
    assert script is not linear_probe or "recipe" not in printed.rsplit("--neighbours", 1)[1]


def test_a_field_without_a_comment_has_a_flag_too():
    @dataclasses.dataclass
    class Config:
        plain: int = 3
    assert common.parse(Config, "", ["--plain", "4"]).plain == 4


@pytest.mark.parametrize("file, flags, name", [
    (bassl, "", "bassl"), (bassl, "--layers 0", "simclr"),
    (bassl, "--framework moco --queue 64", "bassl-moco"),
    (bassl, "--framework byol --layers 0", "plain-byol"),
    (npid_distill, "--dim 16", "npid"),
    (aug_study, "", "study-simclr"), (aug_study, "--methods byol", "byol")])
def test_a_runs_own_folder_goes_by_its_method(file, flags, name, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file.train(parsed(file, *TINY, "--epochs", 1, *flags.split()))
    assert [path.parent.name for path in tmp_path.rglob("backbone.pt")] == [name]


def test_the_table_of_data_sets_agrees_with_the_makefile_and_the_recipes():
    listed = re.search(r"^SETS +:= (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert listed == [name for name in common.DATASETS if name != "folder"]
    for file in FILES:
        for name, known in common.DATASETS.items():
            if known.small:
                stem = parsed(file, "--dataset", name, "--recipe", "small").stem
                assert common.pick_stem(stem, known.pixels) == known.small


def test_a_function_that_stands_in_several_files_is_the_same_in_all():
    texts = collections.defaultdict(set)
    for file in FILES:
        for name, function in inspect.getmembers(file, inspect.isfunction):
            if name not in ("train", "name_variant"):
                texts[name].add(re.sub('""".*?"""', "", inspect.getsource(function), flags=re.S))
    assert all(len(different) == 1 for different in texts.values()), texts


@pytest.mark.parametrize("file", FILES)
def test_a_copied_file_gives_its_parts_without_torchvision_and_the_other_files(file, tmp_path):
    shutil.copy(file.__file__, tmp_path)
    code = f"import sys, torch; from {file.__name__} import *; assert 'torchvision' not in sys.modules"
    if file is aug_study:  # the README calls the parts of the others
        code += "; vicreg_loss(*torch.randn(2, 4, 3)), nt_xent(*torch.randn(2, 4, 3))"
    run_script("-E", "-c", code, cwd=tmp_path)  # without PYTHONPATH, where the other files are


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


def make(*words, cwd=ROOT):
    """What make prints; it must end with status 0."""
    env = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(["make", *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_of_make_of_docstrings_and_of_the_tables_are_well_formed(tmp_path):
    stub, env = tmp_path / "python", {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    stub.write_text("#!/bin/bash\nprintf '%q ' python \"$@\"\necho\n")
    stub.chmod(0o755)
    texts = [make("-n", "cifar10", "PYTHON=python", f"METHODS=bassl npid {' '.join(aug_study.METHODS)}")]
    texts += [script.__doc__ for script in SCRIPTS]
    texts += [subprocess.run(["bash", script], env=env, cwd=tmp_path, capture_output=True, text=True,
                             check=True).stdout for script in (ROOT / "results").glob("*.sh")]
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


@pytest.mark.parametrize("words", TYPED, ids=" ".join)
def test_a_command_of_the_readme_runs_shortened_by_its_own_flags(words, tmp_path, pretrained, monkeypatch):
    script, flags = taken_apart(words)
    monkeypatch.chdir(tmp_path)
    load, few = common.load_images, lambda images: images.subset(torch.arange(len(images))[:40])
    monkeypatch.setattr(common, "load_images", lambda *args, **options: few(load(*args, **options)))
    flags += "--dataset shapes --size 16 --device cpu --out".split() + [tmp_path / "out"]
    if script == "linear_probe.py":
        flags += "--arch resnet10 --stem imagenet --epochs 0 --no-quick --backbone".split()
        flags += [pretrained / "backbone.pt"]
    elif "--weights" in flags:
        flags[flags.index("--weights") + 1] = pretrained / "backbone.pt"
    else:
        monkeypatch.setattr(common, "resnet", Small)
    if script != "linear_probe.py":
        flags += "--view 16 --limit 16 --batch 8 --epochs 1 --knn-every 0".split()
    assert start(script, *flags) == 0


PRELUDE = """
import torch, torchvision
class Noise(torchvision.datasets.FakeData):
    def __init__(self, root, download, transform):
        super().__init__(16, (3, 32, 32), transform=transform)
def one_batch(images, batch, **_):
    return [torch.utils.data.default_collate([images[i] for i in range(batch)])] * 20
losses, backward = [], torch.Tensor.backward
torchvision.datasets.CIFAR10, torch.utils.data.DataLoader = Noise, one_batch
torch.Tensor.backward = lambda loss: losses.append(loss.item()) or backward(loss)
torch.manual_seed(0)
"""


@pytest.mark.parametrize("file", ["bassl", "npid_distill"])
def test_the_readmes_loop_around_a_copied_file_lowers_its_loss_on_one_batch_of_views(file, tmp_path):
    shutil.copy(ROOT / f"{file}.py", tmp_path)
    loop = re.search(rf"```python\n((?:(?!```).)*from {file} import.*?)```", README, re.S)[1]
    assert loop.count("= 200, 256") == 1
    loop = loop.replace("= 200, 256", "= 1, 16")
    printed = run_script("-E", "-c", f"{PRELUDE}{loop}print(*losses)", cwd=tmp_path)
    losses = [float(loss) for loss in printed.splitlines()[-1].split()]
    assert len(losses) == 20 and sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses


def test_the_readmes_ninth_method_trains(small, train, monkeypatch):
    code = re.search(r"```python\n((?:(?!```).)*def uniform_loss.*?)```", README, re.S)[1]
    monkeypatch.setattr(aug_study, "METHODS", dict(aug_study.METHODS))
    eight = {*aug_study.METHODS}
    exec(code, dict(vars(aug_study)))
    [ninth] = {*aug_study.METHODS} - eight
    flags = ["--methods", ninth, "--augs", "multicrop", "--size", 32, "--view", 32]
    assert (train("out", *flags, script=aug_study) / "backbone.pt").exists()


def test_make_quotes_a_folder_with_a_space_and_asks_torch_how_many_runs_stand_side_by_side(tmp_path):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for side in (1, 2):
        stub = tmp_path / "python"
        stub.write_text(f"""#!/bin/sh
case "$1" in -c) echo {side};; *) echo "threads $OMP_NUM_THREADS" "$@";; esac
""")
        stub.chmod(0o755)
        printed = make("cifar10", f"PYTHON={stub}", "DATA=~/my data", "METHODS=npid", f"OUT={tmp_path}/runs")
        threads = max(1, cores // side)
        assert f"threads {threads} npid_distill.py" in printed
        assert printed.count("--data '~/my data'") == 3  # as make echoes it, in three commands
    done = subprocess.run(["make", "cifar10", "OUT=my runs"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and 'OUT="my runs"' in done.stderr


def test_make_ends_in_a_table_and_does_nothing_new_when_called_again(tmp_path):
    for path in [*ROOT.glob("*.py"), ROOT / "Makefile", ROOT / "results" / "tables.py"]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    states = []
    for left in (0, 3):  # things that were done before: a run and two probes
        printed = make("demo", f"PYTHON={sys.executable}", "METHODS=bassl", f"ARGS={shlex.join(TINY)}",
                       "PROBE=--size 16 --device cpu --fraction 0.02 --no-quick", cwd=tmp_path)
        assert printed.count("nothing left to do") == left
        files = [*tmp_path.rglob("log.jsonl"), *tmp_path.rglob("results.jsonl")]
        table = [line.split("|") for line in printed.splitlines() if line.startswith("|")]
        states.append(({path: path.read_bytes() for path in files}, table))
    assert states[0] == states[1] and len(states[0][0]) == 3
    head, _, *rows = [[cell.strip() for cell in line] for line in states[0][1]]
    assert "kNN" in head and {row[head.index("method")] for row in rows} == {"bassl", "random"}


@pytest.mark.soak
def test_the_demo_ends_with_every_method_above_the_random_network(tmp_path):
    make("demo", f"PYTHON={sys.executable}", f"OUT={tmp_path}")
    rows = [json.loads(line) for path in tmp_path.rglob("results.jsonl") for line in path.open()]
    probe = {(row["method"], row["variant"]): row["probe_top1"] for row in rows}
    floor = probe.pop(("random", "untrained"))
    assert len(probe) == 3 and all(value > floor + 10 for value in probe.values()), (floor, probe)
