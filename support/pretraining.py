"""What the pretrainings of the self-supervised scripts share: settings, views and the epochs.

Model, loss and steps are the scripts' own. This module surrounds the steps with order, records and
checkpoints.

B images in a batch, b of them this process's.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from support import (
    augment,
    checkpoints,
    datasets,
    devices,
    encoders,
    files,
    progress,
    runs,
    settings,
    verdict,
)
from support.errors import require
from support.settings import setting


@dataclass(frozen=True)
class PretrainingConfig(settings.TrainingConfig):
    """The settings every self-supervised pretraining has besides, and those of its evaluation."""

    STAGES: ClassVar[tuple[str, ...]] = ("pretrain", "probe", "embed")

    stages: str = setting(
        "pretrain,probe,embed", "run", "what to do; with --resume any part", retired=("study",)
    )
    devices: int = setting(1, "run", "processes, one per device, that share each batch")

    encoder: str = setting(
        "resnet18",
        "model",
        "small (three convolutions), resnet18, resnet34, resnet50 (torchvision's), or timm:NAME",
    )
    stem: Literal["cifar", "imagenet"] = setting(
        "cifar", "model", "first layer of a ResNet: 3x3 for small images, or the original 7x7"
    )
    width: int = setting(64, "model", "channels of a ResNet's first stage; fewer are cheaper")

    weights: str | None = setting(
        None, "model", "start from an encoder.safetensors, or from a state dict of torchvision's"
    )

    schedule: Literal["cosine", "constant"] = setting(
        "cosine", "training", "learning rate after the warm-up"
    )
    warmup_epochs: int = setting(0, "training", "epochs of linear warm-up")
    compile: Literal["auto", "on", "off"] = setting(
        "auto", "run", "torch.compile of model and loss; auto: in a long training on CUDA", "off"
    )
    knn_every: int = setting(
        10, "training", "epochs between kNN checks on held-out training images; 0 for none"
    )
    keep_every: int = setting(
        0, "training", "epochs between checkpoints that are kept in checkpoints/; 0 for none"
    )

    view_size: str | None = setting(
        None,
        "views",
        "side of the views in pixels, to save time; 16,16,24: the last third of the epochs with "
        "larger ones; without it that of the images",
    )
    crop_scale_min: float = setting(0.2, "views", "smallest area of a crop, as a share")
    flip_probability: float = setting(0.5, "views", "probability of a horizontal flip")
    jitter: tuple[float, float, float, float] = setting(
        (0.4, 0.4, 0.4, 0.1),
        "views",
        "strength of brightness, contrast, saturation, hue; the last two for three channels only",
    )
    jitter_probability: float = setting(0.8, "views", "probability of the colour jitter")
    grayscale_probability: float = setting(
        0.1, "views", "probability of losing three channels' colours"
    )
    blur_probability: float = setting(
        0.0, "views", "probability of a Gaussian blur, its kernel a tenth of the side, at least 3"
    )

    evaluate_on: datasets.Part = setting(
        "test",
        "evaluation",
        "validation: a tenth of the training images, to choose settings by; fold-1 to 5: a fifth",
    )
    probe_epochs: int = setting(100, "evaluation", "epochs of the linear probe")
    few_labels: int = setting(10, "evaluation", "labels per class of the few-label score; 0: none")
    pixel_baseline: bool = setting(False, "evaluation", "also probe the raw pixels, to compare")

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(self.devices >= 1, f"--devices must be at least 1, not {self.devices}")
        require(
            self.batch_size % self.devices == 0,
            f"--batch-size {self.batch_size} does not divide among --devices {self.devices}",
        )
        sides = [] if self.view_size is None else self.view_size.split(",")
        require(
            all(re.fullmatch(" *[1-9][0-9]{0,3} *", side) for side in sides),
            f"--view-size takes whole numbers from 1 to 9,999, not {self.view_size!r}",
        )
        require(
            self.blur_probability == 0 or all(int(side) > 1 for side in sides),
            "--blur-probability needs views of 2 pixels or more",
        )
        require(
            len(sides) <= self.epochs,
            f"--view-size {self.view_size} has more parts than there are --epochs",
        )
        encoders.check_name(self.encoder)
        require(
            not sides or self.encoder.startswith("resnet"),
            "--view-size needs a ResNet of torchvision's, which takes any size",
        )
        good = 8 <= self.width <= 1024 and self.width % 8 == 0
        require(good, f"--width must be a multiple of 8 up to 1,024, not {self.width}")
        unknown = set(self.stage_names) - set(self.STAGES)
        require(not unknown, f"--stages knows {','.join(self.STAGES)}, not {self.stages!r}")
        require(0 < self.crop_scale_min <= 1, "--crop-scale-min must be above 0, at most 1")
        require(
            all(0 <= strength < math.inf for strength in self.jitter) and self.jitter[3] <= 0.5,
            f"--jitter takes four numbers, not below 0, hue <= 0.5; not {self.jitter}",
        )
        for name in ("flip", "jitter", "grayscale", "blur"):
            value = getattr(self, f"{name}_probability")
            require(0 <= value <= 1, f"--{name}-probability must be in [0, 1], not {value}")
        require(self.probe_epochs >= 1, "--probe-epochs must be at least 1")
        for name in ("warmup_epochs", "knn_every", "keep_every", "few_labels"):
            require(getattr(self, name) >= 0, f"{settings.flag(name)} must not be negative")
        require(
            self.warmup_epochs < self.epochs,
            f"--warmup-epochs {self.warmup_epochs} must be fewer than --epochs {self.epochs}",
        )

    def unread(self) -> dict[str, str]:
        """As `RunConfig.unread`."""
        return super().unread() | encoders.unread(self.encoder)

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The stages to do."""
        return tuple(name.strip() for name in self.stages.split(","))

    def view_side(self, epoch: int) -> int | None:
        """Side of the views in an epoch, from 0; None for that of the images.

        Each number of `--view-size` holds for an equal part of the epochs.
        """
        if self.view_size is None:
            return None
        sides = [int(side) for side in self.view_size.split(",")]
        return sides[epoch * len(sides) // self.epochs]

    def make_encoder(self, channels: int, image_size: int) -> Any:
        """A new encoder `(B, C, H, W) -> (B, num_features)`, as `encoders.make_encoder` says."""
        return encoders.make_encoder(self.encoder, self.stem, channels, image_size, self.width)


# Settings of the stages after pretraining, and the stage that reads each: a finished run may be
# evaluated again with others.
READ_BY = {
    "probe_epochs": "probe",
    "few_labels": "probe",
    "pixel_baseline": "probe",
    "finetune_epochs": "finetune",
    "embedding": "embed",
}
EVALUATION = frozenset({"stages", *READ_BY})

# Settings of `crop_views`.
CROP_SETTINGS = (
    *("view_size", "crop_scale_min", "flip_probability", "jitter", "jitter_probability"),
    *("grayscale_probability", "blur_probability"),
)


def crop_views(
    images: Tensor,
    config: PretrainingConfig,
    generator: augment.Generator,
    size: int | None = None,
    crop_only: bool = False,
) -> Tensor:
    """Crop, flip, colour jitter, grey and blur with the settings of the group `views`.

    Args:
        images: `(B, C, H, W)`, uint8 or float in [0, 1].
        config: probabilities and strengths.
        generator: on the images' device.
        size: side of the views; without it they are as large as the images.
        crop_only: leave out what changes colours.

    Returns:
        `(B, C, H, W)` in [0, 1].
    """
    return apply_views(images, draw_views(images, config, generator, crop_only), size)


def draw_views(
    images: Tensor, config: PretrainingConfig, generator: augment.Generator, crop_only: bool = False
) -> augment.Draws:
    """The random numbers of `crop_views`, a tensor of B rows for each."""
    scale, flip = (config.crop_scale_min, 1.0), config.flip_probability
    drawn = augment.draw_resized_crop(images, scale, flip, generator)
    if crop_only:
        return drawn
    p = config.jitter_probability
    drawn |= augment.draw_color_jitter(images, *config.jitter, p, generator)
    if config.grayscale_probability > 0:
        drawn |= augment.draw_grayscale(images, config.grayscale_probability, generator)
    if config.blur_probability > 0:
        p = config.blur_probability
        drawn |= augment.draw_gaussian_blur(images, (0.1, 2.0), p, generator)
    return drawn


def apply_views(images: Tensor, drawn: augment.Draws, size: int | None = None) -> Tensor:
    """The views that `draw_views` has drawn."""
    images = datasets.to_float(images)
    height, width = images.shape[2:]
    views = augment.resized_crop(images, drawn["boxes"], size or (height, width), drawn["mirrored"])
    views = augment.apply_color_jitter(views, drawn)
    if "greyed" in drawn:
        views = augment.apply_grayscale(views, drawn)
    if "sigma" not in drawn:
        return views
    kernel = max(3, views.shape[-1] // 10 // 2 * 2 + 1)  # a tenth of the side (SimCLR, appendix A)
    return augment.apply_gaussian_blur(views, drawn, kernel)


class Share:
    """This process's part of each batch, among `fabric.world_size` processes.

    Together they compute what one process would: `part` are the places of its `b` images in a batch
    of B, `rows` `(V b,)` those of their V views among all V B, all first views, then all second.
    """

    def __init__(self, fabric: Any, batch_size: int, views: int = 2):
        self.fabric, self.batch_size, self.views = fabric, batch_size, views
        size = batch_size // fabric.world_size
        self.part = slice(fabric.global_rank * size, (fabric.global_rank + 1) * size)
        rows = torch.arange(views * batch_size).view(views, batch_size)
        self.rows = rows[:, self.part].flatten().to(fabric.device)  # (V b,)

    def generator(self, generator: torch.Generator) -> augment.Generator:
        """A generator that draws for this process's views what `generator` draws for them."""
        if self.fabric.world_size == 1:
            return generator
        return augment.Shard(
            generator, self.rows.to(generator.device), self.views * self.batch_size
        )

    def gather(self, z: Tensor) -> Tensor:
        """The embeddings `(V B, D)` of all processes, in one process's order, with gradients.

        Args:
            z: `(V b, D)`, this process's; they are the rows `self.rows` of the result.
        """
        if self.fabric.world_size == 1:
            return z
        # (processes, V b, D): the backward pass sums the gradients that all processes have for z
        parts = self.fabric.all_gather(z, sync_grads=True)
        parts = parts.unflatten(1, (self.views, -1)).transpose(0, 1)  # (V, processes, b, D)
        return parts.flatten(0, 2)


class Pretraining:
    """What surrounds the steps of a pretraining: order, generators, records, checkpoints.

        for epoch in training.epochs():
            for step, images, generator in training.batches(epoch):
                ...
                training.record(loss, z, views)

    After each epoch: a row of `metrics.csv`, and `checkpoint.pt` if it is due. With `config.resume`
    the epochs are those that the folder's checkpoint leaves; newer rows are made again.

    Args:
        model: with an attribute `encoder`, on the device to compute on.
        optimizer: its first parameter group has the learning rate that is recorded.
        train: on the same device.
        config: the settings.
        run: the open run.
        fabric: Lightning Fabric.
        monitor: with `measure(encoder, z, epoch, last)`, more columns for a row, and `queries`,
            the images that its kNN looks up.
        method: what its loss is when nothing is learned, for the verdict after each epoch.
        views: of how many views of each image `record` is given embeddings.
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        train: datasets.Split,
        config: PretrainingConfig,
        run: runs.Run,
        fabric: Any,
        monitor: Any,
        method: verdict.Method | None = None,
        views: int = 2,
    ):
        self.model, self.optimizer, self.train = model, optimizer, train
        self.config, self.run, self.fabric = config, run, fabric
        self.monitor, self.method = monitor, method or verdict.Method()
        self.share = Share(fabric, config.batch_size, views)
        self.steps = len(train) // config.batch_size  # a smaller last batch is left out
        self.history: list[dict[str, Any]] = []
        some = train.images[:: max(1, len(train) // 1000)]  # a folder's are sorted by class
        self._constant = bool((some == some[:1]).all())
        checkpoint = run.folder / "checkpoint.pt"
        self._saver = checkpoints.Saver(checkpoint, model, optimizer, config)
        if config.resume is not None and checkpoint.exists():
            _, self.history = checkpoints.restore(checkpoint, model, optimizer)
            if fabric.is_global_zero:
                files.write_csv(run.folder / "metrics.csv", self.history)
                if len(self.history) < config.epochs:
                    print(f"goes on after epoch {len(self.history)} of {config.epochs}")

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, from 0.

        Raises:
            Diverged: a loss or a weight is not finite; the last checkpoint is kept.
        """
        config, begin = self.config, len(self.history)
        images = (config.epochs - begin) * self.steps * config.batch_size
        with progress.bar(images, "pretrain", self.fabric.is_global_zero) as self._bar:
            cost = self.steps * (1 + self._epochs_after(begin)) if begin < config.epochs else 0
            self._estimate = progress.Estimate(self._bar, cost)
            for epoch in range(begin, config.epochs):
                began = time.perf_counter()
                self._losses = progress.EpochLoss(self.steps, epoch + 1, self.fabric.device)
                self.model.train()
                devices.seed_network(config.seed, epoch)
                yield epoch
                self._estimate.stop()
                devices.synchronize(self.fabric.device)
                self._finish_epoch(epoch, time.perf_counter() - began)

    def batches(
        self, epoch: int, host: bool = False
    ) -> Iterator[tuple[int, Tensor, augment.Generator]]:
        """The step's number, from 0 over all epochs, this process's images, and a generator.

        The images are uint8 `(b, C, H, W)`, on the device; one process has b = B. The generator is
        for the views of each, on the images' device, or with `host` on the CPU: for numbers that
        steer the host, which would wait for the device to tell them.
        """
        device, seed, size = self.fabric.device, self.config.seed, self.config.batch_size
        order = devices.epoch_order(len(self.train), seed, epoch, device)
        where = ("cpu", devices.HOST_VIEWS) if host else (device, devices.VIEWS)
        generator = self.share.generator(devices.epoch_generator(seed, epoch, *where))
        for step in range(self.steps):
            index = order[step * size : (step + 1) * size]
            images = self.train.images[index[self.share.part]]
            yield epoch * self.steps + step, images, generator

    def rate(self, peak: float, step: int) -> float:
        """The learning rate of a step: linear warm-up to `peak`, then `config.schedule`."""
        steps, warmup = self.config.epochs * self.steps, self.config.warmup_epochs * self.steps
        return progress.scheduled_rate(peak, step, steps, warmup, self.config.schedule)

    def record(self, loss: Tensor, z: Tensor, views: Tensor | None = None) -> None:
        """Take a step's loss, the mean over this process's share, and what it is of.

        Args:
            loss: a scalar.
            z: `(V b, D)`, embeddings of all first views, then of all second views, and so on.
            views: `(V b, C, H, W)`, the views themselves, in the same order.

        Raises:
            Diverged: the loss is not finite.
        """
        several = self.fabric.world_size > 1  # all of them see the same loss, and stop together
        self._loss = self.fabric.all_reduce(loss.detach()) if several else loss.detach()
        self._losses.add(self._loss)
        self._estimate.step()
        self._bar.update(self.config.batch_size)
        self._z, self._views = z.detach(), views

    def _epochs_after(self, epoch: int) -> float:
        """The epochs that follow one, counted in its cost: that grows with the views' area."""
        sides = [self.config.view_side(e) or 1 for e in range(epoch, self.config.epochs)]
        return sum((side / sides[0]) ** 2 for side in sides[1:])

    def _finish_epoch(self, epoch: int, seconds: float) -> None:
        config, done = self.config, epoch + 1
        loss = self._losses.mean()  # in every process: what is not finite must stop all of them
        checkpoints.check_finite(done, self.model, self.optimizer)
        z = self.share.gather(self._z)
        if not self.fabric.is_global_zero:
            return
        row = {
            "epoch": done,
            "loss": loss,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": seconds,
            "images_per_second": self.steps * config.batch_size / seconds,
        }
        began = time.perf_counter()
        row |= self.monitor.measure(self.model.encoder, z, done, done == config.epochs)
        row |= self._judge(row, z)
        row["measure_seconds"] = time.perf_counter() - began
        row["checkpoint_seconds"] = self._saver.seconds  # of the last epoch's save
        self.history.append(row)
        folder = self.run.folder
        if config.keep_every and done % config.keep_every == 0:
            # First: a run killed after checkpoint.pt would never come back to this epoch.
            files.make_folder(folder / "checkpoints")
            kept = folder / "checkpoints" / f"epoch{done}.pt"
            checkpoints.save(kept, done, self.model, self.optimizer, self.history, config)
        self._saver.save(done, self.history)
        files.write_csv(folder / "metrics.csv", self.history)
        self.run.log(row, done)
        self._print_epoch(row)

    def _print_epoch(self, row: dict[str, Any]) -> None:
        """A warning where an epoch is the first with its verdict; a line for each twentieth."""
        done, epochs = row["epoch"], self.config.epochs
        said = {"good", *(before.get("verdict") for before in self.history[:-1])}
        if row["verdict"] not in said:
            reason = verdict.describe(row["verdict"]).partition(": ")[2]
            self._bar.write(f"warning in epoch {done}: {reason}")
        if done % max(1, epochs // 20) == 0:
            knn = f"  kNN {row['knn_held_out']:.1%}" if "knn_held_out" in row else ""
            left = progress.format_seconds(row["seconds"] * self._epochs_after(done - 1))
            self._bar.write(
                f"epoch {done:4}/{epochs}  loss {row['loss']:.4f}  "
                f"{row['images_per_second']:,.0f} images/s  {left} left{knn}"
            )

    def _judge(self, row: dict[str, Any], z: Tensor) -> dict[str, Any]:
        """The columns about the epoch's last step, and the verdict on all epochs."""
        config = self.config
        layers: list[Any] = [m for m in self.model.modules() if hasattr(m, "running_mean")]
        columns: dict[str, Any] = {"last_loss": self._loss.item()}
        if isinstance(self.optimizer, torch.optim.SGD | torch.optim.Adam):
            # LARS keeps its step where the gradient was.
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            columns["gradient_norm"] = torch.nn.utils.get_total_norm(gradients).item()
        columns |= verdict.measure(z, self.share.views, self._views)
        parts = [layer.images for layer in layers if hasattr(layer, "images")]  # MoCo's layers'
        # SyncBatchNorm's pass is that of all processes together.
        shared = any(isinstance(layer, torch.nn.SyncBatchNorm) for layer in layers)
        about = verdict.Circumstances(
            epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            embeddings=len(z),
            size=z.shape[1],
            normalised=min([len(z if shared else self._z) // self.method.passes, *parts]),
            knn_chance=verdict.chance_accuracy(self.train.labels, len(self.monitor.queries)),
            constant=self._constant,
            frozen=any(not layer.training for layer in layers),
        )
        columns["verdict"] = verdict.judge([*self.history, row | columns], self.method, about)
        return columns


def can_compile() -> bool:
    """Whether there is what Triton builds its launcher with: a C compiler and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include"), "Python.h")
    return bool(compiler) and header.exists() and importlib.util.find_spec("triton") is not None


def choose_compiler(config: PretrainingConfig, steps: int, device: torch.device) -> Callable:
    """What `--compile` does to a module or a function of tensors: `torch.compile`, or nothing.

    `auto` compiles on CUDA when there are epochs enough, of so many `steps`, to win back the minute
    that it takes, and a compiler is there. A resumed run does as it began: other kernels round
    otherwise.
    """
    worthwhile = device.type == "cuda" and config.epochs * steps >= 15_000 and can_compile()
    if config.compile == "off" or (config.compile == "auto" and not worthwhile):
        return lambda part: part
    # Not dynamic: a schedule of view sizes would compile for all sizes at once, which is slower.
    return functools.partial(torch.compile, dynamic=False)
