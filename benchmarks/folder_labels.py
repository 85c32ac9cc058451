"""What classify.py and embed.py --groups get right in small folders of the run's training images.

    python benchmarks/folder_labels.py docs/results/fashion-mnist-encoders/simsiam-seed0

Three tables: accuracy of classify.py's methods with a few labels of each class, mean ± sd over
eight draws of the labels; what cross-validation says of 120 labels beside what the other images of
2,000 get, over sixteen draws; the share of images in the group of their class, when each group is
paired with the class that fits best. The encoder has seen the images, without labels.
"""

import functools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import ROOT
from torch import Tensor

import classify
import embed
import functions
from support import datasets, frozen
from support.errors import require
from support.runs import exit_cleanly

METHODS = {"logistic regression": classify.make_linear}
for count in (5, 10, 20):
    for alpha in (0.9, 0.99):
        make = functools.partial(classify.make_spreading, count=count, alpha=alpha)
        METHODS[f"spreading {count} {alpha}"] = make


def draw_first(labels: Tensor, count: int, draw: int) -> Tensor:
    """A permutation of images `(N,)` that has `count` drawn ones first, as many of each class."""
    known = datasets.draw_labels(labels, count, (0, draw))
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[known] = False
    return torch.cat([known, rest.nonzero()[:, 0]])


def score(predict: classify.Predict, labels: Tensor, known: int) -> float:
    """The accuracy on all images but the first `known`, which have labels."""
    guesses = predict(torch.arange(known), torch.arange(known, len(labels))).argmax(1)
    return functions.accuracy(guesses, labels[known:])


def compare_methods(found: Tensor, labels: Tensor, classes: int) -> None:
    """Print the methods' accuracy by number of images and of labels; `found` `(N, D)`."""
    print("images, labels of each class: " + ", ".join(METHODS))
    for size in (300, 1000, 3000):
        features, truth = standardise(found[:size]), labels[:size]
        for each in (3, 10, 20):
            scores: dict[str, list[float]] = {name: [] for name in METHODS}
            for draw in range(8):
                order = draw_first(truth, n := each * classes, draw)
                for name, make in METHODS.items():
                    predict = make(features[order], truth[order[:n]])
                    scores[name].append(score(predict, truth[order], n))
            cells = (
                f"{100 * np.mean(s):.1f} ± {100 * np.std(s, ddof=1):.1f}" for s in scores.values()
            )
            print(f"{len(truth):,}, {each}: " + ", ".join(cells), flush=True)


def check_cross_validation(found: Tensor, labels: Tensor) -> None:
    """Print how far cross-validation is from the accuracy on the images without labels."""
    print("accuracy by cross-validation of 120 labels, on the other images, difference")
    features, n = standardise(found), 120
    names = [name for name, _ in classify.METHODS.values()]
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in [*names, "the better one"]}
    for draw in range(16):
        order = draw_first(labels, n, draw)
        truth, bank = labels[order], F.normalize(found[order[:n]], dim=1)
        groups = classify.group_duplicates(bank, 0.99)
        for name, make in classify.METHODS.values():
            predict = make(features[order], truth[:n])
            checked = classify.cross_validate(predict, truth[:n], groups)
            said = functions.accuracy(checked.argmax(1), truth[:n])
            pairs[name].append((said, score(predict, truth, n)))
        # As classify.py does, of two equal ones the first.
        drawn = [pairs[name][-1] for name in names]
        pairs["the better one"].append(max(drawn, key=lambda pair: pair[0]))
    for name, values in pairs.items():
        said, true = 100 * np.array(values).T
        gap = said - true
        spread = f"{gap.mean():+.1f} ± {gap.std(ddof=1):.1f}"
        print(f"{name}: {said.mean():.1f}, {true.mean():.1f}, {spread}", flush=True)


def measure_groups(found: Tensor, labels: Tensor, classes: int) -> None:
    """Print the share of images in the group of their class, of as many groups as classes."""
    from scipy.optimize import linear_sum_assignment

    shares = []
    for seed in range(3):
        groups, _ = embed.group_images(standardise(found), classes, seed)
        table = functions.confusion_matrix(groups, labels, classes)
        rows, columns = linear_sum_assignment(-table)
        shares.append(100 * table[rows, columns].sum() / table.sum())
    mean, spread = np.mean(shares), np.std(shares, ddof=1)
    print(f"in the group of their class, {len(labels):,} images: {mean:.1f} ± {spread:.1f}")


def standardise(found: Tensor) -> Tensor:
    """Features `(N, D)` with mean 0 and standard deviation 1."""
    mean, std = functions.feature_statistics(found)
    return (found - mean) / std


def main() -> None:
    """Print the tables."""
    require(len(sys.argv) == 2, "name the folder of a finished run")
    encoder = frozen.load_encoder(Path(sys.argv[1]), "cpu")
    about = encoder.record
    require("dataset" in about, f"{sys.argv[1]} has no config.json that names its images")
    data_dir = ROOT / about.get("data_dir", "data")
    data = functions.load_images(about["dataset"], data_dir, encoder.size, None, encoder.rules)
    split = data.train.select(functions.fixed_permutation(len(data.train))[:3000])
    images = datasets.Split(split.images, None, mean=encoder.mean, std=encoder.std)
    found = functions.extract_features(encoder.network, images, encoder.fabric).float()
    compare_methods(found, split.labels, len(data.classes))
    check_cross_validation(found[:2000], split.labels[:2000])
    measure_groups(found, split.labels, len(data.classes))


if __name__ == "__main__":
    exit_cleanly(main)
