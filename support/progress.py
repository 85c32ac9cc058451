"""The course of a training: its losses, its learning rate, its bar."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from support.errors import Diverged


class EpochLoss:
    """The losses of one epoch, kept on the device so that a step does not wait for the host.

    On the CPU a loss that is not finite stops the run before the update it would have caused; on
    an accelerator it is looked for every 50 steps and at the end of the epoch, before anything is
    saved.
    """

    def __init__(self, steps: int, epoch: int, device: torch.device):
        self.values = torch.zeros(steps, device=device)
        self.epoch, self.step = epoch, 0

    def add(self, loss: Tensor) -> None:
        """Take the next step's loss.

        Raises:
            Diverged: a loss is not finite.
        """
        self.values[self.step] = loss.detach()
        self.step += 1
        if loss.device.type == "cpu" or self.step % 50 == 0:
            self._check(self.step - (1 if loss.device.type == "cpu" else 50))

    def mean(self) -> float:
        """The epoch's mean loss."""
        self._check(0)
        return self.values[: self.step].mean().item()

    def _check(self, start: int) -> None:
        finite = self.values[start : self.step].isfinite()
        if not finite.all():
            step = start + int(finite.int().argmin()) + 1
            value = self.values[step - 1].item()
            raise Diverged(f"the loss is {value} in epoch {self.epoch}, step {step}")


def bar(total: int, description: str, visible: bool = True) -> Any:
    """A bar that counts images per second; silent when the output is not a terminal."""
    from tqdm import tqdm

    disable = None if visible else True
    return tqdm(total=total, desc=description, unit="img", disable=disable, leave=False, ncols=79)


class Estimate:
    """Says once, after ten seconds of them, how long so many steps take, above a progress bar."""

    def __init__(self, bar: Any, steps: float):
        self.bar, self.steps = bar, steps
        self.done, self.began, self.over = 0, 0.0, False

    def step(self) -> None:
        """Count a step; the first two are slow and do not count."""
        self.done += 1
        if self.done == 2:
            self.began = time.perf_counter()
        if self.done <= 2 or self.over or (passed := time.perf_counter() - self.began) < 10:
            return
        self.over = True
        seconds = passed / (self.done - 2) * self.steps
        self.bar.write(f"about {format_seconds(seconds)} on this device")
        if seconds > 24 * 3600:
            hint = "use a GPU, fewer --epochs, or a cheaper encoder"
            self.bar.write(f"  {hint} (--stem imagenet, --encoder small)")

    def stop(self) -> None:
        """Say nothing any more."""
        self.over = True


def format_seconds(seconds: float) -> str:
    """`75` as `1m15s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def scheduled_rate(peak: float, step: int, steps: int, warmup: int, schedule: str) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then `schedule`.

    `cosine` falls from `peak` to 0 at `steps` (Loshchilov & Hutter 2017), `constant` stays.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
