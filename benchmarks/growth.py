"""How the cost of SimCLR's training step grows with batch, image size and encoder.

    python benchmarks/growth.py
    python benchmarks/growth.py --most 1024      # largest batch

Images are noise. A step is views, forward pass, loss, backward pass and update, as in simclr.py
without torch.compile; the first is left out. FLOPs are those of PyTorch's counter for the forward
and backward pass; the peak is that of a large matrix product in the same precision, measured in the
same run.
"""

import argparse
import time
from typing import Any

import torch
from common import matrix_peak, report
from torch.utils.flop_counter import FlopCounterMode

import simclr
from support import datasets, devices, pretraining

SETTINGS = (
    *(("resnet18", "imagenet", 32, batch) for batch in (64, 256, 1024, 4096)),
    *(("resnet18", "imagenet", size, 64) for size in (64, 96, 128)),
    *(("resnet18", "cifar", 32, batch) for batch in (64, 256)),
    ("resnet50", "imagenet", 32, 256),
    ("small", "cifar", 32, 256),
)


def make_step(config: simclr.Config, size: int, fabric: Any) -> Any:
    """A function that does one step of simclr.py on noise."""
    model = simclr.SimCLR(config, 3, size).to(fabric.device, memory_format=torch.channels_last)
    network, optimizer = fabric.setup(model, simclr.make_optimizer(model, config))
    images = torch.randint(0, 256, (config.batch_size, 3, size, size), dtype=torch.uint8)
    data = datasets.ImageData("noise", (), datasets.Split(images, None), None).with_statistics()
    train = data.train.to(fabric.device)
    generator = torch.Generator(fabric.device).manual_seed(0)

    def step() -> None:
        views = pretraining.crop_views(train.images.repeat(2, 1, 1, 1), config, generator)
        z = network(train.normalize_for_encoder(views))
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
    devices.keep_freed_memory()  # as the scripts do
    device = devices.pick_device("auto")
    precision = devices.pick_precision(device, "auto")
    peak = matrix_peak(device, precision)
    rows = []
    for encoder, stem, size, batch in SETTINGS:
        if batch > arguments.most:
            continue
        config = simclr.Config(encoder=encoder, stem=stem, batch_size=batch)
        fabric = devices.make_fabric(device, "auto")
        step = make_step(config, size, fabric)
        with FlopCounterMode(display=False) as counter:
            step()
        devices.synchronize(fabric.device)
        steps, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < arguments.seconds:
            step()
            devices.synchronize(fabric.device)
            steps += 1
        rate, flops = steps * batch / took, counter.get_total_flops() / batch
        share = f"{rate * flops / peak:.0%}"
        row = {"encoder": encoder, "stem": stem, "size": size, "batch": batch, "images/s": rate}
        rows.append({**row, "GFLOP/image": flops / 1e9, "of peak": share})
    machine = f"{devices.hardware(device)}, {torch.get_num_threads()} threads, {precision}"
    report(f"Growth, {machine}, matrix product {peak / 1e9:,.0f} GFLOP/s", rows, device)


if __name__ == "__main__":
    main()
