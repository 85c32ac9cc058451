"""What finished encoders buy when few images have labels, beside methods without pretraining.

    python few_labels.py results/simsiam/A results/simclr/B      # finished runs of one data set
    python few_labels.py --labels 10,100 --methods scratch,fixmatch    # FashionMNIST, no run
    python few_labels.py --resume results/few_labels/NAME --workers 2  # trains what is missing only

For each number of labels and each draw of them every method gets the same labelled images, and is
tested on the same images, which it has not seen. Runs that differ in nothing but their seed are one
method, mean ± sd over runs and draws. Writes a row per training to `few_labels.csv`, then
`scores.csv`, `differences.csv`, `table.md` and `few_labels.png`.

No method chooses anything by a draw: the settings below were chosen once, on held-out training
images (`--evaluate-on validation`, docs/results/pilots/few_labels.csv), every training takes
`--steps` steps, and its last weights count. So all drawn labels are there to train with.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compare
import embed
import functions
from support import augment, checkpoints, datasets, devices, encoders, files, graphs, neighbours
from support import pool, progress, randaugment, report, runs, settings, supervised
from support.errors import require
from support.settings import setting


@dataclass(frozen=True)
class Config(settings.RunConfig, dataset=""):
    """The settings of the comparison, and those of the methods."""

    SCRIPT = "few_labels"

    runs: tuple[str, ...] = setting((), "data", "finished run folders, all of one data set")
    evaluate_on: Literal["test", "validation"] = setting(
        "test", "data", "validation: a tenth of the training images, to choose settings by"
    )
    methods: str = setting("all", "comparison", "names with commas between them")
    labels: str = setting(
        "10,40,100,250,1000,4000,all", "comparison", "how many labels, of all classes together"
    )
    draws: Literal["balanced", "random"] = setting(
        "balanced", "comparison", "labelled images: as many of each class, or as they come"
    )
    quick_draws: int = setting(20, "comparison", "draws for methods that take seconds")
    slow_draws: int = setting(5, "comparison", "draws for methods that take minutes")
    transductive: bool = setting(
        False, "comparison", "the test images are among the unlabelled ones, too"
    )
    workers: int = setting(1, "run", "processes, each with its share of threads")

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
        for name in ("quick_draws", "slow_draws"):
            require(getattr(self, name) >= 2, f"{settings.flag(name)} must be at least 2")
        for name in ("workers", "steps", "neighbours", "unlabelled_ratio"):
            require(getattr(self, name) >= 1, f"{settings.flag(name)} must be at least 1")
        for name in ("crop_scale_min", "finetune_rate", "penalty", "fixmatch_rate"):
            require(0 < getattr(self, name) < math.inf, f"{settings.flag(name)} must be positive")
        require(self.crop_scale_min <= 1, "--crop-scale-min must be at most 1")
        for name in ("flip_probability", "threshold"):
            good = 0 <= getattr(self, name) <= 1
            require(good, f"{settings.flag(name)} must be in [0, 1]")
        require(0 < self.alpha < 1, f"--alpha must be between 0 and 1, not {self.alpha}")
        unknown = set(self.method_names) - METHODS.keys()
        require(not unknown, f"--methods knows {','.join(METHODS)}, not {','.join(sorted(unknown))}")
        self.label_counts(2)

    @property
    def method_names(self) -> tuple[str, ...]:
        """The methods to compare."""
        names = tuple(name.strip() for name in self.methods.split(","))
        return tuple(METHODS) if names == ("all",) else names

    def label_counts(self, images: int) -> list[int]:
        """The numbers of labels, ascending; those above `images` are left out."""
        parts = [part.strip() for part in self.labels.split(",")]
        good = all(part == "all" or (part.isdecimal() and int(part) > 1) for part in parts)
        require(good, f"--labels takes whole numbers from 2 and all, not {self.labels!r}")
        counts = {images if part == "all" else int(part) for part in parts}
        return sorted(count for count in counts if count <= images)


# What may differ when a comparison goes on: its rows stay what they are.
FREE_ON_RESUME = frozenset({"runs", "methods", "labels", "quick_draws", "slow_draws", "workers"})


def draw_labels(labels: Tensor, count: int, seed: Any, draws: str = "balanced") -> Tensor:
    """Positions `(count,)` of labelled images, nested for the same seed.

    Balanced, the first K are one image of each of the K classes, the next K another one, and so on;
    a class that has no more images is passed over. Random, all images are alike.
    """
    generator = np.random.default_rng(seed)
    values = labels.cpu().numpy()
    if draws == "random":
        return torch.from_numpy(generator.permutation(len(values))[:count])
    classes = generator.permutation(np.unique(values))
    turns = [
        (rank, place, image)
        for place, label in enumerate(classes)
        for rank, image in enumerate(generator.permutation(np.flatnonzero(values == label)))
    ]
    return torch.tensor([int(image) for _, _, image in sorted(turns)[:count]])


# ------------------------------------------------------------------------------- the methods


@dataclass(frozen=True)
class Features:
    """What an encoder, or the pixels themselves, say of the images.

    `train` `(N, D)` and `test` `(M, D)` are standardised with the statistics of the training
    images. `near` are each image's nearest others as `neighbours.find_nearest` gives them;
    `test_near` the test images' among the training images. With `--transductive` there is no
    `test_near`, but the test images are the last of the images in `near`.
    """

    train: Tensor
    test: Tensor
    near: tuple[np.ndarray, np.ndarray] | None
    test_near: tuple[np.ndarray, np.ndarray] | None

    @functools.cached_property
    def graph(self) -> Any:
        """The sparse matrix S of label spreading."""
        return graphs.normalized_graph(*self.near)


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
        features: of a finished encoder, or the pixels; None for methods that train an encoder.
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
    seed: int
    config: Config
    fabric: Any


def nearest_mean(given: Given) -> Tensor:
    """The class whose labelled images' mean is the nearest."""
    known = given.features.train[given.chosen]  # (n, D)
    present = given.labels.unique()
    means = torch.stack([known[given.labels == label].mean(0) for label in present])  # (K, D)
    return present[torch.cdist(given.features.test, means).argmin(1)]


def logistic_regression(given: Given) -> Tensor:
    """A linear layer with an L2 penalty, to convergence."""
    known = given.features.train[given.chosen]
    model = functions.fit_logistic_regression(known, given.labels, given.config.penalty)
    return torch.from_numpy(model.predict(given.features.test.cpu().numpy()))


def train_mlp(given: Given) -> Tensor:
    """One hidden layer of 512 units with BatchNorm."""
    width = given.features.train.shape[1]
    hidden = (nn.Linear(width, 512), nn.BatchNorm1d(512), nn.ReLU())
    classifier = nn.Sequential(*hidden, nn.Linear(512, given.classes))
    train(given, classifier, given.features.train[given.chosen], lambda batch, generator: batch)
    with functions.evaluating(classifier):
        return classifier(given.features.test).argmax(1)


def spread_labels(given: Given) -> Tensor:
    """Label spreading over the graph of nearest neighbours of all images (Zhou et al. 2003).

    A test image gets the mean of its neighbours' labels, weighted as the graph's edges are.
    """
    features, chosen = given.features, given.chosen.cpu().numpy()
    marks = F.one_hot(given.labels, given.classes).double().cpu().numpy()  # (n, K)
    scores = graphs.spread(features.graph, chosen, marks, given.config.alpha)  # (N, K)
    if features.test_near is None:
        scores = scores[-len(given.test) :]
    else:
        scores = graphs.average_neighbours(scores, *features.test_near)  # (M, K)
    return torch.from_numpy(scores.argmax(1))


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
            batch = datasets.to_float(batch)
            batch = augment.random_resized_crop(batch, scale=scale, flip=flip, generator=generator)
        return split.normalize(batch).contiguous(memory_format=torch.channels_last)

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
    epochs = math.ceil(given.config.steps / (len(inputs) // min(256, len(inputs))))
    parts = (inputs, given.labels, prepare, epochs, given.seed, given.fabric)
    for _ in supervised.train_classifier(classifier, optimizer, *parts):
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
    network, stepper = given.fabric.setup(classifier, optimizer)
    losses = progress.EpochLoss(config.steps, 1, device)
    classifier.train()
    for step in range(config.steps):
        generator = devices.epoch_generator(given.seed, step, device, stream=5)
        optimizer.param_groups[0]["lr"] = progress.scheduled_rate(
            rate, step, config.steps, 0, "cosine"
        )
        draw = functools.partial(torch.randint, generator=generator, device=device)
        known = draw(len(given.chosen), (64,))
        others = draw(len(split), (64 * config.unlabelled_ratio,))
        labelled = augment_weakly(split.images[given.chosen[known]], config, generator)
        unlabelled = split.images[others]
        weak = augment_weakly(unlabelled, config, generator)
        strong = augment_strongly(unlabelled, config, generator)
        batch = torch.cat([datasets.to_float(labelled), datasets.to_float(weak), strong])
        batch = split.normalize(batch).contiguous(memory_format=torch.channels_last)
        parts = network(batch).split([64, len(others), len(others)])  # (64, K), (64 r, K) twice
        loss = fixmatch_loss(parts[0], given.labels[known], *parts[1:], config.threshold)
        losses.add(loss)
        optimizer.zero_grad()
        given.fabric.backward(loss)
        stepper.step()
    losses.mean()
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
    confidence, guess = weak.detach().softmax(1).max(1)  # (m,)
    unlabelled = F.cross_entropy(strong, guess, reduction="none") * (confidence >= threshold)
    return F.cross_entropy(logits, labels) + unlabelled.mean()


def augment_weakly(images: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """Flip and shift by up to an eighth of the side; images `(B, C, H, W)`, uint8."""
    images = augment.random_horizontal_flip(images, config.flip_probability, generator)
    return augment.random_shift(images, images.shape[2] // 8, generator)


def augment_strongly(images: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """Two ops of RandAugment with the step's random strength, then Cutout (appendix E); in [0, 1]."""
    images = augment_weakly(images, config, generator)
    host = torch.Generator().manual_seed(generator.initial_seed())
    ops, negative = randaugment.draw_randaugment(len(images), 2, host)
    magnitude = int(torch.randint(1, 11, (), generator=host))
    images = datasets.to_float(randaugment.rand_augment(images, ops, negative, magnitude))
    return augment.random_cutout(images, images.shape[2] // 2, generator)


class Method(NamedTuple):
    """A row of the table: its name there, its colour, and what it starts from.

    `start` is `pixels`, a finished encoder's `features`, that `encoder` itself, or a `new` one.
    `slow` ones take minutes; `exact` ones have no randomness of their own.
    """

    label: str
    color: str
    start: tuple[str, ...]
    predict: Callable[[Given], Tensor]
    slow: bool = False
    exact: bool = False


METHODS = {
    "scratch": Method("from scratch, plain", "#AAAAAA", ("new",), train_plainly, slow=True),
    "tuned": Method("from scratch, tuned", "#333333", ("new",), train_tuned, slow=True),
    "fixmatch": Method("FixMatch", "#CC3311", ("new", "encoder"), fixmatch, slow=True),
    "mean": Method("nearest mean", "#CCBB44", ("pixels", "features"), nearest_mean, exact=True),
    "linear": Method(
        "logistic regression", "#0077BB", ("pixels", "features"), logistic_regression, exact=True
    ),
    "mlp": Method("MLP", "#009988", ("features",), train_mlp),
    "spreading": Method(
        "label spreading", "#AA3377", ("pixels", "features"), spread_labels, exact=True
    ),
    "finetune": Method("fine-tuned", "#EE7733", ("encoder",), finetune, slow=True),
}


# ---------------------------------------------------------------------------- the trainings


class Task(NamedTuple):
    """A training: of a method, from a run (`simsiam/A`), from `pixels` or from `nothing`."""

    method: str
    start: str
    labels: int
    draw: int


@dataclass(frozen=True)
class Start:
    """What methods start from: a finished run, the pixels, or nothing.

    Runs that differ in nothing but their seed have one `group`. `seconds` are those of its
    pretraining, `folder` is the run's.
    """

    group: str
    kinds: tuple[str, ...]
    seconds: float = 0.0
    folder: Path | None = None


def read_starts(folders: Sequence[str]) -> dict[str, Start]:
    """What there is to start from, by name.

    Raises:
        UserError: a folder that holds no finished run, or one that is given twice.
    """
    starts = {"nothing": Start("", ("new",)), "pixels": Start("pixels", ("pixels",))}
    read = {folder: compare.read_run(Path(folder))[0] for folder in folders}
    of_pretraining = [  # runs that are evaluated in other ways are no others
        dataclasses.replace(run, settings={k: v for k, v in run.settings.items() if k != "stages"})
        for run in read.values()
    ]
    groups = compare.group(of_pretraining)
    for members, name in zip(groups, compare.name_groups(groups), strict=True):
        for run in members:
            folder = Path(folders[of_pretraining.index(run)])
            own = f"{run.script}/{folder.resolve().name}"
            require(own not in starts, f"{own} is given twice")
            group = name if name.startswith(run.script) else f"{run.script} {name}"
            seconds = float(run.summary.get("pretrain_seconds", run.summary.get("seconds", 0)))
            starts[own] = Start(group, ("features", "encoder"), seconds, folder)
    return starts


def list_tasks(config: Config, starts: dict[str, Start], images: int) -> list[Task]:
    """All trainings, the first draw of everything first."""
    tasks = []
    for draw in range(max(config.quick_draws, config.slow_draws)):
        for count in config.label_counts(images):
            for name, start in starts.items():
                for key in config.method_names:
                    method = METHODS[key]
                    draws = config.slow_draws if method.slow else config.quick_draws
                    if method.exact and count == images:  # there is one draw of all images
                        draws = 1
                    if draw < draws and set(method.start) & set(start.kinds):
                        tasks.append(Task(key, name, count, draw))
    return tasks


def prepare_features(path: Path, start: Start, data: datasets.ImageData, config: Config) -> None:
    """Write what `Features` holds into a folder, where all workers read it."""
    parts = (data.train, data.test)
    if start.folder is None:
        train, test = (datasets.to_float(part.images).flatten(1) for part in parts)  # (N, D)
    else:
        encoder = embed.load_encoder(start.folder, config.device)
        train, test = (
            functions.extract_features(encoder.network, part, encoder.fabric) for part in parts
        )
    train, test = functions.standardize(train, test)
    arrays = {"train": train, "test": test}
    if "spreading" in config.method_names:
        bank = F.normalize(torch.cat([train, test]) if config.transductive else train, dim=1)
        arrays["near"], arrays["where"] = neighbours.find_nearest(bank, bank, config.neighbours)
        if not config.transductive:
            found = neighbours.find_nearest(test, bank, config.neighbours)
            arrays["test_near"], arrays["test_where"] = found
    path.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        with files.atomic_file(path / f"{name}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, values.cpu().numpy())


def load_features(path: Path, device: torch.device) -> Features:
    """What `prepare_features` wrote; the files are read where they are used."""

    def read(name: str) -> np.ndarray | None:
        file = path / f"{name}.npy"
        return np.load(file, mmap_mode="c") if file.exists() else None

    pairs = [(read(near), read(where)) for near, where in (("near", "where"), ("test_near", "test_where"))]
    near, test_near = (None if pair[0] is None else pair for pair in pairs)
    train, test = (torch.from_numpy(read(name)).to(device) for name in ("train", "test"))
    return Features(train, test, near, test_near)


class Trainer:
    """Does a task, and keeps what several tasks share. One per process."""

    def __init__(self, config: Config, folder: Path):
        self.config, self.folder = config, folder
        self.fabric = devices.make_fabric(config.device, config.precision)
        self.data = load_data(config).to(self.fabric.device)
        self.starts = read_starts(config.runs)
        self.features = functools.lru_cache(maxsize=2)(self._features)
        self.encoder = functools.lru_cache(maxsize=2)(self._encoder)

    def _features(self, name: str) -> Features:
        return load_features(features_folder(self.folder, name), self.fabric.device)

    def _encoder(self, name: str) -> Any:
        return embed.load_encoder(self.starts[name].folder, self.config.device).network

    def __call__(self, task: Task) -> dict[str, Any]:
        """The row of `few_labels.csv`."""
        from sklearn.metrics import f1_score

        config, data = self.config, self.data
        method, start, began = METHODS[task.method], self.starts[task.start], time.perf_counter()
        seed = config.seed + task.draw
        chosen = draw_labels(data.train.labels, task.labels, (config.seed, task.draw), config.draws)
        chosen = chosen.to(self.fabric.device)
        devices.seed_everything(seed)
        encoder = features = None
        if "new" in method.start and start.folder is None:
            encoder = self.new_encoder()
        elif "encoder" in method.start:
            encoder = copy.deepcopy(self.encoder(task.start))
        else:
            features = self.features(task.start)
        images, test = (dataclasses.replace(s, labels=None) for s in (data.train, data.test))
        if config.transductive:
            both = torch.cat([images.images, test.images])
            images = dataclasses.replace(images, images=both, paths=None)
        given = Given(
            images,
            test,
            chosen,
            data.train.labels[chosen],
            len(data.classes),
            encoder,
            features,
            seed,
            config,
            self.fabric,
        )
        predictions, truth = method.predict(given).cpu(), data.test.labels.cpu()
        row = {**task._asdict(), "accuracy": functions.accuracy(predictions, truth)}
        row["macro_f1"] = float(f1_score(truth, predictions, average="macro"))
        return row | {"seconds": time.perf_counter() - began}

    def new_encoder(self) -> Any:
        """An untrained encoder like that of the first run, or a small one without runs."""
        shape = self.data.train.images.shape[1:3]
        folders = [start.folder for start in self.starts.values() if start.folder is not None]
        if not folders:
            return encoders.make_encoder("small", "cifar", *shape)
        _, about = checkpoints.load_tensors(folders[0] / "encoder.safetensors")
        width = about.get("width", 64)
        return encoders.make_encoder(about["encoder"], about["stem"], *shape, width)


def features_folder(folder: Path, start: str) -> Path:
    """Where the features of a start are kept until the comparison is finished."""
    return folder / "features" / start.replace("/", "-")


def load_data(config: Config) -> datasets.ImageData:
    """The data set, for choosing settings without its test images."""
    data = functions.load_images(
        config.dataset, config.data_dir, config.image_size, config.download_url
    )
    require(bool(data.classes), f"{data.name} has no labels")
    return data.for_choosing() if config.evaluate_on == "validation" else data


# ------------------------------------------------------------------------------ the numbers


def summarize(rows: Sequence[dict[str, Any]], starts: dict[str, Start]) -> list[dict[str, Any]]:
    """The rows of `scores.csv`: mean and sd over runs and draws, in [0, 1], of each method.

    `minutes` are those of one training and of the pretraining that it needs.
    """
    cells: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["method"], starts[row["start"]].group, row["labels"])
        cells.setdefault(key, []).append(row)
    scores = []
    for (method, group, count), members in cells.items():
        score: dict[str, Any] = {"method": method, "start": group, "labels": count}
        for name in ("accuracy", "macro_f1"):
            values = [row[name] for row in members]
            score[name] = float(np.mean(values))
            score[f"{name}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        spent = [row["seconds"] + starts[row["start"]].seconds for row in members]
        score |= {"minutes": float(np.mean(spent)) / 60, "trainings": len(members)}
        scores.append(score | {"runs": len({row["start"] for row in members})})
    return scores


def find_differences(
    rows: Sequence[dict[str, Any]], scores: Sequence[dict[str, Any]], starts: dict[str, Start]
) -> list[dict[str, Any]]:
    """The rows of `differences.csv`: what each pretrained method has over its best opponent.

    The opponent is the method without pretraining whose mean accuracy is the largest for so many
    labels. Differences are paired: both on the same draws, the mean over the runs of a group in
    each; the interval of 95 % is Student's over the draws, of the encoders that there are.
    """
    from scipy import stats

    by_draw: dict[tuple[str, str, int], dict[int, list[float]]] = {}
    for row in rows:
        key = (row["method"], starts[row["start"]].group, row["labels"])
        by_draw.setdefault(key, {}).setdefault(row["draw"], []).append(row["accuracy"])
    plain = ("", "pixels")
    found = []
    for (method, group, count), mine in by_draw.items():
        rivals = [s for s in scores if s["start"] in plain and s["labels"] == count]
        if group in plain or not rivals:
            continue
        best = max(rivals, key=lambda score: score["accuracy"])
        theirs = by_draw[best["method"], best["start"], count]
        pairs = [np.mean(mine[draw]) - np.mean(theirs[draw]) for draw in mine.keys() & theirs.keys()]
        row = {"method": method, "start": group, "labels": count, "draws": len(pairs)}
        row |= {"opponent": method_name(best["method"], best["start"])}
        row["difference"] = float(np.mean(pairs)) if pairs else None
        if len(pairs) > 1:
            half = stats.sem(pairs) * stats.t.ppf(0.975, len(pairs) - 1)
            row |= {"low": row["difference"] - half, "high": row["difference"] + half}
        found.append(row)
    return found


def method_name(method: str, start: str, transductive: bool = False) -> str:
    """What a method is called in tables and figures; `start` is a group of runs, or `pixels`."""
    about = METHODS[method]
    seen = transductive and about.predict in (spread_labels, fixmatch)
    where = f", {start}" if start else ""
    return about.label + where + (" (transductive)" if seen else "")


def make_tables(
    scores: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]], transductive: bool
) -> str:
    """The lines of `table.md`: accuracy, macro-F1, differences and minutes by number of labels."""

    def percent(row: dict[str, Any], key: str) -> str:
        deviation = row[f"{key}_sd"]
        return f"{100 * row[key]:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")

    def difference(row: dict[str, Any]) -> str:
        if row["difference"] is None:
            return ""
        interval = f" [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]" if "low" in row else ""
        return f"{100 * row['difference']:+.1f}{interval}"

    parts = []
    for title, rows, cell in (
        ("accuracy in %, mean ± sd", scores, lambda row: percent(row, "accuracy")),
        ("macro-F1 in %, mean ± sd", scores, lambda row: percent(row, "macro_f1")),
        ("points of accuracy over the best without pretraining, 95 %", differences, difference),
        ("minutes of a training, with its pretraining", scores, lambda s: f"{s['minutes']:.1f}"),
    ):
        counts = sorted({row["labels"] for row in rows})
        lines: dict[str, dict[int, str]] = {}
        for row in rows:
            name = method_name(row["method"], row["start"], transductive)
            lines.setdefault(name, {})[row["labels"]] = cell(row)
        table = [[title, *(f"{count:,}" for count in counts)]]
        table += [[name, *(cells.get(n, "") for n in counts)] for name, cells in lines.items()]
        if lines:
            parts.append("\n".join(compare.markdown_lines(table)))
    return "\n\n".join(parts) + "\n"


def plot_scores(
    path: Path, scores: Sequence[dict[str, Any]], title: str, transductive: bool
) -> None:
    """Accuracy over the number of labels, with a band of ± sd: a panel per group of runs.

    The first panel has the methods without pretraining; the best of them at each number is the
    dashed line in the others.
    """
    plain = [score for score in scores if score["start"] in ("", "pixels")]
    best: dict[int, float] = {}
    for score in plain:
        count = score["labels"]
        best[count] = max(best.get(count, 0.0), 100 * score["accuracy"])
    panels: dict[str, list[dict[str, Any]]] = {"without pretraining": plain} if plain else {}
    for score in scores:
        if score["start"] not in ("", "pixels"):
            panels.setdefault(score["start"], []).append(score)
    figure = functions.new_figure(max(6, 4.2 * len(panels)), 4.5)
    figure.suptitle(functions.plain(title))
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, members) in zip(every, panels.items(), strict=True):
        lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for score in members:
            lines.setdefault((score["method"], score["start"]), []).append(score)
        for (method, start), points in lines.items():
            points.sort(key=lambda score: score["labels"])
            counts = [score["labels"] for score in points]
            mean = np.array([100 * score["accuracy"] for score in points])
            spread = np.array([100 * (score["accuracy_sd"] or 0.0) for score in points])
            color, style = METHODS[method].color, ":" if start == "pixels" else "-"
            label = method_name(method, start if start == "pixels" else "", transductive)
            axes.plot(counts, mean, f"o{style}", color=color, label=label, markersize=4)
            axes.fill_between(
                counts, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0
            )
        if members is not plain and best:
            rival = sorted(best.items())
            label = "best without pretraining"
            axes.plot(*zip(*rival, strict=True), "--", color="black", label=label, linewidth=1)
        axes.set_xscale("log")
        ticks = sorted({score["labels"] for score in scores})
        axes.set_xticks(ticks, [f"{n // 1000}k" if n >= 1000 else str(n) for n in ticks])
        axes.minorticks_off()
        axes.set_title(functions.plain(name))
        functions.style_axes(axes, "labelled images", "accuracy (%)" if axes is every[0] else "")
        axes.legend(frameon=False, loc="lower right", fontsize="small")
    functions.save_figure(figure, path)


# ---------------------------------------------------------------------------------- the work


def task_of(row: dict[str, Any]) -> Task:
    """The task that a row of `few_labels.csv` is of."""
    return Task(*(row[name] for name in Task._fields))


def estimate(tasks: Sequence[Task], rows: Sequence[dict[str, Any]], workers: int) -> str:
    """How long so many trainings take, by those that are done."""
    spent: dict[tuple[str, bool, int], list[float]] = {}
    for row in rows:
        key = (row["method"], row["start"] == "pixels", row["labels"])
        spent.setdefault(key, []).append(row["seconds"])
    keys = [(task.method, task.start == "pixels", task.labels) for task in tasks]
    seconds = sum(float(np.mean(spent[key])) for key in keys if key in spent) / workers
    words = "about " if all(key in spent for key in keys) else "more than "
    return words + progress.format_seconds(seconds)


def train_missing(
    config: Config, folder: Path, tasks: Sequence[Task], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Do the tasks that have no row yet, and add each row to `few_labels.csv` at once.

    Returns:
        The rows of all tasks, in their order.
    """
    done = {task_of(row): row for row in rows}
    missing = [task for task in tasks if task not in done]
    make_trainer = functools.partial(Trainer, config, folder)
    for row in pool.run_tasks(make_trainer, missing, config.workers) if missing else ():
        task = task_of(row)
        done[task] = row
        files.write_csv(folder / "few_labels.csv", done.values())
        missing.remove(task)
        if row["seconds"] > 10 or len(missing) % 100 == 0:
            what = f"{task.method} from {task.start}, {task.labels:,} labels, draw {task.draw}"
            left = f"{len(missing):,} left, {estimate(missing, [*done.values()], config.workers)}"
            print(f"{what}: {row['accuracy']:.1%} in {row['seconds']:.0f} s; {left}")
    return [done[task] for task in tasks]


def use_data_of_runs(config: Config) -> Config:
    """The settings with the data set of the runs, or FashionMNIST, where none is named.

    Raises:
        UserError: the runs are of several data sets.
    """
    records = [files.read_json(Path(folder) / "config.json") for folder in config.runs]
    sets = {(str(r.get("dataset")), int(r.get("image_size", 32))) for r in records}
    require(len(sets) <= 1, f"the runs are of several data sets: {', '.join(sorted(n for n, _ in sets))}")
    dataset, size = next(iter(sets), ("fashion-mnist", config.image_size))
    return dataclasses.replace(config, dataset=config.dataset or dataset, image_size=size)


def main(config: Config) -> dict[str, Any]:
    """Train what is missing, write tables and figure, and return what `summary.json` holds.

    Raises:
        UserError: data, settings or run folders that cannot be used.
        Diverged: a loss is not finite.
    """
    starts = read_starts(config.runs)
    config = use_data_of_runs(config)
    whole = load_data(dataclasses.replace(config, evaluate_on="test"))
    data = load_data(config)
    for name, start in starts.items():
        if start.folder is not None:
            known = files.read_json(start.folder / "config.json").get("data")
            same = known in (None, whole.fingerprint(), whole.for_choosing().fingerprint())
            require(same, f"{name} was trained on other images than those in {config.dataset} now")
    tasks = list_tasks(config, starts, len(data.train))
    require(bool(tasks), "nothing to compare: these --methods need runs, or fewer --labels")
    with runs.open_run(config, whole.fingerprint(), FREE_ON_RESUME) as run:
        print(data)
        if config.evaluate_on == "validation":
            print("what are called test images are held-out training images")
        kinds: dict[str, Callable[[str], Any]] = dict.fromkeys(("method", "start"), str)
        kinds |= dict.fromkeys(("labels", "draw"), int)
        kinds |= dict.fromkeys(("accuracy", "macro_f1", "seconds"), files.finite)
        rows = files.read_csv(run.folder / "few_labels.csv", kinds)
        fabric = devices.make_fabric(config.device, config.precision)
        prepared = {task.start for task in tasks} - {"nothing"}
        missing = {task.start for task in set(tasks) - {task_of(row) for row in rows}}
        for name in sorted(prepared & missing):
            path = features_folder(run.folder, name)
            if not (path / "done").exists():
                print(f"features of {name}")
                prepare_features(path, starts[name], data, config)
        rows = train_missing(config, run.folder, tasks, rows)
        shutil.rmtree(run.folder / "features", ignore_errors=True)  # gigabytes
        scores = summarize(rows, starts)
        differences = find_differences(rows, scores, starts)
        files.write_csv(run.folder / "scores.csv", scores)
        files.write_csv(run.folder / "differences.csv", differences)
        tables = make_tables(scores, differences, config.transductive)
        with files.atomic_file(run.folder / "table.md") as temporary:
            temporary.write_text(tables, encoding="utf-8")
        kind = "held-out training images" if config.evaluate_on == "validation" else "test images"
        title = f"{len(data.test):,} {kind} of {data.name}, {config.draws} draws"
        plot_scores(run.folder / "few_labels.png", scores, title, config.transductive)
        summary: dict[str, Any] = {}
        for score in scores:
            name = method_name(score["method"], score["start"], config.transductive)
            means = summary.setdefault(f"accuracy of {name}", {})
            means[str(score["labels"])] = score["accuracy"]
        summary["mean_accuracy"] = float(np.mean([score["accuracy"] for score in scores]))
        summary["training_seconds"] = sum(row["seconds"] for row in rows)
        summary = run.summarize(summary)
        report.write_report(run.folder, Config)
        print(tables)
        runs.print_folder(run.folder)
    return summary


if __name__ == "__main__":
    runs.run_script(main, Config, __doc__)
