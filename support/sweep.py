"""A sweep: its study in a database, its trials in this process or in workers, its continuation.

Only the process that opened the study uses the database. A worker is given one trial at a time, and
what its objective calls on the trial is called there; so the number of trials is exact, and a
worker that is killed loses nothing but the trial that it ran.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import multiprocessing.connection
import secrets
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from support import files, pool, progress, report, runs, settings
from support.errors import Diverged, UserError, require
from support.settings import setting

if TYPE_CHECKING:
    import optuna

HEARTBEAT = 30  # seconds between two signs of life in a database that machines share
GRACE = 120  # seconds without one after which a machine's trials are run by others
FREE_ON_RESUME = frozenset({"trials", "timeout", "workers"})

Objective = Callable[[Any], float]  # of an `optuna.Trial`


@dataclass(frozen=True)
class SweepConfig(settings.RunConfig):
    """The settings every sweep has."""

    trials: int = setting(100, "sweep", "finished trials to reach, counting those on disk")
    max_epochs: int = setting(10, "sweep", "at most so many epochs in a trial")
    timeout: float | None = setting(None, "sweep", "minutes after which no trial is started")
    storage: str | None = setting(
        None, "sweep", "URL of a database that several machines share (default: a file)"
    )
    study: str = setting("study", "sweep", "with --storage: name of the study in the database")
    workers: int = setting(1, "sweep", "processes on this machine, each with its share of threads")

    def __post_init__(self) -> None:
        """Check the ranges and the database's address."""
        super().__post_init__()
        for name in ("trials", "max_epochs", "workers"):
            require(getattr(self, name) >= 1, f"{settings.flag(name)} must be at least 1")
        require(
            self.timeout is None or 0 < self.timeout < math.inf,
            "--timeout must be a positive number of minutes",
        )
        if self.storage is not None:
            import sqlalchemy

            try:
                url = sqlalchemy.make_url(self.storage)
            except (sqlalchemy.exc.ArgumentError, ValueError):
                raise UserError("--storage must be a URL, such as sqlite:///sweep.db") from None
            in_memory = url.database in (None, "", ":memory:") or "mode" in url.query
            require(
                url.get_backend_name() != "sqlite" or not in_memory,
                f"--storage {self.storage} ends with the process: name a file, sqlite:///FILE",
            )

    def unread(self) -> dict[str, str]:
        """As `RunConfig.unread`."""
        return super().unread() | ({} if self.storage else {"study": "--storage"})

    def shared_settings(self) -> dict[str, Any]:
        """The settings that every script has, as a trial takes them over: data, device and so on.

        Where the sweep itself lies is not among them.
        """
        names = {field.name for field in dataclasses.fields(settings.RunConfig)}
        return {name: getattr(self, name) for name in names - {"name", "resume"}}


def draw(trial: optuna.trial.BaseTrial, space: Mapping[str, Any]) -> dict[str, Any]:
    """Let the sampler draw a trial's parameters from a space, by name.

    A list holds choices; a pair is a range, on a log scale where it spans more than a factor of
    ten.
    """
    drawn: dict[str, Any] = {}
    for name, choices in space.items():
        if isinstance(choices, tuple):
            low, high = choices
            drawn[name] = trial.suggest_float(name, low, high, log=low > 0 and high / low > 10)
        else:
            drawn[name] = trial.suggest_categorical(name, choices)
    return drawn


@dataclass(frozen=True)
class Outcome:
    """How a trial ended; one that failed without a reason of its own is run again."""

    state: Literal["COMPLETE", "PRUNED", "FAIL"]
    value: float | None = None
    reason: str | None = None


def run_objective(objective: Objective, trial: Any) -> Outcome:
    """Call the objective; a loss that is not finite and a lack of memory are the trial's own."""
    import optuna

    try:
        return Outcome("COMPLETE", objective(trial))
    except optuna.TrialPruned:
        return Outcome("PRUNED")
    except Diverged as error:
        return Outcome("FAIL", reason=str(error))
    except optuna.exceptions.UpdateFinishedTrialError:  # Another machine has ended it.
        return Outcome("FAIL")
    except (MemoryError, RuntimeError) as error:
        if not runs.is_out_of_memory(error):
            raise
        return Outcome("FAIL", reason=f"out of memory: {error}".splitlines()[0])


def is_finished(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial counts: it has a result, or failed for a `reason` of its own.

    One that was stopped or killed has none; it does not count and is run again.
    """
    failed = trial.state.name == "FAIL"
    return "reason" in trial.user_attrs if failed else trial.state.is_finished()


def has_begun(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial runs or counts already."""
    return trial.state.name == "RUNNING" or is_finished(trial)


def parameters_of(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """The parameters that a trial has, or must have when it asks for them."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


# the study


class Sweep:
    """An open study, and the trials that this process and its workers run of it."""

    def __init__(self, config: SweepConfig, study: optuna.Study, storage: Any, plan: Plan):
        import optuna

        self.config, self.study, self.storage, self.plan = config, study, storage, plan
        self.shared = config.storage is not None
        self.running: dict[int, optuna.Trial] = {}  # The keys are the database's.
        self.killed_in_a_row = 0
        self.began = time.time()
        if not self.shared:
            # The run folder is locked: what seems to run was left behind by a process that is dead.
            self.end_running_trials()
            self.requeue_lost_trials()
        # The progress goes into the seed: a continued sweep must not draw the same trials again,
        # nor two machines with one study.
        trials = self.trials()
        machine = secrets.token_hex() if self.shared else ""
        seed = zlib.crc32(f"{config.seed} 0 {len(trials)} {machine}".encode())
        self.study.sampler = optuna.samplers.TPESampler(seed=seed)
        self.finished_before = self.count_finished()

    def trials(self, *states: str) -> list[optuna.trial.FrozenTrial]:
        """The study's trials in these states, without any in all, in order."""
        trials = self.study.get_trials(deepcopy=False)
        return [trial for trial in trials if not states or trial.state.name in states]

    def count_finished(self) -> int:
        """How many trials have finished, on all machines."""
        return sum(map(is_finished, self.trials()))

    def time_spent(self) -> float:
        """The share of `--timeout` that has passed; 0 without one."""
        return (time.time() - self.began) / (60 * (self.config.timeout or math.inf))

    def is_over(self) -> bool:
        """Whether enough trials have finished, or the time is over."""
        return self.time_spent() > 1 or self.count_finished() >= self.config.trials

    def end_running_trials(self) -> None:
        """End the trials that run here, to be run again; in a file of our own these are all."""
        import optuna

        for trial in self.trials("RUNNING"):
            if not self.shared or trial._trial_id in self.running:
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    def requeue_lost_trials(self) -> None:
        """Let each trial that was stopped or killed be run again, with the same parameters."""
        retried = {trial.user_attrs.get("retry_of") for trial in self.trials()}
        for trial in self.trials("FAIL"):
            # A retry that was killed may not have asked for all of its parameters.
            parameters = parameters_of(trial)
            if parameters and not is_finished(trial) and trial.number not in retried:
                self.study.enqueue_trial(parameters, {"retry_of": trial.number})

    def begin_trial(self) -> optuna.Trial | None:
        """Begin a trial; None when those that have finished or run are enough, or time is over."""
        import optuna

        if self.time_spent() > 1:
            return None
        with _alone(self.storage) if self.shared else contextlib.nullcontext():
            optuna.storages.fail_stale_trials(self.study)
            self.requeue_lost_trials()
            # One look at all: a trial may end between two, and would be counted by neither.
            if sum(map(has_begun, self.trials())) >= self.config.trials:
                return None
            if not self.trials("WAITING"):
                fixed = self.plan(self)
                if fixed or self.shared:
                    self.study.enqueue_trial(fixed)
            if self.shared:
                # A trial has a sign of life before it runs: a machine that died between the two
                # would be waited for for ever.
                self.storage.record_heartbeat(self.trials("WAITING")[0]._trial_id)
            with warnings.catch_warnings():
                # Optuna expects its `optimize` to give signs of life; here `_heartbeats` does.
                warnings.simplefilter("ignore")
                trial = self.study.ask()
        self.running[trial._trial_id] = trial
        return trial

    def end_trial(self, trial: optuna.Trial, outcome: Outcome) -> None:
        """Store how a trial ended, and print it when it counts."""
        import optuna

        ended_elsewhere = optuna.exceptions.UpdateFinishedTrialError
        with contextlib.suppress(ended_elsewhere):
            if outcome.reason is not None:
                trial.set_user_attr("reason", outcome.reason)
            state = optuna.trial.TrialState[outcome.state]
            self.study.tell(trial, outcome.value, state, skip_if_finished=True)
        del self.running[trial._trial_id]
        ended = self.trials()[trial.number]
        if is_finished(ended):
            self.killed_in_a_row = 0
            self.print_progress(ended)

    def print_progress(self, trial: optuna.trial.FrozenTrial) -> None:
        """One line: how many have finished, this trial, the best one, the time that is left."""
        done = self.count_finished()
        sign = 1 if self.study.direction.name == "MINIMIZE" else -1
        best = min(self.trials("COMPLETE"), key=lambda trial: sign * trial.value, default=None)
        pace = (time.time() - self.began) / max(1, done - self.finished_before)
        left = progress.format_seconds(pace * max(0, self.config.trials - done))
        value = f"{trial.value:.4f}" if trial.value is not None else "      "
        top = f"best {best.value:.4f} (trial {best.number})" if best else "none complete yet"
        state = f"{trial.number:3} {trial.state.name.lower():8}"
        print(f"{done:4}/{self.config.trials}  trial {state} {value}  {top}  {left} left")

    def run(self, make_objective: Callable[[], Objective]) -> None:
        """Run trials until enough have finished, or until no more are to be started.

        Args:
            make_objective: makes the function to optimise, once per process; workers get it
                pickled.

        Raises:
            UserError: a worker ended with an error, or workers are killed one after the other.
        """
        try:
            with self._heartbeats():
                if self.is_over():
                    return
                if self.config.workers == 1:
                    self._run_here(make_objective())
                else:
                    self._run_in_workers(make_objective)
        finally:
            with contextlib.suppress(*_database_errors()):
                self.storage.remove_session()  # Ctrl-C may have come within a transaction.
                self.end_running_trials()

    def _run_here(self, objective: Objective) -> None:
        while not self.is_over():
            trial = self.begin_trial()
            if trial is None:
                time.sleep(1)  # Other machines run the rest, and may die.
            else:
                self.end_trial(trial, run_objective(objective, trial))

    def _run_in_workers(self, make_objective: Callable[[], Objective]) -> None:
        workers: list[Worker] = []
        try:
            while not self.is_over() or any(worker.trial for worker in workers):
                missing = self.config.trials - self.count_finished()
                while len(workers) < min(self.config.workers, missing) and not self.is_over():
                    workers.append(Worker(make_objective, self.config.workers))
                for worker in workers:
                    if worker.idle and (trial := self.begin_trial()):
                        worker.begin(trial)
                for worker in _heard(workers):
                    try:
                        message = worker.connection.recv()
                    except (EOFError, OSError):
                        workers.remove(worker)
                        self._end_dead_worker(worker)
                    else:
                        self._answer(worker, message)
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.join()

    def _end_dead_worker(self, worker: Worker) -> None:
        """Let the trial of a worker that is dead be run again, unless workers die all the time."""
        worker.process.join()
        if worker.trial is not None:
            self.end_trial(worker.trial, Outcome("FAIL"))
        require(worker.process.exitcode <= 0, "a worker failed; its error is above")
        self.killed_in_a_row += 1
        require(
            self.killed_in_a_row <= 2 * self.config.workers,
            f"{self.killed_in_a_row} workers were killed one after the other without finishing a "
            "trial: if the memory is full, use fewer --workers",
        )

    def _answer(self, worker: Worker, message: Any) -> None:
        """Do what a worker asks for: end its trial, or call a method of it."""
        import optuna

        if isinstance(message, UserError):
            raise message
        if message is None:
            worker.idle = True
        elif isinstance(message, Outcome):
            self.end_trial(worker.trial, message)
            worker.trial, worker.idle = None, True
        else:
            name, arguments, options = message
            try:
                answer = getattr(worker.trial, name)(*arguments, **options)
            except optuna.exceptions.UpdateFinishedTrialError as error:
                answer = error
            worker.send(answer)

    @contextlib.contextmanager
    def _heartbeats(self) -> Iterator[None]:
        """Give other machines a sign of life of each running trial, in a thread."""
        stopped = threading.Event()

        def record() -> None:
            while not stopped.wait(HEARTBEAT):
                with contextlib.suppress(*_database_errors()):  # The trial will meet it, too.
                    for number in list(self.running):
                        self.storage.record_heartbeat(number)

        if self.shared:
            threading.Thread(target=record, daemon=True).start()
        try:
            yield
        finally:
            stopped.set()


Plan = Callable[[Sweep], dict[str, Any]]  # the parameters that the next trial must have


@contextlib.contextmanager
def open_sweep(
    config: SweepConfig,
    folder: Path,
    about: dict[str, Any],
    direction: Literal["minimize", "maximize"] = "minimize",
    pruner: optuna.pruners.BasePruner | None = None,
    plan: Plan = lambda sweep: {},
) -> Iterator[Sweep]:
    """Create or continue the study of a run folder, or that of `config.storage`.

    Args:
        config: the sweep's settings.
        folder: the run folder; without `config.storage` its `study.db` holds the study.
        about: what the study is about, as JSON takes it; it must be the same on resume.
        direction: of the objective.
        pruner: stops hopeless trials early; none without it.
        plan: chooses parameters of the next trial; the sampler draws the others.

    Raises:
        UserError: the database cannot be reached, read or written, at any time while the sweep is
            open, or holds a study of something else.
    """
    place = config.storage.split("@")[-1] if config.storage else str(folder / "study.db")
    try:
        study, storage = _open_study(config, folder, direction, pruner)
        known = study.user_attrs.get("about")
        if known is None:
            study.set_user_attr("about", about)
        study.get_trials()  # What is damaged shows when it is read.
    except Exception as error:  # The address, the driver, the server or the file is to blame.
        raise _in_one_line(place, error) from error
    expected = json.loads(json.dumps(about))
    for key in expected.keys() & (known or {}).keys():
        require(
            known[key] == expected[key],
            f"the study {study.study_name!r} at {place} has {key} {known[key]}, not "
            f"{expected[key]}: start another run, or give --storage another --study",
        )
    try:
        yield Sweep(config, study, storage, plan)
    except _database_errors() as error:
        raise _in_one_line(place, error) from error


def run_sweep(
    config: SweepConfig,
    fingerprint: str,
    about: dict[str, Any],
    make_objective: Callable[[], Objective],
    write_results: Callable[[optuna.Study, runs.Run], dict[str, Any]],
    free: frozenset[str] = frozenset(),
    **options: Any,
) -> dict[str, Any]:
    """Run a sweep in its run folder (or continue it there); return what `write_results` does.

    After Ctrl-C the results so far are written, too.

    Args:
        config: the sweep's settings.
        fingerprint: of the data; like `about` it must be the same on resume.
        about: as in `open_sweep`.
        make_objective: as in `Sweep.run`.
        write_results: writes and prints what the trials have found.
        free: the script's own settings that may change on resume.
        options: the others of `open_sweep`.

    Raises:
        UserError: as `open_run`, `open_sweep` and `Sweep.run` do.
    """
    with runs.open_run(config, fingerprint, FREE_ON_RESUME | free) as run:
        with open_sweep(config, run.folder, about | {"data": fingerprint}, **options) as search:
            try:
                search.run(make_objective)
            except KeyboardInterrupt:
                with contextlib.suppress(UserError):  # All trials may have failed so far.
                    write_results(search.study, run)
                raise
            best = write_results(search.study, run)
        report.write_report(run.folder, type(config))
        runs.print_folder(run.folder)
    return best


def _open_study(
    config: SweepConfig, folder: Path, direction: Any, pruner: optuna.pruners.BasePruner | None
) -> tuple[optuna.Study, Any]:
    import optuna
    import sqlalchemy

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Heartbeats count as experimental in Optuna.
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    options: dict[str, Any] = {}
    if config.storage:
        url = sqlalchemy.make_url(config.storage)
        options = {"heartbeat_interval": HEARTBEAT, "grace_period": GRACE}
    else:
        file = folder.resolve() / "study.db"
        url = sqlalchemy.URL.create("sqlite", database=str(file))  # This escapes `?` and `%`.
        emptied = config.resume and file.exists() and not file.stat().st_size
        require(not emptied, "it is empty: delete it to begin anew")
    kind = url.get_backend_name()
    if kind in ("sqlite", "postgresql", "mysql"):
        # Without a limit in seconds a dead host would hang for minutes.
        name = "timeout" if kind == "sqlite" else "connect_timeout"
        options["engine_kwargs"] = {"connect_args": {name: 10}}
    storage = _make_storage(url.render_as_string(hide_password=False), options)
    if kind == "sqlite":
        with storage.engine.connect() as connection:
            check = connection.exec_driver_sql("PRAGMA integrity_check").scalar()
        require(check == "ok", "damaged")
    study = optuna.create_study(
        storage=storage,
        study_name=config.study if config.storage else "study",
        direction=direction,
        load_if_exists=True,
        pruner=pruner or optuna.pruners.NopPruner(),
    )
    return study, storage


def _make_storage(url: str, options: dict[str, Any]) -> Any:
    import optuna
    import sqlalchemy

    for _ in range(4):
        with contextlib.suppress(sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
            return optuna.storages.RDBStorage(url, **options)
        time.sleep(1)  # Another machine creates the same tables just now.
    return optuna.storages.RDBStorage(url, **options)


@contextlib.contextmanager
def _alone(storage: Any) -> Iterator[None]:
    """Keep other machines from beginning a trial at the same time: both might begin the last one.

    The lock ends with the process that has it. SQLite locks whole files, so it is one beside.
    """
    import sqlalchemy

    engine = storage.engine
    # Nobody else locks this row.
    commands = ["SELECT version_info_id FROM version_info FOR UPDATE"]
    if engine.dialect.name == "sqlite":
        url = engine.url.set(database=f"{engine.url.database}.lock")
        engine = sqlalchemy.create_engine(
            url, connect_args={"timeout": 60}, poolclass=sqlalchemy.NullPool
        )
        commands = ["BEGIN EXCLUSIVE"]
    elif engine.dialect.name == "postgresql":
        # All would wait for a machine that is suspended just now.
        commands.insert(0, "SET LOCAL idle_in_transaction_session_timeout = 60000")
    with engine.begin() as connection:
        for command in commands:
            connection.exec_driver_sql(command)
        yield


def _database_errors() -> tuple[type[Exception], ...]:
    import optuna
    import sqlalchemy

    return (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)


def _in_one_line(place: str, error: Exception) -> UserError:
    """What a database says, say of a full disk."""
    reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
    return UserError(f"cannot use the study at {place}: {reason}")


# the workers


class Worker:
    """A process of this machine that runs a trial at a time, seen from the one with the study."""

    def __init__(self, make_objective: Callable[[], Objective], workers: int):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: Any = context.Process(
            target=_serve, args=(theirs, make_objective, workers), daemon=True
        )
        self.trial: Any = None
        self.idle = False  # It still has to load its data.
        with pool.blocking_ctrl_c():
            self.process.start()
        theirs.close()

    def begin(self, trial: optuna.Trial) -> None:
        """Let it run a trial."""
        self.trial, self.idle = trial, False
        self.send(trial.number)

    def send(self, message: Any) -> None:
        """Send a message; that the worker is dead shows when it is listened to."""
        with contextlib.suppress(OSError):
            self.connection.send(message)


class RemoteTrial:
    """A trial in a worker: its methods are called where the study is."""

    def __init__(self, connection: multiprocessing.connection.Connection, number: int):
        self.connection, self.number = connection, number

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.connection.send((name, arguments, options))
            answer = self.connection.recv()
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call


def _heard(workers: list[Worker]) -> list[Worker]:
    """The workers that have something to say, after a second at most."""
    by_connection: Any = {worker.connection: worker for worker in workers}
    ready = multiprocessing.connection.wait(list(by_connection), timeout=1)
    return [by_connection[connection] for connection in ready]


def _serve(connection: Any, make_objective: Callable[[], Objective], workers: int) -> None:
    """Run the trials that come through the pipe, in a process that ends with its parent."""
    pool.begin_worker(workers)
    with contextlib.suppress(EOFError, ConnectionError):  # The parent may die.
        try:
            objective = make_objective()
            connection.send(None)
            while True:
                trial = RemoteTrial(connection, connection.recv())
                connection.send(run_objective(objective, trial))
        except UserError as error:
            connection.send(error)


# the results


def write_trials(
    run: runs.Run,
    trials: Sequence[optuna.trial.FrozenTrial],
    value: str,
    parameters: Sequence[str],
    attributes: Sequence[str] = (),
) -> None:
    """Write `trials.csv` and log its rows: each trial with its `value`, in the column so named.

    `attributes` are those that the objective has set on the trial, each a column as well.
    `retry_of` is the trial that was stopped or killed and is run again in this one.
    """
    rows = [
        {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            value: trial.value,
            "epochs": len(trial.intermediate_values),
            **{name: trial.params.get(name) for name in parameters},
            **{name: trial.user_attrs.get(name) for name in attributes},
            "seconds": trial.duration.total_seconds() if trial.duration else None,
            "reason": trial.user_attrs.get("reason", None if is_finished(trial) else "stopped"),
            "retry_of": trial.user_attrs.get("retry_of"),
        }
        for trial in trials
        if trial.state.name != "WAITING"
    ]
    files.write_csv(run.folder / "trials.csv", rows)
    for row in rows:
        run.log(row, row["trial"])
