"""One study in a PostgreSQL database, worked on by several processes as on several machines."""

import contextlib
import glob
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import optuna
import pytest
from commands import Commands
from test_sweep import FLAGS, SCRIPT, Sweep, problems_of

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


def silence(port: int, number: int) -> int:
    """Turn back the heartbeats of a process's trials; how many there are."""
    import psycopg

    address = url(port).replace("+psycopg", "")
    with psycopg.connect(address) as database:
        return database.execute(
            "UPDATE trial_heartbeats SET heartbeat = '2020-01-01' WHERE trial_id IN ("
            "SELECT t.trial_id FROM trials t JOIN trial_user_attributes a USING (trial_id)"
            " WHERE t.state = 'RUNNING' AND a.key = 'process' AND a.value_json LIKE %s)",
            [f'%:{number}"'],
        ).rowcount


def test_four_machines_one_of_which_dies_finish_exactly_the_trials(commands, server):
    flags = [*FLAGS[:-2], "--trials", "20", "--storage", url(server), "--study", "four"]
    sweeps = [Sweep(commands.start([SCRIPT, *flags, "--name", f"node{n}"])) for n in range(4)]
    until = time.monotonic() + 300
    while sum(len(sweep.trials()) for sweep in sweeps) < 6 and time.monotonic() < until:
        time.sleep(0.1)
    while not sweeps[0].trials() and time.monotonic() < until:
        time.sleep(0.1)
    for _ in range(300):  # until it is found in the middle of a trial
        os.kill(sweeps[0].process.pid, signal.SIGSTOP)
        if silence(server, sweeps[0].process.pid):
            break
        os.kill(sweeps[0].process.pid, signal.SIGCONT)
        time.sleep(0.05)
    else:
        pytest.fail("no trial runs")
    sweeps[0].process.kill()
    ends = [sweep.finish() for sweep in sweeps]
    assert ends[0][0] == -signal.SIGKILL
    assert ends[1:] == [(0, "")] * 3
    trials = optuna.load_study(study_name="four", storage=url(server)).get_trials()
    assert problems_of(trials, 20) == []
    assert sum("retry_of" in trial.user_attrs for trial in trials) >= 1


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
    assert len(errors.splitlines()) == 1, errors
    assert re.search(message, errors), errors
    assert "secret-guess" not in errors
    assert time.monotonic() - began < 30
