"""Files that are whole or not there: JSON, CSV and arrays."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from support.errors import UserError, require


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`; after the block it is synced and renamed to `path`.

    Raises:
        UserError: it cannot be written. What was at `path` before is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:  # Windows syncs no file that is open for reading
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_new_folder(path: Path) -> None:
    """Raise UserError unless a folder can be made at `path`, or is there, empty."""
    there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    writable = there.is_dir() and os.access(there, os.W_OK)
    require(writable, f"cannot write {path}: {there} is no folder that can be written to")
    full = there == path and any(path.iterdir())
    require(not full, f"{path} is not empty: give another --output")


def make_folder(path: Path) -> None:
    """Make a folder, if it is not there; raise UserError if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """Keep other processes out of a folder, where the system and its files can be locked.

    Raises:
        UserError: another process has the lock, and `wait` is false.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows has no fcntl; callers report a missing folder
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another process") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def finite(text: str) -> float:
    """The number that `text` spells; ValueError when it is not finite."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def whole(text: str) -> int:
    """The whole number that `text` spells; ValueError when a float could not hold it."""
    finite(text)
    return int(text)


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
        text = path.read_text(encoding="utf-8")
        values = json.loads(text, parse_float=finite, parse_constant=finite, parse_int=whole)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    require(isinstance(values, dict), f"{path} is damaged: it does not hold a JSON object")
    return values


def write_csv(
    path: Path, rows: Iterable[dict[str, Any]], columns: Sequence[str] | None = None
) -> None:
    """Write a table, atomically; half a surrogate pair, as of a file's name, is escaped.

    The columns are those of all rows, in order of appearance. When they are given, the rows are
    taken one by one, and may be more than memory holds.
    """
    if columns is None:
        rows = list(rows)
        columns = list(dict.fromkeys(key for row in rows for key in row))
    with (
        atomic_file(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path, columns: dict[str, Callable[[str], Any]]) -> list[dict[str, Any]]:
    """The rows that `write_csv` wrote, each column read by its type; [] when there is no file.

    Raises:
        UserError: it is no such table.
    """
    if not path.exists():
        return []
    require(path.is_file(), f"{path} is not a plain file")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file, strict=True))
        return [{name: kind(row[name]) for name, kind in columns.items()} for row in table]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error!r}; delete it to begin anew") from error


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write named arrays as an `.npz`, atomically.

    It is compressed at zlib's quickest level: numpy's own, for features, takes long to gain little.
    """
    with (
        atomic_file(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays that `write_arrays` wrote; nothing in the file is run.

    Raises:
        UserError: it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged: delete it, or repeat what wrote it") from error
