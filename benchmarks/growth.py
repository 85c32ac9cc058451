"""How the cost of SimCLR's training step grows with batch, image size and encoder.

    python benchmarks/growth.py
    python benchmarks/growth.py --most 1024      # largest batch

Images are noise. A step is views, forward pass, loss, backward pass and update, as in simclr.py;
the first is left out. FLOPs are those of PyTorch's counter for the forward and backward pass, taps
of convolutions that only see padding included; the peak is that of a large matrix product in the
same precision, measured in the same run.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import functions
import pretraining
import simclr

SETTINGS = (
    *(("resnet18", "imagenet", 32, batch) for batch in (64, 256, 1024, 4096)),
    *(("resnet18", "imagenet", size, 64) for size in (64, 96, 128)),
    *(("resnet18", "cifar", 32, batch) for batch in (64, 256)),
    ("resnet50", "imagenet", 32, 256),
    ("small", "cifar", 32, 256),
)


def wait(device: str) -> None:
    """Until the device has done what it was told to."""
    if device == "cuda":
        torch.cuda.synchronize()


def matrix_peak(device: str, precision: str) -> float:
    """FLOP/s of a product of two 4096 x 4096 matrices, the best of five."""
    kind = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    a, b = (torch.randn(4096, 4096, device=device).to(kind) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(a, b)
        wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * 4096**3 / best


def make_step(config: simclr.Config, size: int, fabric: Any) -> Any:
    """A function that does one step of simclr.py on noise."""
    model = simclr.SimCLR(config.encoder, config.stem, image_size=size).to(
        fabric.device, memory_format=torch.channels_last
    )
    wrapped, optimizer = fabric.setup(model, simclr.make_optimizer(model, config))
    images = torch.randint(
        0, 256, (config.batch_size, 3, size, size), dtype=torch.uint8, device=fabric.device
    )
    mean, std = functions.channel_statistics(images)
    generator = torch.Generator(fabric.device).manual_seed(0)

    def step() -> None:
        views = pretraining.crop_views(images.repeat(2, 1, 1, 1), config, generator)
        views = functions.normalize(views, mean, std)
        z = wrapped(views.contiguous(memory_format=torch.channels_last))
        loss = simclr.nt_xent_loss(z, config.temperature)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()

    return step


def main() -> None:
    """Print a row per setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=4096, help="largest batch [4096]")
    parser.add_argument("--seconds", type=float, default=5, help="least time per setting [5]")
    arguments = parser.parse_args()
    functions.keep_freed_memory()  # as the scripts do
    device = functions.pick_device("auto")
    precision = functions.pick_precision(device, "auto")
    peak = matrix_peak(device, precision)
    print(f"{functions.hardware(device)}, {torch.get_num_threads()} threads, {precision}")
    print(f"matrix product: {peak / 1e9:,.0f} GFLOP/s")
    print("encoder   stem     size batch  images/s  GFLOP/image  of peak")
    for encoder, stem, size, batch in SETTINGS:
        if batch > arguments.most:
            continue
        config = simclr.Config(encoder=encoder, stem=stem, batch_size=batch)
        step = make_step(config, size, functions.make_fabric(device, "auto"))
        with FlopCounterMode(display=False) as counter:
            step()
        wait(device)
        steps, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < arguments.seconds:
            step()
            wait(device)
            steps += 1
        rate, flops = steps * batch / took, counter.get_total_flops() / batch
        print(
            f"{encoder:9} {stem:8} {size:4} {batch:5} {rate:9,.1f} {flops / 1e9:12.2f} "
            f"{rate * flops / peak:8.0%}"
        )


if __name__ == "__main__":
    main()
