"""100 epochs of the linear probe on 50,000 features: ours, the original way, scikit-learn's.

    python benchmarks/probe.py
    python benchmarks/probe.py --images 2000       # seconds

`original`: a ResNet18 (ImageNet stem) encodes every batch in every epoch; measured for `--batches`
batches of 256 and multiplied. Ours encodes once, then trains on the features; the encoding is
counted. `scikit-learn`: LogisticRegression on the same features, without the encoding.
"""

import argparse
import time

import torch
from common import report
from simclr_epoch import resnet
from torch import nn

import functions
from support import datasets, devices, encoders

EPOCHS, BATCH = 100, 256


def main() -> None:
    """Measure the three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000, help="[50000]")
    parser.add_argument("--batches", type=int, default=10, help="of the original way [10]")
    arguments = parser.parse_args()
    devices.keep_freed_memory()
    torch.manual_seed(0)
    count = arguments.images
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (count,))
    split = (
        datasets.ImageData("noise", (), datasets.Split(images, labels), None)
        .with_statistics()
        .train
    )
    encoder = encoders.make_encoder("resnet18", "imagenet", 3, 32)
    encoder = encoder.to(memory_format=torch.channels_last)
    fabric = devices.make_fabric("cpu", "auto")

    began = time.perf_counter()
    features = functions.extract_features(encoder, split, fabric)
    encoding = time.perf_counter() - began
    test = slice(0, count // 5)
    functions.linear_probe(features, labels, features[test], labels[test], EPOCHS)
    ours = time.perf_counter() - began

    plain = resnet("imagenet").eval()
    layer = nn.Linear(512, 10)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-3)
    for batch in range(arguments.batches + 1):
        if batch == 1:
            began = time.perf_counter()
        part = slice(batch * BATCH % count, batch * BATCH % count + BATCH)
        with torch.no_grad():
            inputs = plain(split.normalize(images[part]))
        loss = nn.functional.cross_entropy(layer(inputs), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    original = (time.perf_counter() - began) / arguments.batches * (count / BATCH) * EPOCHS

    from sklearn.linear_model import LogisticRegression

    began = time.perf_counter()
    LogisticRegression(max_iter=100).fit(features.numpy(), labels.numpy())
    sklearn = time.perf_counter() - began
    rows = [
        {"way": "ours", "seconds": ours, "of which encoding": encoding, "time / ours": 1.0},
        {"way": "original", "seconds": original, "time / ours": original / ours},
        {"way": "scikit-learn", "seconds": sklearn, "time / ours": sklearn / (ours - encoding)},
    ]
    title = f"Linear probe, {count:,} images, {EPOCHS} epochs"
    report(f"{title}, {torch.get_num_threads()} threads", rows)


if __name__ == "__main__":
    main()
