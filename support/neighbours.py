"""Nearest neighbours and near-duplicates among features, without a matrix of all pairs.

Letters in shape comments: N queries, M features to look in, B of the queries at a time, D features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

PAIRS = 2**25  # similarities that exist at once, 128 MiB
# Two equal features of length 1 have a product of 1 up to the rounding of float32.
ROUNDING = 1e-5


def cosines(queries: Tensor, bank: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some of `rows` at a time, and the cosines `(B, M)` of these queries `(N, D)` to a whole bank.

    The features in `bank` `(M, D)` must have length 1.
    """
    for part in rows.to(bank.device).split(max(1, PAIRS // len(bank))):
        yield part, F.normalize(queries[part], dim=1) @ bank.T


def find_nearest(queries: Tensor, bank: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Similarities and positions, both `(N, count)`, of the nearest in a bank, nearest first.

    Args:
        queries: `(N, D)`.
        bank: `(M, D)`, of length 1. If it is `queries` itself, no query is its own neighbour.
        count: of neighbours; when there are fewer, all of them.

    Returns:
        Cosines in [-1, 1] and positions in the bank, on the CPU.
    """
    alone = queries is bank
    count = min(count, len(bank) - alone)
    values, index = [], []
    for rows, similarity in cosines(queries, bank, torch.arange(len(queries))):
        if alone:
            similarity[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
        found = similarity.topk(count, dim=1)  # (B, count)
        values.append(found.values.clamp(-1, 1).cpu())
        index.append(found.indices.cpu())
    return torch.cat(values), torch.cat(index)


def find_originals(features: Tensor, threshold: float, nearest: Tensor) -> Tensor:
    """The first image before each that is at least so similar, or -1; `(N,)`, on the CPU.

    Args:
        features: `(N, D)`, of length 1.
        threshold: of the cosine, in (0, 1].
        nearest: each one's largest similarity to another `(N,)`, which tells where to look.
    """
    originals = torch.full((len(features),), -1)
    everyone = torch.arange(len(features), device=features.device)
    suspects = (nearest >= threshold - ROUNDING).nonzero()[:, 0]
    for rows, similarity in cosines(features, features, suspects):
        alike = (similarity >= threshold - ROUNDING) & (everyone < rows[:, None])  # (B, N)
        first = alike.byte().argmax(1)  # of equals the first
        originals[rows.cpu()] = torch.where(alike.any(1), first, -1).cpu()
    return originals
