"""One study in a PostgreSQL database, worked on by several processes as on several machines."""

import contextlib
import glob
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import optuna
import pytest
from commands import Commands
from test_killed_sweep import FLAGS, SCRIPT, TRAINING, Sweep, error_line, problems_of

pytestmark = pytest.mark.slow

PASSWORD = "correct-horse"


def program(name: str) -> str:
    """A program of PostgreSQL's server; Debian keeps them out of the path."""
    found = shutil.which(name) or next(iter(glob.glob(f"/usr/lib/postgresql/*/bin/{name}")), None)
    if found is None:
        pytest.skip("no PostgreSQL server: on Debian, apt-get install postgresql")
    return os.path.realpath(found)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The port of a server on loopback, which asks for a password."""
    folder = tmp_path_factory.mktemp("postgres")
    owner = {}
    if os.geteuid() == 0:  # it refuses to run as root
        owner = {"user": "postgres", "group": "postgres", "extra_groups": []}
        for path in (folder, *folder.parents):
            if path == Path("/tmp"):
                break
            path.chmod(0o755)
        shutil.chown(folder, "postgres", "postgres")
    (folder / "password").write_text(PASSWORD)
    data, port = folder / "data", free_port()

    def call(*command):
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **owner
        )
        assert done.returncode == 0, done.stderr

    call(
        *(program("initdb"), "-D", str(data), "-U", "sweep", "-A", "scram-sha-256"),
        *("--pwfile", str(folder / "password"), "--no-sync"),
    )
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    control = (program("pg_ctl"), "-D", str(data), "-w")
    call(*control, "-l", str(data / "log"), "-o", options, "start")
    yield port
    call(*control, "-m", "immediate", "stop")


def url(port: int, password: str = PASSWORD) -> str:
    return f"postgresql+psycopg://sweep:{password}@127.0.0.1:{port}/postgres"


@pytest.fixture
def commands(tmp_path):
    made = Commands(tmp_path)
    yield made
    made.close()


def trained_trials(port: int) -> set[int]:
    """The database's numbers of all trials that are trained."""
    import psycopg

    with psycopg.connect(url(port).replace("+psycopg", "")) as database:
        rows = database.execute(TRAINING).fetchall()
    return {number for (number,) in rows}


def turn_back_the_clock(port: int, trial: int) -> None:
    """Let the last sign of life of a trial be years ago."""
    import psycopg

    with psycopg.connect(url(port).replace("+psycopg", "")) as database:
        database.execute(
            "UPDATE trial_heartbeats SET heartbeat = '2020-01-01' WHERE trial_id = %s", [trial]
        )


def stop_in_a_trial(port: int, process: subprocess.Popen) -> int:
    """Suspend a machine in the middle of a trial; the trial that the others do not end."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        os.kill(process.pid, signal.SIGSTOP)
        left = trained_trials(port)
        while len(left) > 1 and time.monotonic() < until:
            time.sleep(0.2)
            left &= trained_trials(port)
        time.sleep(5)  # the last one may be another machine's
        if left := left & trained_trials(port):
            return left.pop()
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.3)
    pytest.fail("no trial runs")


def test_four_machines_one_of_which_dies_finish_exactly_the_trials(commands, server):
    flags = [*FLAGS[:-2], "--trials", "40", "--storage", url(server), "--study", "four"]
    sweeps = [Sweep(commands.start([SCRIPT, *flags, "--name", f"node{n}"])) for n in range(4)]
    until = time.monotonic() + 300
    while not all(sweep.trials() for sweep in sweeps) and time.monotonic() < until:
        time.sleep(0.1)
    trial = stop_in_a_trial(server, sweeps[0].process)
    sweeps[0].process.kill()
    turn_back_the_clock(server, trial)
    ends = [sweep.finish() for sweep in sweeps]
    assert ends[0][0] == -signal.SIGKILL
    for code, errors in ends[1:]:
        assert code == 0, errors
        assert "Traceback" not in errors, errors
    trials = optuna.load_study(study_name="four", storage=url(server)).get_trials()
    assert problems_of(trials, 40) == []
    assert sum("retry_of" in trial.user_attrs for trial in trials) == 1


def silent_port(stack: contextlib.ExitStack) -> int:
    """A server that takes connections and never answers."""
    listening = stack.enter_context(socket.socket())
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    return listening.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("wrong password", "password authentication failed"),
        ("no server", "refused"),
        ("silent server", "timeout"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_line(commands, server, address, message):
    with contextlib.ExitStack() as stack:
        storage = {
            "wrong password": lambda: url(server, "secret-guess"),
            "no server": lambda: url(free_port()),
            "silent server": lambda: url(silent_port(stack), "secret-guess"),
        }[address]()
        began = time.monotonic()
        code, _, errors = commands.run([SCRIPT, *FLAGS, "--storage", storage])
    assert code == 2, errors
    assert message in error_line(errors)
    assert "secret-guess" not in errors
    assert time.monotonic() - began < 30
