"""Committed rows -> results/*.png, for the tables that people would rather look at.

    python results/plots.py        # needs matplotlib, which nothing else here does
"""
import pathlib

from matplotlib import pyplot as plt

from tables import HERE, differences, effects, lines_of, mean_and_half, read_rows


def panels(count: int, **labels):
    """A figure of panels side by side."""
    figure, [row] = plt.subplots(1, count, figsize=(4.2 * count, 3.2), squeeze=False)
    for panel in row:
        panel.set(**labels)
        panel.grid(alpha=0.3)
    return figure, row


def draw_long(path: pathlib.Path):
    """Online kNN over minutes and over images seen, a line a run, a colour a method."""
    figure, [by_minutes, by_images] = panels(2, ylabel="online kNN, %")
    by_minutes.set(xlabel="CPU-core minutes")
    by_images.set(xlabel="images seen, thousands")
    for n, same in enumerate(lines_of(read_rows([path]))):
        label = same[0]["variant"] if same[0]["method"] == "bassl" else "NPID with self-distillation"
        for run in same:
            minutes, epochs, knn = zip(*run["curve"])
            images = [run["images"] * epoch / 1000 for epoch in epochs]
            by_minutes.plot(minutes, knn, color=f"C{n}")
            by_images.plot(images, knn, label=label, color=f"C{n}")
            label = None  # once a line of the table
    by_images.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.set_size_inches(11, 3.2)
    return figure


def draw_bassl_batch(path: pathlib.Path):
    """The fusion's effect over the batch, with its 95 % interval over seeds, a colour a processor."""
    rows = read_rows([path])
    figure, [panel] = panels(1, xlabel="batch", ylabel="points of probe, 95 %", title="BA-SSL over SimCLR")
    batches = sorted({row["batch"] for row in rows})
    devices = list(dict.fromkeys(row["device"] for row in rows))
    for same in lines_of(rows):
        found, batch, n = differences(same, rows), same[0]["batch"], devices.index(same[0]["device"])
        if len(found) > 1:
            label = f"{devices[n].split(',')[0]}, {len(found)} seeds" if batch == batches[0] else None
            place = batches.index(batch) + 0.2 * (n - (len(devices) - 1) / 2)
            panel.errorbar(place, *mean_and_half(found), fmt=f"C{n}o", capsize=4, label=label)
    panel.set_xticks(range(len(batches)), batches)
    panel.axhline(0, color="0.5")
    panel.margins(y=0.25)  # room for the legend
    panel.legend(fontsize="small", loc="upper right")
    return figure


def draw_study(path: pathlib.Path):
    """The study's effects with their 95 % intervals, beside the published ones."""
    found = effects(read_rows([path]))[::-1]
    means, halves = zip(*(mean_and_half(row["per_seed"]) for row in found))
    figure, [panel] = panels(1, xlabel="points of probe")
    places = range(len(found))
    panel.errorbar(means, places, xerr=halves, fmt="C0o", capsize=4, label="here, 95 % over seeds")
    known = [(float(row["published"]), place) for place, row in zip(places, found) if row["published"]]
    panel.plot(*zip(*known), "C1D", label="published, full size")
    panel.set_yticks(places, [row["factor"] for row in found])
    panel.axvline(0, color="0.5")
    panel.legend()
    figure.set_size_inches(8, 4)
    return figure


if __name__ == "__main__":
    for draw in (draw_long, draw_bassl_batch, draw_study):
        name = draw.__name__.removeprefix("draw_").replace("_", "-")
        if (HERE / f"{name}.jsonl").exists():
            figure = draw(HERE / f"{name}.jsonl")
            figure.tight_layout()
            figure.savefig(HERE / f"{name}.png", dpi=75)
            print(f"wrote {HERE / name}.png")
