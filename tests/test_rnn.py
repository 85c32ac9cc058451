import csv
import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import InterpolationMode, rotate

import functions
import rnn

TIMES = {"seconds"}


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
    }
    return rnn.Config(**{**settings, **changes})


def metrics(folder: Path) -> list[dict[str, str]]:
    rows = csv.DictReader((folder / "metrics.csv").open())
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def weights_hash(folder: Path) -> str:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest()


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (3, 1, 8, 8), (1, 2, 3, 5)])
def test_rows_are_red_then_green_then_blue(shape):
    images = torch.arange(torch.tensor(shape).prod()).view(shape)
    rows = rnn.rows_from_images(images)
    count, channels, height, width = shape
    assert rows.shape == (count, height, channels * width)
    for i in range(count):
        for r in range(height):
            expected = [images[i, c, r, x].item() for c in range(channels) for x in range(width)]
            assert rows[i, r].tolist() == expected


@pytest.mark.parametrize(("cell", "gates"), [("rnn", 1), ("gru", 3), ("lstm", 4)])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_parameters_and_shape(cell, gates, num_layers):
    model = rnn.RowRNN(cell, hidden_size=8, num_layers=num_layers, l2=5, l3=4)
    recurrent = gates * (8 * 96 + 8 * 8 + 16) + (num_layers - 1) * gates * (2 * 8 * 8 + 16)
    mlp = (8 * 5 + 5) + 2 * 5 + (5 * 4 + 4) + 2 * 4 + (4 * 10 + 10)
    assert functions.count_parameters(model) == recurrent + mlp
    assert model(torch.rand(3, 32, 96)).shape == (3, 10)


def test_the_mlp_reads_the_output_after_the_last_row():
    model = rnn.RowRNN("rnn", 4, 6).eval()
    rows = torch.rand(2, 5, 4)
    state = torch.zeros(2, 6)
    weights = model.recurrent
    for r in range(5):  # Elman's recurrence, by hand
        state = torch.tanh(
            rows[:, r] @ weights.weight_ih_l0.T
            + weights.bias_ih_l0
            + state @ weights.weight_hh_l0.T
            + weights.bias_hh_l0
        )
    assert torch.allclose(model(rows), model.mlp(state), atol=1e-6)


def test_unknown_cell():
    with pytest.raises(functions.UserError, match="unknown cell 'elman'"):
        rnn.RowRNN("elman")


@pytest.mark.parametrize("angle", [-90.0, -31.0, 0.0, 45.0, 90.0])
def test_rotation_equals_torchvisions(monkeypatch, angle):
    draw = torch.tensor([(angle / 90 + 1) / 2])
    monkeypatch.setattr(torch, "rand", lambda *size, **options: draw)
    image = torch.linspace(0.1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    ours = rnn.random_rotation(image, 90, torch.Generator())
    theirs = [
        rotate(image, sign * angle, InterpolationMode.NEAREST, expand=False) for sign in (1, -1)
    ]
    # Nearest pixels at exact halves may fall either way; the direction is a convention.
    assert max(((ours - their).abs() < 1e-6).float().mean() for their in theirs) > 0.98


def test_shift_moves_each_image_by_whole_pixels():
    images = torch.rand(64, 1, 8, 8) + 1
    shifted = rnn.random_shift(images, 2, torch.Generator().manual_seed(0))
    found = set()
    for before, after in zip(images, shifted, strict=True):
        padded = torch.nn.functional.pad(before, (2, 2, 2, 2))
        places = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.equal(padded[:, y : y + 8, x : x + 8], after)
        ]
        assert len(places) == 1
        found |= set(places)
    assert len(found) > 15  # of 25


@pytest.mark.parametrize("kind", ["original", "standard"])
def test_augmentation_is_per_sample(kind):
    images = torch.rand(1, 3, 32, 32).repeat(64, 1, 1, 1)
    views = rnn.augment(images, kind, torch.Generator().manual_seed(0))
    assert len(views.unique(dim=0)) > 30  # standard has 2 x 25 views


def batches(config: rnn.Config, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data, _ = rnn.load_splits(config)
    mean, std = functions.channel_statistics(data.train.images)
    return list(rnn.Batches(data.train, mean, std, config, epoch))


def test_batches_without_augmentation_are_the_normalised_images(tmp_path):
    config = small_config(tmp_path, augmentation="none")
    data, _ = rnn.load_splits(config)
    train = data.train.images.float() / 255
    expected = rnn.rows_from_images((train - train.mean()) / train.std(correction=0))
    seen = torch.cat([rows for rows, _ in batches(config, 0)])
    assert len(seen) == len(train) // 64 * 64
    exact = "donot_use_mm_for_euclid_dist"
    places = torch.cdist(seen.flatten(1), expected.flatten(1), compute_mode=exact).min(1)
    assert places.values.max() < 1e-3
    assert len(places.indices.unique()) > 0.99 * len(seen)  # each image once (digits has twins)
    labels = torch.cat([labels for _, labels in batches(config, 0)])
    assert torch.equal(labels, data.train.labels[places.indices])


def test_training_images_are_augmented_and_validation_images_are_not(tmp_path, monkeypatch):
    # The public version's validation transform overwrote the training transform.
    config = small_config(tmp_path, augmentation="original")
    first, again, other = (torch.cat([r for r, _ in batches(config, e)]) for e in (0, 0, 1))
    plain = torch.cat([r for r, _ in batches(small_config(tmp_path, augmentation="none"), 0)])
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first - plain).abs().mean() > 0.1
    data, validation = rnn.load_splits(config)
    mean, std = functions.channel_statistics(data.train.images)
    model = rnn.make_model(config, "gru", data)
    used = []
    monkeypatch.setattr(rnn, "augment", lambda *args: used.append(1))
    assert torch.equal(
        rnn.evaluate(model, validation, mean, std)[1],
        rnn.evaluate(model, validation, mean, std)[1],
    )
    assert not used


def test_splits_do_not_overlap_and_do_not_depend_on_the_run_s_seed(tmp_path):
    one, other = (rnn.load_splits(small_config(tmp_path, seed=seed)) for seed in (0, 7))
    assert torch.equal(one[1].images, other[1].images)
    assert torch.equal(one[0].train.images, other[0].train.images)
    whole = functions.load_images("digits").train
    assert len(one[0].train) + len(one[1]) == len(whole)
    together = torch.cat([one[0].train.images, one[1].images]).flatten(1)
    assert torch.equal(
        together.double().pow(2).sum(1).sort().values,
        whole.images.flatten(1).double().pow(2).sum(1).sort().values,
    )
    few = rnn.load_splits(small_config(tmp_path, train_fraction=0.5))[0].train
    assert len(few) == pytest.approx(len(one[0].train) / 2, abs=1)


@pytest.mark.parametrize("cells", ["gru", "rnn,lstm"])
def test_run_makes_every_artifact(tmp_path, capsys, cells):
    summary = rnn.main(small_config(tmp_path, cells=cells))
    folder = tmp_path / "rnn" / "run"
    names = {"config.json", "metrics.csv", "checkpoint.pt", "summary.json"}
    names |= {"comparison.png"} if "," in cells else set()
    for cell in cells.split(","):
        names |= {f"{cell}.png", f"{cell}.safetensors"}
        names |= {f"{cell}_confusion_matrix.png", f"{cell}_per_class_accuracy.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert summary == json.loads((folder / "summary.json").read_text())
    rows = metrics(folder)
    assert [(row["cell"], row["epoch"]) for row in rows] == [
        (cell, str(epoch)) for cell in cells.split(",") for epoch in (1, 2, 3)
    ]
    for cell in cells.split(","):
        last = [row for row in rows if row["cell"] == cell][-1]
        assert summary[f"{cell}_validation_accuracy"] == float(last["validation_accuracy"])
    said, files = capsys.readouterr().out.split(f"Everything is in {folder}:\n")
    assert set(files.split()) == names
    assert max(map(len, (said + files).splitlines())) <= 80


def test_it_learns(tmp_path):
    config = small_config(tmp_path, hidden_size=64, epochs=15, augmentation="none")
    assert rnn.main(config)["gru_test_accuracy"] > 0.85


@pytest.mark.parametrize("schedule", ["plateau", "cosine"])
@pytest.mark.parametrize(("cell", "epoch"), [("rnn", 4), ("gru", 4)])
def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path, monkeypatch, cell, epoch, schedule):
    config = small_config(tmp_path, cells="rnn,gru", epochs=6, patience=1, schedule=schedule)
    evaluate, seen = rnn.evaluate, []

    def stagnating(*args):  # so that the learning rate falls in the epochs 3 and 5
        return 1.0, evaluate(*args)[1]

    monkeypatch.setattr(rnn, "evaluate", stagnating)
    summary = rnn.main(config)
    rates = [float(row["learning_rate"]) for row in metrics(tmp_path / "rnn" / "run")[:6]]
    if schedule == "plateau":
        assert rates == pytest.approx([5e-3] * 3 + [5e-4] * 2 + [5e-5])
    else:  # Loshchilov & Hutter 2017, equation 5
        cosine = [5e-3 * (1 + math.cos(math.pi * epoch / 6)) / 2 for epoch in range(6)]
        assert rates == pytest.approx(cosine)
    folder = tmp_path / "rnn" / "stopped"

    def stopping(*args):
        seen.append(1)
        # A cell has six validations and a test; the validation of `epoch` is cut off.
        if len(seen) == (epoch if cell == "rnn" else 7 + epoch):
            raise KeyboardInterrupt
        return stagnating(*args)

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


def test_best_json_sets_the_model(tmp_path):
    best = {"cell": "lstm", "hidden_size": 12, "num_layers": 2, "l2": 7, "l3": 6}
    best |= {"learning_rate": 0.01, "weight_decay": 0.001, "batch_size": 32, "validation_loss": 1.0}
    best["augmentation"] = "none"
    path = tmp_path / "best.json"
    path.write_text(json.dumps(best))

    def parse(*flags: str) -> rnn.Config:
        return functions.parse_config(rnn.Config, ["--config", str(path), *flags], "")

    config = parse("--dataset", "digits")
    assert (config.cells, config.batch_size, config.learning_rate) == ("lstm", 32, 0.01)
    assert config.augmentation == "none"
    data, _ = rnn.load_splits(config)
    model = rnn.make_model(config, "lstm", data)
    assert isinstance(model.recurrent, torch.nn.LSTM)
    assert (model.recurrent.hidden_size, model.recurrent.num_layers) == (12, 2)
    assert [layer.out_features for layer in model.mlp if hasattr(layer, "out_features")] == [
        7,
        6,
        10,
    ]
    # A flag changes what the file says, also one that is given its default.
    assert parse("--hidden-size", "99").hidden_size == 99
    assert parse("--batch-size", str(rnn.Config.batch_size)).batch_size == rnn.Config.batch_size
    for change, words in (
        ({"l2": "7"}, "'l2' cannot be '7'"),
        ({"batch_size": True}, "'batch_size' cannot be 'True'"),
        ({"augmentation": "mild"}, "'augmentation' cannot be 'mild'"),
        ({"hidden_size": 0}, "--hidden-size must be at least 1"),
    ):
        path.write_text(json.dumps(best | change))
        with pytest.raises(functions.UserError, match=words):
            parse()
    path.write_text(json.dumps({k: v for k, v in best.items() if k != "l3"}))
    with pytest.raises(functions.UserError, match="lacks 'l3'"):
        parse()
    folder = tmp_path / "run"  # a run that has begun needs the file no more
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    path.unlink()
    assert parse("--resume", str(folder)) == dataclasses.replace(config, resume=str(folder))
    with pytest.raises(functions.UserError, match=r"best\.json"):
        parse()


@pytest.mark.parametrize("cell", rnn.CELLS)
def test_orthogonal_recurrent_weights_keep_lengths(cell):
    torch.manual_seed(0)
    model = rnn.RowRNN(cell, 12, 8, 2, recurrent_init="orthogonal")
    uniform = rnn.RowRNN(cell, 12, 8, 2)
    for layer in (0, 1):
        for gate in getattr(model.recurrent, f"weight_hh_l{layer}").split(8):
            torch.testing.assert_close(gate @ gate.T, torch.eye(8))
        plain = getattr(uniform.recurrent, f"weight_hh_l{layer}")
        assert plain.abs().max() <= 8**-0.5
        assert not torch.allclose(plain[:8] @ plain[:8].T, torch.eye(8), atol=0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cells elman", "--cells knows rnn,lstm,gru"),
        ("--cells gru,gru", "twice"),
        ("--hidden-size 0", "--hidden-size must be at least 1"),
        ("--train-fraction 0", "--train-fraction"),
        ("--patience -1", "--patience"),
        ("--dropout 1", "--dropout"),
        ("--schedule linear", "--schedule"),
        ("--config nowhere.json", "cannot read nowhere.json"),
        ("--dataset digits --batch-size 2000", "larger than the training set"),
    ],
)
def test_user_mistakes(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(functions.UserError, match=message):
        rnn.main(functions.parse_config(rnn.Config, flags.split(), "text"))
    assert list(tmp_path.iterdir()) == []
