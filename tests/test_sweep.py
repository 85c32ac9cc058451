"""Sweeps of objectives that cost nothing: how trials are counted, stopped, retried and shared."""

import contextlib
import functools
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch

from support import runs, sweep
from support.errors import Diverged, UserError

ABOUT = {"space": {"x": [0, 1]}}


def make_config(**changes) -> sweep.SweepConfig:
    return sweep.SweepConfig(**{"trials": 4, "max_epochs": 3, **changes})


def run(folder: Path, make_objective, pruner=None, **changes) -> list[optuna.trial.FrozenTrial]:
    with sweep.open_sweep(make_config(**changes), folder, ABOUT, pruner=pruner) as search:
        search.run(make_objective)
        return search.study.get_trials()


def states(trials) -> list[str]:
    return [trial.state.name for trial in trials]


def parabola(trial) -> float:
    return trial.suggest_float("x", -1, 1) ** 2


def make_parabola():
    return parabola


def make_colleague(folder: Path):
    """For workers: two of them begin before one has finished its first trial."""

    def objective(trial):
        x = trial.suggest_float("x", -1, 1)
        trial.report(x, 0)
        trial.set_user_attr("process", os.getpid())
        trial.set_user_attr("threads", torch.get_num_threads())
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        trial.set_user_attr("answers_ctrl_c", signal.SIGINT not in blocked)
        if trial.number == 2:
            raise Diverged("the loss is nan")
        if trial.number == 3:
            raise optuna.TrialPruned
        (folder / str(os.getpid())).touch()
        until = time.monotonic() + 60
        while len(list(folder.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        return x**2

    return objective


def make_suicide(mark: Path):
    """For workers: the first process that has two trials is killed in the second one."""
    done = []

    def objective(trial):
        x = trial.suggest_float("x", -1, 1)
        done.append(trial.number)
        if len(done) == 2:
            with contextlib.suppress(FileExistsError):
                mark.touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return x**2

    return objective


def make_mistake():
    raise UserError("the data are gone")


def make_late_mistake():
    return lambda trial: make_mistake()


def make_bug():
    return {}["a bug"]


# the value


def test_the_sampler_follows_the_seed(tmp_path):
    values = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        values.append([t.value for t in run(tmp_path / name, make_parabola, trials=2, seed=seed)])
    assert values[0] == values[1] != values[2]


# trials that do not complete


def test_trials_that_fail_for_a_reason_count_and_are_not_run_again(tmp_path):
    def objective(trial):
        trial.suggest_float("x", -1, 1)
        if trial.number == 0:
            raise Diverged("the loss is nan in epoch 1")
        if trial.number == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        if trial.number == 2:
            trial.report(5.0, 0)
            raise optuna.TrialPruned
        return 1.0

    trials = run(tmp_path, lambda: objective)
    assert states(trials) == ["FAIL", "FAIL", "PRUNED", "COMPLETE"]
    assert trials[0].user_attrs == {"reason": "the loss is nan in epoch 1"}
    assert trials[1].user_attrs == {"reason": "out of memory: CUDA out of memory."}
    assert trials[2].value == 5.0
    assert all(map(sweep.is_finished, trials))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_a_stopped_trial_is_run_again_with_its_parameters(tmp_path, kind):
    def stopping(trial):
        trial.suggest_float("x", -1, 1)
        if trial.number == 1:
            raise kind
        return 1.0

    with pytest.raises(kind):
        run(tmp_path, lambda: stopping)
    trials = run(tmp_path, make_parabola)
    assert states(trials) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert [t.user_attrs.get("retry_of") for t in trials] == [None, None, 1, None, None]
    assert trials[2].params == trials[1].params
    assert len({trial.params["x"] for trial in trials}) == 4
    logged = []
    sweep.write_trials(runs.Run(tmp_path, lambda *row: logged.append(row)), trials, "loss", ["x"])
    rows, numbers = zip(*logged, strict=True)
    assert numbers == (0, 1, 2, 3, 4)
    assert [row["retry_of"] for row in rows] == [None, None, 1, None, None]
    assert [row["reason"] for row in rows] == [None, "stopped", None, None, None]
    assert [row["loss"] for row in rows] == [t.value for t in trials]
    assert len((tmp_path / "trials.csv").read_text().splitlines()) == 6


def test_a_trial_of_a_killed_sweep_is_run_again(tmp_path):
    with sweep.open_sweep(make_config(), tmp_path, ABOUT) as search:
        x = search.begin_trial().suggest_float("x", -1, 1)  # and no more: the process is dead
    trials = run(tmp_path, make_parabola, trials=2)
    assert states(trials) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert trials[1].params == {"x": x}


def test_a_retry_that_is_killed_at_once_keeps_its_parameters(tmp_path):
    with sweep.open_sweep(make_config(), tmp_path, ABOUT) as search:
        x = search.begin_trial().suggest_float("x", -1, 1)
    with sweep.open_sweep(make_config(), tmp_path, ABOUT) as search:
        search.begin_trial()
    trials = run(tmp_path, make_parabola, trials=1)
    assert states(trials) == ["FAIL", "FAIL", "COMPLETE"]
    assert [t.user_attrs.get("retry_of") for t in trials] == [None, 0, 1]
    assert trials[2].params == {"x": x}


def test_a_finished_sweep_goes_on_with_more_trials_and_draws_others(tmp_path):
    first = run(tmp_path, make_parabola, trials=2)
    assert states(run(tmp_path, make_bug, trials=2)) == ["COMPLETE"] * 2  # nothing is left to do
    trials = run(tmp_path, make_parabola, trials=5)
    assert [t.params for t in trials[:2]] == [t.params for t in first]
    assert len({trial.params["x"] for trial in trials}) == 5


def test_no_trial_is_started_when_the_time_is_over(tmp_path, monkeypatch):
    clock = [1000.0]

    def objective(trial):
        clock[0] += 40
        return 1.0

    still = SimpleNamespace(**{**vars(time), "time": lambda: clock[0]})
    monkeypatch.setattr(sweep, "time", still)
    trials = run(tmp_path, lambda: objective, trials=10**6, timeout=1)  # a minute
    assert states(trials) == ["COMPLETE"] * 2


def test_a_pruner_stops_a_trial_worse_than_the_others(tmp_path):
    epochs = []

    def objective(trial):
        trial.suggest_float("x", -1, 1)
        for epoch in range(5):
            epochs.append(trial.number)
            trial.report(9.0 if trial.number == 6 else 1.0 + trial.number / 100, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return 1.0

    trials = run(tmp_path, lambda: objective, trials=7, pruner=optuna.pruners.MedianPruner(5, 1))
    assert states(trials)[6] == "PRUNED"
    assert epochs.count(6) == 2  # the first epoch may be bad
    assert states(trials)[0] == "COMPLETE"


# workers


def test_workers_share_the_trials_exactly(tmp_path, capsys):
    (team := tmp_path / "team").mkdir()
    trials = run(tmp_path, functools.partial(make_colleague, team), trials=7, workers=2)
    assert states(trials) == ["COMPLETE", "COMPLETE", "FAIL", "PRUNED", *["COMPLETE"] * 3]
    assert [trial.number for trial in trials] == list(range(7))
    assert trials[2].user_attrs["reason"] == "the loss is nan"
    assert len({trial.user_attrs["process"] for trial in trials} - {os.getpid()}) > 1
    assert {trial.user_attrs["threads"] for trial in trials} == {1}
    assert not any(trial.user_attrs["answers_ctrl_c"] for trial in trials)
    assert all(
        trial.value == trial.params["x"] ** 2
        for trial in trials
        if trial.value is not None and trial.state.name == "COMPLETE"
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f"{n}/7" for n in range(1, 8)]


def test_a_worker_is_started_where_signals_cannot_be_blocked(monkeypatch):
    """As on Windows."""
    started = []
    process = SimpleNamespace(start=lambda: started.append(True))
    spawn = multiprocessing.context.SpawnContext
    monkeypatch.setattr(spawn, "Process", lambda *_, **__: process)
    monkeypatch.delattr(signal, "pthread_sigmask")
    worker = sweep.Worker(make_parabola, 1)
    assert started
    assert worker.trial is None


def test_a_killed_worker_is_replaced_and_its_trial_run_again(tmp_path):
    make = functools.partial(make_suicide, tmp_path / "mark")
    trials = run(tmp_path, make, trials=5, workers=2)
    (lost,) = [trial for trial in trials if trial.state.name != "COMPLETE"]
    assert not sweep.is_finished(lost)
    (again,) = [trial for trial in trials if trial.user_attrs.get("retry_of") == lost.number]
    assert again.params == lost.params
    assert len(trials) == 6


def fake_worker(exitcode: int) -> type:
    """A worker that has ended when it is listened to."""

    class Ended(SimpleNamespace):
        made = 0

        def __init__(self, *_):
            connection, theirs = multiprocessing.Pipe()
            theirs.close()
            process = SimpleNamespace(join=lambda: None, kill=lambda: None, exitcode=exitcode)
            super().__init__(connection=connection, process=process, trial=None, idle=False)
            Ended.made += 1

    return Ended


@pytest.mark.parametrize(
    ("exitcode", "made", "message"),
    [
        (-9, 6, "5 workers were killed one after the other without finishing a trial"),
        (1, 2, "a worker failed; its error is above"),
    ],
)
def test_workers_are_not_replaced_without_end(
    tmp_path, monkeypatch, user_error, exitcode, made, message
):
    monkeypatch.setattr(sweep, "Worker", fake_worker(exitcode))
    with user_error(message):
        run(tmp_path, make_parabola, workers=2)
    assert sweep.Worker.made <= made


@pytest.mark.parametrize("make", [make_mistake, make_late_mistake])
def test_a_mistake_that_a_worker_finds_ends_the_sweep(tmp_path, user_error, capfd, make):
    with user_error("the data are gone"):
        run(tmp_path, make, workers=2)
    assert "Traceback" not in capfd.readouterr().err


# databases and their addresses


@pytest.mark.parametrize("name", ["what?1", "50%25 x", "a{b}#c", "späß"])
def test_the_study_is_in_its_own_run_folder(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    run(folder, make_parabola, trials=1)
    assert [path.name for path in folder.iterdir()] == ["study.db"]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert len(run(folder, make_parabola, trials=2)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "--trials must be at least 1"),
        ({"max_epochs": 0}, "--max-epochs must be at least 1"),
        ({"workers": 0}, "--workers must be at least 1"),
        ({"timeout": -1.0}, "--timeout"),
        ({"storage": "sqlite://"}, "sqlite:///FILE"),
        ({"storage": "sqlite:///:memory:"}, "sqlite:///FILE"),
        ({"storage": "sqlite:///file:x?mode=memory&uri=true"}, "sqlite:///FILE"),
        ({"storage": "sweep.db"}, "--storage must be a URL"),
        ({"storage": "postgresql+nothing://me:secret@host/x"}, "cannot use the study at host/x"),
        ({"storage": "sqlite:////no/such/folder/x.db"}, "cannot use the study at sqlite:"),
    ],
)
def test_mistakes_are_one_line(tmp_path, user_error, changes, message):
    with user_error(message):
        run(tmp_path, make_bug, **changes)
    assert list(tmp_path.iterdir()) == []


def test_another_study_is_refused(tmp_path, user_error):
    run(tmp_path, make_parabola, trials=1)
    with (
        user_error("'study'", "has space {'x': [0, 1]}, not {'x': [0, 2]}"),
        sweep.open_sweep(make_config(), tmp_path, {"space": {"x": [0, 2]}, "new": 1}),
    ):
        pass


@pytest.mark.parametrize("content", [b"", b"no database" * 1000])
def test_a_damaged_file_is_one_line(tmp_path, user_error, content):
    (tmp_path / "study.db").write_bytes(content)
    with user_error("cannot use the study at", tmp_path / "study.db"):
        run(tmp_path, make_bug, resume=str(tmp_path))


def test_a_database_that_fails_in_the_middle_is_one_line(tmp_path, user_error):
    def objective(trial):
        if trial.number == 1:
            (tmp_path / "study.db").write_bytes(bytes(10_000))
        return 1.0

    with user_error("cannot use the study at", tmp_path / "study.db"):
        run(tmp_path, lambda: objective)


# several machines


def open_twice(tmp_path: Path, stack: contextlib.ExitStack, **changes) -> list[sweep.Sweep]:
    """Two machines with the same study."""
    config = make_config(storage=f"sqlite:///{tmp_path / 'shared.db'}", **changes)
    return [stack.enter_context(sweep.open_sweep(config, tmp_path, ABOUT)) for _ in range(2)]


def test_two_machines_do_not_draw_the_same(tmp_path):
    # Containers may have one host name, and each its process 1.
    with contextlib.ExitStack() as stack:
        searches = open_twice(tmp_path, stack)
        drawn = [search.begin_trial().suggest_float("x", -1, 1) for search in searches]
    assert drawn[0] != drawn[1]


def test_two_machines_begin_no_trial_too_many(tmp_path):
    def take_part():
        with sweep.open_sweep(config, tmp_path, ABOUT) as search:
            barrier.wait()
            search.run(make_parabola)

    config = make_config(storage=f"sqlite:///{tmp_path / 'shared.db'}", trials=6)
    barrier = threading.Barrier(3, timeout=60)
    with sweep.open_sweep(config, tmp_path, ABOUT), ThreadPoolExecutor(3) as executor:
        for done in [executor.submit(take_part) for _ in range(3)]:
            done.result()
    trials = run(tmp_path, make_bug, storage=config.storage, trials=6)
    assert states(trials) == ["COMPLETE"] * 6


def test_a_running_trial_of_another_machine_is_waited_for(tmp_path):
    with contextlib.ExitStack() as stack:
        one, other = open_twice(tmp_path, stack, trials=2)
        trial = one.begin_trial()
        other.begin_trial()
        assert other.begin_trial() is None
        assert not other.is_over()
        one.end_trial(trial, sweep.Outcome("COMPLETE", 1.0))
        assert one.begin_trial() is None


def turn_back_the_clocks(tmp_path: Path) -> None:
    """Let the last signs of life be years ago."""
    with contextlib.closing(sqlite3.connect(tmp_path / "shared.db")) as database:
        database.execute("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00'")
        database.commit()


def test_the_trial_of_a_silent_machine_is_run_by_another(tmp_path):
    with contextlib.ExitStack() as stack:
        silent, other = open_twice(tmp_path, stack, trials=2)
        lost = silent.begin_trial()
        x = lost.suggest_float("x", -1, 1)
        turn_back_the_clocks(tmp_path)
        other.run(make_parabola)
        trials = other.trials()
        assert states(trials) == ["FAIL", "COMPLETE", "COMPLETE"]
        assert trials[1].user_attrs["retry_of"] == 0
        assert trials[1].params == {"x": x}
        # It wakes up again: its trial is no longer its own.
        silent.end_trial(lost, sweep.run_objective(parabola, lost))
        assert states(silent.trials()) == ["FAIL", "COMPLETE", "COMPLETE"]


def test_a_machine_that_dies_while_it_begins_a_trial_is_not_waited_for(tmp_path):
    with contextlib.ExitStack() as stack:
        dying, other = open_twice(tmp_path, stack, trials=1)
        ask = dying.study.ask

        def ask_and_die():
            ask()
            raise SystemExit

        dying.study.ask = ask_and_die
        with pytest.raises(SystemExit):
            dying.begin_trial()
        turn_back_the_clocks(tmp_path)
        other.run(make_parabola)
        assert states(other.trials()) == ["FAIL", "COMPLETE"]


def test_a_machine_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "HEARTBEAT", 0.2)

    def objective(trial):
        turn_back_the_clocks(tmp_path)
        until = time.monotonic() + 60
        with contextlib.closing(sqlite3.connect(tmp_path / "shared.db")) as database:
            look = "SELECT count(*) FROM trial_heartbeats WHERE heartbeat > '2021-01-01'"
            while not database.execute(look).fetchone()[0] and time.monotonic() < until:
                time.sleep(0.05)
        assert other.begin_trial() is None
        return 1.0

    with contextlib.ExitStack() as stack:
        one, other = open_twice(tmp_path, stack, trials=1)
        one.run(lambda: objective)
        assert states(other.trials()) == ["COMPLETE"]
