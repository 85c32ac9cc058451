"""The classifiers that few_labels.py compares: what to do with a few labels and many images.

Each is a function of what is `Given` and returns classes of the test images. Chosen settings are
in `MethodConfig`; `METHODS` is the table of all.

Letters in shape comments: N images, n of them labelled, M test images, D features, K classes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functions
from support import (
    augment,
    checkpoints,
    datasets,
    devices,
    graphs,
    progress,
    randaugment,
    settings,
    supervised,
)
from support.errors import require
from support.settings import setting


@dataclass(frozen=True)
class MethodConfig(settings.RunConfig):
    """The settings of the methods."""

    steps: int = setting(2000, "methods", "optimizer steps of each training")
    crop_scale_min: float = setting(0.8, "methods", "smallest area of a training image's crop")
    flip_probability: float = setting(0.5, "methods", "probability of a horizontal flip")
    finetune_rate: float = setting(3e-4, "methods", "peak learning rate of fine-tuning")
    penalty: float = setting(1.0, "methods", "of logistic regression, the 1 / C of scikit-learn")
    neighbours: int = setting(10, "methods", "of each image in the graph of label spreading")
    alpha: float = setting(0.99, "methods", "what label spreading takes from neighbours, of 1")
    threshold: float = setting(0.95, "methods", "FixMatch's for a pseudo-label")
    unlabelled_ratio: int = setting(7, "methods", "FixMatch's unlabelled images for a labelled one")
    fixmatch_rate: float = setting(0.03, "methods", "FixMatch's peak learning rate")

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("steps", "neighbours", "unlabelled_ratio"):
            require(getattr(self, name) >= 1, f"{settings.flag(name)} must be at least 1")
        for name in ("crop_scale_min", "finetune_rate", "penalty", "fixmatch_rate"):
            require(0 < getattr(self, name) < math.inf, f"{settings.flag(name)} must be positive")
        require(self.crop_scale_min <= 1, "--crop-scale-min must be at most 1")
        for name in ("flip_probability", "threshold"):
            good = 0 <= getattr(self, name) <= 1
            require(good, f"{settings.flag(name)} must be in [0, 1]")
        require(0 < self.alpha < 1, f"--alpha must be between 0 and 1, not {self.alpha}")


@dataclass(frozen=True)
class Given:
    """What a method gets: images without labels, and the labels of the drawn ones alone.

    Args:
        images: the unlabelled images: all training images, with `--transductive` then the test
            images.
        test: the images to classify, without labels.
        chosen: `(n,)`, the positions of the labelled images among the unlabelled ones.
        labels: `(n,)`, their classes.
        classes: K.
        encoder: a finished one, or a new one to train from scratch; it is the method's own.
        features: standardised ones of a finished encoder, or the pixels, of the labelled images,
            `known` `(n, D)`, and of the test images, `test` `(M, D)`.
        near: what label spreading needs to know of the images' neighbours.
        seed: of the training.
        config: the settings.
        fabric: Lightning Fabric.
    """

    images: datasets.Split
    test: datasets.Split
    chosen: Tensor
    labels: Tensor
    classes: int
    encoder: Any
    features: Any
    near: Any
    seed: int
    config: MethodConfig
    fabric: Any


def nearest_mean(given: Given) -> Tensor:
    """The class whose labelled images' mean is the nearest, of features of the same length."""
    known = functions.scale_to_same_length(given.features["known"])  # (n, D)
    present = given.labels.unique()
    means = torch.stack([known[given.labels == label].mean(0) for label in present])  # (K, D)
    test = functions.scale_to_same_length(given.features["test"])
    return present[torch.cdist(test, means).argmin(1)]


def logistic_regression(given: Given) -> Tensor:
    """A linear layer with an L2 penalty, to convergence."""
    known, test = given.features["known"], given.features["test"]
    return functions.logistic_regression(known, given.labels, test, given.config.penalty).argmax(1)


def train_mlp(given: Given) -> Tensor:
    """One hidden layer of 512 units with BatchNorm."""
    known = given.features["known"]
    hidden = (nn.Linear(known.shape[1], 512), nn.BatchNorm1d(512), nn.ReLU())
    classifier = nn.Sequential(*hidden, nn.Linear(512, given.classes))
    train(given, classifier, known, lambda batch, generator: batch)
    with functions.evaluating(classifier):
        return classifier(given.features["test"]).argmax(1)


def spread_labels(given: Given) -> Tensor:
    """Label spreading over the graph of nearest neighbours of all images (Zhou et al. 2003).

    A test image gets the mean of its neighbours' labels, weighted as the graph's edges are.
    """
    near, chosen = given.near, given.chosen.cpu().numpy()
    marks = F.one_hot(given.labels.cpu(), given.classes).double().numpy()  # (n, K)
    spread = graphs.spread(near.graph, chosen, marks, given.config.alpha)  # (N, K)
    if near.test_near is not None:
        spread = graphs.average_neighbours(spread, *near.test_near)  # (M, K)
    return torch.from_numpy(spread[-len(given.test) :].argmax(1))


def train_plainly(given: Given) -> Tensor:
    """A new encoder, Adam 1e-3, no augmentation."""
    return train_encoder(given, 1e-3, decay=0, augmented=False)


def train_tuned(given: Given) -> Tensor:
    """A new encoder, AdamW 1e-3, mild crops and flips: pretraining's are too strong for few."""
    return train_encoder(given, 1e-3)


def finetune(given: Given) -> Tensor:
    """The finished encoder, trained as `train_tuned` does at a lower rate, which forgets less."""
    return train_encoder(given, given.config.finetune_rate)


def train_encoder(given: Given, rate: float, decay: float = 0.01, augmented: bool = True) -> Tensor:
    """Train the encoder with a linear layer, and return the classes of the test images."""
    config, split = given.config, given.images

    def prepare(batch: Tensor, generator: torch.Generator) -> Tensor:
        if augmented:
            scale, flip = (config.crop_scale_min, 1.0), config.flip_probability
            batch = augment.random_resized_crop(datasets.to_float(batch), scale, flip, generator)
        return split.normalize_for_encoder(batch)

    classifier = add_linear_layer(given)
    train(given, classifier, split.images[given.chosen], prepare, rate, decay)
    return functions.extract_features(classifier, given.test, given.fabric).argmax(1)


def add_linear_layer(given: Given) -> nn.Module:
    """The encoder with a new linear layer, on the device to compute on."""
    layer = nn.Linear(given.encoder.num_features, given.classes)
    classifier = nn.Sequential(given.encoder, layer).to(given.fabric.device)
    return classifier.to(memory_format=torch.channels_last)


def train(
    given: Given,
    classifier: nn.Module,
    inputs: Tensor,
    prepare: Callable[[Tensor, torch.Generator], Tensor],
    rate: float = 1e-3,
    decay: float = 0.01,
) -> None:
    """AdamW, cosine, batches of 256, for `--steps` steps rounded up to whole epochs."""
    optimizer = torch.optim.AdamW(classifier.parameters(), rate, weight_decay=decay, fused=True)
    epochs = math.ceil(given.config.steps / (len(inputs) // min(supervised.BATCH, len(inputs))))
    for _ in supervised.train_classifier(
        classifier, optimizer, inputs, given.labels, prepare, epochs, given.seed, given.fabric
    ):
        pass


def fixmatch(given: Given) -> Tensor:
    """FixMatch (Sohn et al. 2020, https://arxiv.org/abs/2001.07685), algorithm 1.

    64 labelled images a step and `--unlabelled-ratio` times as many others; SGD with Nesterov's
    momentum. With so few steps the rate falls to 0, where the paper averages the weights instead.
    """
    config, split, device = given.config, given.images, given.fabric.device
    classifier = add_linear_layer(given)
    rate = config.fixmatch_rate
    optimizer = torch.optim.SGD(
        classifier.parameters(), rate, 0.9, weight_decay=5e-4, nesterov=True, fused=True
    )
    network, optimizer = given.fabric.setup(classifier, optimizer)
    losses = progress.EpochLoss(config.steps, 1, device)
    classifier.train()
    for step in range(config.steps):
        generator = devices.epoch_generator(given.seed, step, device, devices.FIXMATCH)
        host = devices.epoch_generator(given.seed, step, stream=devices.FIXMATCH_HOST)
        optimizer.param_groups[0]["lr"] = progress.scheduled_rate(
            rate, step, config.steps, 0, "cosine"
        )
        draw = functools.partial(torch.randint, generator=generator, device=device)
        known = draw(len(given.chosen), (64,))
        others = draw(len(split), (64 * config.unlabelled_ratio,))
        labelled = augment_weakly(split.images[given.chosen[known]], config, generator)
        unlabelled = split.images[others]
        weakly = augment_weakly(unlabelled, config, generator)
        strongly = augment_strongly(unlabelled, config, generator, host)
        batch = torch.cat([datasets.to_float(torch.cat([labelled, weakly])), strongly])
        batch = split.normalize_for_encoder(batch)
        sizes = [64, len(others), len(others)]
        logits, weak, strong = network(batch).split(sizes)  # (64, K), (64 r, K), (64 r, K)
        loss = fixmatch_loss(logits, given.labels[known], weak, strong, config.threshold)
        losses.add(loss)
        optimizer.zero_grad()
        given.fabric.backward(loss)
        optimizer.step()
    losses.mean()  # looks at all of them, which `add` leaves out on an accelerator
    checkpoints.check_finite(1, classifier, optimizer)
    return functions.extract_features(classifier, given.test, given.fabric).argmax(1)


def fixmatch_loss(
    logits: Tensor, labels: Tensor, weak: Tensor, strong: Tensor, threshold: float
) -> Tensor:
    """Cross-entropy on the labelled images and, where it is sure, on its own guess of the others.

    Equations 3 and 4 with weight 1.

    Args:
        logits: `(n, K)`, of the labelled images.
        labels: `(n,)`.
        weak: `(m, K)`, logits of the weakly augmented others; no gradient flows through them.
        strong: `(m, K)`, logits of the strongly augmented ones.
        threshold: probability, in [0, 1], from which on a guess counts.
    """
    confidence, guess = weak.softmax(1).max(1)  # (m,)
    unlabelled = F.cross_entropy(strong, guess, reduction="none") * (confidence >= threshold)
    return F.cross_entropy(logits, labels) + unlabelled.mean()


def augment_weakly(images: Tensor, config: MethodConfig, generator: torch.Generator) -> Tensor:
    """Flip and shift by up to an eighth of the side; images `(B, C, H, W)`, uint8."""
    images = augment.random_horizontal_flip(images, config.flip_probability, generator)
    return augment.random_shift(images, images.shape[2] // 8, generator)


def augment_strongly(
    images: Tensor, config: MethodConfig, generator: torch.Generator, host: torch.Generator
) -> Tensor:
    """Two ops of RandAugment, then Cutout (section 2.3); in [0, 1].

    All images of a step get one random strength, from a tenth to nine tenths of the largest. `host`
    is a generator on the CPU.
    """
    images = augment_weakly(images, config, generator)
    ops, negative = randaugment.draw_randaugment(len(images), 2, host)
    magnitude = int(torch.randint(3, 28, (), generator=host))  # of 30
    images = datasets.to_float(randaugment.rand_augment(images, ops, negative, magnitude))
    return augment.random_cutout(images, images.shape[2] // 2, generator)


class Method(NamedTuple):
    """A row of the table: its name there, its colour, and what it starts from.

    `start` is `pixels`, a finished encoder's `features`, that `encoder` itself, or a `new` one.
    `slow` ones take minutes; `exact` ones have no randomness of their own. `graph` says by what the
    images are neighbours: by their features `alone`, or `with pixels` beside them.
    """

    label: str
    color: str
    start: tuple[str, ...]
    predict: Callable[[Given], Tensor]
    slow: bool = False
    exact: bool = False
    graph: Literal["", "alone", "with pixels"] = ""

    @property
    def unlabelled(self) -> bool:
        """Whether it learns from the other images, too."""
        return self.predict in (spread_labels, fixmatch)


METHODS = {
    "scratch": Method("from scratch, plain", "#AAAAAA", ("new",), train_plainly, slow=True),
    "tuned": Method("from scratch, tuned", "#333333", ("new",), train_tuned, slow=True),
    "fixmatch": Method("FixMatch", "#CC3311", ("new",), fixmatch, slow=True),
    "mean": Method("nearest mean", "#CCBB44", ("pixels", "features"), nearest_mean, exact=True),
    "linear": Method(
        "logistic regression", "#0077BB", ("pixels", "features"), logistic_regression, exact=True
    ),
    "mlp": Method("MLP", "#009988", ("features",), train_mlp),
    "spreading": Method(
        "label spreading",
        "#AA3377",
        ("pixels", "features"),
        spread_labels,
        exact=True,
        graph="alone",
    ),
    "fused": Method(
        "label spreading with pixels",
        "#332288",
        ("features",),
        spread_labels,
        exact=True,
        graph="with pixels",
    ),
    "finetune": Method("fine-tuned", "#EE7733", ("encoder",), finetune, slow=True),
    "fixmatch-finetune": Method(
        "fine-tuned by FixMatch", "#CC3311", ("encoder",), fixmatch, slow=True
    ),
}
