"""Result rows -> Markdown tables, beside the published numbers. Every table of this repo is made here.

    python results/tables.py NAME            # the rows below runs/NAME -> results/NAME.jsonl and a table
    python results/tables.py --rows FILE...  # print the table of these results.jsonl files
    python results/tables.py --check         # every committed row's scripts are in the history, as they were
    python results/tables.py --readme        # write results/README.md from the committed rows

A line is one run, or runs that differ in the seed alone: mean ± standard deviation. `effect` is the mean of
the differences to the line it is paired with, seed by seed, with a 95 % interval (Student's t over seeds).
"""
import json
import math
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent

# Name of results/NAME.sh -> title, a sentence, the variant that `effect` is measured against ("" = none).
TABLES = {
    "demo": ("The demo",
             "`make demo`: the small recipe on `shapes`, one seed; a check that all works, no ranking.",
             ""),
}

SOLO = "ResNet-18, 1000 epochs, online probe (solo-learn)"
LIGHTLY = "ResNet-18, 200 epochs, batch 512 (lightly)"
CAO = "ResNet-18, 200 epochs (arXiv 2404.19289)"
BASSL = "as published (arXiv 2311.09974)"
# Published numbers: data set -> (method, what, metric, percent)
PUBLISHED = {
    "cifar10": [
        *[("simclr", SOLO, "linear_top1", 90.74), ("moco v2+", SOLO, "linear_top1", 92.94)],
        *[("byol", SOLO, "linear_top1", 92.58), ("simsiam", SOLO, "linear_top1", 90.51)],
        *[("swav", SOLO, "linear_top1", 89.17), ("barlow", SOLO, "linear_top1", 92.10)],
        *[("vicreg", SOLO, "linear_top1", 92.07), ("dino", SOLO, "linear_top1", 89.52)],
        *[("simclr", LIGHTLY, "knn_top1", 84.8), ("moco", LIGHTLY, "knn_top1", 84.7)],
        *[("byol", LIGHTLY, "knn_top1", 86.8), ("simsiam", LIGHTLY, "knn_top1", 76.4)],
        *[("swav", LIGHTLY, "knn_top1", 84.2), ("barlow", LIGHTLY, "knn_top1", 81.9)],
        *[("dino", LIGHTLY, "knn_top1", 81.3), ("bassl", BASSL, "linear_top1", 92.12)],
    ],
    "cifar100": [
        *[("simclr", SOLO, "linear_top1", 65.78), ("moco v2+", SOLO, "linear_top1", 69.89)],
        *[("byol", SOLO, "linear_top1", 70.46), ("simsiam", SOLO, "linear_top1", 66.04)],
        *[("swav", SOLO, "linear_top1", 64.88), ("barlow", SOLO, "linear_top1", 70.90)],
        *[("vicreg", SOLO, "linear_top1", 68.54), ("dino", SOLO, "linear_top1", 66.76)],
        *[("npid_distill", CAO, "linear_top1", 67.9), ("moco v2", CAO, "linear_top1", 62.5)],
        ("bassl", BASSL, "linear_top1", 66.53),
    ],
    "tinyimagenet": [("npid_distill", CAO, "linear_top1", 39.7), ("moco v2", CAO, "linear_top1", 35.8)],
    "imagenet100": [("simclr", "ResNet-18, 400 epochs, online probe (solo-learn)", "linear_top1", 77.64)],
    "imagenet1k": [("bassl", BASSL, "linear_top1", 59.41)],
}
METRICS = {"knn_top1": "kNN", "knn20_top1": "kNN, k 20", "probe_top1": "probe", "linear_top1": "linear"}
# Rows that agree in these are one line of a table.
LINE = ("dataset", "pretrained_on", "method", "variant", "arch", "stem", "view", "images", "epochs", "batch",
        "effective_lr", "split", "fraction", "device")
T_975 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # Student's t, 97.5 %, by degrees of freedom


def read_rows(paths: list[pathlib.Path]) -> list[dict]:
    """The rows of .jsonl files; exits with status 2 where one is missing or holds something else."""
    rows = []
    for path in paths:
        try:
            found = [json.loads(line) for line in path.read_text().splitlines()]
            rows += [{**row, "view": row.get("config", {}).get("view")} for row in found if row["dataset"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"tables.py: error: {path} holds no result rows ({error})")
    return rows


def group(rows: list[dict], keys: tuple) -> dict[tuple, list[dict]]:
    """Rows by their values of keys, in the order in which they come."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups


def spread(values: list[float], digits: int = 1) -> str:
    """Mean, with ± the standard deviation where there are several."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def interval(differences: list[float]) -> str:
    """Mean of paired differences with the half width of its 95 % interval; without one for a single pair."""
    if not differences:
        return ""
    text = f"{statistics.mean(differences):+.1f}"
    if len(differences) > 1:
        t = T_975[min(len(differences) - 2, len(T_975) - 1)]
        text += f" ± {t * statistics.stdev(differences) / math.sqrt(len(differences)):.1f}"
    return text


def markdown(lines: list[dict]) -> str:
    """A Markdown table, padded so that it reads in a terminal too; columns without a value are left out."""
    head = [name for name in dict.fromkeys(name for line in lines for name in line)
            if any(line.get(name) not in (None, "") for line in lines)]
    cells = [head] + [[str(line.get(name, "") or "") for name in head] for line in lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in cells]
    head, *body = ["| " + " | ".join(line) + " |" for line in padded]
    return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])


def table(rows: list[dict], against: str = "", published: bool = True) -> str:
    """One Markdown table a data set, its published numbers in italics below."""
    text = []
    for (dataset,), part in group(rows, ("dataset",)).items():
        settings = tuple(key for key in LINE if key not in ("method", "variant"))
        base = {(*key, row["seed"]): row for key, same in group(part, settings).items()
                for row in same if row["variant"] == against}
        lines = []
        for key, same in group(part, LINE).items():
            row = same[0]
            shown = ("method", "variant", "images", "epochs", "batch", "fraction")
            line = {name: row.get(name) for name in shown}
            line["fraction"] = "" if row["fraction"] == 1 else f"{row['fraction']:.0%} of labels"
            line["network"] = row["arch"] + ("" if row["view"] is None else f", {row['view']} px views")
            if row["split"] != "test":
                line["variant"] += f" ({row['split']} split)"
            if row.get("pretrained_on") not in (None, dataset):
                line["variant"] += f" (pretrained on {row['pretrained_on']})"
            line["seeds"] = " ".join(str(r["seed"]) for r in same)
            line["gates"] = " ".join(f"{gate:.3f}" for gate in row.get("gates", []))
            if row["variant"].startswith("simclr") and "unpaired" in row["variant"]:  # no use with a queue
                line["loss (chance)"] = f"{row['train_loss']:.2f} ({math.log(2 * row['batch'] - 1):.2f})"
            line |= {name: spread([r.get(metric) for r in same]) for metric, name in METRICS.items()}
            if against and row["variant"] != against:
                pairs = [(r, base.get((*(r.get(key) for key in settings), r["seed"]))) for r in same]
                line["effect on probe"] = interval([r["probe_top1"] - b["probe_top1"] for r, b in pairs if b])
            line["minutes"] = spread([r.get("minutes") for r in same])
            line["images/s"] = spread([r.get("images_per_s") for r in same], 0)
            lines.append(line)
        for method, what, metric, value in PUBLISHED.get(dataset, []) * published:
            line = {"method": method, "variant": f"*published: {what}*", METRICS[metric]: f"*{value:g}*"}
            lines.append(line)
        text += [f"**{dataset}**", "", markdown(lines), ""]
    return "\n".join(text)


def missing_blobs(paths: list[pathlib.Path]) -> list[str]:
    """Rows whose scripts are not in this repository's history as they were, as "file: method variant"."""
    listing = subprocess.run(["git", "rev-list", "--objects", "--no-object-names", "HEAD"], cwd=ROOT,
                             capture_output=True, text=True, check=True)
    there, bad = set(listing.stdout.split()), []
    for path in paths:
        for row in map(json.loads, path.read_text().splitlines()):
            blobs = {*row.get("blobs", {}).values(), *row.get("probe_blobs", {}).values()}
            if not row.get("blobs") or not blobs <= there:
                bad.append(f"{path.name}: {row.get('method', row.get('step', ''))} {row.get('variant', '')}")
    return bad


def write_readme() -> None:
    """results/README.md: every table with its sentence and the command that makes it."""
    text = ["# Results", "",
            "Written by `python results/tables.py --readme` from the rows beside this page. A row names its "
            "command, commit, device and the hashes of the scripts that made it.", "",
            "Reduced runs (fewer images, epochs or pixels than the papers') are compared with each other "
            "alone; published numbers stand in italics for scale.", ""]
    for name, (title, sentence, against) in TABLES.items():
        path = HERE / f"{name}.jsonl"
        if path.exists():
            rows = read_rows([path])
            text += [f"## {title}", "", sentence, ""]
            text += [f"`make {name}`; {rows[-1]['device']}.", "", table(rows, against)]
    for path in sorted((HERE / "bench").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        hidden = ("sha", "torch", "command", "device", "precision", "blobs")
        shown = [{key: value for key, value in row.items()
                  if key not in hidden and not isinstance(value, (dict, list))} for row in rows]
        first = rows[0]
        text += [f"## Bench: {path.stem}", ""]
        text += [f"`{first['command']}`; {first['device']}, {first['precision']}.", "", markdown(shown), ""]
    (HERE / "README.md").write_text("\n".join(text))
    print(f"wrote {HERE / 'README.md'}")


def main(argv: list[str]) -> None:
    if argv[:1] == ["--rows"] and argv[1:]:
        print(table(read_rows([pathlib.Path(path) for path in argv[1:]])))
    elif argv == ["--check"]:
        bad = missing_blobs(sorted(HERE.glob("**/*.jsonl")))
        sys.exit("rows of scripts that the history does not hold:\n" + "\n".join(bad) if bad else 0)
    elif argv == ["--readme"]:
        write_readme()
    elif len(argv) == 1 and argv[0] in TABLES:
        paths = sorted(pathlib.Path("runs", argv[0]).glob("**/results.jsonl"))
        rows = [line for path in paths for line in path.read_text().splitlines()]
        if not rows:
            sys.exit(f"tables.py: error: no results.jsonl below runs/{argv[0]}")
        (HERE / f"{argv[0]}.jsonl").write_text("\n".join(rows) + "\n")
        print(table(read_rows([HERE / f"{argv[0]}.jsonl"]), TABLES[argv[0]][2]))
    else:
        sys.exit(f"{__doc__}\nNAME is one of {', '.join(TABLES)}")


if __name__ == "__main__":
    main(sys.argv[1:])
