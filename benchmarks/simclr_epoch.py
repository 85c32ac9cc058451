"""One SimCLR epoch on CIFAR-10: ours beside the original way and lightly's example.

    python benchmarks/simclr_epoch.py --dataset data/cifar10-images     # ImageNet stem, batch 1024
    python benchmarks/simclr_epoch.py --stem cifar --batch-size 256
    python benchmarks/simclr_epoch.py --batch-size 64 --steps 2         # noise, seconds

ResNet18, Adam, the original's views. Ours runs twice: in the precision that the processor is fast
at, and in float32, as on an older one. `original`: PIL transforms in a DataLoader without workers,
plain Adam in float32. `lightly`: its documented example with its own transform, loss and SGD, a
DataLoader with a worker per core. Ours is simclr.py's own `pretrain`. Each runs in a process of its
own for `--steps` steps after one to warm up; seconds are for 50,000 images. Beside them stand the
peak memory and the share of the rate of a large matrix product, in bfloat16 and in float32,
counting only multiply-adds that touch real pixels.
"""

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import apart, matrix_peak, report

from support import datasets, devices, runs


def load(dataset: str | None, count: int) -> Any:
    """`count` images `(N, 3, 32, 32)`, uint8."""
    import torch

    import functions

    if dataset:
        return functions.load_images(dataset).train.images[:count]
    noise = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=noise)


def ours(dataset: str | None, stem: str, batch: int, steps: int, precision: str = "auto") -> float:
    """Seconds per step of simclr.py, its bookkeeping at the end of an epoch included."""
    import torch

    import simclr

    devices.keep_freed_memory()
    config = simclr.Config(
        stem=stem,
        batch_size=batch,
        projection_hidden=128,
        projection_size=64,
        epochs=2,
        knn_every=0,
        device="cpu",
        optimizer="adam",
        learning_rate=1e-3,
        weight_decay=0.0,
        crop_scale_min=0.08,
        jitter=(0.8, 0.8, 0.8, 0.2),
        jitter_probability=1.0,
        grayscale_probability=0.2,
        blur_probability=1.0,
    )
    images = load(dataset, steps * batch)
    model = simclr.SimCLR(config, 3, 32).to(memory_format=torch.channels_last)
    fabric = devices.make_fabric("cpu", precision)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        data = datasets.ImageData("", (), datasets.Split(images, None), None).with_statistics()
        history = simclr.pretrain(model, data, config, runs.Run(Path(folder)), fabric)
    return history[-1]["seconds"] / steps


def ours_in_float32(dataset: str | None, stem: str, batch: int, steps: int) -> float:
    """The same without bfloat16."""
    return ours(dataset, stem, batch, steps, "float32")


def resnet(stem: str) -> Any:
    """ResNet18 of torchvision without its last layer."""
    import torchvision
    from torch import nn

    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    if stem == "cifar":
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


def original(dataset: str | None, stem: str, batch: int, steps: int) -> float:
    """Seconds per step of the usual loop over PIL images."""
    import torch
    from augmentation import pil_transform
    from PIL import Image
    from torch import nn

    from simclr import nt_xent_loss

    transform = pil_transform()
    images = load(dataset, (steps + 1) * batch).permute(0, 2, 3, 1).contiguous().numpy()

    class Pairs(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> tuple[Any, Any]:
            picture = Image.fromarray(images[index])
            return transform(picture), transform(picture)

    model = nn.Sequential(resnet(stem), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 64))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def step(pair: tuple[Any, Any]) -> None:
        z = torch.cat([model(views) for views in pair])
        loss = nt_xent_loss(z, 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return timed(torch.utils.data.DataLoader(Pairs(), batch, shuffle=True), step)


def lightly(dataset: str | None, stem: str, batch: int, steps: int) -> float:
    """Seconds per step of lightly's documented SimCLR example."""
    import torch
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    from PIL import Image
    from torch import nn

    transform = SimCLRTransform(input_size=32, gaussian_blur=0.0)
    images = load(dataset, (steps + 1) * batch).permute(0, 2, 3, 1).contiguous().numpy()

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> Any:
            return transform(Image.fromarray(images[index]))

    model = nn.Sequential(resnet(stem), SimCLRProjectionHead(512, 512, 128))
    criterion = NTXentLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    loader = torch.utils.data.DataLoader(
        Pictures(),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=os.cpu_count() or 1,
        multiprocessing_context="fork",  # the data set is local to this function
    )

    def step(pair: list[Any]) -> None:
        loss = criterion(*(model(views) for views in pair))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(loader, step)


def timed(batches: Iterable[Any], step: Any) -> float:
    """Mean seconds per batch, loading and step, after the first."""
    batches = iter(batches)
    step(next(batches))
    began, count = time.perf_counter(), 0
    for batch in batches:
        step(batch)
        count += 1
    return (time.perf_counter() - began) / count


def useful_multiply_adds(stem: str) -> int:
    """Of the convolutions' forward pass for an image of 32 pixels, without taps on padding."""
    import torch
    from torch import nn

    total = 0

    def count(layer: nn.Conv2d, inputs: tuple[Any], output: Any) -> None:
        nonlocal total
        side, out = inputs[0].shape[-1], output.shape[-1]
        kernel, stride, padding = layer.kernel_size[0], layer.stride[0], layer.padding[0]
        taps = sum(
            0 <= position * stride - padding + tap < side
            for position in range(out)
            for tap in range(kernel)
        )
        total += layer.in_channels * layer.out_channels * taps**2

    model = resnet(stem)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    model.eval()(torch.zeros(1, 3, 32, 32))
    return total


def main() -> None:
    """Measure each way in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", help="train on these images instead of noise")
    parser.add_argument("--stem", choices=("imagenet", "cifar"), default="imagenet")
    parser.add_argument("--batch-size", type=int, default=1024, help="[1024]")
    parser.add_argument("--steps", type=int, default=4, help="steps to measure [4]")
    arguments = parser.parse_args()
    settings = (arguments.dataset, arguments.stem, arguments.batch_size, arguments.steps)
    peaks = {
        name: matrix_peak("cpu", kind)
        for name, kind in (("of bf16 peak", "bf16-mixed"), ("of fp32 peak", "32-true"))
    }
    ways = (ours, ours_in_float32, original, lightly)
    measured = {way.__name__: apart(way, *settings) for way in ways}
    best, useful = measured["ours"][0], useful_multiply_adds(arguments.stem)
    in_float32 = measured["ours_in_float32"][0]
    rows = []
    for name, (seconds, memory) in measured.items():
        rate = arguments.batch_size / seconds
        flops = rate * useful * 2 * 2 * 3  # multiply and add, views, backward twice
        shares = {title: f"{flops / peak:.0%}" for title, peak in peaks.items()}
        rows.append(
            {
                "way": name,
                "images/s": rate,
                "s per epoch": 50_000 / rate,
                "time / ours": seconds / best,
                "time / ours in float32": seconds / in_float32,
                "GiB": memory,
                **shares,
            }
        )
    report(f"SimCLR epoch, ResNet18, {arguments.stem} stem, batch {arguments.batch_size}", rows)


if __name__ == "__main__":
    main()
