"""Scores of a frozen encoder that need no labels, to choose settings by.

The larger, the better: the rotation probe (Reed et al. 2021), LiDAR (Thilak et al. 2023), RankMe
(Garrido et al. 2023) and alpha-ReQ (Agrawal et al. 2022). Which to trust is to be audited where
there are labels, as simclr_hyperparameter_tune.py does.

Letters in shape comments: V views, N images, D features.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

import functions
from support import datasets, devices, pretraining

SCORES = {
    "rotation": "rotation probe, accuracy in [0, 1]",
    "lidar": "LiDAR, an effective rank",
    "rankme": "RankMe, an effective rank",
    "alphareq": "-|alpha - 1|, alpha-ReQ",
}
AUDIT = ("linear", "knn")  # linear probe and kNN, accuracies in [0, 1], on held-out images


def rotation_accuracy(encoder: nn.Module, data: datasets.ImageData, fabric: Any) -> float:
    """How well a linear layer on frozen features tells four rotations apart, in [0, 1].

    It is trained on at most 5,000 training images, each in all four rotations, and tested on
    `data.test` in all four (Reed et al. 2021, section 3.1). Chance is 0.25.
    """

    def turned(split: datasets.Split) -> tuple[Tensor, Tensor]:
        """Features `(4N, D)` of the images in all rotations, and by how many quarters `(4N,)`."""
        features = []
        for quarters in range(4):
            rotated = dataclasses.replace(split, images=split.images.rot90(quarters, (2, 3)))
            features.append(functions.extract_features(encoder, rotated, fabric))
        labels = torch.arange(4).repeat_interleave(len(split)).to(features[0].device)
        return torch.cat(features), labels

    train = data.train.select(functions.fixed_permutation(len(data.train))[:5000])
    return functions.linear_probe(*turned(train), *turned(data.test), epochs=20).accuracy


def lidar(encoder: nn.Module, train: datasets.Split, fabric: Any, copies: int = 10) -> float:
    """LiDAR: effective rank of what separates images from each other among their views.

    Each of a thousand images is a class, its views are the class's samples; of the features'
    scatter between images, whitened by that within, the entropy of the eigenvalues is taken
    (Thilak et al. 2023, https://arxiv.org/abs/2312.04000, section 4). The views are simclr.py's by
    default, for all encoders: those of each training would be scored themselves.
    """
    config = pretraining.PretrainingConfig()
    images = train.images[functions.fixed_permutation(len(train))[:1000].to(train.images.device)]
    generator = devices.epoch_generator(0, 0, images.device)
    views = [pretraining.crop_views(images, config, generator) for _ in range(copies)]
    features = torch.stack(
        [
            functions.extract_features(encoder, dataclasses.replace(train, images=each), fabric)
            for each in views
        ]
    )  # (V, N, D)
    return discriminant_rank(features.cpu().double())


def discriminant_rank(features: Tensor) -> float:
    """Exp of the entropy of the LDA matrix's eigenvalues, of features `(V, N, D)` of N classes."""
    means = features.mean(0)  # (N, D)
    centred = means - means.mean(0)
    rest = (features - means).flatten(0, 1)  # (V N, D)
    within = rest.T @ rest / len(rest) + 1e-4 * torch.eye(rest.shape[1], dtype=rest.dtype)
    # The matrix is W^-1/2 B W^-1/2; with W = L L^T, L^-1 B L^-T has the same eigenvalues, and those
    # that are not 0 are the squared singular values of L^-1 times the centred means.
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(within), centred.T, upper=False
    )  # (D, N)
    return functions.effective_rank(functions.singular_values(whitened).square())


def alpha_req(features: Tensor) -> float:
    """The exponent alpha with which the covariance's eigenvalues fall: lambda_i ~ i^-alpha.

    Fitted on a log scale to the third to the hundredth of features `(N, D)`; encoders that are good
    for other tasks tend to be near 1 (Agrawal et al. 2022, https://arxiv.org/abs/2202.05808).
    """
    values = functions.singular_values(features - features.mean(0)).square()
    values = values[2:100].clamp(min=1e-12).log()
    ranks = torch.arange(3, 3 + len(values), dtype=values.dtype).log()
    ranks = ranks - ranks.mean()
    return -((ranks * values).sum() / ranks.square().sum()).item()


def measure(encoder: nn.Module, data: datasets.ImageData, fabric: Any) -> dict[str, float]:
    """All scores of a frozen encoder, the larger the better, and the audit where there are labels.

    RankMe is of the encoder's features, not of the head's. Probes train on `data.train` and are
    scored on `data.test`, which must be held-out training images.
    """
    bank, queries = (
        functions.extract_features(encoder, split, fabric) for split in (data.train, data.test)
    )
    scores = {
        "rotation": rotation_accuracy(encoder, data, fabric),
        "lidar": lidar(encoder, data.train, fabric),
        "rankme": functions.rank_me(bank),
        "alphareq": -abs(alpha_req(bank) - 1),
    }
    if data.classes:
        labelled = (bank, data.train.labels, queries, data.test.labels)
        scores["linear"] = functions.linear_probe(*labelled, epochs=20).accuracy
        scores["knn"] = functions.knn_accuracy(*labelled)
    return scores
