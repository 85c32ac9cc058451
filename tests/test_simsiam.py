import copy
import csv
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightly.loss import NegativeCosineSimilarity
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
from test_randaugment import naive_chains
from torch import nn

import functions
import simsiam
from support import devices, pretraining, randaugment, settings, verdict

ARTIFACTS = (
    "config.json metrics.csv checkpoint.pt encoder.safetensors summary.json loss.png views.png "
    "report.html MODEL_CARD.md probe.csv probe.png per_class_accuracy.png confusion_matrix.png "
    "embeddings.npz umap_z.png umap_z.csv predictions.npz embedding.html umap_p.png umap_p.csv "
    "checkpoints probe.safetensors"
)


def small_config(**changes):
    values = {"epochs": 2, "batch_size": 8, "knn_every": 0, "device": "cpu"}
    values["checkpoint_seconds"] = 0.0  # after every epoch
    return simsiam.Config(**{**values, "keep_every": 0, "precision": "float32", **changes})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def fabric():
    return devices.make_fabric("cpu", "float32")


def make_model(config, seed=0, channels=3, size=8):
    torch.manual_seed(seed)
    return simsiam.SimSiam(config, channels, size)


def pretrain(folder, config, data, fabric, seed=0, model=None):
    return train(simsiam, folder, model or make_model(config, seed), config, data, fabric)


# ------------------------------------------------------------------------------------- loss


def papers_loss(p, z):
    """Equation 1 of Chen & He 2021, row by row in float64; a plain formula, no stop-gradient."""
    rows = [
        -(a / a.square().sum().sqrt() * (b / b.square().sum().sqrt())).sum()
        for a, b in zip(p.double(), z.double(), strict=True)
    ]
    return torch.stack(rows).mean()


@pytest.mark.parametrize(("count", "size"), [(1, 3), (33, 64)])
def test_loss_and_gradient_equal_the_papers_and_lightlys(monkeypatch, count, size):
    compute_in_float64(monkeypatch)
    p, z = torch.randn(2, count, size, generator=seeded(count)).double()
    p.requires_grad_()
    z.requires_grad_()
    value = simsiam.negative_cosine_similarity(p, z)
    value.backward()
    assert z.grad is None  # the stop-gradient of equation 3
    constant = z.detach()
    for reference in (papers_loss, NegativeCosineSimilarity()):
        expected = reference(p, constant)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
        gradient = torch.autograd.grad(expected, p)[0]
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_is_float32_under_autocast(dtype):
    p, z = torch.randn(2, 64, 512, generator=seeded()).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value = simsiam.negative_cosine_similarity(p, z)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(papers_loss(p, z).item(), abs=1e-6)


# ----------------------------------------------------------------------------------- models


def test_the_small_model_is_the_original_one():
    model = make_model(small_config(), channels=1, size=28)
    widths = [1, 32, 64, 128]
    assert [type(layer) for layer in model.encoder] == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d] * 3
    for i, convolution in enumerate(list(model.encoder)[::3]):
        assert (convolution.in_channels, convolution.out_channels) == tuple(widths[i : i + 2])
        assert convolution.kernel_size == (3, 3)
        assert convolution.stride == (2, 2)
        assert convolution.padding == (1, 1)
    first, *middle, last = model.predictor
    assert [type(layer) for layer in middle] == [nn.BatchNorm1d, nn.ReLU]
    assert [first.weight.shape, last.weight.shape] == [(64, 2048), (2048, 64)]
    assert first.bias is not None
    images = torch.randn(4, 1, 28, 28, generator=seeded())
    z, p = model(images)
    assert z.shape == p.shape == (4, 2048)
    model.eval()
    assert torch.equal(model(images)[0], model.encoder(images))  # no projector
    assert torch.equal(model(images)[1], model.predictor(model.encoder(images)))


@pytest.mark.parametrize(
    ("count", "encoder", "features"),
    [(2, "resnet18", 512), (3, "small", 128), (2, "resnet50", 2048)],
)
def test_the_papers_head(count, encoder, features):
    # Section 3; the last BatchNorm and the predictor's first layer as in the reference code.
    model = make_model(small_config(head="paper", projector_layers=count, encoder=encoder))
    kinds = [type(layer) for layer in model.projector]
    assert kinds == ([nn.Linear, nn.BatchNorm1d, nn.ReLU] * count)[:-1]
    linears, norms = model.projector[::3], model.projector[1::3]
    sizes = [(layer.in_features, layer.out_features) for layer in linears]
    assert sizes == [(features, 2048)] + [(2048, 2048)] * (count - 1)
    assert [layer.bias is None for layer in linears] == [True] * count
    assert [layer.affine for layer in norms] == [True] * (count - 1) + [False]
    first, norm, relu, last = model.predictor
    assert [type(norm), type(relu)] == [nn.BatchNorm1d, nn.ReLU]
    assert [first.weight.shape, last.weight.shape] == [(512, 2048), (2048, 512)]
    assert first.bias is None
    assert last.bias is not None
    last_norm = "bn3.weight" if encoder == "resnet50" else "bn2.weight"
    ends = [w for name, w in model.encoder.named_parameters() if name.endswith(last_norm)]
    assert len(ends) == {"resnet18": 8, "small": 0, "resnet50": 16}[encoder]
    assert not any(weights.any() for weights in ends)  # each block begins as the identity
    z, p = model.train()(torch.randn(8, 3, 8, 8, generator=seeded()))
    assert p.shape == (8, 2048)
    torch.testing.assert_close(z.mean(0), torch.zeros(2048), atol=1e-5, rtol=0)  # no ReLU after it


# ------------------------------------------------------------------------------------ views


def two_views(images, config, generator, size=None):
    """What `simsiam.make_views` makes of a single batch."""
    ((step, same, views),) = simsiam.make_views(iter([(7, images, generator)]), config, size)
    assert step == 7
    assert same is images
    return views


def test_crop_views_are_the_shared_ones():
    images = noise(6, 16)
    config = simsiam.Config(augmentation="crop", blur_probability=0.5)
    expected = pretraining.crop_views(images.repeat(2, 1, 1, 1), config, seeded(1))
    assert torch.equal(two_views(images, config, seeded(1)), expected)
    assert two_views(images, config, seeded(1), 8).shape == (12, 3, 8, 8)


@pytest.mark.parametrize(("num_ops", "magnitude"), [(5, 9), (2, 24)])
def test_randaugment_views_are_torchvisions(num_ops, magnitude):
    images = noise(40, 12)[:, :1]
    config = simsiam.Config(num_ops=num_ops, magnitude=magnitude)
    draws = randaugment.draw_randaugment(80, num_ops, seeded(1))
    expected = naive_chains(images.repeat(2, 1, 1, 1), *draws, magnitude) / 255
    assert torch.equal(two_views(images, config, seeded(1)), expected)


def test_randaugment_of_several_batches_at_a_time_is_that_of_each():
    config, generator = simsiam.Config(), seeded(1)
    batches = [(step, noise(5, 8)[:, :1], generator) for step in range(11)]
    together = list(simsiam.make_views(iter(batches), config, None))
    assert [step for step, _, _ in together] == list(range(11))
    again = seeded(1)
    for (_, images, _), (_, same, views) in zip(batches, together, strict=True):
        assert same is images
        assert torch.equal(views, two_views(images, config, again))


# --------------------------------------------------------------------------------- training


def test_compiled_training_equals_eager(tmp_path, monkeypatch, fabric):
    compiler = torch.compile

    def traced(part, **options):  # the whole graph, or an error
        return compiler(part, **{**options, "backend": "aot_eager", "fullgraph": True})

    monkeypatch.setattr(torch, "compile", traced)
    states = {}
    for choice in ("off", "on"):
        config = small_config(compile=choice)
        _, model = pretrain(tmp_path / choice, config, make_data(), fabric)
        states[choice] = model.state_dict()
    torch.testing.assert_close(states["on"], states["off"], rtol=0, atol=5e-6)


def narrow_papers_head(model):
    """2048 units in float64 take their time, and `test_the_papers_head` looks at those."""
    layers = [nn.Linear(128, 20, bias=False), nn.BatchNorm1d(20), nn.ReLU()]
    layers += [nn.Linear(20, 20, bias=False), nn.BatchNorm1d(20, affine=False)]
    model.projector = nn.Sequential(*layers)
    layers = [nn.Linear(20, 10, bias=False), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 20)]
    model.predictor = nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("head", "schedule", "augmentation"),
    [("original", "cosine", "randaugment"), ("paper", "constant", "crop")],
)
def test_training_equals_algorithm_1(tmp_path, monkeypatch, fabric, head, schedule, augmentation):
    compute_in_float64(monkeypatch)
    config = small_config(
        head=head,
        schedule=schedule,
        augmentation=augmentation,
        epochs=3,
        warmup_epochs=1,
        learning_rate=0.7,
        weight_decay=1e-2,
        seed=7,
    )
    mean, std = torch.tensor([0.2, 0.5, 0.6]).double(), torch.tensor([0.3, 0.4, 0.2]).double()
    data = make_data()
    data = dataclasses.replace(data, train=dataclasses.replace(data.train, mean=mean, std=std))
    naive = make_model(config)
    if head == "paper":
        narrow_papers_head(naive)
    naive = naive.double()
    history, model = pretrain(tmp_path, config, data, fabric, model=copy.deepcopy(naive))

    naive.train()
    names, weights = zip(*naive.named_parameters(), strict=True)
    speeds = [torch.zeros_like(weight) for weight in weights]
    peak, losses = 0.7 * 8 / 256, []
    for epoch in range(3):
        order = torch.randperm(28, generator=devices.epoch_generator(7, epoch))
        stream = 4 if augmentation == "randaugment" else 1
        generator = devices.epoch_generator(7, epoch, stream=stream)
        for step in range(3):
            images = data.train.images[order[8 * step : 8 * step + 8]]
            views = two_views(images, config, generator)
            x1, x2 = ((views - mean[:, None, None]) / std[:, None, None]).chunk(2)
            if head == "paper":
                z1, z2 = (naive.projector(naive.encoder(x)) for x in (x1, x2))
                p1, p2 = naive.predictor(z1), naive.predictor(z2)
            else:  # both views share BatchNorm's statistics
                z = naive.encoder(torch.cat([x1, x2]))
                (z1, z2), (p1, p2) = z.chunk(2), naive.predictor(z).chunk(2)
            loss = papers_loss(p1, z2.detach()) / 2 + papers_loss(p2, z1.detach()) / 2
            naive.zero_grad()
            loss.backward()
            done = (3 * epoch + step - 3) / 6  # of what follows the warm-up
            height = 1.0 if schedule == "constant" else (1 + math.cos(math.pi * done)) / 2
            rate = peak * ((step + 1) / 3 if epoch == 0 else height)
            for name, weight, speed in zip(names, weights, speeds, strict=True):
                speed.mul_(0.9).add_(weight.grad + 1e-2 * weight.detach())
                # Appendix A: the predictor's rate does not follow the schedule.
                weight.data -= (peak if name.startswith("predictor") else rate) * speed
            losses.append(loss.item())
    means = np.reshape(losses, (3, 3)).mean(1).tolist()
    assert [row["loss"] for row in history] == pytest.approx(means, rel=1e-5)  # kept in float32
    assert history[-1]["learning_rate"] == pytest.approx(rate)
    spread = functions.embedding_std(torch.cat([z1, z2]).detach())  # of z, not of p
    assert history[-1]["embedding_std"] == pytest.approx(spread, rel=1e-6)
    seen = verdict.view_correlation(x1, x2)
    assert history[-1]["view_correlation"] == pytest.approx(seen)
    torch.testing.assert_close(model.state_dict(), naive.state_dict(), rtol=1e-8, atol=1e-8)


def test_views_have_the_size_of_their_epoch(tmp_path, monkeypatch, fabric):
    seen = []
    forward = simsiam.SimSiam.forward

    def spy(model, *views):
        seen.append([tuple(part.shape) for part in views])
        return forward(model, *views)

    monkeypatch.setattr(simsiam.SimSiam, "forward", spy)
    sizes = {"encoder": "resnet18", "width": 8, "view_size": "4,6", "augmentation": "crop"}
    pretrain(tmp_path, small_config(**sizes, batch_size=14), make_data(), fabric)
    assert seen == [[(28, 3, 4, 4)]] * 2 + [[(28, 3, 6, 6)]] * 2


def test_a_stopped_run_repeats_an_uninterrupted_one(tmp_path, monkeypatch, fabric):
    config = small_config(epochs=4, learning_rate=0.4)
    assert_resumes_exactly(pretrain, tmp_path, monkeypatch, config, fabric)


@pytest.mark.parametrize(("loss", "warnings"), [(-0.995, 1), (-0.985, 0)])
def test_a_loss_near_minus_one_at_once_is_a_collapse(
    tmp_path, capsys, monkeypatch, fabric, loss, warnings
):
    monkeypatch.setattr(simsiam, "negative_cosine_similarity", lambda p, z: p.mean() * 0 + loss)
    pretrain(tmp_path, small_config(epochs=1), make_data(), fabric)
    assert capsys.readouterr().out.count("the embedding collapses") == warnings


# ------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with all stages, whose maps of z and p are given."""
    torch.set_num_threads(1)
    folder, maps = tmp_path_factory.mktemp("finished"), []

    def project(features, method, seed, neighbours):
        maps.append((features, method, seed, neighbours))
        corner = torch.arange(2.0 * len(features)).reshape(-1, 2) + len(maps)
        return corner.numpy()

    config = simsiam.Config(
        dataset="digits",
        epochs=4,
        batch_size=64,
        probe_epochs=20,
        keep_every=2,
        seed=3,
        device="cpu",
        output_dir=str(folder),
        name="run",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "project_2d", project)
        summary = simsiam.main(config)
    return SimpleNamespace(folder=folder / "simsiam" / "run", summary=summary, maps=maps)


def test_a_run_makes_every_artifact_and_learns(finished):
    folder, summary = finished.folder, finished.summary
    assert sorted(path.name for path in folder.iterdir()) == sorted(ARTIFACTS.split())
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"epoch2.pt", "epoch4.pt"}
    assert summary == json.loads((folder / "summary.json").read_text())
    stages = {"pretrain_seconds", "probe_seconds", "embed_seconds"}
    assert stages | {"knn_accuracy", "seconds", "per_class_accuracy"} <= summary.keys()
    assert summary["linear_probe_accuracy"] > 0.8  # raw pixels would give as much, chance 0.1
    rows = metrics(folder)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) < 0
    assert all(float(row["embedding_std"]) > 0.5 / math.sqrt(128) for row in rows)
    config = json.loads((folder / "config.json").read_text())
    assert (config["script"], config["encoder"]) == ("simsiam", "small")
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert image.width >= 800
            assert len(set(image.convert("L").tobytes())) > 10
    state = state_of(folder)["model"]
    for key, value in load_file(folder / "encoder.safetensors").items():
        assert torch.equal(value, state[f"encoder.{key}"])


def test_z_is_what_the_papers_projector_makes(tmp_path, monkeypatch, fabric):
    monkeypatch.setattr(simsiam.runs, "has_package", lambda *_: False)
    config = small_config(head="paper", encoder="small")
    model, data = make_model(config), make_data()
    narrow_papers_head(model)
    model(torch.randn(16, 3, 8, 8, generator=seeded()))  # running statistics of its own
    simsiam.embed(model, data, config, tmp_path, fabric)
    with torch.no_grad():
        z, p = model.eval()(data.test.normalize(data.test.images))
    saved = np.load(tmp_path / "embeddings.npz")
    for name, expected in (("z", z), ("p", p), ("features", z)):
        np.testing.assert_allclose(saved[name], expected, rtol=1e-3, atol=1e-4)


def test_the_maps_are_of_z_and_p(finished):
    data = functions.load_images("digits")
    saved = np.load(finished.folder / "embeddings.npz")
    assert saved["labels"].tolist() == data.test.labels.tolist()
    assert saved["index"].tolist() == list(range(360))
    model = simsiam.SimSiam(simsiam.Config(), 1, 8).eval()
    model.load_state_dict(state_of(finished.folder)["model"])
    pixels = data.train.images.numpy() / 255
    x = (data.test.images.numpy() / 255 - pixels.mean()) / pixels.std()
    with torch.no_grad():
        expected = dict(zip("zp", model(torch.from_numpy(x).to(torch.float32)), strict=True))
    assert not np.allclose(saved["z"], saved["p"])
    assert np.array_equal(saved["features"], saved["z"])
    assert np.array_equal(saved["coordinates"], saved["z_coordinates"])
    for number, name in enumerate("zp"):
        features, *rest = finished.maps[number]
        assert rest == ["umap", 3, 10]  # the original's ten neighbours
        assert np.array_equal(saved[name], features.numpy())
        error = np.linalg.norm(saved[name] - expected[name].numpy())
        assert error < 0.02 * np.linalg.norm(saved[name])  # in bfloat16, where that is fast
        points = np.arange(720.0).reshape(-1, 2) + number + 1
        assert np.array_equal(saved[f"{name}_coordinates"], points)
        rows = list(csv.DictReader((finished.folder / f"umap_{name}.csv").open()))
        assert [row["class"] for row in rows] == [str(label) for label in saved["labels"]]
        assert [[float(row["x"]), float(row["y"])] for row in rows] == points.tolist()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--head paper --projector-layers 4", "--projector-layers must be 2 or 3"),
        ("--projector-layers 3", "--projector-layers has no effect without --head paper"),
        ("--augmentation crop --magnitude 5", "no effect without --augmentation randaugment"),
        ("--crop-scale-min 0.5", "--crop-scale-min has no effect without --augmentation crop"),
        ("--num-ops 0", "--num-ops must be in [1, 100], not 0"),
        ("--num-ops 1000000000", "--num-ops must be in [1, 100], not 1000000000"),
        ("--magnitude 31", "--magnitude must be in [0, 30], not 31"),
        ("--magnitude -1", "--magnitude must be in [0, 30], not -1"),
        (
            "--encoder resnet18 --view-size 8",
            "--view-size has no effect without --augmentation crop",
        ),
        ("--optimizer muon", "--optimizer muon with --learning-rate 1.6, which is SGD's: try 0.02"),
        ("--head linear", "invalid choice"),
        ("--stages pretrain,finetune", "--stages knows pretrain,probe,embed"),
    ],
)
def test_bad_flags_are_one_line(user_error, line, words):
    with user_error(words):
        settings.parse_config(simsiam.Config, line.split(), "")
