"""A finished encoder on any folder of images: features, a map, neighbours, near-duplicates.

    python embed.py results/simclr/NAME path/to/folder
    python embed.py encoder.safetensors path/to/folder --duplicates 0.98 --output found

Takes a finished run of simclr.py, simsiam.py or moco.py, or its `encoder.safetensors` alone, and
all images below a folder. Writes `features.npz`, `images.csv`, `neighbours.csv`, `neighbours.png`
and `embedding.html`. Similarity is the cosine between the features of two images, which are those
that the run's own evaluation would give them. A file that cannot be read is named and passed over.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import functions
from support import (
    checkpoints,
    datasets,
    decoding,
    devices,
    encoders,
    files,
    folders,
    neighbours,
    page,
    progress,
    runs,
)
from support.errors import UserError, require
from support.runs import exit_cleanly
from support.settings import COMPUTED_IN, Parser

BATCH = 500  # images per step, as in functions.extract_features
MAPPED = 10_000  # images, as in functions.images_to_map
SIDES = {"cifar10": 32, "fashion-mnist": 28, "digits": 8}  # what --image-size does not change
HEADS = {"folder": "nearest in the folder", "training": "nearest training images"}
COLUMNS = (
    *("path", "class", "probability", "x", "y", "neighbour", "similarity"),
    *("training_neighbour", "training_similarity", "duplicate_of"),
)


@dataclass(frozen=True)
class Frozen:
    """A finished encoder and what is known of it.

    `mean` and `std` `(C,)` are those of its training images, `size` their side in pixels, `rules`
    how their files became pixels. `record` is the run's `config.json`, empty for a file alone.
    `probe` is empty without a linear probe.
    """

    network: Any
    name: str
    size: int
    mean: Tensor
    std: Tensor
    rules: decoding.PixelRules
    fabric: Any
    record: dict[str, Any]
    probe: dict[str, Tensor]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Collection:
    """Images that were encoded: `names` `(N,)`, `features` `(N, D)`, and `broken` files left out.

    The pixels of image i are those of `images` `(M, C, H, W)`, uint8, at `rows[i]`. That tensor may
    be memory-mapped, and larger than memory.
    """

    names: np.ndarray
    images: Tensor
    rows: Tensor
    features: Tensor
    broken: int = 0

    def tiles(self, index: Tensor, channels: int, side: int) -> Tensor:
        """Some images as an encoder of so many channels sees them, at most `side` pixels large."""
        parts = [page.shrink(self.images[self.rows[i]], side) for i in index.split(BATCH)]
        return as_seen(torch.cat(parts), channels)


Near = tuple[Collection, Tensor, Tensor]  # where neighbours are, their similarities and positions


def load_encoder(path: Path, device: str) -> Frozen:
    """The encoder of a run folder, or in a safetensors file that a run wrote.

    Raises:
        UserError: there is none, it is damaged, or it does not say what it is.
    """
    require(path.exists(), f"there is no run folder or file {path}")
    file = path / "encoder.safetensors" if path.is_dir() else path
    require(
        file.exists(),
        f"{path} has no encoder.safetensors: it is no finished run of simclr.py, simsiam.py or "
        "moco.py",
    )
    weights, about = checkpoints.load_tensors(file)
    require(
        about.keys() >= {"encoder", "stem", "mean", "std"},
        f"{file} does not say what encoder it is: take encoder.safetensors of a finished run",
    )
    folder = file.resolve().parent
    is_run = file.name == "encoder.safetensors" and (folder / "config.json").exists()
    record = files.read_json(folder / "config.json") if is_run else {}
    # Files of older versions name neither the side nor the precision.
    dataset, side = str(record.get("dataset")), record.get("image_size")
    size: Any = about.get("size", SIDES.get(dataset, side))
    require(
        size is not None,
        f"{file} does not say how large its images are: put its run's config.json beside it",
    )
    computed_in = about.get("computed_in", record.get("computed_in"))
    fabric = devices.make_fabric(device, COMPUTED_IN.get(str(computed_in), "auto"))
    probe: dict[str, Tensor] = {}
    classes: list[str] = []
    try:
        mean, std = (torch.tensor(about[name], device=fabric.device) for name in ("mean", "std"))
        shape = (len(mean), size, about.get("width", 64))
        rules = decoding.PixelRules.recorded_in(about)
        network = encoders.make_encoder(about["encoder"], about["stem"], *shape)
        network.load_state_dict(weights)
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} does not hold the encoder that it names: {reason}") from error
    if is_run and (folder / "probe.safetensors").exists():
        probe, about = checkpoints.load_tensors(folder / "probe.safetensors")
        classes = about.get("classes", [])
        fits = probe.keys() == {"weight", "bias", "mean", "std"} and (
            probe["weight"].shape == (len(classes), network.num_features)
        )
        require(fits, f"{folder / 'probe.safetensors'} is of another encoder: repeat the probe")
    network = network.to(fabric.device).to(memory_format=torch.channels_last)
    name = folder.name if is_run else file.stem
    return Frozen(network, name, size, mean, std, rules, fabric, record, probe, tuple(classes))


def as_seen(images: Tensor, channels: int) -> Tensor:
    """Colour images `(B, 3, H, W)`, uint8, as an encoder of one or three channels takes them.

    Grey is ITU-R 601's luma, rounded as Pillow does, so that grey pixels keep their value.
    """
    if channels == images.shape[1]:
        return images
    shares = torch.tensor([19595, 38470, 7471]).view(3, 1, 1)  # of 65,536
    luma = (images.int() * shares).sum(1, keepdim=True)  # (B, 1, H, W)
    return ((luma + 32768) >> 16).byte()


def extract(frozen: Frozen, images: Tensor, rows: Tensor, what: str) -> Tensor:
    """Features `(N, D)`, float32, on the CPU, of the images at `rows` `(N,)`.

    All steps have the same number of images: the last one is filled up, because libraries have
    other kernels for few images, which round otherwise.
    """
    features = torch.empty(len(rows), frozen.network.num_features)
    with progress.bar(len(rows), what) as bar:
        for start in range(0, len(rows), BATCH):
            batch = as_seen(images[rows[start : start + BATCH]], len(frozen.mean))
            count = len(batch)
            batch = F.pad(batch, (0, 0) * 3 + (0, BATCH - count))  # (500, C, H, W)
            split = datasets.Split(batch, None, mean=frozen.mean, std=frozen.std)
            found = functions.extract_features(frozen.network, split, frozen.fabric, BATCH)
            features[start : start + count] = found[:count].cpu()
            bar.update(count)
    return features


def classify(frozen: Frozen, features: Tensor) -> tuple[Tensor, Tensor]:
    """The linear probe's classes `(N,)` and their probabilities in [0, 1] `(N,)`."""
    classes, probabilities = [], []
    for part in features.split(BATCH):
        logits = functions.apply_probe(part, frozen.probe)  # (B, K)
        classes.append(logits.argmax(1))
        probabilities.append(logits.softmax(1).amax(1))
    return torch.cat(classes), torch.cat(probabilities)


def image_rows(
    frozen: Frozen,
    mine: Collection,
    near: dict[str, Near],
    originals: Tensor,
    coordinates: np.ndarray,
    classes: Tensor | None,
    probabilities: Tensor | None,
) -> Iterator[dict[str, Any]]:
    """The rows of `images.csv`; what an image has not is left empty."""
    for i, name in enumerate(mine.names):
        row = {"path": name}
        if classes is not None:
            row["class"] = frozen.classes[classes[i]]
            row["probability"] = f"{probabilities[i]:.4f}"
        if np.isfinite(coordinates[i, 0]):
            row["x"], row["y"] = (f"{value:.3f}" for value in coordinates[i])
        for where, (others, similarity, index) in near.items():
            prefix = "training_" if where == "training" else ""
            if index.shape[1]:
                row[f"{prefix}neighbour"] = others.names[index[i, 0]]
                row[f"{prefix}similarity"] = f"{similarity[i, 0]:.5f}"
        if originals[i] >= 0:
            row["duplicate_of"] = mine.names[originals[i]]
        yield row


def neighbour_rows(mine: Collection, near: dict[str, Near]) -> Iterator[dict[str, Any]]:
    """The rows of `neighbours.csv`, nearest first."""
    for i, name in enumerate(mine.names):
        for where, (others, similarity, index) in near.items():
            pairs = zip(similarity[i].tolist(), index[i].tolist(), strict=True)
            for rank, (value, j) in enumerate(pairs, 1):
                row = {"query": name, "rank": rank, "neighbour": others.names[j], "where": where}
                yield row | {"similarity": f"{value:.5f}"}


def plot_neighbours(
    path: Path, mine: Collection, near: dict[str, Near], channels: int, title: str
) -> None:
    """A contact sheet: a dozen images, each beside its neighbours, as the encoder sees them."""
    queries = functions.shuffled(len(mine.names))[:12].sort().values
    columns = 1.2 + sum(min(5, index.shape[1]) + 0.2 for _, _, index in near.values())
    height = 1.4 * len(queries) + 0.6
    figure = functions.new_figure(0.8 * columns + 0.2, 0.8 * height)
    axes = figure.subplots()

    def draw_row(left: float, top: float, tiles: Tensor, captions: Sequence[str]) -> None:
        for i, (tile, text) in enumerate(zip(tiles, captions, strict=True)):
            shown = datasets.as_shown(tile).expand(3, -1, -1)
            pixels = shown.permute(1, 2, 0).numpy()  # (H, W, 3)
            box = (left + i, left + i + 0.95, top + 0.95, top)
            axes.imshow(pixels, extent=box, interpolation="nearest")
            axes.text(left + i + 0.47, top + 1.11, text, size=7, ha="center")

    for line, query in enumerate(queries):
        left, top = 1.2, 1.4 * line
        axes.text(0, top - 0.05, functions.plain(mine.names[query], 80), size=7)
        draw_row(0, top, mine.tiles(query[None], channels, 96), [""])
        for where, (others, similarity, index) in near.items():
            if line == 0:
                axes.text(left, -0.4, HEADS[where], size=8, weight="bold")
            best = index[query, :5]
            captions = [f"{value:.3f}" for value in similarity[query, :5]]
            draw_row(left, top, others.tiles(best, channels, 96), captions)
            left += len(best) + 0.2
    axes.set_xlim(-0.05, columns)
    axes.set_ylim(height - 0.6, -0.6)
    axes.set_axis_off()
    axes.set_title(functions.plain(title), size=9, loc="left")
    functions.save_figure(figure, path)


def write_page(
    path: Path,
    frozen: Frozen,
    mine: Collection,
    mapped: Tensor,
    coordinates: np.ndarray,
    classes: Tensor | None,
    title: str,
) -> None:
    """Write `embedding.html`: the map of the images at `mapped`, in colours of the classes."""
    if not runs.has_package("plotly", "plotly", "embedding.html"):
        return
    page.write_page(
        path,
        coordinates=coordinates[mapped.numpy()],
        images=mine.tiles(mapped, len(frozen.mean), page.TILE),
        names=mine.names[mapped.numpy()],
        features=mine.features[mapped],
        labels=None if classes is None else classes[mapped].numpy(),
        classes=frozen.classes or ("images",),
        colors=functions.class_colors(len(frozen.classes)) or [functions.TRAIN_COLOR],
        predictions=None,
        title=title + (", coloured by the linear probe's class" if frozen.probe else ""),
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; raises UserError for a mistake in it."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", type=Path, help="run folder, or an encoder.safetensors")
    parser.add_argument("folder", type=Path, help="images, in folders of any depth")
    parser.add_argument(
        "--output", type=Path, help="folder to write [results/embed/<run name>-<folder name>]"
    )
    parser.add_argument(
        "--neighbours", type=int, default=5, metavar="N", help="of each image, of each kind [5]"
    )
    parser.add_argument(
        "--duplicates",
        type=float,
        default=0.99,
        metavar="X",
        help="similarity from which on two images are called near-duplicates [0.99]",
    )
    parser.add_argument(
        "--training",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="look for neighbours among the run's training images, too [yes]",
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at an image that cannot be read"
    )
    parser.add_argument("--data-dir", type=Path, help="as the run's, and for the cache [the run's]")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="[auto]"
    )
    parsed = parser.parse_args(arguments)
    good = 1 <= parsed.neighbours <= 1000
    require(good, f"--neighbours must be in [1, 1000], not {parsed.neighbours}")
    require(0 < parsed.duplicates <= 1, f"--duplicates must be in (0, 1], not {parsed.duplicates}")
    require(parsed.folder.is_dir(), f"there is no folder {parsed.folder}")
    return parsed


def make_output(folder: Path) -> None:
    """Make the folder to write; raises UserError if it cannot be made or holds something."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        empty = not any(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    require(empty, f"{folder} is not empty: give another --output")


def read_folder(frozen: Frozen, folder: Path, data_dir: Path, strict: bool) -> Collection:
    """The images below a folder; a line for each that cannot be read.

    Raises:
        UserError: it holds none, or, with `strict`, one that cannot be read.
    """
    paths = folders.image_files(folder, frozen.rules.suffixes)
    require(bool(paths), f"{folder} holds no images")
    images, broken, value_range = folders.decode_readable(
        paths, folder, data_dir, frozen.size, frozen.rules
    )
    if value_range:
        print("black is {:g} and white {:g} in images of more than 8 bits".format(*value_range))
    for row, reason in broken.items():
        require(not strict, f"{paths[row]} cannot be read: {reason}")
        print(f"passed over: {paths[row].relative_to(folder)}: {reason}")
    rows = torch.tensor([row for row in range(len(paths)) if row not in broken])
    require(len(rows) > 0, f"none of the {len(paths)} images in {folder} can be read")
    names = np.array([str(paths[row].relative_to(folder)) for row in rows.tolist()])
    features = extract(frozen, images, rows, folder.resolve().name)
    return Collection(names, images, rows, features, len(broken))


def read_training(frozen: Frozen, data_dir: Path) -> Collection | None:
    """The run's training images, with features of length 1.

    None, and a line that says why, if they are not there any more.
    """
    record = frozen.record
    try:
        require(bool(record), "there is no config.json beside the encoder")
        rules = decoding.PixelRules.recorded_in(record)
        data = functions.load_images(record["dataset"], data_dir, record["image_size"], None, rules)
        if record.get("evaluate_on") == "validation":
            data = data.for_choosing()
        same = record.get("data") in (None, data.fingerprint())
        require(same, f"{record['dataset']} holds other images now")
    except UserError as error:
        print(f"Neighbours among the training images are left out: {error}.")
        return None
    rows = torch.arange(len(data.train))
    names = data.train.paths
    if names is None:
        names = np.array([f"{data.name} {row}" for row in range(len(rows))])
    features = extract(frozen, data.train.images, rows, "training images")
    F.normalize(features, dim=1, out=features)  # in place: there may be many
    return Collection(names, data.train.images, rows, features)


def main(arguments: Sequence[str]) -> dict[str, int]:
    """Write all files, and return how many `images` there are, `broken` ones and `duplicates`.

    Raises:
        UserError: no encoder, no images, an output that is there already, or with `--strict` an
            image that cannot be read.
    """
    parsed = parse(arguments)
    frozen = load_encoder(parsed.encoder, parsed.device)
    name = parsed.folder.resolve().name
    output: Path = parsed.output or Path("results/embed", f"{frozen.name}-{name}")
    make_output(output)
    data_dir = parsed.data_dir or Path(frozen.record.get("data_dir", "data"))
    mine = read_folder(frozen, parsed.folder, data_dir, parsed.strict)
    training = read_training(frozen, data_dir) if parsed.training else None

    count, title = len(mine.names), f"{len(mine.names):,} images of {name} by {frozen.name}"
    coordinates = np.full((count, 2), np.nan, np.float32)
    arrays = {"features": mine.features.numpy(), "paths": mine.names, "coordinates": coordinates}
    classes = probabilities = None
    if frozen.probe:
        classes, probabilities = classify(frozen, mine.features)
        arrays |= {"predictions": classes.numpy(), "probabilities": probabilities.numpy()}
    mapped = functions.shuffled(count)[:MAPPED].sort().values
    if count >= 5:
        seed = int(frozen.record.get("seed", 0))
        coordinates[mapped] = functions.project_2d(mine.features[mapped], "tsne", seed)
        path = output / "embedding.html"
        write_page(path, frozen, mine, mapped, coordinates, classes, f"t-SNE of {title}")
    else:
        print(f"There is no map: it takes at least 5 images, not {count}")
    files.write_arrays(output / "features.npz", **arrays)

    unit = F.normalize(mine.features, dim=1).to(frozen.fabric.device)  # (N, D)
    near = {"folder": (mine, *neighbours.find_nearest(unit, unit, parsed.neighbours))}
    originals = torch.full((count,), -1)
    if count > 1:
        originals = neighbours.find_originals(unit, parsed.duplicates, near["folder"][1][:, 0])
    if training is not None:
        bank = training.features.to(unit.device)
        near["training"] = (training, *neighbours.find_nearest(unit, bank, parsed.neighbours))
    rows = image_rows(frozen, mine, near, originals, coordinates, classes, probabilities)
    files.write_csv(output / "images.csv", rows, COLUMNS)
    columns = ("query", "rank", "neighbour", "where", "similarity")
    files.write_csv(output / "neighbours.csv", neighbour_rows(mine, near), columns)
    channels = len(frozen.mean)
    plot_neighbours(output / "neighbours.png", mine, near, channels, f"Neighbours of {title}")

    found = {"images": count, "broken": mine.broken, "duplicates": int((originals >= 0).sum())}
    print(f"images                {count:,}")
    print(f"passed over           {found['broken']:,}")
    print(f"near-duplicates       {found['duplicates']:,} (similarity >= {parsed.duplicates:g})")
    if training is not None:
        likest = near["training"][1][:, 0]
        seen = int((likest >= parsed.duplicates - neighbours.ROUNDING).sum())
        print(f"  of training images  {seen:,}")
    runs.print_folder(output)
    return found


if __name__ == "__main__":
    exit_cleanly(lambda: main(sys.argv[1:]))
