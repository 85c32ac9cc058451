"""A run: its folder, its exit codes, its loggers."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.util
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from support import devices, files, settings
from support.errors import Diverged, UserError, require

Log = Callable[[dict[str, Any], int], None]

# The signals that stop a run as Ctrl-C does, by exit code. Windows has no SIGUSR1.
STOPS = {128 + each: each for each in signal.Signals if each.name in ("SIGTERM", "SIGUSR1")}


def run_script(main: Callable[[Any], dict], config_class: type, text: str) -> None:
    """Parse the command line into a `Config`, call `main` with it, and `exit_cleanly`."""
    devices.keep_freed_memory()
    exit_cleanly(lambda: main(settings.parse_config(config_class, sys.argv[1:], text)))


def exit_cleanly(call: Callable[[], Any]) -> None:
    """Call a script's work and turn the expected failures into one line each.

    Exit codes: 2 for a user's mistake, 1 for a loss that is not finite and for lack of memory, 130
    for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1 (SLURM's warning), 141 for a closed pipe. Anything
    else is a bug and keeps its traceback.
    """

    def stop(signal_number: int, frame: Any) -> typing.NoReturn:
        raise SystemExit(128 + signal_number)

    for number in STOPS.values():
        signal.signal(number, stop)
    sys.unraisablehook = _stop_again_or(sys.unraisablehook)
    show_lines_at_once()
    try:
        call()
    except (UserError, Diverged) as error:
        _exit_with(2 if isinstance(error, UserError) else 1, f"error: {error}", error)
    except BrokenPipeError as error:  # of `| head`, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit_with(141, "stopped: nobody reads the output any more", error)
    except OSError as error:
        # A place that may not be used, met before anything says what for.
        closed = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
        if error.filename is None or error.errno not in closed:
            raise
        _exit_with(2, f"error: cannot use {error.filename}: {error.strerror}", error)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            advice = "try a smaller --batch-size, or fewer images"
            _exit_with(1, f"error: out of memory: {advice}", error)
        if torch.distributed.is_available() and isinstance(error, torch.distributed.DistError):
            reason = str(error).splitlines()[0]
            _exit_with(1, f"error: another process of this run has died ({reason})", error)
        raise
    except KeyboardInterrupt as error:
        _exit_with(130, "stopped by Ctrl-C", error)
    except SystemExit as error:
        if error.code in STOPS:
            _exit_with(error.code, f"stopped by {STOPS[error.code].name}", error)
        raise


def _stop_again_or(show: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A hook for exceptions that Python drops, as it does with those raised in a destructor.

    Ctrl-C or another signal that came just then is given once more, a moment later.
    """

    def hook(dropped: Any) -> None:
        error = dropped.exc_value
        code: Any = error.code if isinstance(error, SystemExit) else None
        number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else STOPS.get(code)
        if number is None:
            show(dropped)
            return
        main = threading.main_thread().ident
        timer = threading.Timer(0.1, signal.pthread_kill, [main, number])
        timer.daemon = True
        timer.start()

    return hook


def show_lines_at_once() -> None:
    """Let what is printed into a log file be seen line by line, also names that are no UTF-8."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")


def has_package(module: str, package: str, what: str) -> bool:
    """Whether an optional package is there; if not, a line says what is left out without it."""
    there = importlib.util.find_spec(module) is not None
    if not there:
        print(f"{what} is left out: it needs another package (pip install {package})")
    return there


def require_package(module: str, package: str, what: str) -> None:
    """Raise UserError unless a package is there without which `what` cannot be done."""
    there = importlib.util.find_spec(module) is not None
    require(there, f"{what} needs another package: pip install {package}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; PyTorch has no type of its own for that of CPUs and Apple's GPUs."""
    kinds, texts = (MemoryError, torch.OutOfMemoryError), ("DefaultCPUAllocator", "out of memory")
    return isinstance(error, kinds) or any(text in str(error) for text in texts)


def _exit_with(code: int, message: str, error: BaseException) -> typing.NoReturn:
    line = ". ".join([message, *getattr(error, "__notes__", [])])
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    # What all processes of a run meet is said once; a lack of memory is one process's own.
    alike = isinstance(error, UserError | Diverged | KeyboardInterrupt | SystemExit)
    if not shared or devices.process_rank() == 0 or not alike:
        name = f"process {devices.process_rank()}: " if shared and not alike else ""
        print(name + " ".join(line.split()), file=sys.stderr)
    sys.exit(code)


@dataclass(frozen=True)
class Run:
    """An open run: its folder, and `log(row, step)`, which sends a row's numbers to the logger."""

    folder: Path
    log: Log = lambda row, step: None

    def summarize(self, values: dict[str, Any], step: int = 0) -> dict[str, Any]:
        """Put `values` into `summary.json`, keep the other stages', log the numbers, return all.

        A value of None takes away what was there. `seconds` is the sum of the stages' own
        `*_seconds`.
        """
        path = self.folder / "summary.json"
        summary = {**(files.read_json(path) if path.exists() else {}), **values}
        summary, values = (
            {name: value for name, value in each.items() if value is not None}
            for each in (summary, values)
        )
        times = [v for k, v in summary.items() if k.endswith("_seconds")]
        summary["seconds"] = sum(value for value in times if isinstance(value, int | float))
        files.write_json(path, summary)
        for name, value in values.items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            self.log({f"final/{name}/{part}".rstrip("/"): v for part, v in parts}, step)
        return summary


@contextlib.contextmanager
def open_run(
    config: Any,
    fingerprint: str | None = None,
    free: frozenset[str] = frozenset(),
    unread: frozenset[str] = frozenset(),
) -> Iterator[Run]:
    """Make (or, with `config.resume`, reopen) the run folder and write `config.json`.

    Args:
        config: the script's `Config`; the folder is `<output_dir>/<script>/<name>`. The precision
            that `auto` chooses is written into `config.json`, so that a resumed run keeps it.
        fingerprint: of the data, which must be the same on resume.
        free: further settings that may differ from the saved ones on resume; `config.json` then
            has the new ones,
        unread: but of these, which do not matter to what is done now.

    Yields:
        The run. An error that leaves the block, but for `Diverged`, carries a note that says how to
        go on.

    Raises:
        UserError: the folder exists already, cannot be written, or contradicts the settings.
    """
    precision, because = devices.choose_precision(config.device, config.precision)
    config = dataclasses.replace(config, precision=precision)
    session = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _git_commit(),
        "versions": _versions(),
        "hardware": devices.hardware(config.device),
        "threads": torch.get_num_threads(),
        "computed_in": devices.pick_precision(config.device, config.precision),
        "precision_because": because,
        "processes": math.prod(devices.process_layout(config)),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    if config.logger != "none":
        require_package(config.logger, config.logger, f"--logger {config.logger}")
    with contextlib.ExitStack() as stack:
        if config.resume is None:
            folder = _new_folder(Path(config.output_dir) / config.SCRIPT, config)
            stack.enter_context(files.locked(folder, wait=False))
            record = {"script": config.SCRIPT, **dataclasses.asdict(config)}
            record |= {"data": fingerprint, **session, "resumed": []}
        else:
            folder = Path(config.resume)
            stack.enter_context(files.locked(folder, wait=False))
            record = _reopen(folder, config, fingerprint, free, unread, session)
        files.write_json(folder / "config.json", record)
        for left_behind in folder.rglob(".*.tmp"):  # by a process that was killed while writing
            left_behind.unlink(missing_ok=True)
        log = stack.enter_context(metric_logger(config, folder, str(record.get("started"))))
        try:
            yield Run(folder, log)
        except Diverged:  # which a resumed run would, too
            raise
        except BaseException as error:
            command = f"python {_script_path(config)} --resume {shlex.quote(str(folder))}"
            error.add_note(f"Continue with: {command}")
            raise


def _reopen(
    folder: Path,
    config: Any,
    fingerprint: str | None,
    free: frozenset[str],
    unread: frozenset[str],
    session: dict[str, Any],
) -> dict[str, Any]:
    """The content of `config.json` for a run that goes on; raises UserError if it cannot."""
    saved = settings.load_config(type(config), folder, quiet=True)  # said with the command line
    record = files.read_json(folder / "config.json")
    for name, value in dataclasses.asdict(config).items():
        if name not in settings.FREE_ON_RESUME | free and value != getattr(saved, name):
            raise UserError(
                f"{folder} was started with {settings.flag(name)} {getattr(saved, name)}, not "
                f"{value}: leave the flag out, or start a new run"
            )
    same = record.get("data") == fingerprint
    if fingerprint is None or record.get("data") is None:  # older folders know the name only
        same = saved.dataset == config.dataset
    require(
        same,
        f"{folder} was trained on other images than those in {config.dataset} now",
    )
    changed = [
        f"{key} was {record.get(key)}, is {session[key]}"
        for key in ("hardware", "threads", "computed_in", "processes", "versions")
        if record.get(key) != session[key]
    ]
    if changed:
        print("The result may differ in the last bits: " + "; ".join(changed) + ".")
    before = record.get("resumed")
    # What the numbers are made with from now on; the stages of a run are those it began with.
    kept = unread | {"stages"}
    asked = {name: value for name, value in vars(config).items() if name in free - kept}
    return record | asked | {"resumed": [*(before if isinstance(before, list) else []), session]}


def _script_path(config: Any) -> str:
    """How to name the script of a `Config` on a command line, from where the user is."""
    path = Path(sys.modules[type(config).__module__].__file__).resolve()
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def _new_folder(parent: Path, config: Any) -> Path:
    stem = config.name or time.strftime("%Y%m%d-%H%M%S") + f"-seed{config.seed}"
    # Two unnamed runs may start in the same second.
    names = [stem] if config.name else [stem, *(f"{stem}-{n}" for n in range(2, 100))]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for folder in (parent / name for name in names):
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
            if config.name and all(path.match(".*.tmp") for path in folder.iterdir()):
                return folder  # of a run that was killed before its config.json was there
    except OSError as error:
        raise UserError(f"cannot write {parent}: {error.strerror}") from error
    raise UserError(
        f"{parent / stem} exists already: choose another --name, or continue it with --resume"
    )


def _git_commit() -> str | None:
    """The commit of this code, with `-dirty` when files differ from it; None outside git."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[1])]
    try:
        run = [
            subprocess.run([*git, *args], capture_output=True, text=True, timeout=10, check=True)
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return run[0].stdout.strip() + ("-dirty" if run[1].stdout.strip() else "")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "torchvision", "numpy", "scikit-learn", "pytorch-lightning")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


@contextlib.contextmanager
def metric_logger(config: settings.RunConfig, folder: Path, started: str) -> Iterator[Log]:
    """A function `log(row, step)` that sends the row's numbers to TensorBoard or wandb.

    With `--logger none` it does nothing. The files are in the run folder; `WANDB_MODE=offline`
    keeps wandb off the network. A run that goes on finds its page there by when it `started`, as
    runs of one name may be in several places.
    """
    if config.logger == "none":
        yield Run.log
        return
    from pytorch_lightning import loggers

    name = f"{folder.parent.name}-{folder.name}"
    if config.logger == "tensorboard":
        logger: Any = loggers.TensorBoardLogger(
            folder, name="", version="tensorboard", default_hp_metric=False
        )
    else:
        import wandb

        page = f"{name}-{re.sub(r'[^0-9]', '', started)}"
        logger = loggers.WandbLogger(name, folder, id=page, project="small-images", resume="allow")
        try:
            _ = logger.experiment
        except wandb.errors.Error as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"wandb: {reason}; or set WANDB_MODE=offline") from error
    logger.log_hyperparams(dataclasses.asdict(config))

    def log(row: dict[str, Any], step: int) -> None:
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
        logger.log_metrics(numbers, step)

    status = "failed"
    try:
        yield log
        status = "success"
    finally:
        logger.save()
        logger.finalize(status)
        if config.logger == "wandb":  # or a second run of this process would go on in this one
            logger.experiment.finish(exit_code=0 if status == "success" else 1)


def print_folder(folder: Path) -> None:
    """The last lines of a run: where everything is."""
    print(f"Everything is in {folder}:")
    names = "  ".join(sorted(path.name for path in folder.iterdir()))
    lines = textwrap.wrap(names, 78, break_on_hyphens=False, break_long_words=False)
    print(textwrap.indent("\n".join(lines), "  "))
