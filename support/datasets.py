"""Images as one uint8 tensor: what a data set is, its splits and statistics, and downloads."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import math
import os
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from support import files
from support.errors import UserError, require

# The images that an encoder is scored on.
Part = Literal["test", "validation", "fold-1", "fold-2", "fold-3", "fold-4", "fold-5"]
FOLDS = get_args(Part)[2:]


@dataclass(frozen=True)
class Split:
    """Images `(N, C, H, W)`, uint8, their labels `(N,)`, int64, or None, and the files they are of.

    `mean` and `std` `(C,)`, on the scale [0, 1], are those of the training images, in a test split
    too; `ImageData.with_statistics` sets them.
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

    def with_statistics_of(self, train: Split) -> Split:
        """The same split with the statistics of `train`, by which `normalize` goes."""
        return dataclasses.replace(self, mean=train.mean, std=train.std)

    def normalize(self, images: Tensor) -> Tensor:
        """`(images - mean) / std` by channel, of images `(B, C, H, W)`, uint8 or in [0, 1]."""
        mean, std = (value[None, :, None, None] for value in (self.mean, self.std))
        return (to_float(images) - mean).div_(std)

    def normalize_for_encoder(self, images: Tensor) -> Tensor:
        """As `normalize`; they lie in memory as encoders want them, with the channels last."""
        return self.normalize(images).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class ImageData:
    """A data set. `test` is None and `classes` is empty when there are no labels.

    `value_range` has the values that became 0 and 255, where files had more than 8 bits.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split | None
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """See at the start that plots and tables can show the names, which are those of folders."""
        for name in (self.name, *self.classes):
            shown = name.encode(errors="ignore").decode()
            require(shown == name, f"the folder {name!r} has a name that is no UTF-8: rename it")

    def with_statistics(self) -> ImageData:
        """The same data with its training images' mean and std, by which `Split.normalize` goes."""
        mean, std = channel_statistics(self.train.images)
        train = dataclasses.replace(self.train, mean=mean, std=std)
        test = None if self.test is None else self.test.with_statistics_of(train)
        return dataclasses.replace(self, train=train, test=test)

    def with_validation_split(self) -> ImageData:
        """The training images alone, a tenth of them, always the same, in the test images' place.

        Raises:
            UserError: a class is too small to be in both parts.
        """
        train, held_out = hold_out(self.train, 0.1)
        return dataclasses.replace(self, train=train, test=held_out).with_statistics()

    def evaluated_on(self, part: str | None) -> ImageData:
        """What `--evaluate-on` chooses: the same data, or training images in the tests' place.

        For `validation` they are `with_validation_split`'s, for `fold-1` to `fold-5` a fifth each,
        in which every training image is once.

        Raises:
            UserError: a class is too small to be in all parts.
        """
        if part == "validation":
            return self.with_validation_split()
        if part in FOLDS:
            train, held_out = hold_out_fold(self.train, FOLDS.index(part))
            return dataclasses.replace(self, train=train, test=held_out).with_statistics()
        return self

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
        if self.test and self.classes:
            counts = self.test.labels.bincount(minlength=len(self.classes)).tolist()
            untested = [name for name, n in zip(self.classes, counts, strict=True) if n == 0]
            parts += [f"no test images of {' or '.join(untested)}"] if untested else []
        if self.value_range:
            low, high = self.value_range
            parts += [f"values from {low:g} (black) to {high:g} (white, see --value-range)"]
        return ", ".join(parts)


def hold_out(split: Split, fraction: float, seed: int = 0) -> tuple[Split, Split]:
    """Split off a fraction, stratified by label: `(rest, held_out)`, two separate objects.

    The seed is the split's own: runs with different seeds share the split.

    Raises:
        UserError: a class is too small to be in both parts.
    """
    from sklearn.model_selection import train_test_split

    labels = None if split.labels is None else split.labels.cpu().numpy()
    try:
        parts = train_test_split(
            np.arange(len(split)), test_size=fraction, random_state=seed, stratify=labels
        )
    except ValueError as error:
        raise UserError(
            f"too few images to split off a share of {fraction:.4g}: each class needs two or more, "
            "and each part as many images as there are classes"
        ) from error
    rest, held_out = (torch.from_numpy(np.sort(part)) for part in parts)
    return split.select(rest), split.select(held_out)


def hold_out_fold(split: Split, fold: int) -> tuple[Split, Split]:
    """Split off one of five parts, 0 to 4, stratified by label: `(rest, held_out)`.

    Raises:
        UserError: a class has fewer than five images.
    """
    from sklearn.model_selection import KFold, StratifiedKFold

    labels = None if split.labels is None else split.labels.cpu().numpy()
    fewest = len(split) if labels is None else np.bincount(labels).min()
    require(fewest >= len(FOLDS), f"a fold needs {len(FOLDS)} images of each class, not {fewest}")
    kind = KFold if labels is None else StratifiedKFold
    folds = kind(len(FOLDS), shuffle=True, random_state=0).split(np.arange(len(split)), labels)
    rest, held_out = (torch.from_numpy(part) for part in list(folds)[fold])
    return split.select(rest), split.select(held_out)


def draw_labels(labels: Tensor, count: int, seed: Any, draws: str = "balanced") -> Tensor:
    """Positions `(count,)` of labelled images, nested for the same seed.

    Balanced, the first K are one image of each of the K classes, the next K another one, and so on;
    a class that has no more images is passed over. Random, all images are alike.
    """
    generator = np.random.default_rng(seed)
    values = labels.cpu().numpy()
    if draws == "random":
        return torch.from_numpy(generator.permutation(len(values))[:count])
    classes = generator.permutation(np.unique(values))
    turns = [
        (rank, place, image)
        for place, label in enumerate(classes)
        for rank, image in enumerate(generator.permutation(np.flatnonzero(values == label)))
    ]
    return torch.tensor([int(image) for _, _, image in sorted(turns)[:count]])


DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive that holds one folder, all of it or nothing."""
    import tarfile

    require(hasattr(tarfile, "data_filter"), "unpacking safely needs Python 3.11.4 or newer")
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
    if not address.partition("?")[0].endswith(path.name):
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


def as_shown(images: Tensor) -> Tensor:
    """What of images `(..., C, H, W)` goes into a picture: the first three channels, or one."""
    return images[..., : 3 if images.shape[-3] >= 3 else 1, :, :]


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]; float images as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Colour images `(B, 3, H, W)`, uint8, as an encoder of one or three channels takes them.

    Grey is ITU-R 601's luma, rounded as Pillow does, so that grey pixels keep their value.
    """
    if channels == images.shape[1]:
        return images
    shares = torch.tensor([19595, 38470, 7471]).view(3, 1, 1)  # of 65,536
    luma = (images.int() * shares).sum(1, keepdim=True)  # (B, 1, H, W)
    return ((luma + 32768) >> 16).byte()
