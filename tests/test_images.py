"""Folders of images: photos of any shape, odd files and layouts, the map that they are decoded into."""
import collections
import os
import shutil
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

import common
from common import RunError
from conftest import disk_of, killed, made_tree, same_run, saved

GREY = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
COLOURS = np.stack([GREY, GREY.T, 255 - GREY], 2)                     # (8, 8, 3)


def load(folder, size=8, dataset="folder", split="train", limit=0):
    return common.load_images(dataset, str(folder), split, size, str(folder.parent / "cache"), limit=limit)


def colours(images):
    """The first value of each image's pixels, in the set's order."""
    return images.pixels[images.rows, 0, 0, 0].tolist()


def cached(tree):
    """The kinds of files in the cache of a tree, without the locks."""
    return [path.suffix for path in (tree.parent / "cache").iterdir() if path.suffix != ".lock"]


@pytest.fixture
def calls(monkeypatch):
    """The files that common.decode is asked for."""
    paths, decode = [], common.decode
    monkeypatch.setattr(common, "decode", lambda path, size: paths.append(path) or decode(path, size))
    return paths


@pytest.fixture
def pretrain(small, train):
    """pretrain(name, tree, *flags): a run of one epoch on a folder."""
    def start(name, tree, *flags):
        where = ["--dataset", "folder", "--data", tree, "--cache", tree.parent / "cache"]
        return train(name, *where, "--limit", 0, "--epochs", 1, *flags)
    return start


@pytest.mark.parametrize("width, height", [(500, 375), (375, 500), (400, 400)])
def test_the_centre_view_of_a_photo_is_torchvisions_resize_and_crop(width, height, tmp_path):
    noise = (torch.randn(3, n, n, generator=common.seeded("photo", n)) for n in (2, 5, 12, 30, 80))
    photo = sum(TF.resize(x, [height, width]) for x in noise)
    photo = ((photo - photo.min()) / (photo.max() - photo.min()) * 255).to(torch.uint8)
    saved(photo.permute(1, 2, 0).numpy(), tmp_path / "photos" / "0.png")
    images = load(tmp_path / "photos", 224)
    want = TF.normalize(TF.center_crop(TF.resize(photo, 256), 224) / 255, common.MEAN, common.STD)
    error, distorted = ((common.center_view(images.pixels, 224, aspect)[0] - want).abs().mean() * 0.225 * 255
                        for aspect in (images.aspect, torch.ones(1)))
    assert error < 4 and (width == height or distorted > 10)          # grey levels


def test_the_centre_view_of_square_images_is_their_middle_bit_for_bit():
    x = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    middle = TF.normalize(x[:, :, 4:60, 4:60] / 255, common.MEAN, common.STD)
    assert torch.equal(common.center_view(x, 56, torch.ones(8)), middle)


def test_images_of_odd_kinds_are_read_as_rgb(tmp_path):
    rgb, exif = Image.fromarray(COLOURS), Image.Exif()
    exif[0x0112] = 6                                                  # "turn right to see it upright"
    grey = np.repeat(GREY[..., None], 3, 2)
    for name, image, want, tolerance, options in [
            ("grey.png", GREY, grey, 0, {}),
            ("palette.png", Image.fromarray(GREY).convert("P"), grey, 0, {}),
            ("CMYK.jpg", rgb.convert("CMYK"), COLOURS, 12, {"quality": 100, "subsampling": 0}),
            ("turned.png", rgb, np.rot90(COLOURS, -1), 0, {"exif": exif})]:
        got, aspect, deep = common.decode(str(saved(image, tmp_path / name, **options)), 8)
        assert got.dtype == np.uint8 and aspect == 1 and not deep
        assert np.abs(got.astype(int) - want.transpose(2, 0, 1)).max() <= tolerance, name


RAMP = np.linspace(0, 1, 64).reshape(8, 8)  # stretches to GREY, but for its two ends


@pytest.mark.parametrize("values, want", [
    ((RAMP * 4000 - 1000).astype(np.int32), GREY),                    # a CT: air is black, bone is white
    ((RAMP * 4095).astype(np.uint16), GREY), (RAMP.astype(np.float32), GREY),
    (RAMP.astype(np.float32) * 3e38, GREY), ((RAMP * 1e9).astype(np.int32), GREY),
    (np.full((8, 8), 700, np.uint16), np.full((8, 8), 128)),
    (np.where(np.arange(64).reshape(8, 8) == 9, 500, 100).astype(np.uint16),  # both percentiles are one value
     np.where(np.arange(64).reshape(8, 8) == 9, 255, 0)),
], ids=["CT", "12 bits", "0 to 1", "large floats", "large integers", "one value", "two values"])
def test_grey_of_more_than_8_bits_is_stretched_to_its_own_range(values, want, tmp_path, capsys):
    path = saved(values, tmp_path / "set" / "0.tiff")
    got, _, deep = common.decode(str(path), 8)
    assert deep and np.abs(got.astype(int) - want).max() <= 1 and (got[0] == got[2]).all()
    for _ in range(2):  # not only when they are decoded
        load(path.parent)
        assert "1 images of more than 8 bits, each stretched to its own range" in capsys.readouterr().out


def test_outliers_at_either_end_and_numbers_that_are_not_finite_do_not_set_the_range():
    odd = [np.nan, -np.inf, np.inf, *[-1e6] * 5, *[1e6] * 5]          # of 10,000 finite ones a thousandth
    got = common.stretch(np.array([*np.linspace(100, 200, 9990), *odd], np.float32))
    assert abs(int(got[4995]) - 128) <= 2 and got[0] <= 1 and got[9989] >= 254
    assert got[9990:9993].tolist() == [0, 0, 255]
    with pytest.raises(ValueError, match="no finite value"):
        common.stretch(np.full(4, np.nan, np.float32))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_what_is_transparent_is_white(mode, tmp_path):
    """A black drawing on a transparent ground; P and L name a transparent value."""
    drawn = np.eye(8, dtype=bool)
    image = Image.fromarray((~drawn * (1 if mode in "PL" else 0)).astype(np.uint8))
    options = {"transparency": 1} if mode in "PL" else {}
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 9, 9])
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray((drawn * 255).astype(np.uint8)))
    got, *_ = common.decode(str(saved(image, tmp_path / "0.png", **options)), 8)
    assert (got == np.where(drawn, 0, 255)).all()


@pytest.mark.parametrize("bits, white, kind, words", [
    (16, 0, 1, "16 bits, white is zero"), (8, 1, 2, "signed 8 bits"), (32, 1, 1, "unsigned 32 bits")])
def test_a_tiff_that_pillow_misreads_is_named(bits, white, kind, words, tmp_path):
    values = np.arange(64, dtype=f"u{bits // 8}").reshape(8, 8)
    entries = [(256, 8), (257, 8), (258, bits), (259, 1), (262, white), (273, 8 + 2 + 12 * 9 + 4), (277, 1),
               (279, values.nbytes), (339, kind)]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    path = tmp_path / "0.tif"
    path.write_bytes(struct.pack("<2sHIH", b"II", 42, 8, 9) + table + bytes(4) + values.tobytes())
    with pytest.raises(ValueError, match=f"TIFF of {words}; convert it to"):
        common.decode(str(path), 8)


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
    for i, name in enumerate(["n02", "n01", "n02"]):  # many sort them into folders, and leave the annotations
        (tiny / "val" / name).mkdir(exist_ok=True)
        (tiny / "val" / "images" / f"val_{i}.JPEG").rename(tiny / "val" / name / f"val_{i}.JPEG")
    for place in (tiny / "val", tiny / "val" / "images"):
        for name in ("n01", "n02"):
            (tiny / "val" / name).rename(place / name)
        val = load(tiny.parent, dataset="tinyimagenet", split="test")
        assert val.labels.tolist() == [0, 1, 1] and colours(val) == [50, 0, 100]


def test_hidden_files_are_ignored_and_what_lies_deeper_is_found_whatever_its_extension(tmp_path):
    odd = ["1.GIF", "2.jfif", "3.jpe", "4.avif", "5.jp2", "6.JPEG", "7.webp"]
    for name in ("a/deep/er/1.png", "a/.hidden/2.png", "a/.3.png", ".git/4.png", "b/notes.txt",
                 *(f"b/{name}" for name in odd)):
        saved(COLOURS, tmp_path / name, format="PNG")
    files = [(str(tmp_path / "a/deep/er/1.png"), 0), *((str(tmp_path / "b" / name), 1) for name in odd)]
    assert common.list_tree(tmp_path) == (files, ["a", "b"], ["passed over 1 files: 1 .txt"])


def tree_of(root, counts):
    """So many small images in each of these folders."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            saved(COLOURS, root / folder / f"{i}.png")
    return root


@pytest.mark.parametrize("train, val", [("Train", "Val"), ("training", "Validation"), ("TRAIN", "valid"),
                                        ("train", "Testing")])
def test_splits_of_your_own_images_go_by_the_usual_names_in_any_case(train, val, tmp_path, capsys):
    root = tree_of(tmp_path / "set", {f"{train}/a": 2, f"{train}/b": 1, f"{val}/a": 1, f"{val}/b": 2})
    images, test = load(root), load(root, split="test")
    assert images.classes == test.classes == ["a", "b"]
    assert images.labels.tolist() == [0, 0, 1] and test.labels.tolist() == [0, 1, 1]
    assert f"train: 3 images in 2 classes (a, b) below {root / train}\n" in capsys.readouterr().out


@pytest.mark.parametrize("classes", [["a", "b"], []], ids=["classes", "flat"])
@pytest.mark.parametrize("val", ["val", "Test"])
def test_where_the_training_images_lie_beside_the_test_folder_they_are_read_without_it(
        classes, val, tmp_path, capsys):
    root = tree_of(tmp_path / "set", {**dict.fromkeys(classes or ["."], 3), f"{val}/a": 2, f"{val}/b": 1})
    images = load(root)
    assert images.classes == classes and len(images) == 3 * max(1, len(classes))
    assert not [name for name in images.files if name.startswith(val)]
    assert f"below {root}; not read: {root / val}\n" in capsys.readouterr().out
    assert load(root, split="test").labels.tolist() == [0, 0, 1]
    assert f"below {root / val}\n" in capsys.readouterr().out  # and of the training classes no word
    for name in classes or ["0.png", "1.png", "2.png"]:
        shutil.rmtree(root / name) if classes else (root / name).unlink()
    with pytest.raises(RunError, match=f"{root} holds no images.*; not read: {root / val}"):
        load(root)


def test_what_was_taken_and_what_was_not_is_one_line(tmp_path, capsys):
    root = tree_of(tmp_path / "set", {"train/bus": 2, "train/car": 1, "train/labels": 0, "train": 3,
                                      "masks": 2, "val/bus": 1, "test/bus": 1, "__MACOSX/train": 1})
    for name in ("1.dcm", "2.DCM", "notes.txt"):
        (root / "train" / "car" / name).write_text("")
    assert load(root).classes == ["bus", "car"]  # a folder without images is no class
    line = (f"train: 3 images in 2 classes (bus, car) below {root}/train; not read: 3 images in {root}/train "
            f"itself; passed over 3 files: 2 .dcm, 1 .txt; not read: {root}/masks")
    assert line in capsys.readouterr().out.splitlines()
    load(root, split="test")
    want = f"test: 1 images in 1 classes (bus) below {root}/val; not read: {root}/test, {root}/masks"
    assert want in capsys.readouterr().out.splitlines()


def test_a_file_that_is_replaced_under_its_name_is_decoded_anew_in_the_maps_place(tmp_path, calls):
    tree = made_tree(tmp_path / "set")
    load(tree), load(tree)
    assert len(calls) == 40
    new = tree / "train" / "a" / "000.png"
    Image.new("RGB", (8, 8), (99, 99, 99)).save(new)
    later = time.time() + 5
    os.utime(new, (later, later))
    assert colours(load(tree))[0] == 99 and len(cached(tree)) == 2
    assert len(calls) == 80 and len(load(tree)) == 40 and len(calls) == 80  # once, though the time lies ahead


def test_a_folder_without_classes_trains_and_alike_where_it_is_too_large_for_memory(
        pretrain, tmp_path, monkeypatch):
    for i in range(20):
        pixels = np.full((8 + i, 12, 3), (0, 10 * i, 255), np.uint8)
        saved(pixels, tmp_path / "flat" / f"caf\udce9 {i}.png")       # a name that is not UTF-8
    images = load(tmp_path / "flat", 16)
    assert images.labels.tolist() == [-1] * 20 and images.classes == []
    flags = ["--batch", 4, "--knn-every", 1]
    near = pretrain("near", tmp_path / "flat", *flags)
    monkeypatch.setattr(common, "IN_MEMORY", 0)                       # a thread reads the batches ahead
    same_run(near, pretrain("far", tmp_path / "flat", *flags))


def test_limit_and_preview_decode_no_more_than_they_need_and_a_map_is_shared_until_a_file_moves(
        pretrain, tmp_path, calls):
    tree = made_tree(tmp_path / "set")
    before = {path: path.stat().st_mtime_ns for path in [tree, *tree.rglob("*")]}
    few = load(tree, limit=10)
    assert len(few) == len(calls) == 10 and few.files[0].startswith(("a/", "b/"))
    made = [path.name for path in (tmp_path / "cache").glob("*.npy")]
    assert len(made) == 2 and all(name.startswith("folder-train-8px-first-10-") for name in made)
    assert (pretrain("preview", tree, "--preview") / "preview.png").exists()
    assert len(calls) == 10 + 16
    pretrain("preview", tree, "--preview", "--limit", 20)
    whole = load(tree)
    for limit in (10, 20, 39):
        images, order = load(tree, limit=limit), torch.randperm(40, generator=common.seeded(0))[:limit]
        assert torch.equal(images.labels, whole.labels[order])
        assert colours(images) == [colours(whole)[i] for i in order.tolist()]
    again = load(tree, limit=10)
    assert (again.files, colours(again)) == (few.files, colours(few)) and few.files != whole.files[:10]
    assert len(load(tree, limit=40)) == 40 and len(calls) == 10 + 16 + 20 + 40
    assert before == {path: path.stat().st_mtime_ns for path in [tree, *tree.rglob("*")]}  # as it was
    (tree / "train" / "a" / "000.png").rename(tree / "train" / "b" / "000.png")
    images = load(tree)
    assert colours(images)[19] == 0 and images.labels.tolist() == [0] * 19 + [1] * 21


def test_a_large_jpeg_is_decoded_at_a_part_of_its_pixels_to_nearly_the_same_image(tmp_path, monkeypatch):
    draw = common.seeded("photo")
    photo = sum(TF.resize(torch.randn(3, n, n, generator=draw), [600, 800]) for n in (3, 9, 40))
    photo = ((photo - photo.min()) / (photo.max() - photo.min()) * 255).to(torch.uint8)
    path = saved(photo.permute(1, 2, 0).numpy(), tmp_path / "large.jpg", quality=95)
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize",
                        lambda image, *args: sizes.append(image.size) or resize(image, *args))
    (part, aspect, _), (near, *_) = common.decode(str(path), 64), common.decode(str(path), 400)
    monkeypatch.setattr(JpegImageFile, "draft", lambda *_: None)
    (whole, *_), (same, *_) = common.decode(str(path), 64), common.decode(str(path), 400)
    assert sizes == [(100, 75), (800, 600), (800, 600), (800, 600)] and aspect == pytest.approx(4 / 3)
    assert np.abs(part.astype(int) - whole).mean() < 2 and (near == same).all()


def test_broken_files_are_named_and_left_out_but_not_many_of_a_few_or_all(tmp_path, capsys):
    tree = made_tree(tmp_path / "set", 200)
    (tree / "train" / "b" / "007.png").write_bytes(b"\x89PNG broken")
    images = load(tree)
    [line] = capsys.readouterr().err.splitlines()
    assert "not decodable, 1 of 200" in line and "007.png" in line
    assert colours(images) == [*range(0, 200, 2), *(i for i in range(1, 200, 2) if i != 7)]
    assert images.labels.tolist() == [0] * 100 + [1] * 99
    load(tree)
    printed = "".join(capsys.readouterr())
    assert "left out 1 of 200" in printed and "007.png" not in printed
    for name in ("a/008.png", "b/009.png", "a/010.png", "b/011.png"):
        (tree / "train" / name).write_bytes(b"")
    assert len(load(tree, 9)) == 195                                  # five, of 1 % two
    (tree / "train" / "a" / "012.png").unlink()
    (tree / "train" / "a" / "012.png").symlink_to("nowhere.png")      # a broken link
    with pytest.raises(RunError, match="6 of 200 images do not decode, want RGB or grey .*00[789].png"):
        load(tree, 10)
    for path in (tree / "train" / "a").iterdir():
        path.unlink()
    for path in (tree / "train" / "b").iterdir():
        path.write_bytes(b"") if path.name in ("001.png", "003.png") else path.unlink()
    with pytest.raises(RunError, match="2 of 2 images do not decode"):
        load(tree, 10)
    for path in (tree / "train" / "b").iterdir():  # as of a data set whose content was not fetched
        path.unlink()
        path.symlink_to("nowhere.png")
    with pytest.raises(RunError, match="2 of 2 images do not decode"):
        load(tree, 11)
    assert len(cached(tree)) == 4


def test_a_full_disk_is_one_error_before_the_first_image_or_in_the_middle_and_leaves_nothing(
        tmp_path, monkeypatch, calls):
    tree = made_tree(tmp_path / "set", 100)
    with monkeypatch.context() as patch:
        patch.setattr(common.shutil, "disk_usage", lambda _: collections.namedtuple("Usage", "free")(1e7))
        with pytest.raises(RunError, match="100 decoded images take 0.02 GB.* 0.01 GB left.*--cache"):
            load(tree, 224)
    assert not calls
    with disk_of(1_000_000), pytest.raises(RunError, match="could not write .*npy .File too large"):
        load(tree, 224)
    assert not cached(tree)


@pytest.mark.parametrize("function, nth", [("write", 20), ("fsync", 1), ("replace", 1)])
def test_a_kill_while_decoding_leaves_nothing_that_reads_as_whole(function, nth, tmp_path, calls):
    tree = made_tree(tmp_path / "set")
    killed(lambda: load(tree), function, nth)
    assert not [path for path in (tree.parent / "cache").glob("*px-*.npy") if "aspect" not in path.name]
    images = load(tree)                                               # decodes all of them anew
    assert len(calls) == 40 and colours(images) == [*range(0, 40, 2), *range(1, 40, 2)]
    assert (images.aspect == 1).all() and cached(tree) == [".npy", ".npy"]  # no squashed squares


def test_two_runs_at_once_decode_once(tmp_path, monkeypatch, calls):
    tree, decode = made_tree(tmp_path / "set"), common.decode
    monkeypatch.setattr(common, "decode", lambda *args: time.sleep(0.1) or decode(*args))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(load, [tree, tree])
    assert len(calls) == 40 and colours(first) == colours(second) == [*range(0, 40, 2), *range(1, 40, 2)]
