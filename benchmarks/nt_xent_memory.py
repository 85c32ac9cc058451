"""Peak memory of NT-Xent, forward and backward, beside lightly and pytorch-metric-learning.

    pip install pytorch-metric-learning
    python benchmarks/nt_xent_memory.py                  # B = 512 to 8,192
    python benchmarks/nt_xent_memory.py --most 2048

Each loss and size runs in a process of its own on the CPU, with 2B embeddings of 128 values. The
columns of packages that are not installed are left out.
"""

import argparse
import importlib.util
import resource
import time
from pathlib import Path
from typing import Any

from common import apart, report

LOSSES = {"ours": "torch", "lightly": "lightly", "metric-learning": "pytorch_metric_learning"}


def make_loss(name: str, pairs: int) -> Any:
    """A function of the embeddings `(2B, D)`, first views, then second views."""
    import torch

    if name == "ours":
        from simclr import nt_xent_loss

        return lambda z: nt_xent_loss(z, 0.5)
    if name == "lightly":
        from lightly.loss import NTXentLoss

        loss = NTXentLoss(0.5)
        return lambda z: loss(*z.chunk(2))
    from pytorch_metric_learning.losses import NTXentLoss as MetricLearningLoss

    loss, labels = MetricLearningLoss(0.5), torch.arange(pairs).repeat(2)
    return lambda z: loss(z, labels)


def measure(name: str, pairs: int, limit: int) -> tuple[float, float, int] | None:
    """Value, seconds and growth of the resident memory in bytes; None without the memory."""
    import torch

    torch.manual_seed(0)
    loss = make_loss(name, pairs)
    make_loss(name, 4)(torch.randn(8, 128, requires_grad=True)).backward()  # libraries' buffers
    z = torch.randn(2 * pairs, 128, requires_grad=True)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    began = time.perf_counter()
    try:
        value = loss(z)
        value.backward()
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        return None
    took = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return value.item(), took, peak - before


def main() -> None:
    """Print a row per batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=8192, help="largest B [8192]")
    parser.add_argument("--limit", type=int, default=16, help="GB that a process may take [16]")
    arguments = parser.parse_args()
    losses = [name for name, package in LOSSES.items() if importlib.util.find_spec(package)]
    for name in LOSSES.keys() - losses:
        print(f"{name} is left out: it is not installed")
    rows, pairs = [], 512
    while pairs <= arguments.most:
        matrix, values = 4 * (2 * pairs) ** 2, []
        row: dict[str, Any] = {"pairs": pairs, "(2B)^2 MiB": matrix / 2**20}
        for name in losses:
            answer, _ = apart(measure, name, pairs, arguments.limit * 10**9)
            if answer is None:
                row[f"{name} MiB"] = f"> {arguments.limit} GB"
                continue
            value, row[f"{name} s"], growth = answer
            row[f"{name} MiB"] = growth / 2**20
            values.append(value)
        rows.append(row)
        assert max(values) - min(values) < 1e-4, values
        pairs *= 2
    report("NT-Xent, forward and backward", rows)


if __name__ == "__main__":
    main()
