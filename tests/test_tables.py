"""Rows to tables: paired effects by hand, seeds, the control, published numbers, the committed page."""
import json
import math
import shutil
import statistics
import subprocess

import pytest

import tables
from conftest import ROOT


def row(**other):
    base = dict(dataset="shapes", pretrained_on="shapes", method="bassl", variant="simclr", arch="resnet10")
    base |= dict(stem="cifar", view=16, images=100, epochs=2, batch=64, effective_lr=0.1, split="test")
    return base | dict(seed=0, fraction=1.0, device="x", minutes=1.0, train_loss=3.0, config={}) | other


def cells(text):
    """The lines of a Markdown table as dicts."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    head, _, *lines = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(head, line)) for line in lines]


def test_an_effect_is_the_mean_of_differences_within_a_seed_and_its_interval_students():
    plain = {0: 50.0, 1: 60.0, 2: 40.0, 3: 1.0}
    fused = {0: 52.0, 1: 61.0, 2: 45.0, 4: 99.0}  # seeds 3 and 4 have no partner
    rows = [row(seed=s, probe_top1=v) for s, v in plain.items()]
    rows += [row(seed=s, probe_top1=v, variant="simclr + fused") for s, v in fused.items()]
    rows += [row(seed=s, probe_top1=0.0, batch=32) for s in plain]  # another setting: no partner either
    [line] = [line for line in cells(tables.table(rows)) if line["variant"] == "simclr + fused"]
    # of 2, 1 and 5: Student's t of 2 degrees of freedom is 4.303
    half = 4.303 * statistics.stdev([2, 1, 5]) / math.sqrt(3)
    assert [float(x) for x in line["effect on probe"].split(" ± ")] == pytest.approx([8 / 3, half], abs=0.06)
    assert tables.points([]) == "" and tables.points([-1.0]) == "-1.0" and tables.points([-0.01]) == "+0.0"


def test_a_partner_is_the_run_of_the_fewest_other_flags_then_of_the_nearest_minutes():
    rows = [row(variant="moco", epochs=e, minutes=m, probe_top1=v)
            for e, m, v in ((9, 12.0, 50), (17, 23.0, 60))]
    npid = dict(method="npid_distill", variant="NPID + calibration")
    rows += [row(**npid, epochs=e, minutes=m, probe_top1=v) for e, m, v in ((22, 15.0, 51), (32, 22.0, 58))]
    rows += [row(method="random", variant="untrained", probe_top1=30), row(seed=1, probe_top1=99)]
    lines = cells(tables.comparison(rows, ("dataset",)))
    assert [line["over moco"] for line in lines] == ["-10.0", "+10.0", "+1.0", "-2.0"], "whole methods"
    assert [line["over untrained"] for line in lines] == ["+20.0", "+30.0", "+21.0", "+28.0"]
    rows = [row(variant="NPID", config={"momentum": m, "kl": 0}, minutes=9 * m, probe_top1=v)
            for m, v in ((0.2, 40), (0.5, 50))]
    rows.append(row(variant="NPID + kl", config={"momentum": 0.5, "kl": 1}, minutes=1.8, probe_top1=53))
    assert cells(tables.table(rows))[-1]["effect on probe"] == "+3.0", "one other flag, not two"


def test_a_line_has_the_mean_of_its_seeds_and_the_flags_that_differ_and_the_control_its_loss():
    rows = [row(seed=s, knn_top1=v) for s, v in ((0, 40.0), (1, 50.0))]
    rows += [row(variant="simclr + fusion (one), unpaired", train_loss=4.5), row(variant="moco, unpaired")]
    both, control, moco = cells(tables.table(rows))
    assert (both["seeds"], both["kNN"], both["loss (chance)"]) == ("0 1", "45.0 ± 7.1", "")
    assert control["loss (chance)"] == f"4.50 ({math.log(2 * 64 - 1):.2f})" and moco["loss (chance)"] == ""
    assert len(cells(tables.table([row(), row(epochs=3), row(split="held-out")]))) == 3
    rows = [row(effective_lr=lr, config={"lr": lr, "wd": 0.1, "seed": n}) for n, lr in enumerate((0.1, 0.2))]
    assert [line["flags"] for line in cells(tables.table(rows))] == ["--lr 0.1", "--lr 0.2"]


def test_probes_of_one_run_are_no_seeds_and_another_folder_is_another_set():
    rows = [row(seed=s, variant=v, probe_seed=p, probe_top1=10.0 * s + p + len(v))
            for v in ("simclr", "simclr + fused") for p in (0, 1) for s in (0, 1)]
    lines = cells(tables.table(rows))
    assert [line["seeds"] for line in lines] == ["0 1"] * 4
    assert [line["probe"][:4] for line in lines] == ["11.0", "12.0", "19.0", "20.0"]
    assert [line["effect on probe"] for line in lines] == ["", "", "+8.0 ± 0.0", "+8.0 ± 0.0"]
    rows = [row(seed=s, probe_lr=lr, probe_top1=10 * lr) for s, lr in ((0, 1), (0, 2), (1, 2), (1, 1))]
    assert [line["probe"] for line in cells(tables.table(rows))] == ["10.0 ± 0.0", "20.0 ± 0.0"]
    rows = [row(dataset="folder", probe_data=name, probe_top1=50.0) for name in ("birds", "flowers")]
    assert [line["seeds"] for line in cells(tables.table(rows[:1]))] == ["0"]
    text = tables.table(rows)
    assert "**folder birds**" in text and "**folder flowers**" in text and "±" not in text


def test_published_numbers_stand_in_italics_below_and_wrong_files_are_named(tmp_path, capsys):
    rows = [row(dataset="cifar10", linear_top1=60.0)]
    lines = cells(tables.table(rows, published=True))
    assert lines[0]["images/s"] == "3", "100 images twice in a minute"
    assert lines[0]["linear"] == "60.0" and "*90.74*" in [line["linear"] for line in lines[1:]]
    [lightly] = [line for line in lines if "lightly" in line["variant"]]
    assert (lightly["kNN"], lightly["minutes"]) == ("*84.8*", "*87*") and len(cells(tables.table(rows))) == 1
    for text in ("{", "[1]", "{}"):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(SystemExit) as end:
            tables.main(["--rows", str(tmp_path / "rows.jsonl")])
        assert "rows.jsonl holds no result rows" in capsys.readouterr().err + str(end.value.code)


def study_row(seed, value, method="simclr", augs="", arch="resnet10", **other):
    flags = {"predictor": other.pop("predictor", "default"), "momentum": other.pop("momentum", "default")}
    config = {"methods": method, "augs": augs, "arch": arch, **flags}
    return row(seed=seed, probe_top1=value, arch=arch, config=config, **other)


def test_effects_are_means_over_pairs_and_a_cell_without_a_partner_has_no_part():
    cells = [  # what each differs in from the base, and by how many points
        ({}, 0), ({"augs": "byol"}, 2), ({"augs": "multicrop"}, -1.5), ({"momentum": "on"}, 0.75),
        ({"predictor": "on"}, 0.25), ({"arch": "resnet18", "effective_lr": 0.2}, 3),
        ({"arch": "resnet18", "augs": "byol"}, 7), ({"method": "byol", "augs": "simclr"}, 4.75)]
    rows = [study_row(seed, 50 + seed + points, **changes) for seed in (0, 1) for changes, points in cells]
    rows.append(study_row(2, 1000, augs="byol"))  # no other cell of its seed
    want = {
        "BYOL's augmentations over SimCLR's": (3, 2), "multi-crop over SimCLR's augmentations": (-1.5, 1),
        "momentum target on": (0.75, 1), "predictor on": (0.25, 1), "byol over simclr": (4.75, 1),
        "larger backbone: resnet18 over resnet10": (4, 2),
    }
    found = {line["factor"]: (line["per_seed"], line["pairs"]) for line in tables.effects(rows)}
    assert found == {factor: ([points, points], pairs) for factor, (points, pairs) in want.items()}


@pytest.mark.parametrize("change", [
    dict(dataset="cifar100"), dict(pretrained_on="cifar100"), dict(images=50), dict(epochs=3), dict(batch=32),
    dict(fraction=0.1), dict(view=32), dict(stem="imagenet"), dict(device="y"), dict(precision="bf16"),
    dict(probe_precision="bf16")], ids=str)
def test_no_effect_is_made_of_runs_of_other_settings(change):
    assert len(tables.effects([study_row(0, 60), study_row(0, 20, method="moco")])) == 1
    assert tables.effects([study_row(0, 60), study_row(0, 20, method="moco", **change)]) == []


def test_the_effects_of_a_file_of_rows_are_a_table_and_of_another_file_an_error(tmp_path, capsys):
    study = tmp_path / "study.jsonl"
    rows = [study_row(seed, value, augs=augs) for augs, seed, value in
            (("", 0, 60), ("", 1, 62), ("byol", 0, 63), ("byol", 1, 64.0))]
    study.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables.main(["--effects", str(study)])
    # of 3 and 2: t of one degree of freedom is 12.71, the deviation over the root of 2 is a half
    [line] = cells(capsys.readouterr().out)
    assert [*line.values()] == ["BYOL's augmentations over SimCLR's", "+2.5 ± 6.4", "1 x 2", "+2.3"]
    twice = f"{json.dumps(rows[0])}\n{json.dumps(rows[0])}"
    for text in ("words", '{"seed": 0}', json.dumps(rows[0] | {"config": {"framework": "simclr"}}), twice):
        study.write_text(text)
        with pytest.raises(SystemExit) as end:
            tables.main(["--effects", str(study)])
        assert end.value.code == 2 and "study.jsonl" in capsys.readouterr().err


def test_the_committed_page_of_results_is_what_its_rows_say(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    monkeypatch.setattr(tables, "HERE", tmp_path / "results")
    tables.main(["--readme"])
    pages = [(folder / "results" / "README.md").read_text() for folder in (tmp_path, ROOT)]
    assert pages[0] == pages[1]


def test_every_committed_row_names_a_clean_commit_of_this_history(tmp_path):
    shallow = ["git", "rev-parse", "--is-shallow-repository"]
    if subprocess.run(shallow, cwd=ROOT, capture_output=True, text=True).stdout.strip() != "false":
        pytest.skip("no whole history here")
    assert tables.unknown_commits(sorted((ROOT / "results").glob("**/*.jsonl"))) == []
    head = subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, text=True).strip()
    for made in ({"sha": "0" * 12}, {"sha": f"{head}-dirty"}, {"sha": head, "probe_sha": "unknown"}, {}):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"method": "m"} | made))
        assert tables.unknown_commits([tmp_path / "rows.jsonl"]) == ["rows.jsonl: m "]
