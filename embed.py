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
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import encoded
import functions
from support import figures, files, frozen, neighbours, page, runs
from support.errors import require
from support.runs import exit_cleanly
from support.settings import Parser

MAPPED = 10_000  # images, as in evaluation.images_to_map
COLUMNS = (
    "path", "class", "probability", "x", "y", "neighbour", "similarity",
    "training_neighbour", "training_similarity", "duplicate_of", "group",
)  # fmt: skip

# Where neighbours are, their similarities (N, k) and positions (N, k), nearest first.
Near = tuple[encoded.Collection, Tensor, Tensor]


def find_neighbours(
    bank: Tensor, mine: encoded.Collection, training: encoded.Collection | None, count: int
) -> dict[str, Near]:
    """The nearest images of the folder, and of the training images, to each of the folder.

    Args:
        bank: features of `mine`, `(N, D)`, of length 1.
        mine: the folder.
        training: the training images, if they are there.
        count: of neighbours of each kind.
    """
    near = {"folder": (mine, *neighbours.find_nearest(bank, bank, count))}
    if training is not None:
        others = training.features.to(bank.device)  # (M, D)
        near["training"] = (training, *neighbours.find_nearest(bank, others, count))
    return near


def apply_probe(encoder: frozen.Encoder, features: Tensor) -> tuple[Tensor, Tensor]:
    """The linear probe's classes `(N,)` of features `(N, D)`, and how likely they are, `(N,)`."""
    parts = [functions.apply_probe(part, encoder.probe) for part in features.split(500)]
    likely, classes = torch.cat(parts).softmax(1).max(1)
    return classes, likely


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


def make_map(features: Tensor, seed: int) -> np.ndarray:
    """Coordinates `(N, 2)` of features `(N, D)` by t-SNE; NaN beyond 10,000 and below five."""
    coordinates = np.full((len(features), 2), np.nan, np.float32)
    mapped = functions.fixed_permutation(len(features))[:MAPPED].sort().values
    if len(features) < 5:
        print(f"There is no map: it takes at least 5 images, not {len(features)}")
    else:
        coordinates[mapped] = functions.project_2d(features[mapped], "tsne", seed)
    return coordinates


def neighbour_columns(near: dict[str, Near]) -> dict[str, Sequence[str]]:
    """Columns of `images.csv`: the nearest image of each kind, and how similar it is."""
    columns: dict[str, Sequence[str]] = {}
    for where, (others, similarity, index) in near.items():
        prefix = "training_" if where == "training" else ""
        if index.shape[1]:
            columns[f"{prefix}neighbour"] = others.names[index[:, 0].numpy()]
            columns[f"{prefix}similarity"] = [f"{value:.5f}" for value in similarity[:, 0]]
    return columns


def neighbour_rows(mine: encoded.Collection, near: dict[str, Near]) -> Iterator[dict[str, Any]]:
    """The rows of `neighbours.csv`, nearest first."""
    for i, name in enumerate(mine.names):
        for where, (others, similarity, index) in near.items():
            pairs = zip(similarity[i].tolist(), index[i].tolist(), strict=True)
            for rank, (value, j) in enumerate(pairs, 1):
                row = {"query": name, "rank": rank, "neighbour": others.names[j], "where": where}
                yield row | {"similarity": f"{value:.5f}"}


def plot_neighbours(
    path: Path, mine: encoded.Collection, near: dict[str, Near], channels: int, title: str
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


def plot_groups(
    path: Path,
    mine: encoded.Collection,
    groups: Tensor,
    distances: Tensor,
    channels: int,
    title: str,
) -> None:
    """Draw the dozen largest groups, each by the images nearest to its centre."""
    tiles, names = [], []
    for group in groups.unique()[:12].tolist():
        members = (groups == group).nonzero()[:, 0]
        nearest = members[distances[members].argsort(stable=True)[:11]]
        tiles.append(mine.tiles(nearest, channels, 96))
        names.append(f"group {group + 1}: {len(members):,} images")
    figures.plot_sheet(path, names, {"nearest to the centre": (tiles, None)}, title)


def write_map(
    path: Path,
    mine: encoded.Collection,
    nearest: Tensor,
    coordinates: np.ndarray,
    labels: Tensor | None,
    names: Sequence[str],
    channels: int,
    title: str,
) -> None:
    """Write `embedding.html`.

    Args:
        path: of the page.
        mine: N images.
        nearest: positions `(N, k)` of each one's nearest images.
        coordinates: `(N, 2)`, NaN for images that are not on the map.
        labels: what the points are coloured by, `(N,)`, if anything.
        names: of the labels.
        channels: that the encoder sees.
        title: of the page.
    """
    mapped = torch.from_numpy(np.isfinite(coordinates[:, 0])).nonzero()[:, 0]  # (M,)
    if len(mapped) < len(coordinates):  # the nearest ones may be off the map
        nearest = page.nearest(mine.features[mapped])
    page.write_page(
        path,
        coordinates=coordinates[mapped.numpy()],
        images=mine.tiles(mapped, channels, page.TILE),
        names=mine.names[mapped.numpy()],
        neighbours=nearest,
        labels=None if labels is None else labels[mapped].numpy(),
        classes=names,
        predictions=None,
        title=title,
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; raises UserError for a mistake in it."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("encoder", type=Path, help="run folder, or an encoder.safetensors")
    add("folder", type=Path, help="images, in folders of any depth")
    text = "nearest images to list for each, of the folder and of the training images [5]"
    add("--neighbours", type=int, default=5, metavar="N", help=text)
    text = "groups to divide the images into, by k-means [none]"
    add("--groups", type=int, metavar="K", help=text)
    text = "look among the run's training images, too, and download them if need be [yes]"
    add("--training", action=argparse.BooleanOptionalAction, default=True, help=text)
    encoded.add_flags(parser, "embed")
    parsed = parser.parse_args(arguments)
    good = 1 <= parsed.neighbours <= 1000
    require(good, f"--neighbours must be in [1, 1000], not {parsed.neighbours}")
    require(parsed.groups is None or parsed.groups >= 2, "--groups must be at least 2")
    return parsed


def main(arguments: Sequence[str]) -> dict[str, int]:
    """Write all files, and return how many `images` there are, `broken` ones and `duplicates`.

    Raises:
        UserError: no encoder, no images, an output that is there already, or with `--strict` an
            image that cannot be read.
    """
    parsed = parse(arguments)
    encoder, output, data_dir = encoded.open_encoder(parsed, "embed")
    mine = encoded.read_folder(encoder, parsed.folder, data_dir, parsed.strict)
    count, seed, channels = len(mine.names), int(encoder.record.get("seed", 0)), len(encoder.mean)
    few = f"--groups {parsed.groups} takes as many images, not {count}"
    require(parsed.groups is None or parsed.groups <= count, few)
    training = encoded.read_training(encoder, data_dir) if parsed.training else None

    arrays = {"features": mine.features.numpy(), "paths": mine.names}
    columns: dict[str, Any] = {"path": mine.names}  # of images.csv
    labels, names, by = None, encoder.classes, ""  # of the map
    if parsed.groups is not None:
        mean, std = functions.feature_statistics(mine.features)
        groups, distances = group_images((mine.features - mean) / std, parsed.groups, seed)
        columns["group"] = (groups + 1).tolist()
        labels, by = groups, ", coloured by group"
        names = tuple(f"group {i + 1}" for i in range(parsed.groups))
    if encoder.probe:
        classes, likely = apply_probe(encoder, mine.features)
        arrays |= {"predictions": classes.numpy(), "probabilities": likely.numpy()}
        columns["class"] = [encoder.classes[label] for label in classes]
        columns["probability"] = [f"{value:.4f}" for value in likely]
        labels, names, by = classes, encoder.classes, ", coloured by the linear probe's class"
    bank = F.normalize(mine.features, dim=1).to(encoder.fabric.device)  # (N, D)
    near = find_neighbours(bank, mine, training, parsed.neighbours)
    columns |= neighbour_columns(near)
    originals = torch.full((count,), -1)
    if count > 1:
        originals = neighbours.find_originals(bank, parsed.duplicates, near["folder"][1][:, 0])
        columns["duplicate_of"] = [mine.names[i] if i >= 0 else "" for i in originals]
    coordinates = make_map(mine.features, seed)
    for axis, places in zip("xy", coordinates.T, strict=True):
        columns[axis] = [f"{value:.3f}" if np.isfinite(value) else "" for value in places]

    files.make_folder(output)
    files.write_arrays(output / "features.npz", **arrays, coordinates=coordinates)
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    files.write_csv(output / "images.csv", rows, COLUMNS)
    heads = ("query", "rank", "neighbour", "where", "similarity")
    files.write_csv(output / "neighbours.csv", neighbour_rows(mine, near), heads)
    title = f"{count:,} images of {parsed.folder.resolve().name} by {encoder.name}"
    plot_neighbours(output / "neighbours.png", mine, near, channels, f"Neighbours of {title}")
    if parsed.groups is not None:
        plot_groups(output / "groups.png", mine, groups, distances, channels, f"Groups of {title}")
    if count >= 5 and runs.has_package("plotly", "plotly", "embedding.html"):
        nearest = near["folder"][2][:, :5]  # (N, k)
        title = f"t-SNE of {title}{by}"
        write_map(
            output / "embedding.html", mine, nearest, coordinates, labels, names, channels, title
        )

    duplicates = int((originals >= 0).sum())
    print(f"images                {count:,}")
    print(f"passed over           {mine.broken:,}")
    print(f"near-duplicates       {duplicates:,} (similarity >= {parsed.duplicates:g})")
    if training is not None:
        likest = near["training"][1][:, 0]
        seen = int((likest >= parsed.duplicates - neighbours.ROUNDING).sum())
        print(f"  of training images  {seen:,} (an image that is one of them counts, too)")
    runs.print_folder(output)
    return {"images": count, "broken": mine.broken, "duplicates": duplicates}


if __name__ == "__main__":
    exit_cleanly(lambda: main(sys.argv[1:]))
