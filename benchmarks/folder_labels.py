"""What classify.py's methods get right in small folders, with a few labels of each class.

    python benchmarks/folder_labels.py docs/results/fashion-mnist-encoders/simsiam-seed0

Folders are drawn from the run's training images, which the encoder has seen without labels; mean ±
sd over eight draws of the labels.
"""

import functools
import sys
from pathlib import Path

import numpy as np
import torch
from common import ROOT

import classify
import functions
from support import datasets, frozen
from support.errors import require
from support.runs import exit_cleanly

METHODS = {"logistic regression": classify.make_linear}
for count in (5, 10, 20):
    for alpha in (0.9, 0.99):
        make = functools.partial(classify.make_spreading, count=count, alpha=alpha)
        METHODS[f"spreading {count} {alpha}"] = make


def main() -> None:
    """Print a table."""
    require(len(sys.argv) == 2, "name the folder of a finished run")
    encoder = frozen.load_encoder(Path(sys.argv[1]), "cpu")
    about = encoder.record
    require("dataset" in about, f"{sys.argv[1]} has no config.json that names its images")
    data_dir = ROOT / about.get("data_dir", "data")
    data = functions.load_images(about["dataset"], data_dir, encoder.size, None, encoder.rules)
    split = data.train.select(functions.fixed_permutation(len(data.train))[:3000])
    images = datasets.Split(split.images, None, mean=encoder.mean, std=encoder.std)
    found = functions.extract_features(encoder.network, images, encoder.fabric).float()
    print("images, labels of each class: " + ", ".join(METHODS))
    for size in (300, 1000, 3000):
        mean, std = functions.feature_statistics(found[:size])
        features, labels = (found[:size] - mean) / std, split.labels[:size]
        for each in (3, 10, 20):
            scores: dict[str, list[float]] = {name: [] for name in METHODS}
            for draw in range(8):
                known = datasets.draw_labels(labels, each * len(data.classes), (0, draw))
                rest = torch.ones(size, dtype=torch.bool)
                rest[known] = False
                order = torch.cat([known, rest.nonzero()[:, 0]])
                n = len(known)
                for name, make in METHODS.items():
                    predict = make(features[order], labels[known])
                    guesses = predict(torch.arange(n), torch.arange(n, size)).argmax(1)
                    scores[name].append(functions.accuracy(guesses, labels[order[n:]]))
            cells = (
                f"{100 * np.mean(s):.1f} ± {100 * np.std(s, ddof=1):.1f}" for s in scores.values()
            )
            print(f"{size:,}, {each}: " + ", ".join(cells), flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
