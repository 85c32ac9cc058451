import copy
import csv
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from test_pretraining import (
    assert_resumes_exactly,
    compute_in_float64,
    make_data,
    metrics,
    noise,
    state_of,
    train,
)
from test_simclr_loss import loop_over_positives

import evaluation
import functions
import simclr
from support import (
    checkpoints,
    datasets,
    devices,
    encoders,
    pretraining,
    progress,
    runs,
    settings,
    supervised,
    verdict,
)

REPOSITORY = Path(simclr.__file__).resolve().parent
CIFAR10_IMAGES = REPOSITORY / "data" / "cifar10-images"
ARTIFACTS = (
    "config.json metrics.csv checkpoint.pt encoder.safetensors summary.json embeddings.npz "
    "predictions.npz embedding.html loss.png views.png report.html MODEL_CARD.md probe.png "
    "tsne.png confusion_matrix.png per_class_accuracy.png probe.csv probe.safetensors"
)


def small_config(**changes):
    values = {"encoder": "small", "epochs": 2, "batch_size": 8, "projection_hidden": 16}
    values |= {"projection_size": 6, "knn_every": 0, "device": "cpu", "precision": "float32"}
    values["checkpoint_seconds"] = 0.0  # after every epoch
    return simclr.Config(**{**values, **changes})


@pytest.fixture(scope="module")
def fabric():
    return devices.make_fabric("cpu", "float32")


def make_model(config, seed=0):
    torch.manual_seed(seed)
    return simclr.SimCLR(config, 3, 8)


def copy_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# ------------------------------------------------------------------------ model and optimizer


@pytest.mark.parametrize(
    ("encoder", "projection"),
    [("small", "nonlinear"), ("resnet18", "linear"), ("resnet34", "none"), ("resnet50", "linear")],
)
def test_model_shapes(encoder, projection):
    config = simclr.Config(
        encoder=encoder,
        stem="imagenet",
        width=16,
        projection=projection,
        projection_hidden=24,
        projection_size=12,
    )
    model = simclr.SimCLR(config, 3, 32)
    features = model.encoder.num_features
    assert model.encoder(torch.rand(2, 3, 32, 32)).shape == (2, features)
    z = model(torch.rand(2, 3, 32, 32))
    assert z.shape == (2, features if projection == "none" else 12)
    heads = {
        "none": 0,
        "linear": features * 12 + 12,
        "nonlinear": features * 24 + 24 + 24 * 12 + 12,
    }
    assert encoders.count_parameters(model.projection_head) == heads[projection]


def test_lars_leaves_biases_and_norms_without_decay_and_adaptation():
    pytest.importorskip("pytorch_optimizer")
    layer = torch.nn.Linear(3, 3)
    before = [p.detach().clone() for p in (layer.weight, layer.bias)]
    config = simclr.Config(optimizer="lars", learning_rate=0.5, batch_size=512, weight_decay=0.1)
    optimizer = simclr.make_optimizer(layer, config)
    layer.weight.grad, layer.bias.grad = torch.ones(3, 3), torch.ones(3)
    optimizer.step()
    # The rate is 0.5 * 512 / 256 = 1. For biases it is plain SGD.
    torch.testing.assert_close(layer.bias, before[1] - 1)
    # You et al. 2017: local rate 0.001 |w| / (|g| + decay |w|), on g + decay w
    norm = before[0].norm()
    local = 0.001 * norm / (3 + 0.1 * norm)
    torch.testing.assert_close(layer.weight, before[0] - local * (1 + 0.1 * before[0]))


# --------------------------------------------------------------------------------- training


class NaiveSGD:
    """Momentum 0.9 and weight decay, at a rate that is scaled by batch size / 256."""

    def __init__(self, weights, config):
        self.weights, self.decay = weights, config.weight_decay
        self.peak = config.learning_rate * config.batch_size / 256
        self.speed = [torch.zeros_like(w) for w in weights]

    def step(self, rate):
        for weight, speed in zip(self.weights, self.speed, strict=True):
            speed.mul_(0.9).add_(weight.grad + self.decay * weight.detach())
            weight.data -= rate * speed


class NaiveAdam:
    """Kingma & Ba 2015, algorithm 1, with L2 regularisation, at a rate that is not scaled."""

    def __init__(self, weights, config):
        self.weights, self.decay, self.peak = weights, config.weight_decay, config.learning_rate
        self.m, self.v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
        self.t = 0

    def step(self, rate):
        self.t += 1
        for weight, m, v in zip(self.weights, self.m, self.v, strict=True):
            gradient = weight.grad + self.decay * weight.detach()
            m.mul_(0.9).add_(0.1 * gradient)
            v.mul_(0.999).add_(0.001 * gradient**2)
            change = m / (1 - 0.9**self.t) / ((v / (1 - 0.999**self.t)).sqrt() + 1e-8)
            weight.data -= rate * change


def naive_embedding(model, projection, x):
    h = model.encoder(x)
    if projection == "none":
        return h
    if projection == "linear":
        return h @ model.projection_head.weight.T + model.projection_head.bias
    first, _, last = model.projection_head
    hidden = (h @ first.weight.T + first.bias).clamp(min=0)
    return hidden @ last.weight.T + last.bias


def pretrain(folder, config, data, fabric, seed=0, model=None):
    return train(simclr, folder, model or make_model(config, seed), config, data, fabric)


@pytest.mark.parametrize(
    ("optimizer", "projection", "schedule", "rate", "views", "loss"),
    [
        ("sgd", "nonlinear", "cosine", 3.0, 2, "nt-xent"),
        ("adam", "linear", "constant", 0.01, 3, "nt-xent"),
        ("sgd", "none", "constant", 3.0, 2, "dcl"),
    ],
)
def test_training_equals_algorithm_1(
    tmp_path, monkeypatch, fabric, optimizer, projection, schedule, rate, views, loss
):
    compute_in_float64(monkeypatch)
    config = small_config(
        optimizer=optimizer,
        projection=projection,
        schedule=schedule,
        views=views,
        loss=loss,
        learning_rate=rate,
        temperature=0.17,
        weight_decay=0.05,
        epochs=4,
        warmup_epochs=1,
        seed=7,
    )
    mean, std = torch.tensor([0.2, 0.5, 0.6]).double(), torch.tensor([0.3, 0.4, 0.2]).double()
    data = make_data()
    data = dataclasses.replace(data, train=dataclasses.replace(data.train, mean=mean, std=std))
    naive = make_model(config).double()
    history, model = pretrain(tmp_path, config, data, fabric, model=copy.deepcopy(naive))

    naive.train()
    weights = list(naive.parameters())
    update = (NaiveSGD if optimizer == "sgd" else NaiveAdam)(weights, config)
    losses = []
    for epoch in range(4):
        order = torch.randperm(28, generator=devices.epoch_generator(7, epoch))
        generator = devices.epoch_generator(7, epoch, stream=1)
        for step in range(3):
            images = data.train.images[order[8 * step : 8 * step + 8]]
            x = pretraining.crop_views(torch.cat([images] * views), config, generator)
            x = (x - mean[:, None, None]) / std[:, None, None]
            z = naive_embedding(naive, projection, x)
            value = loop_over_positives(z, 0.17, views, decoupled=loss == "dcl")
            naive.zero_grad()
            value.backward()
            done = (3 * epoch + step - 3) / 9  # of what follows the warm-up
            height = 1.0 if schedule == "constant" else (1 + math.cos(math.pi * done)) / 2
            update.step(update.peak * ((step + 1) / 3 if epoch == 0 else height))
            losses.append(value.item())
    means = np.reshape(losses, (4, 3)).mean(1).tolist()
    assert [row["loss"] for row in history] == pytest.approx(means, rel=1e-6)  # kept in float32
    assert history[0]["loss"] != pytest.approx(history[-1]["loss"], rel=0.01)
    seen = verdict.view_correlation(*x.chunk(views)[:2])
    assert history[-1]["view_correlation"] == pytest.approx(seen)
    torch.testing.assert_close(model.state_dict(), naive.state_dict(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["adam", "lars", "muon"])
def test_a_stopped_run_repeats_an_uninterrupted_one(tmp_path, monkeypatch, fabric, optimizer):
    if optimizer == "lars":
        pytest.importorskip("pytorch_optimizer")
    config = small_config(epochs=4, optimizer=optimizer, warmup_epochs=1)
    assert_resumes_exactly(pretrain, tmp_path, monkeypatch, config, fabric)


def test_compiled_training_equals_eager_and_each_continues_the_other(tmp_path, monkeypatch, fabric):
    compiler = torch.compile

    def traced(part, **options):
        # With the whole graph or an error; what is traced runs on PyTorch's own kernels.
        return compiler(part, **{**options, "backend": "aot_eager", "fullgraph": True})

    monkeypatch.setattr(torch, "compile", traced)
    data, states = make_data(), {}
    changes = {"jitter_probability": 0.5, "epochs": 2}
    for first, second in (("off", "off"), ("on", "on"), ("on", "off"), ("off", "on")):
        folder = tmp_path / f"{first}-{second}"
        config = small_config(**changes, compile=first)
        measure = functions.Monitor.measure

        def stop(monitor, encoder, z, epoch, last, measure=measure):
            if last:
                raise KeyboardInterrupt
            return measure(monitor, encoder, z, epoch, last)

        with monkeypatch.context() as patch:
            patch.setattr(functions.Monitor, "measure", stop)
            with pytest.raises(KeyboardInterrupt):
                pretrain(folder, config, data, fabric, model=make_model(config))
        config = dataclasses.replace(config, resume=str(folder), compile=second)
        _, model = pretrain(folder, config, data, fabric, model=make_model(config))
        states[folder.name] = copy_of(model)
    begun = copy_of(make_model(small_config()))["projection_head.0.weight"]
    moved = (states["off-off"]["projection_head.0.weight"] - begun).abs().max()
    assert moved > 1e-3
    for name, state in states.items():  # by rounding, over six steps of a low rate
        torch.testing.assert_close(state, states["off-off"], rtol=0, atol=5e-6, msg=name)


def test_knn_checks_do_not_change_the_training(tmp_path, fabric):
    data, results = make_data(), {}
    for every in (0, 1):
        config = small_config(knn_every=every)
        results[every], model = pretrain(tmp_path / str(every), config, data, fabric)
        results[every, "weights"] = copy_of(model)
    assert_same(results[0, "weights"], results[1, "weights"])
    assert [row.get("knn_held_out") for row in results[0]] == [None, None]
    assert all(0 <= row["knn_held_out"] <= 1 for row in results[1])


def test_views_have_the_size_of_their_epoch(tmp_path, monkeypatch, fabric):
    seen = []
    forward = simclr.SimCLR.forward

    def spy(model, images):
        seen.append(tuple(images.shape[2:]))
        return forward(model, images)

    monkeypatch.setattr(simclr.SimCLR, "forward", spy)
    config = small_config(encoder="resnet18", width=8, view_size="4,4,6", epochs=3, batch_size=14)
    pretrain(tmp_path, config, make_data(), fabric)
    assert seen == [(4, 4)] * 4 + [(6, 6)] * 2


# ----------------------------------------------------------------------------------- the map


@pytest.mark.parametrize("labels", [True, False])
def test_the_map_shows_the_encoders_output_of_the_right_images(
    tmp_path, monkeypatch, fabric, labels
):
    pytest.importorskip("plotly")  # for embedding.html
    data, config = make_data(20, labels), small_config()
    model, given = make_model(config), []

    def project(features, method, seed, *rest):
        given.append((features, method))
        return np.arange(2.0 * len(features)).reshape(-1, 2)

    monkeypatch.setattr(functions, "project_2d", project)
    evaluation.embed(model, data, config, tmp_path, fabric)
    split = data.test if labels else data.train
    pixels = data.train.images / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    with torch.no_grad():
        expected = model.eval().encoder(
            (split.images / 255 - mean[:, None, None]) / std[:, None, None]
        )
    saved = np.load(tmp_path / "embeddings.npz")
    tolerance = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(torch.from_numpy(saved["features"]), expected, **tolerance)
    assert torch.equal(given[0][0], torch.from_numpy(saved["features"]))
    assert given[0][1] == "tsne"
    assert saved["coordinates"].tolist() == [[2.0 * i, 2.0 * i + 1] for i in range(len(split))]
    assert saved["index"].tolist() == list(range(len(split)))
    assert ("labels" in saved) == labels
    assert not labels or saved["labels"].tolist() == split.labels.tolist()
    assert {path.name for path in tmp_path.iterdir()} == {
        "embeddings.npz",
        "tsne.png",
        "embedding.html",
    }


# ------------------------------------------------------------------------------- fine-tuning


def finetune(folder, fabric, config=None, data=None, model=None):
    config = config or small_config(finetune_epochs=4, flip_probability=0.3)
    folder.mkdir(exist_ok=True)
    model = model or make_model(config, 5)
    return evaluation.finetune(model, data or make_data(120), config, folder, fabric)


def test_finetuning_trains_a_copy_and_resumes_exactly(tmp_path, monkeypatch, fabric):
    model = make_model(small_config(), 5)
    before = copy_of(model)
    whole = finetune(tmp_path / "whole", fabric, model=model)
    assert_same(copy_of(model), before)  # for the stages that follow
    tuned = load_file(tmp_path / "whole" / "finetuned_encoder.safetensors")
    assert tuned.keys() == model.encoder.state_dict().keys()
    assert all(not torch.equal(v, before[f"encoder.{k}"]) for k, v in tuned.items())

    mean = progress.EpochLoss.mean

    def stop(losses):
        if losses.epoch == 3:
            raise KeyboardInterrupt
        return mean(losses)

    with monkeypatch.context() as patch:
        patch.setattr(progress.EpochLoss, "mean", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(tmp_path / "stopped", fabric)
    assert len(list(csv.DictReader((tmp_path / "stopped" / "finetune.csv").open()))) == 2
    other = small_config(finetune_epochs=2)
    with pytest.raises(ValueError, match="begun with --finetune-epochs 4"):
        finetune(tmp_path / "stopped", fabric, other)
    assert finetune(tmp_path / "stopped", fabric) == whole
    for name in ("finetune.csv", "finetuned_encoder.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()


def test_finetuning_crops_and_flips_and_leaves_colours_alone(tmp_path, monkeypatch, fabric):
    data, given, starts, classifiers = make_data(120), [], [], []
    train = supervised.train_classifier

    def spy(classifier, optimizer, inputs, labels, prepare, **rest):
        assert torch.equal(inputs, data.train.images)
        assert torch.equal(labels, data.train.labels)
        assert type(optimizer) is torch.optim.Adam
        assert [group["lr"] for group in optimizer.param_groups] == [1e-3]
        given.append(prepare)
        starts.append(copy.deepcopy(classifier[0].state_dict()))
        starts.append(model.encoder.state_dict())
        classifiers.append(classifier)
        yield from train(classifier, optimizer, inputs, labels, prepare, **{**rest, "epochs": 1})

    monkeypatch.setattr(supervised, "train_classifier", spy)
    loud = dict.fromkeys(("jitter_probability", "grayscale_probability", "blur_probability"), 1.0)
    config = small_config(finetune_epochs=1, **loud)
    model = make_model(config, 5)
    more = {"images": noise(200, seed=5), "labels": torch.arange(200) % 3}
    data = dataclasses.replace(data, test=dataclasses.replace(data.test, **more))
    result = finetune(tmp_path, fabric, config, data, model)
    assert_same(*starts)  # the pretrained weights
    images = noise(300, seed=8)
    views = given[0](images, torch.Generator().manual_seed(0))
    quiet = small_config(
        **{**dict.fromkeys(loud, 0.0), "flip_probability": 0.5, "crop_scale_min": 0.2}
    )
    expected = pretraining.crop_views(images, quiet, torch.Generator().manual_seed(0))
    pixels = data.train.images / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    expected = (expected - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(views, expected, rtol=1e-4, atol=1e-4)
    # What is reported is what was trained, with BatchNorm as it stands.
    test = (data.test.images / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        guesses = classifiers[0].eval()(test).argmax(1)
    matrix = functions.confusion_matrix(data.test.labels, guesses, 3)
    expected = functions.per_class_accuracy(matrix, data.classes)
    assert result["finetune_per_class_accuracy"] == pytest.approx(expected)


def test_finetuning_reports_its_last_epoch_not_its_best(tmp_path, monkeypatch, fabric):
    def train(classifier, optimizer, *others, **named):
        layer = classifier[1]
        for epoch, label in ((1, 0), (2, 1)):  # says 0 of all images, then 1
            torch.nn.init.zeros_(layer.weight)
            layer.bias.data = 9.0 * F.one_hot(torch.tensor(label), 3)
            yield {"epoch": epoch, "train_loss": 1.0, "train_accuracy": 0.5}

    monkeypatch.setattr(supervised, "train_classifier", train)
    data = make_data()
    test = dataclasses.replace(data.test, labels=torch.tensor([0] * 8 + [1] * 3 + [2]))
    config = small_config(finetune_epochs=2)
    result = finetune(tmp_path, fabric, config, dataclasses.replace(data, test=test))
    rows = list(csv.DictReader((tmp_path / "finetune.csv").open()))
    assert [float(row["test_accuracy"]) for row in rows] == [8 / 12, 3 / 12]
    assert result["finetune_accuracy"] == 3 / 12
    assert result["finetune_per_class_accuracy"] == {"a": 0.0, "b": 1.0, "c": 0.0}
    expected = [math.log(math.exp(9) + 2)] * 12
    expected = [value - 9 * (i < 8) for i, value in enumerate(expected)]
    assert float(rows[0]["test_loss"]) == pytest.approx(np.mean(expected), rel=1e-5)


def test_finetuning_that_diverges_keeps_the_epoch_before(tmp_path, monkeypatch, fabric):
    def train(classifier, optimizer, *others, **named):
        for epoch in (1, 2):
            classifier[1].bias.data[0] = math.nan if epoch == 2 else 0.0
            yield {"epoch": epoch, "train_loss": 1.0, "train_accuracy": 0.5}

    monkeypatch.setattr(supervised, "train_classifier", train)
    with pytest.raises(RuntimeError, match="bias is not finite after epoch 2"):
        finetune(tmp_path, fabric, small_config(finetune_epochs=2))
    assert checkpoints.load(tmp_path / "finetune_checkpoint.pt")["epoch"] == 1


# ------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from the command line, from a folder with spaces in its name."""
    home = tmp_path_factory.mktemp("a folder with spaces")
    command = [sys.executable, str(REPOSITORY / "simclr.py"), "--dataset", "digits"]
    command += ["--encoder", "small", "--epochs", "3", "--batch-size", "128"]
    command += ["--probe-epochs", "20", "--name", "e2e", "--device", "cpu"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads wait for each other where many work
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300, env=alone)
    assert done.returncode == 0, done.stderr
    folder = home / "results" / "simclr" / "e2e"
    names = sorted(path.name for path in folder.iterdir())
    summary = json.loads((folder / "summary.json").read_text())
    return SimpleNamespace(home=home, folder=folder, names=names, out=done.stdout, summary=summary)


def test_the_command_makes_every_artifact(finished):
    pytest.importorskip("plotly")  # for embedding.html
    assert finished.names == sorted(ARTIFACTS.split())
    assert [path.name for path in finished.home.iterdir()] == ["results"]
    summary = finished.summary
    # Three epochs on digits: far above chance, and not above what is possible.
    assert 0.7 < summary["linear_probe_accuracy"] <= 1
    assert 0.5 < summary["knn_accuracy"] <= 1
    assert list(summary["per_class_accuracy"]) == list("0123456789")
    for name, value in summary["per_class_accuracy"].items():
        assert f"Accuracy for class: {name} is {100 * value:.1f} %" in finished.out
    assert max(map(len, finished.out.splitlines()[:-1])) <= 80
    config = json.loads((finished.folder / "config.json").read_text())
    assert (config["epochs"], config["seed"]) == (3, 0)
    assert "--name e2e" in config["command"]
    rows = metrics(finished.folder)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert summary["final_loss"] == float(rows[-1]["loss"]) != float(rows[0]["loss"])
    for path in finished.folder.glob("*.png"):
        with Image.open(path) as image:
            assert image.width >= 800


def test_the_probe_reports_the_last_epoch_of_the_saved_encoder(finished):
    rows = list(csv.DictReader((finished.folder / "probe.csv").open()))
    assert len(rows) == 20
    assert finished.summary["linear_probe_accuracy"] == float(rows[-1]["test_accuracy"])
    test = functions.load_images("digits").test
    predicted = np.load(finished.folder / "predictions.npz")["predictions"]
    right = float((predicted == test.labels.numpy()).mean())
    assert finished.summary["linear_probe_accuracy"] == pytest.approx(right)

    saved = np.load(finished.folder / "embeddings.npz")
    encoder = encoders.make_encoder("small", "cifar", 1, 8).eval()
    encoder.load_state_dict(load_file(finished.folder / "encoder.safetensors"))
    pixels = functions.load_images("digits").train.images.numpy() / 255
    with torch.no_grad():
        x = torch.from_numpy((test.images.numpy() / 255 - pixels.mean()) / pixels.std())
        features = encoder(x.to(torch.float32))
    error = np.linalg.norm(features.numpy() - saved["features"]) / np.linalg.norm(features)
    assert error < 0.02  # in bfloat16, where the hardware likes that
    assert np.array_equal(saved["labels"], test.labels.numpy())


def test_stages_run_alone_and_leave_the_others_files_alone(finished, monkeypatch):
    mine = ("checkpoint.pt", "encoder.safetensors", "loss.png", "metrics.csv")
    before = {name: (finished.folder / name).read_bytes() for name in mine}
    config = settings.load_config(simclr.Config, finished.folder)
    again = dataclasses.replace(config, resume=str(finished.folder), stages="probe,embed")
    (finished.folder / "probe.png").unlink()
    second = simclr.main(again)
    keep = [
        {k: v for k, v in s.items() if not k.endswith("seconds")}
        for s in (finished.summary, second)
    ]
    assert keep[0] == keep[1]
    assert {name: (finished.folder / name).read_bytes() for name in mine} == before
    assert (finished.folder / "probe.png").exists()
    third = simclr.main(dataclasses.replace(again, stages="finetune", finetune_epochs=1))
    assert third["linear_probe_accuracy"] == finished.summary["linear_probe_accuracy"]
    assert {name: (finished.folder / name).read_bytes() for name in mine} == before
    made = {path.name for path in finished.folder.iterdir()} - set(finished.names)
    assert made == {
        "finetune.csv",
        "finetune.png",
        "finetune_confusion_matrix.png",
        "finetune_per_class_accuracy.png",
        "finetuned_encoder.safetensors",
    }
    assert third["finetune_accuracy"] > 0.2


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tmp_path, monkeypatch, capsys
):
    loss, calls = simclr.nt_xent_loss, []

    def poisoned(z, *others):
        calls.append(1)
        return loss(z, *others) * (math.nan if len(calls) == 3 + 2 else 1)  # 3 steps an epoch

    monkeypatch.setattr(simclr, "nt_xent_loss", poisoned)
    monkeypatch.setattr(functions, "load_images", lambda *_: make_data())
    monkeypatch.setattr(runs.signal, "signal", lambda *_: None)
    config = small_config(stages="pretrain", output_dir=str(tmp_path), name="run")
    with pytest.raises(SystemExit) as caught:
        runs.exit_cleanly(lambda: simclr.main(config))
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the loss is nan in epoch 2, step 2")
    state = state_of(tmp_path / "simclr" / "run")
    assert state["epoch"] == 1
    assert all(value.isfinite().all() for value in state["model"].values())


def image_folder(folder, names):
    draw = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (12, 12, 3), np.uint8)).save(folder / name)
    return folder


@pytest.mark.parametrize("labels", [True, False])
def test_a_small_folder_goes_through_every_stage(tmp_path, capsys, labels):
    names = [f"{split}/{c}/{i}.png" for split in ("train", "test") for c in "ab" for i in "12345"]
    pictures = image_folder(
        tmp_path / "pictures", names if labels else [f"{i}.png" for i in "1234567"]
    )
    config = small_config(
        dataset=str(pictures),
        data_dir=str(tmp_path),
        batch_size=4,
        image_size=16,
        epochs=1,
        probe_epochs=2,
        finetune_epochs=1,
        stages="pretrain,probe,embed,finetune",
        output_dir=str(tmp_path),
        name="run",
    )
    summary = simclr.main(config)
    saved = np.load(tmp_path / "simclr" / "run" / "embeddings.npz")
    if labels:
        assert set(summary["per_class_accuracy"]) == {"a", "b"}
        assert saved["paths"].tolist() == [f"test/{c}/{i}.png" for c in "ab" for i in "12345"]
    else:
        printed = capsys.readouterr().out
        assert "probe is skipped: it needs labels" in printed
        assert "finetune is skipped: it needs labels" in printed
        assert saved["paths"].tolist() == [f"{i}.png" for i in "1234567"]
        assert "labels" not in saved


def test_real_images(tmp_path, monkeypatch):
    if not CIFAR10_IMAGES.is_dir():
        pytest.skip(f"{CIFAR10_IMAGES} is not here")
    whole = functions.load_images(str(CIFAR10_IMAGES), REPOSITORY / "data")
    few = datasets.hold_out(whole.train, 0.02)[1], datasets.hold_out(whole.test, 0.05)[1]
    part = dataclasses.replace(whole, train=few[0], test=few[1])
    monkeypatch.setattr(functions, "load_images", lambda *_: part)
    values = {"encoder": "small", "epochs": 4, "batch_size": 128, "probe_epochs": 20}
    values |= {"stages": "pretrain,probe", "few_labels": 0, "knn_every": 0}
    summary = simclr.main(simclr.Config(output_dir=str(tmp_path), device="cpu", **values))
    # Chance is 0.1; a linear layer on the raw pixels of twice as many images reaches 0.27.
    assert summary["linear_probe_accuracy"] > 0.3
    assert list(summary["per_class_accuracy"]) == list(whole.classes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--dataset nowhere", "unknown data set or missing folder 'nowhere'"),
        ("--dataset digits --batch-size 5000", "larger than the data set"),
        ("--dataset digits --image-size 16", "--image-size has no effect without a folder"),
        ("--projection linear --projection-hidden 9", "no effect without --projection nonlinear"),
        ("--temperature 0", "--temperature must be"),
        ("--temperature nan", "--temperature must be"),
        ("--temperature 1e-40", "--temperature must be"),
        ("--projection-size 0", "--projection-size must be at least 1"),
        ("--finetune-epochs 0", "--finetune-epochs must be at least 1"),
        ("--stages pretrain,bake", "--stages knows pretrain,probe,embed,finetune"),
    ],
)
def test_user_mistakes_are_one_line_and_leave_nothing_behind(
    tmp_path, monkeypatch, user_error, line, message
):
    monkeypatch.chdir(tmp_path)
    with user_error(message):
        simclr.main(settings.parse_config(simclr.Config, line.split(), "text"))
    assert list(tmp_path.iterdir()) == []


def test_a_cuda_device_that_is_not_there(tmp_path, user_error):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with user_error("--device cuda"):
        simclr.main(simclr.Config(dataset="digits", device="cuda", output_dir=str(tmp_path)))
