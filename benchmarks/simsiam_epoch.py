"""A SimSiam epoch on FashionMNIST, small encoder, batch 256, RandAugment: ours beside two others.

    python benchmarks/simsiam_epoch.py
    python benchmarks/simsiam_epoch.py --dataset digits --steps 5   # needs no download

`per batch` is the original way: a DataLoader of tensors, torchvision's RandAugment on the whole
batch (one draw for all its images), a forward pass per view, plain SGD in float32. `per image`
draws for each PIL image as torchvision's documentation does, in the loader. Ours draws for each
image, too; it is simsiam.py's own `pretrain`. Seconds are for all images, from the steps measured.
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from common import report
from torch import Tensor
from torchvision import transforms

import functions
import simsiam

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


def per_batch(images: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Two views of each batch; all its images get the same ops."""
    augment = transforms.RandAugment(5, 9)
    normalize = transforms.Normalize(0.29, 0.35)
    data = torch.utils.data.TensorDataset(images)
    for (batch,) in torch.utils.data.DataLoader(data, BATCH, shuffle=True, drop_last=True):
        yield tuple(normalize(augment(batch).float() / 255) for _ in range(2))


def per_image(images: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Two views of each batch, drawn per image."""
    return torch.utils.data.DataLoader(Pictures(images), BATCH, shuffle=True, drop_last=True)


def plain_seconds(batches: Iterable[tuple[Tensor, Tensor]], images: Tensor, steps: int) -> float:
    """Seconds per step of the usual loop, after one step to warm up."""
    model = simsiam.SimSiam(channels=images.shape[1], image_size=images.shape[-1])
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


def our_seconds(train: functions.Split, steps: int) -> float:
    """Seconds per step of simsiam.py, its bookkeeping at the end of an epoch included."""
    train = train.select(torch.arange(steps * BATCH))
    config = simsiam.Config(epochs=2, knn_every=0, keep_every=0, device="cpu")
    fabric = functions.make_fabric("cpu", "auto")
    channels, side = train.images.shape[1:3]
    model = simsiam.SimSiam(channels=channels, image_size=side)
    model = model.to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        history = simsiam.pretrain(model, train, config, Path(folder), fabric)
    return history[-1]["seconds"] / steps


def main() -> None:
    """Measure and print a row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--steps", type=int, default=40, help="steps to measure [40]")
    arguments = parser.parse_args()
    train = functions.load_images(arguments.dataset, "data").train
    steps = min(arguments.steps, len(train) // BATCH)
    epoch = len(train) / BATCH
    ways = {"ours": our_seconds(train, steps)}
    for name, batches in (("per batch", per_batch), ("per image", per_image)):
        ways[name] = plain_seconds(batches(train.images), train.images, steps)
    rows = [
        {"way": name, "s per epoch": seconds * epoch, "times ours": seconds / ways["ours"]}
        for name, seconds in ways.items()
    ]
    size = f"{len(train):,} images, {torch.get_num_threads()} threads, {steps} steps measured"
    report(f"SimSiam epoch, {size}", rows)


if __name__ == "__main__":
    main()
