"""What two or more experiments share: loading images, measuring an encoder, plotting.

Sections, in this order: loaders, accuracy helpers, plots. A function lives here when two or more
scripts share it and it names no paper's method; what a reader of an experiment need not see stands
in support/. Importing this module does nothing, and heavy libraries are imported where they are
used, so `--help` is quick.

Letters in shape comments: N images, B batch, C H W channels, height, width, D features, K classes.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support import (
    datasets,
    decoding,
    devices,
    figures,
    folders,
    neighbours,
    progress,
    settings,
)
from support.errors import Diverged, UserError, require

# ----------------------------------------------------------------------------------- loaders

CIFAR10_CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def load_images(
    name_or_path: str,
    data_dir: str | Path = "data",
    image_size: int = 32,
    download_url: str | None = None,
    rules: decoding.PixelRules | None = None,
    unlabelled: bool = False,
) -> datasets.ImageData:
    """Load a data set into one uint8 tensor per split.

    Args:
        name_or_path: `cifar10`, `fashion-mnist`, `digits`, or a folder: `train/<class>/*` with
            `test/<class>/*`, or `<class>/*` (a fifth is split off as the test set, the same every
            time), or images without sub-folders (no labels).
        data_dir: where downloads and the cache of decoded folders are kept.
        image_size: side to which a folder's images are resized (shorter side, then centre crop).
        download_url: another address for the archive; its MD5 is checked all the same.
        rules: how a folder's files become pixels; None for 8 bits in colour, and what is chosen.
        unlabelled: take all images below a folder, at any depth, without labels.

    Raises:
        UserError: unknown name, no network, a wrong MD5, or a folder that cannot be used.
    """
    rules = rules or decoding.PixelRules()
    builtin: dict[str, Callable[[], datasets.ImageData]] = {
        "cifar10": lambda: _load_cifar10(Path(data_dir), download_url),
        "fashion-mnist": lambda: _load_fashion_mnist(Path(data_dir), download_url),
        "digits": _load_digits,
    }
    if name_or_path in builtin:
        require(
            rules.channels is None and rules.value_range is None and not unlabelled,
            "--channels, --value-range and --unlabelled are for a folder of images, not for "
            f"{name_or_path}",
        )
        return builtin[name_or_path]().with_statistics()
    folder = os.path.expanduser(name_or_path)
    known = f"{', '.join(builtin)}, or an existing folder of images"
    # os.path's tests, unlike pathlib's, take any string
    require(os.path.exists(folder), f"unknown data set or missing folder {folder!r}; use {known}")
    require(os.path.isdir(folder), f"{folder} is a file, not a folder of images")
    data = folders.load_folder(Path(folder), Path(data_dir), image_size, rules, unlabelled)
    return data.with_statistics()


def load_dataset(config: settings.RunConfig) -> datasets.ImageData:
    """The data set that a script's settings name, as `load_images` loads it."""
    return load_images(
        config.dataset,
        config.data_dir,
        config.image_size,
        config.download_url,
        config.pixel_rules,
        config.unlabelled,
    )


def _load_digits() -> datasets.ImageData:
    """scikit-learn's 1,797 handwritten digits, 1 x 8 x 8, a fifth of them for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]
    everything = datasets.Split(images, torch.from_numpy(digits.target.astype(np.int64)))
    train, test = datasets.hold_out(everything, 0.2)
    return datasets.ImageData("digits", tuple(map(str, range(10))), train, test)


def _load_cifar10(data_dir: Path, url: str | None) -> datasets.ImageData:
    """CIFAR-10 from the archive. Only files whose MD5 torchvision knows are unpickled."""
    from torchvision.datasets import CIFAR10

    folder = data_dir / CIFAR10.base_folder
    with datasets.alone_in(data_dir):
        if not folder.is_dir():
            archive = data_dir / CIFAR10.filename
            datasets.fetch(archive, CIFAR10.url, url, CIFAR10.tgz_md5)
            datasets.unpack(archive, folder)
    try:
        parts = [CIFAR10(str(data_dir), train=train) for train in (True, False)]
    except RuntimeError as error:
        raise UserError(
            f"{folder} is damaged (a file's MD5 is wrong): delete it and start again"
        ) from error
    train, test = (
        datasets.Split(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),  # (N, C, H, W)
            torch.tensor(part.targets),
        )
        for part in parts
    )
    return datasets.ImageData("cifar10", CIFAR10_CLASSES, train, test)


def _load_fashion_mnist(data_dir: Path, url: str | None) -> datasets.ImageData:
    """FashionMNIST from `data_dir`, from Debian's package, or downloaded."""
    from torchvision.datasets import FashionMNIST

    folder = data_dir / "FashionMNIST" / "raw"
    arrays = []
    for (name, md5), shape in zip(
        FashionMNIST.resources, [(60000, 28, 28), (60000,), (10000, 28, 28), (10000,)], strict=True
    ):
        path = folder / name
        if not path.exists() and (datasets.DEBIAN_FASHION_MNIST / name).exists():
            path = datasets.DEBIAN_FASHION_MNIST / name
        else:
            with datasets.alone_in(folder):
                datasets.fetch(path, FashionMNIST.mirrors[0] + name, url, md5)
        arrays.append(torch.from_numpy(datasets.read_idx(path, shape)))
    return datasets.ImageData(
        "fashion-mnist",
        FASHION_MNIST_CLASSES,
        datasets.Split(arrays[0][:, None], arrays[1].long()),
        datasets.Split(arrays[2][:, None], arrays[3].long()),
    )


# -------------------------------------------------------------------------- accuracy helpers


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode (BatchNorm and Dropout fixed) and no gradients, the old mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def extract_features(
    encoder: nn.Module,
    split: datasets.Split,
    fabric: Any = None,
    batch_size: int | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """Features `(N, D)`, float32, of a frozen encoder in eval mode; the encoder is not changed.

    Args:
        encoder: any module `(B, C, H, W) -> (B, D)`.
        split: its images, which are normalised as it says.
        fabric: the Lightning Fabric whose precision to use; None for float32.
        batch_size: images per step, by default `images_per_step`; the result does not depend on it,
            up to the rounding of steps of one or two images, for which libraries have kernels of
            their own.
        index: `(N,)`, the images' positions in the split; None for all of them.
    """
    batch_size = batch_size or images_per_step(split.images)
    index = torch.arange(len(split)) if index is None else index
    device = next(encoder.parameters()).device
    features = []
    with evaluating(encoder), fabric.autocast() if fabric else contextlib.nullcontext():
        for rows in index.to(split.images.device).split(batch_size):
            inputs = split.normalize_for_encoder(split.images[rows].to(device))
            features.append(encoder(inputs).float())
    return torch.cat(features)


def images_per_step(images: Tensor) -> int:
    """How many images `(N, C, H, W)` an evaluation takes at a time: 500, of large ones fewer.

    20 of 224 pixels, whose maps in a ResNet's first stage take 256 MB in float32.
    """
    return max(1, min(500, 2**20 // images.shape[2:].numel()))


class Monitor:
    """What is known of an encoder while it trains, without a look at the test images.

    Args:
        train: the training images, of which a fifth (at most 5,000) are looked up among the others
            (at most 20,000) by kNN.
        knn_every: epochs between two kNN checks; 0 for none.
        fabric: whose precision to use.
    """

    def __init__(self, train: datasets.Split, knn_every: int, fabric: Any):
        self.fabric = fabric
        self.train = train
        self.knn_every = 0 if train.labels is None else knn_every
        order, fifth = fixed_permutation(len(train)), max(1, len(train) // 5)
        self.queries, self.bank = order[:fifth][:5_000], order[fifth:][:20_000]

    def measure(self, encoder: nn.Module, z: Tensor, epoch: int, last: bool) -> dict[str, float]:
        """Columns of `metrics.csv` after an epoch, from 1, whose last embeddings are `z` `(N, D)`.

        `embedding_std` and `rank_me` of z, and `knn_held_out`, in [0, 1], where it is due.
        """
        row = {"embedding_std": embedding_std(z), "rank_me": rank_me(z)}
        if self.knn_every and (epoch % self.knn_every == 0 or last):
            labels = self.train.labels.cpu()
            bank, queries = (
                extract_features(encoder, self.train, self.fabric, index=index)
                for index in (self.bank, self.queries)
            )
            known = (bank, labels[self.bank], queries, labels[self.queries])
            row["knn_held_out"] = knn_accuracy(*known)
        return row


def fixed_permutation(count: int) -> Tensor:
    """The positions of `count` images in a random order that is the same every time."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 200,
    temperature: float = 0.1,
) -> float:
    """Accuracy in [0, 1] of the weighted k-nearest-neighbour vote (Wu et al. 2018, section 3.4).

    Features are `(N, D)` and `(M, D)`, labels `(N,)` and `(M,)`. Each of the k training features
    nearest by cosine similarity s votes for its class with weight exp(s / temperature); `k` is
    capped at N.
    """
    nearest, index = neighbours.find_nearest(test_features, F.normalize(train_features, dim=1), k)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    votes = torch.zeros(len(index), classes)  # (M, K)
    votes.scatter_add_(1, train_labels.cpu()[index], ((nearest - 1) / temperature).exp())
    return accuracy(votes.argmax(1), test_labels.cpu())


def feature_statistics(train_features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `(D,)` by which features `(N, D)` are standardised everywhere.

    `(features - mean) / std`, test features, too. A feature that never changes has an infinite
    deviation, and so counts for nothing where a test image changes it.
    """
    std, mean = torch.std_mean(train_features, 0, correction=0)
    return mean, std.masked_fill(std < 1e-6, torch.inf)


@dataclass(frozen=True)
class ProbeResult:
    """What `linear_probe` found: curves, and the last epoch's test predictions and accuracy.

    `tensors` is the probe itself, as `apply_probe` takes it.
    """

    history: list[dict[str, float]]
    predictions: Tensor
    accuracy: float
    tensors: dict[str, Tensor]


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    epochs: int = 100,
    learning_rate: float | None = None,
    weight_decay: float = 1e-3,
    batch_size: int = 512,
    seed: int = 0,
) -> ProbeResult:
    """Train a linear layer on fixed features and report its last epoch.

    Features `(N, D)` are standardised as `feature_statistics` says; Adam with cosine. The rate's
    peak is 1 / D by default: a step then changes a logit by as much whatever D is.
    `history` has a row per epoch: `train_loss` and `train_accuracy` from the training pass itself,
    `test_loss` and `test_accuracy` after it. Accuracies in [0, 1].

    Raises:
        Diverged: the loss is not finite.
    """
    device = train_features.device
    mean, std = feature_statistics(train_features)
    train_features = (train_features - mean) / std
    test_features = (test_features - mean) / std
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    weight = torch.zeros(classes, train_features.shape[1], device=device, requires_grad=True)
    bias = torch.zeros(classes, device=device, requires_grad=True)
    peak = 1 / train_features.shape[1] if learning_rate is None else learning_rate
    optimizer = torch.optim.Adam([weight, bias], peak, weight_decay=weight_decay, fused=True)
    steps = math.ceil(len(train_labels) / batch_size)
    history = []
    for epoch in range(epochs):
        order = devices.epoch_order(len(train_labels), seed, epoch, device)
        losses = progress.EpochLoss(steps, epoch + 1, device)
        total = torch.zeros(2, device=device)
        for step, index in enumerate(order.split(batch_size)):
            rate = progress.scheduled_rate(peak, epoch * steps + step, epochs * steps, 0, "cosine")
            optimizer.param_groups[0]["lr"] = rate
            labels = train_labels[index]
            logits = F.linear(train_features[index], weight, bias)
            loss = F.cross_entropy(logits, labels)
            losses.add(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total[0] += loss.detach() * len(index)
            total[1] += (logits.argmax(1) == labels).sum()
        losses.mean()  # looks at all of them, which `add` leaves out on an accelerator
        with torch.no_grad():
            logits = F.linear(test_features, weight, bias)
            predictions = logits.argmax(1)
            test_loss = F.cross_entropy(logits, test_labels).item()
        if not math.isfinite(test_loss):
            raise Diverged(f"the linear probe's test loss is {test_loss} in epoch {epoch + 1}")
        train_loss, train_accuracy = (total / len(train_labels)).tolist()
        history.append(
            {
                "epoch": epoch + 1,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "test_loss": test_loss,
                "test_accuracy": accuracy(predictions, test_labels),
            }
        )
    tensors = {"weight": weight.detach(), "bias": bias.detach(), "mean": mean, "std": std}
    return ProbeResult(history, predictions.cpu(), history[-1]["test_accuracy"], tensors)


def apply_probe(features: Tensor, probe: Mapping[str, Tensor]) -> Tensor:
    """Logits `(N, K)` that a linear probe gives features `(N, D)`, on its device.

    `probe` holds `weight` `(K, D)` and `bias` `(K,)`, and the `mean` and `std` `(D,)` by which the
    features are standardised before.
    """
    return F.linear((features - probe["mean"]) / probe["std"], probe["weight"], probe["bias"])


def few_label_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    labels_per_class: int,
) -> dict[str, Any]:
    """Test accuracy of logistic regression on few labels, over five draws of them.

    Each draw takes `labels_per_class` training images of each class, or as many as the smallest
    class has. Features are standardised as `feature_statistics` says, with all training features.

    Returns:
        `labels_per_class`, `mean` and `sd` of the accuracy in [0, 1], `draws`.
    """
    centre, spread = feature_statistics(train_features)
    train, test = ((features - centre) / spread for features in (train_features, test_features))
    labels, targets = train_labels.cpu().numpy(), test_labels.cpu()
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    count = min(labels_per_class, *map(len, classes))
    scores = []
    for seed in range(5):
        generator = np.random.default_rng(seed)
        chosen = np.concatenate([generator.permutation(images)[:count] for images in classes])
        known = torch.from_numpy(chosen).to(train.device)
        predictions = logistic_regression(train[known], train_labels[known], test).argmax(1)
        scores.append(accuracy(predictions, targets))
    mean, deviation = float(np.mean(scores)), float(np.std(scores, ddof=1))
    return {"labels_per_class": count, "mean": mean, "sd": deviation, "draws": len(scores)}


def logistic_regression(
    known: Tensor, labels: Tensor, features: Tensor, penalty: float = 1.0
) -> Tensor:
    """Probabilities `(M, K)`, on the CPU, of features' classes, learned from known ones.

    All features are scaled to the same length before: with few labels directions say more than
    lengths (SimpleShot, Wang et al. 2019, https://arxiv.org/abs/1911.04623).

    Args:
        known: `(n, D)`, standardised as `features` are.
        labels: `(n,)`, of any number of classes, the last of which is K - 1.
        features: to classify, `(M, D)`.
        penalty: of the squared weights, scikit-learn's 1 / C; training goes on to convergence.
    """
    from sklearn.linear_model import LogisticRegression

    present = labels.unique().cpu()
    probabilities = torch.zeros(len(features), int(present[-1]) + 1)
    if len(present) == 1:  # scikit-learn wants two classes
        probabilities[:, present] = 1
        return probabilities
    known, features = (scale_to_same_length(part) for part in (known, features))
    model = LogisticRegression(C=1 / penalty, max_iter=2000)
    model.fit(known.cpu().numpy(), labels.cpu().numpy())
    found = model.predict_proba(features.cpu().numpy())  # (M, classes that are present)
    probabilities[:, present] = torch.from_numpy(found).float()
    return probabilities


def scale_to_same_length(features: Tensor) -> Tensor:
    """Features `(N, D)` of length sqrt(D), about what standardised ones have."""
    return F.normalize(features, dim=1) * math.sqrt(features.shape[1])


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Share of predictions `(N,)` that equal the labels `(N,)`, in [0, 1].

    Raises:
        UserError: their shapes differ, or there are none.
    """
    shapes = f"{tuple(predictions.shape)} and {tuple(labels.shape)}"
    alike = predictions.shape == labels.shape
    require(alike, f"predictions and labels must have the same shape (N,), not {shapes}")
    require(len(labels) > 0, "without labels there is no accuracy")
    return (predictions == labels).sum().item() / len(labels)


def confusion_matrix(labels: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """Counts `(K, K)` of labels and predictions `(N,)`: true class by row, predicted by column."""
    pairs = labels.cpu() * classes + predictions.cpu()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def per_class_accuracy(matrix: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """Class name to accuracy in [0, 1]; classes without a test image are left out."""
    right, count = matrix.diag(), matrix.sum(1)
    return {
        name: right[i].item() / count[i].item() for i, name in enumerate(classes) if count[i] > 0
    }


def embedding_std(embeddings: Tensor) -> float:
    """Mean over dimensions of the standard deviation of L2-normalised embeddings `(N, D)`.

    1 / sqrt(D) when they fill the sphere, 0 when they collapse (SimSiam, section 4.1).
    """
    return F.normalize(embeddings.float(), dim=1).std(0).mean().item()


def rank_me(embeddings: Tensor) -> float:
    """RankMe (Garrido et al. 2023, equation 1): effective rank, between 1 and min(N, D)."""
    return effective_rank(singular_values(embeddings))


def singular_values(matrix: Tensor) -> Tensor:
    """The singular values of `(N, D)`, descending, `(min(N, D),)`, in float64 on the CPU.

    They are the roots of the smaller Gram matrix's eigenvalues, which take 3 s of an EPYC core for
    10,000 x 2,048 features where `svdvals` takes 5. Those below 1e-8 of the largest are lost, which
    weigh nothing here.
    """
    matrix = matrix.cpu().double()
    gram = matrix.T @ matrix if len(matrix) > matrix.shape[1] else matrix @ matrix.T
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


def effective_rank(values: Tensor) -> float:
    """Exp of the entropy of non-negative values, as shares of their sum."""
    p = values / values.sum().clamp(min=1e-12) + 1e-7
    return torch.exp(-(p * p.log()).sum()).item()


def project_2d(
    features: Tensor, method: Literal["tsne", "umap"], seed: int, neighbours: int = 30
) -> np.ndarray:
    """A two-dimensional map `(N, 2)` of features by t-SNE or UMAP, cosine distances.

    For t-SNE the normalised features go through PCA to 50 dimensions first (van der Maaten &
    Hinton 2008, section 4.1). 450 iterations with coarser sums (`angle`) take a third of the time
    of scikit-learn's defaults for the same picture: trustworthiness of 10,000 images 0.991, not
    0.992.
    """
    values = F.normalize(features.float(), dim=1).cpu().numpy()
    if (values == values[0]).all():  # of copies of one image; scikit-learn would divide by zero
        return np.zeros((len(values), 2), np.float32)
    neighbours = max(1, min(neighbours, (len(values) - 1) // 3))
    seed %= 2**32  # scikit-learn takes no larger one
    if method == "umap":
        with warnings.catch_warnings():  # a fixed seed means one thread, as documented
            warnings.filterwarnings("ignore", "n_jobs value", UserWarning)
            from umap import UMAP

            return UMAP(n_neighbors=max(2, neighbours), random_state=seed).fit_transform(values)
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    values = PCA(min(50, *values.shape), random_state=seed).fit_transform(values)
    jobs = torch.get_num_threads()
    steps = {"max_iter": 450, "angle": 0.7}
    tsne = TSNE(perplexity=neighbours, init="pca", random_state=seed, n_jobs=jobs, **steps)
    return tsne.fit_transform(values)


def report_classes(
    predictions: Tensor, data: datasets.ImageData, folder: Path, prefix: str, title: str
) -> dict[str, float]:
    """Print the test accuracy of each class, draw it and the confusion matrix.

    Returns:
        Class name to accuracy in [0, 1].
    """
    matrix = confusion_matrix(data.test.labels, predictions, len(data.classes))
    accuracies = per_class_accuracy(matrix, data.classes)
    shown = list(accuracies)
    if len(shown) > 20:
        print(f"The ten classes of {len(shown)} that are recognised least:")
        shown = sorted(shown, key=accuracies.__getitem__)[:10]
    for name in shown:
        print(f"Accuracy for class: {name} is {100 * accuracies[name]:.1f} %")
    path = folder / f"{prefix}per_class_accuracy.png"
    plot_per_class(path, accuracies, f"{title}: accuracy per class")
    plot_confusion_matrix(folder / f"{prefix}confusion_matrix.png", matrix, data.classes, title)
    return accuracies


# ------------------------------------------------------------------------------------- plots
# Each plot is a function of numbers and a path, so it can be redrawn without training.


def plot_views(path: Path, images: Tensor, views: Tensor, split: datasets.Split) -> None:
    """The first ten images, and below each its views as the network sees them.

    Args:
        path: where the picture goes.
        images: `(b, C, H, W)`, uint8.
        views: `(V b, C, h, w)`, normalised as `split` says, all first views, then all second views.
        split: the training images.
    """
    mean, std = (value[None, :, None, None] for value in (split.mean, split.std))
    seen = (views.float() * std + mean).clamp(0, 1).unflatten(0, (-1, len(images)))  # (V, b, ...)
    rows = [datasets.to_float(images[:10]), *seen[:, :10]]  # (b, C, H, W), then (b, C, h, w)
    rows = [datasets.as_shown(row) for row in rows]
    beside = {"rotation": 90, "ha": "right", "va": "center"}
    with figures.new_figure(path, height=0.66 * len(rows)) as figure:
        axes = figure.subplots()
        figures.hide_axes(axes)
        for number, row in enumerate(rows):
            for place, picture in enumerate(row.permute(0, 2, 3, 1).cpu().numpy()):
                box = (place, place + 0.9, number + 0.9, number)
                axes.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=box)
            axes.text(-0.1, number + 0.45, f"view {number}" if number else "image", **beside)
        axes.set(xlim=(0, len(rows[0])), ylim=(len(rows), 0))


def plot_loss_and_accuracy(
    path: Path, history: Sequence[dict[str, float]], title: str, other: str = "test"
) -> None:
    """Loss and accuracy (in percent) over epochs, of the training images and `other` ones."""
    percent = [
        {k: v * 100 if k.endswith("accuracy") else v for k, v in row.items()} for row in history
    ]
    with figures.new_figure(path, title) as figure:
        units = {"loss": "loss", "accuracy": "accuracy (%)"}
        for axes, (key, unit) in zip(figures.add_panels(figure, 2), units.items(), strict=True):
            figures.draw_line(axes, percent, f"train_{key}", "train", figures.TRAIN_COLOR)
            figures.draw_line(axes, percent, f"{other}_{key}", other, figures.TEST_COLOR)
            figures.label_axes(axes, "epoch", unit)
        figures.add_legend(figure)


def plot_scatter(
    path: Path,
    coordinates: np.ndarray,
    labels: np.ndarray | None,
    classes: Sequence[str],
    title: str,
) -> None:
    """A map `(N, 2)` coloured by class; up to twenty names stand at or near their class's median.

    Up to sixty classes stand in the legend.
    """
    from matplotlib.patheffects import withStroke

    if len(classes) > 60:  # nobody could tell them apart
        title += f", {len(classes)} classes"
    with figures.new_figure(path, title, height=5) as figure:
        axes = figure.subplots()
        figures.hide_axes(axes)
        look = {"s": float(np.clip(10000 / len(coordinates), 4, 20)), "alpha": 0.7}
        if labels is None:
            axes.scatter(*coordinates.T, facecolor=figures.TRAIN_COLOR, **look)
            return
        halo = [withStroke(linewidth=3, foreground="white")]
        names = []
        for label, color in enumerate(figures.class_colors(len(classes))):
            points, name = coordinates[labels == label], figures.plain(classes[label], 24)
            if len(points) == 0:
                continue
            axes.scatter(*points.T, facecolor=color, label=name, **look)
            if len(classes) <= 20:
                where = {"ha": "center", "va": "center", "zorder": 3, "weight": "bold"}
                names.append(axes.text(*np.median(points, 0), name, path_effects=halo, **where))
        if len(classes) <= 60:
            for handle in figures.add_legend(figure).legend_handles:
                handle.set(sizes=[40], alpha=1)
        if names:
            figures.separate_texts(names)


def plot_per_class(path: Path, accuracies: dict[str, float], title: str) -> None:
    """Horizontal bars of the accuracy of each class, in percent, with the mean as a line.

    Of more than sixty classes it shows the sixty that are recognised least.
    """
    percent = {name: 100 * value for name, value in accuracies.items()}
    mean = sum(percent.values()) / len(percent)
    if len(percent) > 60:
        title += f", the lowest 60 of {len(percent)}"
        percent = {name: percent[name] for name in sorted(percent, key=percent.__getitem__)[:60]}
    with figures.new_figure(path, title) as figure:
        axes = figure.subplots()
        figures.draw_bars(axes, percent)
        axes.axvline(mean, color=figures.TEST_COLOR, label=f"mean {mean:.1f} %")
        figures.label_axes(axes, "accuracy (%)", "")
        figures.add_legend(figure)


def plot_confusion_matrix(path: Path, matrix: Tensor, classes: Sequence[str], title: str) -> None:
    """Row-normalised confusion matrix in percent; numbers for up to 20 classes, none for a 0."""
    share = (100 * matrix / matrix.sum(1, keepdim=True).clamp(min=1)).numpy()
    side = float(np.clip(0.4 * len(classes) + 2, figures.WIDTH, 13))
    with figures.new_figure(path, title, side - 0.6, side) as figure:
        axes = figure.subplots()
        picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
        ticks = range(0, len(classes), math.ceil(len(classes) / 60))
        names = [figures.plain(classes[i], 24) for i in ticks]
        slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        if len(classes) > 20:
            slanted |= {"rotation": 90, "va": "center"}
        axes.set_xticks(ticks, names, **slanted if max(map(len, names)) > 3 else {})
        axes.set_yticks(ticks, names)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        if len(classes) > 20:
            figure.colorbar(picture, label="%", shrink=0.8)
        else:
            for (row, column), value in np.ndenumerate(share):
                if round(value):  # an empty cell reads better than a 0
                    look = {"color": "white" if value > 60 else "black", "ha": "center"}
                    axes.text(column, row, f"{value:.0f}", va="center_baseline", **look)
        figures.label_axes(axes, "predicted class", "true class; each row is 100 %")
