"""Images as one uint8 tensor: what a data set is, downloads, decoding, and the cache."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import json
import math
import os
import stat
import tempfile
import typing
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support import files
from support.errors import UserError, require


@dataclass(frozen=True)
class Split:
    """Images `(N, C, H, W)`, uint8, their labels `(N,)`, int64, or None, and the files they are of.

    `mean` and `std` `(C,)`, on the scale [0, 1], are those of the training images, in a test split
    too; `ImageData.measured` sets them.
    """

    images: Tensor
    labels: Tensor | None
    paths: np.ndarray | None = None  # (N,), relative to the data set's folder
    mean: Tensor | None = None
    std: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: Any) -> Split:
        """The same split on another device."""
        tensors: Any = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **tensors)

    def select(self, index: Tensor) -> Split:
        """The images at the positions `index`."""
        index = index.to(self.images.device)
        labels = None if self.labels is None else self.labels[index]
        paths = None if self.paths is None else self.paths[index.cpu().numpy()]
        return dataclasses.replace(self, images=self.images[index], labels=labels, paths=paths)

    def normalized_as(self, train: Split) -> Split:
        """The same split, normalised with the statistics of `train`."""
        return dataclasses.replace(self, mean=train.mean, std=train.std)

    def normalize(self, images: Tensor) -> Tensor:
        """`(images - mean) / std` by channel, of images `(B, C, H, W)`, uint8 or in [0, 1]."""
        mean, std = (value[None, :, None, None] for value in (self.mean, self.std))
        return (to_float(images) - mean).div_(std)


@dataclass(frozen=True)
class ImageData:
    """A data set. `test` is None and `classes` is empty when there are no labels."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split | None

    def __post_init__(self) -> None:
        """See at the start that plots and tables can show the names, which are those of folders."""
        for name in (self.name, *self.classes):
            shown = name.encode(errors="ignore").decode()
            require(shown == name, f"the folder {name!r} has a name that is no UTF-8: rename it")

    def measured(self) -> ImageData:
        """The same data, all of it normalised with the statistics of its training images."""
        mean, std = channel_statistics(self.train.images)
        train = dataclasses.replace(self.train, mean=mean, std=std)
        test = None if self.test is None else self.test.normalized_as(train)
        return dataclasses.replace(self, train=train, test=test)

    def to(self, device: Any) -> ImageData:
        """The same data on another device."""
        test = None if self.test is None else self.test.to(device)
        return dataclasses.replace(self, train=self.train.to(device), test=test)

    def fingerprint(self) -> str:
        """What two data sets share when all their pixels and labels are the same."""
        checksum = zlib.crc32(repr(self.classes).encode())
        for split in (self.train, self.test):
            for values in () if split is None else (split.images, split.labels):
                if values is not None:
                    shape = zlib.crc32(repr(values.shape).encode(), checksum)
                    checksum = zlib.crc32(np.ascontiguousarray(values.cpu().numpy()).data, shape)
        return f"{checksum:08x}"

    def __str__(self) -> str:
        channels, height, width = self.train.images.shape[1:]
        parts = [f"{self.name}: {len(self.train):,} training images"]
        parts += [f"{len(self.test):,} test images"] if self.test else []
        parts += [f"{channels} x {height} x {width}"]
        parts += [f"{len(self.classes)} classes"] if self.classes else ["no labels"]
        return ", ".join(parts)


DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
)
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
CACHE_VERSION = 1  # raise it when decoding changes


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive that holds one folder, all of it or nothing."""
    import tarfile

    try:
        with (
            tempfile.TemporaryDirectory(dir=folder.parent) as unpacked,
            tarfile.open(archive) as tar,
        ):
            tar.extractall(unpacked, filter="data")  # refuses to write outside
            os.replace(Path(unpacked) / folder.name, folder)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"cannot unpack {archive} into {folder.parent}: {error}") from error


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A gzipped idx file of bytes, whose header must announce `shape`."""
    header = b"\0\0\x08" + bytes([len(shape)]) + np.array(shape, ">i4").tobytes()
    size = len(header) + math.prod(shape)
    try:
        with gzip.open(path) as file:
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged or truncated ({error}): delete it") from error
    require(
        len(content) == size and content.startswith(header),
        f"{path} does not hold {' x '.join(map(str, shape))} bytes: delete it and start again",
    )
    return np.frombuffer(bytearray(content), np.uint8, offset=len(header)).reshape(shape)


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def alone_in(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Let other processes that download into a folder wait."""
    with contextlib.suppress(OSError):  # what cannot be written is said later
        folder.mkdir(parents=True, exist_ok=True)
    return files.locked(folder, wait=True)


def fetch(path: Path, official: str, url: str | None, md5: str) -> None:
    """Make sure `path` holds the file with this MD5, downloading it when it is not there.

    The bytes go to `<path>.part`, which a second start continues; only a file whose MD5 is right
    gets the final name.
    """
    import http.client
    import urllib.error
    import urllib.request

    from tqdm import tqdm

    if path.exists():
        require(_md5(path) == md5, f"{path} has a wrong MD5 (not {md5}): delete it or replace it")
        return
    address = url or official
    if not address.endswith(path.name):
        address = f"{address.rstrip('/')}/{path.name}"
    part = path.with_name(path.name + ".part")
    advice = (
        f"Give another address with --download-url (the MD5 {md5} is checked), or put {path.name} "
        f"into {path.parent} by hand"
    )
    try:
        if part.exists() and _md5(part) == md5:  # stopped just before the last step
            os.replace(part, path)
            return
        print(f"Downloading {address} (slow? {advice}.)")
        path.parent.mkdir(parents=True, exist_ok=True)
        done = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(
            address, headers={"Range": f"bytes={done}-"} if done else {}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            done = done if answer.status == 206 else 0
            length = answer.headers.get("Content-Length")
            with (
                open(part, "ab" if done else "wb") as file,
                tqdm(
                    total=done + int(length) if length else None,
                    initial=done,
                    unit="B",
                    unit_scale=True,
                    desc=path.name,
                    disable=None,
                ) as bar,
            ):
                while block := answer.read(1 << 16):
                    file.write(block)
                    bar.update(len(block))
        complete = length is None or part.stat().st_size == done + int(length)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # a .part that is longer than the file
            part.unlink(missing_ok=True)
        raise UserError(f"{address} answers {error.code} {error.reason}. {advice}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        raise UserError(f"cannot download {address}: {reason}. {advice}") from error
    require(complete, f"the download of {address} broke off; start again to continue it. {advice}")
    if _md5(part) != md5:
        part.unlink()
        raise UserError(f"{address} has a wrong MD5 (not {md5}). {advice}")
    os.replace(part, path)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel on the scale [0, 1], both `(C,)`.

    Give it the training split only.
    """
    total = torch.zeros(2, images.shape[1], dtype=torch.float64)
    # Bounded memory: the images may be memory-mapped, and large.
    for chunk in images.split(min(2000, max(1, 2**24 // images[0, 0].numel()))):
        values = chunk.float().div_(255)
        total[0] += values.sum((0, 2, 3)).cpu().double()  # Apple's GPUs have no float64
        total[1] += values.square_().sum((0, 2, 3)).cpu().double()
    mean, square = total / (len(images) * images[0, 0].numel())
    std = (square - mean**2).clamp(min=1e-12).sqrt()
    return mean.float().to(images.device), std.float().to(images.device)


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, but for hidden ones."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def image_files(folder: Path, recursive: bool = True) -> list[Path]:
    """The image files below a folder, sorted; other files and hidden ones are passed over."""
    found: list[Path] = []
    seen = set(map(str, Path(os.path.realpath(folder)).parents))  # a link may lead back up
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if recursive else []
        if os.path.realpath(parent) in seen:  # a link in a circle
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        found += [
            Path(parent, name)
            for name in sorted(names)
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
    return found


def labelled_files(folder: Path, classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    """The image files in the class folders below a folder, and the positions of their classes."""
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = image_files(folder / name)
        require(bool(found), f"the class folder {folder / name} holds no images")
        paths += found
        labels += [label] * len(found)
    return paths, labels


def decode_image(path: str | Path, size: int) -> np.ndarray:
    """Decode an image file of any mode and size to `(3, size, size)`, uint8 RGB.

    EXIF rotation is applied, transparency is put on white, 16-bit values are scaled to 8 bits, the
    shorter side is resized to `size` (bicubic, antialiased) and the centre is cropped.

    Raises:
        OSError or another error of Pillow's: the file is no image, truncated or far too large.
    """
    from PIL import Image, ImageOps

    # By its name alone an image could be PostScript, which Pillow hands to Ghostscript.
    with Image.open(path, formats=IMAGE_FORMATS) as opened:
        image: Image.Image = opened
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise OSError(f"{image.width} x {image.height} pixels are too many")
        image.draft("RGB", (2 * size, 2 * size))  # decode huge JPEGs at a fraction of their size
        image.load()
        if image.getexif().get(0x0112, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":  # 16-bit, or float in [0, 1]
            values = np.asarray(image, np.float64) * (1 if image.mode == "F" else 1 / 65535)
            image = Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))
        if image.mode in ("LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image = image.convert("RGBA")
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        return np.asarray(image).transpose(2, 0, 1)  # (3, H, W)


def decode_folder(paths: list[Path], folder: Path, data_dir: Path, size: int) -> Tensor:
    """All images as one memory-mapped uint8 tensor `(N, 3, size, size)`.

    The cache file is named after the folder and a fingerprint of every file's name, size and time,
    so a changed file means a new cache; its checksum is verified at every start.
    """
    try:
        stats = [path.stat() for path in paths]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    for path, status in zip(paths, stats, strict=True):
        require(stat.S_ISREG(status.st_mode), f"{path} is not a plain file: remove it")
    listing = "\n".join(
        f"{path.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}"
        for path, status in zip(paths, stats, strict=True)
    )
    version = f"{CACHE_VERSION} {size}\n{listing}".encode(errors="surrogateescape")
    origin = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]
    stem = f"{folder.resolve().name}-{origin}-{size}-"
    cache = data_dir / "cache" / f"{stem}{hashlib.sha256(version).hexdigest()[:16]}.npy"
    shape = (len(paths), 3, size, size)
    images = _open_cache(cache, shape)
    if images is not None:
        return images
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent, prefix=".decoding-") as temporary:
            draft = Path(temporary, "images.npy")
            drafted = np.lib.format.open_memmap(draft, "w+", np.uint8, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk shows here, not as a SIGBUS later
                with open(draft, "rb+") as file:
                    os.posix_fallocate(file.fileno(), 0, draft.stat().st_size)
            _decode_into(drafted, paths, folder, size)
            drafted.flush()
            Path(temporary, "sum.json").write_text(json.dumps({"crc32": zlib.crc32(drafted.data)}))
            os.replace(Path(temporary, "sum.json"), cache.with_suffix(".json"))
            os.replace(draft, cache)
    except OSError as error:
        print(f"Decoding without a cache: cannot write {cache} ({error.strerror}).")
        array = np.empty(shape, np.uint8)
        _decode_into(array, paths, folder, size)
        return torch.from_numpy(array)
    for old in cache.parent.glob(f"{glob.escape(stem)}*"):
        if old.suffix in (".npy", ".json") and old.stem != cache.stem:
            old.unlink(missing_ok=True)
    images = _open_cache(cache, shape)
    require(images is not None, f"{cache} changed while it was written: start again")
    return typing.cast(Tensor, images)


def _open_cache(cache: Path, shape: tuple[int, ...]) -> Tensor | None:
    """The cached images, or None when they are missing or damaged."""
    if not cache.exists():
        return None
    try:
        # Copy on write: torch wants a writable array, and nothing may reach the file.
        array = np.lib.format.open_memmap(cache, "c")
        checksum = json.loads(cache.with_suffix(".json").read_text())["crc32"]
        if array.shape == shape and array.dtype == np.uint8 and zlib.crc32(array.data) == checksum:
            return torch.from_numpy(array)
    except Exception:  # numpy's parser of the header raises nearly anything
        pass
    print(f"The image cache {cache} is damaged: decoding again.")
    return None


def _decode_into(array: np.ndarray, paths: list[Path], folder: Path, size: int) -> None:
    """Decode every path into its row of `array`, in threads (Pillow releases the lock)."""
    from tqdm import tqdm

    def decode(start: int) -> list[tuple[Path, Exception]]:
        failed: list[tuple[Path, Exception]] = []
        for row in range(start, min(start + 256, len(paths))):
            try:
                array[row] = decode_image(paths[row], size)
            except Exception as error:  # Pillow's decoders raise nearly anything
                failed.append((paths[row], error))
        return failed

    failed: list[tuple[Path, Exception]] = []
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(paths), desc=f"Decoding {folder.name}", unit="img", disable=None) as bar,
    ):
        for done in pool.map(decode, range(0, len(paths), 256)):
            failed += done
            bar.update(min(256, len(paths) - bar.n))
    if failed:
        path, error = failed[0]
        reason = "no image format that Pillow knows" if "cannot identify" in str(error) else error
        raise UserError(
            f"{len(failed)} of {len(paths)} images in {folder} cannot be read; the first is "
            f"{path}: {reason}. Repair or remove them"
        )


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]; float images as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images
