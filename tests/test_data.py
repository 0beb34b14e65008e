"""Trees of images in every layout, images of odd kinds, and what happens to the processes that decode them."""
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

import bassl
import common
from common import RunError
from conftest import TINY

GREY = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
COLOURS = np.stack([GREY, GREY.T, 255 - GREY], 2)                                        # (8, 8, 3)


def saved(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return str(path)


def test_images_of_odd_kinds_are_read_as_rgb(tmp_path):
    rgb, exif = Image.fromarray(COLOURS), Image.Exif()
    exif[0x0112] = 6                                                                    # "turn by 90 degrees clockwise to see it upright"
    grey = torch.from_numpy(GREY).expand(3, 8, 8)
    colours = torch.from_numpy(COLOURS).permute(2, 0, 1)
    cases = {
        "grey": (saved(Image.fromarray(GREY), tmp_path / "grey.png"), grey, 0),
        "grey with alpha": (saved(Image.fromarray(np.stack([GREY, GREY], 2), "LA"), tmp_path / "la.png"), grey, 0),
        "16 bits": (saved(Image.fromarray(GREY.astype(np.uint16) * 257), tmp_path / "16.png"), grey, 0),
        "alpha": (saved(Image.fromarray(np.dstack([COLOURS, GREY])), tmp_path / "rgba.png"), colours, 0),
        "palette": (saved(Image.fromarray(GREY).convert("P"), tmp_path / "p.png"), grey, 0),
        "CMYK": (saved(rgb.convert("CMYK"), tmp_path / "cmyk.jpg", quality=100, subsampling=0), colours, 12),
        "turned by EXIF": (saved(rgb, tmp_path / "exif.png", exif=exif), torch.from_numpy(np.rot90(COLOURS, -1).copy()).permute(2, 0, 1), 0),
        "png named jpg": (saved(rgb, tmp_path / "png.jpg", format="PNG"), colours, 0),
    }
    for name, (path, want, tolerance) in cases.items():
        got = common.decode(path, 8)
        assert got.dtype == torch.uint8 and (got.int() - want.int()).abs().max() <= tolerance, name


def test_the_shorter_side_is_resized_and_the_centre_taken(tmp_path):
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 200                                                                # the centre square is bright
    assert (common.decode(saved(Image.fromarray(wide), tmp_path / "wide.png"), 10).float().mean((0, 1))[1:-1] > 195).all()


def test_imagenet_and_imagenet100_in_it_and_tiny_imagenet_as_published(tmp_path):
    wnids = sorted({*common.IMAGENET100, *(f"n9{i:07}" for i in range(100))})
    for split in ("train", "val"):
        for i, wnid in enumerate(wnids):
            saved(Image.fromarray(np.full((8, 8, 3), i, np.uint8)), tmp_path / "imagenet" / split / wnid / f"{wnid}_0.JPEG", quality=100)
    full = common.load_images("imagenet1k", str(tmp_path / "imagenet"), "train", 8)
    assert full.classes == wnids and full.labels.tolist() == list(range(200))
    hundred = common.load_images("imagenet100", str(tmp_path / "imagenet"), "test", 8)
    assert hundred.classes == sorted(common.IMAGENET100) and len(hundred) == 100
    assert hundred.pixels[:, 0, 0, 0].tolist() == [wnids.index(wnid) for wnid in hundred.classes]

    tiny, order = tmp_path / "tiny-imagenet-200", ["n02", "n01", "n02"]
    for wnid in ("n01", "n02"):
        saved(Image.fromarray(COLOURS), tiny / "train" / wnid / "images" / f"{wnid}_0.JPEG")
        (tiny / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    for i in range(len(order)):
        saved(Image.fromarray(np.full((8, 8, 3), 50 * i, np.uint8)), tiny / "val" / "images" / f"val_{i}.JPEG", quality=100)
    (tiny / "val" / "val_annotations.txt").write_text("".join(f"val_{i}.JPEG\t{wnid}\t0\t0\t7\t7\n" for i, wnid in enumerate(order)))
    assert common.load_images("tinyimagenet", str(tmp_path), "train", 8).labels.tolist() == [0, 1]
    val = common.load_images("tinyimagenet", str(tmp_path), "test", 8)
    assert val.classes == ["n01", "n02"] and val.labels.tolist() == [1, 0, 1] and val.pixels[:, 0, 0, 0].tolist() == [0, 50, 100]


def test_hidden_folders_and_links_that_lead_back_are_ignored(tmp_path):
    for name in ("a/deep/er/1.png", "a/.hidden/2.png", "a/.3.png", ".git/4.png", "b/5.png", "b/notes.txt"):
        saved(Image.fromarray(COLOURS), tmp_path / name, format="PNG")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    tree = common.read_tree(tmp_path, 8)
    assert [os.path.relpath(file, tmp_path) for file in tree.files] == ["a/deep/er/1.png", "b/5.png"]


def made_tree(tmp_path, broken=()):
    for i in range(240):
        saved(Image.fromarray(np.roll(COLOURS, i, 0)), tmp_path / "train" / "ab"[i % 2] / f"{i:03}.png")
    for i in broken:
        (tmp_path / "train" / "ab"[i % 2] / f"{i:03}.png").write_bytes(b"\x89PNG broken")
    return ["--dataset", "folder", "--data", str(tmp_path), "--limit", "0", "--epochs", "2", "--knn-every", "0", "--out", str(tmp_path / "out")]


def test_broken_images_of_a_streamed_set_are_skipped_and_named_once_and_too_many_end_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "IN_MEMORY", 0)
    flags = made_tree(tmp_path, broken=[7, 100])
    bassl.train(common.parse(bassl.Config, "", [*TINY, *flags, "--workers", "1"]))
    errors = capsys.readouterr().err
    assert errors.count("007.png") == 1 and errors.count("100.png") == 1 and "skipped" in errors and "of 240 images that do not decode" in errors
    flags = made_tree(tmp_path, broken=[7, 100, 101])
    with pytest.raises(RunError, match="3 of 240 images do not decode: .*101.png"):
        bassl.train(common.parse(bassl.Config, "", [*TINY, *flags, "--out", str(tmp_path / "out2")]))


def test_a_killed_worker_ends_the_run_with_a_clear_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "IN_MEMORY", 0)
    flags, decode = made_tree(tmp_path), common.decode

    def dies(path, size):
        if path.endswith("100.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(path, size)

    monkeypatch.setattr(common, "decode", dies)
    began = time.monotonic()
    with pytest.raises(SystemExit) as end, common.one_line_errors():
        bassl.train(common.parse(bassl.Config, "", [*TINY, *flags, "--workers", "2"]))
    assert end.value.code == 1 and "a process that decodes images died" in capsys.readouterr().err
    assert time.monotonic() - began < 30
