"""embed.py's features, images per second, beside the encoder alone on tensors in memory.

    python benchmarks/embedding.py
    python benchmarks/embedding.py --images 1000       # seconds

`ours` is encoded.py's `extract` on a memory-mapped cache of images. `encoder_alone` is given the
same images in steps of the same size, as normalised float tensors that are there before the clock
starts: no faster way to the features is possible with this encoder. Both run in turns, untrained.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import in_turns, report

import encoded
import functions
from support import datasets, decoding, devices, encoders, frozen


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000, help="[10000]")
    parser.add_argument("--rounds", type=int, default=10, help="[10]")
    arguments = parser.parse_args()
    count = arguments.images
    devices.keep_freed_memory()
    torch.manual_seed(0)
    network = encoders.make_encoder("small", "cifar", 3, 32).to(memory_format=torch.channels_last)
    fabric = devices.make_fabric("cpu", "auto")
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    rules = decoding.PixelRules()
    encoder = frozen.Encoder(network, "noise", 32, mean, std, rules, fabric, {}, {}, ())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images.npy")
        noise = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), np.uint8)
        np.save(path, noise)
        images = torch.from_numpy(np.load(path, mmap_mode="c"))
        split = datasets.Split(images, None, mean=mean, std=std)
        inputs = [split.normalize_for_encoder(part) for part in images.split(500)]

        def encoder_alone() -> None:
            with functions.evaluating(network), fabric.autocast():
                for part in inputs:
                    network(part)

        ways = {
            "ours": lambda: encoded.extract(encoder, images, torch.arange(count), "noise"),
            "encoder_alone": encoder_alone,
        }
        seconds = in_turns(ways, arguments.rounds)
    rows = [
        {"way": way, "images/s": count / took, "time / ours": took / seconds["ours"]}
        for way, took in seconds.items()
    ]
    report(f"Features of images, small, {torch.get_num_threads()} threads", rows)


if __name__ == "__main__":
    main()
