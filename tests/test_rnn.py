import csv
import dataclasses
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import functions
import rnn
from support import augment, checkpoints, datasets, devices, errors, runs, settings

DOLLARS = ("_ok", "price_$5_$10")  # matplotlib would read a formula, and hide what begins with _


def small_config(folder: Path, **changes) -> rnn.Config:
    settings = {
        "dataset": "digits",
        "cells": "gru",
        "hidden_size": 16,
        "epochs": 3,
        "learning_rate": 5e-3,
        "output_dir": str(folder),
        "name": "run",
        "device": "cpu",
        "precision": "float32",
        "checkpoint_seconds": 0.0,
    }
    return rnn.Config(**{**settings, **changes})


def colour_split(count: int, seed: int) -> datasets.Split:
    """Three classes of brightness, 6 x 5 pixels; the channels differ in mean and deviation."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, count)
    images = draw.normal((60, 120, 190), (10, 40, 20), (count, 6, 5, 3))
    images = (images + 10 * labels[:, None, None, None]).clip(0, 255).astype(np.uint8)
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return datasets.Split(images, torch.from_numpy(labels))


def normalized_rows(images: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
    """What the network reads, `(N, H, C * W)` in float64, from uint8 images, by NumPy alone."""
    pixels, known = (part.numpy().astype(np.float64) / 255 for part in (images, train))
    pixels = pixels - known.mean((0, 2, 3), keepdims=True)
    pixels = pixels / known.std((0, 2, 3), keepdims=True)
    rows = [[np.concatenate(list(image[:, r])) for r in range(image.shape[1])] for image in pixels]
    return torch.from_numpy(np.array(rows))


def metrics(folder: Path) -> list[dict[str, str]]:
    rows = csv.DictReader((folder / "metrics.csv").open())
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


def weights_hash(folder: Path) -> str:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest()


# ---------------------------------------------------------------------- the model and its training


def naive_states(cell: str, weights: list, rows: torch.Tensor) -> torch.Tensor:
    """The outputs `(B, T, hidden_size)`, by the equations in PyTorch's documentation."""
    w_i, w_h, b_i, b_h = weights
    h = c = rows.new_zeros(len(rows), w_h.shape[1])
    outputs = []
    for x in rows.unbind(1):
        inputs, state = F.linear(x, w_i, b_i), F.linear(h, w_h, b_h)
        if cell == "rnn":
            h = torch.tanh(inputs + state)
        elif cell == "lstm":
            i, f, g, o = (inputs + state).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        else:
            (r, z, n), (r_h, z_h, n_h) = inputs.chunk(3, 1), state.chunk(3, 1)
            r, z = torch.sigmoid(r + r_h), torch.sigmoid(z + z_h)
            h = (1 - z) * torch.tanh(n + r * n_h) + z * h
        outputs.append(h)
    return torch.stack(outputs, 1)


def pooled_output(config: rnn.Config, cell: str, weights: dict, rows: torch.Tensor) -> torch.Tensor:
    """What the MLP sees; the second direction reads the rows from the last to the first."""
    for layer in range(config.num_layers):
        directions = []
        for suffix in ("", "_reverse") if config.bidirectional else ("",):
            own = [
                weights[f"recurrent.{kind}_l{layer}{suffix}"]
                for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ]
            order = slice(None) if suffix == "" else list(reversed(range(rows.shape[1])))
            directions.append(naive_states(cell, own, rows[:, order])[:, order])
        rows = torch.cat(directions, 2)
    if config.pooling == "mean":
        return rows.mean(1)
    # Each direction has read all rows at its own end.
    hidden = config.hidden_size
    return torch.cat((rows[:, -1, :hidden], rows[:, 0, hidden:]), 1)


def naive_logits(
    config: rnn.Config, cell: str, weights: dict, rows: torch.Tensor, training: bool
) -> torch.Tensor:
    x = pooled_output(config, cell, weights, rows)
    for linear, norm in ((0, 1), (4, 5)):
        x = F.linear(x, weights[f"mlp.{linear}.weight"], weights[f"mlp.{linear}.bias"])
        statistics = [weights[f"mlp.{norm}.running_{name}"] for name in ("mean", "var")]
        affine = [weights[f"mlp.{norm}.{name}"] for name in ("weight", "bias")]
        x = F.dropout(F.relu(F.batch_norm(x, *statistics, *affine, training)), 0.3, training)
    return F.linear(x, weights["mlp.8.weight"], weights["mlp.8.bias"])


def naive_training(
    config: rnn.Config, cell: str, weights: dict, train: datasets.Split, validation: datasets.Split
) -> list[dict]:
    """Adam (Kingma & Ba 2015, algorithm 1) with L2 decay, a plateau or cosine; in `weights`."""
    rows = normalized_rows(train.images, train.images)
    held_out = normalized_rows(validation.images, train.images)
    learned = [name for name in weights if "running" not in name and "num_batches" not in name]
    m, v = ({name: torch.zeros_like(weights[name]) for name in learned} for _ in range(2))
    rate, best, bad, step, history = config.learning_rate, math.inf, 0, 0, []
    for epoch in range(config.epochs):
        if config.schedule == "cosine":  # Loshchilov & Hutter 2017, equation 5
            rate = config.learning_rate * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
        order = torch.randperm(len(train), generator=devices.epoch_generator(config.seed, epoch))
        torch.manual_seed(devices.epoch_generator(config.seed, epoch, stream=2).initial_seed())
        losses, correct = [], 0
        for index in order.split(config.batch_size):
            if len(index) < config.batch_size:
                continue
            for name in learned:
                weights[name] = weights[name].detach().requires_grad_()
            logits = naive_logits(config, cell, weights, rows[index], training=True)
            loss = -logits.log_softmax(1)[range(len(index)), train.labels[index]].mean()
            gradients = torch.autograd.grad(loss, [weights[name] for name in learned])
            step += 1
            for name, gradient in zip(learned, gradients, strict=True):
                gradient = gradient + config.weight_decay * weights[name].detach()
                m[name] = 0.9 * m[name] + 0.1 * gradient
                v[name] = 0.999 * v[name] + 0.001 * gradient**2
                update = m[name] / (1 - 0.9**step)
                update = update / ((v[name] / (1 - 0.999**step)).sqrt() + 1e-8)
                weights[name] = weights[name].detach() - rate * update
            losses.append(loss.item())
            correct += (logits.argmax(1) == train.labels[index]).sum().item()
        logits = naive_logits(config, cell, weights, held_out, training=False)
        loss = F.cross_entropy(logits, validation.labels).item()
        right = (logits.argmax(1) == validation.labels).double().mean().item()
        history.append({"train_loss": np.mean(losses), "validation_loss": loss})
        history[-1]["train_accuracy"] = correct / (len(losses) * config.batch_size)
        history[-1] |= {"validation_accuracy": right, "learning_rate": rate}
        bad = 0 if loss < best * (1 - 1e-4) else bad + 1
        best = min(best, loss)
        if config.schedule == "plateau" and bad > config.patience:
            rate, bad = rate / 10, 0
    return history


@pytest.mark.parametrize(
    ("cell", "schedule", "others"),
    [
        ("lstm", "plateau", {}),
        ("gru", "plateau", {}),
        ("rnn", "cosine", {"pooling": "mean", "bidirectional": True}),
    ],
)
def test_training_equals_a_naive_loop(tmp_path, monkeypatch, cell, schedule, others):
    config = small_config(
        tmp_path,
        **others,
        cells=cell,
        schedule=schedule,
        patience=1,
        hidden_size=7,
        num_layers=2,
        l2=6,
        l3=5,
        dropout=0.3,
        epochs=6,
        batch_size=10,
        learning_rate=0.02,
        weight_decay=0.03,
        augmentation="none",
        seed=3,
    )
    data = datasets.ImageData("noise", ("a", "b", "c"), colour_split(46, 0), colour_split(9, 1))
    data = data.with_statistics()
    validation = colour_split(30, 2).with_statistics_of(data.train)
    if schedule == "plateau":  # of wrong labels the loss rises while the network learns
        validation = dataclasses.replace(validation, labels=(validation.labels + 1) % 3)
    model = rnn.make_model(config, cell, data).double()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected = naive_training(config, cell, weights, data.train, validation)

    # The same in float64, where a difference is a mistake and no rounding.
    def to_double(images):
        return images.double() / 255 if images.dtype == torch.uint8 else images

    monkeypatch.setattr(datasets, "to_float", to_double)
    known = data.train.images.double() / 255
    exact = {"mean": known.mean((0, 2, 3)), "std": known.std((0, 2, 3), correction=0)}
    splits = [dataclasses.replace(split, **exact) for split in (data.train, validation)]
    history: list[dict] = []
    rnn.train(model, cell, tuple(splits), config, runs.Run(tmp_path), history)
    for row, wanted in zip(history, expected, strict=True):
        assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)
    rates = {row["learning_rate"] for row in history}
    assert len(rates) > (2 if schedule == "cosine" else 1)  # else the schedule was not seen
    for name, value in model.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(value, weights[name], rtol=1e-8, atol=1e-8, msg=name)


def test_both_passes_compute_in_the_precision_asked_for(tmp_path):
    config = small_config(tmp_path, epochs=1, train_fraction=0.1, precision="bfloat16")
    data, validation = rnn.load_splits(config)
    seen, cached = set(), []
    for precision in ("bfloat16", "float32"):
        model = rnn.make_model(config, "gru", data)
        model.register_forward_hook(
            lambda model, rows, logits, name=precision: seen.add(
                (name, model.training, torch.is_autocast_enabled("cpu"))
            )
        )
        # With the cache, gradients of a recurrent weight would be summed in bfloat16.
        model.register_forward_pre_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))
        changed = dataclasses.replace(config, precision=precision)
        rnn.train(model, "gru", (data.train, validation), changed, runs.Run(tmp_path), [])
    modes = (True, False)
    assert seen == {(p, mode, p == "bfloat16") for p in ("bfloat16", "float32") for mode in modes}
    assert not any(cached)


def test_the_seed_decides_the_first_weights(tmp_path):
    data = datasets.ImageData("noise", ("a", "b"), colour_split(4, 0), None)
    models = [
        rnn.make_model(small_config(tmp_path, seed=s), "gru", data).state_dict() for s in (0, 0, 1)
    ]
    first, same, other = (torch.cat([v.flatten() for v in m.values()]) for m in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("cell", rnn.CELLS)
def test_orthogonal_recurrent_weights_keep_lengths(tmp_path, cell):
    config = small_config(tmp_path, hidden_size=8, num_layers=2)
    orthogonal = dataclasses.replace(config, recurrent_init="orthogonal")
    torch.manual_seed(0)
    model, uniform = (rnn.RowRNN(c, cell, 12, 10).recurrent for c in (orthogonal, config))
    for layer in (0, 1):
        for gate in getattr(model, f"weight_hh_l{layer}").split(8):
            torch.testing.assert_close(gate @ gate.T, torch.eye(8))
        plain = getattr(uniform, f"weight_hh_l{layer}")
        assert plain.abs().max() <= 8**-0.5
        assert not torch.allclose(plain[:8] @ plain[:8].T, torch.eye(8), atol=0.5)


# ------------------------------------------------------------------------------------------ images


def test_rows_are_red_then_green_then_blue():
    images = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    rows = rnn.rows_from_images(images)
    assert rows.shape == (2, 4, 3 * 5)
    for i in range(2):
        for r in range(4):
            expected = [images[i, c, r, x].item() for c in range(3) for x in range(5)]
            assert rows[i, r].tolist() == expected


@pytest.mark.parametrize(("side", "most"), [(32, 2), (8, 1)])  # a sixteenth, at least one pixel
def test_standard_augmentation_mirrors_and_shifts_each_image(side, most):
    image = torch.rand(3, side, side) + 1
    views = rnn.augmented(image.repeat(300, 1, 1, 1), "standard", torch.Generator().manual_seed(0))
    possible = {}
    for mirrored in (False, True):
        padded = F.pad(image.flip(2) if mirrored else image, (most,) * 4)
        for y in range(2 * most + 1):
            for x in range(2 * most + 1):
                possible[padded[:, y : y + side, x : x + side].numpy().tobytes()] = (mirrored, y, x)
    found = {possible[view.numpy().tobytes()] for view in views}
    assert len(found) > 0.9 * len(possible)


def test_order_and_views_of_an_epoch_are_from_streams_of_their_own(tmp_path):
    split = datasets.ImageData("noise", (), colour_split(64, 0), None).with_statistics().train
    rows, _ = next(iter(rnn.Batches(split, small_config(tmp_path, batch_size=16), 3)))
    index = torch.randperm(64, generator=devices.epoch_generator(0, 3))[:16]
    images, stream = split.images[index] / 255, devices.epoch_generator(0, 3, stream=1)
    expected = split.normalize(rnn.augmented(images, "standard", stream))
    assert torch.equal(rows, rnn.rows_from_images(expected))


def test_original_augmentation_flips_both_ways_rotates_and_jitters(monkeypatch):
    asked = []

    def without_change(images, *strengths, generator=None):
        asked.append([value for value in strengths if isinstance(value, int | float)])
        return images

    image = torch.rand(3, 8, 8)
    images = image.repeat(64, 1, 1, 1)
    views = rnn.augmented(images, "original", torch.Generator().manual_seed(0))
    assert len(views.unique(dim=0)) == 64
    monkeypatch.setattr(augment, "random_rotation", without_change)
    monkeypatch.setattr(augment, "color_jitter", without_change)
    views = rnn.augmented(images, "original", torch.Generator().manual_seed(0))
    flips = torch.stack([image, image.flip(1), image.flip(2), image.flip(1, 2)])
    assert {int((flips == view).flatten(1).all(1).int().argmax()) for view in views} == set(
        range(4)
    )
    assert all((flips == view).flatten(1).all(1).any() for view in views)
    assert asked == [[90], [0.5, 0.5, 0.5, 0.5]]


def test_batches_are_shuffled_and_augmented_anew_in_each_epoch(tmp_path, monkeypatch):
    split = colour_split(64, 0)
    split = datasets.ImageData("noise", (), split, None).with_statistics().train
    split = dataclasses.replace(split, labels=torch.arange(64))  # which image it is
    config = small_config(tmp_path, augmentation="original", batch_size=16)

    def epoch(batches):
        rows, images = zip(*batches, strict=True)
        return torch.cat(rows), torch.cat(images)

    batches = rnn.Batches(split, config, 0)  # counts its epochs, for Lightning's `Trainer`
    (_, images), (later_rows, later_images) = epoch(batches), epoch(batches)
    assert sorted(images.tolist()) == sorted(later_images.tolist()) == list(range(64))
    assert not torch.equal(images, later_images)
    again_rows, again_images = epoch(rnn.Batches(split, config, 1))
    assert torch.equal(again_images, later_images)
    assert torch.equal(again_rows, later_rows)
    # Other draws in each epoch: of copies of one image the order does not matter.
    same = dataclasses.replace(split, images=split.images[:1].repeat(64, 1, 1, 1))
    batches = rnn.Batches(same, config, 0)
    (rows, _), (later_rows, _) = epoch(batches), epoch(batches)
    assert ((rows - later_rows).abs().amax((1, 2)) > 0.1).all()
    # Augmentation comes before the normalisation, which is that of images without augmentation.
    monkeypatch.setattr(rnn, "augmented", lambda images, kind, generator: images)
    expected = normalized_rows(split.images, split.images)[images].float()
    rounding = {"rtol": 0, "atol": 1e-3}  # of statistics in float32
    torch.testing.assert_close(epoch(rnn.Batches(split, config, 0))[0], expected, **rounding)
    config = dataclasses.replace(config, augmentation="none")
    torch.testing.assert_close(epoch(rnn.Batches(split, config, 0))[0], expected, **rounding)


def test_validation_images_are_not_augmented(tmp_path, monkeypatch):
    # The public version's validation transform overwrote the training transform.
    config = small_config(tmp_path, augmentation="original")
    data, validation = rnn.load_splits(config)
    model = rnn.make_model(config, "gru", data)
    monkeypatch.setattr(rnn, "augmented", None)
    first, second = (rnn.evaluate(model, validation) for _ in range(2))
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])


def test_splits_do_not_overlap_and_do_not_depend_on_the_run_s_seed(tmp_path):
    one, other = (rnn.load_splits(small_config(tmp_path, seed=seed)) for seed in (0, 7))
    assert torch.equal(one[1].images, other[1].images)
    assert torch.equal(one[0].train.images, other[0].train.images)
    whole = functions.load_images("digits").train
    assert len(one[1]) == pytest.approx(len(whole) / 10, abs=1)
    assert len(one[0].train) + len(one[1]) == len(whole)
    together = torch.cat([one[0].train.images, one[1].images]).flatten(1)
    assert sorted(together.tolist()) == sorted(whole.images.flatten(1).tolist())
    few, validation = rnn.load_splits(small_config(tmp_path, train_fraction=0.2))
    assert len(few.train) == pytest.approx(len(one[0].train) / 5, abs=1)
    assert torch.equal(validation.images, one[1].images)
    rest = {image.numpy().tobytes() for image in one[0].train.images}
    assert {image.numpy().tobytes() for image in few.train.images} < rest
    # All parts are normalised as the images that are left to train on.
    pixels = few.train.images.double() / 255
    for split in (few.train, validation, few.test):
        assert split.mean.item() == pytest.approx(pixels.mean().item(), rel=1e-5)
        assert split.std.item() == pytest.approx(pixels.std(correction=0).item(), rel=1e-5)


# -------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of two classes, dark and bright; all of the test images are darker."""
    folder = tmp_path_factory.mktemp("images") / "shop_$1"
    draw = np.random.default_rng(0)
    for split, count, levels in (("train", 40, (90, 160)), ("test", 10, (50, 120))):
        for name, level in zip(DOLLARS, levels, strict=True):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.normal((level, level, 200), 25, (8, 8, 3)).clip(0, 255)
                path = folder / split / name / f"{number}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, photographs):
    """A run of two cells on them: its configuration and what `main` returned."""
    folder = tmp_path_factory.mktemp("results")
    config = small_config(
        folder,
        dataset=str(photographs),
        data_dir=str(folder / "data"),
        image_size=8,
        cells="lstm,rnn",
        batch_size=16,
        learning_rate=0.02,
        augmentation="none",
    )
    return config, rnn.main(config)


def test_run_makes_every_artifact(finished):
    config, summary = finished
    folder = Path(config.output_dir) / "rnn" / "run"
    names = {"config.json", "metrics.csv", "checkpoint.pt", "summary.json", "comparison.png"}
    names.add("report.html")
    for cell in ("lstm", "rnn"):
        names |= {f"{cell}.png", f"{cell}.safetensors"}
        names |= {f"{cell}_confusion_matrix.png", f"{cell}_per_class_accuracy.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert summary == json.loads((folder / "summary.json").read_text())
    assert [(row["cell"], row["epoch"]) for row in metrics(folder)] == [
        (cell, str(epoch)) for cell in ("lstm", "rnn") for epoch in (1, 2, 3)
    ]


def test_the_test_accuracy_is_that_of_the_saved_weights(finished):
    config, summary = finished
    data, _ = rnn.load_splits(config)
    for cell in ("lstm", "rnn"):
        model = rnn.RowRNN(config, cell, 3 * 8, 2).double().eval()
        path = Path(config.output_dir) / "rnn" / "run" / f"{cell}.safetensors"
        model.load_state_dict(load_file(path))
        with torch.no_grad():
            right, own = (
                model(normalized_rows(data.test.images, known)).argmax(1) == data.test.labels
                for known in (data.train.images, data.test.images)
            )
        assert summary[f"{cell}_test_accuracy"] == pytest.approx(right.double().mean().item())
        assert not torch.equal(right, own)  # the test images' own statistics would be seen
        expected = {
            name: right[data.test.labels == label].double().mean().item()
            for label, name in enumerate(DOLLARS)
        }
        assert summary[f"{cell}_per_class_accuracy"] == pytest.approx(expected)


def test_the_last_epoch_is_reported_and_not_the_best(tmp_path, monkeypatch):
    config = small_config(tmp_path, train_fraction=0.1)
    losses, shares, sizes = [0.7, 0.5, 0.9, 0.6], [], []  # three validations and the test

    def with_mistakes(model, split):
        predictions, mistakes = split.labels.clone(), int(40 * losses[len(shares)])
        predictions[:mistakes] = (predictions[:mistakes] + 1) % 10
        sizes.append(len(split))
        shares.append(1 - mistakes / len(split))
        return losses[len(shares) - 1], predictions

    monkeypatch.setattr(rnn, "evaluate", with_mistakes)
    summary = rnn.main(config)
    assert sizes == [144, 144, 144, 360]
    rows = metrics(tmp_path / "rnn" / "run")
    assert [float(row["validation_accuracy"]) for row in rows] == pytest.approx(shares[:3])
    assert summary["gru_validation_accuracy"] == pytest.approx(shares[2])
    assert summary["gru_validation_loss"] == 0.9
    assert summary["gru_test_accuracy"] == pytest.approx(shares[3])
    assert summary["gru_final_loss"] == float(rows[-1]["train_loss"])


@pytest.mark.usefixtures("unrendered_pictures")
def test_it_learns(tmp_path):
    config = small_config(tmp_path, hidden_size=64, epochs=15, augmentation="none")
    assert rnn.main(config)["gru_test_accuracy"] > 0.85


@pytest.mark.usefixtures("unrendered_pictures")
@pytest.mark.parametrize(
    ("stop", "schedule", "optimizer"),
    # A cell has six validations and a test.
    [(4, "plateau", "adam"), (7, "plateau", "adam"), (7 + 4, "cosine", "muon")],
)
def test_a_resumed_run_repeats_an_uninterrupted_one(
    tmp_path, monkeypatch, stop, schedule, optimizer
):
    config = small_config(
        tmp_path,
        cells="rnn,gru",
        epochs=6,
        patience=1,
        schedule=schedule,
        optimizer=optimizer,
        train_fraction=0.3,
    )
    evaluate, seen = rnn.evaluate, []

    def stagnating(*args):  # so that the learning rate falls in the epochs 3 and 5
        return 1.0, evaluate(*args)[1]

    def stopping(*args):
        seen.append(1)
        if len(seen) == stop:
            raise KeyboardInterrupt
        return stagnating(*args)

    monkeypatch.setattr(rnn, "evaluate", stagnating)
    summary = rnn.main(config)
    folder = tmp_path / "rnn" / "stopped"
    monkeypatch.setattr(rnn, "evaluate", stopping)
    with pytest.raises(KeyboardInterrupt):
        rnn.main(dataclasses.replace(config, name="stopped"))
    monkeypatch.setattr(rnn, "evaluate", stagnating)
    resumed = rnn.main(dataclasses.replace(config, name="stopped", resume=str(folder)))
    assert weights_hash(folder) == weights_hash(tmp_path / "rnn" / "run")
    assert metrics(folder) == metrics(tmp_path / "rnn" / "run")
    times = {key for key in summary if key.endswith("seconds")}
    assert {k: v for k, v in resumed.items() if k not in times} == {
        k: v for k, v in summary.items() if k not in times
    }


def test_a_training_that_diverges_keeps_the_epoch_before(tmp_path, monkeypatch):
    evaluate, seen = rnn.evaluate, []

    def poison(model, split):
        result = evaluate(model, split)
        seen.append(1)
        if len(seen) == 2:
            model.mlp[-1].bias.data[0] = math.nan
        return result

    monkeypatch.setattr(rnn, "evaluate", poison)
    with pytest.raises(errors.Diverged, match="bias is not finite after epoch 2") as caught:
        rnn.main(small_config(tmp_path))
    assert "--learning-rate" in caught.value.__notes__[0]
    assert checkpoints.load(tmp_path / "rnn" / "run" / "checkpoint.pt")["epoch"] == 1


def test_best_json_sets_the_model(tmp_path):
    best = {"cell": "lstm", "hidden_size": 12, "num_layers": 2, "l2": 7, "l3": 6}
    best |= {"learning_rate": 0.01, "weight_decay": 0.001, "batch_size": 32, "validation_loss": 1.0}
    best["augmentation"] = "none"
    path = tmp_path / "best.json"
    path.write_text(json.dumps(best))

    def parse(*flags: str) -> rnn.Config:
        return settings.parse_config(rnn.Config, ["--config", str(path), *flags], "")

    config = parse("--dataset", "digits")
    values = {"cells" if name == "cell" else name: value for name, value in best.items()}
    del values["validation_loss"]
    assert config == rnn.Config(dataset="digits", config=str(path), **values)
    data, _ = rnn.load_splits(config)
    model = rnn.make_model(config, "lstm", data)
    assert isinstance(model.recurrent, torch.nn.LSTM)
    assert (model.recurrent.hidden_size, model.recurrent.num_layers) == (12, 2)
    layers = [layer.out_features for layer in model.mlp if hasattr(layer, "out_features")]
    assert layers == [7, 6, 10]
    # What only a wide search decides.
    wide = {"pooling": "mean", "bidirectional": True, "recurrent_init": "orthogonal"}
    wide["schedule"] = "cosine"
    path.write_text(json.dumps(best | wide))
    assert parse("--dataset", "digits") == dataclasses.replace(config, **wide)
    path.write_text(json.dumps(best))
    # A flag changes what the file says, also one that is given its default.
    assert parse("--hidden-size", "99").hidden_size == 99
    assert parse("--batch-size", str(rnn.Config.batch_size)).batch_size == rnn.Config.batch_size
    for change, words in (
        ({"l2": "7"}, "--l2 cannot be '7'"),
        ({"batch_size": True}, "--batch-size cannot be True"),
        ({"augmentation": "mild"}, "--augmentation cannot be 'mild'"),
        ({"hidden_size": 0}, "--hidden-size must be at least 1"),
        ({"cell": "elman"}, "--cells knows rnn,lstm,gru"),
    ):
        path.write_text(json.dumps(best | change))
        with pytest.raises(errors.UserError, match=rf"best\.json is damaged: {words}"):
            parse()
    path.write_text(json.dumps({k: v for k, v in best.items() if k != "l3"}))
    with pytest.raises(errors.UserError, match="lacks 'l3'"):
        parse()
    folder = tmp_path / "run"  # a run that has begun needs the file no more
    folder.mkdir()
    saved = {"script": "rnn", **dataclasses.asdict(config)}
    (folder / "config.json").write_text(json.dumps(saved))
    path.unlink()
    assert parse("--resume", str(folder)) == dataclasses.replace(config, resume=str(folder))
    with pytest.raises(errors.UserError, match=r"best\.json"):
        parse()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cells elman", "--cells knows rnn,lstm,gru"),
        ("--cells gru,gru", "twice"),
        ("--hidden-size 0", "--hidden-size must be at least 1"),
        ("--train-fraction 0", "--train-fraction"),
        ("--dataset digits --train-fraction 0.9999", "too few images"),
        ("--patience -1", "--patience"),
        ("--schedule cosine --patience 3", "--patience has no effect without --schedule plateau"),
        ("--optimizer muon", "--learning-rate 0.00022, which is Adam's: try 0.02"),
        ("--dropout 1", "--dropout"),
        ("--schedule linear", "--schedule"),
        ("--config nowhere.json", "cannot read nowhere.json"),
        ("--dataset digits --batch-size 2000", "larger than the training set"),
    ],
)
def test_user_mistakes(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.UserError, match=message):
        rnn.main(settings.parse_config(rnn.Config, flags.split(), "text"))
    assert list(tmp_path.iterdir()) == []


def test_a_class_of_one_image_is_too_small_to_split(tmp_path, user_error):
    for name, count in (("many", 20), ("one", 1)):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        for number in range(count):
            path = tmp_path / "images" / "train" / name / f"{number}.png"
            Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    with user_error("too few images"):
        rnn.main(small_config(tmp_path, dataset=str(tmp_path / "images"), image_size=8))
