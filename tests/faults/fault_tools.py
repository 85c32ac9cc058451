"""What the fault tests share: processes that may die, mutations of files, digests of results."""

import contextlib
import hashlib
import json
import os
import random
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from commands import rows_of

from support import checkpoints
from support.errors import UserError

# How many mutated files there are in total; the other counts are shares of it.
COUNT = int(os.environ.get("FAULT_COUNT", "1000"))


@dataclass
class Outcome:
    """How an action in a process of its own ended.

    `kind` is returned, UserError, raised (any other exception) or signal; `detail` is the value,
    the message, the traceback or the signal's number; `grown` is the growth of memory in bytes.
    """

    kind: str
    detail: Any
    grown: int = 0
    seconds: float = 0.0


def forked(action: Callable[[], Any], seconds: int = 60, memory: int | None = None) -> Outcome:
    """Do `action` in a child of this process, which may be killed, and say how it ended.

    The child ends by SIGALRM after `seconds`, and can take `memory` bytes of addresses more than
    it has. What it returns must be JSON.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if memory is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        began, before = time.perf_counter(), _peak()
        try:
            kind, detail = "returned", action()
        except UserError as error:
            kind, detail = "UserError", str(error)
        except BaseException:
            kind, detail = "raised", traceback.format_exc()
        record = [kind, detail, _peak() - before, time.perf_counter() - began]
        with contextlib.suppress(OSError), os.fdopen(writer, "w") as file:
            file.write(json.dumps(record))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        select.select([file], [], [])
        answer = file.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return Outcome("signal", os.WTERMSIG(status))
    return Outcome(*json.loads(answer))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def digest(value: Any) -> str:
    """SHA-256 of nested dicts, lists, numbers, text and tensors, told apart by their types."""
    total = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            total.update(f"{value.dtype}{tuple(value.shape)}".encode())
            total.update(value.detach().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key, part in value.items():
                total.update(repr(key).encode())
                add(part)
        elif isinstance(value, list | tuple):
            total.update(f"{len(value)}".encode())
            for part in value:
                add(part)
        else:
            total.update(repr(value).encode())

    add(value)
    return total.hexdigest()


def result_of(folder: Path) -> list[Any]:
    """What two runs that went the same way have in common: weights, optimizer, epoch and rows."""
    state = checkpoints.load(folder / "checkpoint.pt")
    weights = digest([state["epoch"], state["model"], state["optimizer"]["state"]])
    return [weights, rows_of(folder / "metrics.csv")]


# mutations


def mutate(content: bytes, draw: random.Random) -> tuple[str, bytes]:
    """A damaged copy of `content`, and what was done to it."""
    size = len(content)
    place, other = sorted((draw.randrange(size), draw.randrange(size)))
    length = min(size - place, draw.choice((1, 4, 16, 64, 512, 4096)))
    block = content[place : place + length]
    what = draw.choice(
        [
            *("flip", "flip", "byte", "flips", "truncate", "duplicate", "zeros", "ones"),
            *("swap", "remove", "insert", "append", "empty"),
        ]
    )
    match what:
        case "flip":
            changed = bytearray(content)
            changed[place] ^= 1 << draw.randrange(8)
        case "byte":
            changed = bytearray(content)
            changed[place] = draw.randrange(256)
        case "flips":
            changed = bytearray(content)
            for _ in range(draw.randrange(2, 30)):
                changed[draw.randrange(size)] ^= 1 << draw.randrange(8)
        case "truncate":
            changed = content[:place]
        case "duplicate":
            changed = content[:place] + block + content[place:]
        case "zeros" | "ones":
            filler = (b"\0" if what == "zeros" else b"\xff") * len(block)
            changed = content[:place] + filler + content[place + length :]
        case "swap":
            length = min(length, other - place, size - other)
            changed = bytearray(content)
            changed[place : place + length] = content[other : other + length]
            changed[other : other + length] = content[place : place + length]
        case "remove":
            changed = content[:place] + content[place + length :]
        case "insert":
            changed = content[:place] + draw.randbytes(length) + content[place:]
        case "append":
            changed = content + draw.randbytes(length)
        case _:
            changed = b""
    if bytes(changed) == content:
        return mutate(content, draw)
    return f"{what} at {place} of {size}", bytes(changed)


DEEP = 100_000
LITERALS = {
    **{text: text for text in ("NaN", "Infinity", "-Infinity", "1e999", "-1", "0", "1.5", "true")},
    **{text: text for text in ("false", "null", "[]", "{}", '""', '"--help"', '["--help"]')},
    **{text: text for text in ("1e308", "[[1]]", '{"a": 1}', '[""]', '"\\u0000"', '"\\ud800"')},
    "400 digits": "9" * 400,
    "5,000 digits": "9" * 5000,
    "nested lists": "[" * DEEP + "]" * DEEP,
    "nested objects": '{"a":' * DEEP + "1" + "}" * DEEP,
    "a long text": '"' + "x" * 100_000 + '"',
    "a line break": '"a\\nb"',
}


def mutate_json(content: bytes, draw: random.Random) -> tuple[str, bytes]:
    """As `mutate`, or with another value for one of the keys."""
    if draw.random() < 0.5:
        return mutate(content, draw)
    values = json.loads(content)
    key, literal = draw.choice(list(values)), draw.choice(list(LITERALS))
    text = json.dumps({**values, key: "@literal@"}).replace('"@literal@"', LITERALS[literal])
    if text.encode() == content:
        return mutate_json(content, draw)
    return f"{key} = {literal}", text.encode()
