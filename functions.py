"""What two or more experiment scripts share.

Sections, in this order: run setup, data, augmentation, checkpoints, models, evaluation, plots.
A function lives here when two or more scripts share it and it names no paper's method. Importing
this module does nothing; heavy libraries are imported where they are used, so `--help` is quick.

Letters in shape comments: N images, B batch, C H W channels, height, width, D features, K classes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import errno
import glob
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import typing
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --------------------------------------------------------------------------------- run setup


class UserError(ValueError):
    """A mistake the user can mend. The scripts print it as one line and exit with 2."""


class Diverged(RuntimeError):
    """The loss is no longer finite. The scripts print it as one line and exit with 1."""


def setting(default: Any, group: str, text: str) -> Any:
    """A `Config` field with its default, its group in `--help` and its line there."""
    return dataclasses.field(default=default, metadata={"group": group, "help": text})


@dataclass(frozen=True)
class RunConfig:
    """The settings every experiment script has. Scripts override the defaults."""

    dataset: str = setting(
        "cifar10", "data", "cifar10, fashion-mnist, digits, or a path to a folder of images"
    )
    data_dir: str = setting("data", "data", "where downloads and the image cache are kept")
    image_size: int = setting(32, "data", "side in pixels to which a folder's images are resized")
    download_url: str | None = setting(
        None, "data", "another address of the data set's archive (same MD5 check)"
    )
    output_dir: str = setting("results", "run", "where run folders are made")
    name: str | None = setting(None, "run", "name of the run folder (default: time and seed)")
    resume: str | None = setting(None, "run", "run folder to continue, with its own settings")
    seed: int = setting(0, "run", "seed of everything that is random")
    logger: Literal["none", "tensorboard", "wandb"] = setting(
        "none", "run", "where the numbers go besides metrics.csv"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "run", "where to compute")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "run", "auto: bfloat16 autocast where the hardware has matrix units for it"
    )

    def __post_init__(self) -> None:
        """Check ranges that hold for every script."""
        require(0 <= self.seed < 2**63, f"--seed must be in [0, 2^63), not {self.seed}")
        require(
            8 <= self.image_size <= 1024,
            f"--image-size must be between 8 and 1024 pixels, not {self.image_size}",
        )
        if self.name is not None:
            require(
                self.name not in ("", ".", "..") and not set(self.name) & set("/\\\0"),
                f"--name must be a plain folder name, not {self.name!r}",
            )

    @classmethod
    def to_start_from(cls, arguments: Sequence[str]) -> RunConfig:
        """What the flags of a command line change: with `--resume` the folder's, else the defaults.

        Raises:
            UserError: a run folder that cannot be read.
        """
        folder = find_flag("--resume", arguments)
        return cls() if folder is None else load_config(cls, folder)


@dataclass(frozen=True)
class TrainingConfig(RunConfig):
    """The settings every training has besides."""

    epochs: int = setting(100, "training", "passes over the training images")
    batch_size: int = setting(256, "training", "images per step")
    learning_rate: float = setting(1e-3, "training", "peak learning rate")
    weight_decay: float = setting(0.0, "training", "weight decay")

    def __post_init__(self) -> None:
        """Check ranges that hold for every training."""
        super().__post_init__()
        require(self.epochs >= 1, f"--epochs must be at least 1, not {self.epochs}")
        require(self.batch_size >= 2, f"--batch-size must be at least 2, not {self.batch_size}")
        require(
            0 < self.learning_rate < math.inf,
            f"--learning-rate must be a positive number, not {self.learning_rate}",
        )
        require(
            0 <= self.weight_decay < math.inf,
            f"--weight-decay must not be negative, not {self.weight_decay}",
        )


# Settings that say where a run computes and what it does next, not what it is: they may differ
# from the saved ones when a run is resumed.
FREE_ON_RESUME = frozenset(
    {"data_dir", "download_url", "output_dir", "name", "resume", "device", "logger", "devices"}
)


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are `UserError`s: one line, exit code 2, like every other."""

    def error(self, message: str) -> typing.NoReturn:
        """Raise what argparse would print."""
        raise UserError(f"{message} (see --help)")


def flag(name: str) -> str:
    """The command-line spelling of a setting's name."""
    return "--" + name.replace("_", "-")


def _flag_type(hint: Any) -> tuple[type, dict[str, Any]]:
    """Argparse's keyword arguments for a field's type hint."""
    if isinstance(hint, types.UnionType):  # `int | None`
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is Literal:
        return str, {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        return parts[0], {"type": parts[0], "nargs": len(parts)}
    if hint is bool:
        return bool, {"action": argparse.BooleanOptionalAction}
    return hint, {"type": hint}


def _parse_flags(config_class: type, arguments: Sequence[str], defaults: Any, text: str) -> Any:
    parser = Parser(
        usage="%(prog)s [flags]",
        description=text,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=34, width=100
        ),
    )
    groups: dict[str, Any] = {}
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        group = field.metadata["group"]
        groups.setdefault(group, parser.add_argument_group(group) if group not in groups else None)
        default = getattr(defaults, field.name)
        kind, options = _flag_type(hints[field.name])
        if "choices" not in options and kind is not bool:
            options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        note = "" if default is None else f" [{shown}]"
        groups[group].add_argument(
            flag(field.name), default=default, help=field.metadata["help"] + note, **options
        )
    values = vars(parser.parse_args(arguments))
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def parse_config(config_class: type[RunConfig], arguments: Sequence[str], text: str) -> Any:
    """Parse a command line into a `Config`.

    With `--resume RUN_FOLDER` the settings saved there are the defaults, and `open_run` refuses a
    flag that contradicts them.

    Raises:
        UserError: an unknown flag, a bad value, or a run folder that cannot be read.
    """
    return _parse_flags(config_class, arguments, config_class.to_start_from(arguments), text)


def find_flag(name: str, arguments: Sequence[str]) -> str | None:
    """The value of one flag of a command line, None when it is not there."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, dest="value")
    return parser.parse_known_args(arguments)[0].value


def load_config(config_class: type, folder: str | Path) -> Any:
    """The `Config` saved in a run folder's `config.json`, checked as a command line is.

    Raises:
        UserError: no such file, no JSON, another script's, or a value missing or of a wrong type.
    """
    path = Path(folder) / "config.json"
    require(path.is_file(), f"{folder} is not a run folder: it has no config.json")
    saved = read_json(path)
    values = {}
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        name, value = flag(field.name), saved.get(field.name)
        require(field.name in saved, f"{path} lacks {name}: it is of another script or version")
        right = is_of(value, hints[field.name])
        require(right, f"{path} is damaged: {name} cannot be {json.dumps(value)[:60]}")
        values[field.name] = tuple(value) if isinstance(value, list) else value
    try:
        return config_class(**values)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def is_of(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a field's type."""
    if isinstance(hint, types.UnionType):
        return any(is_of(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        return (
            isinstance(value, list) and len(value) == len(parts) and all(map(is_of, value, parts))
        )
    return type(value) is hint or (hint is float and type(value) is int)


def run_script(main: Callable[[Any], dict], config_class: type, text: str) -> None:
    """Parse the command line into a `Config`, call `main` with it, and `exit_cleanly`."""
    keep_freed_memory()
    exit_cleanly(lambda: main(parse_config(config_class, sys.argv[1:], text)))


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step instead of returning it to the system.

    Each step takes the same buffers again. Fresh ones cost page faults: a sixth to a fifth of a
    step of ResNet18 with the ImageNet stem on a CPU. Does nothing without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        # M_MMAP_THRESHOLD: take buffers up to 1 GiB from the heap, 32 MiB with an old glibc
        _ = mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: keep the heap's end


def exit_cleanly(call: Callable[[], Any]) -> None:
    """Call a script's work and turn the expected failures into one line each.

    Exit codes: 2 for a user's mistake, 1 for a loss that is not finite and for lack of memory, 130
    for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1 (SLURM's warning), 141 for a closed pipe. Anything
    else is a bug and keeps its traceback.
    """
    stopped: list[int] = []

    def stop(signal_number: int, frame: Any) -> typing.NoReturn:
        stopped.append(signal_number)
        if signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal_number)

    def lost(unraisable: Any, before: Callable[[Any], Any] = sys.unraisablehook) -> None:
        # A signal came during a library's callback, where exceptions get lost: a moment later.
        if isinstance(unraisable.exc_value, KeyboardInterrupt | SystemExit):
            missed.append(unraisable.exc_value)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        elif not stopped:  # what is torn down half-made may complain
            before(unraisable)

    def again(signal_number: int, frame: Any) -> typing.NoReturn:
        raise missed[-1]

    missed: list[BaseException] = []
    stops = [signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
    for number in stops:
        signal.signal(number, stop)
    signal.signal(signal.SIGINT, stop)  # after interrupt.py
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.signal(signal.SIGALRM, again)
        sys.unraisablehook = lost
    show_lines_at_once()
    try:
        call()
    except UserError as error:
        _exit_with(2, f"error: {error}", error)
    except Diverged as error:
        _exit_with(1, f"error: {error}", error)
    except BrokenPipeError as error:  # of `| head`, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit_with(141, "stopped: nobody reads the output any more", error)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        _exit_with(1, f"error: {error.filename or 'the disk'}: {error.strerror}", error)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            _exit_with(1, "error: out of memory: try a smaller --batch-size", error)
        if is_lost_connection(error):
            reason = str(error).splitlines()[0]
            _exit_with(1, f"error: another process of this run has died ({reason})", error)
        raise
    except KeyboardInterrupt as error:
        _exit_with(130, "stopped by Ctrl-C", error)
    except SystemExit as error:
        for number in stops:
            if error.code == 128 + number:
                _exit_with(error.code, f"stopped by {number.name}", error)
        raise


def show_lines_at_once() -> None:
    """Let what is printed into a log file be seen line by line."""
    typing.cast(io.TextIOWrapper, sys.stdout).reconfigure(line_buffering=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: PyTorch says so by a RuntimeError, or a subclass of it on a GPU."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _exit_with(code: int, message: str, error: BaseException) -> typing.NoReturn:
    line = ". ".join([message, *getattr(error, "__notes__", [])])
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    # What all processes of a run meet is said once; a lack of memory is one process's own.
    alike = isinstance(error, UserError | Diverged | KeyboardInterrupt | SystemExit)
    if not shared or process_rank() == 0 or not alike:
        name = f"process {process_rank()}: " if shared and not alike else ""
        print(name + " ".join(line.split()), file=sys.stderr)
    sys.exit(code)


# What a disk says that is full or broken, at a call that no writer guards.
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT})


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another process of the run is gone."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def process_rank() -> int:
    """This process's number among those of a run, before and after they have found each other."""
    # torchrun's, that of a process which Fabric started (also within a SLURM job), srun's
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return int(next((os.environ[name] for name in names if name in os.environ), 0))


def process_layout(config: RunConfig) -> tuple[int, int]:
    """Processes per node and nodes: torchrun's or SLURM's where one of them starts us.

    Raises:
        UserError: they start another number of processes than --devices asks for.
    """
    devices = getattr(config, "devices", 1)
    here, nodes, starter = devices, 1, ""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here, starter = int(os.environ["LOCAL_WORLD_SIZE"]), "torchrun"
        nodes = int(os.environ["WORLD_SIZE"]) // here
    elif "SLURM_NTASKS" in os.environ:
        from lightning_fabric.plugins.environments import SLURMEnvironment

        if SLURMEnvironment.detect():  # not in an interactive job
            nodes, starter = int(os.environ.get("SLURM_NNODES", 1)), "SLURM"
            here = int(os.environ["SLURM_NTASKS"]) // nodes
    require(
        devices in (1, here, here * nodes),
        f"--devices {devices}, but {starter} starts {here * nodes} processes: leave the flag out, "
        f"or let {starter} start as many",
    )
    return here, nodes


@contextlib.contextmanager
def open_run(script: str, config: Any, free: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Make (or, with `config.resume`, reopen) the run folder and write `config.json`.

    Args:
        script: the script's name; the folder is `<output_dir>/<script>/<name>`.
        config: the script's `Config`.
        free: further settings that may differ from the saved ones on resume.

    Yields:
        The folder. An error that leaves the block carries a note that says how to go on.

    Raises:
        UserError: the folder exists already, cannot be written, or contradicts the settings.
    """
    session = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _git_commit(),
        "versions": _versions(),
        "hardware": hardware(config.device),
        "threads": torch.get_num_threads(),
        "computed_in": pick_precision(config.device, config.precision),
        "processes": math.prod(process_layout(config)),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    if config.logger != "none":
        require(
            importlib.util.find_spec(config.logger) is not None,
            f"--logger {config.logger} needs a package: pip install {config.logger}",
        )
    if config.resume is None:
        folder = _new_folder(Path(config.output_dir) / script, config)
        record = {"script": script, **dataclasses.asdict(config), **session, "resumed": []}
        lock = _lock(folder)
    else:
        folder = Path(config.resume)
        saved = load_config(type(config), folder)
        lock = _lock(folder)
        record = read_json(folder / "config.json")
        require(
            record.get("script") == script,
            f"{folder} is a run of {record.get('script')}.py, not of {script}.py",
        )
        for name, value in dataclasses.asdict(config).items():
            if name not in FREE_ON_RESUME | free and value != getattr(saved, name):
                raise UserError(
                    f"{folder} was started with {flag(name)} {getattr(saved, name)}, not {value}: "
                    "leave the flag out, or start a new run"
                )
        changed = [
            f"{key} was {record.get(key)}, is {session[key]}"
            for key in ("hardware", "threads", "computed_in", "processes", "versions")
            if record.get(key) != session[key]
        ]
        if changed:
            print("The result may differ in the last bits: " + "; ".join(changed) + ".")
        before = record.get("resumed", [])
        require(isinstance(before, list), f"{folder}/config.json is damaged: resumed is no list")
        record["resumed"] = [*before, session]
    for left_behind in folder.rglob(".*.tmp"):  # by a process that was killed while writing
        left_behind.unlink(missing_ok=True)
    write_json(folder / "config.json", record)
    try:
        yield folder
    except BaseException as error:
        error.add_note(f"Continue with: python {script}.py --resume {shlex.quote(str(folder))}")
        raise
    finally:
        os.close(lock)


def _lock(folder: Path) -> int:
    """Keep other processes out of a run folder until the returned descriptor is closed."""
    try:
        import fcntl
    except ImportError:  # Windows
        return os.open(os.devnull, os.O_RDONLY)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder} is in use by another process") from None
    except OSError:
        pass  # a file system without locks
    return descriptor


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
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
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


def hardware(device: str) -> str:
    """A short name of the device that `--device` chooses, for records and the first line."""
    chosen = pick_device(device)
    if chosen == "cuda":
        return torch.cuda.get_device_name()
    name = _cpu_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    return "Apple GPU" if chosen == "mps" else f"{name} CPU"


def _cpu_capabilities() -> dict[str, Any]:
    return getattr(torch.cpu, "get_capabilities", dict)()  # missing before torch 2.11


def pick_device(device: str) -> str:
    """Resolve `auto` to the best device there is.

    Raises:
        UserError: the device asked for is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        return next(name for name, there in available.items() if there)
    require(
        available[device],
        f"--device {device}: this machine has none that PyTorch can use; try --device cpu",
    )
    return device


def pick_precision(device: str, precision: str) -> Literal["bf16-mixed", "32-true"]:
    """Lightning's name for `--precision`.

    `auto` is bfloat16 autocast on GPUs that support it and on CPUs with AMX tiles (2.3 times faster
    there for ResNet18 with the CIFAR stem), float32 elsewhere.
    """
    chosen = pick_device(device)
    if precision == "auto":
        fast = (chosen == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)) or (
            chosen == "cpu" and _cpu_capabilities().get("amx_bf16", False)
        )
        precision = "bfloat16" if fast else "float32"
    return "bf16-mixed" if precision == "bfloat16" else "32-true"


def make_fabric(device: str, precision: str, devices: int = 1, nodes: int = 1) -> Any:
    """Lightning Fabric in the precision of `pick_precision`, with DDP for several processes.

    Raises:
        UserError: fewer devices than asked for, a PyTorch without collectives, or a SLURM job of
            another shape.
    """
    import logging

    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces the precision
    chosen, strategy = pick_device(device), "auto"
    if devices * nodes > 1:
        there = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": os.cpu_count() or 1}[chosen]
        if chosen == "cpu" and "TORCHELASTIC_RUN_ID" in os.environ:
            there = devices  # torchrun's processes may share cores
        require(devices <= there, f"--devices {devices}: this machine has {there} of {chosen}")
        backend = "nccl" if chosen == "cuda" else "gloo"
        require(
            torch.distributed.is_available() and torch.distributed.is_backend_available(backend),
            f"--devices {devices} needs PyTorch's {backend} backend, which this one lacks",
        )
        strategy = "ddp"
        # Lightning's own business, said once per process
        warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather is deprec")
    try:
        return Fabric(
            accelerator=chosen,
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
            precision=pick_precision(device, precision),
        )
    except (RuntimeError, ValueError) as error:
        if "SLURM" not in str(error):
            raise
        raise UserError(f"this SLURM job cannot be used: {error}".replace("\n", " ")) from error


@contextlib.contextmanager
def metric_logger(
    config: RunConfig, folder: Path
) -> Iterator[Callable[[dict[str, Any], int], None]]:
    """A function `log(row, step)` that sends the row's numbers to TensorBoard or wandb.

    With `--logger none` it does nothing. The files are in the run folder; `WANDB_MODE=offline`
    keeps wandb off the network.
    """
    if config.logger == "none":
        yield lambda row, step: None
        return
    from pytorch_lightning import loggers

    name = f"{folder.parent.name}-{folder.name}"
    if config.logger == "tensorboard":
        logger: Any = loggers.TensorBoardLogger(
            folder, name="", version="tensorboard", default_hp_metric=False
        )
    else:
        import wandb

        logger = loggers.WandbLogger(name, folder, id=name, project="small-images", resume="allow")
        try:
            _ = logger.experiment
        except wandb.errors.UsageError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"wandb: {reason}; or set WANDB_MODE=offline") from error
    logger.log_hyperparams(dataclasses.asdict(config))

    def log(row: dict[str, Any], step: int) -> None:
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
        logger.log_metrics(numbers, step)

    try:
        yield log
    finally:
        logger.save()
        logger.finalize("success")
        if config.logger == "wandb":
            logger.experiment.finish()  # or a second run of this process would go on in this one


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    import random

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def epoch_generator(seed: int, epoch: int, device: Any = "cpu", stream: int = 0) -> torch.Generator:
    """A generator for what epoch `epoch` of a run with seed `seed` draws.

    It depends on nothing else, so a resumed epoch repeats an uninterrupted one. Independent
    `stream`s keep the shuffling, the augmentation and other stages apart.
    """
    words = np.random.SeedSequence((seed, epoch, stream)).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


# -------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Split:
    """Images `(N, C, H, W)`, uint8, and their labels `(N,)`, int64, or None without labels."""

    images: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: Any) -> Split:
        """The same split on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return Split(self.images.to(device), labels)

    def select(self, index: Tensor) -> Split:
        """The images at the positions `index`."""
        index = index.to(self.images.device)
        return Split(self.images[index], None if self.labels is None else self.labels[index])


@dataclass(frozen=True)
class ImageData:
    """A data set. `test` is None and `classes` is empty when there are no labels."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split | None

    def to(self, device: Any) -> ImageData:
        """The same data on another device."""
        test = None if self.test is None else self.test.to(device)
        return dataclasses.replace(self, train=self.train.to(device), test=test)

    def __str__(self) -> str:
        channels, height, width = self.train.images.shape[1:]
        parts = [f"{self.name}: {len(self.train):,} training images"]
        parts += [f"{len(self.test):,} test images"] if self.test else []
        parts += [f"{channels} x {height} x {width}"]
        parts += [f"{len(self.classes)} classes"] if self.classes else ["no labels"]
        return ", ".join(parts)


CIFAR10_CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_MNIST_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
)
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
CACHE_VERSION = 1  # raise it when decoding changes


def load_images(
    name_or_path: str,
    data_dir: str | Path = "data",
    image_size: int = 32,
    download_url: str | None = None,
) -> ImageData:
    """Load a data set into one uint8 tensor per split.

    Args:
        name_or_path: `cifar10`, `fashion-mnist`, `digits`, or a folder: `train/<class>/*` with
            `test/<class>/*`, or `<class>/*` (a fifth is split off as the test set, the same every
            time), or images without sub-folders (no labels).
        data_dir: where downloads and the cache of decoded folders are kept.
        image_size: side to which a folder's images are resized (shorter side, then centre crop).
        download_url: another address for the archive; its MD5 is checked all the same.

    Raises:
        UserError: unknown name, no network, a wrong MD5, or a folder that cannot be used.
    """
    builtin = {"cifar10": _load_cifar10, "fashion-mnist": _load_fashion_mnist}
    if name_or_path in builtin:
        return builtin[name_or_path](Path(data_dir), download_url)
    if name_or_path == "digits":
        return _load_digits()
    folder = os.path.expanduser(name_or_path)
    known = "cifar10, fashion-mnist, digits, or an existing folder of images"
    # os.path's tests, unlike pathlib's, take any string
    require(os.path.exists(folder), f"unknown data set or missing folder {folder!r}; use {known}")
    require(os.path.isdir(folder), f"{folder} is a file, not a folder of images")
    return _load_folder(Path(folder), Path(data_dir), image_size)


def _load_digits() -> ImageData:
    """scikit-learn's 1,797 handwritten digits, 1 x 8 x 8, a fifth of them for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]
    everything = Split(images, torch.from_numpy(digits.target.astype(np.int64)))
    train, test = hold_out(everything, 0.2)
    return ImageData("digits", tuple(map(str, range(10))), train, test)


def _load_cifar10(data_dir: Path, url: str | None) -> ImageData:
    """CIFAR-10 from the archive. Only files whose MD5 torchvision knows are unpickled."""
    from torchvision.datasets import CIFAR10

    folder = data_dir / CIFAR10.base_folder
    if not folder.is_dir():
        with _alone_in(data_dir):
            if not folder.is_dir():  # nor has the process that was here before made it
                archive = data_dir / CIFAR10.filename
                _fetch(archive, CIFAR10.url, url, CIFAR10.tgz_md5)
                _unpack(archive, folder)
    try:
        parts = [CIFAR10(str(data_dir), train=train) for train in (True, False)]
    except RuntimeError as error:
        raise UserError(
            f"{folder} is damaged (a file's MD5 is wrong): delete it and start again"
        ) from error
    train, test = (
        Split(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),  # (N, C, H, W)
            torch.tensor(part.targets),
        )
        for part in parts
    )
    return ImageData("cifar10", CIFAR10_CLASSES, train, test)


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive that holds one folder, all of it or nothing."""
    import tarfile

    try:
        with (
            tempfile.TemporaryDirectory(dir=folder.parent) as unpacked,
            tarfile.open(archive) as tar,
        ):
            tar.extractall(unpacked, filter="data")  # refuses to write outside
            os.replace(Path(unpacked) / folder.name, folder)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"cannot unpack {archive} into {folder.parent}: {error}") from error


def _load_fashion_mnist(data_dir: Path, url: str | None) -> ImageData:
    """FashionMNIST from `data_dir`, from Debian's package, or downloaded."""
    from torchvision.datasets import FashionMNIST

    folder = data_dir / "FashionMNIST" / "raw"
    arrays = []
    for (name, md5), shape in zip(
        FashionMNIST.resources, [(60000, 28, 28), (60000,), (10000, 28, 28), (10000,)], strict=True
    ):
        path = folder / name
        if not path.exists() and (DEBIAN_FASHION_MNIST / name).exists():
            path = DEBIAN_FASHION_MNIST / name
        elif not path.exists():
            with _alone_in(folder):
                _fetch(path, FashionMNIST.mirrors[0] + name, url, md5)
        arrays.append(torch.from_numpy(_read_idx(path, shape)))
        good = len(shape) > 1 or int(arrays[-1].max()) < len(FASHION_MNIST_CLASSES)
        require(good, f"{path} holds labels that are no classes: delete it and start again")
    return ImageData(
        "fashion-mnist",
        FASHION_MNIST_CLASSES,
        Split(arrays[0][:, None], arrays[1].long()),
        Split(arrays[2][:, None], arrays[3].long()),
    )


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A gzipped idx file of bytes, whose header must announce `shape`."""
    header = b"\0\0\x08" + bytes([len(shape)]) + np.array(shape, ">i4").tobytes()
    size = len(header) + math.prod(shape)
    try:
        with gzip.open(path) as file:
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged or truncated ({error}): delete it") from error
    require(
        len(content) == size and content.startswith(header),
        f"{path} does not hold {' x '.join(map(str, shape))} bytes: delete it and start again",
    )
    return np.frombuffer(bytearray(content), np.uint8, offset=len(header)).reshape(shape)


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let other processes that download into a folder wait, where the system can lock files."""
    try:
        import fcntl

        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows; what cannot be written is said later
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _fetch(path: Path, official: str, url: str | None, md5: str) -> None:
    """Make sure `path` holds the file with this MD5, downloading it when it is not there.

    The bytes go to `<path>.part`, which a second start continues; only a file whose MD5 is right
    gets the final name.
    """
    import http.client
    import urllib.error
    import urllib.request

    from tqdm import tqdm

    if path.exists():
        require(_md5(path) == md5, f"{path} has a wrong MD5 (not {md5}): delete it or replace it")
        return
    address = url or official
    if not address.endswith(path.name):
        address = f"{address.rstrip('/')}/{path.name}"
    part = path.with_name(path.name + ".part")
    advice = (
        f"Give another address with --download-url (the MD5 {md5} is checked), or put {path.name} "
        f"into {path.parent} by hand"
    )
    try:
        if part.exists() and _md5(part) == md5:  # stopped just before the last step
            os.replace(part, path)
            return
        print(f"Downloading {address} (slow? {advice}.)")
        path.parent.mkdir(parents=True, exist_ok=True)
        done = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(
            address, headers={"Range": f"bytes={done}-"} if done else {}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            done = done if answer.status == 206 else 0
            length = answer.headers.get("Content-Length")
            with (
                open(part, "ab" if done else "wb") as file,
                tqdm(
                    total=done + int(length) if length else None,
                    initial=done,
                    unit="B",
                    unit_scale=True,
                    desc=path.name,
                    disable=None,
                ) as bar,
            ):
                while block := answer.read(1 << 16):
                    file.write(block)
                    bar.update(len(block))
        complete = length is None or part.stat().st_size == done + int(length)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # a .part that is longer than the file
            part.unlink(missing_ok=True)
        raise UserError(f"{address} answers {error.code} {error.reason}. {advice}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        raise UserError(f"cannot download {address}: {reason}. {advice}") from error
    require(complete, f"the download of {address} broke off; start again to continue it. {advice}")
    if _md5(part) != md5:
        part.unlink()
        raise UserError(f"{address} has a wrong MD5 (not {md5}). {advice}")
    os.replace(part, path)


def hold_out(split: Split, fraction: float, seed: int = 0) -> tuple[Split, Split]:
    """Split off a fraction, stratified by label: `(rest, held_out)`, two separate objects.

    The seed is the split's own: runs with different seeds share the split.

    Raises:
        UserError: a class is too small to be in both parts.
    """
    from sklearn.model_selection import train_test_split

    labels = None if split.labels is None else split.labels.cpu().numpy()
    try:
        parts = train_test_split(
            np.arange(len(split)), test_size=fraction, random_state=seed, stratify=labels
        )
    except ValueError as error:
        raise UserError(f"too few images to hold out a part of each class: {error}") from error
    rest, held_out = (torch.from_numpy(np.sort(part)) for part in parts)
    return split.select(rest), split.select(held_out)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel on the scale [0, 1], both `(C,)`.

    Give it the training split only.
    """
    total = torch.zeros(2, images.shape[1], dtype=torch.float64)
    # Bounded memory: the images may be memory-mapped, and large.
    for chunk in images.split(min(2000, max(1, 2**24 // images[0, 0].numel()))):
        values = chunk.float().div_(255)
        total[0] += values.sum((0, 2, 3)).cpu().double()  # Apple's GPUs have no float64
        total[1] += values.square_().sum((0, 2, 3)).cpu().double()
    mean, square = total / (len(images) * images[0, 0].numel())
    std = (square - mean**2).clamp(min=1e-12).sqrt()
    return mean.float().to(images.device), std.float().to(images.device)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _image_files(folder: Path, recursive: bool = True) -> list[Path]:
    """The image files below a folder, sorted; other files and hidden ones are passed over."""
    found: list[Path] = []
    seen = set(map(str, Path(os.path.realpath(folder)).parents))  # a link may lead back up
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if recursive else []
        if os.path.realpath(parent) in seen:  # a link in a circle
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        found += [
            Path(parent, name)
            for name in sorted(names)
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
    return found


def _labelled_files(folder: Path, classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _image_files(folder / name)
        require(bool(found), f"the class folder {folder / name} holds no images")
        paths += found
        labels += [label] * len(found)
    return paths, labels


def _load_folder(folder: Path, data_dir: Path, image_size: int) -> ImageData:
    """A folder of images in one of the three layouts of `load_images`."""
    try:
        names = [path.name for path in _subfolders(folder)]
        # `train` may also be the name of a class: then it holds images and has neighbours.
        split = "train" in names and (
            set(names) <= {"train", "test"} or bool(_subfolders(folder / "train"))
        )
        others = sorted(set(names) - {"train", "test"}) if split else []
        require(
            not others,
            f"{folder} has {', '.join(others)} beside train: call the folder of test images test, "
            "and move others away",
        )
        train_folder = folder / "train" if split else folder
        test_folder = folder / "test" if split and "test" in names else None
        classes = [p.name for p in _subfolders(train_folder)]
        loose = _image_files(train_folder, recursive=False)
        if not classes:
            require(bool(loose), f"{train_folder} holds no images")
            images = _decode(loose, train_folder, data_dir, image_size)
            return ImageData(folder.resolve().name, (), Split(images, None), None)
        require(
            not loose,
            f"{train_folder} holds both class folders and {len(loose)} loose images such as "
            f"{loose[0].name if loose else ''}: put each image into a class folder",
        )
        require(
            len(classes) > 1,
            f"{train_folder} has one class only ({classes[0]}): it takes two or more, or images "
            "without a sub-folder to train without labels",
        )
        paths, labels = _labelled_files(train_folder, classes)
        count = len(paths)
        if test_folder is not None:
            names = [p.name for p in _subfolders(test_folder)]
            strange = sorted(set(names) - set(classes))
            require(not strange, f"{test_folder} has a class that train has not: {strange[:1]}")
            require(bool(names), f"{test_folder} has no class folders")
            more_paths, more_labels = _labelled_files(test_folder, names)
            paths += more_paths
            labels += [classes.index(names[label]) for label in more_labels]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    targets = torch.tensor(labels)
    if test_folder is None:
        # Before decoding, so that both parts are slices of the cache and not copies in memory.
        train, test = hold_out(Split(torch.arange(count), targets), 0.2)
        count, order = len(train), torch.cat((train.images, test.images))
        paths, targets = [paths[i] for i in order], targets[order]
    images = _decode(paths, folder, data_dir, image_size)
    train, test = Split(images[:count], targets[:count]), Split(images[count:], targets[count:])
    return ImageData(folder.resolve().name, tuple(classes), train, test)


def decode_image(path: str | Path, size: int) -> np.ndarray:
    """Decode an image file of any mode and size to `(3, size, size)`, uint8 RGB.

    EXIF rotation is applied, transparency is put on white, 16-bit values are scaled to 8 bits, the
    shorter side is resized to `size` (bicubic, antialiased) and the centre is cropped.

    Raises:
        OSError or another error of Pillow's: the file is no image, truncated or far too large.
    """
    from PIL import Image, ImageOps

    # By its name alone an image could be PostScript, which Pillow hands to Ghostscript.
    with Image.open(path, formats=IMAGE_FORMATS) as opened:
        image: Image.Image = opened
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise OSError(f"{image.width} x {image.height} pixels are too many")
        image.draft("RGB", (2 * size, 2 * size))  # decode huge JPEGs at a fraction of their size
        image.load()
        if image.getexif().get(0x0112, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":  # 16-bit, or float in [0, 1]
            values = np.asarray(image, np.float64) * (1 if image.mode == "F" else 1 / 65535)
            image = Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))
        if image.mode in ("LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image = image.convert("RGBA")
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        return np.asarray(image).transpose(2, 0, 1)  # (3, H, W)


def _decode(paths: list[Path], folder: Path, data_dir: Path, size: int) -> Tensor:
    """All images as one memory-mapped uint8 tensor `(N, 3, size, size)`.

    The cache file is named after the folder and a fingerprint of every file's name, size and time,
    so a changed file means a new cache; its checksum is verified at every start.
    """
    try:
        stats = [path.stat() for path in paths]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    for path, status in zip(paths, stats, strict=True):
        require(stat.S_ISREG(status.st_mode), f"{path} is not a plain file: remove it")
    listing = "\n".join(
        f"{path.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}"
        for path, status in zip(paths, stats, strict=True)
    )
    version = f"{CACHE_VERSION} {size}\n{listing}".encode(errors="surrogateescape")
    origin = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]
    stem = f"{folder.resolve().name}-{origin}-{size}-"
    cache = data_dir / "cache" / f"{stem}{hashlib.sha256(version).hexdigest()[:16]}.npy"
    shape = (len(paths), 3, size, size)
    images = _open_cache(cache, shape)
    if images is not None:
        return images
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent, prefix=".decoding-") as temporary:
            draft = Path(temporary, "images.npy")
            drafted = np.lib.format.open_memmap(draft, "w+", np.uint8, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk shows here, not as a SIGBUS later
                with open(draft, "rb+") as file:
                    os.posix_fallocate(file.fileno(), 0, draft.stat().st_size)
            _decode_into(drafted, paths, folder, size)
            drafted.flush()
            Path(temporary, "sum.json").write_text(json.dumps({"crc32": zlib.crc32(drafted.data)}))
            os.replace(Path(temporary, "sum.json"), cache.with_suffix(".json"))
            os.replace(draft, cache)
    except OSError as error:
        print(f"Decoding without a cache: cannot write {cache} ({error.strerror}).")
        array = np.empty(shape, np.uint8)
        _decode_into(array, paths, folder, size)
        return torch.from_numpy(array)
    for old in cache.parent.glob(f"{glob.escape(stem)}*"):
        if old.suffix in (".npy", ".json") and old.stem != cache.stem:
            old.unlink(missing_ok=True)
    images = _open_cache(cache, shape)
    require(images is not None, f"{cache} changed while it was written: start again")
    return typing.cast(Tensor, images)


def _open_cache(cache: Path, shape: tuple[int, ...]) -> Tensor | None:
    """The cached images, or None when they are missing or damaged."""
    if not cache.exists():
        return None
    try:
        # Copy on write: torch wants a writable array, and nothing may reach the file.
        array = np.lib.format.open_memmap(cache, "c")
        checksum = json.loads(cache.with_suffix(".json").read_text())["crc32"]
        if array.shape == shape and array.dtype == np.uint8 and zlib.crc32(array.data) == checksum:
            return torch.from_numpy(array)
    except Exception:  # numpy's parser of the header raises nearly anything
        pass
    print(f"The image cache {cache} is damaged: decoding again.")
    return None


def _decode_into(array: np.ndarray, paths: list[Path], folder: Path, size: int) -> None:
    """Decode every path into its row of `array`, in threads (Pillow releases the lock)."""
    from tqdm import tqdm

    def decode(start: int) -> list[tuple[Path, Exception]]:
        failed: list[tuple[Path, Exception]] = []
        for row in range(start, min(start + 256, len(paths))):
            try:
                array[row] = decode_image(paths[row], size)
            except Exception as error:  # Pillow's decoders raise nearly anything
                failed.append((paths[row], error))
        return failed

    failed: list[tuple[Path, Exception]] = []
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(paths), desc=f"Decoding {folder.name}", unit="img", disable=None) as bar,
    ):
        for done in pool.map(decode, range(0, len(paths), 256)):
            failed += done
            bar.update(min(256, len(paths) - bar.n))
    if failed:
        path, error = failed[0]
        reason = "no image format that Pillow knows" if "cannot identify" in str(error) else error
        raise UserError(
            f"{len(failed)} of {len(paths)} images in {folder} cannot be read; the first is "
            f"{path}: {reason}. Repair or remove them"
        )


# ------------------------------------------------------------------------------ augmentation
# Every op takes float images (B, C, H, W) in [0, 1] and returns new ones. Parameters are drawn per
# sample from `generator` (torch's, or a `Shard` of one), which must live on the images' device. Ops
# come in pairs: `random_*` (and `color_jitter`, `gaussian_blur`) draw, the other half applies given
# parameters and equals torchvision's functional op for the same parameters.

GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601 luma, as in torchvision


@dataclass(frozen=True)
class Shard:
    """A generator for one of several processes, which together draw what a single one would.

    All processes draw the numbers of all `total` samples; each keeps those of its own `rows`.
    """

    generator: torch.Generator
    rows: Tensor
    total: int


Generator = torch.Generator | Shard


def draw(
    shape: tuple[int, ...], generator: Generator | None, device: Any, sample_dim: int = 0
) -> Tensor:
    """Uniform numbers in [0, 1) of a shape that counts samples along `sample_dim`."""
    if not isinstance(generator, Shard):
        return torch.rand(shape, generator=generator, device=device)
    shape = (*shape[:sample_dim], generator.total, *shape[sample_dim + 1 :])
    numbers = torch.rand(shape, generator=generator.generator, device=device)
    return numbers.index_select(sample_dim, generator.rows)


def _uniform(
    count: int, low: float, high: float, images: Tensor, generator: Generator | None
) -> Tensor:
    return draw((count,), generator, images.device) * (high - low) + low


def _chosen(images: Tensor, p: float, generator: Generator | None) -> Tensor:
    """Which samples an op with probability `p` applies to, `(B,)`, bool."""
    return draw((len(images),), generator, images.device) < p


def draw_crop_boxes(
    images: Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    generator: Generator | None = None,
) -> Tensor:
    """Boxes `(B, 4)` of top, left, height, width with `RandomResizedCrop`'s distribution.

    As in torchvision, ten attempts per sample, then the largest centred box of an allowed ratio.
    """
    count, _, height, width = images.shape
    draws = draw((4, count, 10), generator, images.device, sample_dim=1)
    area = height * width * (scale[0] + draws[0] * (scale[1] - scale[0]))  # (B, 10)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + draws[1] * (high - low))
    w = (area * aspect).sqrt().round()
    h = (area / aspect).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)  # (B, 1)
    h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]
    # randint(0, H - h + 1); the product of a draw just below 1 may round up
    top = torch.minimum((draws[2, :, 0] * (height - h + 1)).floor(), height - h)
    left = torch.minimum((draws[3, :, 0] * (width - w + 1)).floor(), width - w)
    boxes = torch.stack((top, left, h, w), 1)
    whole_h = min(height, round(width / ratio[0])) if width / height < ratio[0] else height
    whole_w = min(width, round(height * ratio[1])) if width / height > ratio[1] else width
    whole = ((height - whole_h) // 2, (width - whole_w) // 2, whole_h, whole_w)
    fallback = torch.stack([torch.full_like(top, value) for value in whole], 1)
    return torch.where(fits.any(1, keepdim=True), boxes, fallback)


def resized_crop(
    images: Tensor,
    boxes: Tensor,
    size: int | tuple[int, int],
    mirrored: Tensor | None = None,
) -> Tensor:
    """Crop each image to its box and resize bilinearly, without antialiasing.

    Equals `torchvision.transforms.functional.resized_crop(..., antialias=False)`; sample positions
    are clamped to the box, so nothing outside it is read. Crops that `mirrored` `(B,)` marks are
    read from right to left, which costs nothing.
    """
    out_h, out_w = (size, size) if isinstance(size, int) else size
    height, width = images.shape[2:]

    def positions(start: Tensor, length: Tensor, full: int, out: int) -> Tensor:
        centres = (torch.arange(out, device=images.device) + 0.5) / out  # (out,)
        where = start[:, None] + centres * length[:, None] - 0.5  # (B, out), in pixels
        inside = where.clamp(start[:, None], (start + length - 1)[:, None])
        return (2 * inside + 1) / full - 1  # grid_sample's [-1, 1]

    top, left, box_h, box_w = boxes.to(images.dtype).unbind(1)
    y = positions(top, box_h, height, out_h)[:, :, None].expand(-1, -1, out_w)
    x = positions(left, box_w, width, out_w)
    if mirrored is not None:
        x = torch.where(mirrored[:, None], x.flip(1), x)
    x = x[:, None, :].expand(-1, out_h, -1)
    return F.grid_sample(images, torch.stack((x, y), -1), align_corners=False)  # (B, C, out, out)


def random_resized_crop(
    images: Tensor,
    size: int | tuple[int, int] | None = None,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.0,
    generator: Generator | None = None,
) -> Tensor:
    """A random box of each image, resized to `size` (default: the images' own).

    It is mirrored with probability `flip`, as `random_horizontal_flip` would do in a second pass.
    """
    boxes = draw_crop_boxes(images, scale, ratio, generator)
    mirrored = _chosen(images, flip, generator)
    height, width = images.shape[2:]
    return resized_crop(images, boxes, (height, width) if size is None else size, mirrored)


def random_horizontal_flip(
    images: Tensor, p: float = 0.5, generator: Generator | None = None
) -> Tensor:
    """Mirror each image with probability `p`."""
    chosen = _chosen(images, p, generator)
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def grayscale(images: Tensor) -> Tensor:
    """The luma `(B, 1, H, W)` of RGB images; grey images stay as they are."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    luma = (red * GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])
    return luma[:, None]


def _blend(images: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    """`factor * images + (1 - factor) * other`, clamped to [0, 1]; `factor` is `(B,)`."""
    factor = factor[:, None, None, None]
    return (images * factor).add_((1 - factor) * other).clamp_(0, 1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale each image by its factor `(B,)`, clamped to [0, 1]."""
    return (images * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its mean luma; `factor` is `(B,)`."""
    return _blend(images, grayscale(images.mean((2, 3), keepdim=True)), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its own grey version; `factor` is `(B,)`."""
    return _blend(images, grayscale(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB images by `shift` `(B,)`, in [-0.5, 0.5] of a full circle. Exact HSV.

    Value and saturation are kept, so each new channel is V - (V - min) * clamp(min(k, 4 - k), 0, 1)
    with k = (n + 6 hue) mod 6 and n = 5, 3, 1 for red, green, blue. Masks are numbers here: on a
    CPU, torch.where takes as long as 40 additions.
    """
    value, least = images.amax(1), images.amin(1)  # (B, H, W)
    chroma = value - least
    divisor = chroma.clamp_min(1e-12)  # grey has no hue, and its chroma of 0 hides what comes out
    share = (images - least[:, None]).div_(divisor[:, None])  # of the largest, which has exactly 1
    red, green, blue = share.unbind(1)
    hues = green - blue, (blue - red).add_(2), (red - green).add_(4)  # where that is the largest
    is_red, is_green, _ = share.floor_().unbind(1)
    hue = hues[2].lerp_(hues[1], is_green).lerp_(hues[0], is_red)
    hue.div_(6).add_(shift[:, None, None])  # of a circle
    # k is 2 where this fraction is a half: min(k, 4 - k) is 2 less the distance from there
    offset = 2 - torch.arange(3, device=images.device)[:, None, None] / 3  # (n - 2) / 6, and 1.5
    fraction = torch.add(hue[:, None], offset, out=share).frac_()  # (B, 3, H, W)
    weight = fraction.sub_(0.5).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return weight.mul_(chroma[:, None]).neg_().add_(value[:, None])


def color_jitter(
    images: Tensor,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    p: float = 1.0,
    generator: Generator | None = None,
) -> Tensor:
    """`ColorJitter` with probability `p` per sample, in this fixed order of its four ops.

    torchvision shuffles the order; the fixed one lets all samples share each op. Factors are
    uniform in [max(0, 1 - strength), 1 + strength], the hue shift in [-hue, hue]. Saturation and
    hue leave grey images as they are.
    """
    chosen = _chosen(images, p, generator)
    jittered = images
    for strength, adjust in (
        (brightness, adjust_brightness),
        (contrast, adjust_contrast),
        (saturation, adjust_saturation),
    ):
        if strength > 0 and not (adjust is adjust_saturation and images.shape[1] == 1):
            low, high = max(0.0, 1 - strength), 1 + strength
            jittered = adjust(jittered, _uniform(len(images), low, high, images, generator))
    if hue > 0 and images.shape[1] == 3:
        jittered = adjust_hue(jittered, _uniform(len(images), -hue, hue, images, generator))
    return jittered if p >= 1 else torch.where(chosen[:, None, None, None], jittered, images)


def random_grayscale(images: Tensor, p: float = 0.1, generator: Generator | None = None) -> Tensor:
    """Replace each image by its luma in all channels with probability `p`."""
    chosen = _chosen(images, p, generator)
    return torch.where(chosen[:, None, None, None], grayscale(images), images)


def blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Gaussian blur with reflected borders; `sigma` `(B,)` in pixels, `kernel_size` odd."""
    radius = kernel_size // 2
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)  # (B, kernel_size)
    kernel /= kernel.sum(1, keepdim=True)
    kernels = (kernel[:, :, None] * kernel[:, None, :]).repeat_interleave(images.shape[1], 0)
    padded = F.pad(images, (radius,) * 4, mode="reflect").flatten(0, 1)[None]
    return F.conv2d(padded, kernels[:, None], groups=len(kernels)).view(images.shape)


def gaussian_blur(
    images: Tensor,
    kernel_size: int = 3,
    sigma: tuple[float, float] = (0.1, 2.0),
    p: float = 1.0,
    generator: Generator | None = None,
) -> Tensor:
    """Blur each image with probability `p` and its own sigma, uniform in the range `sigma`."""
    chosen = _chosen(images, p, generator)
    drawn = _uniform(len(images), *sigma, images, generator)
    blurred = blur(images, drawn, kernel_size)
    return blurred if p >= 1 else torch.where(chosen[:, None, None, None], blurred, images)


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]; float images as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """`(images - mean) / std` per channel; `mean` and `std` are `(C,)`, of the training split."""
    mean, std = (value.to(images.device)[None, :, None, None] for value in (mean, std))
    return (images - mean).div_(std)


# ------------------------------------------------------------------------------- checkpoints


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`; after the block it is synced and renamed to `path`.

    Raises:
        UserError: it cannot be written. What was at `path` before is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, unreadable or holds something else.
    """
    require(path.is_file() or not path.exists(), f"{path} is not a plain file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    require(isinstance(values, dict), f"{path} is damaged: it does not hold a JSON object")
    return values


def update_summary(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Put `values` into the run's `summary.json`, keep the other stages' numbers, return all.

    `seconds` is the sum of the stages' own `*_seconds`.
    """
    path = folder / "summary.json"
    summary = {**(read_json(path) if path.exists() else {}), **values}
    for key, value in summary.items():
        good = _is_number(value) or (
            isinstance(value, dict) and bool(_SUMMARY_TABLES.fullmatch(key))
        )
        if good and key.startswith("few_label_accuracy_"):
            parts = ("labels_per_class", "mean", "sd", "draws")
            good = isinstance(value, dict) and all(_is_number(value.get(part)) for part in parts)
        require(good, f"{path} is damaged: {key} is {str(value)[:60]!r}")
    summary["seconds"] = sum(v for k, v in summary.items() if k.endswith("_seconds"))
    write_json(path, summary)
    return summary


# What is no number in a summary: by class, by method, by mean and deviation.
_SUMMARY_TABLES = re.compile(r".*per_class_accuracy|few_label_accuracy_.*|label_efficiency")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # whole numbers have no end


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a table, atomically; the columns are those of all rows, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def finite(text: str) -> float:
    """The number that `text` spells; ValueError when it is not finite."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def read_csv(path: Path, columns: dict[str, Callable[[str], Any]]) -> list[dict[str, Any]]:
    """The rows that `write_csv` wrote, each column read by its type; [] when there is no file.

    Raises:
        UserError: it is no such table.
    """
    if not path.exists():
        return []
    require(path.is_file(), f"{path} is not a plain file")
    try:
        with path.open(newline="") as file:
            table = list(csv.DictReader(file, strict=True))
        return [{name: kind(row[name]) for name, kind in columns.items()} for row in table]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error!r}; delete it to begin anew") from error


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write named arrays as a compressed `.npz`, atomically."""
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **typing.cast(Any, arrays))


def check_finite(epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """See that no gradient spoiled the weights or what the optimizer remembers.

    Raises:
        Diverged: one of them is not finite (the last loss was).
    """
    tensors = dict(model.state_dict())
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"the optimizer's {k} {number}": v for k, v in values.items()}
    for name, value in tensors.items():
        if isinstance(value, Tensor) and not value.isfinite().all():
            raise Diverged(
                f"{name} is not finite after epoch {epoch}; the epoch before is kept. "
                "Try a lower --learning-rate"
            )


def save_checkpoint(
    path: Path,
    script: str,
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, float]],
    config: Any,
) -> None:
    """Write everything that the run needs to go on after `epoch` finished epochs, atomically.

    The rows of `metrics.csv` are part of it, so that the table and the weights always agree.

    Raises:
        Diverged: a weight is not finite (the last loss was, but not its gradient); the checkpoint
            of the epoch before stays.
    """
    check_finite(epoch, model, optimizer)
    state = {
        "script": script,
        "epoch": epoch,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history,
        "config": dataclasses.asdict(config),
    }
    with atomic_file(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch reports a full disk so
            raise OSError(str(error).splitlines()[0]) from error
        _seal(temporary)


# torch.load does not notice every changed byte, so the SHA-256 of the archive is kept as its
# comment: an archive ends with the comment's length (2 bytes) and the comment.
_SEAL_LENGTH = (64).to_bytes(2, "little")


def _seal(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.truncate()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, os.SEEK_END)
        file.write(_SEAL_LENGTH + digest.encode())


def _sealed(content: bytes) -> bool:
    digest = hashlib.sha256(content[:-66]).hexdigest()
    return content[-66:] == _SEAL_LENGTH + digest.encode()


def load_checkpoint(path: Path, script: str) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU, without running any code from the file.

    Raises:
        UserError: missing, truncated, damaged, not a checkpoint, or another script's.
    """
    require(path.is_file(), f"{path} is missing: the run has no finished epoch to go on from")
    try:
        content = path.read_bytes()
        require(_sealed(content), f"{path} is damaged or no checkpoint (its checksum is wrong)")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # what is packed may be a bomb
            plain = all(entry.compress_type == 0 for entry in archive.infolist())
            require(plain, f"{path} is not a checkpoint of these scripts: it is compressed")
        with warnings.catch_warnings():  # the one line that follows says enough
            warnings.simplefilter("ignore")
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch.load raises nearly anything on what it does not know
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is not a readable checkpoint ({reason}); delete it to begin again"
        ) from error
    wanted = {"script", "epoch", "model", "optimizer", "history", "config"}
    require(
        isinstance(state, dict) and wanted <= state.keys(),
        f"{path} is not a checkpoint of these scripts",
    )
    rows = state["history"] if isinstance(state["history"], list) else []
    good = bool(rows) and all(isinstance(row, dict) for row in rows)
    good = good and all(
        isinstance(v, str) if k == "cell" else _is_number(v) for row in rows for k, v in row.items()
    )
    good = good and all("train_loss" in row or {"loss", "seconds"} <= row.keys() for row in rows)
    good = good and isinstance(state["config"], dict) and type(state["epoch"]) is int
    good = good and rows[-1].get("epoch") == state["epoch"]
    for cell in {row.get("cell") for row in rows} if good else ():
        epochs = [row.get("epoch") for row in rows if row.get("cell") == cell]
        good = good and epochs == list(range(1, len(epochs) + 1))
    require(good, f"{path} is damaged: its epochs do not fit together")
    require(
        state["script"] == script, f"{path} is a checkpoint of {state['script']}, not of {script}"
    )
    beside = path.parent / "config.json"
    run = read_json(beside) if beside.exists() else {}
    for name in _NEVER_DIFFER & run.keys() & state["config"].keys():
        theirs = state["config"][name]
        require(theirs == run[name], f"{path} is of another run: {flag(name)} is {theirs} there")
    return state


_NEVER_DIFFER = {field.name for field in dataclasses.fields(TrainingConfig)} - FREE_ON_RESUME


def _check_tensors(
    state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> None:
    """Raise ValueError unless all tensors are finite and shaped like those that they replace.

    A fused optimizer does not look, and reads beyond the end of a momentum of another shape.
    """
    wanted = model.state_dict()
    pairs = [(value, wanted.get(name)) for name, value in state["model"].items()]
    if optimizer is not None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for number, values in state["optimizer"]["state"].items():
            pairs += [(v, None if k == "step" else weights[number]) for k, v in values.items()]
        groups = zip(state["optimizer"]["param_groups"], optimizer.param_groups, strict=True)
        for saved, own in groups:
            pairs += [(saved[key], None) for key, value in own.items() if _is_number(value)]
    for value, like in pairs:
        if not isinstance(value, Tensor) and value is not None and not _is_number(value):
            raise ValueError(f"{value!r} is no tensor")
        if isinstance(value, Tensor):
            plain = value.layout == torch.strided and value.device.type == "cpu"
            if not plain or value.is_quantized or value.is_complex() or not value.isfinite().all():
                raise ValueError("a tensor is of a kind that no run writes, or not finite")
            if like is not None and (value.shape, value.dtype) != (like.shape, like.dtype):
                raise ValueError(f"a tensor is {value.dtype} {tuple(value.shape)}")


def restore(
    path: Path, script: str, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> tuple[int, list[dict[str, float]]]:
    """Load a checkpoint into `model` and `optimizer`; return its epoch and history.

    Raises:
        UserError: as `load_checkpoint`, or the weights do not fit the model.
    """
    state = load_checkpoint(path, script)
    try:
        _check_tensors(state, model, optimizer)
        model.load_state_dict(state["model"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} does not fit the model of its config.json: {reason}") from error
    return state["epoch"], state["history"]


def save_weights(path: Path, model: nn.Module, metadata: dict[str, str]) -> None:
    """Write a model's weights under its own key names as safetensors, atomically."""
    from safetensors.torch import save

    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with atomic_file(path) as temporary:
        temporary.write_bytes(save(state, metadata))


class EpochLoss:
    """The losses of one epoch, kept on the device so that a step does not wait for the host.

    On the CPU a loss that is not finite stops the run before the update it would have caused; on
    an accelerator it is looked for every 50 steps and at the end of the epoch, before anything is
    saved.
    """

    def __init__(self, steps: int, epoch: int, device: torch.device):
        self.values = torch.zeros(steps, device=device)
        self.epoch, self.step = epoch, 0

    def add(self, loss: Tensor) -> None:
        """Take the next step's loss.

        Raises:
            Diverged: a loss is not finite.
        """
        self.values[self.step] = loss.detach()
        self.step += 1
        if loss.device.type == "cpu" or self.step % 50 == 0:
            self._check(self.step - (1 if loss.device.type == "cpu" else 50))

    def mean(self) -> float:
        """The epoch's mean loss."""
        self._check(0)
        return self.values[: self.step].mean().item()

    def _check(self, start: int) -> None:
        finite = self.values[start : self.step].isfinite()
        if not finite.all():
            step = start + int(finite.int().argmin()) + 1
            raise Diverged(
                f"the loss is {self.values[step - 1].item()} in epoch {self.epoch}, step {step}; "
                f"the last finished epoch is kept. Try a lower --learning-rate"
            )


def progress_bar(total: int, description: str, visible: bool = True) -> Any:
    """A bar that counts images per second; silent when the output is not a terminal."""
    from tqdm import tqdm

    disable = None if visible else True
    return tqdm(total=total, desc=description, unit="img", disable=disable, leave=False, ncols=79)


def format_seconds(seconds: float) -> str:
    """`75` as `1m15s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def scheduled_rate(peak: float, step: int, steps: int, warmup: int, schedule: str) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then `schedule`.

    `cosine` falls from `peak` to 0 at `steps` (Loshchilov & Hutter 2017), `constant` stays.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ------------------------------------------------------------------------------------ models


class SmallEncoder(nn.Sequential):
    """Three strided 3x3 convolutions (32, 64, 128), each with ReLU then BatchNorm, flattened.

    2048 features for images of 28 or 32 pixels, 128 for 8 pixels.
    """

    def __init__(self, channels: int, image_size: int):
        layers: list[nn.Module] = []
        for before, after in zip((channels, 32, 64), (32, 64, 128), strict=True):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.ReLU(), nn.BatchNorm2d(after)]
            image_size = (image_size + 1) // 2
        super().__init__(*layers)
        self.num_features = 128 * image_size**2

    def forward(self, images: Tensor) -> Tensor:
        """Features `(B, num_features)`, the channels of a pixel side by side.

        In this order flattening keeps the layout: a gradient in another one than its input makes
        the last BatchNorm's backward pass thirty times slower on a CPU.
        """
        return super().forward(images).permute(0, 2, 3, 1).flatten(1)


class SmallMapConv2d(nn.Conv2d):
    """A 1x1 or padded 3x3 convolution that is matrix products where its output has few pixels.

    A 3x3 one is a product per pixel, without the taps that only see padding: exact, and on a CPU
    up to ten times faster than oneDNN's, which is slow for many channels of few pixels. 2x2 and 1x1
    are the maps in layers 3 and 4 of a ResNet with the ImageNet stem, for images of 32 pixels. On a
    GPU only maps of one pixel are done so. It also keeps clear of oneDNN's bfloat16 weight gradient
    for 1x1 maps at stride 2, which returns uninitialised memory for the taps that see padding (seen
    in torch 2.15 on a CPU with AMX).
    """

    def forward(self, images: Tensor) -> Tensor:
        """As `nn.Conv2d`'s."""
        (height, width), stride = images.shape[2:], self.stride[0]
        out_h, out_w = (height - 1) // stride + 1, (width - 1) // stride + 1
        whole = self.kernel_size == (1, 1)
        most = 8 if whole else 4 if self.in_channels >= 512 else 3
        if max(out_h, out_w) > (most if images.device.type == "cpu" else 1):
            return super().forward(images)
        images = images.permute(0, 2, 3, 1)  # (B, H, W, C)
        weight = self.weight.permute(0, 2, 3, 1)  # (O, 3, 3, C)
        if whole:
            seen = images[:, ::stride, ::stride]
            return F.linear(seen, weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        pixels = []
        for row, column in itertools.product(range(out_h), range(out_w)):
            top, left = row * stride - 1, column * stride - 1  # of the 3x3 pixels that it sees
            rows = slice(max(0, top), min(height, top + 3))
            columns = slice(max(0, left), min(width, left + 3))
            taps = weight[
                :, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
            ]
            seen = images[:, rows, columns]
            pixels.append(F.linear(seen.flatten(1), taps.flatten(1), self.bias))  # (B, O)
        return torch.stack(pixels, 1).unflatten(1, (out_h, out_w)).permute(0, 3, 1, 2)


def make_encoder(name: str, stem: str, channels: int, image_size: int, width: int = 64) -> Any:
    """An encoder `(B, C, H, W) -> (B, num_features)` with the attribute `num_features`.

    Args:
        name: `small`, or torchvision's `resnet18`, `resnet34`, `resnet50` (same key names).
        channels: of the images.
        image_size: height and width of the images; `small` needs it.
        stem: for the ResNets `cifar` (3x3 convolution, stride 1, no max-pool; SimCLR B.9) or
            `imagenet` (7x7, stride 2, max-pool). `small` has none.
        width: channels of a ResNet's first stage, of which the later ones have 2, 4 and 8 times as
            many.
    """
    if name == "small":
        return SmallEncoder(channels, image_size)
    from torchvision.models import resnet

    class ResNet(resnet.ResNet):
        def _make_layer(self, block: Any, planes: int, *others: Any, **named: Any) -> nn.Sequential:
            if planes == 64:  # the first stage
                self.inplanes = width
            return super()._make_layer(block, planes * width // 64, *others, **named)

    block, layers = {
        "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
        "resnet34": (resnet.BasicBlock, [3, 4, 6, 3]),
        "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
    }[name]
    encoder: Any = ResNet(block, layers)
    encoder.num_features = encoder.inplanes
    encoder.fc = nn.Identity()
    encoder.bn1 = nn.BatchNorm2d(width)
    if stem == "cifar":
        encoder.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        encoder.maxpool = nn.Identity()
    elif (channels, width) != (3, 64):
        encoder.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
    nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    for module in encoder.modules():
        kinds = (((3, 3), (1, 1)), ((1, 1), (0, 0)))
        if isinstance(module, nn.Conv2d) and (module.kernel_size, module.padding) in kinds:
            module.__class__ = SmallMapConv2d  # the weights and their names stay
    return encoder


def count_parameters(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# -------------------------------------------------------------------------------- evaluation


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode (BatchNorm and Dropout fixed) and no gradients, the old mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def extract_features(
    encoder: nn.Module,
    images: Tensor,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    fabric: Any = None,
    batch_size: int = 500,
) -> Tensor:
    """Features `(N, D)`, float32, of a frozen encoder in eval mode; the encoder is not changed.

    Args:
        encoder: any module `(B, C, H, W) -> (B, D)`.
        images: `(N, C, H, W)`, uint8 or float in [0, 1].
        mean: `(C,)`, the training split's; None leaves the images as they are.
        std: likewise.
        fabric: the Lightning Fabric whose precision to use; None for float32.
        batch_size: images per step; the result does not depend on it, up to the rounding of steps
            of one or two images, for which libraries have kernels of their own.
    """
    device = next(encoder.parameters()).device
    features = []
    with evaluating(encoder), fabric.autocast() if fabric else contextlib.nullcontext():
        for batch in images.split(batch_size):
            inputs = to_float(batch.to(device))
            if mean is not None and std is not None:
                inputs = normalize(inputs, mean, std)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            features.append(encoder(inputs).float())
    return torch.cat(features)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 200,
    temperature: float = 0.1,
) -> float:
    """Accuracy in [0, 1] of the weighted k-nearest-neighbour vote (Wu et al. 2018, section 3.4).

    Cosine similarity s; each of the k neighbours votes for its class with weight exp(s /
    temperature). `k` is capped at the number of training features.
    """
    bank = F.normalize(train_features, dim=1)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    correct = torch.zeros((), dtype=torch.long, device=bank.device)
    for features, labels in zip(test_features.split(1000), test_labels.split(1000), strict=True):
        similarity = F.normalize(features, dim=1) @ bank.T  # (B, N)
        nearest, index = similarity.topk(min(k, len(bank)), dim=1)  # (B, k)
        votes = torch.zeros(len(features), classes, device=bank.device)
        votes.scatter_add_(1, train_labels[index], ((nearest - 1) / temperature).exp())
        correct += (votes.argmax(1) == labels).sum()
    return correct.item() / len(test_labels)


@dataclass(frozen=True)
class ProbeResult:
    """What `linear_probe` found: curves, and the last epoch's test predictions and accuracy."""

    history: list[dict[str, float]]
    predictions: Tensor
    accuracy: float


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    epochs: int = 100,
    learning_rate: float = 0.01,
    weight_decay: float = 5e-6,
    batch_size: int = 512,
    seed: int = 0,
) -> ProbeResult:
    """Train a linear layer on fixed features and report its last epoch.

    Features `(N, D)` are standardised with the training features' statistics; Adam with cosine.
    `history` has a row per epoch: `train_loss` and `train_accuracy` from the training pass itself,
    `test_loss` and `test_accuracy` after it. Accuracies in [0, 1].

    Raises:
        Diverged: the loss is not finite.
    """
    device = train_features.device
    std, mean = torch.std_mean(train_features, 0, correction=0)
    std = std.clamp(min=1e-6)
    train_features = (train_features - mean) / std
    test_features = (test_features - mean) / std
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    weight = torch.zeros(classes, train_features.shape[1], device=device, requires_grad=True)
    bias = torch.zeros(classes, device=device, requires_grad=True)
    optimizer = torch.optim.Adam(
        [weight, bias], learning_rate, weight_decay=weight_decay, fused=device.type != "mps"
    )
    steps = math.ceil(len(train_labels) / batch_size)
    history = []
    for epoch in range(epochs):
        order = torch.randperm(len(train_labels), generator=epoch_generator(seed, epoch))
        order = order.to(device)
        losses = EpochLoss(steps, epoch + 1, device)
        total = torch.zeros(2, device=device)
        for step, index in enumerate(order.split(batch_size)):
            rate = scheduled_rate(learning_rate, epoch * steps + step, epochs * steps, 0, "cosine")
            optimizer.param_groups[0]["lr"] = rate
            labels = train_labels[index]
            logits = F.linear(train_features[index], weight, bias)
            loss = F.cross_entropy(logits, labels)
            losses.add(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total[0] += loss.detach() * len(index)
            total[1] += (logits.argmax(1) == labels).sum()
        losses.mean()  # looks at all of them, which `add` leaves out on an accelerator
        with torch.no_grad():
            logits = F.linear(test_features, weight, bias)
            predictions = logits.argmax(1)
            test_loss = F.cross_entropy(logits, test_labels).item()
        if not math.isfinite(test_loss):
            raise Diverged(f"the linear probe's test loss is {test_loss} in epoch {epoch + 1}")
        train_loss, train_accuracy = (total / len(train_labels)).tolist()
        history.append(
            {
                "epoch": epoch + 1,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "test_loss": test_loss,
                "test_accuracy": accuracy(predictions, test_labels),
            }
        )
    return ProbeResult(history, predictions.cpu(), history[-1]["test_accuracy"])


def few_label_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    labels_per_class: int,
    seeds: Sequence[int] = range(5),
) -> tuple[float, float]:
    """Test accuracy of logistic regression on few labels: mean and standard deviation over draws.

    Each seed draws `labels_per_class` training images of each class (fewer where a class has
    fewer). Features are standardised with all training features; the penalty is scikit-learn's
    default.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train_features.cpu().numpy())
    train, test = (scaler.transform(f.cpu().numpy()) for f in (train_features, test_features))
    labels, targets = train_labels.cpu().numpy(), test_labels.cpu().numpy()
    scores = []
    for seed in seeds:
        draw = np.random.default_rng(seed)
        chosen = np.concatenate(
            [
                draw.permutation(np.flatnonzero(labels == label))[:labels_per_class]
                for label in np.unique(labels)
            ]
        )
        model = LogisticRegression(max_iter=2000).fit(train[chosen], labels[chosen])
        scores.append(model.score(test, targets))
    return float(np.mean(scores)), float(np.std(scores, ddof=1))


def train_classifier(
    classifier: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    labels: Tensor,
    prepare: Callable[[Tensor, torch.Generator], Tensor],
    epochs: int,
    seed: int,
    fabric: Any,
    start: int = 0,
    batch_size: int = 256,
) -> Iterator[dict[str, Any]]:
    """Cross-entropy on `inputs[index]` after `prepare`, cosine from the optimizer's first rate.

    Args:
        classifier: any module `(B, ...) -> (B, K)`.
        optimizer: over its weights; its `defaults["lr"]` is the peak rate.
        inputs: `(N, ...)`, images or features, on the device to compute on.
        labels: `(N,)`.
        prepare: augments and normalises a batch, with a generator on the inputs' device.
        epochs: the schedule's length; `start` of them are done.
        seed: of order and augmentation.
        fabric: Lightning Fabric.
        start: epochs that are done, when the training goes on.
        batch_size: capped at N; a smaller last batch is left out.

    Yields:
        `epoch`, `train_loss` and `train_accuracy` in [0, 1] after each epoch.

    Raises:
        Diverged: the loss is not finite.
    """
    wrapped, wrapped_optimizer = fabric.setup(classifier, optimizer)
    peak, batch = optimizer.defaults["lr"], min(batch_size, len(inputs))
    steps = len(inputs) // batch
    for epoch in range(start, epochs):
        order = torch.randperm(len(inputs), generator=epoch_generator(seed, epoch, stream=2))
        order = order.to(inputs.device)
        generator = epoch_generator(seed, epoch, inputs.device, stream=3)
        losses = EpochLoss(steps, epoch + 1, inputs.device)
        correct = torch.zeros((), dtype=torch.long, device=inputs.device)
        classifier.train()
        for step in range(steps):
            rate = scheduled_rate(peak, epoch * steps + step, epochs * steps, 0, "cosine")
            optimizer.param_groups[0]["lr"] = rate
            index = order[step * batch : (step + 1) * batch]
            logits = wrapped(prepare(inputs[index], generator))  # (B, K)
            loss = F.cross_entropy(logits, labels[index])
            losses.add(loss)
            optimizer.zero_grad()
            fabric.backward(loss)
            wrapped_optimizer.step()
            correct += (logits.argmax(1) == labels[index]).sum()
        yield {
            "epoch": epoch + 1,
            "train_loss": losses.mean(),
            "train_accuracy": correct.item() / (steps * batch),
        }
    check_finite(epochs, classifier, optimizer)


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Share of right predictions, in [0, 1]."""
    return (predictions == labels).sum().item() / len(labels)


def confusion_matrix(labels: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """Counts `(K, K)`: row = true class, column = predicted class."""
    pairs = labels.cpu() * classes + predictions.cpu()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def per_class_accuracy(matrix: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """Class name to accuracy in [0, 1]; classes without a test image are left out."""
    right, count = matrix.diag(), matrix.sum(1)
    return {
        name: right[i].item() / count[i].item() for i, name in enumerate(classes) if count[i] > 0
    }


def embedding_std(embeddings: Tensor) -> float:
    """Mean over dimensions of the standard deviation of L2-normalised embeddings `(N, D)`.

    1 / sqrt(D) when they fill the sphere, 0 when they collapse (SimSiam, section 4.1).
    """
    return F.normalize(embeddings.float(), dim=1).std(0).mean().item()


def rank_me(embeddings: Tensor) -> float:
    """RankMe (Garrido et al. 2023, equation 1): effective rank, between 1 and min(N, D)."""
    values = torch.linalg.svdvals(embeddings.float().cpu())
    p = values / values.sum().clamp(min=1e-12) + 1e-7
    return torch.exp(-(p * p.log()).sum()).item()


def project_2d(
    features: Tensor, method: Literal["tsne", "umap"], seed: int, neighbours: int = 30
) -> np.ndarray:
    """A two-dimensional map `(N, 2)` of features by t-SNE or UMAP, cosine distances.

    For t-SNE the normalised features go through PCA to 50 dimensions first (van der Maaten &
    Hinton 2008, section 4.1). 450 iterations with coarser sums (`angle`) take a third of the time
    of scikit-learn's defaults for the same picture: trustworthiness of 10,000 images 0.991, not
    0.992.
    """
    require(len(features) >= 5, f"a map takes at least 5 images, not {len(features)}")
    values = F.normalize(features.float(), dim=1).cpu().numpy()
    neighbours = max(1, min(neighbours, (len(values) - 1) // 3))
    if method == "umap":
        with warnings.catch_warnings():  # a fixed seed means one thread, as documented
            warnings.filterwarnings("ignore", "n_jobs value", UserWarning)
            from umap import UMAP

            return UMAP(n_neighbors=max(2, neighbours), random_state=seed).fit_transform(values)
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    values = PCA(min(50, *values.shape), random_state=seed).fit_transform(values)
    jobs = torch.get_num_threads()
    steps = {"max_iter": 450, "angle": 0.7}
    tsne = TSNE(perplexity=neighbours, init="pca", random_state=seed, n_jobs=jobs, **steps)
    return tsne.fit_transform(values)


def report_classes(
    predictions: Tensor, data: ImageData, folder: Path, prefix: str, title: str
) -> dict[str, float]:
    """Print the test accuracy of each class, draw it and the confusion matrix.

    Returns:
        Class name to accuracy in [0, 1].
    """
    matrix = confusion_matrix(data.test.labels, predictions, len(data.classes))
    accuracies = per_class_accuracy(matrix, data.classes)
    for name, value in accuracies.items():
        print(f"Accuracy for class: {name} is {100 * value:.1f} %")
    path = folder / f"{prefix}per_class_accuracy.png"
    plot_per_class(path, accuracies, f"{title}: accuracy per class")
    plot_confusion_matrix(folder / f"{prefix}confusion_matrix.png", matrix, data.classes, title)
    return accuracies


def print_folder(folder: Path) -> None:
    """The last lines of a run: where everything is."""
    print(f"Everything is in {folder}:")
    names = "  ".join(sorted(path.name for path in folder.iterdir()))
    lines = textwrap.wrap(names, 78, break_on_hyphens=False, break_long_words=False)
    print(textwrap.indent("\n".join(lines), "  "))


# ------------------------------------------------------------------------------------- plots
# Each plot is a function of numbers and a path, so it can be redrawn without training.

TRAIN_COLOR, TEST_COLOR = "#0077BB", "#EE7733"  # blue and orange, safe for colour-blind readers
# Paul Tol's "muted" scheme, grey darkened to be visible on white.
CLASS_COLORS = (
    *("#332288", "#88CCEE", "#44AA99", "#117733", "#999933"),
    *("#DDCC77", "#CC6677", "#882255", "#AA4499", "#777777"),
)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, outside pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def style_axes(axes: Any, x: str, y: str) -> None:
    """Label the axes, with a light grid and without the box; `epoch` ticks are whole numbers."""
    if x == "epoch":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _line(axes: Any, rows: Sequence[dict[str, float]], key: str, label: str, color: str) -> None:
    points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    marker = "o" if len(points) < 3 else None
    axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker)


def plot_loss(path: Path, history: Sequence[dict[str, float]], title: str) -> None:
    """The column `loss` of `history` over epochs."""
    figure = new_figure(7, 3.5)
    axes = figure.subplots()
    _line(axes, history, "loss", "train", TRAIN_COLOR)
    axes.set_title(title)
    style_axes(axes, "epoch", "loss")
    save_figure(figure, path)


def plot_loss_and_accuracy(
    path: Path, history: Sequence[dict[str, float]], title: str, other: str = "test"
) -> None:
    """Loss and accuracy (in percent) over epochs, of the training images and `other` ones."""
    figure = new_figure(9, 3.5)
    figure.suptitle(title)
    percent = [
        {k: v * 100 if k.endswith("accuracy") else v for k, v in row.items()} for row in history
    ]
    for axes, key, label in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), ("loss", "accuracy (%)"), strict=True
    ):
        _line(axes, percent, f"train_{key}", "train", TRAIN_COLOR)
        _line(axes, percent, f"{other}_{key}", other, TEST_COLOR)
        style_axes(axes, "epoch", label)
        axes.legend(frameon=False)
    save_figure(figure, path)


def class_colors(count: int) -> list[Any]:
    """A colour per class: a colour-blind safe set up to ten, a colour wheel beyond."""
    if count <= len(CLASS_COLORS):
        return list(CLASS_COLORS[:count])
    import matplotlib

    return list(matplotlib.colormaps["nipy_spectral"](np.linspace(0.05, 0.95, count)))


def plot_scatter(
    path: Path,
    coordinates: np.ndarray,
    labels: np.ndarray | None,
    classes: Sequence[str],
    title: str,
) -> None:
    """A map `(N, 2)` coloured by class, with the class name at the middle of each class."""
    figure = new_figure(8, 6.5)
    axes = figure.subplots()
    size = float(np.clip(20000 / len(coordinates), 5, 25))
    if labels is None:
        axes.scatter(*coordinates.T, s=size, color=TRAIN_COLOR, linewidths=0, alpha=0.6)
    else:
        from matplotlib.patheffects import withStroke

        colors = class_colors(len(classes))
        for label, (name, color) in enumerate(zip(classes, colors, strict=True)):
            points = coordinates[labels == label]
            if len(points) == 0:
                continue
            axes.scatter(*points.T, s=size, color=color, linewidths=0, alpha=0.7, label=name)
            if len(classes) <= 20:
                axes.text(
                    *np.median(points, 0),
                    name,
                    ha="center",
                    va="center",
                    weight="bold",
                    zorder=3,
                    path_effects=[withStroke(linewidth=3, foreground="white")],
                )
        legend = figure.legend(
            loc="outside right upper",
            frameon=False,
            handletextpad=0.2,
            ncols=math.ceil(len(classes) / 30),
            fontsize="small" if len(classes) > 20 else "medium",
        )
        for handle in legend.legend_handles:
            handle.set_sizes([40])
            handle.set_alpha(1)
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    save_figure(figure, path)


def plot_per_class(path: Path, accuracies: dict[str, float], title: str) -> None:
    """Horizontal bars of the accuracy of each class, in percent, with the mean as a line."""
    figure = new_figure(7, max(2.0, 0.32 * len(accuracies) + 1))
    axes = figure.subplots()
    values = [100 * value for value in accuracies.values()]
    axes.barh(list(accuracies), values, color=TRAIN_COLOR, height=0.7)
    for row, value in enumerate(values):  # at the foot of the bar, clear of the mean's line
        axes.text(1, row, f"{value:.1f}", va="center", color="white" if value > 12 else "black")
    mean = sum(values) / len(values)
    axes.axvline(mean, color=TEST_COLOR, label=f"mean {mean:.1f} %")
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.set_title(title)
    style_axes(axes, "accuracy (%)", "")
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside lower right", frameon=False)
    save_figure(figure, path)


def plot_confusion_matrix(path: Path, matrix: Tensor, classes: Sequence[str], title: str) -> None:
    """Row-normalised confusion matrix in percent; numbers for up to 20 classes, none for a 0."""
    share = (100 * matrix / matrix.sum(1, keepdim=True).clamp(min=1)).numpy()
    side = float(np.clip(0.55 * len(classes) + 2, 4.5, 14))
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, label="share of the true class (%)", shrink=0.8)
    every = max(1, math.ceil(len(classes) / 60))
    ticks = range(0, len(classes), every)
    slanted = {"rotation": 45, "ha": "right"} if max(map(len, classes)) > 3 else {}
    axes.set_xticks(ticks, [classes[i] for i in ticks], **slanted)
    axes.set_yticks(ticks, [classes[i] for i in ticks])
    if len(classes) <= 20:
        for row, values in enumerate(share.tolist()):
            for column, value in enumerate(values):
                number = f"{value:.0f}"
                if number == "0":  # an empty cell reads better
                    continue
                color = "white" if value > 60 else "black"
                size = 8 if len(classes) <= 12 else 6
                where = {"ha": "center", "va": "center"}
                axes.text(column, row, number, color=color, size=size, **where)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title)
    save_figure(figure, path)
