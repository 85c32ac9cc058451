"""Peak memory of NT-Xent, forward and backward, beside lightly and pytorch-metric-learning.

    pip install pytorch-metric-learning
    python benchmarks/nt_xent_memory.py                  # B = 512 to 8,192
    python benchmarks/nt_xent_memory.py --most 2048

Each loss and size runs in a process of its own on the CPU, with 2B embeddings of 128 values. Beside
the peak stands how many float32 matrices of (2B)^2 that is.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LOSSES = ("ours", "lightly", "metric-learning")


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


def measure(name: str, pairs: int, limit: int, answers: Any) -> None:
    """Put value, seconds and growth of the resident memory in bytes; None without the memory."""
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
        answers.put(None)
        return
    took = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answers.put((value.item(), took, peak - before))


def main() -> None:
    """Print a row per batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=8192, help="largest B [8192]")
    parser.add_argument("--limit", type=int, default=16, help="GB that a process may take [16]")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print("pairs    (2B)^2" + "".join(f"{name:>28}" for name in LOSSES))
    pairs = 512
    while pairs <= arguments.most:
        matrix = 4 * (2 * pairs) ** 2
        line, values = f"{pairs:5}{matrix / 2**20:7,.0f} MiB", []
        for name in LOSSES:
            answers = context.SimpleQueue()
            settings = (name, pairs, arguments.limit * 10**9, answers)
            process = context.Process(target=measure, args=settings)
            process.start()
            answer = answers.get()
            process.join()
            if answer is None:
                line += f"{f'more than {arguments.limit} GB':>28}"
                continue
            value, took, growth = answer
            values.append(value)
            line += f"{growth / 2**20:12,.0f} MiB {growth / matrix:4.1f}x {took:5.2f}s"
        print(line)
        assert max(values) - min(values) < 1e-4, values
        pairs *= 2


if __name__ == "__main__":
    main()
