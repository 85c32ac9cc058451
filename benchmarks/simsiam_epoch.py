"""A SimSiam epoch on FashionMNIST, small encoder, batch 256, RandAugment: ours beside two others.

    python benchmarks/simsiam_epoch.py
    python benchmarks/simsiam_epoch.py --dataset digits --steps 5   # needs no download

`per batch` is the original way: a DataLoader of tensors, torchvision's RandAugment on the whole
batch (one draw for all its images), a forward pass per view, plain SGD in float32. `per image`
draws for each PIL image as torchvision's documentation does, in the loader. Ours draws for each
image, too; it is simsiam.py's own `pretrain`. Seconds are for all images, from the steps measured.
Each runs in a process of its own. Beside them stand the peak memory and the share of the rate of a
large matrix product in the precision that each computes in; FLOPs are those of PyTorch's counter
for the forward and backward pass.
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from common import apart, matrix_peak, report
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import functions
import simsiam
from support import datasets, devices, runs

BATCH = 256


class Pictures(torch.utils.data.Dataset):
    """PIL images, each with its own two draws of RandAugment."""

    def __init__(self, images: Tensor):
        self.pictures = [transforms.functional.to_pil_image(image) for image in images]
        self.transform = transforms.Compose(
            [transforms.RandAugment(5, 9), transforms.ToTensor(), transforms.Normalize(0.29, 0.35)]
        )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture = self.pictures[index]
        return self.transform(picture), self.transform(picture)


def batch_views(images: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Two views of each batch; all its images get the same ops."""
    augment = transforms.RandAugment(5, 9)
    normalize = transforms.Normalize(0.29, 0.35)
    data = torch.utils.data.TensorDataset(images)
    for (batch,) in torch.utils.data.DataLoader(data, BATCH, shuffle=True, drop_last=True):
        yield tuple(normalize(augment(batch).float() / 255) for _ in range(2))


def plain_seconds(batches: Iterable[tuple[Tensor, Tensor]], images: Tensor, steps: int) -> float:
    """Seconds per step of the usual loop, after one step to warm up."""
    model = simsiam.SimSiam(simsiam.Config(), *images.shape[1:3])
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=1e-5)
    for step, (first, second) in zip(range(steps + 1), batches, strict=False):
        if step == 1:
            began = time.perf_counter()
        (z1, p1), (z2, p2) = model(first), model(second)
        loss = simsiam.negative_cosine_similarity(p1, z2) / 2
        loss = loss + simsiam.negative_cosine_similarity(p2, z1) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    return (time.perf_counter() - began) / step


def load(dataset: str) -> datasets.Split:
    """The training images."""
    return functions.load_images(dataset, "data").train


def per_batch(dataset: str, steps: int) -> float:
    """Seconds per step of the original way."""
    images = load(dataset).images
    return plain_seconds(batch_views(images), images, steps)


def per_image(dataset: str, steps: int) -> float:
    """Seconds per step where the loader draws for each image."""
    images = load(dataset).images
    loader = torch.utils.data.DataLoader(Pictures(images), BATCH, shuffle=True, drop_last=True)
    return plain_seconds(loader, images, steps)


def ours(dataset: str, steps: int) -> float:
    """Seconds per step of simsiam.py, its bookkeeping at the end of an epoch included."""
    devices.keep_freed_memory()
    train = load(dataset).select(torch.arange(steps * BATCH))
    data = datasets.ImageData("", (), train, None)
    config = simsiam.Config(epochs=2, knn_every=0, keep_every=0, device="cpu")
    fabric = devices.make_fabric("cpu", "auto")
    model = simsiam.SimSiam(config, *train.images.shape[1:3])
    model = model.to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        history = simsiam.pretrain(model, data, config, runs.Run(Path(folder)), fabric)
    return history[-1]["seconds"] / steps


def step_flops(images: Tensor) -> int:
    """Of the forward and backward pass for two views of a batch."""
    model = simsiam.SimSiam(simsiam.Config(), *images.shape[1:3])
    with FlopCounterMode(display=False) as counter:
        z, p = model(torch.zeros(2 * BATCH, *images.shape[1:]))
        (z.sum() + p.sum()).backward()
    return counter.get_total_flops()


def main() -> None:
    """Measure and print a row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--steps", type=int, default=40, help="steps to measure [40]")
    arguments = parser.parse_args()
    train = load(arguments.dataset)
    steps = min(arguments.steps, len(train) // BATCH)
    epoch = len(train) / BATCH
    kinds = {ours: devices.pick_precision("cpu", "auto"), per_batch: "32-true"}
    kinds[per_image] = "32-true"
    peaks = {kind: matrix_peak("cpu", kind) for kind in set(kinds.values())}
    flops = step_flops(train.images)
    measured = {way: apart(way, arguments.dataset, steps) for way in kinds}
    rows = [
        {
            "way": way.__name__,
            "s per epoch": seconds * epoch,
            "time / ours": seconds / measured[ours][0],
            "GiB": memory,
            "of peak": f"{flops / seconds / peaks[kinds[way]]:.1%}",
        }
        for way, (seconds, memory) in measured.items()
    ]
    size = f"{len(train):,} images, {torch.get_num_threads()} threads, {steps} steps measured"
    report(f"SimSiam epoch, {size}", rows)


if __name__ == "__main__":
    main()
