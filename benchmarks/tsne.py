"""t-SNE of 10,000 x 512 features: ours beside plain scikit-learn and openTSNE.

    pip install openTSNE
    python benchmarks/tsne.py
    python benchmarks/tsne.py --dataset digits          # seconds, no download

The features are a random layer (512 units, ReLU) of the test images' pixels. Trustworthiness
(Venna & Kaski 2001, 10 neighbours, cosine) says how many neighbours on the map are neighbours in
the features. openTSNE's row is left out when it is not installed.
"""

import argparse
import os
import time
from typing import Any

import numpy as np
import torch
from common import report
from sklearn.manifold import TSNE, trustworthiness

import functions
from support import datasets


def ours(features: np.ndarray) -> np.ndarray:
    """PCA to 50 dimensions, then fewer and coarser steps of scikit-learn's t-SNE."""
    return functions.project_2d(torch.from_numpy(features), "tsne", seed=0)


def sklearn_plain(features: np.ndarray) -> np.ndarray:
    """What most people type."""
    return TSNE(metric="cosine", random_state=0).fit_transform(features)


def open_tsne(features: np.ndarray) -> np.ndarray:
    """Its defaults, with all threads."""
    import openTSNE

    jobs = os.cpu_count()
    return openTSNE.TSNE(metric="cosine", n_jobs=jobs, random_state=0).fit(features)


def main() -> None:
    """Measure the three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="fashion-mnist")
    arguments = parser.parse_args()
    images = functions.load_images(arguments.dataset, "data").test.images[:10_000]
    pixels = datasets.to_float(images).flatten(1)
    pixels = (pixels - pixels.mean(0)) / pixels.std()
    weights = torch.randn(pixels.shape[1], 512, generator=torch.Generator().manual_seed(0))
    features = (pixels @ weights / pixels.shape[1] ** 0.5).relu().numpy()
    measured: dict[str, tuple[float, float]] = {}
    for way in (ours, sklearn_plain, open_tsne):
        began = time.perf_counter()
        try:
            points: Any = way(features)
        except ImportError as error:
            print(f"{way.__name__} is left out: {error}")
            continue
        took = time.perf_counter() - began
        quality = trustworthiness(features, np.asarray(points), n_neighbors=10, metric="cosine")
        measured[way.__name__] = took, quality
    rows = [
        {"way": name, "seconds": took, "time / ours": took / measured["ours"][0]}
        | {"trustworthiness": f"{quality:.4f}"}
        for name, (took, quality) in measured.items()
    ]
    report(f"t-SNE, {len(features):,} x 512, {torch.get_num_threads()} threads", rows)


if __name__ == "__main__":
    main()
