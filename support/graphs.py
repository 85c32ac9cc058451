"""Features in files that processes share, and label spreading over their nearest neighbours.

N training images, M test images, D features, k neighbours of each, n labelled images, K classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from support import files, neighbours
from support.errors import require

DIMENSIONS = 192  # of the space in which neighbours are looked for


@dataclass(frozen=True)
class Neighbourhood:
    """Each image's nearest others, as similarities and positions, and the graph that they make.

    `near` are those of the training images, in a transductive comparison then of the test images
    too; otherwise `test_near` are the test images' nearest training images.
    """

    near: tuple[np.ndarray, np.ndarray]
    test_near: tuple[np.ndarray, np.ndarray] | None

    @functools.cached_property
    def graph(self) -> Any:
        """The sparse matrix S of label spreading."""
        return normalized_graph(*self.near)


def whiten(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Directions `(N, d)` and `(M, d)`, of length 1, of standardised features in whitened PCA.

    The largest components would drown the others, and the smallest are noise: those below a
    twentieth of the largest are not raised to it.
    """
    size = min(DIMENSIONS, *train.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the random projection that the decomposition begins with
        _, values, axes = torch.pca_lowrank(train, size, center=False)
    axes = axes / values.clamp(min=max(values[0].item() / 20, 1e-12))  # features may all be alike
    return F.normalize(train @ axes, dim=1), F.normalize(test @ axes, dim=1)


def find_neighbourhood(
    parts: Sequence[tuple[Tensor, Tensor]], k: int, transductive: bool
) -> dict[str, Tensor]:
    """The arrays of a `Neighbourhood`, by the mean of the cosines of several kinds of features.

    Args:
        parts: standardised features of training and test images, `(N, D)` and `(M, D)` each.
        k: neighbours of each image.
        transductive: test images are among the neighbours, and have some of their own.
    """
    both = zip(*(whiten(*part) for part in parts), strict=True)
    bank, queries = (F.normalize(torch.cat(each, 1), dim=1) for each in both)
    arrays = {}
    if transductive:
        bank = torch.cat([bank, queries])
    else:
        arrays["test_near"], arrays["test_where"] = neighbours.find_nearest(queries, bank, k)
    arrays["near"], arrays["where"] = neighbours.find_nearest(bank, bank, k)
    return arrays


def prepare(
    folder: Path,
    needs: Collection[tuple[str, str]],
    parts: dict[str, tuple[str, ...]],
    extract: Callable[[str], dict[str, Tensor]],
    k: int,
    transductive: bool,
) -> None:
    """Write features, and neighbours by them, where they are not there yet.

    Args:
        folder: where they go.
        needs: pairs of a name and `features`, or how its images are neighbours: by their features
            `alone`, or `with pixels` beside them.
        parts: whose features stand side by side under a name.
        extract: the standardised features of a name, `train` `(N, D)` and `test` `(M, D)`.
        k: neighbours of each image.
        transductive: the test images have and are neighbours, too.
    """
    used = {need: [*parts[need[0]], *["pixels"] * (need[1] == "with pixels")] for need in needs}
    for name in sorted({name for names in used.values() for name in names}):
        if not (path := place(folder, name, "features")).exists():
            write_arrays(path, extract(name))
    for (name, kind), names in sorted(used.items()):
        path = place(folder, name, kind)
        if kind != "features" and not path.exists():
            read = [read_arrays(place(folder, each, "features")) for each in names]
            pairs = [(torch.from_numpy(r["train"]), torch.from_numpy(r["test"])) for r in read]
            write_arrays(path, find_neighbourhood(pairs, k, transductive))


def place(folder: Path, name: str, kind: str) -> Path:
    """Where `prepare` writes what has that name and kind."""
    return folder / "features" / f"{name.replace('/', '-')}-{kind}"


def read_features(folder: Path, names: Sequence[str], chosen: Tensor) -> dict[str, Tensor]:
    """Features of several names side by side: of the images `chosen` `(n,)`, and the test images.

    Returns:
        `known` `(n, D)`, `test` `(M, D)`.
    """
    read = [read_arrays(place(folder, name, "features")) for name in names]
    known = torch.cat([torch.from_numpy(each["train"][chosen]) for each in read], 1)
    return {"known": known, "test": torch.cat([torch.from_numpy(each["test"]) for each in read], 1)}


def write_arrays(folder: Path, arrays: dict[str, Tensor]) -> None:
    """Write arrays into a folder that is whole or not there."""
    files.make_folder(folder.parent)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    files.make_folder(unfinished)
    for name, values in arrays.items():
        with files.atomic_file(unfinished / f"{name}.npy") as path, path.open("wb") as file:
            np.save(file, values.cpu().numpy())
    unfinished.rename(folder)


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote; processes share the memory."""
    return {path.stem: np.load(path, mmap_mode="c") for path in folder.glob("*.npy")}


def read_neighbourhood(folder: Path) -> Neighbourhood:
    """What `find_neighbourhood` found, out of the folder where it was written."""
    arrays = read_arrays(folder)
    test_near = (arrays["test_near"], arrays["test_where"]) if "test_near" in arrays else None
    return Neighbourhood((arrays["near"], arrays["where"]), test_near)


def edge_weights(similarity: np.ndarray) -> np.ndarray:
    """Weights of edges between images of these cosine similarities, not negative.

    The cube, so that the nearest count most (Iscen et al. 2019, https://arxiv.org/abs/1904.04717).
    """
    return np.maximum(similarity, 0) ** 3


def normalized_graph(similarity: np.ndarray, index: np.ndarray) -> Any:
    """S = D^-1/2 W D^-1/2 (Zhou et al. 2003, section 2, step 2), sparse, `(N, N)`.

    W sums the edges of both directions, and D is the diagonal of its rows' sums.

    Args:
        similarity: `(N, k)`, cosines to each image's nearest others.
        index: `(N, k)`, their positions.
    """
    from scipy import sparse

    count, k = index.shape
    values = edge_weights(similarity.astype(np.float64)).ravel()
    edges = (values, index.ravel(), np.arange(0, count * k + 1, k))
    w = sparse.csr_array(edges, shape=(count, count))
    w = w + w.T
    scale = sparse.diags_array(1 / np.sqrt(np.maximum(w.sum(1), 1e-12)))
    return (scale @ w @ scale).tocsr()


def spread(graph: Any, chosen: np.ndarray, marks: np.ndarray, alpha: float) -> np.ndarray:
    """Class scores F = (I - alpha S)^-1 Y (Zhou et al. 2003, equation 4) of all images, `(N, K)`.

    Each class then gets the mass that its share of the labelled images is (class mass
    normalisation, Zhu et al. 2003, section 4), so that none floods the others. Where as many images
    of each class are labelled, that takes all classes for equally frequent.

    Args:
        graph: S, from `normalized_graph`.
        chosen: `(n,)`, the positions of the labelled images.
        marks: `(n, K)`, their rows of Y, 1 for the class.
        alpha: in (0, 1), the share that an image takes from its neighbours.

    Raises:
        UserError: alpha is so near 1 that the equations cannot be solved.
    """
    from scipy.sparse.linalg import LinearOperator, cg

    y = np.zeros((graph.shape[0], marks.shape[1]))
    y[chosen] = marks
    # All classes at once: the matrix is the same, and a product with K columns reads it once.
    system = LinearOperator(
        (y.size, y.size), lambda f: f - alpha * (graph @ f.reshape(y.shape)).ravel(), dtype=float
    )
    solution, failed = cg(system, y.ravel(), rtol=1e-6, maxiter=1000)
    require(not failed, "label spreading does not converge: try a lower --alpha")
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
