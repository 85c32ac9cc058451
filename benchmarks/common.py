"""What the benchmarks share: timing in turns, processes of their own, the peak, and the table."""

import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so import this module before those of the repository


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int = 10) -> dict[str, float]:
    """Median seconds of a call of each way, taken in turns so that a busy moment hits all.

    The first call of each is a warm-up that says how often to repeat it within a turn.
    """
    repeats, seconds = {}, {name: [] for name in ways}
    for name, run in ways.items():
        began = time.perf_counter()
        run()
        repeats[name] = max(1, min(10, int(0.2 / (time.perf_counter() - began))))
    for _ in range(rounds):
        for name, run in ways.items():
            began = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            seconds[name].append((time.perf_counter() - began) / repeats[name])
    return {name: statistics.median(values) for name, values in seconds.items()}


def _call(function: Callable[..., Any], arguments: Sequence[Any], answer: Any) -> None:
    result = function(*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer.send((result, peak / (2**30 if sys.platform == "darwin" else 2**20)))  # bytes, or KiB


def apart(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Call a function in a process of its own: its result, and the peak resident memory in GiB."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(function, arguments, theirs))
    process.start()
    theirs.close()  # so that its death ends the wait
    try:
        return ours.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__} failed") from None
    finally:
        process.join()


def matrix_peak(device: str, precision: str) -> float:
    """FLOP/s of a product of two 4096 x 4096 matrices, the best of five."""
    import torch

    from support import devices

    kind = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    a, b = (torch.randn(4096, 4096, device=device).to(kind) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(a, b)
        devices.synchronize(a.device)
        best = min(best, time.perf_counter() - began)
    return 2 * 4096**3 / best


def report(title: str, rows: list[dict[str, Any]], device: str = "cpu") -> None:
    """Print a table, and add it to this processor's file in the folder `BENCHMARK_RESULTS`."""
    head = list(dict.fromkeys(name for row in rows for name in row))
    cells = [head] + [[_text(row.get(name)) for name in head] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(title)
    for line in cells:
        words = zip(line, widths, strict=True)
        print(
            "  " + "  ".join(w.ljust(n) if i == 0 else w.rjust(n) for i, (w, n) in enumerate(words))
        )
    if folder := os.environ.get("BENCHMARK_RESULTS"):
        path = Path(folder, f"{processor(device)}.json")
        saved = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**saved, "about": about(device), title: rows}, indent=2) + "\n")


def processor(device: str) -> str:
    """A file name for this kind of machine: the device, or the CPU and its units for bfloat16."""
    import torch

    from support import devices

    if device != "cpu":
        words = devices.hardware(device)
    else:
        units = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 has none
        best = next((name for unit, name in units.items() if capabilities.get(unit)), "")
        words = f"{devices.hardware('cpu').removesuffix(' CPU')} {best}"
    return "-".join(words.lower().split())


def about(device: str) -> dict[str, Any]:
    """What the numbers depend on besides the code that is measured."""
    import torch

    from support import devices

    commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    packages = ("torch", "torchvision", "numpy", "scikit-learn", "pytorch-lightning")
    return {
        "hardware": devices.hardware(device),
        "threads": torch.get_num_threads(),
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip() or None,
        "versions": {name: version(name) for name in packages},
        "date": time.strftime("%Y-%m-%d"),
    }


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)
