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

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import shlex
import statistics
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

import functions
import rnn
from support import datasets, devices, errors, files, progress, report, runs, settings, sweep
from support.errors import require
from support.settings import setting

if TYPE_CHECKING:
    import optuna
    from pytorch_lightning import Callback, LightningModule, Trainer

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
    "augmentation": ["standard", "strong"],
    "label_smoothing": [0.0, 0.1],
    "schedule": ["plateau", "cosine"],
}


@dataclass(frozen=True)
class Config(sweep.SweepConfig):
    """The defaults are the original's sweep."""

    SCRIPT = "rnn_hyperparameter_tune"

    cell: Literal["rnn", "lstm", "gru"] = setting("gru", "sweep", "which cell to tune")
    space: Literal["original", "wide"] = setting(
        "original", "sweep", "what is searched; wide: also pooling, directions, views and so on"
    )
    train_fraction: float = setting(1.0, "sweep", "share of the training images to use")
    augmentation: Literal["none", "original", "standard", "strong"] = setting(
        "standard", "sweep", "as in rnn.py, where it is not searched"
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(0 < self.train_fraction <= 1, "--train-fraction must be above 0, at most 1")

    @property
    def search_space(self) -> dict[str, Any]:
        """The values of each setting that is searched; a pair is a range, on a log scale."""
        return SPACE | WIDE if self.space == "wide" else SPACE

    def shared_with_rnn(self) -> dict[str, Any]:
        """The settings that a trial takes over: data, device, precision, seed and so on."""
        names = {field.name for field in dataclasses.fields(settings.RunConfig)} - {"resume"}
        shared = {name: getattr(self, name) for name in names}
        return shared | {"train_fraction": self.train_fraction, "augmentation": self.augmentation}


def suggest_config(trial: optuna.trial.BaseTrial, config: Config) -> rnn.Config:
    """The `rnn.Config` of a trial: all parameters drawn from the search space."""
    drawn: dict[str, Any] = {}
    for name, choices in config.search_space.items():
        if isinstance(choices, tuple):
            drawn[name] = trial.suggest_float(name, *choices, log=True)
        else:
            drawn[name] = trial.suggest_categorical(name, choices)
    decided = {**config.shared_with_rnn(), **drawn}
    return rnn.Config(**decided, cells=config.cell, epochs=config.max_epochs)


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
            loss = rnn.training_loss(self.model(rows), labels, config)
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
    fingerprint = data.fingerprint()
    names = ("cell", "image_size", "max_epochs", "train_fraction", "augmentation", "seed")
    about = {name: getattr(config, name) for name in names}
    about |= {"data": fingerprint, "space": config.search_space}
    with (
        runs.open_run(config, fingerprint, sweep.FREE_ON_RESUME) as run,
        sweep.open_sweep(config, run.folder, about) as search,
    ):
        try:
            search.run(functools.partial(Objective, config))
        except KeyboardInterrupt:
            with contextlib.suppress(errors.UserError):  # All trials may have failed so far.
                write_results(search.study, config, run)
            raise
        best = write_results(search.study, config, run)
        report.write_report(run.folder, Config)
        runs.print_folder(run.folder)
    return best


def write_results(study: optuna.Study, config: Config, run: runs.Run) -> dict[str, Any]:
    """Write `trials.csv`, `best.json` and the plots; print the top five and how to train the best.

    Raises:
        UserError: there are finished trials, and every one failed.
    """
    trials = study.get_trials()
    rows = sweep.trial_rows(trials, "validation_loss", list(config.search_space))
    folder = run.folder
    files.write_csv(folder / "trials.csv", rows)
    for row in rows:
        run.log(row, row["trial"])
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    complete.sort(key=lambda trial: trial.value)
    if not complete:
        failed = [trial for trial in trials if sweep.is_finished(trial)]
        require(not failed, f"all {len(failed)} trials failed or were pruned: see trials.csv")
        return {}
    best = {
        "cell": config.cell,
        "augmentation": config.augmentation,
        **complete[0].params,
        "validation_loss": complete[0].value,
        "trial": complete[0].number,
        "trials": sum(map(sweep.is_finished, trials)),
        "epochs": config.max_epochs,
        "train_fraction": config.train_fraction,
    }
    files.write_json(folder / "best.json", best)
    name = functions.plain(Path(config.dataset).name)
    plot_sweep(study, folder, f"{config.cell.upper()} sweep on {name}")
    print("rank trial    loss  hidden layers  l2  l3      rate     decay batch")
    for rank, trial in enumerate(complete[:5], 1):
        line = (
            "{hidden_size:7} {num_layers:6} {l2:3} {l3:3} {learning_rate:9.2e} {weight_decay:9.2e} "
            "{batch_size:5}"
        )
        chosen = line.format(**trial.params)
        print(f"{rank:4} {trial.number:5} {trial.value:7.4f} {chosen}")
    print("Train the winner with:")
    words = ["--dataset", config.dataset]
    for name in ("image_size", "data_dir", "download_url", "device", "precision", "seed"):
        if (value := getattr(config, name)) != getattr(Config, name):
            words += [settings.flag(name), str(value)]
    print("  python rnn.py", shlex.join(words), "\\")
    print("    --config", shlex.quote(str(folder / "best.json")))
    return best


def plot_sweep(study: optuna.Study, folder: Path, title: str) -> None:
    """Plot the sweep: two plots of our own, and Optuna's where they stay legible.

    Diverged trials would squeeze all others into a line, so losses are cut off at one and a half
    times their median.
    """
    import matplotlib
    import optuna.visualization.matplotlib as plots

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trials = [t for t in study.get_trials(deepcopy=False) if t.intermediate_values]
    last = [list(trial.intermediate_values.values())[-1] for trial in trials]
    cap = 1.5 * statistics.median(last)
    colors = {"COMPLETE": functions.TRAIN_COLOR, "PRUNED": functions.TEST_COLOR, "FAIL": "black"}

    history = functions.new_figure(8, 4)
    values = functions.new_figure(8, 4)
    axes, lines = history.subplots(), values.subplots()
    for state, color in colors.items():
        chosen = [(t, loss) for t, loss in zip(trials, last, strict=True) if t.state.name == state]
        for trial, _ in chosen:
            epochs = [step + 1 for step in trial.intermediate_values]
            losses = [min(cap, loss) for loss in trial.intermediate_values.values()]
            label = state.lower() if trial is chosen[0][0] else None
            lines.plot(epochs, losses, color=color, marker=".", alpha=0.5, label=label)
        if chosen:
            dots = zip(*((t.number, min(cap, loss)) for t, loss in chosen), strict=True)
            axes.scatter(*dots, s=14, color=color, label=state.lower())
    done = [trial for trial in trials if trial.state.name == "COMPLETE"]
    best = list(itertools.accumulate((min(cap, trial.value) for trial in done), min))
    numbers = [trial.number for trial in done]
    if done and trials[-1].number > numbers[-1]:
        numbers, best = [*numbers, trials[-1].number], [*best, best[-1]]
    axes.step(numbers, best, where="post", color="#009988", label="best so far")
    highest = max(loss for trial in trials for loss in trial.intermediate_values.values())
    note = f", cut off at {cap:.2f}" if highest > cap else ""
    functions.style_axes(axes, "trial", f"last validation loss{note}")
    functions.style_axes(lines, "epoch", f"validation loss{note}")
    for figure in (history, values):
        figure.suptitle(title)
        figure.legend(frameon=False, loc="outside lower center", ncols=4)
    functions.save_figure(history, folder / "optimization_history.png")
    functions.save_figure(values, folder / "intermediate_values.png")

    wanted = {"timeline": lambda: plots.plot_timeline(study)}
    if len(done) > 1:  # These two compare trials.
        wanted["param_importances"] = lambda: plots.plot_param_importances(study)
        wanted["parallel_coordinate"] = lambda: plots.plot_parallel_coordinate(
            study, target=lambda trial: min(cap, trial.value), target_name="validation loss"
        )
    for name, plot in wanted.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # They are experimental, and dislike a single value.
            drawn: Any = plot().figure
        drawn.axes[0].set_title("", loc="left")  # One of Optuna's titles is there.
        drawn.axes[0].set_title(f"{title}: {name.replace('_', ' ')}")
        if name == "parallel_coordinate":
            for each in drawn.axes:
                each.grid(False)  # Its lines look like the worst trials.
        drawn.set_size_inches(10, 5)
        with files.atomic_file(folder / f"{name}.png") as temporary:
            drawn.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
        plt.close(drawn)


if __name__ == "__main__":
    runs.run_script(main, Config, __doc__)
