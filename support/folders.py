"""A folder of images as a data set: its layout, decoding, and the cache of what was decoded."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import stat
import tempfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from support import datasets
from support.errors import UserError, require

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
)
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
CACHE_VERSION = 1  # raise it when decoding changes


def load_folder(folder: Path, data_dir: Path, image_size: int) -> datasets.ImageData:
    """A folder of images as a data set, without the statistics that `measured` adds.

    Args:
        folder: `train/<class>/*` with `test/<class>/*`; or `<class>/*`, of which a fifth becomes
            the test set, the same every time; or images without sub-folders, then without labels.
        data_dir: where the cache of the decoded images is kept.
        image_size: side to which they are resized (shorter side, then centre crop).

    Raises:
        UserError: it has another layout, or holds what cannot be read.
    """
    try:
        names = [path.name for path in subfolders(folder)]
        # `train` may also be the name of a class: then it holds images and has neighbours.
        is_split = "train" in names and (
            set(names) <= {"train", "test"} or bool(subfolders(folder / "train"))
        )
        others = sorted(set(names) - {"train", "test"}) if is_split else []
        require(
            not others,
            f"{folder} has {', '.join(others)} beside train: call the folder of test images test, "
            "and move others away",
        )
        train_folder = folder / "train" if is_split else folder
        test_folder = folder / "test" if is_split and "test" in names else None
        classes = [p.name for p in subfolders(train_folder)]
        loose = image_files(train_folder, recursive=False)
        if not classes:
            require(bool(loose), f"{train_folder} holds no images")
            images = decode_folder(loose, train_folder, data_dir, image_size)
            split = datasets.Split(images, None, _relative(loose, folder))
            return datasets.ImageData(folder.resolve().name, (), split, None)
        require(
            not loose,
            f"{train_folder} holds both class folders and {len(loose)} loose images such as "
            f"{loose[0].name if loose else ''}: put each image into a class folder",
        )
        require(
            len(classes) > 1,
            f"{train_folder} has one class only ({classes[0]}): it takes two or more, or images "
            "without a sub-folder to train without labels",
        )
        paths, labels = labelled_files(train_folder, classes)
        count = len(paths)
        if test_folder is not None:
            names = [p.name for p in subfolders(test_folder)]
            strange = sorted(set(names) - set(classes))
            require(not strange, f"{test_folder} has a class that train has not: {strange[:1]}")
            require(bool(names), f"{test_folder} has no class folders")
            more_paths, more_labels = labelled_files(test_folder, names)
            paths += more_paths
            labels += [classes.index(names[label]) for label in more_labels]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    targets = torch.tensor(labels)
    if test_folder is None:
        # Before decoding, so that both parts are slices of the cache and not copies in memory.
        train, test = datasets.hold_out(datasets.Split(torch.arange(count), targets), 0.2)
        count, order = len(train), torch.cat((train.images, test.images))
        paths, targets = [paths[i] for i in order], targets[order]
    images = decode_folder(paths, folder, data_dir, image_size)
    found = _relative(paths, folder)
    train, test = (
        datasets.Split(images[part], targets[part], found[part])
        for part in (slice(count), slice(count, None))
    )
    return datasets.ImageData(folder.resolve().name, tuple(classes), train, test)


def _relative(paths: list[Path], folder: Path) -> np.ndarray:
    return np.array([str(path.relative_to(folder)) for path in paths])


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

    Raises:
        UserError: one of them cannot be read.
    """
    return _decode_cached(paths, folder, data_dir, size, strict=True)[0]


def decode_readable(
    paths: list[Path], folder: Path, data_dir: Path, size: int, stop: bool = False
) -> tuple[Tensor, dict[int, str]]:
    """As `decode_folder`, with a cache of its own, but what cannot be read is passed over.

    Returns:
        `(N, 3, size, size)`, and for the positions of files that cannot be read the reason. What
        their rows hold means nothing. They are tried again at every start.

    Raises:
        UserError: with `stop`, at the first that cannot be read.
    """
    return _decode_cached(paths, folder, data_dir, size, strict=False, stop=stop)


def _decode_cached(
    paths: list[Path], folder: Path, data_dir: Path, size: int, strict: bool, stop: bool = False
) -> tuple[Tensor, dict[int, str]]:
    lines = []
    for path in paths:
        try:
            lines.append(f"{path.relative_to(folder)}\0{_file_state(path)}")
        except OSError as error:
            if strict:
                raise UserError(f"cannot read {path}: {error.strerror or error}") from error
            lines.append(f"{path.relative_to(folder)}")
    listing = "\n".join(lines)
    version = f"{CACHE_VERSION} {size}\n{listing}".encode(errors="surrogateescape")
    origin = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]
    stem = f"{'' if strict else 'readable-'}{folder.resolve().name}-{origin}-{size}-"
    cache = data_dir / "cache" / f"{stem}{hashlib.sha256(version).hexdigest()[:16]}.npy"
    shape = (len(paths), 3, size, size)
    found = _open_cache(cache, shape)
    if found is not None:
        images, rows = found
        return images, _decode_into(images.numpy(), rows, paths, folder, size, strict, stop)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent, prefix=".decoding-") as temporary:
            draft = Path(temporary, "images.npy")
            drafted = np.lib.format.open_memmap(draft, "w+", np.uint8, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk shows here, not as a SIGBUS later
                with open(draft, "rb+") as file:
                    os.posix_fallocate(file.fileno(), 0, draft.stat().st_size)
            broken = _decode_into(drafted, range(len(paths)), paths, folder, size, strict, stop)
            drafted.flush()
            record = {"crc32": zlib.crc32(drafted.data), "broken": list(broken)}
            Path(temporary, "sum.json").write_text(json.dumps(record))
            os.replace(Path(temporary, "sum.json"), cache.with_suffix(".json"))
            os.replace(draft, cache)
    except OSError as error:
        print(f"Decoding without a cache: cannot write {cache} ({error.strerror}).")
        array = np.empty(shape, np.uint8)
        broken = _decode_into(array, range(len(paths)), paths, folder, size, strict, stop)
        return torch.from_numpy(array), broken
    for old in cache.parent.glob(f"{glob.escape(stem)}*"):
        if old.suffix in (".npy", ".json") and old.stem != cache.stem:
            old.unlink(missing_ok=True)
    found = _open_cache(cache, shape)
    require(found is not None, f"{cache} changed while it was written: start again")
    return found[0], broken


def _file_state(path: Path) -> str:
    """What changes with a file: its size and time; raises OSError when it is no plain file."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is not a plain file: remove it")
    return f"{status.st_size}\0{status.st_mtime_ns}"


def _open_cache(cache: Path, shape: tuple[int, ...]) -> tuple[Tensor, list[int]] | None:
    """The cached images and the rows that could not be read, or None when they are damaged."""
    if not cache.exists():
        return None
    try:
        # Copy on write: torch wants a writable array, and nothing may reach the file.
        array = np.lib.format.open_memmap(cache, "c")
        record = json.loads(cache.with_suffix(".json").read_text())
        same = array.shape == shape and array.dtype == np.uint8
        if same and zlib.crc32(array.data) == record["crc32"]:
            # Caches of older versions hold no broken images.
            return torch.from_numpy(array), record.get("broken", [])
    except Exception:  # numpy's parser of the header raises nearly anything
        pass
    print(f"The image cache {cache} is damaged: decoding again.")
    return None


def _decode_into(
    array: np.ndarray,
    rows: Sequence[int],
    paths: list[Path],
    folder: Path,
    size: int,
    strict: bool,
    stop: bool,
) -> dict[int, str]:
    """Decode the paths at `rows` into these rows of `array`, in threads (Pillow releases the lock).

    Returns:
        The rows that cannot be read, and why; with `strict` they are a UserError, with `stop` the
        first of them is one at once.
    """
    from tqdm import tqdm

    def decode(part: Sequence[int]) -> dict[int, str]:
        failed: dict[int, str] = {}
        for row in part:
            try:
                _file_state(paths[row])  # opening a pipe would wait for its other end
                array[row] = decode_image(paths[row], size)
            except Exception as error:  # Pillow's decoders raise nearly anything
                failed[row] = _reason(error)
        return failed

    if not rows:
        return {}
    failed: dict[int, str] = {}
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(rows), desc=f"Decoding {folder.name}", unit="img", disable=None) as bar,
    ):
        for done in pool.map(decode, [rows[i : i + 256] for i in range(0, len(rows), 256)]):
            failed |= done
            bar.update(min(256, len(rows) - bar.n))
            for row, reason in failed.items() if stop else ():
                pool.shutdown(cancel_futures=True)
                raise UserError(f"{paths[row]} cannot be read: {reason}")
    if failed and strict:
        row, reason = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(paths)} images in {folder} cannot be read; the first is "
            f"{paths[row]}: {reason}. Repair or remove them"
        )
    return failed


def _reason(error: Exception) -> str:
    """What is wrong with an image, in one line and without its path."""
    if "cannot identify" in str(error):
        return "no image format that Pillow knows"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
