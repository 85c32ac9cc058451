"""What the tests of whole command lines share: starting, watching and killing them, and digests."""

import contextlib
import csv
import dataclasses
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import functions

REPOSITORY = Path(functions.__file__).resolve().parent

DIGITS = ["--dataset", "digits", "--device", "cpu"]
DIGITS += ["--checkpoint-seconds", "0"]  # after each epoch
PRETRAINING = [*DIGITS, "--encoder", "small", "--epochs", "5", "--batch-size", "128"]
PRETRAINING += ["--knn-every", "2", "--keep-every", "2", "--probe-epochs", "3"]
RECURRENT = [*DIGITS, "--cells", "rnn,gru", "--hidden-size", "16", "--l2", "8", "--l3", "8"]
CONTRASTIVE = [*PRETRAINING, "--projection-hidden", "32", "--projection-size", "16"]
FLAGS = {
    "rnn": [*RECURRENT, "--epochs", "6", "--patience", "1"],
    "simclr": [
        *(*CONTRASTIVE, "--finetune-epochs", "2"),
        *("--stages", "pretrain,probe,embed,finetune"),
    ],
    "simsiam": [*PRETRAINING, "--stages", "pretrain,probe,embed"],
    "moco": [
        *(*PRETRAINING, "--projection-size", "16", "--queue-size", "256"),
        *("--finetune-epochs", "2", "--stages", "pretrain,probe,embed,finetune"),
    ],
}

# Python runs a `sitecustomize` that it finds on its path before the script. This one marks the
# moment from which the script answers signals, records every file that the script puts in its
# place, kills the process at one of these moments, and lets two processes meet.
HOOKS = """
import os, pathlib, signal, sys, time

NOTES, KILL_AT, PART, MEETING = {notes!r}, {kill_at!r}, {part!r}, {meeting!r}
written = 0


def caller(depth):
    code = sys._getframe(depth + 1).f_code
    return os.path.basename(code.co_filename), code.co_name


def note(text):
    with open(NOTES, "a") as file:
        file.write(f"{{time.time()}} {{text}}\\n")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def set_handler(number, handler, real=signal.signal):
    before = real(number, handler)
    if number == signal.SIGUSR1 and caller(1) == ("runs.py", "exit_cleanly"):
        note("ready")
    return before


def fsync(descriptor, real=os.fsync):
    global written
    if caller(1) == ("files.py", "atomic_file"):
        written += 1
        if written == KILL_AT and PART == "half":
            temporary = sys._getframe(1).f_locals["temporary"]
            os.truncate(temporary, os.path.getsize(temporary) // 2)
            die()
    return real(descriptor)


def replace(source, target, real=os.replace):
    ours = caller(1) == ("files.py", "atomic_file")
    if ours and written == KILL_AT and PART == "before":
        die()
    real(source, target)
    if ours:
        note("wrote " + os.path.basename(target))
        if written == KILL_AT and PART == "after":
            die()


def mkdir(path, *args, real=pathlib.Path.mkdir, **options):
    if MEETING and not options and caller(1) == ("runs.py", "_new_folder"):
        open(os.path.join(MEETING, str(os.getpid())), "w").close()
        until = time.time() + 60
        while len(os.listdir(MEETING)) < 2 and time.time() < until:
            pass
    return real(path, *args, **options)


signal.signal, os.fsync, os.replace, pathlib.Path.mkdir = set_handler, fsync, replace, mkdir
"""


@dataclasses.dataclass
class Command:
    """A script's process, the leader of its own group, and what the hooks noted about it."""

    process: subprocess.Popen
    notes: Path

    def noted(self) -> list[tuple[float, str]]:
        """When and what, so far."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [(float(line.split(" ", 1)[0]), line.split(" ", 1)[1]) for line in lines]

    def wait_for(self, text: str, seconds: float = 300) -> None:
        """Wait until `text` is noted, or the process has ended."""
        until = time.monotonic() + seconds
        while text not in [what for _, what in self.noted()] and self.process.poll() is None:
            assert time.monotonic() < until, f"no {text!r} after {seconds} s"
            time.sleep(0.01)

    def runs_for(self, seconds: float) -> bool:
        """Let it run; whether it still does."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.returncode is None

    def finish(self, seconds: float = 600) -> tuple[int, str, str]:
        """Wait for the end: exit code, output and errors."""
        output, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, output, errors

    def kill(self) -> None:
        """SIGKILL for the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


class Commands:
    """Starts scripts in a folder that is not the repository, and ends what is left of them."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, []

    def start(
        self, arguments: list[str], kill_at: int = 0, part: str = "", meeting: Path | None = None
    ) -> Command:
        """Start `python ARGUMENTS`; `half`, `before` or `after` a write it is killed at."""
        hooks = self.folder / f"hooks{len(self.started)}"
        hooks.mkdir()
        notes = hooks / "notes"
        settings = {"kill_at": kill_at, "part": part, "meeting": meeting and str(meeting)}
        (hooks / "sitecustomize.py").write_text(HOOKS.format(notes=str(notes), **settings))
        script, *rest = arguments
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / script), *rest],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(hooks), "MPLBACKEND": "Agg"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(Command(process, notes))
        return self.started[-1]

    def run(self, arguments: list[str], **options: Any) -> tuple[int, str, str]:
        """Start and wait for the end."""
        return self.start(arguments, **options).finish()

    def close(self) -> None:
        """Kill what still runs."""
        for command in self.started:
            if command.process.poll() is None:
                command.kill()


def last_words(errors: str) -> list[str]:
    """What a script itself says on the way out, without the warnings of libraries.

    A traceback is among it, so that nobody takes it for a line of ours.
    """
    return re.findall(r"^(?:error: |stopped\b|process \d+: |Traceback ).*$", errors, re.MULTILINE)


def command_to_go_on(errors: str) -> list[str]:
    """The arguments of the command that the one line of `errors` ends with."""
    (line,) = last_words(errors)
    return shlex.split(line[line.index("Continue with: python ") :])[3:]


# Columns that no two runs share.
TIMES = ("seconds", "images_per_second", "measure_seconds", "checkpoint_seconds")


def table(path: Path, *without: str) -> list[dict[str, str]]:
    """A csv file's rows, each of them whole, without some columns."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    for row in rows:
        assert None not in (*row, *row.values()), f"{path} has a row of another length: {row}"
    return [{k: v for k, v in row.items() if k not in without} for row in rows]


def rows_of(path: Path) -> list[dict[str, str]]:
    """A csv file's rows without the columns of times."""
    return table(path, *TIMES)


def arrays(path: Path) -> dict[str, str]:
    """The digest of each array of an npz file."""
    with np.load(path, allow_pickle=False) as file:
        return {k: f"{v.dtype} {v.shape} {digest(v.tobytes())}" for k, v in sorted(file.items())}


def digest(content: bytes) -> str:
    """SHA-256."""
    return hashlib.sha256(content).hexdigest()


def result(folder: Path) -> dict[str, Any]:
    """All that a finished run says, without times: equal for equal runs."""
    found: dict[str, Any] = {
        "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    }
    for path in sorted(folder.glob("*.safetensors")):
        found[path.name] = digest(path.read_bytes())
    for path in sorted(folder.glob("*.csv")):
        found[path.name] = rows_of(path)
    summary = json.loads((folder / "summary.json").read_text())
    found["summary"] = {k: v for k, v in summary.items() if not k.endswith("seconds")}
    for path in sorted(folder.glob("*.npz")):
        found[path.name] = arrays(path)
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The entries of two results that differ."""
    return [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
