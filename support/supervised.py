"""The supervised training that fine-tuning and few_labels.py share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support import checkpoints, devices, progress

BATCH = 256  # images per step, or all if there are fewer; a smaller last batch is left out


def train_classifier(
    classifier: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    labels: Tensor,
    prepare: Callable[[Tensor, torch.Generator], Tensor],
    epochs: int,
    seed: int,
    fabric: Any,
    start: int = 0,
) -> Iterator[dict[str, Any]]:
    """Cross-entropy on `inputs[index]` after `prepare`, cosine from the optimizer's first rate.

    Args:
        classifier: any module `(B, ...) -> (B, K)`.
        optimizer: over its weights; its `defaults["lr"]` is the peak rate.
        inputs: `(N, ...)`, images or features, on the device to compute on.
        labels: `(N,)`.
        prepare: augments and normalises a batch, with a generator on the inputs' device.
        epochs: the schedule's length; `start` of them are done.
        seed: of order and augmentation.
        fabric: Lightning Fabric.
        start: epochs that are done, when the training goes on.

    Yields:
        `epoch`, `train_loss` and `train_accuracy` in [0, 1] after each epoch.

    Raises:
        Diverged: a loss is not finite, or after the last epoch a weight.
    """
    wrapped, wrapped_optimizer = fabric.setup(classifier, optimizer)
    peak, batch = optimizer.defaults["lr"], min(BATCH, len(inputs))
    steps = len(inputs) // batch
    for epoch in range(start, epochs):
        device = inputs.device
        order = devices.epoch_order(len(inputs), seed, epoch, device, devices.SUPERVISED_ORDER)
        generator = devices.epoch_generator(seed, epoch, device, devices.SUPERVISED_VIEWS)
        losses = progress.EpochLoss(steps, epoch + 1, device)
        correct = torch.zeros((), dtype=torch.long, device=device)
        classifier.train()
        devices.seed_network(seed, epoch)
        for step in range(steps):
            rate = progress.scheduled_rate(peak, epoch * steps + step, epochs * steps, 0, "cosine")
            optimizer.param_groups[0]["lr"] = rate
            index = order[step * batch : (step + 1) * batch]
            logits = wrapped(prepare(inputs[index], generator))  # (B, K)
            loss = F.cross_entropy(logits, labels[index])
            losses.add(loss)
            optimizer.zero_grad()
            fabric.backward(loss)
            wrapped_optimizer.step()
            correct += (logits.argmax(1) == labels[index]).sum()
        yield {
            "epoch": epoch + 1,
            "train_loss": losses.mean(),
            "train_accuracy": correct.item() / (steps * batch),
        }
    checkpoints.check_finite(epochs, classifier, optimizer)
