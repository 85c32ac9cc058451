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
import itertools
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import shlex
import signal
import sqlite3
import statistics
import threading
import time
import typing
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

import functions
import rnn
from support import datasets, devices, errors, files, progress, runs, settings
from support.errors import UserError, require
from support.settings import setting

if TYPE_CHECKING:
    import optuna
    import sqlalchemy

SPACE: dict[str, Any] = {
    "hidden_size": [128, 256, 512],
    "num_layers": [1, 3, 5],
    "l2": [16, 32, 64],
    "l3": [16, 32, 64],
    "learning_rate": (1e-4, 1e-1),  # logarithmic
    "weight_decay": (5e-4, 1e-1),  # logarithmic
    "batch_size": [32, 64, 128, 256],
}


def process_name(number: int) -> str:
    """A process of this machine, among those of all machines that work on a study."""
    return f"{platform.node()}:{number}"


PROCESS = process_name(os.getpid())
GRACE = 120  # seconds after which a machine without a heartbeat counts as dead
# What a study is about: on resume it must be the same.
SAME = ("cell", "dataset", "image_size", "max_epochs", "train_fraction", "augmentation", "seed")


@dataclass(frozen=True)
class Config(settings.RunConfig):
    """The defaults are the original's sweep."""

    SCRIPT = "rnn_hyperparameter_tune"

    cell: Literal["rnn", "lstm", "gru"] = setting("gru", "sweep", "which cell to tune")
    trials: int = setting(100, "sweep", "finished trials to reach, counting those on disk")
    max_epochs: int = setting(10, "sweep", "epochs of a trial that is not pruned")
    timeout: float | None = setting(None, "sweep", "minutes after which no trial is started")
    pruner: Literal["median", "hyperband", "none"] = setting(
        "median", "sweep", "how hopeless trials are stopped early"
    )
    train_fraction: float = setting(1.0, "sweep", "share of the training images to use")
    augmentation: Literal["none", "original", "standard"] = setting(
        "standard", "sweep", "as in rnn.py"
    )
    storage: str | None = setting(
        None, "sweep", "URL of a database that several machines share (default: a file)"
    )
    study: str = setting("study", "sweep", "with --storage: name of the study in the database")
    workers: int = setting(1, "sweep", "processes on this machine, each with its share of threads")

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("trials", "max_epochs", "workers"):
            require(getattr(self, name) >= 1, f"{settings.flag(name)} must be at least 1")
        require(0 < self.train_fraction <= 1, "--train-fraction must be above 0, at most 1")
        require(
            self.timeout is None or 0 < self.timeout < math.inf,
            "--timeout must be a positive number of minutes",
        )


def suggest_config(trial: optuna.trial.BaseTrial, config: Config) -> rnn.Config:
    """The `rnn.Config` of a trial: all seven parameters drawn from `SPACE`."""
    drawn: dict[str, Any] = {}
    for name, choices in SPACE.items():
        if isinstance(choices, tuple):
            drawn[name] = trial.suggest_float(name, *choices, log=True)
        else:
            drawn[name] = trial.suggest_categorical(name, choices)
    shared = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(settings.RunConfig)
        if field.name != "resume"
    }
    return rnn.Config(
        **shared,
        **drawn,
        cells=config.cell,
        epochs=config.max_epochs,
        train_fraction=config.train_fraction,
        augmentation=config.augmentation,
    )


class RowRNNModule(LightningModule):
    """rnn.py's model, loss, optimizer and validation for Lightning's `Trainer`."""

    def __init__(
        self, config: rnn.Config, cell: str, data: datasets.ImageData, validation: datasets.Split
    ):
        super().__init__()
        self.config, self.validation = config, validation
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
        optimizer = rnn.make_optimizer(self.model, self.config)
        scheduler = rnn.make_scheduler(optimizer, self.config)
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
        loss, _ = rnn.evaluate(self.model, self.validation)
        if not math.isfinite(loss):
            raise errors.Diverged(f"the validation loss is {loss}")
        self.log("validation_loss", loss, batch_size=1)


class Pruning(Callback):
    """Report each epoch's validation loss to Optuna and stop a hopeless trial.

    Optuna's own callback does not accept a `pytorch_lightning` Trainer.
    """

    def __init__(self, trial: optuna.trial.Trial):
        self.trial = trial

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Report, then prune when the study's pruner says so."""
        import optuna

        self.trial.report(trainer.callback_metrics["validation_loss"].item(), trainer.current_epoch)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def make_trainer(config: rnn.Config, callbacks: list[Callback]) -> Trainer:
    """Lightning's `Trainer` without its bars, logs and checkpoints."""
    for name in ("pytorch_lightning", "lightning_fabric"):  # which announce devices and products
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)")  # Lightning's own
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


def load_splits(config: Config) -> tuple[datasets.ImageData, datasets.Split]:
    """`rnn.load_splits` of the sweep's images.

    Raises:
        UserError: the data cannot be used, or are fewer than the largest batch of the search.
    """
    shared = {field.name for field in dataclasses.fields(settings.RunConfig)} - {"resume"}
    common = {name: getattr(config, name) for name in shared}
    example = rnn.Config(**common, batch_size=2, train_fraction=config.train_fraction)
    data, validation = rnn.load_splits(example)
    largest = max(SPACE["batch_size"])
    require(
        len(data.train) >= largest,
        f"there are {len(data.train)} images to train on, fewer than the largest batch of the "
        f"search ({largest}): use more images, or a larger --train-fraction",
    )
    return data, validation


class Objective:
    """Trains one trial and returns its last epoch's validation loss. Loads the data once."""

    def __init__(self, config: Config):
        self.config = config
        data, validation = load_splits(config)
        device = devices.pick_device(config.device)
        self.data, self.validation = data.to(device), validation.to(device)

    def __call__(self, trial: optuna.trial.Trial) -> float:
        """Run the trial; a failure is recorded with its reason in the trial's `reason`."""
        before = [other for other in trial.study.get_trials() if other.number < trial.number]
        lost = sum(other.state.is_finished() and not is_finished(other) for other in before)
        if trial.number - lost >= self.config.trials:
            raise Surplus
        if self.config.storage:  # first: only trials without a name are watched for want of one
            storage: Any = trial.storage
            storage.record_heartbeat(trial._trial_id)
        trial.set_user_attr("process", PROCESS)
        config = suggest_config(trial, self.config)
        trainer = make_trainer(config, [Pruning(trial)])
        try:
            trainer.fit(RowRNNModule(config, self.config.cell, self.data, self.validation))
        except errors.Diverged as error:
            trial.set_user_attr("reason", str(error))
            raise
        except (MemoryError, RuntimeError) as error:
            if not runs.is_out_of_memory(error):
                raise
            trial.set_user_attr("reason", f"out of memory: {error}".splitlines()[0])
            raise MemoryError(str(error)) from error
        except SystemExit as error:
            if error.code != 1:  # of SIGTERM, say
                raise
            raise KeyboardInterrupt from None  # Lightning turns Ctrl-C into an exit
        return trainer.callback_metrics["validation_loss"].item()


def is_finished(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial counts: it has a result, or failed for a `reason` of its own.

    One that was stopped or killed has none; it does not count and is run again.
    """
    failed = trial.state.name == "FAIL"
    return "reason" in trial.user_attrs if failed else trial.state.is_finished()


def retry(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Let somebody run a lost trial again, with the same parameters."""
    study.enqueue_trial(trial.params, {"retry_of": trial.number})


class Surplus(Exception):
    """Another process has begun the last trial that was missing at the same time."""


def open_study(config: Config, folder: Path) -> optuna.Study:
    """Create or continue the study.

    Raises:
        UserError: the storage cannot be reached or read, or holds a study of something else.
    """
    import optuna
    import sqlalchemy.exc

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats are
    file = folder / "study.db"
    lost = config.resume and not config.storage and file.exists() and not file.stat().st_size
    require(not lost, f"{file} is empty: delete it to begin anew")
    url = config.storage or f"sqlite:///{folder.resolve() / 'study.db'}"
    name = config.study if config.storage else "study"
    pruner = {
        "median": optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
        "hyperband": optuna.pruners.HyperbandPruner(1, config.max_epochs),
        "none": optuna.pruners.NopPruner(),
    }[config.pruner]
    about = {key: getattr(config, key) for key in SAME} | {"space": SPACE}
    about = json.loads(json.dumps(about))
    try:
        storage = open_storage(url, config.storage is not None)
        study = optuna.create_study(
            storage=storage, study_name=name, pruner=pruner, load_if_exists=True
        )
        known = study.user_attrs.get("about")
        if known is None:
            study.set_user_attr("about", about)
        if url.startswith("sqlite:"):
            with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
                require(database.execute("PRAGMA integrity_check").fetchone()[0] == "ok", "damaged")
        study.get_trials()  # what is damaged shows when it is read
    except (
        *(sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, ImportError, RuntimeError, ValueError),
        *(LookupError, TypeError, AttributeError),  # of Optuna, on a damaged file
    ) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"cannot use the study at {url.split('@')[-1]}: {reason}") from error
    for key in about:
        require(
            known in (None, about) or known.get(key) == about[key],
            f"the study {name!r} at {url.split('@')[-1]} has {key} {(known or {}).get(key)}, "
            f"not {about[key]}: start another run, or give --storage another --study",
        )
    return study


def open_storage(url: str, shared: bool) -> optuna.storages.RDBStorage:
    """The database; a shared one notices the trials of machines that have gone silent."""
    import optuna
    import sqlalchemy.exc

    options: dict[str, Any] = {}
    if url.startswith("sqlite"):
        options["engine_kwargs"] = {"connect_args": {"timeout": 10}}
    if shared:
        options |= {"heartbeat_interval": 30, "grace_period": GRACE}
        options["heartbeat_stale_trial_callback"] = retry
    if url.startswith(("postgresql", "mysql")):  # else a dead host hangs for minutes
        options["engine_kwargs"] = {"connect_args": {"connect_timeout": 10}}
    for attempts_left in (4, 3, 2, 1, 0):
        try:
            storage = optuna.storages.RDBStorage(url, **options)
            if url.startswith("sqlite"):
                sqlalchemy.event.listen(storage.engine, "begin", begin_at_once)
            return storage
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
            if not attempts_left:
                raise
            time.sleep(1)  # another machine creates the same tables just now
    raise AssertionError


def begin_at_once(connection: sqlalchemy.Connection) -> None:
    """Lock an SQLite file before a transaction reads, not only before it writes.

    It has no row locks: two processes might read that a trial waits, and both begin it.
    """
    plain = connection.connection.dbapi_connection
    if plain.in_transaction:  # that Ctrl-C has cut off
        plain.rollback()
    connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextlib.contextmanager
def noticing_ctrl_c() -> Iterator[list[int]]:
    """Ctrl-C as usual, and a list that it fills: an exception raised in a callback may get lost."""
    noticed: list[int] = []

    def notice(number: int, frame: Any) -> typing.NoReturn:
        noticed.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, notice)
    try:
        yield noticed
    finally:
        signal.signal(signal.SIGINT, before)


def run_trials(config: Config, folder: Path, number: int, end: float) -> None:
    """Run trials in this process until none is left to begin, or until the time `end`."""
    import optuna

    torch.set_num_threads(max(1, torch.get_num_threads() // config.workers))
    study = open_study(config, folder)
    # Worker and progress go into the seed: a continued sweep must not draw the same trials again,
    # nor two machines with one study.
    seed = f"{config.seed} {number} {len(study.trials)} {PROCESS if config.storage else ''}"
    study.sampler = optuna.samplers.TPESampler(seed=zlib.crc32(seed.encode()))
    began, objective = time.perf_counter(), None

    def report(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if is_finished(trial):
            done = sum(map(is_finished, study.get_trials(deepcopy=False)))
            complete = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
            best = min(complete, key=lambda t: t.value, default=None)
            pace = (time.perf_counter() - began) / max(1, done - before)
            left = progress.format_seconds(pace * max(0, config.trials - done))
            value = f"{trial.value:.4f}" if trial.value is not None else "      "
            top = f"best {best.value:.4f} (trial {best.number})" if best else "none complete yet"
            state = f"{trial.number:3} {trial.state.name.lower():8}"
            print(f"{done:4}/{config.trials}  trial {state} {value}  {top}  {left} left")
        if noticed:
            raise KeyboardInterrupt

    before = sum(map(is_finished, study.get_trials(deepcopy=False)))
    with noticing_ctrl_c() as noticed:
        while trials_to_begin(study, config) and time.time() < end:
            objective = objective or Objective(config)
            try:
                study.optimize(
                    objective,
                    n_trials=1,
                    catch=(errors.Diverged, MemoryError, Surplus),
                    callbacks=[report],
                )
            except Exception as error:
                if noticed:  # Optuna stumbles over an interrupt that comes while it stores a result
                    raise KeyboardInterrupt from None
                if "Cannot tell a FAIL trial" not in f"{error} {error.__context__}":
                    raise
                print("this process was silent for so long that another one ended its trial")


def trials_to_begin(study: optuna.Study, config: Config) -> bool:
    """Whether trials are missing that nobody runs."""
    trials = study.get_trials(deepcopy=False)
    done = sum(map(is_finished, trials))
    waiting, running = (
        sum(trial.state.name == name for trial in trials) for name in ("WAITING", "RUNNING")
    )
    return done < config.trials and (waiting > 0 or done + running < config.trials)


def work(config: Config, folder: Path, number: int, end: float, errors: Any) -> None:
    """`run_trials` as a process of its own, which lives no longer than its parent."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    runs.show_lines_at_once()
    try:
        with storage_errors(config.storage or str(folder / "study.db")):
            run_trials(config, folder, number, end)
    except UserError as error:
        errors.put(str(error))


def main(config: Config) -> dict[str, Any]:
    """Run the sweep until `config.trials` are finished; write and return `best.json`'s content.

    Raises:
        UserError: the data or the storage cannot be used, or every trial failed.
    """
    free = frozenset({"trials", "timeout", "workers", "pruner"})
    data, _ = load_splits(config)  # a mistake shows before there is a run folder
    with (
        runs.open_run(config, data.fingerprint(), free) as run,
        storage_errors(config.storage or str(run.folder / "study.db")),
    ):
        folder = run.folder
        study = open_study(config, folder)
        if config.storage is None:  # nobody else works on this file
            forget(study)
        end = time.time() + 60 * (config.timeout or math.inf)  # for replaced workers, too
        nameless: dict[int, float] = {}
        try:
            while sum(map(is_finished, study.trials)) < config.trials:
                if time.time() > end:
                    break
                if not trials_to_begin(study, config):  # other machines run the rest
                    time.sleep(1)
                    end_silent(study, nameless)
                elif config.workers == 1:
                    run_trials(config, folder, 0, end)
                else:
                    run_workers(config, folder, study, end)
        except KeyboardInterrupt:
            with contextlib.suppress(UserError):  # all have failed so far
                write_results(study, config, run)
            raise
        finally:
            forget(study, None if config.storage is None else [PROCESS])
        best = write_results(study, config, run)
        runs.print_folder(folder)
    return best


@contextlib.contextmanager
def storage_errors(place: str) -> Iterator[None]:
    """Turn what the database says, say of a full disk, into one line."""
    import optuna
    import sqlalchemy.exc

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException = error
        kinds = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)
        while not isinstance(cause, kinds):  # Optuna may stumble over it while it handles it
            if cause.__context__ is None:
                raise
            cause = cause.__context__
        reason = str(cause.__cause__ or cause).splitlines()[0]
        raise UserError(f"cannot use the study at {place.split('@')[-1]}: {reason}") from error


def forget(study: optuna.Study, processes: Sequence[str] | None = None) -> None:
    """End the trials that stopped or killed processes (default: all) left behind, to run again."""
    import optuna

    trials = study.get_trials(deepcopy=False)
    mine = [t for t in trials if processes is None or t.user_attrs.get("process") in processes]
    for trial in mine:
        if trial.state == optuna.trial.TrialState.RUNNING:
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    retried = {trial.user_attrs.get("retry_of") for trial in trials}
    for trial in mine:
        lost = trial.state.name in ("RUNNING", "FAIL") and not is_finished(trial)
        if lost and trial.params and trial.number not in retried:
            retry(study, trial)


def end_silent(study: optuna.Study, nameless: dict[int, float]) -> None:
    """End the trials of machines that have been silent for `GRACE` seconds.

    Optuna knows them by their heartbeat. A machine that died before the first one has not said its
    name either: `nameless` keeps since when such a trial has been seen, by number.
    """
    import optuna

    optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
        since = nameless.setdefault(trial.number, time.monotonic())
        if "process" not in trial.user_attrs and time.monotonic() - since > GRACE:
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)


def run_workers(config: Config, folder: Path, study: optuna.Study, end: float) -> None:
    """Run trials in `config.workers` processes; one that is killed is replaced.

    Raises:
        UserError: a worker ended with an error, or workers are killed one after the other.
    """
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    numbers = itertools.count()
    workers: list[Any] = []
    killed, done = 0, -1

    def start() -> None:
        worker = context.Process(target=work, args=(config, folder, next(numbers), end, errors))
        # Ctrl-C in a terminal reaches all processes; this one answers for its workers.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            worker.start()
            workers.append(worker)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])

    try:
        for _ in range(config.workers):
            start()
        while workers:
            multiprocessing.connection.wait([worker.sentinel for worker in workers])
            for worker in [worker for worker in workers if not worker.is_alive()]:
                workers.remove(worker)
                forget(study, [process_name(worker.pid)])
                if not errors.empty():
                    raise UserError(errors.get())
                require(worker.exitcode <= 0, "a worker failed; its error is above")
                if worker.exitcode < 0 and time.time() < end and trials_to_begin(study, config):
                    now = sum(map(is_finished, study.trials))
                    killed, done = (killed + 1 if now == done else 1), now
                    require(
                        killed <= 2 * config.workers,
                        f"{killed} workers were killed one after the other without finishing a "
                        "trial: if the memory is full, use fewer --workers",
                    )
                    start()
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()
        with contextlib.suppress(KeyboardInterrupt):
            forget(study, [process_name(worker.pid) for worker in workers])


def write_results(study: optuna.Study, config: Config, run: runs.Run) -> dict[str, Any]:
    """Write `trials.csv`, `best.json` and the plots; print the top five and how to train the best.

    Raises:
        UserError: there are finished trials, and every one failed.
    """
    import optuna

    trials = [trial for trial in study.get_trials() if trial.state.name != "WAITING"]
    rows = [
        {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "validation_loss": trial.value,
            "epochs": len(trial.intermediate_values),
            **{name: trial.params.get(name) for name in SPACE},
            "seconds": trial.duration.total_seconds() if trial.duration else None,
            "reason": trial.user_attrs.get("reason", None if is_finished(trial) else "stopped"),
            "retry_of": trial.user_attrs.get("retry_of"),
        }
        for trial in trials
    ]
    folder = run.folder
    files.write_csv(folder / "trials.csv", rows)
    for row in rows:
        run.log(row, row["trial"])
    complete = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    complete.sort(key=lambda trial: trial.value)
    if not complete:
        failed = [trial for trial in trials if is_finished(trial)]
        require(not failed, f"all {len(failed)} trials failed or were pruned: see trials.csv")
        return {}
    best = {
        "cell": config.cell,
        **complete[0].params,
        "augmentation": config.augmentation,
        "validation_loss": complete[0].value,
        "trial": complete[0].number,
        "trials": sum(map(is_finished, trials)),
        "epochs": config.max_epochs,
        "train_fraction": config.train_fraction,
    }
    files.write_json(folder / "best.json", best)
    draw(study, folder, f"{config.cell.upper()} sweep on {Path(config.dataset).name}")
    print("rank trial    loss  hidden layers  l2  l3      rate     decay batch")
    for rank, trial in enumerate(complete[:5], 1):
        p = trial.params
        print(
            f"{rank:4} {trial.number:5} {trial.value:7.4f} {p['hidden_size']:7} {p['num_layers']:6}"
            f" {p['l2']:3} {p['l3']:3} {p['learning_rate']:9.2e} {p['weight_decay']:9.2e}"
            f" {p['batch_size']:5}"
        )
    print("Train the winner with:")
    words = ["--dataset", config.dataset]
    for name in ("image_size", "data_dir", "download_url", "device", "precision", "seed"):
        if (value := getattr(config, name)) != getattr(Config, name):
            words += [settings.flag(name), str(value)]
    print("  python rnn.py", shlex.join(words), "\\")
    print("    --config", shlex.quote(str(folder / "best.json")))
    return best


def draw(study: optuna.Study, folder: Path, title: str) -> None:
    """Draw the sweep: two plots of our own, and Optuna's where they stay legible.

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
    if len(done) > 1:  # these two compare trials
        wanted["param_importances"] = lambda: plots.plot_param_importances(study)
        wanted["parallel_coordinate"] = lambda: plots.plot_parallel_coordinate(
            study, target=lambda trial: min(cap, trial.value), target_name="validation loss"
        )
    for name, plot in wanted.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental, and axes of a single value
            drawn: Any = plot().figure
        drawn.axes[0].set_title("", loc="left")  # one of Optuna's titles is there
        drawn.axes[0].set_title(f"{title}: {name.replace('_', ' ')}")
        if name == "parallel_coordinate":
            for each in drawn.axes:
                each.grid(False)  # its lines look like the worst trials
        drawn.set_size_inches(10, 5)
        with files.atomic_file(folder / f"{name}.png") as temporary:
            drawn.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
        plt.close(drawn)


if __name__ == "__main__":
    runs.run_script(main, Config, __doc__)
