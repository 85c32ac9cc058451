"""Images of science: files written by tifffile, numpy and Pillow, read as a folder."""

import dataclasses
import importlib.util
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, UnidentifiedImageError

import embed
import functions
import rnn
import simclr
from support import augment, checkpoints, datasets, decoding, files, folders, randaugment, settings

needs_tifffile = pytest.mark.skipif(
    importlib.util.find_spec("tifffile") is None, reason="needs tifffile"
)


def draw(shape, high=256, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape)


def load(folder, size=16, **rules):
    rules = decoding.PixelRules(**rules)
    return functions.load_images(str(folder), folder.parent / "data", size, None, rules)


def write_png(path, values, orientation=None):
    """A PNG of 16 bits `(H, W, 3)` or `(H, W, 4)`, as its specification says (Pillow has none)."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    height, width = values.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    kind = {3: 2, 4: 6}[values.shape[2]]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    exif = b""
    if orientation:
        tags = Image.Exif()
        tags[0x0112] = orientation
        exif = chunk(b"eXIf", tags.tobytes().removeprefix(b"Exif\0\0"))
    parts = (
        chunk(b"IHDR", header) + exif + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def write_tiff(path, array, **options):
    pytest.importorskip("tifffile").imwrite(path, array, **options)


# the range of values


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [
        (0, 1, (0, 1)),
        (0.2, 0.9, (0, 1)),
        (0, 200.5, (0, 255)),
        (0, 1000, (0, 1023)),
        (5, 4095, (0, 4095)),
        (0, 10_000, (0, 16_383)),
        (0, 65_535, (0, 65_535)),
        (0, 65_536, (0, 65_536)),
        (-1, 1, (-1, 1)),
        (-7, -7, (-7, -6)),
    ],
)
def test_range_is_that_of_the_fewest_bits_that_hold_the_values(least, most, expected):
    assert decoding.choose_value_range(least, most) == expected


SAME = {  # 8-bit pixels, and the values by which other types say the same
    "float32 to 255": ("tif", lambda a: a.astype(np.float32), (0, 255)),
    "float32 to 1": ("tif", lambda a: (a / 255).astype(np.float32), (0, 1)),
    "float64": ("tif", lambda a: a / 255, (0, 1)),
    "12 bits in 16": ("tif", lambda a: np.round(a * (4095 / 255)).astype(np.uint16), (0, 4095)),
    "big-endian": ("tif", lambda a: np.round(a * (4095 / 255)).astype(">u2"), (0, 4095)),
    "int32": ("tif", lambda a: a.astype(np.int32) * 257, (0, 65_535)),
    "uint32": ("tif", lambda a: a.astype(np.uint32) * 2**24, (0, 255 * 2**24)),
    "int8": ("tif", lambda a: (a.astype(int) - 128).astype(np.int8), (-128, 127)),
    "int16": ("tif", lambda a: a.astype(np.int16) * 10 - 1000, (-1000, 1550)),
    "12 bits in a PNG": ("png", lambda a: np.round(a * (4095 / 255)).astype(np.uint16), (0, 4095)),
}


@pytest.mark.parametrize("size", [16, 20])
@pytest.mark.parametrize(("suffix", "convert", "expected"), SAME.values(), ids=SAME)
def test_other_types_are_the_same_picture_as_8_bits(
    tmp_path, suffix, convert, expected, size, capsys
):
    pixels = draw((20, 20)).astype(np.uint8)
    pixels.flat[:2] = 0, 255
    for name in ("grey", "other"):
        (tmp_path / name).mkdir()
    Image.fromarray(pixels).save(tmp_path / "grey" / "a.png")
    if suffix == "png":
        Image.fromarray(convert(pixels)).save(tmp_path / "other" / "a.png")
    else:
        write_tiff(tmp_path / "other" / "a.tif", convert(pixels))
    wanted = load(tmp_path / "grey", size)
    for _ in range(2):  # decoded, and from the cache
        found = load(tmp_path / "other", size)
        assert torch.equal(found.train.images, wanted.train.images)
        assert found.value_range == expected
    assert wanted.value_range is None
    assert "white" in str(found)
    assert "white" not in str(wanted)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", pytest.param("tif", marks=needs_tifffile)])
def test_colour_of_16_bits_is_turned_as_that_of_8_bits_is(tmp_path, kind, orientation):
    pixels = draw((16, 16, 3))
    (tmp_path / "in").mkdir()
    tags = Image.Exif()
    tags[0x0112] = orientation
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "in" / "a.png", exif=tags)
    path, wide = tmp_path / "in" / f"b.{kind}", (pixels * 257).astype(np.uint16)
    if kind == "png":
        write_png(path, wide, orientation)
    else:
        write_tiff(path, wide, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    found = load(tmp_path / "in", value_range=(0, 65535)).train.images
    torch.testing.assert_close(found[0].int(), found[1].int(), atol=1, rtol=0)


def test_16_bits_with_transparency_are_refused(tmp_path, user_error):
    (tmp_path / "in").mkdir()
    write_png(tmp_path / "in" / "a.png", draw((16, 16, 4), 4096).astype(np.uint16))
    with user_error("a PNG of 16 bits with transparency"):
        load(tmp_path / "in")


@pytest.mark.parametrize("kind", ["PNG", "tiff", "planar tiff"])
def test_colour_of_12_bits_in_16(tmp_path, kind):
    (tmp_path / "in").mkdir()
    values = draw((16, 16, 3), 4096).astype(np.uint16)
    if kind == "PNG":
        write_png(tmp_path / "in" / "a.png", values)
    elif kind == "tiff":
        write_tiff(tmp_path / "in" / "a.tif", values, photometric="rgb")
    else:
        planes = values.transpose(2, 0, 1)
        options = {"photometric": "rgb", "planarconfig": "separate"}
        write_tiff(tmp_path / "in" / "a.tif", planes, **options)
    found = load(tmp_path / "in").train.images[0].numpy()
    assert np.abs(found - values.transpose(2, 0, 1) * (255 / 4095)).max() <= 0.501


def test_one_range_for_all_is_that_of_the_training_images(tmp_path):
    brightest = {"train/a": 900, "train/b": 100, "test/a": 60_000, "test/b": 500}
    for name, value in brightest.items():
        (tmp_path / "in" / name).mkdir(parents=True)
        image = Image.fromarray(np.full((16, 16), value, np.uint16))
        image.save(tmp_path / "in" / name / "0.png")
    data = load(tmp_path / "in")
    assert data.value_range == (0, 1023)
    assert data.train.images[:, 0, 0, 0].tolist() == [round(900 * 255 / 1023), 25]
    assert data.test.images[:, 0, 0, 0].tolist() == [255, round(500 * 255 / 1023)]
    given = load(tmp_path / "in", value_range=(100.0, 500.0))
    assert given.value_range == (100, 500)
    assert given.train.images[:, 0, 0, 0].tolist() == [255, 0]
    assert given.test.images[:, 0, 0, 0].tolist() == [255, 255]


def test_an_image_that_can_be_read_again_has_the_range_of_the_others(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name, value in (("a", 4000), ("b", 200)):
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / "in" / f"{name}.png")
    paths = [tmp_path / "in" / "a.png", tmp_path / "in" / "b.png"]
    read_image = decoding.read_image

    def unplugged(path, *others):
        if path.name == "b.png":
            raise OSError(5, "Input/output error")
        return read_image(path, *others)

    arguments = (paths, tmp_path / "in", tmp_path / "data", 8, decoding.PixelRules())
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "read_image", unplugged)
        assert list(folders.decode_readable(*arguments)[1]) == [1]
    images, broken, value_range = folders.decode_readable(*arguments)
    assert (broken, value_range) == ({}, (0, 4095))
    assert images[1].unique().tolist() == [round(200 * 255 / 4095)]


@needs_tifffile
def test_the_limit_of_pixels_does_not_count_colours(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    for side, name in ((80, "fits.tif"), (101, "large.tif")):
        write_tiff(tmp_path / name, draw((side, side, 3)).astype(np.uint16), photometric="rgb")
    rules = decoding.PixelRules()
    assert decoding.read_image(tmp_path / "fits.tif", 8, rules).shape == (80, 80, 3)
    with pytest.raises(OSError, match="10,201 pixels are too many"):
        decoding.read_image(tmp_path / "large.tif", 8, rules)


def test_the_limit_of_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    np.save(tmp_path / "a.npy", np.zeros((101, 101), np.uint8))
    Image.new("L", (101, 101)).save(tmp_path / "a.png")
    for name in ("a.npy", "a.png"):
        with pytest.raises(OSError, match="10,201 pixels are too many"):
            decoding.read_image(tmp_path / name, 8, decoding.PixelRules(channels=1))
    # Of a JPEG a smaller version is decoded.
    Image.new("RGB", (128, 128), "blue").save(tmp_path / "a.jpg")
    assert decoding.read_image(tmp_path / "a.jpg", 8, decoding.PixelRules()).shape == (16, 16, 3)


@needs_tifffile
def test_white_may_be_zero(tmp_path):
    pixels = draw((16, 16), 2**12)
    for bits, kind in ((8, np.uint8), (16, np.uint16), (32, np.uint32)):
        values = (pixels >> 4).astype(kind) if bits == 8 else pixels.astype(kind)
        write_tiff(tmp_path / "a.tif", values, photometric="miniswhite")
        found = decoding.read_image(tmp_path / "a.tif", 16, decoding.PixelRules())
        np.testing.assert_array_equal(found[..., 0], np.iinfo(kind).max - values)
    write_tiff(tmp_path / "a.tif", pixels / 4095, photometric="miniswhite")
    with pytest.raises(OSError, match="its white is 0"):
        decoding.read_image(tmp_path / "a.tif", 16, decoding.PixelRules())


def test_postscript_is_not_run(tmp_path):
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(UnidentifiedImageError):
        decoding.read_image(tmp_path / "a.png", 8, decoding.PixelRules())


@needs_tifffile
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_no_number_are_refused(tmp_path, user_error, value):
    (tmp_path / "in").mkdir()
    pixels = draw((16, 16)).astype(np.float32)
    write_tiff(tmp_path / "in" / "a.tif", pixels)
    pixels[3, 4] = value
    write_tiff(tmp_path / "in" / "b.tif", pixels)
    with user_error("1 of 2", "b.tif", "NaN"):
        load(tmp_path / "in")


# channels


@pytest.mark.parametrize("kind", ["npy", "npy planes", "pixels", "planes", "pages"])
def test_five_channels(tmp_path, kind):
    (tmp_path / "in").mkdir()
    pixels = draw((16, 16, 5)).astype(np.uint8)
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    path, options = tmp_path / "in" / "a.tif", {"photometric": "minisblack"}
    if kind.startswith("npy"):
        np.save(tmp_path / "in" / "a.npy", pixels if kind == "npy" else planes)
    elif kind == "pixels":
        write_tiff(path, pixels, planarconfig="contig", **options)
    elif kind == "planes":
        write_tiff(path, planes, planarconfig="separate", **options)
    else:
        write_tiff(path, planes, **options)
    np.testing.assert_array_equal(load(tmp_path / "in", channels=5).train.images[0], planes)
    small = load(tmp_path / "in", 8, channels=5).train.images[0].numpy()
    for found, plane in zip(small, planes, strict=True):
        expected = Image.fromarray(plane).resize((8, 8), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(found, np.asarray(expected))


def test_grey_and_bool_and_arrays_of_numpy(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(draw((16, 16, 3)).astype(np.uint8)).save(tmp_path / "in" / "a.png")
    np.save(tmp_path / "in" / "b.npy", draw((16, 16)) > 99)
    images = load(tmp_path / "in", channels=1).train.images
    grey = Image.open(tmp_path / "in" / "a.png").convert("L")
    np.testing.assert_array_equal(images[0, 0], np.asarray(grey))
    np.testing.assert_array_equal(images[1, 0], (draw((16, 16)) > 99) * 255)
    assert len(load(tmp_path / "in").train) == 1  # without the flag .npy files are no images


WRONG = {
    "four channels": ({}, lambda p: np.save(p / "b.npy", draw((16, 16, 4))), "16 x 16 x 4"),
    "code": (
        {},
        lambda p: np.save(p / "b.npy", np.array([{}]), allow_pickle=True),
        "Python objects",
    ),
    "PNG": (
        {"channels": 5},
        lambda p: Image.new("RGB", (9, 9)).save(p / "b.png"),
        "only .npy and .tif",
    ),
    "dropped channels": (
        {},
        lambda p: write_tiff(p / "b.tif", draw((16, 16, 5)).astype(np.uint8), photometric="rgb"),
        "16 x 16 x 5",
    ),
    "no TIFF": ({}, lambda p: (p / "b.tif").write_text("no image"), "TIFF"),
}


@pytest.mark.parametrize(("rules", "write", "word"), WRONG.values(), ids=WRONG)
def test_other_channels_are_refused(tmp_path, user_error, rules, write, word):
    (tmp_path / "in").mkdir()
    rules = {"channels": 3} | rules
    np.save(tmp_path / "in" / "a.npy", draw((16, 16, rules["channels"])).astype(np.uint8))
    write(tmp_path / "in")
    with user_error("1 of 2", "/b.", word):
        load(tmp_path / "in", **rules)


@pytest.mark.parametrize("kind", ["heic", "avif"])
def test_photographs_of_phones_are_read(tmp_path, kind):
    if kind == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    board = np.array([[255, 0], [0, 255]]).repeat(16, 0).repeat(16, 1)  # (32, 32)
    image = Image.fromarray(np.stack([board, 0 * board, 255 - board], 2).astype(np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    (tmp_path / "in").mkdir()
    written = {"format": "HEIF" if kind == "heic" else "AVIF", "quality": 95}
    image.save(tmp_path / "in" / f"a.{kind.upper()}", exif=exif.tobytes(), **written)
    (tmp_path / "plain").mkdir()
    image.rotate(-90).save(tmp_path / "plain" / "a.png")
    found, expected = (load(tmp_path / name).train.images for name in ("in", "plain"))
    assert (found.float() - expected.float()).abs().mean() < 8  # of 255: both lose a little


@pytest.mark.parametrize("name", ["a.heic", "a.HEIF"])
def test_a_missing_pillow_heif_is_one_line(tmp_path, user_error, monkeypatch, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).touch()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with user_error(name, "pip install pillow-heif"):
        load(tmp_path / "in")


def test_a_missing_tifffile_is_one_line(tmp_path, user_error, monkeypatch):
    (tmp_path / "in").mkdir()
    write_tiff(tmp_path / "in" / "a.tif", draw((16, 16)) / 255)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with user_error("a.tif", "pip install tifffile"):
        load(tmp_path / "in")


def test_a_folder_of_arrays_says_which_flag_takes_them(tmp_path, user_error):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", draw((16, 16)))
    with user_error("no images", "--channels"):
        load(tmp_path / "in")


# stacks


@pytest.mark.parametrize("kind", ["tif", "gif", "png", "webp"])
def test_a_stack_is_refused_unless_its_first_image_is_asked_for(tmp_path, user_error, kind):
    (tmp_path / "in").mkdir()
    frames = [Image.fromarray(draw((16, 16), seed=i).astype(np.uint8)) for i in range(3)]
    more = {"save_all": True, "append_images": frames[1:]}
    more |= {"lossless": True} if kind == "webp" else {}
    frames[0].save(tmp_path / "in" / f"a.{kind}", **more)
    with user_error(f"a.{kind}", "stack", "--stack first"):
        load(tmp_path / "in")
    found = load(tmp_path / "in", stack="first").train.images[0, 0]
    np.testing.assert_array_equal(found, np.asarray(frames[0]))


# views of other numbers of channels


def test_colour_operations_leave_five_channels_alone():
    images = torch.rand(6, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = augment.draw_color_jitter(images, 0.4, 0.4, 0.4, 0.1)
    assert drawn.keys() == {"brightness", "contrast"}
    jittered = augment.apply_color_jitter(images, drawn)
    for i in range(6):  # each channel is a grey image of its own
        for channel in range(5):
            one = TF.adjust_brightness(images[i, channel][None], drawn["brightness"][i].item())
            one = TF.adjust_contrast(one, drawn["contrast"][i].item())
            torch.testing.assert_close(jittered[i, channel][None], one)
    assert torch.equal(augment.grayscale(images), images)


@pytest.mark.parametrize("name", randaugment.RANDAUGMENT_OPS)
def test_randaugment_takes_each_of_five_channels_as_a_grey_image(name):
    images = torch.from_numpy(draw((4, 5, 32, 32), 150).astype(np.uint8)) + 40
    ops = torch.full((4, 1), randaugment.RANDAUGMENT_OPS.index(name))
    negative = torch.tensor([[True], [False]] * 2)
    found = randaugment.rand_augment(images, ops, negative, 9)
    for i in range(5):
        grey = randaugment.rand_augment(images[:, i : i + 1], ops, negative, 9)
        assert torch.equal(found[:, i : i + 1], grey)
    assert torch.equal(found, images) == (name in ("Identity", "Color"))


def test_a_picture_shows_three_channels_or_one():
    images = torch.rand(2, 5, 8, 8)
    for channels, shown in ((1, 1), (2, 1), (3, 3), (5, 3)):
        found = datasets.as_shown(images[:, :channels])
        assert torch.equal(found, images[:, :shown])


# the scripts


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two classes of images with five channels of 12 bits, and its folder of images."""
    home = tmp_path_factory.mktemp("science")
    for label, name in enumerate(("cells", "crystals")):
        (home / "in" / name).mkdir(parents=True)
        for i in range(20):
            image = draw((12, 14, 5), 2000 + 2000 * label, seed=i).astype(np.uint16)
            np.save(home / "in" / name / f"{i:02}.npy", image)
    config = simclr.Config(
        dataset=str(home / "in"),
        channels=5,
        image_size=12,
        data_dir=str(home / "data"),
        output_dir=str(home),
        name="run",
        encoder="small",
        epochs=1,
        batch_size=16,
        probe_epochs=2,
        few_labels=0,
        device="cpu",
    )
    simclr.main(config)
    return home, config


def test_a_run_on_five_channels_and_its_encoder_on_a_folder(trained, capsys):
    home, _ = trained
    run = home / "simclr" / "run"
    weights, about = checkpoints.load_tensors(run / "encoder.safetensors")
    assert weights["0.weight"].shape == (32, 5, 3, 3)
    assert (about["channels"], about["value_range"]) == (5, [0, 4095])
    for name in ("views.png", "tsne.png", "report.html", "probe.png"):
        assert (run / name).stat().st_size > 1000
    # A folder whose own values would give another range, beside the run's own test images.
    mine = home / "mine"
    mine.mkdir()
    arrays = files.read_arrays(run / "embeddings.npz")
    dim = [path for path in arrays["paths"] if path.startswith("cells")]
    for path in dim:
        (mine / path.replace("/", "-")).write_bytes((home / "in" / path).read_bytes())
    embed.main([str(run), str(mine), "--output", str(home / "out"), "--device", "cpu"])
    assert "4095" in capsys.readouterr().out
    found = files.read_arrays(home / "out" / "features.npz")
    own = dict(zip(arrays["paths"], arrays["features"], strict=True))
    assert len(found["paths"]) == len(dim) > 2
    for path, features in zip(found["paths"], found["features"], strict=True):
        assert np.array_equal(features, own[path.replace("-", "/")])
    assert (home / "out" / "neighbours.png").stat().st_size > 1000
    flags = ["--value-range", "0", "8190", "--no-training", "--output", str(home / "other")]
    embed.main([str(run), str(mine), "--device", "cpu", *flags])
    assert "black is 0 and white 8190" in capsys.readouterr().out


def test_a_run_on_five_channels_goes_on(trained):
    home, _ = trained
    run = str(home / "simclr" / "run")
    saved = settings.load_config(simclr.Config, run)
    assert saved.pixel_rules == decoding.PixelRules(channels=5)
    again = dataclasses.replace(saved, resume=run, stages="probe", device="cpu")
    assert "linear_probe_accuracy" in simclr.main(again)


@pytest.mark.parametrize("augmentation", ["standard", "original"])
def test_rows_of_five_channels(trained, augmentation):
    _, config = trained
    shared = {name: getattr(config, name) for name in ("dataset", "data_dir", "image_size")}
    small = {"channels": 5, "hidden_size": 8, "epochs": 1, "batch_size": 8, "cells": "gru"}
    name = f"rnn-{augmentation}"
    summary = rnn.main(
        rnn.Config(
            **shared, **small, name=name, output_dir=config.output_dir, augmentation=augmentation
        )
    )
    assert summary


def test_an_encoder_of_timms_starts_from_weights_and_embeds(trained, tmp_path):
    timm = pytest.importorskip("timm")
    home, config = trained
    torch.manual_seed(1)
    given = timm.create_model("test_resnet", num_classes=0, in_chans=5)
    torch.save(given.state_dict(), tmp_path / "weights.pth")
    changes = {"encoder": "timm:test_resnet", "weights": str(tmp_path / "weights.pth")}
    changes |= {"output_dir": str(tmp_path), "stages": "pretrain,embed", "learning_rate": 1e-9}
    simclr.main(dataclasses.replace(config, **changes))
    run = tmp_path / "simclr" / "run"
    weights, about = checkpoints.load_tensors(run / "encoder.safetensors")
    torch.testing.assert_close(weights["conv1.0.weight"], given.conv1[0].weight.detach())
    given.load_state_dict(weights, strict=True)
    assert about["encoder"] == "timm:test_resnet"
    flags = ["--output", str(tmp_path / "out"), "--device", "cpu", "--no-training"]
    embed.main([str(run), str(home / "in"), *flags])
    arrays = files.read_arrays(run / "embeddings.npz")
    found = files.read_arrays(tmp_path / "out" / "features.npz")
    mine = dict(zip(found["paths"], found["features"], strict=True))
    for path, features in zip(arrays["paths"], arrays["features"], strict=True):
        assert np.array_equal(mine[path], features)
