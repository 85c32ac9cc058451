"""A finished encoder on any folder of images: features, map, groups, neighbours, near-duplicates.

    python embed.py results/simclr/NAME path/to/folder --groups 8
    python embed.py encoder.safetensors path/to/folder --duplicates 0.98 --output found

Takes a finished run of simclr.py, simsiam.py or moco.py, or its `encoder.safetensors` alone, and
all images below a folder. Writes `features.npz`, `images.csv`, `neighbours.csv`, `neighbours.png`
and `embedding.html`, and with `--groups` `groups.png`. Similarity is the cosine between the
features of two images, which are those that the run's own evaluation would give them on the same
kind of processor. A file that cannot be read is named and passed over.
"""

from __future__ import annotations

import argparse
import sys
import warnings
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
    datasets,
    decoding,
    figures,
    files,
    folders,
    frozen,
    neighbours,
    page,
    progress,
    runs,
)
from support.errors import UserError, require
from support.runs import exit_cleanly
from support.settings import Parser

MAPPED = 10_000  # images, as in evaluation.images_to_map
COLUMNS = (
    "path", "class", "probability", "x", "y", "neighbour", "similarity",
    "training_neighbour", "training_similarity", "duplicate_of", "group",
)  # fmt: skip


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
        """The images at `index` as an encoder of so many channels sees them.

        Returns:
            `(*index.shape, channels, h, w)`, uint8, at most `side` pixels large.
        """
        places = self.rows[index.flatten()].split(500)
        parts = torch.cat([page.shrink(self.images[part], side) for part in places])
        return datasets.with_channels(parts, channels).unflatten(0, index.shape)


Near = tuple[Collection, Tensor, Tensor]  # where neighbours are, their similarities and positions


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
    return Collection(names, images, rows, features, len(broken))


def read_training(encoder: frozen.Encoder, data_dir: Path) -> Collection | None:
    """The run's training images, with features of length 1.

    None, and a line that says why, if they are not there any more.
    """
    record = encoder.record
    try:
        require(bool(record), "there is no config.json beside the encoder")
        # Other programs have a file of that name, too.
        named = isinstance(record.get("dataset"), str) and isinstance(record.get("image_size"), int)
        require(named, "the config.json beside the encoder names no data set")
        rules = decoding.PixelRules.recorded_in(record)
        where = (record["dataset"], data_dir, record["image_size"], None, rules)
        data = functions.load_images(*where, unlabelled=bool(record.get("unlabelled")))
        data = data.evaluated_on(record.get("evaluate_on"))
        same = record.get("data") in (None, data.fingerprint())
        require(same, f"{record['dataset']} holds other images now")
    except UserError as error:
        print(f"Neighbours among the training images are left out: {error}.")
        return None
    rows = torch.arange(len(data.train))
    names = data.train.paths
    if names is None:
        names = np.array([f"{data.name} {row}" for row in range(len(rows))])
    features = extract(encoder, data.train.images, rows, "training images")
    F.normalize(features, dim=1, out=features)  # in place: there may be many
    return Collection(names, data.train.images, rows, features)


def group_images(features: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Group standardised features `(N, D)` by k-means, scaled to the same length.

    Args:
        features: to group.
        count: of groups.
        seed: of the starts, of which the best of five counts.

    Returns:
        The group `(N,)` of each, 0 the largest, and the distance `(N,)` to its centre.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    features = functions.scale_to_same_length(features)
    model = KMeans(count, n_init=5, random_state=seed % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different images than groups
        labels = torch.from_numpy(model.fit_predict(features.numpy())).long()
    distances = (features - torch.from_numpy(model.cluster_centers_)[labels]).norm(dim=1)  # (N,)
    order = labels.bincount(minlength=count).argsort(descending=True, stable=True)
    return order.argsort()[labels], distances


def plot_groups(
    path: Path, mine: Collection, groups: Tensor, distances: Tensor, channels: int, title: str
) -> None:
    """Draw the dozen largest groups, each by the images nearest to its centre."""
    tiles, names = [], []
    for group in groups.unique()[:12].tolist():
        members = (groups == group).nonzero()[:, 0]
        nearest = members[distances[members].argsort(stable=True)[:11]]
        tiles.append(mine.tiles(nearest, channels, 96))
        names.append(f"group {group + 1}: {len(members):,} images")
    figures.plot_sheet(path, names, {"nearest to the centre": (tiles, None)}, title)


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
    """Draw a dozen images, each beside its neighbours, as the encoder sees them."""
    queries = functions.fixed_permutation(len(mine.names))[:12].sort().values  # (Q,)
    groups: dict[str, Any] = {"": (mine.tiles(queries[:, None], channels, 96), None)}
    heads = {"folder": "nearest in the folder", "training": "nearest training images"}
    for where, (others, similarity, index) in near.items():
        best = index[queries, :5]  # (Q, k)
        if best.shape[1]:
            captions = [[f"{value:.3f}" for value in row] for row in similarity[queries].tolist()]
            groups[heads[where]] = (others.tiles(best, channels, 96), captions)
    figures.plot_sheet(path, mine.names[queries.numpy()], groups, title)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; raises UserError for a mistake in it."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("encoder", type=Path, help="run folder, or an encoder.safetensors")
    add("folder", type=Path, help="images, in folders of any depth")
    add("--output", type=Path, help="folder to write [results/embed/<run name>-<folder name>]")
    text = "of each image, of each kind [5]"
    add("--neighbours", type=int, default=5, metavar="N", help=text)
    text = "similarity from which on two images are called near-duplicates [0.99]"
    add("--duplicates", type=float, default=0.99, metavar="X", help=text)
    text = "groups to divide the images into, by k-means [none]"
    add("--groups", type=int, metavar="K", help=text)
    text = "look for neighbours among the run's training images, too [yes]"
    add("--training", action=argparse.BooleanOptionalAction, default=True, help=text)
    add("--strict", action="store_true", help="stop at the first image that cannot be read")
    add("--data-dir", type=Path, help="as the run's, and for the cache [the run's]")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="[auto]")
    parsed = parser.parse_args(arguments)
    good = 1 <= parsed.neighbours <= 1000
    require(good, f"--neighbours must be in [1, 1000], not {parsed.neighbours}")
    require(parsed.groups is None or parsed.groups >= 2, "--groups must be at least 2")
    require(0 < parsed.duplicates <= 1, f"--duplicates must be in (0, 1], not {parsed.duplicates}")
    require(parsed.folder.is_dir(), f"there is no folder {parsed.folder}")
    return parsed


def main(arguments: Sequence[str]) -> dict[str, int]:
    """Write all files, and return how many `images` there are, `broken` ones and `duplicates`.

    Raises:
        UserError: no encoder, no images, an output that is there already, or with `--strict` an
            image that cannot be read.
    """
    parsed = parse(arguments)
    encoder = frozen.load_encoder(parsed.encoder, parsed.device)
    name = parsed.folder.resolve().name
    output: Path = parsed.output or Path("results/embed", f"{encoder.name}-{name}")
    files.check_new_folder(output)
    data_dir = parsed.data_dir or Path(encoder.record.get("data_dir", "data"))
    mine = read_folder(encoder, parsed.folder, data_dir, parsed.strict)
    few = f"--groups {parsed.groups} takes as many images, not {len(mine.names)}"
    require(parsed.groups is None or parsed.groups <= len(mine.names), few)
    training = read_training(encoder, data_dir) if parsed.training else None
    count, title = len(mine.names), f"{len(mine.names):,} images of {name} by {encoder.name}"
    arrays = {"features": mine.features.numpy(), "paths": mine.names}
    table: dict[str, Any] = dict.fromkeys(COLUMNS, [""] * count)
    table["path"] = mine.names
    classes = None
    if encoder.probe:
        parts = mine.features.split(500)
        logits = torch.cat([functions.apply_probe(part, encoder.probe) for part in parts])  # (N, K)
        classes, probabilities = logits.argmax(1), logits.softmax(1).amax(1)
        arrays |= {"predictions": classes.numpy(), "probabilities": probabilities.numpy()}
        table["class"] = [encoder.classes[label] for label in classes]
        table["probability"] = [f"{value:.4f}" for value in probabilities]

    bank = F.normalize(mine.features, dim=1).to(encoder.fabric.device)  # (N, D)
    near = {"folder": (mine, *neighbours.find_nearest(bank, bank, parsed.neighbours))}
    originals = torch.full((count,), -1)
    if count > 1:
        originals = neighbours.find_originals(bank, parsed.duplicates, near["folder"][1][:, 0])
        table["duplicate_of"] = [mine.names[i] if i >= 0 else "" for i in originals]
    if training is not None:
        others = training.features.to(bank.device)  # (M, D)
        near["training"] = (training, *neighbours.find_nearest(bank, others, parsed.neighbours))
    for where, (found, similarity, index) in near.items():
        if index.shape[1]:
            prefix = "training_" if where == "training" else ""
            table[f"{prefix}neighbour"] = found.names[index[:, 0].numpy()]
            table[f"{prefix}similarity"] = [f"{value:.5f}" for value in similarity[:, 0]]

    seed = int(encoder.record.get("seed", 0))
    if parsed.groups is not None:
        mean, std = functions.feature_statistics(mine.features)
        groups, distances = group_images((mine.features - mean) / std, parsed.groups, seed)
        table["group"] = (groups + 1).tolist()
    coordinates = np.full((count, 2), np.nan, np.float32)
    mapped = functions.fixed_permutation(count)[:MAPPED].sort().values
    if count >= 5:
        coordinates[mapped] = functions.project_2d(mine.features[mapped], "tsne", seed)
    else:
        print(f"There is no map: it takes at least 5 images, not {count}")
    for axis, places in zip("xy", coordinates.T, strict=True):
        table[axis] = [f"{value:.3f}" if np.isfinite(value) else "" for value in places]

    files.make_folder(output)
    files.write_arrays(output / "features.npz", **arrays, coordinates=coordinates)
    rows = (dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True))
    files.write_csv(output / "images.csv", rows, COLUMNS)
    columns = ("query", "rank", "neighbour", "where", "similarity")
    files.write_csv(output / "neighbours.csv", neighbour_rows(mine, near), columns)
    channels = len(encoder.mean)
    plot_neighbours(output / "neighbours.png", mine, near, channels, f"Neighbours of {title}")
    if parsed.groups is not None:
        plot_groups(output / "groups.png", mine, groups, distances, channels, f"Groups of {title}")
    if count >= 5 and runs.has_package("plotly", "plotly", "embedding.html"):
        nearest = near["folder"][2][:, :5]  # (N, k)
        if len(mapped) < count:  # others than these may be off the map
            nearest = page.nearest(mine.features[mapped])
        labels, names, by = classes, encoder.classes, "the linear probe's class"
        if labels is None and parsed.groups is not None:
            labels, by = groups, "group"
            names = tuple(f"group {i + 1}" for i in range(parsed.groups))
        page.write_page(
            output / "embedding.html",
            coordinates=coordinates[mapped.numpy()],
            images=mine.tiles(mapped, channels, page.TILE),
            names=mine.names[mapped.numpy()],
            neighbours=nearest,
            labels=None if labels is None else labels[mapped].numpy(),
            classes=names or ("images",),
            colors=figures.class_colors(len(names)) or [figures.TRAIN_COLOR],
            predictions=None,
            title=f"t-SNE of {title}" + ("" if labels is None else f", coloured by {by}"),
        )
    counts = {"images": count, "broken": mine.broken, "duplicates": int((originals >= 0).sum())}
    print(f"images                {count:,}")
    print(f"passed over           {mine.broken:,}")
    print(f"near-duplicates       {counts['duplicates']:,} (similarity >= {parsed.duplicates:g})")
    if training is not None:
        likest = near["training"][1][:, 0]
        seen = int((likest >= parsed.duplicates - neighbours.ROUNDING).sum())
        print(f"  of training images  {seen:,} (an image that is one of them counts, too)")
    runs.print_folder(output)
    return counts


if __name__ == "__main__":
    exit_cleanly(lambda: main(sys.argv[1:]))
