"""What all pretrainings share, shown on a tiny one: two layers, and images of noise."""

import csv
import dataclasses
import json
import math
import time
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.v2 import functional as reference

import functions
from support import (
    augment,
    checkpoints,
    datasets,
    devices,
    experiment,
    files,
    pretraining,
    progress,
    runs,
    verdict,
)
from support import settings as flags
from support.errors import Diverged, UserError

OFF = {f"{name}_probability": 0.0 for name in ("flip", "jitter", "grayscale", "blur")}
TIMES = {"seconds", "images_per_second", "measure_seconds", "checkpoint_seconds"}


def compute_in_float64(monkeypatch):
    """Let what asks for float32 get float64: trainings that are compared must not differ by chance.

    In float32 the order of a sum, which another processor chooses otherwise, grows to 1e-4.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(count, size=8, seed=0, low=0, high=256):
    shape = (count, 3, size, size)
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=seeded(seed))


# ------------------------------------------------------------------------------------ views


def views_of(images, seed=0, size=None, crop_only=False, **changes):
    """Views of crops that are nearly the whole image, with nothing else but `changes`."""
    changes = {"encoder": "resnet18", "crop_scale_min": 1.0, **OFF, **changes}
    config = pretraining.PretrainingConfig(**changes)
    return pretraining.crop_views(images, config, seeded(seed), size, crop_only)


@pytest.mark.parametrize("size", [None, 8])
def test_views_with_everything_off_are_the_images_at_their_size(size):
    images = noise(40, 16)
    views = views_of(images, size=size)
    boxes = augment.draw_crop_boxes(images, (1.0, 1.0), generator=seeded())
    whole = (boxes[:, 2] == 16) & (boxes[:, 3] == 16)  # a box of another ratio may be drawn, too
    expected = images[whole] / 255
    if size is not None:  # bilinear at half the size is the mean of four pixels
        expected = nn.functional.avg_pool2d(expected, 2)
    assert whole.any()
    torch.testing.assert_close(views[whole], expected)


def test_no_two_images_or_views_share_a_draw():
    # Known mistake of public versions: one draw for all images of a batch.
    pairs = noise(1, 16).repeat(2 * 32, 1, 1, 1)
    views = pretraining.crop_views(pairs, pretraining.PretrainingConfig(), seeded())
    assert 0 <= views.min() < views.max() <= 1
    distances = torch.cdist(views.flatten(1), views.flatten(1)) + 1e3 * torch.eye(64)
    assert distances.min() > 0.1


@pytest.mark.parametrize("least", [0.2, 0.7])
def test_crops_have_at_least_their_share_of_the_area(least):
    ramp = (4 * torch.arange(64)).byte()
    x, y = ramp.expand(64, 64), ramp[:, None].expand(64, 64)
    images = torch.stack([x, y, 0 * x]).repeat(500, 1, 1, 1)
    views = views_of(images, crop_scale_min=least)[:, :2]
    sides = (views.amax((2, 3)) - views.amin((2, 3))) * 255 / 4 + 1  # (500, 2)
    areas = sides.prod(1) / 64**2
    assert least - 0.02 < areas.min() < least + 0.03  # sides are whole pixels
    assert areas.max() > 0.95


def flipped(views, plain):
    return (views == plain.flip(3)).flatten(1).all(1)


def changed(views, plain):
    return (views != plain).flatten(1).any(1)


def grey(views, plain):
    return (views == views[:, :1]).flatten(1).all(1)


def blurred(views, plain):
    return (views - plain).abs().amax((1, 2, 3)) > 1e-4  # a sigma of 0.1 does next to nothing


@pytest.mark.parametrize(
    ("name", "seen"),
    [("flip", flipped), ("jitter", changed), ("grayscale", grey), ("blur", blurred)],
)
def test_a_probability_is_the_share_of_views_that_are_changed(name, seen):
    images = noise(1000)
    plain = views_of(images)
    for probability in (0.3, 1.0):
        views = views_of(images, **{f"{name}_probability": probability})
        share = seen(views, plain).float().mean().item()
        least = 0.85 if name == "blur" else 1.0  # of the views that are said to be changed
        margin = 4 * math.sqrt(probability * (1 - probability) / 1000)
        assert least * probability - margin <= share <= probability + margin
    assert not seen(plain, plain).any()


@pytest.mark.parametrize(("side", "kernel"), [(8, 3), (32, 3), (64, 7), (96, 9)])
def test_the_blur_is_as_wide_as_a_tenth_of_the_image(side, kernel):
    image = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    image[:, :, side // 2, side // 2] = 255
    (view,) = views_of(image, blur_probability=1.0)
    seen = (view[0] > 0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [kernel, kernel]


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_strength_of_the_jitter_changes_one_thing(name):
    images = noise(100, low=90, high=160)  # nothing is clamped
    strength = [0.4 if other == name else 0.0 for other in ("brightness", "contrast")]
    strength += [0.4 if other == name else 0.0 for other in ("saturation", "hue")]
    plain = views_of(images)
    views = views_of(images, jitter_probability=1.0, jitter=tuple(strength))
    luma = torch.tensor([0.2989, 0.587, 0.114])[:, None, None]
    if name == "brightness":
        factor = views / plain
    elif name == "contrast":
        mean = (plain * luma).sum(1).mean((1, 2))[:, None, None, None]
        factor = (views - mean) / (plain - mean)
        factor[(plain - mean).abs() < 0.02] = float("nan")
    elif name == "saturation":
        difference = plain - (plain * luma).sum(1, keepdim=True)
        factor = (views - plain) / difference + 1
        factor[difference.abs() < 0.02] = float("nan")
    else:  # HSV's value and saturation stay
        torch.testing.assert_close(views.amax(1), plain.amax(1))
        torch.testing.assert_close(views.amin(1), plain.amin(1))
        assert changed(views, plain).all()
        return
    factor = factor.flatten(1)
    middle = factor.nanmedian(1).values
    assert (factor - middle[:, None]).abs().nan_to_num(0).max() < 1e-2
    assert 0.6 <= middle.min() < 0.65
    assert 1.35 < middle.max() <= 1.4


@pytest.mark.parametrize("channels", [1, 3])
def test_compiled_views_equal_eager_ones(channels):
    config = Config(
        **{"jitter": (0.8, 0.8, 0.8, 0.2), "jitter_probability": 0.5},
        **{"grayscale_probability": 0.5, "blur_probability": 0.5},
    )
    images = noise(64)[:, :channels]
    drawn = pretraining.draw_views(images, config, seeded())
    compiled = torch.compile(pretraining.apply_views, backend="aot_eager", fullgraph=True)
    expected = pretraining.apply_views(images, drawn, 6)
    torch.testing.assert_close(compiled(images, drawn, 6), expected, rtol=0, atol=1e-5)


def test_views_are_torchvisions_ops_in_simclrs_order():
    half = {f"{name}_probability": 0.5 for name in ("jitter", "grayscale", "blur")}
    images = noise(64, 20)
    drawn = pretraining.draw_views(images, Config(**half, jitter=(0.8, 0.8, 0.8, 0.2)), seeded())
    for i, view in enumerate(pretraining.apply_views(images, drawn, 30)):
        one = {name: value[i].tolist() for name, value in drawn.items()}
        box = map(int, one["boxes"])
        x = reference.resized_crop(images[i] / 255, *box, [30, 30], antialias=False)
        x = reference.horizontal_flip(x) if one["mirrored"] else x
        for name in ("brightness", "contrast", "saturation", "hue") if one["jittered"] else ():
            x = getattr(reference, f"adjust_{name}")(x, one[name])
        x = reference.rgb_to_grayscale(x, 3) if one["greyed"] else x
        x = reference.gaussian_blur(x, [3, 3], [one["sigma"]] * 2) if one["blurred"] else x
        torch.testing.assert_close(view, x, rtol=0, atol=1e-4)


def test_crop_only_leaves_the_colours():
    images, loud = noise(20), dict.fromkeys(OFF, 1.0)
    plain = views_of(images, crop_scale_min=0.3, flip_probability=1.0)
    assert torch.equal(views_of(images, crop_only=True, **loud, crop_scale_min=0.3), plain)
    assert not torch.allclose(views_of(images, **loud, crop_scale_min=0.3), plain, atol=0.05)


# --------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Config(
    pretraining.PretrainingConfig,
    stages="pretrain",
    encoder="small",
    epochs=3,
    batch_size=8,
    checkpoint_seconds=0.0,
):
    """A script's settings, as small as they get."""

    SCRIPT = "tiny"
    STAGES = ("pretrain", "embed", "first", "second")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--batch-size 1", "--batch-size must be at least 2"),
        ("--epochs 0", "--epochs must be at least 1"),
        ("--stages pretrain,bake", "--stages knows pretrain,embed,first,second"),
        ("--jitter 1 1 1 0.7", "hue <= 0.5"),
        ("--jitter 1 -1 1 0", "not below 0"),
        ("--crop-scale-min 0", "--crop-scale-min"),
        ("--flip-probability 2", "--flip-probability must be in"),
        ("--blur-probability nan", "--blur-probability must be in"),
        ("--probe-epochs 0", "--probe-epochs must be at least 1"),
        ("--knn-every -1", "--knn-every must not be negative"),
        ("--keep-every -1", "--keep-every must not be negative"),
        ("--epochs 2 --warmup-epochs 2", "--warmup-epochs 2 must be fewer than --epochs 2"),
        ("--epochs 2 --warmup-epochs 50", "--warmup-epochs 50 must be fewer"),
        ("--devices 0", "--devices must be at least 1"),
        ("--devices 3", "--batch-size 8 does not divide among --devices 3"),
        ("--width 12", "--width must be a multiple of 8"),
        ("--view-size 8", "needs a ResNet"),
        ("--width 32", "--width has no effect without a ResNet"),
        ("--encoder resnet18 --view-size 8,", "whole numbers from 1 to 9,999"),
        (f"--encoder resnet18 --view-size {'1' * 5000}", "whole numbers from 1 to 9,999"),
        ("--encoder resnet18 --view-size 8,8,8,16", "more parts"),
        ("--encoder resnet18 --view-size 1 --blur-probability 0.5", "--blur-probability needs"),
        ("--encoder resnet19", "timm:NAME"),
        ("--resume nowhere", "not a run folder"),
        ("--epoch 3", "unrecognized arguments"),
    ],
)
def test_mistakes_in_settings_are_one_line(user_error, line, message):
    with user_error(message):
        flags.parse_config(Config, line.split(), "")


@pytest.mark.parametrize(
    ("sizes", "epochs", "sides"),
    [
        (None, 2, [None, None]),
        ("8,12,16", 3, [8, 12, 16]),
        ("8,8,16", 6, [8, 8, 8, 8, 16, 16]),
        ("8, 16", 3, [8, 8, 16]),
    ],
)
def test_view_sizes_share_the_epochs(sizes, epochs, sides):
    config = Config(encoder="resnet18", view_size=sizes, epochs=epochs)
    assert [config.view_side(epoch) for epoch in range(epochs)] == sides


@pytest.mark.parametrize(
    ("choice", "steps", "device", "compiled"),
    [
        ("auto", 10**6, "cpu", False),
        ("auto", 5000, "cuda", True),  # in each of three epochs
        ("auto", 4999, "cuda", False),
        ("auto", 10, "cuda", False),
        ("auto", 10**6, "cuda", True),
        ("on", 10, "cpu", True),
        ("off", 10**6, "cuda", False),
    ],
)
def test_auto_compiles_long_trainings_on_cuda(monkeypatch, choice, steps, device, compiled):
    monkeypatch.setattr(torch, "compile", lambda part, **options: ("compiled", part))
    monkeypatch.setattr(pretraining, "can_compile", lambda: True)
    made = pretraining.choose_compiler(Config(compile=choice), steps, torch.device(device))(abs)
    assert made == (("compiled", abs) if compiled else abs)
    monkeypatch.setattr(pretraining, "can_compile", lambda: False)
    made = pretraining.choose_compiler(Config(compile=choice), steps, torch.device(device))(abs)
    assert made == (("compiled", abs) if choice == "on" else abs)


# ------------------------------------------------------------------------------- the epochs


class Model(nn.Module):
    """One layer with dropout, and a head."""

    def __init__(self, config, channels, size):
        super().__init__()
        layer = nn.Linear(channels * size * size, 6)
        self.encoder = nn.Sequential(nn.Flatten(), layer, nn.Dropout(0.1))
        self.encoder.num_features = 6
        self.head = nn.Linear(6, 4)

    def forward(self, images):
        return self.head(self.encoder(images))


class Monitor:
    """Remembers what it is asked, and answers with a column that says so."""

    def __init__(self):
        self.calls, self.queries = [], torch.arange(5)

    def measure(self, encoder, z, epoch, last):
        self.calls.append((encoder, z.clone(), epoch, last))
        return {"embedding_std": z.std().item() + 1, "note": f"epoch {epoch}"}


def make_data(count=28, labels=True, name="noise"):
    images = noise(count + 12, seed=3)
    kinds = torch.arange(len(images)) % 3 if labels else None
    everything = datasets.Split(images, kinds)
    rest = everything.select(torch.arange(count, len(images)))
    train = everything.select(torch.arange(count))
    classes = ("a", "b", "c") if labels else ()
    return datasets.ImageData(name, classes, train, rest if labels else None).with_statistics()


def make_config(folder, **changes):
    changes = {"output_dir": str(folder), "name": "run", "device": "cpu", **changes}
    return Config(**{"precision": "float32", "checkpoint_seconds": 0.0, **changes})


def make_training(folder, model=None, config=None, fabric=None, log=None, **rest):
    config = config or make_config(folder)
    data = make_data()
    if model is None:
        torch.manual_seed(0)
        model = Model(config, 3, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    fabric = fabric or devices.make_fabric("cpu", "float32")
    run = runs.Run(folder, log) if log else runs.Run(folder)
    return pretraining.Pretraining(
        model, optimizer, data.train, config, run, fabric, rest.pop("monitor", Monitor()), **rest
    )


def pretrain(model, data, config, run, fabric):
    """A loop as the scripts have it."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    training = pretraining.Pretraining(model, optimizer, data.train, config, run, fabric, Monitor())
    for epoch in training.epochs():
        for step, images, generator in training.batches(epoch):
            optimizer.param_groups[0]["lr"] = training.rate(0.1, step)
            views = pretraining.crop_views(images.repeat(2, 1, 1, 1), config, generator)
            z = model(data.train.normalize_for_encoder(views))
            loss = z.square().mean()
            training.record(loss, z)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return training.history


def train(module, folder, model, config, data, fabric):
    """A script's pretraining, without its picture, which takes longer than tiny trainings."""
    folder.mkdir(exist_ok=True)
    with mock.patch.object(functions, "plot_views"):
        return module.pretrain(model, data, config, runs.Run(folder), fabric), model


def without_times(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def metrics(folder):
    return without_times(csv.DictReader((folder / "metrics.csv").open()))


def state_of(folder):
    return checkpoints.load(folder / "checkpoint.pt")


def assert_same_state(a, b):
    assert without_times(a.pop("history")) == without_times(b.pop("history"))
    torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"], b["optimizer"], rtol=0, atol=0)
    assert a["epoch"] == b["epoch"]


def assert_resumes_exactly(pretrain, folder, monkeypatch, config, fabric):
    """A script's pretraining that is stopped in its third epoch ends as one that is not."""
    data, measure = make_data(), functions.Monitor.measure
    pretrain(folder / "whole", config, data, fabric)

    def stop(monitor, encoder, z, epoch, last):
        if epoch == 3:
            raise KeyboardInterrupt
        return measure(monitor, encoder, z, epoch, last)

    with monkeypatch.context() as patch:
        patch.setattr(functions.Monitor, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(folder / "stopped", config, data, fabric)
    assert len(metrics(folder / "stopped")) == 2
    config = dataclasses.replace(config, resume=str(folder / "stopped"))
    pretrain(folder / "stopped", config, data, fabric, seed=1)
    state = state_of(folder / "whole")
    assert_same_state(state_of(folder / "stopped"), dict(state))
    return state


def walk(folder, host=False, **changes):
    """What each step of a training is given: its number, its images' positions, its numbers."""
    training = make_training(folder, config=make_config(folder, **changes))
    place = {image.numpy().tobytes(): i for i, image in enumerate(training.train.images)}
    steps = []
    for epoch in training.epochs():
        for step, images, generator in training.batches(epoch, host):
            assert images.dtype == torch.uint8
            positions = tuple(place[image.numpy().tobytes()] for image in images)
            drawn = tuple(torch.rand(4, generator=generator).tolist())
            steps.append((epoch, step, positions, drawn))
            training.record(torch.tensor(0.0), torch.rand(4, 3))
    return steps


@pytest.mark.parametrize("host", [False, True])
def test_each_epoch_has_an_order_and_random_numbers_of_its_own(tmp_path, host):
    steps = walk(tmp_path, host)
    assert [(epoch, step) for epoch, step, _, _ in steps] == [(i // 3, i) for i in range(9)]
    orders = [sum((positions for e, _, positions, _ in steps if e == k), ()) for k in range(3)]
    for order in orders:  # 28 images in batches of 8
        assert len(set(order)) == len(order) == 24
        assert list(order) != sorted(order)
    assert len(set(orders)) == 3
    assert len({drawn for _, _, _, drawn in steps}) == 9
    assert walk(tmp_path, host) == steps
    other = walk(tmp_path, host, seed=1)
    assert all(a[2] != b[2] and a[3] != b[3] for a, b in zip(steps, other, strict=True))


def test_crops_and_host_draw_from_streams_of_their_own(tmp_path):
    assert not {s[3] for s in walk(tmp_path)} & {s[3] for s in walk(tmp_path, host=True)}


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_rate_rises_in_the_warm_up_and_then_follows_the_schedule(tmp_path, schedule):
    config = make_config(tmp_path, epochs=4, warmup_epochs=1, schedule=schedule)
    training = make_training(tmp_path, config=config)  # three steps in an epoch
    rates = [training.rate(2.0, step) for step in range(12)]
    falling = [2 * math.cos(math.pi / 2 * step / 9) ** 2 for step in range(9)]
    expected = falling if schedule == "cosine" else [2.0] * 9
    assert rates == pytest.approx([2 / 3, 4 / 3, 2.0, *expected])


def test_the_verdict_is_told_what_the_run_is(tmp_path, monkeypatch):
    told, one = [], noise(8).float()
    monkeypatch.setattr(
        verdict, "judge", lambda *given: told.append((dict(given[0][-1]), *given)) or "good"
    )
    config, method = make_config(tmp_path, epochs=3, warmup_epochs=1), verdict.Method(passes=2)
    model = Model(config, 3, 8)
    model.norm = nn.BatchNorm1d(4)
    training = make_training(tmp_path, model, config, method=method)
    for epoch in training.epochs():
        for step, _, _ in training.batches(epoch):
            other = one.flip(3) if step == 5 else noise(8, seed=9).float()  # the mirror image last
            training.record(torch.tensor(float(step)), torch.rand(16, 4), torch.cat([one, other]))
        model.norm.train(epoch != 1)
        if epoch == 2:
            model.norm.images = 3  # as MoCo's parts of a batch
    # Of 28 labels ten are the commonest, and the monitor has five queries.
    luck = 10 / 28 + 3 * math.sqrt(10 / 28 * 18 / 28 / 5)
    about = verdict.Circumstances(3, 1, embeddings=16, size=4, normalised=8, knn_chance=luck)
    frozen = dataclasses.replace(about, frozen=True)
    parts = dataclasses.replace(about, normalised=3)
    assert [given[3] for given in told] == [about, frozen, parts]
    assert [len(given[1]) for given in told] == [1, 2, 3]
    assert all(given[2] is method for given in told)
    assert [given[0]["last_loss"] for given in told] == [2, 5, 8]
    seen = [row["view_correlation"] for row in training.history]
    assert seen[1] == pytest.approx(1)
    assert max(seen[0], seen[2]) < 0.5


@pytest.mark.parametrize(("synchronised", "images"), [(False, 16), (True, 32)])
def test_synchronised_statistics_are_those_of_all_processes(
    tmp_path, monkeypatch, synchronised, images
):
    told = []
    monkeypatch.setattr(verdict, "judge", lambda *given: told.append(given[2]) or "good")
    config = make_config(tmp_path, epochs=1)
    model = Model(config, 3, 8)
    if synchronised:
        model.norm = nn.SyncBatchNorm(4)
    training = make_training(tmp_path, model, config)
    monkeypatch.setattr(training.share, "gather", lambda z: torch.cat([z, z]))  # of two
    for epoch in training.epochs():
        for _ in training.batches(epoch):
            training.record(torch.tensor(1.0), torch.rand(16, 4))
    assert [about.normalised for about in told] == [images]


def test_the_gradient_norm_is_that_of_the_last_step(tmp_path):
    config = make_config(tmp_path, epochs=1)
    model = Model(config, 3, 8)
    fabric = devices.make_fabric("cpu", "float32")
    (row,) = pretrain(model, make_data(), config, runs.Run(tmp_path), fabric)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    assert row["gradient_norm"] == pytest.approx(gradient.square().sum().sqrt().item(), rel=1e-5)


def test_an_epoch_becomes_a_row(tmp_path):
    monitor, logged, last_z = Monitor(), [], []
    training = make_training(
        tmp_path, monitor=monitor, log=lambda row, step: logged.append((dict(row), step))
    )
    for epoch in training.epochs():
        assert training.model.training
        training.model.eval()  # as a monitor's look at it might leave it
        for step, _, _ in training.batches(epoch):
            training.optimizer.param_groups[0]["lr"] = float(step)
            z = torch.rand(16, 4, requires_grad=True)
            training.record(torch.tensor(10.0 * epoch + step), z)
        last_z.append(z)
        time.sleep(0.01)
    rows = training.history
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows] == pytest.approx([1, 14, 27])
    assert [row["learning_rate"] for row in rows] == [2, 5, 8]
    for row in rows:
        assert 0.01 < row["seconds"] < 60
        assert row["images_per_second"] == pytest.approx(24 / row["seconds"])
    assert [(encoder, *rest) for encoder, _, *rest in monitor.calls] == [
        (training.model.encoder, 1, False),
        (training.model.encoder, 2, False),
        (training.model.encoder, 3, True),
    ]
    for (_, seen, _, _), z in zip(monitor.calls, last_z, strict=True):
        assert torch.equal(seen, z)
    assert logged == [(row, row["epoch"]) for row in rows]
    assert metrics(tmp_path) == [{k: str(v) for k, v in r.items()} for r in without_times(rows)]
    assert state_of(tmp_path)["history"] == rows


@pytest.mark.parametrize(("every", "kept"), [(0, []), (1, [1, 2, 3]), (2, [2])])
def test_checkpoints_are_kept_every_so_many_epochs(tmp_path, every, kept):
    config, data = make_config(tmp_path, keep_every=every), make_data()
    model = Model(config, 3, 8)
    weights = []
    training_run = runs.Run(tmp_path, lambda row, step: weights.append(model.head.weight.clone()))
    pretrain(model, data, config, training_run, devices.make_fabric("cpu", "float32"))
    names = {path.name for path in tmp_path.glob("checkpoints/*")}
    assert names == {f"epoch{epoch}.pt" for epoch in kept}
    for epoch in kept:
        state = checkpoints.load(tmp_path / "checkpoints" / f"epoch{epoch}.pt")
        assert state["epoch"] == len(state["history"]) == epoch
        assert torch.equal(state["model"]["head.weight"], weights[epoch - 1])


@pytest.mark.parametrize(("equal", "cause"), [(1000, "good"), (3000, "constant images")])
def test_equal_images_of_the_first_class_are_not_all(tmp_path, equal, cause):
    images = noise(3000, seed=4)
    images[:equal] = 7
    data = make_data()
    data = dataclasses.replace(data, train=dataclasses.replace(data.train, images=images))
    config = make_config(tmp_path, epochs=1, batch_size=1000)
    fabric = devices.make_fabric("cpu", "float32")
    history = pretrain(Model(config, 3, 8), data, config, runs.Run(tmp_path), fabric)
    assert (history[-1]["verdict"] == "constant images") == (cause == "constant images")


def drive(training, losses, z):
    for epoch in training.epochs():
        for _ in training.batches(epoch):
            training.record(torch.tensor(losses[epoch]), z)


@pytest.mark.parametrize(
    ("losses", "spread", "warned"),
    [
        ([-0.9, -0.995] + [-0.9] * 18, 1.0, "warning in epoch 2: the embedding collapses"),
        ([-0.98, -0.98, -0.995] + [-0.9] * 17, 1.0, None),  # after the first tenth it is learning
        ([0.0] * 20, 0.01, "warning in epoch 1: the embedding collapses"),
    ],
)
def test_a_collapse_is_said_once(tmp_path, capsys, losses, spread, warned):
    column = {"embedding_std": spread}
    monitor = SimpleNamespace(
        queries=range(9), measure=lambda encoder, z, epoch, last: dict(column)
    )
    config = make_config(tmp_path, epochs=20)
    method = verdict.Method(chance_loss=0.0, collapse_loss=-1.0)
    training = make_training(tmp_path, config=config, monitor=monitor, method=method)
    drive(training, losses, torch.rand(16, 4))
    printed = capsys.readouterr().out
    assert printed.count("warning") == (warned is not None)
    assert warned is None or warned in printed


def test_the_time_is_estimated_and_counts_larger_views(tmp_path, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    config = make_config(tmp_path, epochs=6, encoder="resnet18", view_size="16,16,24")
    training = make_training(tmp_path, config=config)
    for epoch in training.epochs():
        for _ in training.batches(epoch):
            clock[0] += 20.0
            training.record(torch.tensor(0.0), torch.rand(16, 4))
    printed = capsys.readouterr().out
    # 3 steps in an epoch of 60 s, the last two epochs with (24 / 16)^2 times as many pixels
    assert printed.count("on this device") == 1
    assert "about 8m30s on this device" in printed  # 4 + 2 * 2.25 epochs
    left = [line.split("  ")[-1] for line in printed.splitlines() if line.startswith("epoch")]
    assert left == ["7m30s left", "6m30s left", "5m30s left", "4m30s left", "1m00s left", "0s left"]


# ------------------------------------------------------------------------- what goes wrong


def as_second_process(fabric):
    """What a process sees of Fabric that is not the first of two."""
    return SimpleNamespace(
        device=fabric.device,
        world_size=2,
        global_rank=1,
        is_global_zero=False,
        all_reduce=lambda value: value,
        all_gather=lambda value, sync_grads: torch.stack([value, value]),
    )


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("what", ["loss", "weight", "momentum"])
def test_every_process_stops_before_it_saves_what_is_not_finite(
    tmp_path, monkeypatch, process, what
):
    # Those that go on would wait for the one that has stopped.
    def add(self, loss):  # as on an accelerator, where a step does not wait for the host
        self.values[self.step] = loss
        self.step += 1

    monkeypatch.setattr(progress.EpochLoss, "add", add)
    fabric = devices.make_fabric("cpu", "float32")
    training = make_training(tmp_path, fabric=as_second_process(fabric) if process else fabric)
    for weight in training.model.parameters():
        weight.grad = torch.zeros_like(weight)
    begun = []

    def train():
        for epoch in training.epochs():
            begun.append(epoch)
            for step, _, _ in training.batches(epoch):
                bad = epoch == 1 and step == 4
                loss = math.inf if bad and what == "loss" else 1.0
                training.record(torch.tensor(loss), torch.rand(16, 4))
                training.optimizer.step()
                if bad and what == "weight":
                    training.model.head.bias.data[1] = math.nan
                if bad and what == "momentum":
                    state = training.optimizer.state[training.model.head.bias]
                    state["momentum_buffer"][1] = math.nan

    with pytest.raises(Diverged, match="epoch 2"):
        train()
    assert begun == [0, 1]
    if process == 0:
        assert state_of(tmp_path)["epoch"] == 1
        assert len(metrics(tmp_path)) == 1
    else:  # the first one writes
        assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_stops_before_its_step(tmp_path):
    training = make_training(tmp_path)
    z = torch.rand(16, 4)
    epoch = next(training.epochs())
    batches = training.batches(epoch)
    next(batches)
    training.record(torch.tensor(1.0), z)
    next(batches)
    with pytest.raises(Diverged, match="nan in epoch 1, step 2"):
        training.record(torch.tensor(math.nan), z)


# --------------------------------------------------------------------------- the experiment


def do_experiment(config, data=None, stages=None):
    return experiment.run_experiment(config, data or make_data(), Model, pretrain, stages or {})


def test_a_training_that_diverges_says_what_is_kept_and_a_stage_does_not(tmp_path, monkeypatch):
    def diverge(*_):
        raise Diverged("the loss is nan")

    with pytest.raises(Diverged) as caught:
        experiment.run_experiment(make_config(tmp_path / "a"), make_data(), Model, diverge, {})
    assert caught.value.__notes__ == ["Try a new run with a lower --learning-rate"]
    with pytest.raises(Diverged) as caught:
        do_experiment(
            make_config(tmp_path / "b", stages="pretrain,first"), stages={"first": diverge}
        )
    assert not hasattr(caught.value, "__notes__")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of three epochs that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    do_experiment(make_config(folder))
    return folder / "tiny" / "run"


@pytest.mark.parametrize(
    "where",
    [
        "in the first epoch",
        "in the second epoch",
        "between checkpoint and table",
        "while a checkpoint is written",
        "after the last epoch",
    ],
)
def test_a_killed_run_repeats_an_uninterrupted_one(tmp_path, monkeypatch, whole, where):
    calls = []

    def stop_at(module, name, call):
        original = getattr(module, name)

        def stopping(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        patch.setattr(module, name, stopping)

    with monkeypatch.context() as patch:
        if where.endswith("epoch") and "last" not in where:
            stop_at(pretraining, "crop_views", 2 if "first" in where else 5)
        elif where == "between checkpoint and table":
            stop_at(files, "write_csv", 3)  # no epoch is left to write it
        elif where == "while a checkpoint is written":
            stop_at(torch, "save", 2)
        else:
            stop_at(checkpoints, "save_weights", 1)
        with pytest.raises(KeyboardInterrupt) as caught:
            do_experiment(make_config(tmp_path, keep_every=1))
    folder = tmp_path / "tiny" / "run"
    assert f"--resume {folder}" in caught.value.__notes__[0]
    assert not (folder / "summary.json").exists()
    do_experiment(make_config(tmp_path, resume=str(folder), keep_every=1))
    assert_same_state(state_of(folder), state_of(whole))
    assert metrics(folder) == metrics(whole)
    weights = "encoder.safetensors"
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()
    kept = {"checkpoints", "epoch1.pt", "epoch2.pt", "epoch3.pt"}
    names = {path.name for path in whole.iterdir()} | kept
    assert {path.name for path in folder.rglob("*")} == names


def test_a_seed_decides_the_run(tmp_path, monkeypatch, whole):
    beginnings = []

    def begin(*arguments):
        model = Model(*arguments)
        beginnings.append(model.head.bias.tolist())
        return model

    def run(name, seed):
        config = make_config(tmp_path, name=name, seed=seed)
        experiment.run_experiment(config, make_data(), begin, pretrain, {})
        return state_of(tmp_path / "tiny" / name)

    torch.manual_seed(1)  # what was drawn before does not matter
    assert_same_state(run("a", 0), state_of(whole))
    assert not torch.equal(run("b", 1)["model"]["head.bias"], run("c", 0)["model"]["head.bias"])
    assert beginnings[0] == beginnings[2] != beginnings[1]


def test_a_run_starts_from_given_weights_but_goes_on_from_its_own(tmp_path, whole, capsys):
    given, begun = load_file(whole / "encoder.safetensors"), []

    def watched(model, *rest):
        begun.append({k: v.clone() for k, v in model.encoder.state_dict().items()})
        return pretrain(model, *rest)

    config = make_config(tmp_path, weights=str(whole / "encoder.safetensors"))
    experiment.run_experiment(config, make_data(), Model, watched, {})
    assert "of the encoder's" in capsys.readouterr().out
    assert all(torch.equal(value, given[name]) for name, value in begun[0].items())
    again = dataclasses.replace(config, resume=str(tmp_path / "tiny" / "run"))
    experiment.run_experiment(again, make_data(), Model, watched, {})
    assert "of the encoder's" not in capsys.readouterr().out


def test_more_epochs_of_a_finished_run_are_a_new_run_from_its_weights(tmp_path, capsys):
    do_experiment(make_config(tmp_path, epochs=2))
    old = tmp_path / "tiny" / "run"
    kept, begun = {path.name: path.read_bytes() for path in old.iterdir()}, []

    def watched(model, data, config, *rest):
        begun.append(({k: v.clone() for k, v in model.state_dict().items()}, config))
        return pretrain(model, data, config, *rest)

    longer = make_config(tmp_path, epochs=4, resume=str(old), name="longer")
    experiment.run_experiment(longer, make_data(), Model, watched, {})
    assert "has finished its 2 epochs: a new run starts from its weights" in capsys.readouterr().out
    ((weights, config),) = begun
    saved = torch.load(old / "checkpoint.pt", weights_only=True)["model"]
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
    assert (config.epochs, config.resume) == (4, None)
    assert [row["epoch"] for row in metrics(tmp_path / "tiny" / "longer")] == ["1", "2", "3", "4"]
    assert {path.name: path.read_bytes() for path in old.iterdir()} == kept


def test_the_final_loss_is_the_last_not_the_best(tmp_path):
    def pretrain(*arguments):
        times = ((1, 1.0, 2.0), (2, 3.0, 4.0))
        return [{"epoch": n, "loss": loss, "seconds": seconds} for n, loss, seconds in times]

    summary = experiment.run_experiment(make_config(tmp_path), make_data(), Model, pretrain, {})
    assert summary == {"final_loss": 3.0, "pretrain_seconds": 6.0, "seconds": 6.0}


def test_the_encoders_file_says_how_to_use_it(whole):
    pixels = make_data().train.images.numpy().astype(np.float64) / 255
    with safe_open(whole / "encoder.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["about"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert facts.pop("mean") == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert facts.pop("std") == pytest.approx(pixels.std((0, 2, 3)).tolist(), abs=1e-6)
    assert facts.pop("size") == pixels.shape[2] == pixels.shape[3]
    assert facts.pop("computed_in") == files.read_json(whole / "config.json")["computed_in"]
    rules = {"channels": None, "value_range": None, "stack": "refuse"}
    assert facts == {"encoder": "small", "stem": "cifar", "width": 64} | rules
    saved = state_of(whole)["model"]
    assert weights.keys() == {"1.weight", "1.bias"}
    for name, value in weights.items():
        assert torch.equal(value, saved[f"encoder.{name}"])


def test_stages_add_to_the_summary_in_their_order(tmp_path):
    seen = []

    def first(model, data, config, folder, fabric):
        assert json.loads((folder / "summary.json").read_text())["final_loss"] > 0
        seen.append(("first", model.head.weight.detach().clone()))
        (folder / "first_checkpoint.pt").write_text("half")
        return {"text": "a word", "number": 1.5, "table": {"a": 1}, "nothing": None}

    def second(model, data, config, folder, fabric):
        # What a stage keeps while it works goes when its result is safe, not before.
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["text"], summary["number"]) == ("a word", 1.5)
        assert not (folder / "first_checkpoint.pt").exists()
        seen.append(("second", data.name))

    stages = {"first": first, "second": second, "embed": None}
    config = make_config(tmp_path, stages="second,pretrain,first")
    summary = do_experiment(config, stages=stages)
    folder = tmp_path / "tiny" / "run"
    assert [name for name, _ in seen] == ["first", "second"]
    assert torch.equal(seen[0][1], state_of(folder)["model"]["head.weight"])
    assert summary == json.loads((folder / "summary.json").read_text())
    rows = state_of(folder)["history"]
    assert summary["final_loss"] == rows[-1]["loss"] != rows[0]["loss"]
    times = ("seconds", "measure_seconds", "checkpoint_seconds")
    spent = sum(row[name] for row in rows for name in times)
    assert summary["pretrain_seconds"] == pytest.approx(spent)
    spent = [summary[f"{name}_seconds"] for name in ("pretrain", "first", "second")]
    assert summary["seconds"] == pytest.approx(sum(spent))

    again = dataclasses.replace(config, resume=str(folder), stages="second", probe_epochs=7)
    later = do_experiment(again, stages=stages)
    assert later["text"] == "a word"
    assert len(seen) == 3


@pytest.mark.parametrize("when", ["in the stage", "before its result is saved"])
def test_an_interrupted_stage_keeps_its_checkpoint(tmp_path, monkeypatch, when):
    def first(model, data, config, folder, fabric):
        (folder / "first_checkpoint.pt").write_text("half")
        if when == "in the stage":
            raise KeyboardInterrupt
        return {"number": 1.0}

    summarize = runs.Run.summarize

    def stop(run, values, step):
        if "number" in values:
            raise KeyboardInterrupt
        return summarize(run, values, step)

    monkeypatch.setattr(runs.Run, "summarize", stop)
    with pytest.raises(KeyboardInterrupt):
        do_experiment(make_config(tmp_path, stages="pretrain,first"), stages={"first": first})
    assert (tmp_path / "tiny" / "run" / "first_checkpoint.pt").exists()


def test_without_labels_the_map_alone_is_made(tmp_path, capsys):
    done = []
    names = ("first", "embed", "second")
    stages = {name: lambda *arguments, name=name: done.append(name) for name in names}
    config = make_config(tmp_path, stages="pretrain,first,embed,second")
    do_experiment(config, make_data(labels=False), stages)
    printed = capsys.readouterr().out
    assert done == ["embed"]
    assert "first is skipped: it needs labels, and noise has none" in printed
    assert "second is skipped: it needs labels" in printed
    folder = tmp_path / "tiny" / "run"
    assert printed.splitlines()[-2:] == [
        "What it sees in them:",
        f"  python embed.py {folder} {config.dataset}",
    ]


@pytest.mark.parametrize("tested", [16, 1000])
def test_few_test_images_are_said_to_tell_little(tmp_path, capsys, tested):
    data = make_data()
    test = data.test.select(torch.arange(tested) % len(data.test))
    config = make_config(tmp_path, stages="pretrain,first")
    stages = {"first": lambda *arguments: {"linear_probe_accuracy": 0.75}}
    do_experiment(config, dataclasses.replace(data, test=test), stages)
    # Wilson's interval holds the accuracies from which 0.75 is 1.96 standard errors away at most.
    within = [p for p in np.linspace(0, 1, 10_001) if (p - 0.75) ** 2 <= 3.8415 * p * (1 - p) / 16]
    interval = f"{within[0]:.1%} to {within[-1]:.1%}"
    line = f"the linear probe's 95 % interval, of 16 test images, is {interval}\n"
    assert (line in capsys.readouterr().out) == (tested == 16)


@pytest.mark.parametrize(
    ("changes", "count", "labels", "words"),
    [
        ({"stages": "first"}, 28, True, ("without pretrain", "--resume")),
        ({"batch_size": 30}, 28, True, ("--batch-size 30", "28 images")),
        ({"batch_size": 2}, 1, True, ("single training image", "takes two")),
        ({"stages": "pretrain,embed", "batch_size": 2}, 4, False, ("at least 5", "not 4")),
    ],
)
def test_mistakes_that_the_data_shows_leave_no_folder(
    tmp_path, user_error, changes, count, labels, words
):
    with user_error(*words):
        do_experiment(make_config(tmp_path, **changes), make_data(count, labels))
    assert list(tmp_path.iterdir()) == []


def test_a_batch_divides_among_the_processes_that_a_cluster_starts(
    tmp_path, user_error, monkeypatch
):
    environment = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "3", "WORLD_SIZE": "3"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for size in (8, 3):  # of a single image BatchNorm has no variance
        with user_error(f"--batch-size {size}", "3 processes"):
            do_experiment(make_config(tmp_path, batch_size=size))
    assert list(tmp_path.iterdir()) == []


def test_stages_alone_need_a_finished_run(tmp_path, monkeypatch, user_error):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_csv", stop)
        with pytest.raises(KeyboardInterrupt):
            do_experiment(make_config(tmp_path))
    folder = str(tmp_path / "tiny" / "run")
    with user_error("finished 1 of 3 epochs"):
        do_experiment(make_config(tmp_path, resume=folder, stages="first"))


def test_a_finished_run_is_evaluated_again_with_other_settings_of_evaluation_only(whole):
    config = make_config(whole.parents[1], resume=str(whole))
    changes = {"probe_epochs": 2, "few_labels": 0, "pixel_baseline": True, "stages": "first"}
    seen = []
    stages = {"first": lambda model, data, config, *_: seen.append(config.probe_epochs)}
    do_experiment(dataclasses.replace(config, **changes), stages=stages)
    assert seen == [2]
    for name, value in {"epochs": 2, "jitter_probability": 0.1, "weight_decay": 1.0}.items():
        with pytest.raises(UserError, match=flags.flag(name)):
            do_experiment(dataclasses.replace(config, **{name: value}))


def test_weights_that_are_not_there_use_up_no_name(tmp_path, user_error):
    for place in ("typo.pt", "."):  # a folder is no file of weights
        with user_error("there are no weights at"):
            do_experiment(make_config(tmp_path / "out", weights=str(tmp_path / place)))
    assert not (tmp_path / "out").exists()
