"""The command line as a user meets it: every command of the README, wrong usage, broken input, and what is left on disk."""
import importlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import aug_study
import common
import linear_probe
from conftest import ROOT, TINY, run_script

SCRIPTS = ["bassl.py", "npid_distill.py"]


def make_tree(root, images=12, size=32):
    for split in ("train", "test"):
        for i in range(images):
            folder = root / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


def fails(status, words, *args, **options):
    code, stdout, stderr = run_script(*args, **options)
    assert code == status and re.search(words, stderr), (code, stderr)
    assert "Traceback" not in stderr and len(stderr.strip().splitlines()[-1]) < 600
    return stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_usage_is_one_line_and_status_2(script, tmp_path, capsys):
    out, module = tmp_path / "out", importlib.import_module(script.removesuffix(".py"))
    for words, flags in {
        "invalid choice: 'mnist'": ["--dataset", "mnist"],
        "not a folder.*--data": ["--dataset", "imagenet1k", "--data", str(tmp_path / "nowhere")],
        "--device cuda:7": ["--device", "cuda:7"],
        "unrecognized arguments: --epoch": ["--epoch", "3"],
        "--lr nan": ["--lr", "nan"],
        "--batch 1: want 2": ["--batch", "1"],
        "--size 3: want 0 or 8": ["--size", "3"],
        "--save-every 5": ["--save-every", "5"],
    }.items():
        with pytest.raises(SystemExit) as end, common.one_line_errors():
            module.train(common.parse(module.Config, "", [*TINY, *flags, "--out", str(out)]))
        errors = capsys.readouterr().err
        assert end.value.code == 2 and re.search(words, errors), (end.value.code, errors)
    fails(2, "--batch 64 is larger than the 48", script, *TINY, "--batch", "64", "--out", out)  # and so for who types it
    assert not out.exists()


def test_a_patch_that_does_not_divide_is_named_with_the_image(tmp_path):
    fails(2, "patch 5.*16", "bassl.py", *TINY, "--patch", "5", "--out", tmp_path)
    fails(2, "kernel 2", "bassl.py", *TINY, "--kernel", "2", "--out", tmp_path)


def test_broken_data_is_named_with_status_1(tmp_path):
    tree = make_tree(tmp_path / "tree")
    flags = [*TINY, "--dataset", "folder", "--batch", "4", "--size", "32", "--out", tmp_path / "out"]
    (tree / "train" / "a" / "broken.png").write_bytes(b"not a png")
    fails(1, "broken.png", "bassl.py", *flags, "--data", tree)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    fails(1, "no images", "bassl.py", *flags, "--data", tmp_path / "empty")
    assert not (tmp_path / "out").exists()


def test_a_failed_download_says_both_ways(tmp_path):
    stderr = fails(1, "download failed", "bassl.py", *TINY, "--dataset", "cifar10", "--data", tmp_path, "--out", tmp_path / "out",
                   env={"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"})
    assert "cifar10/{train,test}/<class>/*.png" in stderr and "--data" in stderr


def test_cifar_batches_that_are_not_the_published_ones_are_not_unpickled(tmp_path):
    trace, folder = tmp_path / "ran", tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
        (folder / name).write_bytes(b"cposix\nsystem\n(S'touch " + str(trace).encode() + b"'\ntR.")
    fails(1, "cifar10", "bassl.py", *TINY, "--dataset", "cifar10", "--data", tmp_path, "--out", tmp_path / "out",
          env={"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"})
    assert not trace.exists()


def test_a_diverged_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    out = tmp_path / "out"
    flags = [*TINY, "--framework", "byol", "--epochs", "20", "--lr", "1e25", "--save-every", "1steps", "--out", out]
    fails(1, r"(the loss is (nan|inf|-inf) at|parameters are not finite after) step \d+ \(lr .*--lr", "bassl.py", *flags)
    assert not (out / "backbone.pt").exists()
    for file in out.glob("checkpoint.*"):
        assert all(value.isfinite().all() for value in common.read_checkpoint(file)["model"].values())


def test_a_folder_of_another_run_is_refused_by_naming_the_keys(tiny_run):
    out = tiny_run("bassl.py")
    before = (out / "checkpoint.pt").read_bytes()
    stderr = fails(2, "seed \\(0, not 1\\)", "bassl.py", *TINY, "--seed", "1", "--temperature", "0.5", "--out", out)
    assert "temperature (0.0, not 0.5)" in stderr
    fails(2, "checkpoint of bassl, not of npid_distill", "npid_distill.py", *TINY, "--out", out)
    assert (out / "checkpoint.pt").read_bytes() == before
    code, stdout, _ = run_script("bassl.py", *TINY, "--out", out)                        # the same command again: nothing left to do
    assert code == 0 and "nothing left to do" in stdout and (out / "checkpoint.pt").read_bytes() == before


def test_damaged_checkpoints_give_way_to_the_one_before_or_a_clear_end(tmp_path):
    out = tmp_path / "out"
    assert run_script("bassl.py", *TINY, "--save-every", "1steps", "--out", out)[0] == 0
    whole = (out / "checkpoint.pt").read_bytes()
    (out / "checkpoint.pt").write_bytes(whole[:-100])
    code, stdout, stderr = run_script("bassl.py", *TINY, "--save-every", "1steps", "--out", out)
    assert code == 0 and "trying the one before" in stderr and "checkpoint.previous" in stdout
    for name in ("checkpoint.pt", "checkpoint.previous"):
        (out / name).write_bytes(b"PK\x03\x04 foreign")
    fails(1, "no checkpoint in .* can be read", "bassl.py", *TINY, "--save-every", "1steps", "--out", out)
    state = torch.load(io.BytesIO(whole), weights_only=True)
    for key in common.CHECKPOINT_KEYS:
        common.write_checkpoint(out / "checkpoint.pt", {k: v for k, v in state.items() if k != key})
        with pytest.raises(common.RunError, match=f"has no {key}"):
            resume_here(out)


def resume_here(out):
    """Only the part of a start that reads the checkpoint, so that each key costs no new process."""
    import bassl
    bassl.train(common.parse(bassl.Config, "", [*TINY, "--save-every", "1steps", "--out", str(out)]))


def test_two_runs_on_one_folder_are_refused_while_the_first_lives(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "bassl.py", *TINY, "--epochs", "1000", "--out", str(out)], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while not (out / "log.jsonl").exists():
            assert process.poll() is None
        fails(2, "alive", "bassl.py", *TINY, "--epochs", "1000", "--out", out)
    finally:
        process.kill()
        process.wait()
    assert run_script("bassl.py", *TINY, "--epochs", "1", "--out", tmp_path / "other")[0] == 0  # and a lock left behind blocks nobody
    assert run_script("bassl.py", *TINY, "--out", out)[0] == 2                                   # another configuration, said as such


@pytest.mark.parametrize("script", SCRIPTS)
def test_preview_draws_and_stops(script, tmp_path):
    code, stdout, stderr = run_script(script, *TINY, "--preview", "--out", tmp_path)
    assert code == 0 and "preview.png" in stdout, stderr
    assert Image.open(tmp_path / "preview.png").size[0] >= 4 * 16 and not (tmp_path / "checkpoint.pt").exists()


def readme_commands():
    """Every `python script.py ...` and `make ...` line of the README's code blocks."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = [line.split("  #")[0].strip() for language, block in blocks if language == "sh" for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"(python|make|torchrun) ", line)]


def test_every_result_line_of_the_readme_comes_from_committed_rows():
    files = sorted((ROOT / "results").glob("*.jsonl"))
    made = {line for file in files for line in linear_probe.tables(linear_probe.read_rows([str(file)])).splitlines()}
    shown = [line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| (bassl|npid_distill|aug_study|random) ", line)]
    assert shown and not [line for line in shown if line not in made]
    for file in files:
        assert all(row["command"] or row["probe_command"] for row in linear_probe.read_rows([str(file)]))


def test_every_table_of_a_study_in_the_readme_is_made_from_committed_rows():
    """The grid, the effects and the speeds, line by line."""
    readme = (ROOT / "README.md").read_text().splitlines()
    files = sorted((ROOT / "results").glob("*-study.jsonl"))
    assert files
    for file in files:
        rows, accuracy, rates = linear_probe.read_rows([str(file)]), {}, {}
        for row in rows:
            method, aug, predictor, momentum = re.fullmatch(r"(\w+), (\S+) views(?:, predictor (\w+))?(?:, momentum (\w+))?", row["variant"]).groups("default")
            key = aug_study.states(aug_study.Cell(method, aug, row["arch"], predictor, momentum)), row["seed"]
            accuracy[key], rates[key] = row["probe_top1"], row["images_per_s"]
        cfg = common.parse(aug_study.Config, "", shlex.split(rows[0]["command"])[2:])
        table = [line for line in aug_study.report(cfg, accuracy, rates, []).splitlines() if line]
        assert table and not [line for line in table if line not in readme]


def test_every_table_of_the_bench_in_the_readme_is_made_from_committed_rows():
    """Its columns are keys of the rows, and each of its lines shows one row."""
    tables = re.findall(r"^\| .*\n\|-.*\n(?:\|.*\n)+", (ROOT / "README.md").read_text(), re.M)
    cells = [[[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()] for table in tables]
    files = {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in (ROOT / "results" / "bench").glob("*.jsonl")}
    seen = set()
    for head, _, *lines in cells:
        if any(set(head) <= set(row) for rows in files.values() for row in rows):
            source = {tuple(str(row.get(key, "")) for key in head): name for name, rows in files.items() for row in rows}
            assert not [line for line in lines if tuple(line) not in source]
            seen |= {source[tuple(line)] for line in lines}
    assert seen == set(files)


SHORT = ["--dataset", "shapes", "--device", "cpu", "--size", "16", "--arch", "resnet10", "--stem", "imagenet"]


@pytest.mark.parametrize("command", readme_commands())
def test_a_command_of_the_readme_runs_shortened_by_its_own_flags(command, tmp_path, tiny_backbone, monkeypatch):
    words = shlex.split(command)
    if words[0] == "make":
        done = subprocess.run([*words, "--dry-run", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, done.stderr
        for line in done.stdout.splitlines():                                            # what make would run is well-formed too
            if match := re.match(r"\S*python\S* (bassl|npid_distill|aug_study)\.py (.*)", line):
                module = importlib.import_module(match[1])
                common.parse(module.Config, "", shlex.split(match[2].split(" > ")[0]))
        return
    processes = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if words[0] == "torchrun" else []
    script, flags = [word for word in words[1:] if word.endswith(".py")][0], words[(3 if processes else 2):]
    if script == "linear_probe.py" and "--table" in flags:
        flags = ["--table", tiny_backbone.parent / "results.jsonl"]
    elif script == "linear_probe.py":
        there = {"--backbone": tiny_backbone, "--neighbours": tmp_path / "n.png"}
        flags = [there.get(before, flag) for before, flag in zip(["", *flags], flags)]
        flags += [*SHORT, "--epochs", "0", "--fraction", "0.02", "--out", tmp_path]
    elif "--study" in flags:
        flags += [*SHORT, "--limit", "24", "--batch", "8", "--epochs", "1", "--methods", "simclr", "--augs", "simclr", "--seeds", "0", "--probe-fraction", "0.02",
                  "--out", tmp_path / "out"]
    else:
        flags += [*SHORT, "--limit", "24", "--batch", "8", "--epochs", "1", "--out", tmp_path / "out"]
    if processes:
        code, _, stderr = run_script(*processes, script, *flags)
        assert code == 0, stderr
    else:  # the file as it is started, in this process, which has imported torch already
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_the_readmes_ninth_method_trains(tmp_path, monkeypatch):
    import aug_study

    code = re.search(r"```python\n(def uniform_loss.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.setattr(aug_study, "METHODS", dict(aug_study.METHODS))
    exec(code, vars(aug_study))
    aug_study.train(common.parse(aug_study.Config, "", [*TINY, "--methods", "uniform", "--augs", "multicrop", "--size", "32", "--out", str(tmp_path)]))
    assert (tmp_path / "backbone.pt").exists()


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "run"
    assert run_script("bassl.py", *TINY, "--out", out)[0] == 0
    assert run_script("linear_probe.py", "--backbone", out / "backbone.pt", "--size", "16", "--epochs", "0", "--fraction", "0.02", "--device", "cpu")[0] == 0
    return out / "backbone.pt"


def test_make_runs_a_product_once(tmp_path):
    for name in os.listdir(ROOT):
        if name.endswith(".py") or name == "Makefile":
            shutil.copy(ROOT / name, tmp_path)
    call = ["make", "table", f"PYTHON={sys.executable}", "LIMIT=32", "EPOCHS=1", "BATCH=16", "ARCH=resnet10", "STEM=imagenet", "DEVICE=cpu",
            "ARGS=--size 16 --knn-every 0", "NPID=--dim 16", "PROBE=--size 16 --epochs 0 --fraction 0.02"]
    env = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    first = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert first.returncode == 0, first.stderr
    assert "| random" in first.stdout and "knn_top1" in first.stdout and first.stdout.count("| bassl") == 2 and first.stdout.count("| npid_distill") == 1
    again = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert again.returncode == 0 and ".py" not in again.stdout.replace("linear_probe.py --table", "")
