"""Rows to tables: paired effects by hand, seeds, the control, published numbers, the committed page."""
import json
import math
import shutil
import statistics
import subprocess
import sys

import pytest

from conftest import ROOT

sys.path.append(str(ROOT / "results"))
import tables  # noqa: E402


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
    assert tables.interval([]) == "" and tables.interval([-1.0]) == "-1.0"


def test_a_partner_is_the_run_of_the_fewest_other_flags_then_of_the_nearest_minutes():
    rows = [row(variant="moco", epochs=e, minutes=m, probe_top1=v)
            for e, m, v in ((9, 12.0, 50), (17, 23.0, 60))]
    npid = dict(method="npid_distill", variant="NPID + calibration")
    rows += [row(**npid, epochs=e, minutes=m, probe_top1=v) for e, m, v in ((22, 15.0, 51), (32, 22.0, 58))]
    effects = [line["effect on probe"] for line in cells(tables.table(rows)) if line["variant"] != "moco"]
    assert effects == ["+1.0", "-2.0"], "NPID as a whole stands against MoCo v2"
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


def test_published_numbers_stand_in_italics_below_and_wrong_files_are_named(tmp_path, capsys):
    lines = cells(tables.table([row(dataset="cifar10", linear_top1=60.0)]))
    assert lines[0]["images/s"] == "3", "100 images twice in a minute"
    assert lines[0]["linear"] == "60.0" and "*90.74*" in [line["linear"] for line in lines[1:]]
    for text in ("{", "[1]", "{}"):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(SystemExit) as end:
            tables.main(["--rows", str(tmp_path / "rows.jsonl")])
        assert "rows.jsonl holds no result rows" in capsys.readouterr().err + str(end.value.code)


@pytest.mark.skipif(not (ROOT / "results" / "README.md").exists(), reason="there is no results/README.md")
def test_the_committed_page_of_results_is_what_its_rows_say(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    monkeypatch.setattr(tables, "HERE", tmp_path / "results")
    tables.main(["--readme"])
    pages = [(folder / "results" / "README.md").read_text() for folder in (tmp_path, ROOT)]
    assert pages[0] == pages[1]


def test_every_committed_row_names_scripts_that_the_history_holds(tmp_path):
    shallow = ["git", "rev-parse", "--is-shallow-repository"]
    if subprocess.run(shallow, cwd=ROOT, capture_output=True, text=True).stdout.strip() != "false":
        pytest.skip("no whole history here")
    assert tables.missing_blobs(sorted((ROOT / "results").glob("**/*.jsonl"))) == []
    (tmp_path / "rows.jsonl").write_text(json.dumps({"method": "m", "blobs": {"common.py": "0" * 40}}))
    assert tables.missing_blobs([tmp_path / "rows.jsonl"]) == ["rows.jsonl: m "]
