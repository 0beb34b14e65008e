"""Folders of images: photos of any shape, odd files and layouts, the map that they are decoded into."""
import collections
import resource

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image

import bassl
import common
from common import RunError
from conftest import TINY, Small, parsed, run_script, same_run

GREY = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
COLOURS = np.stack([GREY, GREY.T, 255 - GREY], 2)                     # (8, 8, 3)


def saved(pixels, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def slopes(width, height):
    """A photo whose red says how far to the right a pixel is, and its green how far down, in 255ths."""
    x, y = ((np.arange(n) + 0.5) / n * 255 for n in (width, height))
    x, y = np.broadcast_arrays(x[None], y[:, None])
    return np.stack([x, y, np.full_like(x, 128)], 2).round().astype(np.uint8)


def made_tree(folder, count=40, size=(8, 8)):
    """Two classes; image i is of the one colour i."""
    for i in range(count):
        saved(np.full((*size, 3), i, np.uint8), folder / "train" / "ab"[i % 2] / f"{i:03}.png")
    return folder


def load(folder, size=8, dataset="folder", split="train", limit=0):
    return common.load_images(dataset, str(folder), split, size, str(folder.parent / "cache"), limit=limit)


def colours(images):
    """The first value of each image's pixels, in the set's order."""
    return images.pixels[images.rows, 0, 0, 0].tolist()


@pytest.fixture
def calls(monkeypatch):
    """The files that common.decode is asked for."""
    paths, decode = [], common.decode
    monkeypatch.setattr(common, "decode", lambda path, size: paths.append(path) or decode(path, size))
    return paths


def test_views_of_photos_stay_inside_reach_every_side_and_have_the_asked_ratio_in_the_photo(tmp_path):
    sides = [(300, 200), (200, 300), (240, 240), (400, 160)]
    for i, side in enumerate(sides):
        saved(slopes(*side), tmp_path / "photos" / f"{i}.png")
    images = load(tmp_path / "photos", 64)
    assert images.aspect.tolist() == pytest.approx([w / h for w, h in sides])
    augment = common.BatchAugment(32, flip=0, jitter_p=0, gray_p=0)
    order = torch.arange(4).repeat(500)
    [(pixels, aspect, _)] = images.batches([order], torch.device("cpu"))
    views = augment(pixels, common.seeded("photos"), aspect)
    views = views * augment.std[:, None, None] + augment.mean[:, None, None]
    lines = torch.stack([views[:, 0, 16], views[:, 1, :, 16]])        # (2, B, 32)
    middle, half = lines[..., [7, 24]].mean(2), (lines[..., 24] - lines[..., 7]) * 16 / 17
    begin, end = middle - half, middle + half                         # (2, B), in sides of the photo
    assert begin.min() > -0.01 and end.max() < 1.01
    for i, (width, height) in enumerate(sides):
        own = order == i
        assert (begin[:, own].amin(1) < 0.01).all() and (end[:, own].amax(1) > 0.99).all()
        wide, tall = 2 * half[:, own]
        ratio = wide * width / (tall * height)
        assert 0.70 < ratio.min() < 0.80 and 1.25 < ratio.max() < 1.42 and 0.18 < (wide * tall).min() < 0.25


def test_the_centre_view_of_a_photo_is_torchvisions_resize_and_crop(tmp_path):
    photos, draw = [], common.seeded("photos")
    for i, (width, height) in enumerate([(500, 375), (375, 500), (400, 400)]):
        noise = (torch.randn(3, n, n, generator=draw) for n in (2, 5, 12, 30, 80))
        photo = sum(TF.resize(x, [height, width]) for x in noise)
        photos.append(((photo - photo.min()) / (photo.max() - photo.min()) * 255).to(torch.uint8))
        saved(photos[i].permute(1, 2, 0).numpy(), tmp_path / "photos" / f"{i}.png")
    images = load(tmp_path / "photos", 224)
    views, squashed = (common.center_view(images.pixels, 224, aspect)
                       for aspect in (images.aspect, torch.ones(3)))
    for i, photo in enumerate(photos):
        want = TF.center_crop(TF.resize(photo, 256), 224) / 255
        want = TF.normalize(want, common.MEAN, common.STD)
        error, distorted = ((x[i] - want).abs().mean() * 0.225 * 255 for x in (views, squashed))
        assert error < 4 and (i == 2 or distorted > 10)               # grey levels


def test_images_of_odd_kinds_are_read_as_rgb(tmp_path):
    rgb, exif = Image.fromarray(COLOURS), Image.Exif()
    exif[0x0112] = 6                                                  # "turn right to see it upright"
    grey = np.repeat(GREY[..., None], 3, 2)
    for name, image, want, tolerance, options in [
            ("grey.png", GREY, grey, 0, {}),
            ("16 bits.png", GREY.astype(np.uint16) * 257, grey, 0, {}),
            ("alpha.png", np.dstack([COLOURS, GREY]), COLOURS, 0, {}),
            ("palette.png", Image.fromarray(GREY).convert("P"), grey, 0, {}),
            ("CMYK.jpg", rgb.convert("CMYK"), COLOURS, 12, {"quality": 100, "subsampling": 0}),
            ("turned.png", rgb, np.rot90(COLOURS, -1), 0, {"exif": exif})]:
        got, aspect = common.decode(str(saved(image, tmp_path / name, **options)), 8)
        assert got.dtype == np.uint8 and aspect == 1
        assert np.abs(got.astype(int) - want.transpose(2, 0, 1)).max() <= tolerance, name


def test_imagenet_and_imagenet100_in_it_as_published(tmp_path):
    names = sorted({*common.IMAGENET100, *(f"n9{i:07}" for i in range(100))})
    for split in ("train", "val"):
        for i, name in enumerate(names):
            path = tmp_path / "imagenet" / split / name / f"{name}_0.JPEG"
            saved(np.full((8, 8, 3), i, np.uint8), path, format="PNG")
    full = load(tmp_path / "imagenet", dataset="imagenet1k")
    assert full.classes == names and full.labels.tolist() == [*range(200)] == colours(full)
    hundred = load(tmp_path / "imagenet", dataset="imagenet100", split="test")
    assert hundred.classes == sorted(common.IMAGENET100) and hundred.labels.tolist() == [*range(100)]
    assert colours(hundred) == [names.index(name) for name in hundred.classes]


def test_tiny_imagenet_as_published_but_for_a_hidden_folder(tmp_path):
    tiny = tmp_path / "set" / "tiny-imagenet-200"
    (tiny / "train" / ".checkpoints").mkdir(parents=True)
    for name in ("n01", "n02"):
        saved(COLOURS, tiny / "train" / name / "images" / f"{name}_0.JPEG")
        (tiny / "train" / name / f"{name}_boxes.txt").write_text("")
    for i in range(3):
        saved(np.full((8, 8, 3), 50 * i, np.uint8), tiny / "val" / "images" / f"val_{i}.JPEG", format="PNG")
    rows = [f"val_{i}.JPEG\t{name}\t0\t0\t7\t7\n" for i, name in enumerate(["n02", "n01", "n02"])]
    (tiny / "val" / "val_annotations.txt").write_text("".join(rows))
    train, val = (load(tiny.parent, dataset="tinyimagenet", split=split) for split in ("train", "test"))
    assert train.classes == val.classes == ["n01", "n02"] and train.labels.tolist() == [0, 1]
    assert val.labels.tolist() == [1, 0, 1] and colours(val) == [0, 50, 100]


def test_hidden_files_are_ignored_and_a_folder_without_classes_is_pretrainable(tmp_path, monkeypatch):
    for name in ("a/deep/er/1.png", "a/.hidden/2.png", "a/.3.png", ".git/4.png", "b/5.PNG", "b/notes.txt"):
        saved(COLOURS, tmp_path / "tree" / name, format="PNG")
    files, classes = common.list_tree(tmp_path / "tree")
    want = [(str(tmp_path / "tree" / "a/deep/er/1.png"), 0), (str(tmp_path / "tree" / "b/5.PNG"), 1)]
    assert files == want and classes == ["a", "b"]

    for i in range(20):
        saved(slopes(12, 8 + i), tmp_path / "flat" / f"caf\udce9 {i}.png")  # a name that is not UTF-8
    images = load(tmp_path / "flat", 16)
    assert images.labels.tolist() == [-1] * 20 and images.classes == []
    monkeypatch.setattr(common, "resnet", Small)
    train(tmp_path / "flat", tmp_path / "out", "--knn-every", 1)
    assert (tmp_path / "out" / "backbone.pt").exists()


def test_views_of_square_images_do_not_change_by_one_bit():
    x, u = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8), torch.rand(8, common.UNIFORMS)
    augment, square = common.BatchAugment(32, blur_p=0.5), torch.ones(8)
    assert torch.equal(augment.apply(x, u, [0, 1, 2, 3]), augment.apply(x, u, [0, 1, 2, 3], square))
    center = TF.normalize(x[:, :, 4:60, 4:60] / 255, common.MEAN, common.STD)
    assert torch.equal(common.center_view(x, 56, square), center)


def train(data, out, *flags):
    """A run of one epoch on a folder."""
    where = ["--dataset", "folder", "--data", data, "--cache", data.parent / "cache", "--out", out]
    bassl.train(parsed(bassl, *TINY, *where, "--limit", 0, "--epochs", 1, *flags))


def test_a_set_too_large_for_memory_is_read_ahead_and_trains_the_same(tmp_path, monkeypatch):
    for i in range(48):
        saved(np.roll(slopes(10 + i % 5, 12), i, 1), tmp_path / "photos" / f"{i:02}.png")
    monkeypatch.setattr(common, "resnet", Small)
    train(tmp_path / "photos", tmp_path / "near")
    monkeypatch.setattr(common, "IN_MEMORY", 0)
    train(tmp_path / "photos", tmp_path / "far")
    same_run(tmp_path / "near", tmp_path / "far")


def test_limit_and_preview_decode_no_more_than_they_need_and_a_map_is_shared_until_a_file_moves(
        tmp_path, monkeypatch, calls):
    monkeypatch.setattr(common, "resnet", Small)
    tree = made_tree(tmp_path / "set")
    before = {path: path.stat().st_mtime_ns for path in [tree, *tree.rglob("*")]}
    assert len(load(tree, limit=10)) == len(calls) == 10
    train(tree, tmp_path / "preview", "--preview")
    assert len(calls) == 10 + 16 and (tmp_path / "preview" / "preview.png").exists()
    train(tree, tmp_path / "preview", "--preview", "--limit", 20)
    assert len(calls) == 10 + 16 + 20
    load(tree), load(tree, limit=10), load(tree, limit=40)
    assert len(calls) == 10 + 16 + 20 + 40
    assert before == {path: path.stat().st_mtime_ns for path in [tree, *tree.rglob("*")]}  # as it was
    (tree / "train" / "a" / "000.png").rename(tree / "train" / "b" / "000.png")
    images = load(tree)
    assert colours(images)[19] == 0 and images.labels.tolist() == [0] * 19 + [1] * 21


def test_a_broken_file_is_named_once_and_left_out_and_above_one_percent_nothing_is_written(tmp_path, capsys):
    tree = made_tree(tmp_path / "set", 200)
    (tree / "train" / "b" / "007.png").write_bytes(b"\x89PNG broken")
    images = load(tree)
    [line] = capsys.readouterr().err.splitlines()
    assert "left out 1 of 200" in line and "007.png" in line
    assert colours(images) == [*range(0, 200, 2), *(i for i in range(1, 200, 2) if i != 7)]
    assert images.labels.tolist() == [0] * 100 + [1] * 99
    load(tree)
    assert "007.png" not in "".join(capsys.readouterr())
    for name in ("a/008.png", "b/009.png"):
        (tree / "train" / name).write_bytes(b"")
    with pytest.raises(RunError, match="3 of 200 images do not decode: .*00[789].png"):
        load(tree, 9)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".lock", ".lock", ".u8"]


def test_a_full_disk_is_one_error_before_the_first_image_or_in_the_middle_and_leaves_nothing(
        tmp_path, monkeypatch, calls):
    tree, cache = made_tree(tmp_path / "set", 100), tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(common.shutil, "disk_usage", lambda _: collections.namedtuple("Usage", "free")(1e7))
        with pytest.raises(RunError, match="100 decoded images take 0.02 GB.* 0.01 GB left.*--cache"):
            load(tree, 224)
    assert not calls
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        with pytest.raises(RunError, match="could not write .*u8 .File too large"):
            load(tree, 224)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.suffix for path in cache.iterdir()} == {".lock"}


# Starts by fork, after the imports and before any arithmetic. argv: the tree and two caches.
STARTS = """
import os, signal, sys, time, torchvision.datasets, common
def start(cache):
    child = os.fork()
    if child == 0:
        images = common.load_images("folder", sys.argv[1], "train", 8, cache, 2)
        os.write(1, b"sum %d\\n" % images.pixels.sum())
        os._exit(0)
    return child
for module, name, nth in (common, "decode", 20), (os, "fsync", 1), (os, "replace", 1):
    left, real = [None] * nth, getattr(module, name)
    def dies(*args):
        left.pop()
        return real(*args) if left else os.kill(os.getpid(), signal.SIGKILL)
    setattr(module, name, dies)
    child = start(sys.argv[2])
    setattr(module, name, real)
    print(name, os.waitpid(child, 0)[1], [n for n in os.listdir(sys.argv[2]) if n.endswith("u8")], flush=True)
decode = common.decode
common.decode = lambda *args: time.sleep(0.02) or decode(*args)
children = [start(sys.argv[3]), start(sys.argv[3])]
print("both", [os.waitpid(child, 0)[1] for child in children])
"""


def test_a_kill_leaves_nothing_that_reads_as_whole_and_two_runs_at_once_decode_once(tmp_path, calls):
    tree = made_tree(tmp_path / "set")
    status, said, errors = run_script("-c", STARTS, tree, tmp_path / "cache", tmp_path / "shared")
    for moment in ("decode", "fsync", "replace"):
        assert f"{moment} 9 []\n" in said, errors
    images = load(tree)                                               # decodes all of them anew
    assert len(calls) == 40 and colours(images) == [*range(0, 40, 2), *range(1, 40, 2)]
    assert (images.aspect == 1).all()                                 # squares are not squashed
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock", ".u8"}
    twins = said[said.index("replace 9"):]
    assert twins.count("decoding 40 images") == 1 and twins.count(f"sum {images.pixels.sum().item()}\n") == 2
    assert "both [0, 0]" in twins and status == 0
