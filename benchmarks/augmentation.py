"""Augmentation alone: images per second of this repository, torchvision and kornia, side by side.

    python benchmarks/augmentation.py                   # generated images
    python benchmarks/augmentation.py --dataset data/cifar10-images

512 images of 32 x 32 through SimCLR's original recipe: crop, flip, colour jitter, grayscale, blur,
normalisation. kornia's row is left out when it is not installed. Medians, all threads.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import in_turns, report
from torch import Tensor

import functions
from support import datasets, devices, pretraining

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
COUNT = 512


def ours(images: Tensor) -> Callable[[], Tensor]:
    """Batched ops, parameters drawn per sample."""
    generator = torch.Generator().manual_seed(0)
    split = datasets.Split(images, None, mean=torch.tensor(MEAN), std=torch.tensor(STD))
    config = pretraining.PretrainingConfig(
        crop_scale_min=0.08,
        jitter=(0.8, 0.8, 0.8, 0.2),
        jitter_probability=1.0,
        grayscale_probability=0.2,
        blur_probability=1.0,
    )
    return lambda: split.normalize(pretraining.crop_views(images, config, generator))


def pil_transform() -> Callable[[Any], Tensor]:
    """The original's recipe for one PIL image."""
    from torchvision import transforms as t

    return t.Compose(
        [
            t.RandomResizedCrop(32),
            t.RandomHorizontalFlip(),
            t.ColorJitter(0.8, 0.8, 0.8, 0.2),
            t.RandomGrayscale(0.2),
            t.GaussianBlur(3, (0.1, 2.0)),
            t.ToTensor(),
            t.Normalize(MEAN, STD),
        ]
    )


def torchvision_pil(images: Tensor) -> Callable[[], Tensor]:
    """What most people run: transforms per PIL image."""
    from torchvision.transforms.functional import to_pil_image

    pictures, transform = [to_pil_image(image) for image in images], pil_transform()
    return lambda: torch.stack([transform(picture) for picture in pictures])


def torchvision_v2(images: Tensor) -> Callable[[], Tensor]:
    """The v2 transforms per tensor image."""
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(32),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.8, 0.8, 0.8, 0.2),
            v2.RandomGrayscale(0.2),
            v2.GaussianBlur(3, (0.1, 2.0)),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return lambda: torch.stack([transform(image) for image in images])


def kornia(images: Tensor) -> Callable[[], Tensor]:
    """Batched as well; `resample` crops faster than its default."""
    import kornia.augmentation as k

    transform = k.AugmentationSequential(
        k.RandomResizedCrop((32, 32), cropping_mode="resample"),
        k.RandomHorizontalFlip(),
        k.ColorJitter(0.8, 0.8, 0.8, 0.2, p=1.0),
        k.RandomGrayscale(p=0.2),
        k.RandomGaussianBlur((3, 3), (0.1, 2.0), p=1.0),
        k.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )
    return lambda: transform(images.float() / 255)


def main() -> None:
    """Measure the four in turns and print images per second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", help="take the images from here instead of making noise")
    arguments = parser.parse_args()
    if arguments.dataset:
        images = functions.load_images(arguments.dataset).train.images[:COUNT]
    else:
        noise = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (COUNT, 3, 32, 32), dtype=torch.uint8, generator=noise)
    devices.keep_freed_memory()  # as the scripts do
    contenders = {}
    for make in (ours, torchvision_pil, torchvision_v2, kornia):
        try:
            contenders[make.__name__] = make(images)
        except ImportError as error:
            print(f"{make.__name__} is left out: {error}")
    seconds = in_turns(contenders)
    rows = [
        {"way": name, "images/s": COUNT / value, "time / ours": value / seconds["ours"]}
        for name, value in seconds.items()
    ]
    report(f"Augmentation, {COUNT} images, {torch.get_num_threads()} threads", rows)


if __name__ == "__main__":
    main()
