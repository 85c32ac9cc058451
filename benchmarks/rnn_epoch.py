"""One epoch of rnn.py beside the original way, for each cell, in one run.

    python benchmarks/rnn_epoch.py --dataset data/cifar10-images
    python benchmarks/rnn_epoch.py --share 0.1      # generated images, a tenth of CIFAR-10's number

The original way: PIL images, ToTensor and Normalize per sample in a DataLoader without workers,
batch 64, plain Adam, then a second pass over the training images for their accuracy and one over
the validation images. Ours: rnn.py's own `train`, which takes the training accuracy from the
training pass. Both train the same model on the same number of images.
"""

import argparse
import contextlib
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import report
from PIL import Image
from torch import nn

import functions
import rnn


class Pictures(torch.utils.data.Dataset):
    """As `torchvision.datasets.CIFAR10`: an array, whose items become PIL images, then tensors."""

    def __init__(self, split: functions.Split):
        from torchvision import transforms

        self.data = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = split.labels.tolist()
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.labels[index]


def original_epoch(model: nn.Module, train: Pictures, validation: Pictures) -> None:
    """Train, then measure the accuracy on both sets."""
    loaders = [
        torch.utils.data.DataLoader(pictures, 64, shuffle=shuffle)
        for pictures, shuffle in ((train, True), (train, False), (validation, False))
    ]
    optimizer = torch.optim.Adam(model.parameters(), 2.2e-4, weight_decay=5.2e-4)
    model.train()
    for images, labels in loaders[0]:
        loss = nn.functional.cross_entropy(model(rnn.rows_from_images(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    model.eval()
    with torch.no_grad():
        for loader in loaders[1:]:
            for images, labels in loader:
                (model(rnn.rows_from_images(images)).argmax(1) == labels).sum().item()


def our_epoch(
    cell: str, data: functions.ImageData, validation: functions.Split, config: rnn.Config
) -> None:
    """One epoch of rnn.py."""
    with tempfile.TemporaryDirectory() as folder:
        model = rnn.make_model(config, cell, data)
        with contextlib.redirect_stdout(None):
            rnn.train(model, cell, (data.train, validation), config, Path(folder), [])


def noise(share: float) -> tuple[functions.ImageData, functions.Split]:
    """Random images, as many as CIFAR-10's training and validation parts times `share`."""
    draw = torch.Generator().manual_seed(0)

    def make(count: int) -> functions.Split:
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=draw)
        return functions.Split(images, torch.randint(0, 10, (count,), generator=draw))

    classes = functions.CIFAR10_CLASSES
    return functions.ImageData("noise", classes, make(int(45000 * share)), None), make(
        int(5000 * share)
    )


def seconds(run: Any, *arguments: Any) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - began


def main() -> None:
    """Measure and print a row per cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", help="train on these images instead of noise")
    parser.add_argument("--share", type=float, default=1.0, help="share of the images [1.0]")
    arguments = parser.parse_args()
    config = rnn.Config(
        dataset=arguments.dataset or "digits",
        epochs=1,
        train_fraction=arguments.share,
        augmentation="none",  # as the original way
        device="cpu",
    )
    if arguments.dataset:
        data, validation = rnn.load_splits(config)
    else:
        data, validation = noise(arguments.share)
    pictures = Pictures(data.train), Pictures(validation)
    rows = []
    for cell in rnn.CELLS:
        ours, theirs = math.inf, math.inf
        for _ in range(2):  # in turns, the better one of each
            ours = min(ours, seconds(our_epoch, cell, data, validation, config))
            model = rnn.make_model(config, cell, data)
            theirs = min(theirs, seconds(original_epoch, model, *pictures))
        rows.append({"cell": cell, "original s": theirs, "ours s": ours, "ratio": theirs / ours})
    size = f"{len(data.train):,} images, {torch.get_num_threads()} threads, batch 64"
    report(f"Row-sequence epoch, {size}", rows)


if __name__ == "__main__":
    main()
