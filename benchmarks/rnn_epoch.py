"""One epoch of rnn.py beside the original way, for each cell, in one run.

    python benchmarks/rnn_epoch.py --dataset data/cifar10-images
    python benchmarks/rnn_epoch.py --share 0.1      # generated images, a tenth of CIFAR-10's number

The original way: PIL images, ToTensor and Normalize per sample in a DataLoader without workers,
batch 64, plain Adam, then a second pass over the training images for their accuracy and one over
the validation images. Ours: rnn.py's own `train`, which takes the training accuracy from the
training pass. Both train the same model on the same images, each in a process of its own
that does two epochs, of which the better one counts. Beside them stand the peak memory and the
share of the rate of a large matrix product in the precision that each computes in, counting the
multiply-adds of the cell, backward twice.
"""

import argparse
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import apart, matrix_peak, report
from PIL import Image
from torch import nn

import functions
import rnn
from support import datasets, devices, runs


class Pictures(torch.utils.data.Dataset):
    """As `torchvision.datasets.CIFAR10`: an array, whose items become PIL images, then tensors."""

    def __init__(self, split: datasets.Split):
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


def noise(share: float) -> tuple[datasets.ImageData, datasets.Split]:
    """Random images, as many as CIFAR-10's training and validation parts times `share`."""
    draw = torch.Generator().manual_seed(0)

    def make(count: int) -> datasets.Split:
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=draw)
        return datasets.Split(images, torch.randint(0, 10, (count,), generator=draw))

    train, validation = make(int(45000 * share)), make(int(5000 * share))
    data = datasets.ImageData("noise", functions.CIFAR10_CLASSES, train, None).with_statistics()
    return data, validation.with_statistics_of(data.train)


def load(dataset: str | None, share: float) -> tuple[datasets.ImageData, datasets.Split, Any]:
    """Training and validation images, and the settings of rnn.py."""
    config = rnn.Config(
        dataset=dataset or "digits",
        epochs=1,
        train_fraction=share,
        augmentation="none",  # as the original way
        device="cpu",
    )
    data, validation = rnn.load_splits(config) if dataset else noise(share)
    return data, validation, config


def seconds(run: Any, *arguments: Any) -> float:
    """Wall time of one call, the better of two."""
    took = []
    for _ in range(2):
        began = time.perf_counter()
        run(*arguments)
        took.append(time.perf_counter() - began)
    return min(took)


def ours(cell: str, dataset: str | None, share: float) -> float:
    """Seconds per epoch of rnn.py."""
    devices.keep_freed_memory()
    data, validation, config = load(dataset, share)

    def epoch() -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            model = rnn.make_model(config, cell, data)
            rnn.train(model, cell, (data.train, validation), config, runs.Run(Path(folder)), [])

    return seconds(epoch)


def original(cell: str, dataset: str | None, share: float) -> float:
    """Seconds per epoch of the original way."""
    data, validation, config = load(dataset, share)
    model = rnn.make_model(config, cell, data)
    return seconds(original_epoch, model, Pictures(data.train), Pictures(validation))


def multiply_adds(cell: str, config: rnn.Config, data: datasets.ImageData) -> int:
    """Of the recurrent layers' forward pass for an image."""
    model = rnn.make_model(config, cell, data).recurrent
    weights = sum(w.numel() for name, w in model.named_parameters() if name.startswith("weight"))
    return weights * data.train.images.shape[2]


def main() -> None:
    """Measure and print a row per cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", help="train on these images instead of noise")
    parser.add_argument("--share", type=float, default=1.0, help="share of the images [1.0]")
    arguments = parser.parse_args()
    data, _, config = load(arguments.dataset, arguments.share)
    kind = devices.pick_precision("cpu", config.precision)
    peaks = {"ours": matrix_peak("cpu", kind), "original": matrix_peak("cpu", "32-true")}
    rows = []
    for cell in rnn.CELLS:
        row: dict[str, Any] = {"cell": cell}
        work = 2 * 3 * multiply_adds(cell, config, data) * len(data.train)
        for way in (original, ours):
            took, memory = apart(way, cell, arguments.dataset, arguments.share)
            name = way.__name__
            row |= {f"{name} s": took, f"{name} GiB": memory}
            row[f"{name} of peak"] = f"{work / took / peaks[name]:.1%}"
        rows.append({**row, "ratio": row["original s"] / row["ours s"]})
    size = f"{len(data.train):,} images, {torch.get_num_threads()} threads, batch 64"
    report(f"Row-sequence epoch, {size}", rows)


if __name__ == "__main__":
    main()
