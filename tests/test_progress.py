import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from support import errors, progress


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (50, 0), (50, 7), (50, 49)])
def test_scheduled_rate_equals_torchs_cosine_after_a_linear_warmup(steps, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    cosine = CosineAnnealingLR(optimizer, steps - warmup)
    for step in range(steps):
        rate = progress.scheduled_rate(0.3, step, steps, warmup, "cosine")
        constant = progress.scheduled_rate(0.3, step, steps, warmup, "constant")
        if step < warmup:
            assert rate == constant == pytest.approx(0.3 * (step + 1) / warmup)
        else:
            assert rate == pytest.approx(cosine.get_last_lr()[0], abs=1e-9)
            assert constant == 0.3
            optimizer.step()
            cosine.step()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_epoch_loss_names_epoch_and_step(value):
    losses = progress.EpochLoss(5, 7, torch.device("cpu"))
    losses.add(torch.tensor(1.0))
    losses.add(torch.tensor(2.0))
    with pytest.raises(errors.Diverged, match=r"epoch 7, step 3\b"):
        losses.add(torch.tensor(value))


def test_epoch_loss_keeps_no_graph():
    # A graph per step would fill the memory within an epoch.
    losses = progress.EpochLoss(4, 1, torch.device("cpu"))
    weight = torch.tensor(1.0, requires_grad=True)
    alive = weakref.ref(weight)
    losses.add(weight * 2)
    del weight
    assert alive() is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (7500, "2h05m"),
    ],
)
def test_times_are_short(seconds, text):
    assert progress.format_seconds(seconds) == text


def test_the_estimate_leaves_out_the_slow_first_steps(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    lines = []
    estimate = progress.Estimate(SimpleNamespace(write=lines.append), steps=1000)
    for seconds in [100, 100, *[3] * 9]:  # 10 seconds have passed after the fourth of these
        clock[0] += seconds
        estimate.step()
        assert len(lines) == (clock[0] >= 210)
    assert "50m00s" in lines[0]
