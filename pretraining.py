"""What the self-supervised scripts share: settings, training, and the stages that follow it.

Views, model and loss are the scripts' own; this module surrounds their steps with order, schedule,
records and checkpoints, and measures the encoder: linear probe, kNN, few labels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

import embedding_page
import functions
from functions import UserError, require, setting


@dataclass(frozen=True)
class PretrainingConfig(functions.TrainingConfig):
    """The settings every self-supervised pretraining has besides, and those of its evaluation."""

    STAGES: ClassVar[tuple[str, ...]] = ("pretrain", "probe", "embed", "study")

    stages: str = setting("pretrain,probe,embed", "run", "what to do; with --resume any part")
    devices: int = setting(1, "run", "processes, one per device, that share each batch")

    encoder: Literal["small", "resnet18", "resnet34", "resnet50"] = setting(
        "resnet18", "model", "small has three convolutions, the ResNets are torchvision's"
    )
    stem: Literal["cifar", "imagenet"] = setting(
        "cifar", "model", "first layer of a ResNet: 3x3 for small images, or the original 7x7"
    )
    width: int = setting(64, "model", "channels of a ResNet's first stage; fewer are cheaper")

    schedule: Literal["cosine", "constant"] = setting(
        "cosine", "training", "learning rate after the warm-up"
    )
    warmup_epochs: int = setting(0, "training", "epochs of linear warm-up")
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
        (0.4, 0.4, 0.4, 0.1), "views", "strength of brightness, contrast, saturation, hue"
    )
    jitter_probability: float = setting(0.8, "views", "probability of the colour jitter")
    grayscale_probability: float = setting(0.1, "views", "probability of losing the colours")
    blur_probability: float = setting(0.0, "views", "probability of a 3x3 Gaussian blur")

    probe_epochs: int = setting(100, "evaluation", "epochs of the linear probe")
    few_labels: int = setting(10, "evaluation", "labels per class of the few-label score; 0: none")
    pixel_baseline: bool = setting(False, "evaluation", "also probe the raw pixels, to compare")
    labels: str = setting(
        "10,100,1000,10000,all", "evaluation", "study: how many labels, of all classes together"
    )
    label_seeds: int = setting(5, "evaluation", "study: draws of the labelled images")
    label_steps: int = setting(2000, "evaluation", "study: optimizer steps of each training")

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(
            self.devices >= 1 and self.batch_size % self.devices == 0,
            f"--batch-size {self.batch_size} does not divide among --devices {self.devices}",
        )
        sides = [] if self.view_size is None else self.view_size.split(",")
        require(
            all(re.fullmatch(" *[1-9][0-9]{0,3} *", side) for side in sides),
            f"--view-size takes whole numbers from 1 to 9,999, not {self.view_size!r}",
        )
        require(
            len(sides) <= self.epochs,
            f"--view-size {self.view_size} has more parts than there are --epochs",
        )
        require(
            not sides or self.encoder != "small",
            "--view-size needs a ResNet, which takes any size",
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
        for name in ("probe_epochs", "label_steps"):
            require(getattr(self, name) >= 1, f"{functions.flag(name)} must be at least 1")
        require(self.label_seeds >= 2, "--label-seeds must be at least 2: it gives the deviation")
        for name in ("warmup_epochs", "knn_every", "keep_every", "few_labels"):
            require(getattr(self, name) >= 0, f"{functions.flag(name)} must not be negative")
        self.label_counts(1)

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

    def label_counts(self, images: int) -> list[int]:
        """The numbers of labels of the study, ascending; those above `images` are left out."""
        parts = [part.strip() for part in self.labels.split(",")]
        good = all(part == "all" or (part.isdecimal() and int(part) > 1) for part in parts)
        require(good, f"--labels takes whole numbers from 2 and all, not {self.labels!r}")
        counts = {images if part == "all" else int(part) for part in parts}
        return sorted(count for count in counts if count <= images)


# Settings of the stages after pretraining: a finished run may be evaluated again with others.
EVALUATION = frozenset(
    {"stages", "probe_epochs", "few_labels", "pixel_baseline"}
    | {"labels", "label_seeds", "label_steps"}
)


def crop_views(
    images: Tensor,
    config: PretrainingConfig,
    generator: functions.Generator,
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
    scale, flip = (config.crop_scale_min, 1.0), config.flip_probability
    views = functions.random_resized_crop(
        functions.to_float(images), size, scale, flip=flip, generator=generator
    )
    if crop_only:
        return views
    views = functions.color_jitter(views, *config.jitter, config.jitter_probability, generator)
    if config.grayscale_probability > 0:
        views = functions.random_grayscale(views, config.grayscale_probability, generator)
    if config.blur_probability > 0:
        views = functions.gaussian_blur(views, 3, (0.1, 2.0), config.blur_probability, generator)
    return views


class Pretraining:
    """Everything about a pretraining but its views, its model and its loss.

    `for images, generator in training.batches():` yields the batches of all epochs that are left;
    its body makes views, embeds them with `training.model`, and ends with `training.step(loss, z)`.
    The views have the side `training.view_size`, None for that of the images. After each epoch:
    `checkpoint.pt`, then a row of `metrics.csv`.

    Args:
        script: whose checkpoints these are.
        model: with an attribute `encoder`.
        optimizer: its first learning rate is the peak of the schedule; parameter groups with
            `fixed=True` keep it.
        train: on the device to compute on.
        config: the settings; with `resume`, the folder's checkpoint is where it goes on.
        folder: the run folder.
        fabric: Lightning Fabric.
        collapse_loss: a loss below this in the first tenth of the epochs is a sign of collapse.
    """

    def __init__(
        self,
        script: str,
        model: Any,
        optimizer: torch.optim.Optimizer,
        train: functions.Split,
        config: PretrainingConfig,
        folder: Path,
        fabric: Any,
        collapse_loss: float = -math.inf,
    ):
        self.script, self.config, self.folder, self.fabric = script, config, folder, fabric
        self.encoder, self.train, self.collapse_loss = model.encoder, train, collapse_loss
        self.mean, self.std = functions.channel_statistics(train.images)
        self.peak = optimizer.param_groups[0]["lr"]
        if fabric.world_size > 1 and fabric.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self._plain, self._optimizer = (model, optimizer), optimizer
        self.model, self.optimizer = fabric.setup(model, optimizer)
        # This process's part of each batch, and of its pairs of views.
        share = config.batch_size // fabric.world_size
        self.part = slice(fabric.global_rank * share, (fabric.global_rank + 1) * share)
        part = torch.arange(config.batch_size)[self.part]
        self.rows = torch.cat((part, part + config.batch_size)).to(fabric.device)  # (2b,)
        self.is_main = fabric.global_rank == 0
        self.start = 0
        self.history: list[dict[str, Any]] = []
        self._warm: float | None = None
        self.view_size: int | None = None
        self.warned = False
        self._z = torch.empty(0, 0)
        if config.resume is not None and (folder / "checkpoint.pt").exists():
            self.start, self.history = functions.restore(
                folder / "checkpoint.pt", script, model, optimizer
            )
            if self.is_main:
                functions.write_csv(folder / "metrics.csv", self.history)
        self.steps = len(train) // config.batch_size  # a smaller last batch is left out
        monitored = config.knn_every > 0 and train.labels is not None
        self.monitor = Monitor(train, self.mean, self.std) if monitored else None

    def batches(self) -> Iterator[tuple[Tensor, functions.Generator]]:
        """This process's uint8 images `(b, C, H, W)`, and a generator for `(2b, C, H, W)` views.

        Both are on the images' device; one process has b = B.

        Raises:
            Diverged: the loss is not finite; the last finished epoch's checkpoint is kept.
        """
        config, device = self.config, self.fabric.device
        total = (config.epochs - self.start) * self.steps * config.batch_size
        quiet = dataclasses.replace(config, logger="none")
        with (
            functions.progress_bar(total, "pretrain", self.is_main) as self.bar,
            functions.metric_logger(config if self.is_main else quiet, self.folder) as self._log,
        ):
            for epoch in range(self.start, config.epochs):
                began = time.perf_counter()
                self.view_size = config.view_side(epoch)
                order = torch.randperm(
                    len(self.train), generator=functions.epoch_generator(config.seed, epoch)
                ).to(device)
                generator = self._shard(
                    functions.epoch_generator(config.seed, epoch, device, stream=1)
                )
                # For draws that steer the host: asking the device for them would wait for it.
                self.host_generator = self._shard(
                    functions.epoch_generator(config.seed, epoch, stream=4)
                )
                self.losses = functions.EpochLoss(self.steps, epoch + 1, device)
                self.model.train()
                for step in range(self.steps):
                    rate = self._set_rate(epoch * self.steps + step)
                    index = order[step * config.batch_size : (step + 1) * config.batch_size]
                    yield self.train.images[index[self.part]], generator
                    self._estimate(epoch, step)
                self._z = self.gather(self._z)
                if self.is_main:
                    self._finish_epoch(epoch, rate, time.perf_counter() - began)

    def _estimate(self, epoch: int, step: int) -> None:
        """Say once, after ten seconds of the first epoch, how long the training will take."""
        if epoch != self.start or not self.is_main:
            return
        if step == 1:  # the first two steps are slow
            self._warm = time.perf_counter()
        elif self._warm is not None and (passed := time.perf_counter() - self._warm) > 10:
            self._warm = None
            seconds = passed / (step - 1) * self.steps * (1 + self._epochs_after(epoch))
            self.bar.write(f"about {functions.format_seconds(seconds)} on this device")
            if seconds > 24 * 3600:
                hint = "use a GPU, fewer --epochs, or a cheaper encoder"
                self.bar.write(f"  {hint} (--stem imagenet, --encoder small)")

    def _epochs_after(self, epoch: int) -> float:
        """The epochs that follow one, counted in its cost: that grows with the views' area."""
        sides = [self.config.view_side(e) or 1 for e in range(epoch, self.config.epochs)]
        return sum((side / sides[0]) ** 2 for side in sides[1:])

    def _shard(self, generator: torch.Generator) -> functions.Generator:
        if self.fabric.world_size == 1:
            return generator
        return functions.Shard(
            generator, self.rows.to(generator.device), 2 * self.config.batch_size
        )

    def gather(self, z: Tensor) -> Tensor:
        """The embeddings `(2B, D)` of all processes, in one process's order, with gradients.

        Args:
            z: `(2b, D)`, this process's; they are the rows `self.rows` of the result.
        """
        if self.fabric.world_size == 1:
            return z
        # (processes, 2b, D): the backward pass sums the gradients that all processes have for z
        parts = self.fabric.all_gather(z, sync_grads=True)
        parts = parts.unflatten(1, (2, -1)).transpose(0, 1)  # (2, processes, b, D)
        return parts.flatten(0, 2)

    def step(self, loss: Tensor, z: Tensor) -> None:
        """Update the weights; `z` `(N, D)` are the embeddings whose spread is recorded.

        `loss` is the mean over this process's share; DDP averages the gradients.
        """
        several = self.fabric.world_size > 1  # all of them see the same loss, and stop together
        self.losses.add(self.fabric.all_reduce(loss.detach()) if several else loss)
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        self.optimizer.step()
        self.bar.update(self.config.batch_size)
        self._z = z.detach()

    def _set_rate(self, step: int) -> float:
        config = self.config
        steps, warmup = config.epochs * self.steps, config.warmup_epochs * self.steps
        rate = functions.scheduled_rate(self.peak, step, steps, warmup, config.schedule)
        for group in self._optimizer.param_groups:
            group["lr"] = self.peak if group.get("fixed") else rate
        return rate

    def _finish_epoch(self, epoch: int, rate: float, seconds: float) -> None:
        config, done = self.config, epoch + 1
        row = {"epoch": done, "loss": self.losses.mean(), "learning_rate": rate}
        row["seconds"] = seconds
        row["images_per_second"] = self.steps * config.batch_size / seconds
        row["embedding_std"] = functions.embedding_std(self._z)
        row["rank_me"] = functions.rank_me(self._z)
        if self.monitor and (done % config.knn_every == 0 or done == config.epochs):
            row["knn_held_out"] = self.monitor.accuracy(self.encoder, self.fabric)
        self.history.append(row)
        state = (self.script, done, *self._plain, self.history, config)
        if config.keep_every and done % config.keep_every == 0:
            # First: a run killed after checkpoint.pt would never come back to this epoch.
            (self.folder / "checkpoints").mkdir(exist_ok=True)
            functions.save_checkpoint(self.folder / "checkpoints" / f"epoch{done}.pt", *state)
        functions.save_checkpoint(self.folder / "checkpoint.pt", *state)
        functions.write_csv(self.folder / "metrics.csv", self.history)
        self._log(row, done)
        self._warn_of_collapse(row)
        if done % max(1, config.epochs // 20) == 0:
            knn = f"  kNN {row['knn_held_out']:.1%}" if "knn_held_out" in row else ""
            left = functions.format_seconds(seconds * self._epochs_after(epoch))
            self.bar.write(
                f"epoch {done:4}/{config.epochs}  loss {row['loss']:.4f}  "
                f"{row['images_per_second']:,.0f} images/s  {left} left{knn}"
            )

    def _warn_of_collapse(self, row: dict[str, float]) -> None:
        spread = row["embedding_std"] * math.sqrt(self._z.shape[1])
        early = row["epoch"] <= max(1, self.config.epochs // 10)
        if not self.warned and (spread < 0.1 or (early and row["loss"] < self.collapse_loss)):
            self.warned = True
            self.bar.write("warning: the embedding collapses: try a lower --learning-rate")
            self.bar.write(
                f"  (epoch {row['epoch']}: loss {row['loss']:.3f}, standard deviation {spread:.0%} "
                "of the sphere's)"
            )


class Monitor:
    """kNN accuracy on training images held out of the bank, so that the test set stays unseen."""

    def __init__(self, train: functions.Split, mean: Tensor, std: Tensor):
        order, fifth = shuffled(len(train)), max(1, len(train) // 5)
        self.queries = train.select(order[:fifth][:5_000])
        self.bank = train.select(order[fifth:][:20_000])
        self.mean, self.std = mean, std

    def accuracy(self, encoder: nn.Module, fabric: Any) -> float:
        """In [0, 1]."""
        bank, queries = (
            functions.extract_features(encoder, split.images, self.mean, self.std, fabric)
            for split in (self.bank, self.queries)
        )
        return functions.knn_accuracy(bank, self.bank.labels, queries, self.queries.labels)


def shuffled(count: int) -> Tensor:
    """The positions of `count` images in a random order that is the same every time."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


Stage = Callable[[Any, functions.ImageData, Any, Path, Any], dict[str, Any] | None]


def run_pretraining(
    script: str,
    config: Any,
    make_model: Callable[[int, int], nn.Module],
    pretrain: Callable[[Any, functions.Split, Any, Path, Any], list[dict[str, float]]],
    stages: Mapping[str, Stage],
    free: frozenset[str],
) -> dict[str, Any]:
    """Load the data, pretrain (or restore a finished run), do the other stages of `config`.

    Args:
        script: its name.
        config: its `Config`.
        make_model: from the images' channels and side to a model with an attribute `encoder`.
        pretrain: trains the model and returns the rows of `metrics.csv`.
        stages: by name; each returns what it adds to `summary.json`.
        free: the settings that may differ when a finished run is evaluated again.

    Returns:
        What `summary.json` holds.

    Raises:
        UserError: data, settings or a run folder that cannot be used.
        Diverged: the loss is not finite.
    """
    require(
        "pretrain" in config.stage_names or config.resume is not None,
        "--stages without pretrain needs --resume RUN_FOLDER",
    )
    data = functions.load_images(
        config.dataset, config.data_dir, config.image_size, config.download_url
    )
    require(
        config.batch_size <= len(data.train),
        f"--batch-size {config.batch_size} is larger than the data set ({len(data.train)} images)",
    )
    processes, nodes = functions.process_layout(config)
    require(
        config.batch_size % (processes * nodes) == 0,
        f"--batch-size {config.batch_size} does not divide among {processes * nodes} processes",
    )
    fabric = functions.make_fabric(config.device, config.precision, processes, nodes)
    # Processes that train alone, like the tasks of an interactive SLURM job, all have folders.
    main_process = processes * nodes == 1 or functions.process_rank() == 0
    channels, height = data.train.images.shape[1:3]
    with contextlib.ExitStack() as stack:
        folder = (
            stack.enter_context(functions.open_run(script, config, free)) if main_process else None
        )
        fabric.launch()
        folder = Path(fabric.broadcast(str(folder)))
        functions.seed_everything(config.seed)
        model: Any = make_model(channels, height)
        model = model.to(fabric.device).to(memory_format=torch.channels_last)
        if main_process:
            print(data)
            print(
                f"{type(model).__name__} with {config.encoder}, "
                f"{functions.count_parameters(model) / 1e6:.1f} M parameters, on "
                + (f"{fabric.world_size} x " if fabric.world_size > 1 else "")
                + f"{functions.hardware(config.device)} "
                + f"({functions.pick_precision(config.device, config.precision)})"
            )
        data = data.to(fabric.device)
        if "pretrain" in config.stage_names:
            history = pretrain(model, data.train, config, folder, fabric)
            if fabric.world_size > 1:  # what follows is one process's work, with its own BatchNorm
                torch.distributed.destroy_process_group()
            if not main_process:
                return {}
            mean, std = functions.channel_statistics(data.train.images)
            facts = {"encoder": config.encoder, "stem": config.stem, "width": config.width}
            facts |= {"mean": mean.tolist(), "std": std.tolist()}
            # One entry: safetensors writes several in random order.
            functions.save_weights(
                folder / "encoder.safetensors", model.encoder, {"about": json.dumps(facts)}
            )
            title = f"{type(model).__name__} pretraining on {data.name}, {config.encoder}"
            functions.plot_loss(folder / "loss.png", history, title)
        else:
            if not main_process:
                return {}
            epoch, history = functions.restore(folder / "checkpoint.pt", script, model)
            require(
                epoch == config.epochs,
                f"{folder} has finished {epoch} of {config.epochs} epochs: let it finish first, "
                "with pretrain among the --stages",
            )
        if fabric.world_size > 1:
            fabric = functions.make_fabric(config.device, config.precision)
        seconds = sum(row["seconds"] for row in history)
        values = {"final_loss": history[-1]["loss"], "pretrain_seconds": seconds}
        summary = functions.update_summary(folder, values)
        for stage in (stage for stage in stages if stage in config.stage_names):
            if stage != "embed" and not data.classes:
                print(f"{stage} is skipped: it needs labels, and {data.name} has none")
                continue
            began = time.perf_counter()
            values = stages[stage](model, data, config, folder, fabric) or {}
            values[f"{stage}_seconds"] = time.perf_counter() - began
            summary = functions.update_summary(folder, values)
        report(summary, folder)
    return summary


def report(summary: dict[str, Any], folder: Path) -> None:
    """Print the numbers and where everything is."""
    print(f"final loss            {summary['final_loss']:.4f}")
    for key, name in (
        ("linear_probe_accuracy", "linear probe"),
        ("pixel_probe_accuracy", "  on raw pixels"),
        ("knn_accuracy", "kNN"),
        ("few_label_accuracy_encoder", "{} labels per class"),
        ("few_label_accuracy_pixels", "  on raw pixels"),
        ("finetune_accuracy", "fine-tuned"),
    ):
        value = summary.get(key)
        if isinstance(value, dict):
            name = name.format(value["labels_per_class"])
            print(f"{name:21} {value['mean']:.1%} ± {value['sd']:.1%} over {value['draws']} draws")
        elif value is not None:
            print(f"{name:21} {value:.1%}")
    print(f"time                  {functions.format_seconds(summary['seconds'])}")
    functions.print_folder(folder)


def probe_stage(
    model: Any, data: functions.ImageData, config: PretrainingConfig, folder: Path, fabric: Any
) -> dict[str, Any]:
    """Linear probe, kNN, per-class accuracy and the few-label score on the frozen encoder.

    Writes `probe.csv`, `probe.png`, `per_class_accuracy.png`, `confusion_matrix.png`, and the
    probe's classes of the test images to `predictions.npz`.
    """
    mean, std = functions.channel_statistics(data.train.images)
    train, test = (
        functions.extract_features(model.encoder, split.images, mean, std, fabric)
        for split in (data.train, data.test)
    )
    train_labels, test_labels = data.train.labels, data.test.labels
    result = functions.linear_probe(
        train, train_labels, test, test_labels, config.probe_epochs, seed=config.seed
    )
    summary: dict[str, Any] = {
        "linear_probe_accuracy": result.accuracy,
        "knn_accuracy": functions.knn_accuracy(train, train_labels, test, test_labels),
    }
    functions.write_csv(folder / "probe.csv", result.history)
    functions.write_arrays(folder / "predictions.npz", predictions=result.predictions.numpy())
    title = f"Linear probe on the frozen encoder, {data.name}: {result.accuracy:.1%}"
    functions.plot_loss_and_accuracy(folder / "probe.png", result.history, title)
    summary["per_class_accuracy"] = functions.report_classes(
        result.predictions, data, folder, "", f"Linear probe, {data.name}"
    )
    inputs: dict[str, tuple[Tensor, ...]] = {"encoder": (train, test)}
    if config.pixel_baseline:
        inputs["pixels"] = tuple(
            functions.to_float(split.images).flatten(1) for split in (data.train, data.test)
        )
        summary["pixel_probe_accuracy"] = functions.linear_probe(
            inputs["pixels"][0],
            train_labels,
            inputs["pixels"][1],
            test_labels,
            config.probe_epochs,
            seed=config.seed,
        ).accuracy
    if config.few_labels:
        for name, (known, unknown) in inputs.items():
            score, deviation = functions.few_label_accuracy(
                known, train_labels, unknown, test_labels, config.few_labels
            )
            summary[f"few_label_accuracy_{name}"] = {
                "labels_per_class": config.few_labels,
                "mean": score,
                "sd": deviation,
                "draws": 5,
            }
    return summary


def split_to_map(data: functions.ImageData) -> functions.Split:
    """At most 10,000 test images (training images when there are no labels), shuffled."""
    split = data.test or data.train
    return split.select(shuffled(len(split))[:10_000])


def write_map(
    folder: Path,
    data: functions.ImageData,
    features: Tensor,
    coordinates: np.ndarray,
    title: str,
) -> None:
    """Write `embedding.html`: the map of `split_to_map` with the images, to look around in.

    It shows the linear probe's predictions when the probe stage has been done.
    """
    split, predictions = split_to_map(data), None
    path = folder / "predictions.npz"
    if data.test is not None and path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                predictions = file["predictions"][shuffled(len(data.test))[:10_000].numpy()]
        except (OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged: delete it, or do the probe again") from error
    labels = None if split.labels is None else split.labels.cpu().numpy()
    images, path = split.images, folder / "embedding.html"
    embedding_page.write_page(
        path, coordinates, images, features, labels, data.classes, predictions, title
    )
