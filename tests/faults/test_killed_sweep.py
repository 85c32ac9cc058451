"""Sweeps whose workers are killed, which are interrupted, or whose study file is spoiled."""

import contextlib
import os
import random
import re
import signal
import sqlite3
import subprocess
import threading
import time
from pathlib import Path

import optuna
import pytest
from commands import Command, Commands, last_words, table

from rnn_hyperparameter_tune import SPACE
from support.sweep import is_finished

pytestmark = pytest.mark.slow

TRIALS = int(os.environ.get("FAULT_SWEEP_TRIALS", "40"))
COUNT = int(os.environ.get("FAULT_COUNT", "1000"))
REPEATS = int(os.environ.get("FAULT_SWEEP_REPEATS", min(20, max(2, COUNT // 50))))
SEED = int(os.environ.get("FAULT_SEED", "0"))
WORKERS = 4
FLAGS = ["--dataset", "digits", "--device", "cpu", "--cell", "rnn", "--max-epochs", "2"]
FLAGS += ["--train-fraction", "0.2", "--name", "run"]
SCRIPT = "rnn_hyperparameter_tune.py"


class Sweep:
    """A sweep's process, whose lines are kept as they come."""

    def __init__(self, command: Command):
        self.process = command.process
        self.lines: list[str] = []
        self.errors: list[str] = []
        pipes = ((self.process.stdout, self.lines), (self.process.stderr, self.errors))
        self.readers = [
            threading.Thread(target=lines.extend, args=(pipe,)) for pipe, lines in pipes
        ]
        for reader in self.readers:
            reader.start()

    def trials(self) -> list[tuple[int, str]]:
        """Number and state of each trial that was reported as ended."""
        found = (re.match(r" *\d+/\d+  trial +(\d+) (\w+)", line) for line in list(self.lines))
        return [(int(match[1]), match[2]) for match in found if match]

    def workers(self) -> list[int]:
        """The worker processes that live."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (path / "stat").read_text().rsplit(")", 1)[1].split()
                mine = words[0] != "Z" and int(words[1]) == self.process.pid
                if mine and b"spawn_main" in (path / "cmdline").read_bytes():
                    found.append(int(path.name))
        return found

    def wait_for_trials(self, count: int, seconds: float = 300) -> bool:
        """Wait until so many are reported; whether the sweep still runs."""
        until = time.monotonic() + seconds
        while len(self.trials()) < count and self.process.poll() is None:
            assert time.monotonic() < until, f"no trial after {seconds} s"
            time.sleep(0.02)
        return self.process.poll() is None

    def finish(self, seconds: float = 900) -> tuple[int, str]:
        """Wait for the end: exit code and errors."""
        code = self.process.wait(seconds)
        for reader in self.readers:
            reader.join(60)  # a worker that outlives the sweep keeps the pipes open
        return code, "".join(self.errors)


@pytest.fixture
def commands(tmp_path):
    made = Commands(tmp_path)
    yield made
    for command in made.started:  # its workers may live longer than it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.process.pid, signal.SIGKILL)


def arguments(commands: Commands, trials: int, workers: int = WORKERS) -> list[str]:
    """A first start of the sweep, or its continuation."""
    folder = run_folder(commands)
    if (folder / "config.json").exists():
        return [SCRIPT, "--resume", str(folder)]
    return [SCRIPT, *FLAGS, "--trials", str(trials), "--workers", str(workers)]


def run_folder(commands: Commands) -> Path:
    return commands.folder / "results" / "rnn_hyperparameter_tune" / "run"


def trials_of(commands: Commands) -> list[optuna.trial.FrozenTrial]:
    url = f"sqlite:///{run_folder(commands) / 'study.db'}"
    return optuna.load_study(study_name="study", storage=url).get_trials()


def alive(processes: list[int], seconds: float) -> list[int]:
    """Those that still live after so long; zombies do not."""
    until = time.monotonic() + seconds
    while True:
        left = []
        for number in processes:
            with contextlib.suppress(OSError):
                state = Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0]
                left += [number] if state != "Z" else []
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.1)


def error_line(errors: str) -> str:
    """The one line that says what ended a command."""
    (line,) = last_words(errors)
    return line


def problems(commands: Commands, reported: list[tuple[int, str]], wanted: int) -> list[str]:
    """What is wrong with a study that should hold `wanted` finished trials."""
    trials = trials_of(commands)
    found = problems_of(trials, wanted)
    if len(set(reported)) != len(reported):
        found.append("a trial was reported twice")
    for number, state in reported:  # what was said to be done is not lost afterwards
        if trials[number].state.name.lower() != state:
            found.append(f"trial {number} was {state}, is {trials[number].state.name.lower()}")
    rows = table(run_folder(commands) / "trials.csv", "seconds")
    if [(int(row["trial"]), row["state"].upper()) for row in rows] != [
        (trial.number, trial.state.name) for trial in trials
    ]:
        found.append("trials.csv does not hold these trials")
    return found


def problems_of(trials: list[optuna.trial.FrozenTrial], wanted: int) -> list[str]:
    """What is wrong with the trials of a study that should hold `wanted` finished ones."""
    finished = [trial for trial in trials if is_finished(trial)]
    found = []
    if len(finished) != wanted:
        found.append(f"{len(finished)} finished trials, not {wanted}")
    if not all(trial.state.is_finished() for trial in trials):
        found.append("a trial is left running or waiting")
    if [trial.number for trial in trials] != list(range(len(trials))):
        found.append("the trials are not numbered one after the other")
    for trial in finished:
        failed = trial.state == optuna.trial.TrialState.FAIL
        if failed and not re.search(
            "the .*loss is|out of memory", trial.user_attrs.get("reason", "")
        ):
            found.append(f"trial {trial.number} counts as failed, for no reason of its own")
    if len({str(trial.params) for trial in finished}) != len(finished):
        found.append("a trial was run twice")
    retries = [trial for trial in trials if "retry_of" in trial.user_attrs]
    if len({trial.user_attrs["retry_of"] for trial in retries}) != len(retries):
        found.append("a trial has two retries")
    for trial in retries:
        first = trials[trial.user_attrs["retry_of"]]
        # One that was killed, too, may not have got as far as the first.
        params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        if is_finished(first) or not first.params.items() <= params.items():
            found.append(f"trial {trial.number} is no retry of trial {first.number}")
    return found


@pytest.mark.parametrize("repeat", range(REPEATS))
def test_workers_that_are_killed_lose_no_trial(commands, repeat):
    numbers = random.Random(f"sweep {SEED} {repeat}")
    reported, kills, wrong = [], 0, []
    for _ in range(10):  # the command is repeated until it has finished
        sweep, seen = Sweep(commands.start(arguments(commands, TRIALS))), 0
        # A kill every few seconds, but not before a trial has ended since the last one: a machine
        # that takes longer than that to start a worker would never finish any.
        while sweep.wait_for_trials(seen + 1):
            with contextlib.suppress(subprocess.TimeoutExpired):
                sweep.process.wait(numbers.uniform(0.5, 3))
            if victims := sweep.workers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(numbers.choice(victims), signal.SIGKILL)
                    kills += 1
            seen = len(sweep.trials())
        code, errors = sweep.finish()
        reported += sweep.trials()
        if "Traceback" in errors:
            wrong.append(errors)
        if code == 0:
            break
    print(f"{kills} kills")
    assert code == 0
    assert kills > 0 or TRIALS < WORKERS
    assert wrong + problems(commands, reported, TRIALS) == []


def test_another_machine_takes_over_the_trial_of_a_killed_one(commands):
    # Optuna does that 120 s after the last heartbeat; here the clocks are turned back.
    path = commands.folder / "shared.db"
    shared = [SCRIPT, *FLAGS[:-2], "--trials", "8", "--storage", f"sqlite:///{path}"]
    first = Sweep(commands.start(shared))
    assert first.wait_for_trials(1)
    for _ in range(100):  # until it is found in the middle of a trial, not of a write
        os.kill(first.process.pid, signal.SIGSTOP)
        if turn_back_the_clocks(path):
            break
        os.kill(first.process.pid, signal.SIGCONT)
        time.sleep(0.1)
    else:
        pytest.fail("no trial runs")
    first.process.kill()
    first.finish()
    code, errors = Sweep(commands.start(shared)).finish()
    assert code == 0, errors
    assert "Traceback" not in errors, errors
    study = optuna.load_study(study_name="study", storage=f"sqlite:///{path}")
    assert problems_of(study.get_trials(), 8) == []
    assert any("retry_of" in trial.user_attrs for trial in study.get_trials())


# The trials whose parameters are all drawn, so that a retry has something to repeat.
TRAINING = f"""
    SELECT trial_id FROM trials JOIN trial_params USING (trial_id) WHERE state = 'RUNNING'
    GROUP BY trial_id HAVING count(*) = {len(SPACE)}
"""


def turn_back_the_clocks(path: Path) -> bool:
    """Whether a trial is trained, and no stopped process holds the lock of the file."""
    with (
        contextlib.suppress(sqlite3.OperationalError),
        contextlib.closing(sqlite3.connect(path, timeout=1)) as database,
    ):
        if database.execute(TRAINING).fetchall():
            database.execute("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00'")
            database.commit()
            return True
    return False


@pytest.mark.parametrize("moment", ["loading", "running", "later"])
def test_ctrl_c_on_all_workers_leaves_no_trial_running(commands, moment):
    sweep = Sweep(commands.start(arguments(commands, 200)))
    if moment == "loading":
        until = time.monotonic() + 120
        while len(sweep.workers()) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.5)
    else:
        assert sweep.wait_for_trials(1 if moment == "running" else 6)
    workers = sweep.workers()
    os.killpg(sweep.process.pid, signal.SIGINT)
    code, errors = sweep.finish(60)
    assert code == 130, errors
    assert alive(workers, 5) == []
    line = error_line(errors)
    assert "stopped by Ctrl-C" in line
    assert "rnn_hyperparameter_tune.py --resume" in line
    trials = trials_of(commands)
    assert all(trial.state.name != "RUNNING" for trial in trials)
    said = sweep.trials()
    assert {n for n, _ in said} <= {trial.number for trial in trials if is_finished(trial)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("workers", [1, WORKERS])
def test_a_batch_systems_signal_stops_the_sweep_and_its_workers(commands, number, workers):
    sweep = Sweep(commands.start(arguments(commands, 200, workers)))
    assert sweep.wait_for_trials(2)
    processes, began = sweep.workers(), time.monotonic()
    sweep.process.send_signal(number)
    code, errors = sweep.finish(60)
    took = time.monotonic() - began
    assert code == 128 + number, errors
    assert alive(processes, 5) == []
    assert took < float(os.environ.get("FAULT_SECONDS", "5"))
    line = error_line(errors)
    assert number.name in line
    assert "rnn_hyperparameter_tune.py --resume" in line
    assert all(trial.state.name != "RUNNING" for trial in trials_of(commands))


def test_a_killed_sweep_takes_its_workers_with_it(commands):
    # Orphans would go on writing to the study beside the workers of the resumed sweep.
    sweep = Sweep(commands.start(arguments(commands, 12)))
    assert sweep.wait_for_trials(2)
    workers = sweep.workers()
    sweep.process.kill()
    sweep.process.wait()
    again = Sweep(commands.start(arguments(commands, 12)))
    assert alive(workers, 5) == []
    code, errors = again.finish()
    assert code == 0, errors
    trials = trials_of(commands)
    assert sum(map(is_finished, trials)) == 12
    assert all(trial.state.name != "RUNNING" for trial in trials)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of commands with a small finished sweep, to be copied."""
    commands = Commands(tmp_path_factory.mktemp("finished"))
    code, _, errors = commands.run([SCRIPT, *FLAGS, "--trials", "2"])
    assert code == 0, errors
    return run_folder(commands)


def header(content: bytearray, numbers: random.Random) -> bytes:
    return numbers.randbytes(100) + content[100:]


def magic_kept(content: bytearray, numbers: random.Random) -> bytes:
    return content[:16] + numbers.randbytes(84) + content[100:]


def halved(content: bytearray, numbers: random.Random) -> bytes:
    return content[: len(content) // 2]


def cut_in_a_page(content: bytearray, numbers: random.Random) -> bytes:
    return content[: 4096 * 2 + 1000]


def middle(content: bytearray, numbers: random.Random) -> bytes:
    return content[:4096] + numbers.randbytes(len(content) - 2 * 4096) + content[-4096:]


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("damage", [header, magic_kept, halved, cut_in_a_page, middle])
def test_a_damaged_study_is_one_line(commands, finished, damage, workers):
    folder = copied(finished, commands)
    study = folder / "study.db"
    study.write_bytes(damage(bytearray(study.read_bytes()), random.Random(SEED)))
    code, errors, took = resume(commands, folder, "--trials", "4", "--workers", workers)
    assert code == 2, errors
    assert "study.db" in error_line(errors)
    assert took < 60


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_locked_study_is_one_line(commands, finished, workers):
    folder = copied(finished, commands)
    with contextlib.closing(sqlite3.connect(folder / "study.db")) as database:
        database.execute("BEGIN EXCLUSIVE")
        code, errors, took = resume(commands, folder, "--trials", "4", "--workers", workers)
    assert code == 2, errors
    line = error_line(errors)
    assert "study.db" in line
    assert "locked" in line
    assert took < 60


@pytest.mark.parametrize("workers", [1, 2])
def test_a_study_that_is_locked_during_the_sweep_is_one_line(commands, workers):
    sweep = Sweep(commands.start(arguments(commands, 200, workers)))
    assert sweep.wait_for_trials(1)
    path = run_folder(commands) / "study.db"
    with contextlib.closing(sqlite3.connect(path, timeout=30)) as database:
        database.execute("BEGIN EXCLUSIVE")
        code, errors = sweep.finish(120)
    assert code == 2, errors
    line = error_line(errors)
    assert "study.db" in line
    assert "rnn_hyperparameter_tune.py --resume" in line


def copied(finished: Path, commands: Commands) -> Path:
    folder = run_folder(commands)
    folder.mkdir(parents=True)
    for path in finished.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def resume(commands: Commands, folder: Path, *flags: str) -> tuple[int, str, float]:
    """Exit code, errors and seconds."""
    began = time.monotonic()
    code, _, errors = commands.run([SCRIPT, "--resume", str(folder), *flags])
    return code, errors, time.monotonic() - began
