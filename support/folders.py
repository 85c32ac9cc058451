"""A folder of images as a data set: its layout, and the cache of what was decoded."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from support import datasets, decoding
from support.errors import UserError, require

CACHE_VERSION = 4  # raise it when decoding changes
COPY_ON_WRITE: Final = "c"  # torch wants a writable array, and nothing may reach the file


def load_folder(
    folder: Path,
    data_dir: Path,
    image_size: int,
    rules: decoding.PixelRules,
    unlabelled: bool = False,
) -> datasets.ImageData:
    """A folder of images as a data set, without the statistics that `with_statistics` adds.

    Args:
        folder: `train/<class>/*` with `test/<class>/*`; or `<class>/*`, of which a fifth becomes
            the test set, the same every time; or images without sub-folders, then without labels.
        data_dir: where the cache of the decoded images is kept.
        image_size: side to which they are resized (shorter side, then centre crop).
        rules: how files become pixels; a range that they leave open is that of the training images.
        unlabelled: take all images, in folders of any depth, without labels.

    Raises:
        UserError: it has another layout, or holds what cannot be read.
    """
    try:
        train_folder, test_folder = (folder, None) if unlabelled else _find_splits(folder)
        classes = [] if unlabelled else [p.name for p in subfolders(train_folder)]
        loose = image_files(train_folder, rules.suffixes, recursive=unlabelled)
        if not classes:
            require(bool(loose), f"{train_folder} holds no images{_npy_hint(train_folder, rules)}")
            images, value_range = decode_folder(loose, train_folder, data_dir, image_size, rules)
            split = datasets.Split(images, None, _relative(loose, folder))
            return datasets.ImageData(folder.resolve().name, (), split, None, value_range)
        require(
            not loose,
            f"{train_folder} holds both class folders and {len(loose)} loose images such as "
            f"{loose[0].name if loose else ''}: put each image into a class folder, or take all "
            "without labels: --unlabelled",
        )
        require(
            len(classes) > 1,
            f"{train_folder} has one class only ({classes[0]}): it takes two or more, or "
            "--unlabelled to train without labels",
        )
        paths, labels = labelled_files(train_folder, classes, rules)
        count = len(paths)
        if test_folder is not None:
            names = [p.name for p in subfolders(test_folder)]
            strange = sorted(set(names) - set(classes))
            require(not strange, f"{test_folder} has a class that train has not: {strange[:1]}")
            require(bool(names), f"{test_folder} has no class folders")
            more_paths, more_labels = labelled_files(test_folder, names, rules)
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
    images, value_range = decode_folder(paths, folder, data_dir, image_size, rules, count)
    found = _relative(paths, folder)
    train, test = (
        datasets.Split(images[part], targets[part], found[part])
        for part in (slice(count), slice(count, None))
    )
    return datasets.ImageData(folder.resolve().name, tuple(classes), train, test, value_range)


def _find_splits(folder: Path) -> tuple[Path, Path | None]:
    """Where the training and the test images lie: in the folder itself, if it is not split."""
    names = {path.name for path in subfolders(folder)}
    capitals = sorted(n for n in names - {"train", "test"} if n.lower() in ("train", "test"))
    require(len(capitals) < 2, f"{folder} has {', '.join(capitals)}: call them train and test")
    others = sorted(names - {"train", "test"})
    # `train` may also be the name of a class: then it holds images and has neighbours.
    if "train" not in names or (others and not subfolders(folder / "train")):
        return folder, None
    require(
        not others,
        f"{folder} has {', '.join(others)} beside train: call the folder of test images test, and "
        "move others away",
    )
    return folder / "train", folder / "test" if "test" in names else None


def _relative(paths: list[Path], folder: Path) -> np.ndarray:
    return np.array([str(path.relative_to(folder)) for path in paths])


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, but for hidden ones."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def image_files(
    folder: Path, suffixes: frozenset[str] = decoding.IMAGE_SUFFIXES, recursive: bool = True
) -> list[Path]:
    """The image files below a folder, sorted; other files and hidden ones are passed over.

    Raises:
        UserError: a folder cannot be read.
    """
    found: list[Path] = []
    seen = set(map(str, Path(os.path.realpath(folder)).parents))  # a link may lead back up

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if recursive else []
        if os.path.realpath(parent) in seen:  # a link in a circle
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        found += [
            Path(parent, name)
            for name in sorted(names)
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith(".")
        ]
    return found


def labelled_files(
    folder: Path, classes: Sequence[str], rules: decoding.PixelRules
) -> tuple[list[Path], list[int]]:
    """The image files in the class folders below a folder, and the positions of their classes."""
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = image_files(folder / name, rules.suffixes)
        hint = _npy_hint(folder / name, rules)
        require(bool(found), f"the class folder {folder / name} holds no images{hint}")
        paths += found
        labels += [label] * len(found)
    return paths, labels


def _npy_hint(folder: Path, rules: decoding.PixelRules) -> str:
    there = rules.channels is None and any(folder.rglob("*.npy"))
    return ": .npy files are taken with --channels" if there else ""


ValueRange = tuple[float, float] | None


@dataclass(frozen=True)
class _Job:
    """The files of a folder to decode, and how.

    `training` of them, the first, decide on a range that the `rules` leave open. What cannot be
    read is passed over; with `strict` all of it is an error, with `stop` the first at once.
    """

    paths: list[Path]
    folder: Path
    size: int
    rules: decoding.PixelRules
    training: int
    strict: bool = False
    stop: bool = False


def decode_folder(
    paths: list[Path],
    folder: Path,
    data_dir: Path,
    size: int,
    rules: decoding.PixelRules,
    training: int | None = None,
) -> tuple[Tensor, ValueRange]:
    """All images as one memory-mapped uint8 tensor `(N, C, size, size)`.

    The cache file is named after the folder and a fingerprint of the rules and every file's name,
    size and time, so a changed file means a new cache; its checksum is verified at every start.

    Args:
        paths: of the images.
        folder: that they lie in.
        data_dir: where the cache is kept.
        size: side of the images in pixels.
        rules: how files become pixels. A range that they leave open is chosen for all images by the
            values of the first `training` of them, by default of all.
        training: see `rules`.

    Returns:
        The images, and the values that became black and white; None if all images have 8 bits.

    Raises:
        UserError: one of them cannot be read.
    """
    job = _Job(paths, folder, size, rules, training or len(paths), strict=True)
    images, _, value_range = _decode_cached(job, data_dir)
    return images, value_range


def decode_readable(
    paths: list[Path],
    folder: Path,
    data_dir: Path,
    size: int,
    rules: decoding.PixelRules,
    stop: bool = False,
) -> tuple[Tensor, dict[int, str], ValueRange]:
    """As `decode_folder`, with a cache of its own, but what cannot be read is passed over.

    Returns:
        `(N, C, size, size)`; for the positions of files that cannot be read the reason; and the
        values that became black and white. What the rows of unreadable files hold means nothing.
        They are tried again at every start.

    Raises:
        UserError: with `stop`, at the first that cannot be read.
    """
    return _decode_cached(_Job(paths, folder, size, rules, len(paths), stop=stop), data_dir)


def _decode_cached(job: _Job, data_dir: Path) -> tuple[Tensor, dict[int, str], ValueRange]:
    prefix, fingerprint = _name_cache(job)
    cache = data_dir / "cache" / f"{prefix}{fingerprint}.npy"
    shape = (len(job.paths), job.rules.channels or 3, job.size, job.size)
    found = _open_cache(cache, shape)
    if found is not None:
        images, rows, value_range = found
        known = dataclasses.replace(job.rules, value_range=value_range or job.rules.value_range)
        broken, newer = _decode_into(images.numpy(), rows, dataclasses.replace(job, rules=known))
        return images, broken, value_range or newer
    try:
        broken, value_range = _write_cache(cache, shape, job)
        images = torch.from_numpy(np.lib.format.open_memmap(cache, COPY_ON_WRITE))
    except OSError as error:
        print(f"Decoding without a cache: cannot write {cache} ({error.strerror}).")
        array = np.empty(shape, np.uint8)
        broken, value_range = _decode_into(array, range(len(job.paths)), job)
        return torch.from_numpy(array), broken, value_range
    for old in cache.parent.glob(f"{glob.escape(prefix)}*"):
        if old.suffix in (".npy", ".json") and old.stem != cache.stem:
            old.unlink(missing_ok=True)
    return images, broken, value_range


def _name_cache(job: _Job) -> tuple[str, str]:
    """How the caches of a folder, a size and rules begin, and what the files' states add to it."""
    folder, size, rules = job.folder, job.size, job.rules
    lines = []
    for path in job.paths:
        name = str(path.relative_to(folder))
        try:
            lines.append(f"{name}\0{_file_state(path)}")
        except OSError as error:
            if job.strict:
                raise UserError(f"cannot read {path}: {error.strerror or error}") from error
            lines.append(name)
    listing = "\n".join(lines)
    version = f"{CACHE_VERSION} {size} {rules}\n{listing}".encode(errors="surrogateescape")
    origin = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]
    kind = f"{size}-{zlib.crc32(repr(rules).encode()):08x}"  # others have caches of their own
    prefix = f"{'' if job.strict else 'readable-'}{folder.resolve().name}-{origin}-{kind}-"
    return prefix, hashlib.sha256(version).hexdigest()[:16]


def _write_cache(
    cache: Path, shape: tuple[int, ...], job: _Job
) -> tuple[dict[int, str], ValueRange]:
    """Decode all images into a cache that is whole or not there; returns as `_decode_into` does."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    for left_behind in cache.parent.glob(".decoding-*"):  # by a process that was killed
        if time.time() - left_behind.stat().st_mtime > 86_400:
            shutil.rmtree(left_behind, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cache.parent, prefix=".decoding-") as temporary:
        draft = Path(temporary, "images.npy")
        mapped = np.lib.format.open_memmap(draft, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):  # a full disk shows here, not as a SIGBUS later
            with open(draft, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, draft.stat().st_size)
        broken, value_range = _decode_into(mapped, range(len(job.paths)), job)
        mapped.flush()
        record = {"crc32": zlib.crc32(mapped.data), "broken": list(broken)}
        record["value_range"] = value_range
        Path(temporary, "sum.json").write_text(json.dumps(record))
        del mapped  # Windows renames no file that is mapped
        os.replace(Path(temporary, "sum.json"), cache.with_suffix(".json"))
        os.replace(draft, cache)
    return broken, value_range


def _file_state(path: Path) -> str:
    """What changes with a file: its size and time; raises OSError when it is no plain file."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is not a plain file: remove it")
    return f"{status.st_size}\0{status.st_mtime_ns}"


def _open_cache(cache: Path, shape: tuple[int, ...]) -> tuple[Tensor, list[int], ValueRange] | None:
    """The cached images, the rows that could not be read, and the range of their values.

    None when they are damaged.
    """
    if not os.path.exists(cache):  # or its folder may not be searched
        return None
    try:
        array = np.lib.format.open_memmap(cache, COPY_ON_WRITE)
        record = json.loads(cache.with_suffix(".json").read_text())
        same = array.shape == shape and array.dtype == np.uint8
        if same and zlib.crc32(array.data) == record["crc32"]:
            value_range = record["value_range"] and tuple(record["value_range"])
            return torch.from_numpy(array), record["broken"], value_range
    except Exception:  # numpy's parser of the header raises nearly anything
        pass
    print(f"The image cache {cache} is damaged: decoding again.")
    return None


def _decode_into(
    array: np.ndarray, rows: Sequence[int], job: _Job
) -> tuple[dict[int, str], ValueRange]:
    """Decode the paths at `rows` into these rows of `array`, in threads (Pillow releases the lock).

    Images whose type leaves the range of their values open are decoded when all have been looked
    at, with a range for all of them.

    Returns:
        The rows that cannot be read, and why; and the range, if there are such images.

    Raises:
        UserError: with `strict` or `stop`, one cannot be read.
    """
    from tqdm import tqdm

    paths, folder, size, rules = job.paths, job.folder, job.size, job.rules
    failed: dict[int, str] = {}
    extremes: dict[int, tuple[float, float]] = {}  # of the images whose range is open

    def decode(part: Sequence[int], rules: decoding.PixelRules) -> int:
        for row in part:
            if job.stop and failed:
                break
            try:
                _file_state(paths[row])  # opening a pipe would wait for its other end
                pixels = decoding.read_image(paths[row], size, rules)
                if pixels.dtype != np.uint8:
                    extremes[row] = float(pixels.min()), float(pixels.max())
                if pixels.dtype == np.uint8 or rules.value_range is not None:
                    array[row] = decoding.fit(pixels, size, rules)
            except Exception as error:  # Pillow's decoders raise nearly anything
                failed[row] = _reason(error)
        return len(part)

    def decode_all(rows: Sequence[int], rules: decoding.PixelRules) -> None:
        if not rows:
            return
        # A job may have few of the machine's cores, and memory for as many images at a time.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        many = max(1, min(256, len(rows) // (4 * (cores or 1))))
        parts = [rows[i : i + many] for i in range(0, len(rows), many)]
        with (
            ThreadPoolExecutor(cores) as pool,
            tqdm(total=len(rows), desc=f"Decoding {folder.name}", unit="img", disable=None) as bar,
        ):
            for count in pool.map(decode, parts, [rules] * len(parts)):
                bar.update(count)
                if failed and job.stop:
                    pool.shutdown(cancel_futures=True)
                    row = min(failed)
                    raise UserError(f"{paths[row]} cannot be read: {failed[row]}")
        if failed and job.strict:
            row = min(failed)
            for other in sorted(failed)[:20] if len(failed) > 1 else ():
                print(f"cannot be read: {paths[other]}: {failed[other]}")
            raise UserError(
                f"{len(failed)} of {len(paths)} images in {folder} cannot be read; the first is "
                f"{paths[row]}: {failed[row]}. Repair or remove them"
            )

    decode_all(rows, rules)
    if extremes and rules.value_range is None:
        known = [extremes[row] for row in extremes if row < job.training] or list(extremes.values())
        lows, highs = zip(*known, strict=True)
        chosen = decoding.choose_value_range(min(lows), max(highs))
        rules = dataclasses.replace(rules, value_range=chosen)
        decode_all(sorted(extremes), rules)
    return failed, rules.value_range if extremes else None


def _reason(error: Exception) -> str:
    """What is wrong with an image, in one line and without its path."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "no image format that Pillow knows"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
