"""Does the verdict of a pretraining find failures, and leave good runs alone?

    OMP_NUM_THREADS=1 python benchmarks/failures.py

Plants failures of code, data and settings in runs of the self-supervised scripts, of which the
first tenth of the epochs is trained, and does good runs to their end. A row of each goes into
`docs/results/verdicts/verdicts.csv`; a second call does only what is not in it yet.
"""

import argparse
import contextlib
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functions
import moco
import simclr
import simsiam
from support import datasets, devices, files, pretraining
from support.errors import Diverged

PATH = common.ROOT / "docs" / "results" / "verdicts" / "verdicts.csv"
COLUMNS = ("planted", "script", "data", "settings", "epochs", "trained", "verdict", "epoch", "loss")
IMAGES = {"digits": None, "fashion-mnist": 3000, "data/cifar10-images": 1500}
SMALL = {"encoder": "small", "batch_size": 64, "epochs": 50}
FASHION = {"dataset": "fashion-mnist", "encoder": "small", "batch_size": 128, "epochs": 30}
CIFAR: dict[str, Any] = {"dataset": "data/cifar10-images", "encoder": "resnet18", "width": 16}
CIFAR |= {"view_size": "16", "batch_size": 128, "epochs": 20}
CROP = {"augmentation": "crop"}
SCRIPTS: dict[str, Any] = {"simclr": simclr, "simsiam": simsiam, "moco": moco}
QUEUE = {"queue_size": 512}


class FirstTenthDoneError(Exception):
    """All epochs that count are trained."""


# ------------------------------------------------------------ failures, planted from outside


def without_stop_gradient() -> Any:
    """SimSiam's loss lets gradients through to the target."""

    def loss(p: Tensor, z: Tensor) -> Tensor:
        return -F.cosine_similarity(p.float(), z.float(), dim=1).mean()

    return mock.patch.object(simsiam, "negative_cosine_similarity", loss)


@contextlib.contextmanager
def without_predictor() -> Iterator[None]:
    """SimSiam's predictor is the identity."""
    original = simsiam.pretrain

    def pretrain(model: Any, *others: Any) -> Any:
        model.predictor = nn.Identity()
        return original(model, *others)

    optimizer = mock.patch.object(
        simsiam,
        "make_optimizer",
        lambda model, config: torch.optim.SGD(
            model.parameters(), config.learning_rate * config.batch_size / 256, 0.9, fused=True
        ),
    )
    with mock.patch.object(simsiam, "pretrain", pretrain), optimizer:
        yield


@contextlib.contextmanager
def equal_views() -> Iterator[None]:
    """The second view of an image is the first."""
    apply, make = pretraining.apply_views, simsiam.make_views

    def twice(views: Tensor) -> Tensor:
        return views[: len(views) // 2].repeat(2, 1, 1, 1)

    def make_views(*arguments: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
        for step, images, views in make(*arguments):
            yield step, images, twice(views)

    def apply_views(*arguments: Any) -> Tensor:
        return twice(apply(*arguments))

    with (
        mock.patch.object(pretraining, "apply_views", apply_views),
        mock.patch.object(simsiam, "make_views", make_views),
    ):
        yield


def without_crop() -> Any:
    """Views are flipped and change colours, but show the whole image."""
    original = pretraining.draw_views

    def draw_views(images: Tensor, *others: Any) -> dict[str, Tensor]:
        whole = torch.tensor([0.0, 0.0, *images.shape[2:]]).expand(len(images), 4)
        return original(images, *others) | {"boxes": whole}

    return mock.patch.object(pretraining, "draw_views", draw_views)


def frozen_batch_norm() -> Any:
    """BatchNorm is in eval mode while the rest trains."""
    original = nn.Module.train

    def train(module: nn.Module, mode: bool = True) -> nn.Module:
        original(module, mode)
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.training = False
        return module

    return mock.patch.object(nn.Module, "train", train)


def shuffle_labels(split: datasets.Split) -> datasets.Split:
    """Labels that have nothing to do with the images."""
    order = functions.fixed_permutation(len(split)).roll(1)
    return dataclasses.replace(split, labels=split.labels[order])


def repeat_one_image(split: datasets.Split) -> datasets.Split:
    """The same image everywhere."""
    return dataclasses.replace(split, images=split.images[:1].expand_as(split.images).clone())


def keep_brightness_only(split: datasets.Split) -> datasets.Split:
    """Each image is one grey all over: its mean."""
    means = split.images.float().mean((1, 2, 3), keepdim=True).round().to(torch.uint8)
    return dataclasses.replace(split, images=means.expand_as(split.images).clone())


Plant = Callable[[], Any]
Change = Callable[[datasets.Split], datasets.Split]
FAILURES: list[tuple[str, str, dict[str, Any], Plant | None, Change | None]] = [
    ("no stop-gradient", "simsiam", SMALL, without_stop_gradient, None),
    ("no stop-gradient", "simsiam", SMALL | CROP, without_stop_gradient, None),
    ("no stop-gradient", "simsiam", FASHION, without_stop_gradient, None),
    ("no stop-gradient", "simsiam", CIFAR | CROP, without_stop_gradient, None),
    ("no predictor", "simsiam", SMALL, without_predictor, None),
    ("no predictor", "simsiam", FASHION, without_predictor, None),
    ("rate x 30", "simclr", SMALL | {"learning_rate": 1.8}, None, None),
    ("rate x 30", "simclr", FASHION | {"learning_rate": 1.8}, None, None),
    ("rate x 30", "simclr", CIFAR | {"learning_rate": 1.8}, None, None),
    ("rate x 30", "simsiam", SMALL | {"learning_rate": 3.0}, None, None),
    ("rate x 30", "simsiam", CIFAR | CROP | {"learning_rate": 3.0}, None, None),
    ("equal views", "simclr", SMALL, equal_views, None),
    ("equal views", "simsiam", FASHION, equal_views, None),
    ("no crop", "simclr", CIFAR, without_crop, None),
    ("no crop", "simsiam", SMALL | CROP, without_crop, None),
    ("shuffled labels", "simclr", SMALL, None, shuffle_labels),
    ("shuffled labels", "simsiam", FASHION | {"knn_every": 3}, None, shuffle_labels),
    ("temperature 0.001", "simclr", SMALL | {"temperature": 0.001}, None, None),
    ("temperature 100", "simclr", FASHION | {"temperature": 100.0}, None, None),
    ("batch of 4", "simclr", SMALL | {"batch_size": 4, "epochs": 20}, None, None),
    ("frozen BatchNorm", "simclr", SMALL, frozen_batch_norm, None),
    ("frozen BatchNorm", "simsiam", CIFAR | CROP, frozen_batch_norm, None),
    ("one image", "simclr", SMALL, None, repeat_one_image),
    ("images of one grey", "simsiam", FASHION | CROP, None, keep_brightness_only),
]
DEMO = {"crop_scale_min": 0.35, "flip_probability": 0.0, "temperature": 0.2}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("simclr", {"encoder": "small", "epochs": 50}),
    ("simclr", SMALL),
    ("simclr", SMALL | {"seed": 1}),
    ("simclr", SMALL | {"temperature": 0.1}),
    ("simclr", SMALL | {"views": 4, "epochs": 30}),
    ("simclr", SMALL | {"loss": "dcl"}),
    ("simclr", SMALL | {"batch_size": 256, **DEMO}),
    ("simclr", SMALL | {"optimizer": "adam", "learning_rate": 1e-3}),
    ("simclr", SMALL | {"projection": "linear", "warmup_epochs": 5}),
    ("simclr", FASHION | {"epochs": 10}),
    ("simclr", FASHION | {"epochs": 10, "temperature": 0.1, "seed": 1}),
    ("simclr", CIFAR | {"epochs": 10}),
    ("simclr", CIFAR | {"epochs": 10, "batch_size": 64, "temperature": 0.1, "seed": 1}),
    ("simsiam", SMALL),
    ("simsiam", SMALL | {"seed": 1, "batch_size": 256}),
    ("simsiam", SMALL | CROP),
    ("simsiam", SMALL | CROP | {"head": "paper", "epochs": 10}),
    ("simsiam", FASHION | {"epochs": 10}),
    ("simsiam", FASHION | CROP | {"epochs": 10, "seed": 1}),
    ("simsiam", CIFAR | CROP | {"epochs": 10}),
    ("simsiam", CIFAR | CROP | {"epochs": 5, "head": "paper", "learning_rate": 0.03}),
    ("moco", SMALL | QUEUE),
    ("moco", SMALL | QUEUE | {"symmetric": True, "seed": 1, "epochs": 30}),
    ("moco", FASHION | QUEUE | {"epochs": 3}),
    ("moco", CIFAR | QUEUE | {"epochs": 5}),
]


@functools.cache
def images_of(name: str) -> datasets.ImageData:
    """A data set, or the first of its shuffled training images."""
    data, count = functions.load_images(name, common.ROOT / "data"), IMAGES[name]
    if count is None:
        return data
    train = data.train.select(functions.fixed_permutation(len(data.train))[:count])
    return dataclasses.replace(data, train=train).with_statistics()


def run(
    planted: str, script: str, settings: dict[str, Any], plant: Plant | None, change: Change | None
) -> dict[str, Any]:
    """Train, and say what the verdict was in each epoch."""
    settings = {"dataset": "digits", "knn_every": 5, **settings}
    if script == "simsiam":
        settings = {"learning_rate": 0.1, **settings}  # the default when the table was begun
    data = images_of(settings["dataset"])
    if change is not None:
        data = dataclasses.replace(data, train=change(data.train)).with_statistics()
    finish = pretraining.Pretraining._finish_epoch
    trained = settings["epochs"] // 10 if planted else settings["epochs"]

    def finish_epoch(training: Any, epoch: int, seconds: float) -> None:
        finish(training, epoch, seconds)
        rows[:] = training.history
        if planted and len(rows) == trained:
            raise FirstTenthDoneError

    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(functions, "load_images", return_value=data),
        mock.patch.object(pretraining.Pretraining, "_finish_epoch", finish_epoch),
        plant() if plant else contextlib.nullcontext(),
    ):
        module, verdict = SCRIPTS[script], "good"
        where = {"output_dir": folder, "stages": "pretrain", "device": "cpu"}
        try:
            module.main(module.Config(**settings, **where))
        except FirstTenthDoneError:
            pass
        except Diverged:
            verdict = "the loss is not finite"
    blamed = [row for row in rows if row["verdict"] != "good"]
    if blamed:
        verdict, epoch = blamed[0]["verdict"], blamed[0]["epoch"]
    else:
        epoch = "" if verdict == "good" else len(rows) + 1
    loss = f"{rows[-1]['loss']:.4f}" if rows else ""
    about = {"verdict": verdict, "epoch": epoch, "loss": loss, "trained": trained}
    return about | {"epochs": settings["epochs"]}


def main() -> None:
    """Do the runs that the table lacks, and count."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    table = files.read_csv(PATH, dict.fromkeys((*COLUMNS, "seconds", "hardware"), str))
    done = {tuple(row[name] for name in COLUMNS[:4]) for row in table}
    good: list[Any] = [("", script, settings, None, None) for script, settings in GOOD]
    for planted, script, settings, *how in FAILURES + good:
        data = settings.get("dataset", "digits")
        rest = {name: value for name, value in settings.items() if name != "dataset"}
        shown = " ".join(f"{name}={value}" for name, value in rest.items())
        about = dict(zip(COLUMNS, (planted, script, Path(data).name, shown), strict=False))
        if tuple(about.values()) in done:
            continue
        began = time.perf_counter()
        about |= run(planted, script, settings, *how)
        about["seconds"] = f"{time.perf_counter() - began:.1f}"
        about["hardware"] = devices.hardware("cpu")
        table.append(about)
        PATH.parent.mkdir(parents=True, exist_ok=True)
        files.write_csv(PATH, table, (*COLUMNS, "seconds", "hardware"))
    for row in table:
        found = f"{row['verdict']} in epoch {row['epoch']}" if row["epoch"] else row["verdict"]
        print(f"{row['planted'] or 'good':20} {row['script']:8} {row['data']:16} {found}")
    caught = [row["verdict"] != "good" for row in table if row["planted"]]
    blamed = [row["verdict"] != "good" for row in table if not row["planted"]]
    print(f"{sum(caught)} of {len(caught)} failures caught, {sum(blamed)} of {len(blamed)} blamed")


if __name__ == "__main__":
    main()
