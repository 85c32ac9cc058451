import concurrent.futures
import contextlib
import dataclasses
import gzip
import hashlib
import http.server
import io
import os
import pickle
import struct
import tarfile
import threading
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
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
    data = example().with_statistics()
    mean, std = datasets.channel_statistics(data.train.images)
    other = datasets.channel_statistics(data.test.images)
    assert (mean / other[0] > 1.5).all()
    validation = datasets.Split(random_bytes(3, 3, 4, 5, seed=2), None)
    for split in (data.train, data.test, validation.with_statistics_of(data.train)):
        expected = reference.normalize(split.images / 255, mean.tolist(), std.tolist())
        for images in (split.images, split.images / 255):
            before = images.clone()
            torch.testing.assert_close(split.normalize(images), expected, rtol=0, atol=1e-5)
            assert torch.equal(images, before)


def test_held_out_images_are_in_the_tests_place_and_not_in_the_statistics():
    images, labels = random_bytes(60, 1, 4, 5), torch.arange(60) % 3
    test = datasets.Split(random_bytes(7, 1, 4, 5, seed=1), labels[:7])
    whole = datasets.ImageData("noise", ("a", "b", "c"), datasets.Split(images, labels), test)
    whole = whole.with_statistics()
    data = whole.evaluated_on("validation")
    assert (len(data.train), len(data.test)) == (54, 6)
    both = torch.cat([data.train.images, data.test.images]).flatten(1).tolist()
    assert sorted(both) == sorted(images.flatten(1).tolist())
    pixels = data.train.images.double() / 255
    for split in (data.train, data.test):
        assert split.mean.item() == pytest.approx(pixels.mean().item(), rel=1e-6)
        assert split.std.item() == pytest.approx(pixels.std(correction=0).item(), rel=1e-5)
    assert whole.train.mean.item() != pytest.approx(pixels.mean().item(), rel=1e-5)
    assert whole.evaluated_on("test") is whole


@pytest.mark.parametrize("labelled", [True, False])
def test_in_five_folds_every_training_image_is_held_out_once(labelled):
    images, labels = random_bytes(65, 1, 4, 5), torch.arange(65) % 4 % 3  # 33, 16 and 16
    test = datasets.Split(random_bytes(7, 1, 4, 5, seed=1), labels[:7] if labelled else None)
    train = datasets.Split(images, labels if labelled else None)
    whole = datasets.ImageData("noise", ("a", "b", "c") if labelled else (), train, test)
    held_out = []
    for fold in range(1, 6):
        data = whole.evaluated_on(f"fold-{fold}")
        assert (len(data.train), len(data.test)) == (52, 13)
        both = torch.cat([data.train.images, data.test.images]).flatten(1).tolist()
        assert sorted(both) == sorted(images.flatten(1).tolist())
        held_out += data.test.images.flatten(1).tolist()
        mean = (data.train.images.double() / 255).mean().item()
        assert data.test.mean.item() == pytest.approx(mean, rel=1e-6)
        if labelled:
            assert data.test.labels.bincount().tolist() in ([7, 3, 3], [6, 4, 3], [6, 3, 4])
    assert sorted(held_out) == sorted(images.flatten(1).tolist())


def test_a_class_of_four_images_has_no_five_folds(user_error):
    split = datasets.Split(random_bytes(14, 1, 4, 5), torch.tensor([0] * 10 + [1] * 4))
    with user_error("a fold needs 5 images of each class, not 4"):
        datasets.ImageData("noise", ("a", "b"), split, None).evaluated_on("fold-1")


def test_a_selection_keeps_images_labels_files_and_statistics_together():
    paths = np.array([f"{i}.png" for i in range(8)])
    whole = dataclasses.replace(example().with_statistics().train, paths=paths)
    part = whole.select(torch.tensor([6, 1, 3]))
    assert len(part) == 3
    assert torch.equal(part.images, whole.images[[6, 1, 3]])
    assert part.labels.tolist() == [0, 1, 1]
    assert part.paths.tolist() == ["6.png", "1.png", "3.png"]
    assert torch.equal(part.mean, whole.mean)
    assert torch.equal(part.std, whole.std)
    assert datasets.Split(whole.images, None).select(torch.tensor([2])).labels is None


def test_moving_to_a_device_moves_every_tensor():
    data = example().with_statistics().to("meta")
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
    data = dataclasses.replace(example(), name="the same from elsewhere").with_statistics()
    train = dataclasses.replace(data.train, paths=np.array(["x.png"] * 8))
    transposed = train.images.mT.contiguous().mT  # the same pixels in another layout of memory
    train = dataclasses.replace(train, images=transposed)
    assert dataclasses.replace(data, train=train).fingerprint() == example().fingerprint()


# held-out images


def numbered_split(counts=(100, 60, 40)):
    """The images of a class one after the other, each image filled with its position."""
    images = torch.arange(sum(counts), dtype=torch.uint8)[:, None, None, None]
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return datasets.Split(images.repeat(1, 1, 2, 2), labels)


def test_hold_out_is_a_stratified_partition():
    split = numbered_split()
    parts = datasets.hold_out(split, 0.25)
    positions = [part.images[:, 0, 0, 0].long() for part in parts]
    assert sorted(torch.cat(positions).tolist()) == list(range(200))
    assert parts[0].labels.bincount().tolist() == [75, 45, 30]
    assert parts[1].labels.bincount().tolist() == [25, 15, 10]
    for part, position in zip(parts, positions, strict=True):
        assert torch.equal(part.labels, split.labels[position])


def test_hold_out_is_fixed_by_its_seed():
    split = numbered_split()
    first = datasets.hold_out(split, 0.25)[1].images
    np.random.seed(3)
    assert torch.equal(datasets.hold_out(split, 0.25)[1].images, first)
    assert not torch.equal(datasets.hold_out(split, 0.25, seed=1)[1].images, first)
    assert datasets.hold_out(datasets.Split(split.images, None), 0.25)[1].labels is None


def test_hold_out_shares_no_memory():
    # Known mistake: what was done to the validation set was done to the training set, too.
    split = numbered_split((20, 20))
    parts = datasets.hold_out(split, 0.25)
    for written, others in ((0, (parts[1], split)), (1, (parts[0], split))):
        before = [(other.images.clone(), other.labels.clone()) for other in others]
        parts[written].images.fill_(255)
        parts[written].labels.fill_(9)
        for other, (images, labels) in zip(others, before, strict=True):
            assert torch.equal(other.images, images)
            assert torch.equal(other.labels, labels)


@pytest.mark.parametrize(
    ("counts", "fraction"), [((8, 1), 0.25), ((8, 8), 0.9999), ((3, 3), 0.1), ((1,), 0.5)]
)
def test_hold_out_says_itself_that_images_are_too_few(user_error, counts, fraction):
    with user_error("too few images", fraction):
        datasets.hold_out(numbered_split(counts), fraction)


def test_a_class_without_test_images_is_named():
    train, test = (datasets.Split(torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 2])),) * 2
    data = datasets.ImageData("plants", ("moss", "oak", "rose"), train, test)
    assert str(data).endswith("3 classes")
    part = dataclasses.replace(data, test=test.select(torch.tensor([1])))
    assert str(part).endswith("3 classes, no test images of moss or rose")


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
            content = state.files.get(self.path.partition("?")[0].rsplit("/", 1)[1])
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


@pytest.mark.parametrize("address", ["official", "file", "signed file", "folder"])
def test_cifar10_is_downloaded_once(tmp_path, monkeypatch, server, cifar, address):
    url = server.url + CIFAR10.filename
    if address == "official":
        monkeypatch.setattr(CIFAR10, "url", url)
    given = {"official": None, "file": url, "signed file": f"{url}?key=a/b", "folder": server.url}
    check_cifar(
        functions.load_images("cifar10", tmp_path / "new" / "data", download_url=given[address]),
        cifar,
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
