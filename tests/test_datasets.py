import concurrent.futures
import contextlib
import dataclasses
import gzip
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import pickle
import struct
import tarfile
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_folders import load_folder, make_folder, names_of, write_image
from PIL import Image
from torchvision.datasets import CIFAR10, FashionMNIST
from torchvision.transforms.v2 import functional as reference

import functions
from support import datasets
from support.errors import UserError


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    # A test that forgets its own server must not reach the real ones.
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:9/{CIFAR10.filename}")
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "no-debian-package")


# splits and their statistics


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_bytes(*shape, seed=0):
    return torch.randint(256, shape, generator=seeded(seed), dtype=torch.uint8)


def example(count=8):
    train = datasets.Split(random_bytes(count, 3, 4, 5), torch.arange(count) % 2)
    test = datasets.Split(random_bytes(count, 3, 4, 5, seed=1) // 2, torch.arange(count) % 2)
    return datasets.ImageData("example", ("a", "b"), train, test)


def test_to_float_scales_bytes_to_one():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    expected = reference.to_dtype(images, scale=True)
    torch.testing.assert_close(datasets.to_float(images), expected, rtol=0, atol=1e-7)
    assert images.flatten().tolist() == list(range(256))
    assert datasets.to_float(expected) is expected


@pytest.mark.parametrize("shape", [(2500, 3, 3, 4), (7, 1, 8, 8)])
def test_channel_statistics_equal_numpy(shape):
    images = random_bytes(*shape)
    images[: len(images) // 4] //= 3  # not the same in every chunk
    images[:, -1] //= 2
    before = images.clone()
    mean, std = datasets.channel_statistics(images)
    values = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, values.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, values.std((0, 2, 3)), rtol=1e-5)
    assert torch.equal(images, before)


# Known mistake of public versions: the test images were normalised with their own statistics.
def test_all_images_are_normalised_with_the_training_images_statistics():
    data = example().measured()
    mean, std = datasets.channel_statistics(data.train.images)
    other = datasets.channel_statistics(data.test.images)
    assert (mean / other[0] > 1.5).all()
    validation = datasets.Split(random_bytes(3, 3, 4, 5, seed=2), None)
    for split in (data.train, data.test, validation.normalized_as(data.train)):
        expected = reference.normalize(split.images / 255, mean.tolist(), std.tolist())
        for images in (split.images, split.images / 255):
            before = images.clone()
            torch.testing.assert_close(split.normalize(images), expected, rtol=0, atol=1e-5)
            assert torch.equal(images, before)


def test_a_selection_keeps_images_labels_files_and_statistics_together():
    paths = np.array([f"{i}.png" for i in range(8)])
    whole = dataclasses.replace(example().measured().train, paths=paths)
    part = whole.select(torch.tensor([6, 1, 3]))
    assert len(part) == 3
    assert torch.equal(part.images, whole.images[[6, 1, 3]])
    assert part.labels.tolist() == [0, 1, 1]
    assert part.paths.tolist() == ["6.png", "1.png", "3.png"]
    assert torch.equal(part.mean, whole.mean)
    assert torch.equal(part.std, whole.std)
    assert datasets.Split(whole.images, None).select(torch.tensor([2])).labels is None


def test_moving_to_a_device_moves_every_tensor():
    data = example().measured().to("meta")
    for split in (data.train, data.test):
        for value in (split.images, split.labels, split.mean, split.std):
            assert value.device.type == "meta"


OTHERS = {
    "a pixel": lambda data: data.train.images[-1, -1, -1, -1].add_(1),
    "a test pixel": lambda data: data.test.images[0, 0, 0, 0].add_(1),
    "a label": lambda data: data.train.labels[3].sub_(1),
    "a test label": lambda data: data.test.labels[3].sub_(1),
    "an image less": lambda data: object.__setattr__(
        data, "test", data.test.select(torch.arange(7))
    ),
    "turned images": lambda data: object.__setattr__(
        data.train, "images", data.train.images.view(8, 3, 5, 4)
    ),
    "another class": lambda data: object.__setattr__(data, "classes", ("a", "c")),
    "no test images": lambda data: object.__setattr__(data, "test", None),
    "no labels": lambda data: object.__setattr__(data.train, "labels", None),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_fingerprint_tells_other_data(change):
    data = example()
    before = data.fingerprint()
    change(data)
    assert data.fingerprint() != before


def test_fingerprint_is_of_the_content_alone():
    data = dataclasses.replace(example(), name="the same from elsewhere").measured()
    train = dataclasses.replace(data.train, paths=np.array(["x.png"] * 8))
    transposed = train.images.mT.contiguous().mT  # the same pixels in another layout of memory
    train = dataclasses.replace(train, images=transposed)
    assert dataclasses.replace(data, train=train).fingerprint() == example().fingerprint()


# decoding one image


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
    decoded = datasets.decode_image(path, 16)
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
    decoded = datasets.decode_image(tmp_path / f"a.{suffix}", 16)
    np.testing.assert_array_equal(decoded, pixels.transpose(2, 0, 1))


def test_16_bit_values_are_scaled_over_their_whole_range(tmp_path):
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_array_equal(
        datasets.decode_image(tmp_path / "a.png", 16)[0].ravel(), range(256)
    )


@pytest.mark.parametrize("shape", [(500, 3), (3, 500)], ids=["tall", "wide"])
def test_long_strip_is_cropped_to_its_centre(tmp_path, shape):
    pixels = np.full((*shape, 3), RED, np.uint8)
    pixels[
        tuple(slice(side // 2 - 8, side // 2 + 8) if side > 3 else slice(3) for side in shape)
    ] = TEAL
    Image.fromarray(pixels).save(tmp_path / "a.png")
    decoded = datasets.decode_image(tmp_path / "a.png", 16)
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
    difference = datasets.decode_image(tmp_path / "a.jpg", 32) - np.asarray(
        centre, float
    ).transpose(2, 0, 1)
    assert np.abs(difference).max() < 25
    assert np.abs(difference).mean() < 2


def test_shrinking_averages(tmp_path):
    checkerboard = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checkerboard).save(tmp_path / "a.png")
    assert np.abs(datasets.decode_image(tmp_path / "a.png", 16) - 127.5).max() < 10


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
    np.testing.assert_array_equal(
        datasets.decode_image(tmp_path / "a.png", 16), shown.transpose(2, 0, 1)
    )


def test_rotated_photo_is_upright(tmp_path):
    stored = np.zeros((300, 400, 3), np.uint8)
    stored[:, :200] = RED  # left as stored is the top as shown with orientation 6
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif)
    decoded = datasets.decode_image(tmp_path / "a.jpg", 16)
    assert decoded[0, :6].min() > 240
    assert decoded[0, 10:].max() < 15


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"], ids=ascii
)
def test_broken_exif_does_not_cost_the_picture(tmp_path, exif):
    plain("RGB", TEAL).save(tmp_path / "a.jpg", exif=exif)
    assert abs(int(datasets.decode_image(tmp_path / "a.jpg", 16)[2, 8, 8]) - TEAL[2]) <= 4


# the cache of decoded folders


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images decoded so far."""
    names = []

    decode_image = datasets.decode_image

    def recorded(path, size):
        names.append(Path(path).name)
        return decode_image(path, size)

    monkeypatch.setattr(datasets, "decode_image", recorded)
    return names


def cache_files(data_dir, suffix="*"):
    return sorted(path for path in data_dir.rglob(suffix) if path.is_file())


def test_second_load_decodes_nothing_and_gives_the_same(tmp_path, monkeypatch):
    names = [f"{kind}/{i}.png" for kind in "ab" for i in range(5)]
    made = make_folder(tmp_path / "in", *names)
    first = load_folder(tmp_path / "in", tmp_path / "data")
    monkeypatch.setattr(datasets, "decode_image", lambda *_: 1 / 0)
    second = load_folder(tmp_path / "in", tmp_path / "data")
    assert names_of(second.train, made) == names_of(first.train, made)
    assert names_of(second.test, made) == names_of(first.test, made)
    assert torch.equal(second.train.labels, first.train.labels)


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


def test_unwritable_data_dir_costs_only_the_cache(tmp_path):
    (tmp_path / "file").write_text("")
    made = make_folder(tmp_path / "in", "0.png", "1.png")
    for data_dir in (tmp_path / "file", tmp_path / "file" / "data"):
        data = load_folder(tmp_path / "in", data_dir)
        assert names_of(data.train, made) == ["0.png", "1.png"]


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
    decode_image = datasets.decode_image

    def in_step(path, size):
        together.wait(20)
        return decode_image(path, size)

    def load():
        data = load_folder(tmp_path / "in", tmp_path / "data")
        assert names_of(data.train, made) == [f"{i}.png" for i in range(5)]

    monkeypatch.setattr(datasets, "decode_image", in_step)
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
    monkeypatch.setattr(datasets, "decode_image", lambda *_: 1 / 0)
    load()
    assert [path.suffix for path in cache_files(tmp_path / "data")] == [".json", ".npy"]


def test_failed_decoding_leaves_nothing(tmp_path, user_error):
    make_folder(tmp_path / "in", "0.png")
    (tmp_path / "in" / "1.png").write_text("no image")
    with user_error("1 of 2", "1.png"):
        load_folder(tmp_path / "in", tmp_path / "data")
    assert cache_files(tmp_path / "data") == []


# downloads


@pytest.fixture
def server():
    """A web server on this machine; `mode` says how it answers."""
    state = SimpleNamespace(files={}, ranges=[], mode="ranges")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.close_connection = True
            state.ranges.append(self.headers["Range"])
            content = state.files.get(self.path.rsplit("/", 1)[1])
            if content is None:
                self.send_error(404)
            elif state.mode == "no http":
                self.wfile.write(b"SSH-2.0-OpenSSH\r\n")
            elif state.mode == "breaks, chunked":
                self.answer(200, {"Transfer-Encoding": "chunked"}, b"64\r\n" + content[:100])
            elif state.mode == "breaks":
                size = {"Content-Length": str(len(content))}
                self.answer(200, size, content[: len(content) // 2])
            elif state.mode == "ranges" and self.headers["Range"]:
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                rest = {
                    "Content-Length": str(len(content) - start),
                    "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}",
                }
                self.answer(206 if start < len(content) else 416, rest, content[start:])
            else:
                self.answer(200, {"Content-Length": str(len(content))}, content)

        def answer(self, status, headers, content):
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        state.url = f"http://127.0.0.1:{running.server_address[1]}/mirror/"
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield state
        running.shutdown()
        thread.join()


def md5(content):
    return hashlib.md5(content).hexdigest()


def tar_gz(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def cifar(monkeypatch, server):
    """A CIFAR-10 of three images a batch, which the server has and torchvision believes in."""
    pixels = np.random.default_rng(0).integers(0, 256, (18, 3, 32, 32), np.uint8)
    labels = np.random.default_rng(1).integers(0, 10, 18)
    batches = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    files = {"batches.meta": pickle.dumps({"label_names": list("abcdefghij")}, 2)}
    for i, name in enumerate(batches):
        part = slice(3 * i, 3 * i + 3)
        batch = {"data": pixels[part].reshape(3, -1), "labels": labels[part].tolist()}
        files[name] = pickle.dumps(batch, 2)
    archive = tar_gz({f"{CIFAR10.base_folder}/{name}": files[name] for name in files})
    lists = [[name, md5(files[name])] for name in batches]
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    monkeypatch.setattr(CIFAR10, "train_list", lists[:5])
    monkeypatch.setattr(CIFAR10, "test_list", lists[5:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(files["batches.meta"])})
    server.files[CIFAR10.filename] = archive
    return SimpleNamespace(pixels=pixels, labels=labels, files=files, archive=archive)


def check_cifar(data, cifar):
    assert data.classes == functions.CIFAR10_CLASSES
    np.testing.assert_array_equal(data.train.images, cifar.pixels[:15])
    np.testing.assert_array_equal(data.test.images, cifar.pixels[15:])
    np.testing.assert_array_equal(data.train.labels, cifar.labels[:15])
    np.testing.assert_array_equal(data.test.labels, cifar.labels[15:])
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64


@pytest.mark.parametrize("address", ["official", "file", "folder"])
def test_cifar10_is_downloaded_once(tmp_path, monkeypatch, server, cifar, address):
    url = server.url + CIFAR10.filename
    if address == "official":
        monkeypatch.setattr(CIFAR10, "url", url)
    given = {"official": None, "file": url, "folder": server.url}[address]
    check_cifar(
        functions.load_images("cifar10", tmp_path / "new" / "data", download_url=given), cifar
    )
    server.files.clear()
    check_cifar(functions.load_images("cifar10", tmp_path / "new" / "data"), cifar)
    assert len(server.ranges) == 1


@pytest.mark.parametrize("mode", ["ranges", "ignores ranges"])
def test_broken_download_is_never_taken_for_whole_and_continued(
    tmp_path, server, cifar, user_error, mode
):
    server.mode = "breaks"
    with user_error("--download-url", CIFAR10.filename):
        functions.load_images("cifar10", tmp_path, download_url=server.url)
    assert not (tmp_path / CIFAR10.filename).exists()
    (part,) = tmp_path.glob("*.part")
    half = len(cifar.archive) // 2
    assert part.read_bytes() == cifar.archive[:half]
    server.mode = mode
    check_cifar(functions.load_images("cifar10", tmp_path, download_url=server.url), cifar)
    assert server.ranges == [None, f"bytes={half}-"]
    assert (tmp_path / CIFAR10.filename).read_bytes() == cifar.archive
    assert not list(tmp_path.glob("*.part"))


def test_download_killed_before_its_last_step_needs_no_care(tmp_path, server, cifar):
    (tmp_path / f"{CIFAR10.filename}.part").write_bytes(cifar.archive)
    check_cifar(functions.load_images("cifar10", tmp_path, download_url=server.url), cifar)


@pytest.mark.parametrize("leftover", [b"something else", b"longer" * 100_000])
def test_part_of_something_else_blocks_one_start_at_most(tmp_path, server, cifar, leftover):
    (tmp_path / f"{CIFAR10.filename}.part").write_bytes(leftover)
    try:
        data = functions.load_images("cifar10", tmp_path, download_url=server.url)
    except UserError:
        assert not (tmp_path / CIFAR10.filename).exists()
        data = functions.load_images("cifar10", tmp_path, download_url=server.url)
    check_cifar(data, cifar)


def test_several_processes_that_download_at_once_wait_for_each_other(tmp_path, server, cifar):
    # Locks of several descriptors exclude each other in one process, too.
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        runs = [
            threads.submit(functions.load_images, "cifar10", tmp_path, download_url=server.url)
            for _ in range(3)
        ]
    for run in runs:
        check_cifar(run.result(), cifar)
    assert len(server.ranges) == 1


def test_downloaded_archive_with_a_wrong_md5_is_refused(tmp_path, server, cifar, user_error):
    evil = tar_gz({f"{CIFAR10.base_folder}/{name}": b"" for name in cifar.files})
    server.files[CIFAR10.filename] = evil
    with user_error("MD5", "--download-url", CIFAR10.filename):
        functions.load_images("cifar10", tmp_path, download_url=server.url)
    assert list(tmp_path.iterdir()) == []


def test_server_without_the_file(tmp_path, server, user_error):
    with user_error("404", server.url, "--download-url", CIFAR10.filename, tmp_path):
        functions.load_images("cifar10", tmp_path, download_url=server.url)
    assert not (tmp_path / CIFAR10.filename).exists()


@pytest.mark.parametrize("mode", ["no http", "breaks, chunked"])
def test_server_that_breaks_the_protocol(tmp_path, server, cifar, user_error, mode):
    server.mode = mode
    with user_error("--download-url", CIFAR10.filename, tmp_path):
        functions.load_images("cifar10", tmp_path, download_url=server.url)
    assert not (tmp_path / CIFAR10.filename).exists()


@pytest.mark.parametrize(
    "url",
    [None, "http://127.0.0.1:9/", "http://127.0.0.1:port/", "http://a b/", "no address", "x://y"],
)
@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist"])
def test_address_that_leads_nowhere(tmp_path, user_error, name, url):
    file = {"cifar10": CIFAR10.filename, "fashion-mnist": FashionMNIST.resources[0][0]}[name]
    with user_error("--download-url", file, tmp_path):
        functions.load_images(name, tmp_path, download_url=url)


def test_data_dir_that_cannot_be_written(tmp_path, server, cifar, user_error):
    (tmp_path / "file").write_text("")
    with user_error(tmp_path / "file"):
        functions.load_images("cifar10", tmp_path / "file", download_url=server.url)


@pytest.mark.parametrize("step", ["download", "unpack"])
def test_disk_without_room_for_the_data_set(tmp_path, server, cifar, user_error, small_disk, step):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    if step == "unpack":
        (data_dir / CIFAR10.filename).write_bytes(cifar.archive)
    with small_disk(5000), user_error(data_dir):
        functions.load_images("cifar10", data_dir, download_url=server.url)
    assert not (data_dir / CIFAR10.base_folder).exists()
    check_cifar(functions.load_images("cifar10", data_dir, download_url=server.url), cifar)
    assert {path.name for path in data_dir.iterdir()} == {CIFAR10.filename, CIFAR10.base_folder}


def test_archive_placed_by_hand_needs_no_network(tmp_path, server, cifar):
    (tmp_path / CIFAR10.filename).write_bytes(cifar.archive)
    check_cifar(functions.load_images("cifar10", tmp_path), cifar)
    assert server.ranges == []


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_archive_placed_by_hand_with_a_wrong_md5_is_refused(tmp_path, cifar, user_error, keep):
    (tmp_path / CIFAR10.filename).write_bytes(cifar.archive[:keep])
    with user_error(tmp_path / CIFAR10.filename, "MD5"):
        functions.load_images("cifar10", tmp_path)
    assert not (tmp_path / CIFAR10.base_folder).exists()


class Payload:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_5", "test_batch", "batches.meta"])
def test_tampered_batch_is_refused_and_not_unpickled(tmp_path, cifar, user_error, name):
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    for file, content in cifar.files.items():
        (folder / file).write_bytes(content)
    check_cifar(functions.load_images("cifar10", tmp_path), cifar)
    (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "canary"), 2))
    with user_error(folder, "MD5"):
        functions.load_images("cifar10", tmp_path)
    assert not (tmp_path / "canary").exists()
    pickle.loads((folder / name).read_bytes())
    assert (tmp_path / "canary").exists()  # the payload was a live one


@pytest.mark.parametrize("missing", ["data_batch_3", "batches.meta"])
def test_incomplete_folder_is_refused(tmp_path, cifar, user_error, missing):
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    for file, content in cifar.files.items():
        if file != missing:
            (folder / file).write_bytes(content)
    with user_error(folder):
        functions.load_images("cifar10", tmp_path)


@pytest.mark.parametrize("where", ["../../evil", "../evil", "link/evil", "ABSOLUTE"])
def test_archive_cannot_write_outside_its_folder(tmp_path, monkeypatch, cifar, where):
    outside = tmp_path / "outside"
    outside.mkdir()
    buffer = io.BytesIO(gzip.decompress(cifar.archive))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        if where == "link/evil":
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, str(outside)
            tar.addfile(link)
        name = str(outside / "evil") if where == "ABSOLUTE" else where
        tar.addfile(tarfile.TarInfo(name))
    archive = gzip.compress(buffer.getvalue())
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    data_dir = tmp_path / "a" / "data"
    data_dir.mkdir(parents=True)
    (data_dir / CIFAR10.filename).write_bytes(archive)
    with contextlib.suppress(UserError):
        check_cifar(functions.load_images("cifar10", data_dir), cifar)
    assert not [path for path in tmp_path.glob("**/evil") if data_dir not in path.parents]
    assert not (data_dir / "evil").exists()


# FashionMNIST


def idx(array):
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture(scope="module")
def fashion_files():
    """The four files, full size because their shapes are checked, with patterns that pack well."""
    pattern = np.arange(28 * 28).reshape(28, 28) % 251
    arrays = {}
    for prefix, count in (("train", 60000), ("t10k", 10000)):
        shift = np.arange(count, dtype=np.uint8)
        arrays[f"{prefix}-images-idx3-ubyte.gz"] = pattern.astype(np.uint8) + shift[:, None, None]
        arrays[f"{prefix}-labels-idx1-ubyte.gz"] = (np.arange(count) % 10).astype(np.uint8)
    files = {name: gzip.compress(idx(array), 1) for name, array in arrays.items()}
    return SimpleNamespace(arrays=arrays, files=files)


@pytest.fixture
def fashion(monkeypatch, server, fashion_files):
    resources = [(name, md5(fashion_files.files[name])) for name, _ in FashionMNIST.resources]
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    server.files.update(fashion_files.files)
    return fashion_files


@pytest.mark.parametrize("place", ["mirror", "--download-url", "by hand", "debian"])
def test_fashion_mnist_is_found(tmp_path, monkeypatch, server, fashion, place):
    folder = {
        "by hand": tmp_path / "data" / "FashionMNIST" / "raw",
        "debian": tmp_path / "debian",
    }.get(place)
    if folder:
        folder.mkdir(parents=True)
        for name, content in fashion.files.items():
            (folder / name).write_bytes(content)
    if place == "mirror":
        monkeypatch.setattr(FashionMNIST, "mirrors", [server.url])
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    url = server.url if place == "--download-url" else None
    data = functions.load_images("fashion-mnist", tmp_path / "data", download_url=url)
    assert len(server.ranges) == (0 if folder else 4)
    assert data.classes[1] == "Trouser"
    for split, prefix in ((data.train, "train"), (data.test, "t10k")):
        images = fashion.arrays[f"{prefix}-images-idx3-ubyte.gz"]
        assert np.array_equal(split.images[:, 0], images)
        assert np.array_equal(split.labels, fashion.arrays[f"{prefix}-labels-idx1-ubyte.gz"])
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64


def test_fashion_mnist_download_with_a_wrong_md5_is_refused(tmp_path, server, fashion, user_error):
    name = "train-images-idx3-ubyte.gz"
    server.files[name] = fashion.files["t10k-images-idx3-ubyte.gz"]
    with user_error("MD5", name, "--download-url"):
        functions.load_images("fashion-mnist", tmp_path, download_url=server.url)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def parts(*contents):
    """A gzip file in several parts, some of them compressed already."""
    return b"".join(part if part is ZEROS else gzip.compress(part) for part in contents)


HEADER = struct.pack(">BBBB3i", 0, 0, 8, 3, 60000, 28, 28)
ZEROS = gzip.compress(bytes(47039999), 1)  # the images but for one byte
WRONG = {
    "half": lambda good: good[: len(good) // 2],
    "without its checksum": lambda good: good[:-8],
    "flipped byte": flipped,
    "flipped checksum": lambda good: good[:-6] + bytes([good[-6] ^ 1]) + good[-5:],
    "no deflate stream": lambda good: good[:10] + b"\xff" * 1000,
    "empty": lambda good: b"",
    "a web page": lambda good: b"<html>not here</html>",
    "another type": lambda good: parts(HEADER.replace(b"\x08", b"\x0b"), ZEROS, b"0"),
    "another shape": lambda good: parts(
        HEADER[:4] + struct.pack(">3i", 30000, 56, 28), ZEROS, b"0"
    ),
    "a byte short": lambda good: parts(HEADER, ZEROS),
    "a byte long": lambda good: parts(HEADER, ZEROS, b"00"),
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
def test_spoiled_fashion_mnist_file_is_refused(tmp_path, fashion, user_error, spoil):
    path = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(spoil(fashion.files[path.name]))
    with user_error(path):
        functions.load_images("fashion-mnist", tmp_path)


def test_decompression_bomb_is_not_read_whole(tmp_path, user_error):
    path = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(HEADER) + 16 * gzip.compress(bytes(1 << 25), 1))  # 512 MiB
    tracemalloc.start()
    try:
        with user_error(path):
            functions.load_images("fashion-mnist", tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200e6
