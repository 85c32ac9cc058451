import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from support import devices, supervised
from support.errors import Diverged


@pytest.fixture(scope="module")
def fabric():
    return devices.make_fabric("cpu", "float32")


def add_noise(batch, generator):
    return batch + 0.1 * torch.randn(batch.shape, generator=generator)


def make_task(kind):
    torch.manual_seed(3)
    inputs, labels = torch.randn(50, 6).double(), torch.randint(0, 4, (50,))
    layer = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.0)).double()
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
        "sgd": lambda p: torch.optim.SGD(p, 0.5, 0.9),
    }[kind]
    return inputs, labels, layer, make(layer.parameters())


@pytest.mark.parametrize(("kind", "batch"), [("adamw", 16), ("sgd", 50), ("sgd", 256)])
def test_training_equals_a_naive_loop(monkeypatch, fabric, kind, batch):
    monkeypatch.setattr(supervised, "BATCH", batch)
    inputs, labels, layer, optimizer = make_task(kind)
    layer.eval()  # as a look at the test images may leave it
    given = (layer, optimizer, inputs, labels, add_noise, 4, 9, fabric)
    rows = list(supervised.train_classifier(*given))
    assert layer.training
    _, _, naive, optimizer = make_task(kind)
    size = min(batch, 50)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4 * (50 // size))
    for epoch, row in enumerate(rows):
        order = torch.randperm(50, generator=devices.epoch_generator(9, epoch, stream=2))
        noise = devices.epoch_generator(9, epoch, stream=3)
        losses, right = [], []
        for index in order[: 50 // size * size].split(size):
            logits = naive(add_noise(inputs[index], noise))
            loss = F.cross_entropy(logits, labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            right += (logits.argmax(1) == labels[index]).tolist()
        assert row["epoch"] == epoch + 1
        assert row["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)  # kept in float32
        assert row["train_accuracy"] == pytest.approx(np.mean(right))
    assert len(rows) == 4
    torch.testing.assert_close(layer.state_dict(), naive.state_dict(), rtol=1e-9, atol=1e-9)


def test_a_training_goes_on_from_start(monkeypatch, fabric):
    monkeypatch.setattr(supervised, "BATCH", 16)

    def train(layer, optimizer, start):
        rest = (inputs, labels, add_noise, 5, 1, fabric, start)
        return supervised.train_classifier(layer, optimizer, *rest)

    inputs, labels, whole, optimizer = make_task("adamw")
    whole[1].p = 0.3  # the network draws random numbers, too
    expected = list(train(whole, optimizer, 0))
    _, _, layer, optimizer = make_task("adamw")
    layer[1].p = 0.3
    training = train(layer, optimizer, 0)
    first = [next(training) for _ in range(2)]
    training.close()
    torch.manual_seed(8)  # as in another process
    assert first + list(train(layer, optimizer, 2)) == expected
    torch.testing.assert_close(layer.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("what", ["input", "weight"])
def test_what_is_not_finite_stops_the_training(fabric, what):
    inputs, labels, layer, optimizer = make_task("sgd")
    before = copy.deepcopy(layer.state_dict())
    if what == "input":
        inputs[7, 2] = math.nan
    training = supervised.train_classifier(
        layer, optimizer, inputs, labels, add_noise, 1, 1, fabric
    )
    if what == "weight":
        next(training)
        layer[0].bias.data[1] = math.inf
    with pytest.raises(Diverged):
        next(training)
    if what == "input":  # before the step
        torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
