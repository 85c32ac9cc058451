"""Folders of images as a finished encoder sees them: what embed.py and classify.py begin with."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import functions
from support import datasets, decoding, files, folders, frozen, page, progress
from support.errors import UserError, require
from support.settings import Parser


@dataclass(frozen=True)
class Collection:
    """Images that were encoded: `names` `(N,)`, `features` `(N, D)`, and `broken` files left out.

    `value_range` is what became black and white in images of more than 8 bits. The pixels of image
    i are those of `images` `(M, C, H, W)`, uint8, at `rows[i]`. That tensor may be memory-mapped,
    and larger than memory.
    """

    names: np.ndarray
    images: Tensor
    rows: Tensor
    features: Tensor
    broken: int = 0
    value_range: folders.ValueRange = None

    def tiles(self, index: Tensor, channels: int, side: int) -> Tensor:
        """The images at `index` as an encoder of so many channels sees them.

        Returns:
            `(*index.shape, channels, h, w)`, uint8, at most `side` pixels large.
        """
        places = self.rows[index.flatten()].split(500)
        parts = torch.cat([page.shrink(self.images[part], side) for part in places])
        return datasets.with_channels(parts, channels).unflatten(0, index.shape)


def extract(encoder: frozen.Encoder, images: Tensor, rows: Tensor, what: str) -> Tensor:
    """Features `(N, D)`, float32, on the CPU, of the images at `rows` `(N,)`.

    All steps have the same number of images: the last one is filled up, because libraries have
    other kernels for few images, which round otherwise.
    """
    features = torch.empty(len(rows), encoder.network.num_features)
    size = functions.images_per_step(images)
    with progress.bar(len(rows), what) as bar:
        for start in range(0, len(rows), size):
            index = rows[start : start + size]
            batch = datasets.with_channels(images[index], len(encoder.mean))
            batch = F.pad(batch, (0, 0) * 3 + (0, size - len(index)))  # (B, C, H, W)
            split = datasets.Split(batch, None, mean=encoder.mean, std=encoder.std)
            found = functions.extract_features(encoder.network, split, encoder.fabric, size)
            features[start : start + size] = found[: len(index)]
            bar.update(len(index))
    return features


def read_folder(encoder: frozen.Encoder, folder: Path, data_dir: Path, strict: bool) -> Collection:
    """The images below a folder; a line for each that cannot be read.

    Raises:
        UserError: it holds none, or, with `strict`, one that cannot be read.
    """
    paths = folders.image_files(folder, encoder.rules.suffixes)
    require(bool(paths), f"{folder} holds no images")
    images, broken, value_range = folders.decode_readable(
        paths, folder, data_dir, encoder.size, encoder.rules, strict
    )
    if value_range:
        print("black is {:g} and white {:g} in images of more than 8 bits".format(*value_range))
    for row, reason in broken.items():
        print(f"passed over: {paths[row].relative_to(folder)}: {reason}")
    rows = torch.tensor([row for row in range(len(paths)) if row not in broken])
    require(len(rows) > 0, f"none of the {len(paths)} images in {folder} can be read")
    names = np.array([str(paths[row].relative_to(folder)) for row in rows.tolist()])
    features = extract(encoder, images, rows, folder.resolve().name)
    return Collection(names, images, rows, features, len(broken), value_range)


def read_training(encoder: frozen.Encoder, data_dir: Path) -> Collection | None:
    """The run's training images, with features of length 1.

    None, and a line that says why, if they are not there any more.
    """
    record = encoder.record
    try:
        require(bool(record), "there is no config.json beside the encoder")
        rules = decoding.PixelRules.recorded_in(record)
        where = (record["dataset"], data_dir, record["image_size"], None, rules)
        data = functions.load_images(*where, unlabelled=bool(record.get("unlabelled")))
        if data.train.paths is None:  # before images are held out: their places in the data set
            names = np.array([f"{data.name} {row}" for row in range(len(data.train))])
            data = dataclasses.replace(data, train=dataclasses.replace(data.train, paths=names))
        data = data.evaluated_on(record.get("evaluate_on"))
        same = record.get("data") in (None, data.fingerprint())
        require(same, f"{record['dataset']} holds other images now")
    except UserError as error:
        print(f"Neighbours among the training images are left out: {error}.")
        return None
    rows = torch.arange(len(data.train))
    features = extract(encoder, data.train.images, rows, "training images")
    F.normalize(features, dim=1, out=features)  # in place: there may be many
    return Collection(data.train.paths, data.train.images, rows, features)


def add_flags(parser: Parser, script: str) -> None:
    """Add the flags that every script on a folder has."""
    add = parser.add_argument
    add("--output", type=Path, help=f"folder to write [results/{script}/<run>-<folder name>]")
    text = "similarity from which on two images are near-duplicates [0.99]"
    add("--duplicates", type=float, default=0.99, metavar="X", help=text)
    text = "values that become black and white in images of more than 8 bits [the run's, or chosen]"
    add("--value-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help=text)
    text = "first: of a file with several images (pages, frames) take the first [the run's]"
    add("--stack", choices=("refuse", "first"), help=text)
    add("--strict", action="store_true", help="stop at the first image that cannot be read")
    add("--data-dir", type=Path, help="for the cache, and the run's data set [the run's]")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="[auto]")


def open_encoder(parsed: argparse.Namespace, script: str) -> tuple[frozen.Encoder, Path, Path]:
    """The encoder of a command line, the folder to write, and that of the data.

    Raises:
        UserError: there is no encoder or no folder, a flag is out of its range, or the output is
            there already.
    """
    require(0 < parsed.duplicates <= 1, f"--duplicates must be in (0, 1], not {parsed.duplicates}")
    require(parsed.folder.is_dir(), f"there is no folder {parsed.folder}")
    value_range = tuple(parsed.value_range or ())
    decoding.check_value_range(*value_range or (0, 1))
    encoder = frozen.load_encoder(parsed.encoder, parsed.device)
    own = {"value_range": value_range, "stack": parsed.stack}
    rules = dataclasses.replace(encoder.rules, **{k: v for k, v in own.items() if v})
    encoder = dataclasses.replace(encoder, rules=rules)
    name = f"{encoder.name}-{parsed.folder.resolve().name}"
    output = parsed.output or Path("results", script, name)
    files.check_new_folder(output)
    inside = output.resolve().is_relative_to(parsed.folder.resolve())
    require(not inside, f"{output} lies in the folder of images: name another with --output")
    return encoder, output, parsed.data_dir or Path(encoder.record.get("data_dir", "data"))
