"""Label spreading over a graph of nearest neighbours.

N images, k neighbours of each, n labelled images, K classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def edge_weights(similarity: np.ndarray) -> np.ndarray:
    """The weight of an edge between two images of this cosine similarity, which is not negative."""
    return np.maximum(similarity, 0)


def normalized_graph(similarity: np.ndarray, index: np.ndarray) -> Any:
    """S = D^-1/2 W D^-1/2 (Zhou et al. 2003, section 2, step 2), sparse, `(N, N)`.

    W sums the edges of both directions, and D is the diagonal of its rows' sums.

    Args:
        similarity: `(N, k)`, cosines to each image's nearest others.
        index: `(N, k)`, their positions.
    """
    from scipy import sparse

    count, k = index.shape
    values = edge_weights(similarity).astype(np.float64).ravel()
    edges = (values, index.ravel(), np.arange(0, count * k + 1, k))
    w = sparse.csr_array(edges, shape=(count, count))
    w = w + w.T
    scale = sparse.diags_array(1 / np.sqrt(np.maximum(w.sum(1), 1e-12)))
    return (scale @ w @ scale).tocsr()


def spread(graph: Any, chosen: np.ndarray, marks: np.ndarray, alpha: float) -> np.ndarray:
    """Class scores F = (I - alpha S)^-1 Y (Zhou et al. 2003, equation 4) of all images, `(N, K)`.

    Each class then gets the mass that its share of the labelled images is (class mass
    normalisation, Zhu et al. 2003, section 4), so that none floods the others.

    Args:
        graph: S, from `normalized_graph`.
        chosen: `(n,)`, the positions of the labelled images.
        marks: `(n, K)`, their rows of Y, 1 for the class.
        alpha: in (0, 1), the share that an image takes from its neighbours.
    """
    from scipy.sparse.linalg import LinearOperator, cg

    y = np.zeros((graph.shape[0], marks.shape[1]))
    y[chosen] = marks
    # All classes at once: the matrix is the same, and a product with K columns reads it once.
    system = LinearOperator(
        (y.size, y.size), lambda f: f - alpha * (graph @ f.reshape(y.shape)).ravel(), dtype=float
    )
    solution, _ = cg(system, y.ravel(), rtol=1e-6)
    scores = np.maximum(solution.reshape(y.shape), 0)
    return scores * marks.sum(0) / np.maximum(scores.sum(0), 1e-12)


def average_neighbours(scores: np.ndarray, similarity: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Scores `(M, K)` of new images: those of their neighbours, weighted as the edges are.

    Args:
        scores: `(N, K)`, of the images that have some.
        similarity: `(M, k)`, cosines of each new image to its nearest ones.
        index: `(M, k)`, their positions.
    """
    return np.einsum("mk,mkc->mc", edge_weights(similarity), scores[index])
