"""A recurrent network reads an image row by row: RNN, LSTM and GRU on CIFAR-10, compared.

    python rnn.py                                        # the three cells, 100 epochs each
    python rnn.py --dataset digits --epochs 20           # no download, seconds on a laptop

Each image is a sequence of H steps of C * W values; the output after the last row goes through an
MLP (Linear, BatchNorm, ReLU, Dropout, twice, then Linear). The split into training and validation
images has a seed of its own, so every run and every cell sees the same one. The learning rate
follows the validation loss; the test images are looked at once, after the last epoch. The
settings of docs/row_by_row.md reach 69, 75 and 76 % on a JPEG copy of CIFAR-10, in 3 to 23 minutes
on a CPU core; the original's reach 51, 59 and 61 %.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compare
import functions
from support import (
    augment,
    checkpoints,
    datasets,
    devices,
    encoders,
    files,
    muon,
    progress,
    recurrent,
    report,
    runs,
    settings,
)
from support.errors import UserError, require
from support.settings import setting

CELLS = {"rnn": recurrent.RNN, "lstm": recurrent.LSTM, "gru": recurrent.GRU}
loss_function = F.cross_entropy


@dataclass(frozen=True)
class Config(settings.TrainingConfig, batch_size=64, learning_rate=2.2e-4, weight_decay=5.2e-4):
    """The defaults are the original's hyperparameters, but for `--augmentation`: it had none."""

    SCRIPT = "rnn"

    config: str | None = setting(
        None, "run", "best.json of rnn_hyperparameter_tune.py, whose settings are the defaults"
    )
    cells: str = setting("rnn,lstm,gru", "model", "which of rnn,lstm,gru to train, in this order")
    hidden_size: int = setting(256, "model", "units of the recurrent layers")
    num_layers: int = setting(1, "model", "recurrent layers")
    l2: int = setting(64, "model", "units of the MLP's first layer")
    l3: int = setting(64, "model", "units of the MLP's second layer")
    dropout: float = setting(0.5, "model", "dropout of the MLP")
    bidirectional: bool = setting(False, "model", "read the rows upwards, too")
    pooling: Literal["last", "mean"] = setting(
        "last", "model", "the MLP sees the output after the last row, or the mean over all rows"
    )
    recurrent_init: Literal["uniform", "orthogonal"] = setting(
        "uniform", "model", "first recurrent weights: PyTorch's uniform, or orthogonal"
    )
    optimizer: Literal["adam", "muon"] = setting(
        "adam", "training", "muon: of the recurrent weights; try a rate of 0.02, a decay of 0.1"
    )
    schedule: Literal["plateau", "cosine"] = setting(
        "plateau", "training", "plateau: a tenth of the rate when the validation loss stays"
    )
    patience: int = setting(
        10, "training", "plateau: epochs without a better validation loss before the rate falls"
    )
    train_fraction: float = setting(1.0, "training", "share of the training images to use")
    augmentation: Literal["none", "original", "standard"] = setting(
        "standard", "training", "standard: mirror, small shift; original: flips, rotation, jitter"
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        unknown = set(self.cell_names) - set(CELLS)
        require(not unknown, f"--cells knows {','.join(CELLS)}, not {self.cells!r}")
        require(len(set(self.cell_names)) == len(self.cell_names), "--cells names a cell twice")
        for name in ("hidden_size", "num_layers", "l2", "l3"):
            most = 100 if name == "num_layers" else 65_536
            fits = 1 <= getattr(self, name) <= most
            require(fits, f"{settings.flag(name)} must be at least 1, at most {most:,}")
        require(0 <= self.dropout < 1, f"--dropout must be in [0, 1), not {self.dropout}")
        require(self.patience >= 0, "--patience must not be negative")
        require(
            self.optimizer != "muon" or self.learning_rate >= 1e-3,
            f"--optimizer muon with --learning-rate {self.learning_rate:g}, which is Adam's: "
            "try 0.02, and --weight-decay 0.1",
        )
        require(0 < self.train_fraction <= 1, "--train-fraction must be above 0, at most 1")

    def unread(self) -> dict[str, str]:
        """As `RunConfig.unread`."""
        ignored = {} if self.schedule == "plateau" else {"patience": "--schedule plateau"}
        return super().unread() | ignored

    @property
    def cell_names(self) -> list[str]:
        """The cells to train."""
        return [name.strip() for name in self.cells.split(",")]

    @classmethod
    def to_start_from(cls, arguments: Sequence[str]) -> Any:
        """With `--config` the tuner's best settings; a run to resume keeps what it began with."""
        path = settings.find_flag("--config", arguments)
        if path is None or settings.find_flag("--resume", arguments) is not None:
            return super().to_start_from(arguments)
        return read_best(path)


def rows_from_images(images: Tensor) -> Tensor:
    """Images `(B, C, H, W)` as sequences of rows `(B, H, C * W)`, channel after channel.

    Row r of a 3 x 32 x 32 image is its 32 red, then 32 green, then 32 blue values.
    """
    batch, channels, height, width = images.shape
    return images.transpose(1, 2).reshape(batch, height, channels * width)  # (B, H, C * W)


class RowRNN(nn.Module):
    """A recurrent network over rows, and an MLP on its output.

    That is the output after the last row that each direction reads, or the mean over all rows
    (`--pooling`).
    """

    def __init__(self, config: Config, cell: str, input_size: int, num_classes: int):
        super().__init__()
        hidden, dropout = config.hidden_size, config.dropout
        self.pooling = config.pooling
        self.recurrent = CELLS[cell](
            input_size,
            hidden,
            config.num_layers,
            batch_first=True,
            bidirectional=config.bidirectional,
        )
        if config.recurrent_init == "orthogonal":
            # Orthogonal weights keep gradients alive over many steps (Saxe et al. 2014).
            for name, weights in self.recurrent.named_parameters():
                if name.startswith("weight_hh"):
                    for gate in weights.split(hidden):  # (hidden, hidden)
                        nn.init.orthogonal_(gate)
        layers: list[nn.Module] = []
        outputs = 2 * hidden if config.bidirectional else hidden
        for inputs, units in ((outputs, config.l2), (config.l2, config.l3)):
            layers += [nn.Linear(inputs, units), nn.BatchNorm1d(units), nn.ReLU()]
            layers += [nn.Dropout(dropout)]
        self.mlp = nn.Sequential(*layers, nn.Linear(config.l3, num_classes))

    def forward(self, rows: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of sequences `(B, H, C * W)`."""
        # cuDNN would compute in float16 under CUDA's autocast, without scaling the loss.
        on_gpu = rows.device.type == "cuda"
        with torch.autocast("cuda", enabled=False) if on_gpu else contextlib.nullcontext():
            outputs, _ = self.recurrent(rows)  # (B, H, hidden_size), or of two directions
        if self.pooling == "mean":
            return self.mlp(outputs.mean(1))
        hidden = self.recurrent.hidden_size
        downwards = outputs[:, -1, :hidden]
        upwards = outputs[:, 0, hidden:]  # empty when the rows are read in one direction
        return self.mlp(torch.cat((downwards, upwards), 1))


def make_model(config: Config, cell: str, data: datasets.ImageData) -> RowRNN:
    """The model of `config` for this data, its weights drawn from `config.seed`."""
    channels, _, width = data.train.images.shape[1:]
    devices.seed_everything(config.seed)
    return RowRNN(config, cell, channels * width, len(data.classes))


def make_optimizer(model: Any, config: Config) -> torch.optim.Optimizer:
    """Adam, fused: several times faster than the default on a CPU. Or Muon (Jordan et al. 2024)."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "muon":
        return muon.make_muon(model.recurrent, list(model.parameters()), config)
    return torch.optim.Adam(model.parameters(), rate, weight_decay=decay, fused=True)


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: Config
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate's course of `--schedule`; `step_scheduler` takes it on after each epoch."""
    schedulers = torch.optim.lr_scheduler
    if config.schedule == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, config.epochs)
    return schedulers.ReduceLROnPlateau(optimizer, factor=0.1, patience=config.patience)


def step_scheduler(scheduler: torch.optim.lr_scheduler.LRScheduler, validation_loss: float) -> None:
    """Set the next epoch's learning rate, on a plateau by an epoch's validation loss."""
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step(validation_loss)
    else:
        scheduler.step()


def autocast(config: Config) -> torch.autocast:
    """bfloat16 where `devices.pick_precision` says so, as under Lightning's `Trainer`.

    Each use casts the weights anew: with the cache, the gradient of a recurrent weight would be
    summed over the rows in bfloat16.
    """
    enabled = devices.pick_precision(config.device, config.precision) == "bf16-mixed"
    device = devices.pick_device(config.device)
    return torch.autocast(device, torch.bfloat16, enabled, cache_enabled=False)


def load_splits(config: Config) -> tuple[datasets.ImageData, datasets.Split]:
    """The data with a tenth of the training images taken out, and that tenth for validation.

    All are normalised with the statistics of the images that are left to train on.

    Raises:
        UserError: the data cannot be used, has no labels, or is smaller than a batch.
    """
    data = functions.load_dataset(config)
    require(bool(data.classes), f"{data.name} has no labels: a classifier needs them")
    train, validation = datasets.hold_out(data.train, 0.1, seed=0)
    if config.train_fraction < 1:
        _, train = datasets.hold_out(train, config.train_fraction, seed=1)
    require(
        config.batch_size <= len(train),
        f"--batch-size {config.batch_size} is larger than the training set ({len(train)} images)",
    )
    data = dataclasses.replace(data, train=train).with_statistics()
    return data, validation.with_statistics_of(data.train)


def augmented(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Augment float images `(B, C, H, W)` in [0, 1], each with its own parameters.

    `original` is what the public version of this experiment meant to do; `standard` mirrors and
    shifts by up to a sixteenth of the side (two pixels of 32), at least by one.
    """
    if kind == "original":
        images = augment.random_horizontal_flip(images, 0.5, generator)
        images = augment.random_horizontal_flip(images.mT, 0.5, generator).mT  # vertical
        images = augment.random_rotation(images, 90, generator)
        return augment.color_jitter(images, 0.5, 0.5, 0.5, 0.5, generator=generator)
    if kind == "standard":
        images = augment.random_horizontal_flip(images, 0.5, generator)
        images = augment.random_shift(images, max(1, images.shape[-1] // 16), generator)
    return images


class Batches:
    """The batches of one epoch: `(rows, labels)`, shuffled, augmented, normalised.

    Also seeds torch's global generator, which dropout draws from, so that an epoch depends on
    nothing but `(config.seed, epoch)`. Lightning's `Trainer` takes it as a data loader.
    """

    def __init__(self, split: datasets.Split, config: Config, epoch: int):
        self.split, self.config, self.epoch = split, config, epoch

    def __len__(self) -> int:
        # A smaller last batch is left out: one of a single image has no variance for BatchNorm.
        return len(self.split) // self.config.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device, seed, epoch = self.split.images.device, self.config.seed, self.epoch
        size = self.config.batch_size
        self.epoch += 1  # each pass over this object is another epoch
        devices.seed_network(seed, epoch, devices.ROW_DROPOUT)
        order = devices.epoch_order(len(self.split), seed, epoch, device)  # (N,)
        generator = devices.epoch_generator(seed, epoch, device, devices.VIEWS)
        for step in range(len(self)):
            index = order[step * size : (step + 1) * size]  # (B,)
            images = datasets.to_float(self.split.images[index])  # (B, C, H, W)
            images = augmented(images, self.config.augmentation, generator)
            rows = rows_from_images(self.split.normalize(images))  # (B, H, C * W)
            yield rows, self.split.labels[index]


def evaluate(model: nn.Module, split: datasets.Split) -> tuple[float, Tensor]:
    """Mean loss and predictions `(N,)` in eval mode, without augmentation."""
    parts = []
    with functions.evaluating(model):
        for images in split.images.split(1000):
            parts.append(model(rows_from_images(split.normalize(images))))  # (B, K)
    logits = torch.cat(parts).float()  # (N, K)
    return F.cross_entropy(logits, split.labels).item(), logits.argmax(1)


def train(
    model: nn.Module,
    cell: str,
    splits: tuple[datasets.Split, datasets.Split],
    config: Config,
    run: runs.Run,
    history: list[dict[str, Any]],
) -> None:
    """Train one cell until `config.epochs`, from the folder's checkpoint when it is the cell's.

    Args:
        model: of the cell, on the images' device.
        cell: its name.
        splits: training and validation images.
        config: the settings.
        run: its folder gets `checkpoint.pt` and a row of `metrics.csv` after each epoch.
        history: the rows of all cells so far; this cell's are appended.

    Raises:
        Diverged: the loss is not finite; the last checkpoint is kept.
    """
    training, validation = splits
    optimizer = make_optimizer(model, config)
    scheduler = make_scheduler(optimizer, config)
    checkpoint = run.folder / "checkpoint.pt"
    finished = [row for row in history if row["cell"] == cell]
    if finished:
        # The checkpoint holds no scheduler: it follows from the losses that it has seen.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch expects a step of the optimizer before
            for row in finished:
                step_scheduler(scheduler, row["validation_loss"])
        # The replay sets a learning rate, so what the checkpoint says of it must come afterwards.
        checkpoints.restore(checkpoint, model, optimizer)
    batches = Batches(training, config, len(finished))
    saver = checkpoints.Saver(checkpoint, model, optimizer, config)
    size, device = config.batch_size, training.images.device
    with progress.bar((config.epochs - len(finished)) * len(batches) * size, cell) as bar:
        for epoch in range(len(finished), config.epochs):
            began = time.perf_counter()
            losses = progress.EpochLoss(len(batches), epoch + 1, device)
            correct = torch.zeros((), dtype=torch.long, device=device)
            model.train()
            for rows, labels in batches:
                with autocast(config):
                    logits = model(rows)  # (B, K)
                    loss = loss_function(logits, labels)
                losses.add(loss)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                correct += (logits.argmax(1) == labels).sum()
                bar.update(size)
            row = {"cell": cell, "epoch": epoch + 1, "train_loss": losses.mean()}
            row["train_accuracy"] = correct.item() / (len(batches) * size)
            with autocast(config):
                row["validation_loss"], predictions = evaluate(model, validation)
            row["validation_accuracy"] = functions.accuracy(predictions, validation.labels)
            row["learning_rate"] = optimizer.param_groups[0]["lr"]
            devices.synchronize(device)
            row["seconds"] = time.perf_counter() - began
            row["checkpoint_seconds"] = saver.seconds  # of the last epoch's save
            step_scheduler(scheduler, row["validation_loss"])
            history.append(row)
            checkpoints.check_finite(epoch + 1, model, optimizer)
            saver.save(epoch + 1, history)
            files.write_csv(run.folder / "metrics.csv", history)
            run.log({f"{cell}_{name}": value for name, value in row.items()}, epoch + 1)
            if (epoch + 1) % max(1, config.epochs // 20) == 0:
                left = progress.format_seconds(row["seconds"] * (config.epochs - epoch - 1))
                bar.write(
                    f"{cell:4} epoch {epoch + 1:3}/{config.epochs}  loss {row['train_loss']:.4f}  "
                    f"validation {row['validation_loss']:.4f} "
                    f"{row['validation_accuracy']:.1%}  {left} left"
                )


def main(config: Config) -> dict[str, Any]:
    """Train the cells of `config`, compare them, and return what `summary.json` holds.

    For each cell `<cell>_final_loss`, `<cell>_validation_accuracy`, `<cell>_test_accuracy` and
    `<cell>_per_class_accuracy`, all of the last epoch, accuracies in [0, 1].

    Raises:
        UserError: data, settings or a run folder that cannot be used.
        Diverged: the loss is not finite.
    """
    device = devices.pick_device(config.device)
    data, validation = load_splits(config)
    with runs.open_run(config, data.fingerprint()) as run:
        checkpoint = run.folder / "checkpoint.pt"
        history: list[dict[str, Any]] = []
        if config.resume is not None and checkpoint.exists():
            history = checkpoints.load(checkpoint)["history"]
            files.write_csv(run.folder / "metrics.csv", history)
        print(data)
        print(f"{len(validation):,} images of the training set are kept for validation")
        data, validation = data.to(device), validation.to(device)
        begun = list(dict.fromkeys(row["cell"] for row in history))
        summary: dict[str, Any] = {}
        for cell in config.cell_names:
            if cell in begun[:-1]:
                continue  # it was trained and evaluated before the next cell began
            model = make_model(config, cell, data).to(device)
            print(
                f"{cell}: {encoders.count_parameters(model):,} parameters, "
                f"on {devices.hardware(config.device)}"
            )
            with checkpoints.advice_on_divergence():
                train(model, cell, (data.train, validation), config, run, history)
            with autocast(config):
                _, predictions = evaluate(model, data.test)
            values = report_cell(model, cell, data, predictions, run.folder, history)
            summary = run.summarize(values, config.epochs)
        if len(config.cell_names) > 1:
            cells = compare.read_run(run.folder)
            names = [cell.cell.upper() for cell in cells]
            compare.plot_curves([[cell] for cell in cells], names, run.folder / "comparison.png")
        print(f"{'cell':6}{'validation':>12}{'test':>8}{'time':>9}")
        for cell in config.cell_names:
            print(
                f"{cell:6}{summary[f'{cell}_validation_accuracy']:12.1%}"
                f"{summary[f'{cell}_test_accuracy']:8.1%}"
                f"{progress.format_seconds(summary[f'{cell}_seconds']):>9}"
            )
        report.write_report(run.folder, Config)
        runs.print_folder(run.folder)
    return summary


def report_cell(
    model: nn.Module,
    cell: str,
    data: datasets.ImageData,
    predictions: Tensor,
    folder: Path,
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    """Save a trained cell's weights and pictures; return what it adds to `summary.json`.

    Args:
        model: the cell's, after the last epoch.
        cell: its name.
        data: whose test images are scored.
        predictions: `(N,)`, the classes that the model gives to the test images.
        folder: of the run.
        history: the rows of all cells so far.
    """
    checkpoints.save_weights(folder / f"{cell}.safetensors", model, {"cell": cell})
    rows = [row for row in history if row["cell"] == cell]
    test_accuracy = functions.accuracy(predictions, data.test.labels)
    title = f"{cell.upper()} on {data.name}, row by row"
    accuracies = functions.report_classes(predictions, data, folder, f"{cell}_", title)
    functions.plot_loss_and_accuracy(folder / f"{cell}.png", rows, title, "validation")
    return {
        f"{cell}_final_loss": rows[-1]["train_loss"],
        f"{cell}_validation_loss": rows[-1]["validation_loss"],
        f"{cell}_validation_accuracy": rows[-1]["validation_accuracy"],
        f"{cell}_test_accuracy": test_accuracy,
        f"{cell}_per_class_accuracy": accuracies,
        f"{cell}_seconds": sum(row["seconds"] for row in rows),
    }


def read_best(path: str) -> Config:
    """The settings that the tuner's `best.json` decides, all others at their defaults.

    Raises:
        UserError: the file is missing or damaged.
    """
    best = files.read_json(Path(path))
    model = ("hidden_size", "num_layers", "l2", "l3")
    training = ("learning_rate", "weight_decay", "batch_size", "augmentation")
    for name in ("cell", *model, *training):
        require(name in best, f"{path} lacks {name!r}: it is no result of the tuner")
    later = ("optimizer", "pooling", "bidirectional", "recurrent_init", "schedule")
    decided = {name: best[name] for name in (*model, *training, *later) if name in best}
    try:
        return Config(config=path, cells=best["cell"], **decided)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from error


if __name__ == "__main__":
    runs.run_script(main, Config, __doc__)
