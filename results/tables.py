"""Result rows -> Markdown tables. Every table of this repo is made here.

    python results/tables.py NAME            # the rows below runs/NAME -> results/NAME.jsonl and a table
    python results/tables.py NAME FOLDER...  # the same of the rows below these folders
    python results/tables.py --rows FILE...  # print the table of these results.jsonl files
    python results/tables.py --effects FILE  # the main effects that the rows of a study tell
    python results/tables.py --check         # every committed row names a clean commit of this history
    python results/tables.py --readme        # write results/README.md from the committed rows

A row is one probe of one run. A line is one run, or runs that differ in the seed alone: mean ± standard
deviation. Differences are means over seeds, each within a seed, with a 95 % interval (Student's t):
`effect on probe` where the variant is something + a term, of "A + B + C" to "A + B", at the same settings;
`over NAME` to the nearest run of that method or of the untrained network that agrees in COMPARED.
"""
import dataclasses
import itertools
import json
import math
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.append(str(ROOT))

# Name of results/NAME.sh, or a data set's make target -> title, what the table shows and what it can't.
TABLES = {
    "shapes": ("The demo", "The small recipe on drawn shapes, one seed: a check that all works, no ranking."),
    "cifar10": ("CIFAR-10 on a laptop", """
The small recipe on CIFAR-10, one seed: what `make cifar10` ends in, no ranking; and SimCLR for twice as long,
`python bassl.py --dataset cifar10 --layers 0 --epochs 8`."""),
    "tried": ("What was tried for the small recipe", """
On training images held out of the probe. Lines with 5 % of the labels have one seed, which can't rank what
lies within a point or two: multi-crop gave SimCLR +0.4 of probe for three times the minutes; batch 64,
temperature 0.1 and a warm-up lost 0.9 to 3.3 (and gained 0.1 to 1.7 of kNN); at 51,200 images seen NPID
learned more from few of them seen often. With three seeds and 100,000 seen SimCLR at half the rate is at
+0.2 ± 1.8 of probe, and NPID's 10,240 images ten times at -0.9 ± 0.9 of 5,120 twenty times, twice the rate
at -1.0 ± 2.2: nothing changed a default. Temperature 0.1, with two seeds, gains 1.0 to 1.3 of kNN and -0.4
and +1.4 of probe."""),
    "rates": ("Rates of the small recipe", "64 steps a method (NPID 120), on held-out images; one seed: "
              "enough to leave out rates that are far off."),
    "methods": ("Methods", """
The small recipe on CIFAR-10, and on CIFAR-100 with a quarter of the images and a probe on a tenth of the
labels. NPID sees 5,120 images, as often as its minutes allow. CPU-core minutes on CIFAR-10, the least of
three: 10 to 11, MoCo v2 and BYOL 15 to 16; other work shared the core in the others. It shows which methods
learn first; at these minutes nothing of the papers' rankings is to be expected."""),
    "long": ("Forty-five CPU-core minutes", """
The small recipe on CIFAR-10 with 15 epochs (MoCo v2 and BYOL 12; NPID 22,528 images 48 times), two runs side
by side on two cores. With both seeds SimCLR and BA-SSL lead from the first epoch on, over minutes and over
images; two seeds can't tell them apart: SimCLR is above at 12 of the 15 epochs and at 8, over minutes most of
the time with seed 0 alone. NPID stays below MoCo v2's curve over images, as far as that goes; over minutes it
ends 2.2 below it with seed 0 and passes it in minute 39 with seed 1. An online kNN is of 1,000 images
(± 1.6), NPID's of other ones, so that these two aren't told apart either: on the test images NPID's probe is
0.5 and 1.1 below MoCo v2's, its kNN 0.1 and 0.6 above. BYOL leaves the untrained network (36.9 and 45.8 in
the table of methods) by 6 and 12 points of kNN and by 8 and 16 of probe; its seeds are 7 points of probe
apart, the others' half a point at most. Minutes of one method differ between seeds by up to a fifth."""),
    "bassl-look": ("Which fusion by default", """
On held-out training images. The default was chosen here, by two of its five seeds: +0.5 ± 1.2 over five, but
-0.1 ± 1.7 over the three that had no say in it; the adversary +0.2 ± 1.2. Four more kinds, which bassl.py
no longer has and which stand in the commit of their rows, had two seeds and no better mean over these."""),
    "bassl-batch": ("BA-SSL over batch size", """
One view fused at a held gate against the plain framework, 10,000 images five times: ten seeds on an EPYC,
three of them on a Xeon too. The paper's gain at small batches was not found: every interval of the probe's
effect has zero in it. Runs of minutes can't show what 1,000 epochs would, and few seeds mislead: the EPYC's
first five alone had +0.7 ± 0.4 at batch 128, and the same run with the same seed is up to 1.7 points of
probe better or worse on the other processor."""),
    "bassl-fusion": ("Kinds of fusion", """
Real pairs: four kinds of one, two and three layers, none better than the plain framework by its interval;
5,000 images five times can't show what a longer run would. Unpaired ones with an open gate, where only a
shortcut can help: the loss of `plain` leaves chance, that of the others stays."""),
    "bassl-plug": ("BA-SSL in front of other frameworks", """
No gain of probe was found (published: up to +1.25 on ImageNet-100). For BYOL and SimSiam so short a run can't
show one, as they have hardly left the untrained network (in the table of methods): BYOL's kNN, +0.4 ± 0.2
with the fusion, is below that network's; SimSiam's is at -0.8 ± 0.7."""),
    "npid-terms": ("NPID, term by term", """
Each line adds one term to the line above it, 5,120 images eight times. Calibration helps; for the other terms
no difference of probe was found (the gradient update has +1.7 ± 1.3 of kNN with 20 neighbours). With the
distillation, at the official weight of 20, the loss that it is a part of is 0.6 to 2.3 % higher: a run this
short can't show what the term does later."""),
    "npid-scale": ("How strong NPID's terms are", """
The bank's momentum and the distillation's weight around their defaults, on held-out images: a weight of 400
and a tempered term lose six points of probe or more in the mean; the wide intervals of two seeds can't tell
the others' probes apart."""),
    "npid-moco": ("NPID against MoCo v2", """
Over shares of the images and over networks, three to six minutes each; `over moco` is on as many images. NPID
had 16 to 32 % more of the minutes from 12,500 images on, and a tenth less in the larger networks. By the
probe the means favour it with few images, most in the ResNet-34, and no interval leaves out zero; by kNN it
is 1.2 to 4.8 points below from 12,500 images on. Minutes can't show what the paper's 200 epochs would."""),
    "published": ("Full size", """
The recipes of the papers and peers, one seed; rows are added as a GPU is at hand. NPID is 3.2 points of probe
(L-BFGS) above MoCo v2 in three fifths of its time (published, by the papers' classifier: 5.4 in half of it);
by kNN it is 1.1 below with 200 neighbours and 0.8 above with 20. One seed can't show whether it repeats."""),
    "study": ("The study", """
Augmentations against algorithms: every cell, and the main effects below. 12,500 images of CIFAR-10 twice (2
to 3 CPU-core minutes; multi-crop and ResNet-18 4 to 7), a probe by a tenth of the labels. In so short a run
methods and networks are further apart than augmentations, the smaller network ahead; of the published effects
none shows, and two epochs can't tell whether a long run has them. The predictor's cost is SimCLR's (-3.1 ±
3.3; BYOL's -0.3 ± 4.7), and the momentum target's 0.0 is SimCLR's -1.5 ± 3.0 and BYOL's +1.5 ± 5.4."""),
}

TUNING = ("tried", "rates", "bassl-look", "npid-scale")  # below one heading, at the end of the page

# Published numbers: (source, metric) -> data set -> percent, or minutes, by method.
PUBLISHED = {
    ("ResNet-18, 1 epoch (EMP-SSL, arXiv 2304.03977)", "linear_top1"): {
        "cifar10": {"simclr": 28.2, "byol": 24.9, "vicreg": 40.6}},
    ("ResNet-18, 10 epochs (EMP-SSL)", "linear_top1"): {
        "cifar10": {"simclr": 56.5, "byol": 48.9, "vicreg": 69.7}},
    ("ResNet-18, 30 epochs (EMP-SSL)", "linear_top1"): {
        "cifar10": {"simclr": 66.3, "byol": 68.4, "vicreg": 78.1}},
    ("ResNet-18, 100 epochs, A100 (dkobak/simclr-cifar10)", "knn10_top1"): {"cifar10": {"simclr": 83.2}},
    ("ResNet-18, 100 epochs, A100 (dkobak/simclr-cifar10)", "probe_top1"): {"cifar10": {"simclr": 85.6}},
    ("ResNet-18, 100 epochs, A100 (dkobak/simclr-cifar10)", "minutes"): {"cifar10": {"simclr": 20}},
    ("ResNet-18, 500 epochs, A100 (dkobak/simclr-cifar10)", "knn10_top1"): {"cifar10": {"simclr": 90.3}},
    ("ResNet-18, 500 epochs, A100 (dkobak/simclr-cifar10)", "minutes"): {"cifar10": {"simclr": 99}},
    ("ResNet-18, 1000 epochs, A100 (dkobak/simclr-cifar10)", "knn10_top1"): {"cifar10": {"simclr": 91.4}},
    ("ResNet-18, 1000 epochs, A100 (dkobak/simclr-cifar10)", "probe_top1"): {"cifar10": {"simclr": 91.7}},
    ("ResNet-18, 200 epochs, batch 512, A6000 (lightly)", "knn_top1"): {
        "cifar10": {"simclr": 84.8, "moco": 84.7, "byol": 86.8, "simsiam": 76.4, "swav": 84.2, "barlow": 81.9,
                    "dino": 81.3}},
    ("ResNet-18, 200 epochs, batch 512, A6000 (lightly)", "minutes"): {
        "cifar10": {"simclr": 87, "moco": 112, "byol": 108, "simsiam": 88, "swav": 89, "barlow": 153,
                    "dino": 109}},
    ("ResNet-18, 1000 epochs, online probe (solo-learn)", "linear_top1"): {
        "cifar10": {"simclr": 90.74, "moco": 92.94, "byol": 92.58, "simsiam": 90.51, "swav": 89.17,
                    "barlow": 92.10, "vicreg": 92.07, "dino": 89.52},
        "cifar100": {"simclr": 65.78, "moco": 69.89, "byol": 70.46, "simsiam": 66.04, "swav": 64.88,
                     "barlow": 70.90, "vicreg": 68.54, "dino": 66.76}},
    ("ResNet-18, 400 epochs, online probe (solo-learn)", "linear_top1"): {"imagenet100": {"simclr": 77.64}},
    ("ResNet-18, 200 epochs (arXiv 2404.19289)", "linear_top1"): {
        "cifar100": {"npid_distill": 67.9, "moco": 62.5},
        "tinyimagenet": {"npid_distill": 39.7, "moco": 35.8}},
    ("arXiv 2311.09974", "linear_top1"): {
        "cifar10": {"bassl": 92.12}, "cifar100": {"bassl": 66.53}, "imagenet1k": {"bassl": 59.41}},
}
METRICS = {"knn_top1": "kNN", "knn20_top1": "kNN, k 20", "knn10_top1": "kNN, k 10",
           "probe_top1": "probe", "linear_top1": "linear"}
# Two runs are paired when they agree in these; rows that agree in all flags but the seed are one line.
SETTINGS = ("dataset", "pretrained_on", "arch", "stem", "size", "view", "images", "epochs", "batch",
            "effective_lr", "split", "fraction", "probe_data", "device", "precision", "probe_precision")
PROBE = ("probe_lr", "probe_batch", "linear_epochs")  # what else a line's rows agree in: its SGD probe
COLUMNS = ("batch", "epochs", "limit", "view", "arch", "stem", "size")  # flags with a column of their own
ANY = ("seed", "out", "data", "cache", "workers", "device", "save_every", "minutes", "knn_every",
       "fuse", "gate")  # the last two stand in the variant's name where there is a fusion


def fail(text: str) -> None:
    """One line on stderr, and exit status 2."""
    print(f"tables.py: error: {text}", file=sys.stderr)
    raise SystemExit(2)


def read_rows(paths: list[pathlib.Path]) -> list[dict]:
    """The rows of .jsonl files but those of unfinished runs; exits with status 2 where a file is missing or
    holds something else."""
    rows = []
    for path in paths:
        try:
            for row in map(json.loads, path.read_text().splitlines()):
                if (row.get("step") or 0) < (row.get("steps") or 0):  # of a run that goes on
                    continue
                cfg = row.get("config", {})  # none for a network that was not trained
                # A flag that is off counts as one that the script did not have yet.
                flags = {name: value for name, value in cfg.items() if value and name not in ANY}
                rows.append({"dataset": row["dataset"], "probe_precision": "float32", "probe_data": "", **row,
                             "view": cfg.get("view"), "flags": str(flags)})
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            fail(f"{path} holds no result rows ({error})")
    return rows


def group(rows: list[dict], keys: tuple) -> dict[tuple, list[dict]]:
    """Rows by their values of keys, in the order in which they come."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups


def lines_of(rows: list[dict]) -> list[list[dict]]:
    """The rows of each line of a table: runs that differ in the seed alone; a second probe of one run, as by
    another --lr, is of another line. The untrained network first, then by batch, else in the rows' order."""
    rows = sorted(rows, key=lambda row: (row["method"] != "random", row.get("batch") or 0))
    lines = []
    for alike in group(rows, (*SETTINGS, *PROBE, "method", "variant", "flags")).values():
        of_each_seed = group(alike, ("seed",)).values()
        lines += [[row for row in line if row] for line in itertools.zip_longest(*of_each_seed)]
    return lines


def spread(values: list[float], digits: int = 1) -> str:
    """Mean, with ± the standard deviation where there are several."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


# Student's t, 97.5 %, by degrees of freedom; the last one for more.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_and_half(values: list[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95 % interval by Student's t; None for a single value."""
    if len(values) < 2:
        return values[0], None
    t = T_975[min(len(values) - 2, len(T_975) - 1)]
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def points(values: list[float]) -> str:
    """The mean of paired differences as +1.0 ± 0.2, or +1.0 where there is no interval; never -0.0."""
    if not values:
        return ""
    mean, half = mean_and_half(values)
    return f"{round(mean, 1) + 0.0:+.1f}" + ("" if half is None else f" ± {half:.1f}")


def markdown(lines: list[dict]) -> str:
    """A Markdown table, padded so that it reads in a terminal too; columns without a value are left out."""
    head = [name for name in dict.fromkeys(name for line in lines for name in line)
            if any(line.get(name) not in (None, "") for line in lines)]
    cells = [head] + [[str(line.get(name, "") or "") for name in head] for line in lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in cells]
    head, *body = ["| " + " | ".join(line) + " |" for line in padded]
    return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])


def rate(row: dict) -> float | None:
    """Images a second over a whole run; a log's own rate counts from the last start."""
    return row["images"] * row["epochs"] / (60 * row["minutes"]) if row.get("minutes") else None


def table_line(rows: list[dict]) -> dict[str, str]:
    """The cells of a line: rows that differ in the seed alone."""
    row = rows[0]
    line = {name: row.get(name) for name in ("method", "variant", "images", "epochs", "batch")}
    line["labels"] = "" if row["fraction"] == 1 else f"{row['fraction']:.0%}"
    line["network"] = f"{row['arch']}, {row['stem']} stem"
    line["pixels"] = f"{row.get('size')}" + (f", views {row['view']}" if row["view"] else "")
    line["flags"] = ""
    if row["split"] != "test":
        line["variant"] += f" ({row['split']} split)"
    if row.get("pretrained_on") not in (None, row["dataset"]):
        line["variant"] += f" (pretrained on {row['pretrained_on']})"
    line["seeds"] = " ".join(str(r["seed"]) for r in rows)
    line["gates"] = " ".join(f"{gate:.3f}" for gate in row.get("gates", []))
    if row["variant"].startswith("simclr") and "unpaired" in row["variant"]:  # says nothing with a queue
        line["loss (chance)"] = f"{row['train_loss']:.2f} ({math.log(2 * row['batch'] - 1):.2f})"
    line |= {name: spread([r.get(metric) for r in rows]) for metric, name in METRICS.items()}
    line["effect on probe"] = ""
    line["minutes"] = spread([r.get("minutes") for r in rows])
    line["images/s"] = spread([rate(r) for r in rows], 0)
    return line


def varied(row: dict, rows: list[dict]) -> str:
    """The flags of a row that are not the same in all rows of its variant, but for those with a column."""
    configs = [other["config"] for other in rows if other["variant"] == row["variant"] and "config" in other]
    names = [name for name in row.get("config", {}) if name not in (*ANY, *COLUMNS)
             and any((config.get(name) or None) != (row["config"][name] or None) for config in configs)]
    return " ".join(f"--{name.replace('_', '-')} {row['config'][name]}" for name in names)


def unlike(row: dict, other: dict) -> tuple[int, float]:
    """How far two rows are apart: flags that differ, the probe's among them, then minutes."""
    flags = [row.get("config", {}).get(name) != value for name, value in other.get("config", {}).items()]
    flags += [row.get(name) != other.get(name) for name in (*PROBE, "probe_seed")]
    return sum(flags), abs((row.get("minutes") or 0) - (other.get("minutes") or 0))


def differences(same: list[dict], rows: list[dict]) -> list[float]:
    """The probe of the runs of a line minus that of rows without its last term, same settings, same seed."""
    base, _, term = same[0]["variant"].rpartition(" + ")
    if not base or "unpaired" in term:
        return []
    return paired(same, [row for row in rows if row["variant"] == base], (*SETTINGS, "seed"))


def paired(same: list[dict], others: list[dict], keys: tuple) -> list[float]:
    """The probe of each row minus that of the row among others that agrees with it in keys; of several the
    one that differs in the fewest flags, then the one of the nearest minutes."""
    partners, found = group([row for row in others if "probe_top1" in row], keys), []
    for row in same:
        alike = partners.get(tuple(row.get(key) for key in keys), [])
        if alike and "probe_top1" in row:
            partner = min(alike, key=lambda other: unlike(row, other))
            found.append(row["probe_top1"] - partner["probe_top1"])
    return found


BASES = ("untrained", "simclr", "moco")  # variants
# Tables of whole methods -> what two rows agree in, beside the seed, to be compared.
COMPARED = {"methods": ("dataset",), "long": ("dataset",), "npid-moco": ("dataset", "images", "arch")}


def comparison(rows: list[dict], keys: tuple) -> str:
    """Each line of trained networks over the untrained one, SimCLR and MoCo v2, in points of probe; two rows
    are compared where they agree in keys, seed and protocol."""
    lines = []
    for same in lines_of([row for row in rows if row["method"] != "random"]):
        line = {name: same[0][name] for name in (*keys, "variant", "epochs")}
        for base in BASES:
            others = [row for row in rows if row["variant"] == base and row not in same]
            line[f"over {base}"] = points(paired(same, others, (*keys, "split", "fraction", "seed")))
        lines += [line] if any(line[f"over {base}"] for base in BASES) else []
    return markdown(lines)


def table(rows: list[dict], published: bool = False) -> str:
    """One Markdown table a data set; if asked for, the published numbers of its methods in italics below."""
    text = []
    for (dataset, folder), part in group(rows, ("dataset", "probe_data")).items():
        lines = []
        for same in lines_of(part):
            line = table_line(same)
            line["flags"] = varied(same[0], part)
            line["effect on probe"] = points(differences(same, part))
            if len({row["sha"] for row in rows if "sha" in row}) > 1:
                line["commit"] = " ".join(dict.fromkeys(row["sha"][:7] for row in same))
            if len({row.get("device") for row in rows}) > 1:
                line["device"] = same[0].get("device")
            lines.append(line)
        names = {row["variant"].split(" ")[0].rstrip(",") for row in part}
        names |= {row["method"] for row in part if row["method"] != "bassl" or "fusion" in row["variant"]}
        cells: dict[tuple, dict] = {}  # a line a source and method
        for (source, metric), sets in PUBLISHED.items() if published else ():
            for method in names & sets.get(dataset, {}).keys():
                line = cells.setdefault((source, method), {"method": method, "variant": f"*{source}*"})
                line[METRICS.get(metric, metric)] = f"*{sets[dataset][method]:g}*"
        lines += sorted(cells.values(), key=lambda line: line["method"])
        title = " ".join(filter(None, (dataset, folder)))
        text += [f"**{title}**", "", markdown(lines), ""]
    return "\n".join(text)


# ---------------------------------------------------------------------------------- effects of a study


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study without its seed; the switches as they are in it, on or off."""

    method: str
    aug: str
    arch: str
    predictor: str
    momentum: str


def cell_of(config: dict) -> Cell:
    """The cell of a row's config."""
    from aug_study import switched  # which knows the methods' own switches, and brings torch

    method = switched(config["methods"], config["predictor"], config["momentum"])
    return Cell(config["methods"], config["augs"] or method.aug, config["arch"],
                "on" if method.predictor else "off", "on" if method.momentum else "off")


# Factor -> (field of Cell, from, to, published mean effect in points: arXiv 2403.05726).
FACTORS = {
    "BYOL's augmentations over SimCLR's": ("aug", "simclr", "byol", "+2.3"),
    "multi-crop over SimCLR's augmentations": ("aug", "simclr", "multicrop", "+2.5"),
    "momentum target on": ("momentum", "off", "on", "+1.8"),
    "predictor on": ("predictor", "off", "on", "+0.3"),
}


def pair(cell: Cell, name: str, low: str, high: str) -> list[Cell]:
    """The cells that differ from this one in field `name` alone, with it low and high. Methods are compared
    as they come: their switches are part of them."""
    if name == "method":
        own = dict(augs=cell.aug, arch=cell.arch, predictor="default", momentum="default")
        return [cell_of(own | {"methods": method}) for method in (low, high)]
    return [dataclasses.replace(cell, **{name: value}) for value in (low, high)]


def effects(rows: list[dict]) -> list[dict]:
    """What a study's rows can tell: FACTORS, each method over simclr, each backbone over the smallest.

    The effect of a factor is the mean of paired differences of probe_top1: with a(c) the accuracy of cell c
    and P the pairs (c, c') that differ in this factor alone, 1 / |P| sum over P of a(c') - a(c). Two rows are
    paired within a seed, and where all SETTINGS but arch and effective_lr agree. No pair is made from a
    missing cell. per_seed: a seed's mean; pairs: their number in it. ValueError where the rows are of no
    study, or several are of one cell.
    """
    accuracy = {}
    for row in rows:
        if row["split"] == "test":
            alike = tuple(row.get(name) for name in SETTINGS if name not in ("arch", "effective_lr"))
            key = cell_of(row["config"]), alike, row["seed"]
            if key in accuracy:
                raise ValueError("several rows of one cell and seed")
            accuracy[key] = row["probe_top1"]
    factors, cells = dict(FACTORS), [cell for cell, *_ in accuracy]
    for method in dict.fromkeys(cell.method for cell in cells):
        if method != "simclr":
            factors[f"{method} over simclr"] = ("method", "simclr", method, "")
    archs = sorted({cell.arch for cell in cells}, key=lambda arch: int(arch.removeprefix("resnet")))
    for arch in archs[1:]:
        factors[f"larger backbone: {arch} over {archs[0]}"] = ("arch", archs[0], arch, "")
    found = []
    for factor, (name, low, high, published) in factors.items():
        differences: dict[int, list[float]] = {}
        for (cell, *alike, seed), value in accuracy.items():
            first, second = pair(cell, name, low, high)
            if cell == first and (second, *alike, seed) in accuracy:
                differences.setdefault(seed, []).append(accuracy[second, *alike, seed] - value)
        if differences:
            per_seed = [statistics.mean(values) for values in differences.values()]
            pairs = max(map(len, differences.values()))
            found.append({"factor": factor, "per_seed": per_seed, "pairs": pairs, "published": published})
    return found


def effects_table(path: pathlib.Path) -> str:
    """The effects of a file's rows as a Markdown table, beside the published ones."""
    try:
        found = effects(read_rows([path]))
    except (ValueError, KeyError) as error:
        fail(f"{path}: no rows of a study ({error})")
    lines = [{"factor": row["factor"], "effect, points (95 %)": points(row["per_seed"]),
              "pairs x seeds": f"{row['pairs']} x {len(row['per_seed'])}", "published": row["published"]}
             for row in found]
    return markdown(lines)


# ------------------------------------------------------------------------------------------ what is committed


def unknown_commits(paths: list[pathlib.Path]) -> list[str]:
    """Rows whose scripts no clean commit of this repository's history holds, as "file: method variant"."""
    git = ["git", "rev-list", "HEAD"]
    listing = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True)
    there, bad = {commit[:12] for commit in listing.stdout.split()}, []
    for path in paths:
        for row in map(json.loads, path.read_text().splitlines()):
            made = {row.get("sha"), row.get("probe_sha", row.get("sha"))}
            if not made <= there:
                bad.append(f"{path.name}: {row.get('method', row.get('stage'))} {row.get('variant', '')}")
    return bad


def collect(name: str, folders: list[str]) -> None:
    """The rows of all results.jsonl below the folders -> results/NAME.jsonl, and their table."""
    paths = [path for folder in folders for path in sorted(pathlib.Path(folder).glob("**/results.jsonl"))]
    rows = [line for path in paths for line in path.read_text().splitlines()]
    if not rows:
        fail(f"no results.jsonl below {' '.join(folders)}")
    (HERE / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    print(table(read_rows([HERE / f"{name}.jsonl"])))


def section(name: str, level: str = "##") -> list[str]:
    """A table of the page: its title, sentence, command, machines, rows, effects and picture."""
    (title, sentence), path = TABLES[name], HERE / f"{name}.jsonl"
    if not path.exists():
        return []
    rows = read_rows([path])
    trained = [row for row in rows if row["method"] != "random"]
    machines = dict.fromkeys(f"{row['device']}, {row['precision']}" for row in trained)
    text = [f"{level} {title}", "", sentence.strip(), "", f"`make {name}`; {'; '.join(machines)}.", "",
            table(rows, published=name in ("methods", "long", "published"))]
    if name in COMPARED:
        text += ["Points of probe:", "", comparison(rows, COMPARED[name]), ""]
    if name == "study":
        text += ["Its main effects on the probe:", "", effects_table(path), ""]
    if (HERE / f"{name}.png").exists():
        text += [f"![{title}]({name}.png)", ""]
    return text


def write_readme() -> None:
    """results/README.md: every table with its sentence and the command that makes it."""
    text = ["# Results", "",
            "Written by `python results/tables.py --readme` from the rows beside this page. A row names its "
            "command, commit and device. Since commit 8e4a95f convolutions of few pixels are computed "
            "another way on a CPU: rows before it took more minutes, and differ by rounding.",
            "",
            "Reduced runs (fewer images, epochs or pixels than the papers') are compared with each other "
            "alone; published numbers stand in italics for scale.", ""]
    for name in TABLES:
        if name not in TUNING:
            text += section(name)
    for path in sorted((HERE / "bench").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        machines = dict.fromkeys(f"{row['device']}, {row['precision']}" for row in rows)
        commands = dict.fromkeys(f"`{row['command']}`" for row in rows)
        made = f"{'; '.join([*commands, *machines])}."
        alike = {key for key in ("device", "precision") if len({row[key] for row in rows}) == 1}
        hidden = {"sha", "torch", "command", "blobs"} | alike
        shown = [{key: row[key] for key in row if key not in hidden} for row in rows]
        text += [f"## Bench: {path.stem}", "", made, "", markdown(shown), ""]
    text += ["## How the defaults were chosen", "", "On training images that were held out of the probe.", ""]
    for name in TUNING:
        text += section(name, level="###")
    (HERE / "README.md").write_text("\n".join(text))
    print(f"wrote {HERE / 'README.md'}")


def main(argv: list[str]) -> None:
    if argv[:1] == ["--rows"] and argv[1:]:
        print(table(read_rows([pathlib.Path(path) for path in argv[1:]])))
    elif argv == ["--check"]:
        bad = unknown_commits(sorted(HERE.glob("**/*.jsonl")))
        sys.exit("rows without a clean commit of this history:\n" + "\n".join(bad) if bad else 0)
    elif argv[:1] == ["--effects"] and len(argv) == 2:
        print(effects_table(pathlib.Path(argv[1])))
    elif argv == ["--help"]:
        print(__doc__)
    elif argv == ["--readme"]:
        write_readme()
    elif argv and argv[0] in TABLES:
        collect(argv[0], argv[1:] or [f"runs/{argv[0]}"])
    else:
        names = ", ".join(TABLES)
        fail("want NAME [FOLDER...], --rows FILE..., --effects FILE, --check or --readme; "
             f"NAME is one of {names}")


if __name__ == "__main__":
    main(sys.argv[1:])
