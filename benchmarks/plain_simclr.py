"""SimCLR in its plainest form, to hold simclr.py's accuracy against: nothing here is shared.

    python benchmarks/plain_simclr.py data/cifar10-images --width 16 --epochs 3
    python simclr.py --dataset data/cifar10-images --width 16 --epochs 3 --stages pretrain,probe

Both train the same network with the same settings on a folder `train/<class>/*`, `test/<class>/*`
of RGB images of one size. Here torchvision augments one PIL image after the other, each view has a
forward pass of its own, and scikit-learn is the linear probe. An epoch of 50,000 images takes about
a quarter of an hour of a CPU core.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn
from torchvision import transforms
from torchvision.models import resnet

BATCH, RATE, TEMPERATURE = 512, 0.06, 0.5


def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images `(N, H, W, 3)` of a folder of classes, and their labels `(N,)`."""
    images, labels = [], []
    for label, of_class in enumerate(sorted(folder.iterdir())):
        for path in sorted(of_class.iterdir()):
            images.append(np.asarray(Image.open(path).convert("RGB")))
            labels.append(label)
    return np.stack(images), np.array(labels)


def make_resnet18(width: int) -> nn.Module:
    """The network of torchvision with a stem for small images (SimCLR, B.9) and other widths."""

    class Narrow(resnet.ResNet):
        def _make_layer(self, block, planes, *others, **named):
            if planes == 64:
                self.inplanes = width
            return super()._make_layer(block, planes * width // 64, *others, **named)

    network = Narrow(resnet.BasicBlock, [2, 2, 2, 2])
    network.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
    network.bn1, network.maxpool, network.fc = nn.BatchNorm2d(width), nn.Identity(), nn.Identity()
    return network


def extract(network: nn.Module, images: np.ndarray) -> torch.Tensor:
    """Features `(N, D)` in eval mode."""
    network.eval()
    with torch.no_grad():
        parts = [
            torch.from_numpy(p).permute(0, 3, 1, 2) / 255
            for p in np.split(images, range(1000, len(images), 1000))
        ]
        return torch.cat([network(part) for part in parts])


def main() -> None:
    """Train, then print kNN and linear accuracy on the test images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=100)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images, labels = read(arguments.folder / "train")
    test_images, test_labels = read(arguments.folder / "test")
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(images.shape[1], scale=(0.2, 1)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.1),
            transforms.ToTensor(),
        ]
    )
    network = make_resnet18(arguments.width)
    head = nn.Sequential(nn.Linear(8 * arguments.width, 1024), nn.ReLU(), nn.Linear(1024, 128))
    weights = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(weights, RATE * BATCH / 256, 0.9, weight_decay=5e-4)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs * steps)
    positives = torch.arange(2 * BATCH).roll(BATCH)
    for epoch in range(arguments.epochs):
        began, losses = time.perf_counter(), []
        order = np.random.RandomState(epoch).permutation(len(images))
        for step in range(steps):
            batch = [Image.fromarray(images[i]) for i in order[step * BATCH : (step + 1) * BATCH]]
            views = [torch.stack([augment(image) for image in batch]) for _ in range(2)]
            z = F.normalize(torch.cat([head(network(view)) for view in views]))
            similarity = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
            loss = F.cross_entropy(similarity, positives)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(
            f"epoch {epoch + 1}  loss {np.mean(losses):.4f}  {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    train, test = extract(network, images), extract(network, test_images)
    nearest = (F.normalize(test) @ F.normalize(train).T).topk(200)
    weight = (nearest.values / 0.1).exp()  # as usual: cosine, k = 200, temperature 0.1
    votes = torch.zeros(len(test), labels.max() + 1)
    votes.scatter_add_(1, torch.from_numpy(labels)[nearest.indices], weight)
    print(f"kNN {(votes.argmax(1).numpy() == test_labels).mean():.1%}")
    mean, std = train.mean(0), train.std(0)
    probe = LogisticRegression(max_iter=300).fit(((train - mean) / std).numpy(), labels)
    print(f"linear {probe.score(((test - mean) / std).numpy(), test_labels):.1%}")


if __name__ == "__main__":
    main()
