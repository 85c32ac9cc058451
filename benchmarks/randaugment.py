"""RandAugment alone: images per second of this repository and torchvision, side by side.

    python benchmarks/randaugment.py
    python benchmarks/randaugment.py --threads 1

512 uint8 images through five ops of magnitude 9, grey ones of 28 x 28, then coloured ones of
32 x 32. torchvision's last row gives all images of a batch the same ops: it is no replacement, it
shows what ops on whole batches cost. Medians.
"""

import argparse
from collections.abc import Callable

import torch
from common import in_turns, report
from torch import Tensor
from torch.nn import functional as F

from support import randaugment

COUNT, NUM_OPS, MAGNITUDE = 512, 5, 9
SHAPES = ((1, 28, 28), (3, 32, 32))


def ours(images: Tensor) -> Callable[[], Tensor]:
    """Batched ops, a draw per sample."""
    generator = torch.Generator().manual_seed(0)

    def run() -> Tensor:
        ops, negative = randaugment.draw_randaugment(len(images), NUM_OPS, generator)
        return randaugment.rand_augment(images, ops, negative, MAGNITUDE)

    return run


def torchvision_pil(images: Tensor) -> Callable[[], list]:
    """What most people run: the transform per PIL image."""
    from torchvision import transforms as t

    pictures = [t.functional.to_pil_image(image) for image in images]
    transform = t.RandAugment(NUM_OPS, MAGNITUDE)
    return lambda: [transform(picture) for picture in pictures]


def torchvision_tensor(images: Tensor) -> Callable[[], list]:
    """The transform per uint8 tensor."""
    from torchvision import transforms as t

    transform = t.RandAugment(NUM_OPS, MAGNITUDE)
    return lambda: [transform(image) for image in images]


def one_draw_for_all(images: Tensor) -> Callable[[], Tensor]:
    """The transform on the whole batch, which gets one draw."""
    from torchvision import transforms as t

    transform = t.RandAugment(NUM_OPS, MAGNITUDE)
    return lambda: transform(images)


def measure(shape: tuple[int, int, int]) -> None:
    """Run the four in turns on images of one shape."""
    coarse = torch.rand(COUNT, shape[0], 7, 7, generator=torch.Generator().manual_seed(0))
    images = (F.interpolate(coarse, shape[1:], mode="bilinear") * 255).byte()
    contenders = {
        make.__name__: make(images)
        for make in (ours, torchvision_pil, torchvision_tensor, one_draw_for_all)
    }
    seconds = in_turns(contenders)
    rows = [
        {"way": name, "images/s": COUNT / value, "time / ours": value / seconds["ours"]}
        for name, value in seconds.items()
    ]
    size = " x ".join(map(str, (COUNT, *shape)))
    report(f"RandAugment, {size}, {torch.get_num_threads()} threads", rows)


def main() -> None:
    """Measure both shapes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="torch's threads (default: all cores)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)  # torchvision draws from the global generator
    for shape in SHAPES:
        measure(shape)


if __name__ == "__main__":
    main()
