"""Is a pretraining any good? A verdict without labels, from what its method should do.

Each threshold is a closed form, or stands at a stated distance from one. How large these distances
are is a choice: what a tenth of the sphere, a quarter of the variance and ten dimensions catch and
blame is in docs/verdicts.md.
B images in a batch, V views of each, D values in an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What may be wrong: bad or doubtful, what it is, and what to change. In order: what comes first
# is a cause of what follows.
CAUSES = {
    "constant images": ("bad", "all images are the same", "look at the data set"),
    "frozen BatchNorm": (
        "bad",
        "BatchNorm is in eval mode and does not normalise what is trained",
        "leave the model in train mode",
    ),
    "low temperature": (
        "bad",
        "the temperature is so low that each anchor sees a few negatives only",
        "a higher --temperature, 0.1 to 0.5",
    ),
    "high temperature": (
        "bad",
        "the temperature is so high that all negatives weigh the same",
        "a lower --temperature, 0.1 to 0.5",
    ),
    "collapse": (
        "bad",
        "the embedding collapses",
        "try a lower --learning-rate; without negatives look at the stop-gradient, too",
    ),
    "equal views": ("bad", "the views of an image are the same", "look at views.png"),
    "no crop": (
        "bad",
        "both views show the same pixels in the same places, so colours suffice to match them",
        "crop them; look at views.png",
    ),
    "no predictor": ("bad", "the predictor predicts nothing but its input", "train a predictor"),
    "chance": (
        "bad",
        "the loss is no lower than that of equal embeddings: nothing is learned",
        "another --learning-rate, or views that keep more of the image",
    ),
    "low rank": (
        "doubtful",
        "the embedding has fewer than ten dimensions",
        "try a lower --learning-rate",
    ),
    "labels": (
        "doubtful",
        "neighbours share a label no more often than by chance",
        "look at the labels, or the views destroy what they are about",
    ),
    "small batch": (
        "doubtful",
        "BatchNorm's variances are half noise with so few images",
        "a larger --batch-size, or of MoCo fewer --bn-splits",
    ),
}


@dataclass(frozen=True)
class Method:
    """What a method's loss is when nothing is learned.

    `chance_loss` is that of embeddings which say nothing of their image, `collapse_loss` that of
    equal embeddings; None stands for `chance_loss`, as of NT-Xent. A lower one is a reward for a
    collapse. `temperature` is that of a softmax over negatives. `passes` says through how many
    forward passes a step's views go, each with BatchNorm's statistics of its own.
    """

    chance_loss: float = math.inf
    collapse_loss: float | None = None
    temperature: float | None = None
    passes: int = 1

    @property
    def rewards_collapse(self) -> bool:
        """Whether equal embeddings make the loss small."""
        return self.collapse_loss is not None and self.collapse_loss < self.chance_loss


@dataclass(frozen=True)
class Circumstances:
    """What does not change from epoch to epoch, or is no number.

    `embeddings` (V B) of `size` D are measured, `normalised` images share a BatchNorm pass,
    `knn_chance` is an accuracy that kNN reaches by luck, 0 without labels.
    """

    epochs: int
    warmup_epochs: int
    embeddings: int
    size: int
    normalised: int
    knn_chance: float = 0.0
    constant: bool = False
    frozen: bool = False


def judge(history: Sequence[dict[str, Any]], method: Method, about: Circumstances) -> str:
    """The most likely cause of what is wrong after the last epoch of `history`, or `good`.

    Args:
        history: rows of `metrics.csv`. Those before the last may lack columns.
        method: the closed forms of its loss.
        about: the rest.

    Returns:
        A key of `CAUSES`, or `good`.
    """
    row, temperature = history[-1], method.temperature
    spread = row["embedding_std"] * math.sqrt(about.size)  # 1 on the whole sphere, 0 at a point
    widest = max(earlier.get("embedding_std", 0.0) for earlier in history)
    early = row["epoch"] <= max(1, about.epochs // 10)
    neighbours = [earlier["knn_held_out"] for earlier in history if "knn_held_out" in earlier]
    negatives = math.exp(min(method.chance_loss, 700.0))
    found = {
        "constant images": about.constant,
        "frozen BatchNorm": about.frozen,
        # The similarities of n random embeddings are normal with variance 1 / D. A few terms make
        # up the sum of exp(similarity / temperature) when 1 / (D temperature^2) > 2 log n, the
        # freezing of the random energy model (Derrida 1981).
        "low temperature": temperature is not None
        and 2 * about.size * temperature**2 * math.log(max(negatives, 2)) < 1,
        # exp(2 / temperature) is how much more the nearest negative weighs than the farthest.
        "high temperature": temperature is not None and 2 / temperature < math.log(1.1),
        # A tenth of the sphere's is left; or the loss is where a collapse would take it, too soon
        # to be learned; or a quarter of the variance is lost, which nothing but a collapse rewards.
        "collapse": spread < 0.1
        or (
            method.rewards_collapse
            and (
                (early and row["loss"] < 0.99 * method.collapse_loss)
                or row["embedding_std"] ** 2 < 0.75 * widest**2
            )
        ),
        # Distances below bfloat16's rounding, 2^-8 of the length.
        "equal views": row.get("image_share", 0.0) > 1 - 2**-16,
        # A correlation of 0.95: a linear change of brightness explains nine tenths of a view.
        "no crop": row.get("view_correlation", 0.0) > 0.95,
        # Of p = z the loss is -cos(z1, z2), which is alignment / 2 - 1; float32 rounds at 1e-7.
        "no predictor": method.rewards_collapse
        and abs(row.get("last_loss", math.inf) - (row.get("alignment", 0.0) / 2 - 1)) < 2e-6,
        "chance": not method.rewards_collapse
        and row["epoch"] > max(1, about.warmup_epochs)
        and row["loss"] >= method.chance_loss,
        # Within ten times of a collapse, whose RankMe is 1, where there is room for a hundred.
        "low rank": row.get("rank_me", math.inf) < 10 and min(about.embeddings, about.size) >= 100,
        "labels": bool(neighbours) and neighbours[-1] <= about.knn_chance < 1,
        # A variance of n values has the relative error sqrt(2 / (n - 1)).
        "small batch": 2 / max(1, about.normalised - 1) > 0.5**2,
    }
    return next((cause for cause in CAUSES if found[cause]), "good")


def describe(cause: str) -> str:
    """A verdict in words that begin with `good`, `doubtful` or `bad`, a colon behind it."""
    if cause == "good":
        return "good: loss, embedding and views show nothing wrong"
    light, what, change = CAUSES[cause]
    return f"{light}: {what}; {change}"


def chance_accuracy(labels: Tensor | None, queries: int) -> float:
    """An accuracy that kNN exceeds by chance in one of a thousand cases, 0 without labels.

    That of the commonest class, and three standard errors of so many queries.
    """
    if labels is None:
        return 0.0
    share = labels.bincount().max().item() / len(labels)
    return share + 3 * math.sqrt(share * (1 - share) / queries)


def measure(z: Tensor, views: int, pixels: Tensor | None) -> dict[str, float]:
    """Columns of `metrics.csv` about the embeddings of a batch, and its views where they are given.

    Args:
        z: `(V B, D)`, all first views, then all second views.
        views: V.
        pixels: `(V b, C, H, W)`, of any scale, ordered likewise.

    Returns:
        Of two or more images `uniformity`; of several views `alignment` and `image_share`, the part
        of the embeddings' variance that lies between images, not between views of one: 1 when views
        do not matter, about 0 when images do not; and `view_correlation`, see there.
    """
    z = F.normalize(z.float(), dim=1).unflatten(0, (views, -1))  # (V, B, D)
    several, row = z.shape[1] > 1, {}
    if several:
        row["uniformity"] = uniformity(z[0])
    if views > 1:
        within = z.var(0).sum(1).mean()
        row["alignment"] = 2 * within.item()  # two draws differ by twice the variance
        if several:
            total = z.var(1).sum(1).mean()
            row["image_share"] = 1 - (within / total.clamp(min=1e-12)).item()
    if pixels is not None:
        row["view_correlation"] = view_correlation(*pixels.unflatten(0, (views, -1))[:2])
    return row


def uniformity(z: Tensor) -> float:
    """Log of the mean Gaussian potential of pairs (Wang & Isola 2020, section 4.1.2, t = 2).

    Of normalised embeddings `(B, D)` of different images, the first 2,048 of them: 0 when all are
    equal, near -4 on a sphere of many dimensions.
    """
    z = z[:2048]
    if z.device.type == "mps":  # PyTorch has no pdist for Apple's GPUs
        z = z.cpu()
    return F.pdist(z).square().mul(-2).exp().mean().log().item()


def view_correlation(one: Tensor, two: Tensor) -> float:
    """Correlation in [-1, 1] of an image's two views `(b, C, H, W)`, pixel by pixel, in the median.

    Mirrored if that is more. It is 1 when one is a linear change of the other's brightness, and of
    views without any contrast.
    """
    flat = []
    for view in (one, two, two.flip(3)):
        view = view[:512].float().mean(1).flatten(1)  # (b, H W), grey
        flat.append(view - view.mean(1, keepdim=True))
    first, *seconds = flat
    best = torch.stack([F.cosine_similarity(first, second) for second in seconds]).amax(0)  # (b,)
    blank = first.abs().amax(1) + seconds[0].abs().amax(1) < 1e-3
    return best.masked_fill(blank, 1.0).median().item()
