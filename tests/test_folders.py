import contextlib
import json
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import (
    load_folder,
    make_folder,
    names_of,
    needs_names_of_bytes,
    write_image,
)
from PIL import Image

import evaluation
import functions
from support import decoding, files, folders
from support.errors import UserError


def classes_of(split, data):
    return [data.classes[label] for label in split.labels]


# layouts of a folder


def test_train_and_test_folders(tmp_path):
    train = [f"train/{name}/{i}.png" for name in "cab" for i in (2, 0, 1)]
    test = ["test/c/0.png", "test/a/1.png", "test/a/0.png"]  # none of b: labels must not shift
    made = make_folder(tmp_path / "in", *train, *test)
    data = load_folder(tmp_path / "in", tmp_path / "data")
    assert data.name == "in"
    assert data.classes == ("a", "b", "c")
    assert names_of(data.train, made) == sorted(train)
    assert classes_of(data.train, data) == list("aaabbbccc")
    assert names_of(data.test, made) == sorted(test)
    assert classes_of(data.test, data) == list("aac")
    assert data.train.paths.tolist() == names_of(data.train, made)
    assert data.test.paths.tolist() == names_of(data.test, made)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64


@pytest.mark.parametrize("parent", ["", "train/"])
def test_class_folders_have_a_fifth_split_off_stratified_and_always_the_same(tmp_path, parent):
    counts = {"cat": 10, "dog": 30}
    names = [f"{parent}{kind}/{i:02}.png" for kind in counts for i in range(counts[kind])]
    made = make_folder(tmp_path / "in", *names)
    tests = []
    for seed in (1, 2):
        np.random.seed(seed)
        torch.manual_seed(seed)
        data = load_folder(tmp_path / "in", tmp_path / f"data{seed}")
        train, test = names_of(data.train, made), names_of(data.test, made)
        assert sorted(train + test) == sorted(names)
        assert classes_of(data.train, data) == [name.split("/")[-2] for name in train]
        assert classes_of(data.test, data) == [name.split("/")[-2] for name in test]
        assert classes_of(data.test, data) == ["cat"] * 2 + ["dog"] * 6
        assert (data.train.paths.tolist(), data.test.paths.tolist()) == (train, test)
        tests.append(test)
    assert tests[0] == tests[1]


@pytest.mark.parametrize("layout", ["", "train/"])
def test_flat_folder_has_no_labels(tmp_path, layout):
    names = [f"{layout}{i}.png" for i in (3, 1, 2)]
    made = make_folder(tmp_path / "in", *names)
    data = load_folder(tmp_path / "in", tmp_path / "data")
    assert names_of(data.train, made) == data.train.paths.tolist() == sorted(names)
    assert data.train.labels is None
    assert data.test is None
    assert data.classes == ()


def test_unlabelled_folders_are_no_classes(tmp_path, user_error):
    names = ["loose.png", "one/0.png", "train/deep/er/1.png", "test/2.png", "val/x/3.png"]
    made = make_folder(tmp_path / "in", *names)
    (tmp_path / "empty").mkdir()
    with user_error("val beside train"):
        functions.load_images(str(tmp_path / "in"), tmp_path / "data", 8)
    data = functions.load_images(str(tmp_path / "in"), tmp_path / "data", 8, unlabelled=True)
    assert sorted(names_of(data.train, made)) == sorted(names)
    assert names_of(data.train, made) == data.train.paths.tolist()
    assert (data.train.labels, data.test, data.classes) == (None, None, ())
    with user_error("empty", "no images"):
        functions.load_images(str(tmp_path / "empty"), tmp_path / "data", unlabelled=True)
    with user_error("--unlabelled", "digits"):
        functions.load_images("digits", unlabelled=True)


def test_nested_folders_count_and_hidden_and_other_files_do_not(tmp_path):
    wanted = [f"a/deep/er/{i}.png" for i in range(3)] + ["a/b/0.PNG", "a/1.png"]
    wanted += [f"b/{i}.bmp" for i in range(4)] + ["b/4.pnm"]
    hidden = ["a/.hidden.png", "a/.folder/0.png", ".git/0.png", "b/._0.png"]
    made = make_folder(tmp_path / "in", *wanted, *hidden)
    for name in ("a/notes.txt", "README.md", ".DS_Store", "b/Thumbs.db"):
        (tmp_path / "in" / name).write_text("no image")
    data = load_folder(tmp_path / "in", tmp_path / "data")
    assert data.classes == ("a", "b")
    everything = names_of(data.train, made) + names_of(data.test, made)
    assert sorted(everything) == sorted(wanted)
    labels = classes_of(data.train, data) + classes_of(data.test, data)
    assert labels == [name[0] for name in everything]


def test_class_called_train_does_not_hide_the_others(tmp_path):
    make_folder(
        tmp_path / "in", *(f"{kind}/{i}.png" for kind in ("car", "train") for i in range(5))
    )
    with contextlib.suppress(UserError):
        assert load_folder(tmp_path / "in", tmp_path / "data").classes == ("car", "train")


@pytest.mark.parametrize("others", [["val"], ["test", "val"], ["test", "extra", "valid"]])
def test_parts_of_a_data_set_are_not_taken_for_classes(tmp_path, others, user_error):
    parts = ["train", *others]
    make_folder(
        tmp_path / "in", *(f"{a}/{b}/{i}.png" for a in parts for b in "xy" for i in range(5))
    )
    with user_error(tmp_path / "in", others[-1]):  # a forgotten validation set would be no help
        load_folder(tmp_path / "in", tmp_path / "data")


def test_current_folder_has_its_own_name(tmp_path, monkeypatch):
    make_folder(tmp_path / "in", "0.png")
    monkeypatch.chdir(tmp_path / "in")
    assert load_folder(".", tmp_path / "data").name == "in"


@pytest.mark.parametrize("target", [".", ".."])
def test_link_in_a_circle_does_not_multiply_the_images(tmp_path, target):
    names = [f"{kind}/{i}.png" for kind in "ab" for i in range(5)]
    made = make_folder(tmp_path / "in", *names)
    (tmp_path / "in" / "a" / "circle").symlink_to(target)
    data = load_folder(tmp_path / "in", tmp_path / "data")
    assert sorted(names_of(data.train, made) + names_of(data.test, made)) == names


def test_links_to_folders_and_images_are_followed(tmp_path):
    made = make_folder(tmp_path / "real", "0.png", "1.png", "more/2.png")
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / "train" / name).mkdir(parents=True)
        (tmp_path / "in" / "train" / name / "link.png").symlink_to(tmp_path / "real" / "0.png")
        (tmp_path / "in" / "test" / name).mkdir(parents=True)
    (tmp_path / "in" / "test" / "a" / "folder").symlink_to(tmp_path / "real")
    (tmp_path / "in" / "test" / "b" / "1.png").symlink_to(tmp_path / "real" / "1.png")
    data = load_folder(tmp_path / "in", tmp_path / "data")
    assert names_of(data.train, made) == ["0.png", "0.png"]
    assert sorted(names_of(data.test, made)) == ["0.png", "1.png", "1.png", "more/2.png"]


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("my holiday pictures", "my picture"),
        ("[a-b]*?", "[a-b]*?"),
        ("Füße", "Füße"),
        pytest.param("in", os.fsdecode(b"caf\xe9"), marks=needs_names_of_bytes),
    ],
    ids=ascii,
)
def test_any_name_of_folder_class_and_file_works(tmp_path, folder, file):
    names = [f"{kind}/{file} {i}.png" for kind in (folder, "other") for i in range(5)]
    made = make_folder(tmp_path / folder, *names)
    load_folder(tmp_path / folder, tmp_path / "data")
    data = load_folder(tmp_path / folder, tmp_path / "data")
    train = names_of(data.train, made)
    assert sorted(train + names_of(data.test, made)) == sorted(names)
    assert classes_of(data.train, data) == [path.split("/")[0] for path in train]
    index = torch.arange(len(data.test))
    files.write_arrays(tmp_path / "where.npz", **evaluation.identify_images(data.test, index))
    arrays = files.read_arrays(tmp_path / "where.npz")
    assert arrays["paths"].tolist() == names_of(data.test, made)
    assert arrays["labels"].tolist() == data.test.labels.tolist()


@needs_names_of_bytes
@pytest.mark.parametrize("place", ["data set", "class"])
def test_a_folder_whose_name_no_plot_can_show_is_refused(tmp_path, user_error, place):
    strange = os.fsdecode(b"caf\xe9")
    folder, name = (strange, "a") if place == "data set" else ("in", strange)
    make_folder(tmp_path / folder, *(f"{kind}/{i}.png" for kind in (name, "b") for i in range(5)))
    with user_error(ascii(strange)[1:-1], "UTF-8"):
        load_folder(tmp_path / folder, tmp_path / "data")


# mistakes


@pytest.mark.parametrize("name", ["imagenet", "/no/such/folder", "~nobody-here/x", "x" * 5000])
def test_unknown_data_set_names_the_known_ones(tmp_path, user_error, name):
    with user_error(name[:20], "cifar10", "fashion-mnist", "digits"):
        functions.load_images(name, tmp_path)


MISTAKES = {
    "a file": (["in"], ["in", "file"]),
    "empty": (["in/"], ["in", "no images"]),
    "no images": (["in/notes.txt"], ["in", "no images"]),
    "empty train": (["in/train/", "in/test/a/0.png"], ["train", "no images"]),
    "one class": ([f"in/cat/{i}.png" for i in range(9)], ["in", "cat", "--unlabelled"]),
    "one class to train": (["in/train/cat/0.png", "in/test/cat/0.png"], ["train", "cat"]),
    "empty class": (["in/cat/0.png", "in/dog/"], ["dog"]),
    "empty test class": (
        ["in/train/cat/0.png", "in/train/dog/0.png", "in/test/dog/notes.txt"],
        ["test", "dog"],
    ),
    "no test class": (["in/train/cat/0.png", "in/train/dog/0.png", "in/test/"], ["test"]),
    "loose images": (
        ["in/cat/0.png", "in/dog/0.png", "in/a.png", "in/b.png"],
        ["in", "2", "a.png", "--unlabelled"],
    ),
    "unknown test class": (
        ["in/train/cat/0.png", "in/train/dog/0.png", "in/test/cow/0.png"],
        ["test", "cow"],
    ),
    "capital letters": (
        ["in/Train/cat/0.png", "in/Train/dog/0.png", "in/Test/cat/0.png"],
        ["Test, Train", "call them train and test"],
    ),
    "class too small to split": (
        ["in/cat/0.png", *(f"in/dog/{i}.png" for i in range(9))],
        ["too few"],
    ),
}


@pytest.mark.parametrize(("names", "words"), MISTAKES.values(), ids=MISTAKES)
def test_unusable_folder_is_named(tmp_path, user_error, names, words):
    for name in names:
        path = tmp_path / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        elif path.suffix == ".png":
            write_image(path, (255, 0, 0))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("no image")
    with user_error(*words):
        load_folder(tmp_path / "in", tmp_path / "data")


def test_unreadable_images_are_named_and_counted(tmp_path, user_error):
    make_folder(tmp_path / "in", *(f"{i}.png" for i in range(9)))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "in" / "3.png")
    os.truncate(tmp_path / "in" / "3.png", 5000)
    (tmp_path / "in" / "7.png").write_bytes(b"")
    with user_error("2 of 9", "3.png"):
        load_folder(tmp_path / "in", tmp_path / "data")


@pytest.mark.parametrize("folders", [[""], ["a/", "b/"]], ids=["flat", "classes"])
def test_link_to_a_missing_image_is_named(tmp_path, user_error, folders):
    make_folder(tmp_path / "in", *(f"{folder}{i}.png" for folder in folders for i in range(5)))
    (tmp_path / "in" / folders[0] / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with user_error("gone.png"):
        load_folder(tmp_path / "in", tmp_path / "data")


# decoding one image


def decode(path, size, **rules):
    """Decode one image; where its type leaves the range of values open, it is that of the type."""
    ranges = {"f": (0, 1), "i": (0, 65535), "u": (0, 65535)}
    pixels = decoding.read_image(path, size, decoding.PixelRules(**rules))
    given = {"value_range": ranges[pixels.dtype.kind], **rules}
    return decoding.fit(pixels, size, decoding.PixelRules(**given))


def gray16(value):
    return Image.fromarray(np.full((20, 30), value, np.uint16))


def palette(colour, **info):
    image = Image.new("P", (30, 20), 1)
    image.putpalette([255, 0, 255, *colour])
    image.info.update(info)
    return image


def plain(mode, colour):
    return Image.new(mode, (30, 20), colour)


RED, TEAL, WHITE = (255, 0, 0), (10, 120, 130), (255, 255, 255)


@pytest.mark.parametrize(
    ("suffix", "image", "options", "expected", "tolerance"),
    [
        pytest.param("png", plain("RGB", TEAL), {}, TEAL, 0, id="RGB"),
        pytest.param("png", plain("L", 100), {}, (100,) * 3, 0, id="L"),
        pytest.param("png", plain("1", 1), {}, WHITE, 0, id="1 white"),
        pytest.param("png", plain("1", 0), {}, (0, 0, 0), 0, id="1 black"),
        pytest.param("png", palette(TEAL), {}, TEAL, 0, id="P"),
        pytest.param("png", palette(TEAL), {"transparency": 0}, TEAL, 0, id="P opaque"),
        pytest.param("png", palette(TEAL), {"transparency": 1}, WHITE, 0, id="P transparent"),
        pytest.param(
            "png", palette(TEAL), {"transparency": b"\xff\x00"}, WHITE, 0, id="P alpha table"
        ),
        pytest.param("png", plain("LA", (50, 0)), {}, WHITE, 0, id="LA transparent"),
        pytest.param("png", plain("LA", (50, 255)), {}, (50,) * 3, 0, id="LA opaque"),
        pytest.param("png", plain("LA", (0, 51)), {}, (204,) * 3, 1, id="LA a fifth"),
        pytest.param("png", plain("RGBA", (*TEAL, 0)), {}, WHITE, 0, id="RGBA transparent"),
        pytest.param("png", plain("RGBA", (*TEAL, 255)), {}, TEAL, 0, id="RGBA opaque"),
        pytest.param("png", plain("RGBA", (255, 0, 0, 102)), {}, (255, 153, 153), 1, id="RGBA 40%"),
        pytest.param("png", plain("L", 50), {"transparency": 50}, WHITE, 0, id="L colour key"),
        pytest.param("png", plain("RGB", TEAL), {"transparency": TEAL}, WHITE, 0, id="RGB key"),
        pytest.param("png", gray16(0x8000), {}, (128,) * 3, 0, id="I;16 png"),
        pytest.param("png", gray16(1000), {}, (4,) * 3, 0, id="I;16 png, dark"),
        pytest.param("tif", gray16(0x8000), {}, (128,) * 3, 0, id="I;16 tiff"),
        pytest.param("tif", gray16(0xC000), {"compression": "tiff_lzw"}, (191,) * 3, 0, id="lzw"),
        pytest.param("tif", plain("I;16B", 0x40FF), {}, (65,) * 3, 0, id="I;16B tiff"),
        pytest.param("tif", plain("F", 0.25), {}, (64,) * 3, 0, id="F tiff"),
        pytest.param("tif", plain("RGBA", (*TEAL, 0)), {}, WHITE, 0, id="RGBA tiff"),
        pytest.param("jpg", plain("L", 100), {}, (100,) * 3, 2, id="L jpeg"),
        pytest.param("jpg", plain("RGB", TEAL), {}, TEAL, 4, id="RGB jpeg"),
        pytest.param("jpg", plain("CMYK", (0, 255, 255, 0)), {}, RED, 4, id="CMYK jpeg"),
        pytest.param("jpg", plain("CMYK", (0, 0, 0, 255)), {}, (0, 0, 0), 4, id="CMYK black"),
        pytest.param("webp", plain("RGB", TEAL), {"lossless": True}, TEAL, 0, id="webp"),
        pytest.param("webp", plain("RGBA", (*RED, 0)), {"lossless": True}, WHITE, 0, id="webp a"),
        pytest.param("gif", palette(TEAL), {"transparency": 1}, WHITE, 0, id="gif transparent"),
        pytest.param(
            "gif",
            palette(TEAL),
            {"save_all": True, "append_images": [palette(RED)]},
            TEAL,
            0,
            id="animated gif",
        ),
        pytest.param("png", Image.new("RGB", (1, 1), TEAL), {}, TEAL, 0, id="1x1"),
    ],
)
def test_every_mode_becomes_rgb_on_white(tmp_path, suffix, image, options, expected, tolerance):
    path = tmp_path / f"image.{suffix}"
    image.save(path, **options)
    decoded = decode(path, 16, stack="first")
    assert decoded.shape == (3, 16, 16)
    assert decoded.dtype == np.uint8
    difference = decoded.astype(int) - np.reshape(expected, (3, 1, 1))
    assert np.abs(difference).max() <= tolerance


@pytest.mark.parametrize(
    ("suffix", "options"),
    [("png", {}), ("bmp", {}), ("ppm", {}), ("tif", {}), ("webp", {"lossless": True})],
)
def test_lossless_image_of_the_right_size_is_bit_exact(tmp_path, suffix, options):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **options)
    decoded = decode(tmp_path / f"a.{suffix}", 16)
    np.testing.assert_array_equal(decoded, pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("shape", [(500, 3), (3, 500)], ids=["tall", "wide"])
def test_long_strip_is_cropped_to_its_centre(tmp_path, shape):
    pixels = np.full((*shape, 3), RED, np.uint8)
    pixels[
        tuple(slice(side // 2 - 8, side // 2 + 8) if side > 3 else slice(3) for side in shape)
    ] = TEAL
    Image.fromarray(pixels).save(tmp_path / "a.png")
    decoded = decode(tmp_path / "a.png", 16)
    np.testing.assert_array_equal(decoded, np.full((16, 16, 3), TEAL).transpose(2, 0, 1))


@pytest.mark.parametrize("width", [2000, 400])
def test_large_jpeg_is_its_resized_centre(tmp_path, width):
    height = width * 3 // 4
    y, x = np.ogrid[:height, :width]
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., 0] = x / width * 255
    pixels[..., 1] = y / height * 255
    pixels[..., 2] = 127 + 100 * np.sin(80 * x / width)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.jpg", quality=95)
    left = (width - height) // 2
    centre = image.crop((left, 0, left + height, height)).resize((32, 32), Image.Resampling.BICUBIC)
    difference = decode(tmp_path / "a.jpg", 32) - np.asarray(centre, float).transpose(2, 0, 1)
    assert np.abs(difference).max() < 25
    assert np.abs(difference).mean() < 2


def test_shrinking_averages(tmp_path):
    checkerboard = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checkerboard).save(tmp_path / "a.png")
    assert np.abs(decode(tmp_path / "a.png", 16) - 127.5).max() < 10


UPRIGHT = {  # Exif 2.3, table 4.6.5: how the stored pixels are turned to be shown
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    shown = UPRIGHT[orientation](pixels)
    top, left = (shown.shape[0] - 16) // 2, (shown.shape[1] - 16) // 2
    shown = shown[top : top + 16, left : left + 16]
    np.testing.assert_array_equal(decode(tmp_path / "a.png", 16), shown.transpose(2, 0, 1))


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch, user_error):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with user_error(f"cannot read {tmp_path / 'closed'}: Permission denied"):
        folders.image_files(tmp_path)


def test_other_rules_have_a_cache_of_their_own_and_drafts_of_the_dead_go(tmp_path):
    (tmp_path / "in").mkdir()
    for n in range(5):
        Image.new("RGB", (16, 16), (n, 50, 99)).save(tmp_path / "in" / f"{n}.png")
    data_dir, cache = tmp_path / "data", tmp_path / "data" / "cache"
    old, new = cache / ".decoding-old", cache / ".decoding-new"
    for draft in (old, new):
        draft.mkdir(parents=True)
    os.utime(old, (0, 0))
    for channels in (1, None):
        rules = decoding.PixelRules(channels=channels)
        functions.load_images(str(tmp_path / "in"), data_dir, 16, None, rules)
    assert len(list(cache.glob("*.npy"))) == 2
    assert not old.exists()
    assert new.exists()  # another process may be at work there


def test_rotated_photo_is_upright(tmp_path):
    stored = np.zeros((300, 400, 3), np.uint8)
    stored[:, :200] = RED  # left as stored is the top as shown with orientation 6
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif)
    decoded = decode(tmp_path / "a.jpg", 16)
    assert decoded[0, :6].min() > 240
    assert decoded[0, 10:].max() < 15


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"], ids=ascii
)
def test_broken_exif_does_not_cost_the_picture(tmp_path, exif):
    plain("RGB", TEAL).save(tmp_path / "a.jpg", exif=exif)
    assert abs(int(decode(tmp_path / "a.jpg", 16)[2, 8, 8]) - TEAL[2]) <= 4


# the cache of decoded folders


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images decoded so far."""
    names = []

    read_image = decoding.read_image

    def recorded(path, size, rules):
        names.append(Path(path).name)
        return read_image(path, size, rules)

    monkeypatch.setattr(decoding, "read_image", recorded)
    return names


def cache_files(data_dir, suffix="*"):
    return sorted(path for path in data_dir.rglob(suffix) if path.is_file())


def change(folder):
    path = folder / "1.bmp"
    before = path.stat()
    write_image(path, (9, 9, 9))
    assert path.stat().st_size == before.st_size  # so that the size alone does not tell
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))


CHANGES = {
    "changed": (change, [(0, 255, 0), (9, 9, 9), (2, 253, 14)]),
    "added": (
        lambda folder: write_image(folder / "0a.bmp", (8, 8, 8)),
        [(0, 255, 0), (8, 8, 8), (1, 254, 7), (2, 253, 14)],
    ),
    "removed": (lambda folder: (folder / "1.bmp").unlink(), [(0, 255, 0), (2, 253, 14)]),
    "renamed": (
        lambda folder: (folder / "0.bmp").rename(folder / "9.bmp"),
        [(1, 254, 7), (2, 253, 14), (0, 255, 0)],
    ),
}


@pytest.mark.parametrize(("alter", "colours"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("folder", ["in", "[in]"])
def test_altered_folder_is_decoded_again_and_its_old_cache_removed(
    tmp_path, decoded, folder, alter, colours
):
    make_folder(tmp_path / folder, *(f"{i}.bmp" for i in range(3)))
    make_folder(tmp_path / "elsewhere" / folder, "0.bmp")
    for path in (tmp_path / folder).iterdir():
        os.utime(path, ns=(10**18, 10**18))  # alike in time and size, as an archive leaves them
    data_dir = tmp_path / "data"
    load_folder(tmp_path / "elsewhere" / folder, data_dir)
    kept = cache_files(data_dir)
    load_folder(tmp_path / folder, data_dir)
    old = set(cache_files(data_dir)) - set(kept)
    decoded.clear()
    alter(tmp_path / folder)
    data = load_folder(tmp_path / folder, data_dir)
    assert [tuple(colour) for colour in data.train.images[:, :, 0, 0].tolist()] == colours
    assert len(decoded) == len(colours)
    assert not old & set(cache_files(data_dir))
    assert set(kept) < set(cache_files(data_dir))  # another folder's, of the same name


def test_another_image_size_is_decoded_anew(tmp_path, decoded):
    made = make_folder(tmp_path / "in", "0.png", "1.png")
    for size in (8, 12, 12):
        images = load_folder(tmp_path / "in", tmp_path / "data", size).train
        assert images.images.shape == (2, 3, size, size)
        assert names_of(images, made) == ["0.png", "1.png"]
    assert len(decoded) == 4


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


DAMAGES = {
    "flipped first byte": lambda array, record: flip(array, 0),
    "flipped byte": lambda array, record: flip(array, -100),
    "truncated": lambda array, record: os.truncate(array, array.stat().st_size - 1),
    "empty": lambda array, record: os.truncate(array, 0),
    "no record": lambda array, record: record.unlink(),
    "empty record": lambda array, record: record.write_text(""),
    "record of another kind": lambda array, record: record.write_text("[]"),
    "record without a checksum": lambda array, record: record.write_text("{}"),
    "record with another checksum": lambda array, record: record.write_text(
        json.dumps({key: 1 for key in json.loads(record.read_text())})
    ),
    "another shape": lambda array, record: np.save(array, np.zeros((1, 3, 8, 8), np.uint8)),
    "another type": lambda array, record: np.save(array, np.zeros((2, 3, 8, 8), np.float32)),
    "shape turned": lambda array, record: np.save(array, np.load(array).reshape(3, 2, 8, 8)),
    "another type, same bytes": lambda array, record: np.save(array, np.load(array).view(np.int8)),
    "pickled": lambda array, record: np.save(array, np.array([{}]), allow_pickle=True),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_cache_is_noticed_and_built_again(tmp_path, decoded, damage):
    made = make_folder(tmp_path / "in", "0.png", "1.png")
    data_dir = tmp_path / "data"
    load_folder(tmp_path / "in", data_dir)
    damage(*cache_files(data_dir, "*.npy"), *cache_files(data_dir, "*.json"))
    for _ in range(2):  # the second time from the cache
        data = load_folder(tmp_path / "in", data_dir)
        assert names_of(data.train, made) == ["0.png", "1.png"]
    assert len(decoded) == 4


def test_damage_anywhere_in_the_caches_header_is_noticed(tmp_path):
    made = make_folder(tmp_path / "in", "0.png", "1.png")
    load_folder(tmp_path / "in", tmp_path / "data")
    (array,) = cache_files(tmp_path / "data", "*.npy")
    for position in range(0, array.stat().st_size - 2 * 3 * 8 * 8, 5):
        content = array.read_bytes()
        array.write_bytes(content[:position] + b"(" + content[position + 1 :])
        data = load_folder(tmp_path / "in", tmp_path / "data")
        assert names_of(data.train, made) == ["0.png", "1.png"]


def test_writing_to_the_images_does_not_reach_the_cache(tmp_path, decoded):
    made = make_folder(tmp_path / "in", "0.png", "1.png")
    for _ in range(2):
        data = load_folder(tmp_path / "in", tmp_path / "data")
        assert names_of(data.train, made) == ["0.png", "1.png"]
        data.train.images.zero_()
    assert len(decoded) == 2


def test_disk_without_room_for_the_cache_costs_only_the_cache(tmp_path, small_disk):
    made = make_folder(tmp_path / "in", *(f"{i}.png" for i in range(30)))
    with small_disk(4000):
        data = load_folder(tmp_path / "in", tmp_path / "data")
    assert len(names_of(data.train, made)) == 30
    assert cache_files(tmp_path / "data") == []


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_two_loads_at_once_leave_a_valid_cache(tmp_path, monkeypatch, kind):
    made = make_folder(tmp_path / "in", *(f"{i}.png" for i in range(5)))
    context = multiprocessing.get_context("fork")
    together = context.Barrier(2) if kind == "processes" else threading.Barrier(2)
    read_image = decoding.read_image

    def in_step(path, size, rules):
        together.wait(20)
        return read_image(path, size, rules)

    def load():
        data = load_folder(tmp_path / "in", tmp_path / "data")
        assert names_of(data.train, made) == [f"{i}.png" for i in range(5)]

    monkeypatch.setattr(decoding, "read_image", in_step)
    if kind == "processes":
        processes = [context.Process(target=load) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(30)
        assert [process.exitcode for process in processes] == [0, 0]
    else:
        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(load) for _ in range(2)]:
                future.result(30)
    monkeypatch.setattr(decoding, "read_image", lambda *_: 1 / 0)
    load()
    assert [path.suffix for path in cache_files(tmp_path / "data")] == [".json", ".npy"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="cannot tell what is mapped")
def test_no_file_is_mapped_when_it_gets_its_name(tmp_path, monkeypatch, capsys):
    """Windows refuses to rename it then."""
    replace = os.replace

    def refuse_mapped_files(source, target):
        if str(source) in Path("/proc/self/maps").read_text():
            raise PermissionError(13, "the file is in use")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_mapped_files)
    make_folder(tmp_path / "in", "0.png", "1.png")
    load_folder(tmp_path / "in", tmp_path / "data")
    assert "without a cache" not in capsys.readouterr().out
    assert [path.suffix for path in cache_files(tmp_path / "data")] == [".json", ".npy"]


def test_a_job_with_few_of_the_cores_decodes_in_as_few_threads(tmp_path, monkeypatch):
    asked = []

    def executor(threads):
        asked.append(threads)
        return ThreadPoolExecutor(threads)

    monkeypatch.setattr(folders, "ThreadPoolExecutor", executor)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 7}, raising=False)
    make_folder(tmp_path / "in", "0.png", "1.png")
    load_folder(tmp_path / "in", tmp_path / "data")
    assert asked == [2]


def test_failed_decoding_leaves_nothing(tmp_path, user_error):
    make_folder(tmp_path / "in", "0.png")
    (tmp_path / "in" / "1.png").write_text("no image")
    with user_error("1 of 2", "1.png"):
        load_folder(tmp_path / "in", tmp_path / "data")
    assert cache_files(tmp_path / "data") == []


# folders with broken images


def make_mixed_folder(root):
    """Three good images, a file that is none, a truncated one, a dead link and a pipe."""
    made = make_folder(root, *(f"{name}.png" for name in "adf"))
    (root / "b.png").write_text("no image")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(root / "c.png")
    os.truncate(root / "c.png", 5000)
    (root / "e.png").symlink_to("nowhere.png")
    os.mkfifo(root / "g.png")
    return made


def readable(root, data_dir):
    paths = folders.image_files(root)
    rules = decoding.PixelRules()
    images, broken, _ = folders.decode_readable(paths, root, data_dir, 8, rules)
    assert images.shape == (len(paths), 3, 8, 8)
    assert len(set(broken.values())) == len(broken)
    good = {
        paths[row].name: tuple(images[row, :, 4, 4].tolist())
        for row in range(len(paths))
        if row not in broken
    }
    return good, {paths[row].name: reason for row, reason in broken.items()}


@pytest.mark.parametrize("cached", [True, False])
def test_broken_images_are_told_apart_also_from_the_cache(tmp_path, decoded, cached):
    made = make_mixed_folder(tmp_path / "in")
    if not cached:
        (tmp_path / "data").write_text("")
    for _ in range(2):
        decoded.clear()
        good, broken = readable(tmp_path / "in", tmp_path / "data")
        assert {colour: name for name, colour in good.items()} == made
        assert broken.keys() == {f"{name}.png" for name in "bceg"}
        for name, word in zip("bceg", ("format", "truncated", "No such", "plain"), strict=True):
            assert word in broken[f"{name}.png"]
            assert str(tmp_path) not in broken[f"{name}.png"]
    assert sorted(decoded) == (["b.png", "c.png"] if cached else [f"{n}.png" for n in "abcdf"])


def test_the_first_broken_image_stops_when_asked_to(tmp_path, decoded, user_error):
    for i in range(2000):
        write_image(tmp_path / "in" / f"{i:04}.png", (1, 2, 3))
    for name in ("0000.png", "0001.png"):
        (tmp_path / "in" / name).write_text("no image")
    paths = folders.image_files(tmp_path / "in")
    with user_error(tmp_path / "in" / "0000.png", "no image format"):
        folders.decode_readable(
            paths, tmp_path / "in", tmp_path / "data", 8, decoding.PixelRules(), stop=True
        )
    assert len(decoded) < 1800
    assert cache_files(tmp_path / "data") == []


def test_a_folder_to_train_on_and_its_readable_images_have_caches_of_their_own(tmp_path, decoded):
    make_folder(tmp_path / "in", "0.png", "1.png")
    for _ in range(2):
        load_folder(tmp_path / "in", tmp_path / "data")
        readable(tmp_path / "in", tmp_path / "data")
    assert len(decoded) == 4
    (tmp_path / "in" / "2.png").write_text("no image")
    readable(tmp_path / "in", tmp_path / "data")
    assert len(cache_files(tmp_path / "data")) == 4  # the older one of the readable images is gone
