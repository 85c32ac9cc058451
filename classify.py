"""Classes for a folder of images from a few labelled ones, and how far to trust them.

    python classify.py results/simclr/NAME path/to/labelled path/to/images
    python classify.py results/simclr/NAME path/to/labelled path/to/images --method spreading

Takes a finished run of simclr.py, simsiam.py or moco.py, or its `encoder.safetensors` alone; a
folder that holds a few images of each class in a folder of its name; and a folder of images to
classify. Two methods learn from the encoder's features of the labelled images, logistic regression
and label spreading, which counts the other images as neighbours, too. Cross-validation on the
labelled images says how often each is right, and the better one classifies.

Writes `classes.csv` and `classes.png`, the class of each image and how sure it is, and
`labelled.csv` and `labelled.png`, what the labelled images would have got from each other: labels
that may be wrong stand first.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import encoded
import functions
from support import decoding, figures, files, graphs, neighbours, progress, runs, scores
from support.errors import require
from support.runs import exit_cleanly
from support.settings import Parser

NEIGHBOURS, ALPHA = 20, 0.9  # of label spreading; benchmarks/folder_labels.py compares others
ROWS = 12  # of a contact sheet

# Positions of j labelled images, positions of m others: how likely their classes are, (m, K).
Predict = Callable[[Tensor, Tensor], Tensor]


def make_linear(features: Tensor, labels: Tensor) -> Predict:
    """Logistic regression on standardised features `(N, D)`, the first n of which have `labels`."""

    def predict(known: Tensor, others: Tensor) -> Tensor:
        return functions.logistic_regression(features[known], labels[known], features[others])

    return predict


def make_spreading(
    features: Tensor, labels: Tensor, count: int = NEIGHBOURS, alpha: float = ALPHA
) -> Predict:
    """Label spreading among standardised features `(N, D)`, the first n of which have `labels`.

    Neighbours are the `count` of the largest cosine: whitened features, as few_labels.py has them,
    take more images than many a folder holds.
    """
    bank = F.normalize(features, dim=1)
    similarity, index = neighbours.find_nearest(bank, bank, count)
    graph = graphs.normalized_graph(similarity.numpy(), index.numpy())
    marks = F.one_hot(labels).double()  # (n, K)

    def predict(known: Tensor, others: Tensor) -> Tensor:
        scores = graphs.spread(graph, known.numpy(), marks[known].numpy(), alpha)  # (N, K)
        found = torch.from_numpy(scores)[others]  # (m, K)
        total = found.sum(1, keepdim=True)
        # What is connected with no labelled image gets the classes' shares of these.
        return torch.where(total > 0, found / total, marks[known].mean(0)).float()

    return predict


METHODS = {
    "linear": ("logistic regression", make_linear),
    "spreading": ("label spreading", make_spreading),
}


def read_classes(names: Sequence[str], folder: Path) -> tuple[tuple[str, ...], Tensor]:
    """The names of K classes, and the class `(n,)` of each labelled image, `<class>/*`.

    Raises:
        UserError: an image is in no folder of a class, or there is only one class.
    """
    places = [Path(name).parts for name in names]
    for place in places:
        require(len(place) > 1, f"{folder / place[0]} lies in no folder of a class")
    classes = tuple(sorted({place[0] for place in places}))
    split = {"train", "test", "val"} >= set(classes)
    require(
        not split, f"{folder} holds {', '.join(classes)}: give one of them, which holds classes"
    )
    require(len(classes) > 1, f"{folder} has the class {classes[0]} alone: it takes two")
    return classes, torch.tensor([classes.index(place[0]) for place in places])


def group_duplicates(features: Tensor, threshold: float) -> Tensor:
    """The group `(N,)` of each image, the first of it: near-duplicates, and theirs, are of one.

    Args:
        features: `(N, D)`, of length 1, on the CPU.
        threshold: the cosine from which on two images are near-duplicates.
    """
    everyone = torch.arange(len(features))
    groups, before = everyone, None
    while before is None or not torch.equal(groups, before):
        before = groups
        groups = before.clone()
        for rows, similarity in neighbours.cosines(features, features, everyone):  # (B, N)
            alike = similarity >= threshold - neighbours.ROUNDING
            alike[torch.arange(len(rows)), rows] = True
            groups[rows] = torch.where(alike, before, len(features)).amin(1)
    return groups


def cross_validate(predict: Predict, labels: Tensor, groups: Tensor) -> Tensor | None:
    """How likely each class is for each labelled image by the others, `(n, K)`.

    There are up to ten folds, each with as many of each class as groups allow, some with none.

    Args:
        predict: a method.
        labels: `(n,)`.
        groups: `(n,)`; those of one group are left out together.

    Returns:
        None where no class has two groups, so that the others lack the class of what is left out.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    pairs = torch.stack([labels, groups], 1).unique(dim=0)  # (classes' groups, 2)
    folds = min(10, int(pairs[:, 0].bincount().max()))
    if folds < 2:
        return None
    found = torch.zeros(len(labels), int(labels.max()) + 1)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer images than folds
        splits = list(splitter.split(labels, labels, groups))
    with progress.bar(len(labels), "cross-validation") as bar:
        for split in splits:
            rest, left_out = map(torch.from_numpy, split)
            if len(left_out):
                likely = predict(rest, left_out)
                found[left_out, : likely.shape[1]] = likely
            bar.update(len(left_out))
    return found


def show_score(name: str, found: Tensor, labels: Tensor, groups: Tensor) -> float:
    """Print a method's accuracy by cross-validation, with Wilson's interval, and return it.

    Near-duplicates are right or wrong together, so `groups` count for the interval, not images.
    """
    accuracy = functions.accuracy(found.argmax(1), labels)
    low, high = scores.accuracy_interval(accuracy, len(groups.unique()))
    print(f"  {name:<20}{accuracy:.1%} [{low:.1%}, {high:.1%}]".replace("%", " %"))
    return accuracy


def plot_classes(
    path: Path, mine: encoded.Collection, classes: Sequence[str], likely: Tensor, channels: int
) -> None:
    """Draw the surest and the least sure images of each class, of the dozen largest."""
    confidence, guesses = likely.max(1)  # (N,)
    sizes = guesses.bincount(minlength=len(classes))  # (K,)
    largest = sizes.argsort(descending=True, stable=True)[:ROWS]
    present = [label for label in largest.sort().values.tolist() if sizes[label]]
    groups: dict[str, Any] = {"surest": ([], []), "least sure": ([], [])}
    for label in present:
        members = (guesses == label).nonzero()[:, 0]
        members = members[confidence[members].argsort(descending=True, stable=True)]
        for heading, part in (("surest", members[:5]), ("least sure", members[5:].flip(0)[:5])):
            tiles, captions = groups[heading]
            tiles.append(mine.tiles(part, channels, 96))
            captions.append([f"{value:.3f}" for value in confidence[part].tolist()])
    names = [classes[label] for label in present]
    groups = {heading: group for heading, group in groups.items() if any(map(len, group[0]))}
    figures.plot_sheet(path, names, groups, f"{len(mine.names):,} images by their class")


def plot_labelled(
    path: Path,
    labelled: encoded.Collection,
    classes: Sequence[str],
    labels: Tensor,
    found: Tensor,
    channels: int,
) -> None:
    """Draw a dozen images beside the nearest labelled ones: those with the least likely labels.

    Args:
        path: where the picture goes.
        labelled: `(n,)` images.
        classes: names of the classes `(K,)`.
        labels: `(n,)`.
        found: how likely each class is by the others, `(n, K)`.
        channels: that the encoder sees.
    """
    doubted = found.gather(1, labels[:, None])[:, 0].argsort(stable=True)[:ROWS]  # (Q,)
    bank = F.normalize(labelled.features, dim=1)
    _, nearest = neighbours.find_nearest(bank, bank, 7)
    nearest = nearest[doubted]  # (Q, 7)
    captions = [
        [figures.plain(classes[label], 9) for label in row] for row in labels[nearest].tolist()
    ]
    guesses = found.argmax(1).tolist()
    names = [f"{labelled.names[i]}: {classes[guesses[i]]}?" for i in doubted.tolist()]
    groups: dict[str, Any] = {
        "": (labelled.tiles(doubted[:, None], channels, 96), None),
        "nearest labelled images": (labelled.tiles(nearest, channels, 96), captions),
    }
    figures.plot_sheet(path, names, groups, "The least likely labels")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; raises UserError for a mistake in it."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("encoder", type=Path, help="run folder, or an encoder.safetensors")
    add("labelled", type=Path, help="a few images, in a folder for each class")
    add("folder", type=Path, help="images to classify, in folders of any depth")
    text = "method that classifies [that which cross-validation finds better]"
    add("--method", choices=tuple(METHODS), help=text)
    encoded.add_flags(parser, "classify")
    parsed = parser.parse_args(arguments)
    require(parsed.labelled.is_dir(), f"there is no folder {parsed.labelled}")
    return parsed


def main(arguments: Sequence[str]) -> dict[str, float]:
    """Write all files, and return the accuracy by cross-validation of each method.

    Raises:
        UserError: no encoder, no images, fewer than two classes, an output that is there already,
            or with `--strict` an image that cannot be read.
    """
    parsed = parse(arguments)
    encoder, output, data_dir = encoded.open_encoder(parsed, "classify")
    labelled = encoded.read_folder(encoder, parsed.labelled, data_dir, parsed.strict)
    classes, labels = read_classes(labelled.names.tolist(), parsed.labelled)
    mine = encoded.read_folder(encoder, parsed.folder, data_dir, parsed.strict)
    ranges = {part.value_range for part in (labelled, mine)} - {None}
    if len(ranges) > 1:  # an image must be as bright in one folder as in the other
        lows, highs = zip(*ranges, strict=True)
        both = decoding.choose_value_range(min(lows), max(highs))
        rules = dataclasses.replace(encoder.rules, value_range=both)
        encoder = dataclasses.replace(encoder, rules=rules)
        print("once more, with one range for both folders:")
        places = (parsed.labelled, parsed.folder)
        labelled, mine = (encoded.read_folder(encoder, p, data_dir, parsed.strict) for p in places)

    features = torch.cat([labelled.features, mine.features])
    centre, spread = functions.feature_statistics(features)
    features = ((features - centre) / spread).to(encoder.fabric.device)  # (n + N, D)
    known, others = torch.arange(len(features)).split([len(labels), len(mine.names)])
    groups = group_duplicates(F.normalize(labelled.features, dim=1), parsed.duplicates)
    print(f"images to classify    {len(mine.names):,}")
    print(f"labelled images       {len(labels):,} of {len(classes)} classes")
    print("right by cross-validation on these [95 % interval]:")
    wanted = METHODS if parsed.method is None else [parsed.method]
    methods = {key: METHODS[key][1](features, labels) for key in wanted}
    found = {key: cross_validate(predict, labels, groups) for key, predict in methods.items()}
    accuracies = {
        key: show_score(METHODS[key][0], likely, labels, groups)
        for key, likely in found.items()
        if likely is not None
    }
    if accuracies:
        share = float(labels.bincount().max()) / len(labels)
        print(f"  the commonest class {100 * share:.1f} %")
    else:
        print("  unknown: it takes two images of a class that are no near-duplicates")
    chosen = parsed.method or max(accuracies, key=accuracies.__getitem__, default="linear")
    print(f"classified by {METHODS[chosen][0]}")

    likely = methods[chosen](known, others)  # (N, K)
    confidence, guesses = likely.max(1)
    files.make_folder(output)
    rows = [
        {"path": path, "class": classes[label], "confidence": f"{value:.4f}"}
        for path, label, value in zip(mine.names, guesses, confidence, strict=True)
    ]
    files.write_csv(output / "classes.csv", rows)
    channels = len(encoder.mean)
    plot_classes(output / "classes.png", mine, classes, likely, channels)
    if (checked := found[chosen]) is not None:
        own = checked.gather(1, labels[:, None])[:, 0]  # (n,)
        order = own.argsort(stable=True)
        rows = [
            {"path": labelled.names[i], "class": classes[labels[i]], "confidence": f"{own[i]:.4f}"}
            | {"found": classes[checked[i].argmax()], "found_confidence": f"{checked[i].max():.4f}"}
            for i in order.tolist()
        ]
        files.write_csv(output / "labelled.csv", rows)
        plot_labelled(output / "labelled.png", labelled, classes, labels, checked, channels)
    runs.print_folder(output)
    return accuracies


if __name__ == "__main__":
    exit_cleanly(lambda: main(sys.argv[1:]))
