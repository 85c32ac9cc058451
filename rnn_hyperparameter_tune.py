"""Search the hyperparameters of rnn.py with Optuna; PyTorch Lightning runs the trials.

    python rnn_hyperparameter_tune.py --cell gru                          # 100 trials of 10 epochs
    python rnn_hyperparameter_tune.py --cell rnn --dataset digits --trials 10 --max-epochs 3
    python rnn_hyperparameter_tune.py --resume results/rnn_hyperparameter_tune/NAME

A trial is rnn.py's own model, loss, optimizer, data and seed under Lightning's `Trainer`, so its
winner can be trained further by `python rnn.py --config .../best.json`. The validation loss
decides; the test images are never looked at. The study lives in `study.db` of the run folder, so a
stopped sweep goes on with the trials that are left.
"""

from __future__ import annotations

import functools
import logging
import math
import shlex
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

import rnn
from support import (
    datasets,
    devices,
    errors,
    files,
    progress,
    runs,
    settings,
    sweep,
    sweep_figures,
)
from support.errors import require
from support.settings import setting

if TYPE_CHECKING:
    import optuna
    from pytorch_lightning import Callback, LightningModule, Trainer

# What is searched, as `sweep.draw` takes it.
SPACE: dict[str, Any] = {
    "hidden_size": [128, 256, 512],
    "num_layers": [1, 3, 5],
    "l2": [16, 32, 64],
    "l3": [16, 32, 64],
    "learning_rate": (1e-4, 1e-1),  # logarithmic
    "weight_decay": (5e-4, 1e-1),  # logarithmic
    "batch_size": [32, 64, 128, 256],
}
# What later levers of rnn.py bring to the search.
WIDE: dict[str, Any] = {
    "pooling": ["last", "mean"],
    "bidirectional": [False, True],
    "recurrent_init": ["uniform", "orthogonal"],
    "schedule": ["plateau", "cosine"],
}
# Muon's steps have a length of their own, so other rates and decays.
MUON: dict[str, Any] = {"learning_rate": (5e-3, 1e-1), "weight_decay": (1e-2, 1.0)}


@dataclass(frozen=True)
class Config(sweep.SweepConfig):
    """The defaults are the original's sweep, but for `--augmentation`: it had none."""

    SCRIPT = "rnn_hyperparameter_tune"

    cell: Literal["rnn", "lstm", "gru"] = setting("gru", "sweep", "which cell to tune")
    pruner: Literal["median", "hyperband", "none"] = setting(
        "median", "sweep", "how hopeless trials are stopped early"
    )
    space: Literal["original", "wide"] = setting(
        "original",
        "sweep",
        "what is searched; wide: also pooling, directions, orthogonal start, schedule",
    )
    optimizer: Literal["adam", "muon"] = setting(
        "adam", "sweep", "of all trials; muon: with rates and decays of its own"
    )
    train_fraction: float = setting(1.0, "sweep", "share of the training images to use")
    augmentation: Literal["none", "original", "standard"] = setting(
        "standard", "sweep", "as in rnn.py, where it is not searched"
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(0 < self.train_fraction <= 1, "--train-fraction must be above 0, at most 1")

    @property
    def search_space(self) -> dict[str, Any]:
        """What `--space` searches, with the rates of `--optimizer`."""
        space = SPACE | WIDE if self.space == "wide" else SPACE
        return space | MUON if self.optimizer == "muon" else space

    def shared_with_rnn(self) -> dict[str, Any]:
        """The settings that a trial takes over: data, device, precision, seed and so on."""
        own = {"train_fraction": self.train_fraction, "augmentation": self.augmentation}
        return self.shared_settings() | own


def suggest_config(trial: optuna.trial.BaseTrial, config: Config) -> rnn.Config:
    """The `rnn.Config` of a trial: all parameters drawn from the search space."""
    decided = config.shared_with_rnn() | sweep.draw(trial, config.search_space)
    decided |= {"cells": config.cell, "optimizer": config.optimizer, "epochs": config.max_epochs}
    return rnn.Config(**decided)


def load_splits(config: Config) -> tuple[datasets.ImageData, datasets.Split]:
    """`rnn.load_splits` of the sweep's images.

    Raises:
        UserError: the data cannot be used, or are fewer than the largest batch of the search.
    """
    data, validation = rnn.load_splits(rnn.Config(**config.shared_with_rnn(), batch_size=2))
    largest = max(SPACE["batch_size"])
    require(
        len(data.train) >= largest,
        f"there are {len(data.train)} images to train on, fewer than the largest batch of the "
        f"search ({largest}): use more images, or a larger --train-fraction",
    )
    return data, validation


def make_module(
    config: rnn.Config, cell: str, data: datasets.ImageData, validation: datasets.Split
) -> LightningModule:
    """rnn.py's model, loss, optimizer and validation for Lightning's `Trainer`."""
    from pytorch_lightning import LightningModule  # This import takes longer than PyTorch's.

    class RowRNNModule(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = rnn.make_model(config, cell, data)
            self.batches = rnn.Batches(data.train, config, 0)

        def train_dataloader(self) -> rnn.Batches:
            """The batches of rnn.py; one object, which counts its epochs."""
            return self.batches

        def val_dataloader(self) -> list[int]:
            """One step, which goes through all validation images."""
            return [0]

        def configure_optimizers(self) -> Any:
            """rnn.py's optimizer and scheduler."""
            optimizer = rnn.make_optimizer(self.model, config)
            scheduler = rnn.make_scheduler(optimizer, config)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": "validation_loss"},
            }

        def on_train_epoch_start(self) -> None:
            """Begin the epoch's losses."""
            self.losses = progress.EpochLoss(len(self.batches), self.current_epoch + 1, self.device)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            """The loss of one batch; stops the trial when it is not finite."""
            rows, labels = batch
            loss = rnn.loss_function(self.model(rows), labels)
            self.losses.add(loss)
            return loss

        def validation_step(self, batch: int, index: int) -> None:
            """Log the mean loss of all validation images."""
            loss, _ = rnn.evaluate(self.model, validation)
            if not math.isfinite(loss):
                raise errors.Diverged(f"the validation loss is {loss}")
            self.log("validation_loss", loss, batch_size=1)

    return RowRNNModule()


def make_pruning_callback(trial: optuna.Trial) -> Callback:
    """Reports each epoch's validation loss to Optuna and stops a hopeless trial.

    Optuna's own callback does not accept a `pytorch_lightning` Trainer.
    """
    import optuna
    from pytorch_lightning import Callback

    class Pruning(Callback):
        def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
            """Report, then prune when the study's pruner says so."""
            loss = trainer.callback_metrics["validation_loss"].item()
            trial.report(loss, trainer.current_epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

    return Pruning()


def make_trainer(config: rnn.Config, callbacks: list[Callback]) -> Trainer:
    """Lightning's `Trainer` without its bars, logs and checkpoints."""
    from pytorch_lightning import Trainer

    # It would announce devices and products, and warn of what is as it should be here.
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)")
    warnings.filterwarnings("ignore", ".*does not have many workers")
    return Trainer(
        accelerator=devices.pick_device(config.device),
        devices=1,
        precision=devices.pick_precision(config.device, config.precision),
        max_epochs=config.epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def make_pruner(config: Config) -> optuna.pruners.BasePruner:
    """Optuna's pruner of `--pruner`."""
    from optuna import pruners

    if config.pruner == "median":
        return pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    if config.pruner == "hyperband":
        return pruners.HyperbandPruner(1, config.max_epochs)
    return pruners.NopPruner()


class Objective:
    """Trains one trial and returns its last epoch's validation loss. Loads the data once."""

    def __init__(self, config: Config):
        self.config = config
        data, validation = load_splits(config)
        device = devices.pick_device(config.device)
        self.data, self.validation = data.to(device), validation.to(device)

    def __call__(self, trial: optuna.Trial) -> float:
        """Run the trial.

        Raises:
            Diverged: a loss is not finite.
            optuna.TrialPruned: the study's pruner gave the trial up.
        """
        config = suggest_config(trial, self.config)
        module = make_module(config, self.config.cell, self.data, self.validation)
        trainer = make_trainer(config, [make_pruning_callback(trial)])
        try:
            trainer.fit(module)
        except SystemExit as error:
            if error.code != 1:  # This is the code of a signal.
                raise
            raise KeyboardInterrupt from None  # Lightning turns Ctrl-C into exit(1).
        return trainer.callback_metrics["validation_loss"].item()


def main(config: Config) -> dict[str, Any]:
    """Run the sweep until `config.trials` are finished; write and return `best.json`'s content.

    Raises:
        UserError: the data or the storage cannot be used, or every trial failed.
    """
    runs.require_package("optuna", "optuna", "a sweep")
    data, _ = load_splits(config)  # A mistake shows before there is a run folder.
    names = ("cell", "image_size", "max_epochs", "train_fraction", "augmentation", "seed")
    about = {name: getattr(config, name) for name in names} | {"space": config.search_space}
    return sweep.run_sweep(
        config,
        data.fingerprint(),
        about,
        functools.partial(Objective, config),
        functools.partial(write_results, config=config),
        free=frozenset({"pruner"}),
        pruner=make_pruner(config),
    )


def write_results(study: optuna.Study, run: runs.Run, config: Config) -> dict[str, Any]:
    """Write `trials.csv`, `best.json` and the plots; print the top five and how to train the best.

    Raises:
        UserError: there are finished trials, and every one failed.
    """
    trials = study.get_trials()
    folder, names = run.folder, list(config.search_space)
    sweep.write_trials(run, trials, "validation_loss", names)
    finished = sum(map(sweep.is_finished, trials))
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    complete.sort(key=lambda trial: trial.value)
    if not complete:
        require(not finished, f"all {finished} trials failed or were pruned: see trials.csv")
        return {}
    best = {
        "cell": config.cell,
        "augmentation": config.augmentation,
        "optimizer": config.optimizer,
        **complete[0].params,
        "validation_loss": complete[0].value,
        "trial": complete[0].number,
        "trials": finished,
        "epochs": config.max_epochs,
        "train_fraction": config.train_fraction,
    }
    files.write_json(folder / "best.json", best)
    title = f"{config.cell.upper()} sweep on {Path(config.dataset).name}"
    sweep_figures.plot_sweep(study, folder, title, "validation loss", names, complete[0].number)
    print("rank trial    loss  hidden layers  l2  l3      rate     decay batch")
    chosen = (
        "{hidden_size:7} {num_layers:6} {l2:3} {l3:3} {learning_rate:9.2e} {weight_decay:9.2e} "
        "{batch_size:5}"
    )
    for rank, trial in enumerate(complete[:5], 1):
        values = chosen.format(**trial.params)
        print(f"{rank:4} {trial.number:5} {trial.value:7.4f} {values}")
    print("Train the winner with:")
    same = rnn.Config(**config.shared_settings())
    print("  python rnn.py", shlex.join(settings.changed_words(same)), "\\")
    print("    --config", shlex.quote(str(folder / "best.json")))
    return best


if __name__ == "__main__":
    runs.run_script(main, Config, __doc__)
