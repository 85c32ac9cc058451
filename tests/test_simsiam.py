import csv
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightly.loss import NegativeCosineSimilarity
from PIL import Image
from safetensors.torch import load_file
from test_randaugment import naive_chains
from torch import nn

import functions
import label_study
import pretraining
import simsiam

REPOSITORY = Path(simsiam.__file__).resolve().parent
ARTIFACTS = (
    "config.json metrics.csv checkpoint.pt encoder.safetensors summary.json loss.png probe.csv",
    "probe.png per_class_accuracy.png confusion_matrix.png embeddings.npz umap_z.png umap_z.csv",
    "predictions.npz embedding.html",
    "umap_p.png umap_p.csv label_efficiency.csv label_efficiency.png",
)


def small_config(folder: Path, **changes) -> simsiam.Config:
    settings = {
        "dataset": "digits",
        "stages": "pretrain",
        "epochs": 2,
        "batch_size": 128,
        "knn_every": 0,
        "output_dir": str(folder),
        "name": "run",
        "device": "cpu",
    }
    return simsiam.Config(**{**settings, **changes})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_digits(count):
    return functions.load_images("digits").train.select(torch.arange(count))


def pretrain(folder, count=48, model=None, **changes):
    """`simsiam.pretrain` on the first digits, in float32, and the model that it trained."""
    config = small_config(folder, **{"batch_size": 16, "precision": "float32", **changes})
    torch.manual_seed(0)
    model = model or make_model(config)
    model.to(memory_format=torch.channels_last)
    fabric = functions.make_fabric("cpu", "float32")
    return simsiam.pretrain(model, some_digits(count), config, folder, fabric), model


def make_model(config, channels=1, size=8):
    return simsiam.SimSiam(
        config.encoder, config.stem, config.head, config.projector_layers, channels, size
    )


# ------------------------------------------------------------------------------------- loss


def papers_loss(p, z):
    """Equation 1 of Chen & He 2021, row by row in float64; a plain formula, no stop-gradient."""
    rows = [
        -(a / a.square().sum().sqrt() * (b / b.square().sum().sqrt())).sum()
        for a, b in zip(p.double(), z.double(), strict=True)
    ]
    return torch.stack(rows).mean()


@pytest.mark.parametrize(("count", "size"), [(1, 3), (4, 8), (33, 64)])
def test_loss_and_gradient_equal_the_papers_and_lightlys(count, size):
    p, z = torch.randn(2, count, size, generator=seeded(count))
    p.requires_grad_()
    z.requires_grad_()
    value = simsiam.negative_cosine_similarity(p, z)
    value.backward()
    assert z.grad is None  # the stop-gradient of equation 3
    constant = z.detach()
    for reference in (papers_loss, NegativeCosineSimilarity()):
        expected = reference(p, constant)
        assert value.item() == pytest.approx(expected.item(), abs=1e-6)
        torch.testing.assert_close(p.grad, torch.autograd.grad(expected, p)[0])


def test_loss_ends_are_those_of_a_cosine():
    p = torch.randn(5, 7, generator=seeded())
    for factor, expected in ((3, -1), (-2, 1), (1e-3, -1)):
        assert simsiam.negative_cosine_similarity(p, factor * p).item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_is_float32_under_autocast(dtype):
    p, z = torch.randn(2, 64, 512, generator=seeded()).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value = simsiam.negative_cosine_similarity(p, z)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(papers_loss(p, z).item(), abs=1e-6)


# ----------------------------------------------------------------------------------- models


def layers(module):
    return [
        (type(layer), getattr(layer, "in_features", None), getattr(layer, "out_features", None))
        for layer in module.children()
    ]


@pytest.mark.parametrize("size", [28, 32])
def test_the_small_model_is_the_original_one(size):
    model = simsiam.SimSiam(image_size=size).train()
    widths = [1, 32, 64, 128]
    assert [type(layer) for layer in model.encoder] == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d] * 3
    for i, convolution in enumerate(list(model.encoder)[::3]):
        assert (convolution.in_channels, convolution.out_channels) == tuple(widths[i : i + 2])
        assert convolution.kernel_size == (3, 3)
        assert convolution.stride == (2, 2)
        assert convolution.padding == (1, 1)
    predictor = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert layers(model.predictor)[0] == (nn.Linear, 2048, 64)
    assert layers(model.predictor)[3] == (nn.Linear, 64, 2048)
    assert [type(layer) for layer in model.predictor] == predictor
    images = torch.randn(4, 1, size, size, generator=seeded())
    z, p = model(images)
    assert z.shape == p.shape == (4, 2048)
    model.eval()
    assert torch.equal(model(images)[0], model.encoder(images))  # no projector
    assert torch.equal(model(images)[1], model.predictor(model.encoder(images)))


@pytest.mark.parametrize(("projector_layers", "features"), [(2, 512), (3, 512), (2, 128)])
def test_the_papers_head(projector_layers, features):
    encoder = "resnet18" if features == 512 else "small"
    model = simsiam.SimSiam(encoder, "cifar", "paper", projector_layers, 3, 8)
    full = [(nn.Linear, 2048, 2048), (nn.BatchNorm1d, None, None), (nn.ReLU, None, None)]
    projector = [(nn.Linear, features, 2048), *full[1:], *full * (projector_layers - 1)]
    assert layers(model.projector) == projector[:-1]  # it ends with BatchNorm, not ReLU
    assert layers(model.predictor) == [(nn.Linear, 2048, 512), *full[1:], (nn.Linear, 512, 2048)]
    z, p = model.train()(torch.randn(8, 3, 8, 8, generator=seeded()))
    assert z.min() < 0 < z.max()
    assert p.shape == (8, 2048)


@pytest.mark.parametrize("head", ["original", "paper"])
def test_the_predictor_has_a_parameter_group_of_its_own(head):
    config = simsiam.Config(head=head, batch_size=64, learning_rate=0.05, weight_decay=1e-4)
    model = simsiam.SimSiam(head=head, image_size=8)
    optimizer = simsiam.make_optimizer(model, config)
    rest, predictor = optimizer.param_groups
    ids = {id(p) for p in model.predictor.parameters()}
    assert {id(p) for p in predictor["params"]} == ids
    assert {id(p) for p in rest["params"]} == {id(p) for p in model.parameters()} - ids
    for group in (rest, predictor):
        settings = [group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")]
        assert settings == [pytest.approx(0.05 * 64 / 256), 0.9, 1e-4, False]
    assert predictor["fixed"]
    assert not rest.get("fixed")


# ------------------------------------------------------------------------------------ views


def test_crop_views_are_the_shared_ones():
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=seeded())
    config = simsiam.Config(augmentation="crop", blur_probability=0.5)
    views = simsiam.make_views(images, config, seeded(1), seeded(2))
    assert torch.equal(views, pretraining.crop_views(images, config, seeded(1)))
    assert simsiam.make_views(images, config, seeded(1), seeded(2), 8).shape == (6, 3, 8, 8)


@pytest.mark.parametrize(("num_ops", "magnitude"), [(5, 9), (2, 24)])
def test_randaugment_views_are_torchvisions_for_the_draws_of_the_host(num_ops, magnitude):
    images = torch.randint(0, 256, (40, 1, 12, 12), dtype=torch.uint8, generator=seeded())
    config = simsiam.Config(num_ops=num_ops, magnitude=magnitude)
    views = simsiam.make_views(images, config, seeded(1), seeded(2))
    draws = simsiam.draw_randaugment(40, num_ops, seeded(2))
    assert torch.equal(views, naive_chains(images, *draws, magnitude) / 255)


@pytest.mark.parametrize("augmentation", ["randaugment", "crop"])
def test_no_two_images_or_views_share_a_draw(augmentation):
    # Known mistake of public versions: `RandAugment` on a batch drew once for all its images.
    image = torch.randint(0, 256, (1, 1, 16, 16), dtype=torch.uint8, generator=seeded())
    config = simsiam.Config(augmentation=augmentation)
    views = simsiam.make_views(image.repeat(64, 1, 1, 1), config, seeded(1), seeded(2))
    assert len(views.flatten(1).unique(dim=0)) > 56  # a few chains may do nothing


# --------------------------------------------------------------------------------- training


def double_views(images, *_):
    """Views without chance: the image, and for the second half of the batch its mirror image."""
    first, second = images.float().div(255).chunk(2)
    return torch.cat([first, second.flip(3)])


@pytest.mark.parametrize(
    ("head", "layers", "schedule"), [("original", 2, "cosine"), ("paper", 3, "constant")]
)
def test_training_equals_algorithm_1(tmp_path, monkeypatch, head, layers, schedule):
    monkeypatch.setattr(simsiam, "make_views", double_views)
    changes = {"head": head, "projector_layers": layers, "schedule": schedule, "epochs": 3}
    changes |= {"learning_rate": 0.4, "weight_decay": 1e-2, "seed": 7}
    history, model = pretrain(tmp_path, **changes)

    torch.manual_seed(0)
    naive = make_model(small_config(tmp_path, **changes)).train()
    images = some_digits(48).images
    mean, std = images.numpy().mean() / 255, images.numpy().std() / 255
    rest = [p for name, p in naive.named_parameters() if not name.startswith("predictor")]
    peak = 0.4 * 16 / 256
    encoder_sgd = torch.optim.SGD(rest, peak, momentum=0.9, weight_decay=1e-2)
    predictor_sgd = torch.optim.SGD(naive.predictor.parameters(), peak, 0.9, weight_decay=1e-2)
    losses = []
    for step in range(9):
        if step % 3 == 0:
            order = torch.randperm(48, generator=functions.epoch_generator(7, step // 3))
        batch = images[order[step % 3 * 16 : step % 3 * 16 + 16]].float() / 255
        x = (torch.cat([batch, batch.flip(3)]) - mean) / std
        z1, z2 = naive.projector(naive.encoder(x)).split(16)
        p1, p2 = naive.predictor(torch.cat([z1, z2])).split(16)
        loss = papers_loss(p1, z2.detach()) / 2 + papers_loss(p2, z1.detach()) / 2
        rate = peak if schedule == "constant" else peak / 2 * (1 + math.cos(math.pi * step / 9))
        encoder_sgd.param_groups[0]["lr"] = rate
        encoder_sgd.zero_grad()
        predictor_sgd.zero_grad()
        loss.backward()
        encoder_sgd.step()
        predictor_sgd.step()
        losses.append(loss.item())
    assert [row["loss"] for row in history] == pytest.approx(
        np.reshape(losses, (3, 3)).mean(1).tolist(), abs=1e-4
    )
    expected = naive.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_both_views_go_through_one_forward(tmp_path):
    model = simsiam.SimSiam(image_size=8)
    seen = []
    for part in (model.encoder, model.predictor):
        part.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    pretrain(tmp_path, model=model, epochs=2)
    assert seen == [32] * 2 * 3 * 2  # two parts, three steps, two epochs; twice 16 views at a time


def test_the_encoders_rate_falls_and_the_predictors_stays(tmp_path, monkeypatch):
    rates = []

    class Spy(torch.optim.SGD):
        def step(self, *args, **kwargs):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "SGD", Spy)
    pretrain(tmp_path, epochs=4, warmup_epochs=1, learning_rate=0.03)
    encoder, predictor = np.array(rates).T
    peak = 0.03 * 16 / 256
    assert predictor == pytest.approx([peak] * 12)
    assert encoder[:3] == pytest.approx([peak / 3, peak * 2 / 3, peak])
    assert (np.diff(encoder[3:]) < 0).all()
    assert encoder[-1] < 0.1 * peak


def train_weights(path):
    return torch.load(path, weights_only=True)["model"]


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("augmentation", ["randaugment", "crop"])
def test_a_stopped_run_goes_on_exactly_and_kept_checkpoints_are_those_of_their_epochs(
    tmp_path, monkeypatch, augmentation
):
    config = small_config(tmp_path, epochs=4, keep_every=2, augmentation=augmentation)
    simsiam.main(config)
    whole = tmp_path / "simsiam" / "run"
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {"epoch2.pt", "epoch4.pt"}

    mean = functions.EpochLoss.mean

    def stopping(losses):
        if losses.epoch == 3:
            raise KeyboardInterrupt
        return mean(losses)

    monkeypatch.setattr(functions.EpochLoss, "mean", stopping)
    with pytest.raises(KeyboardInterrupt):
        simsiam.main(dataclasses.replace(config, name="stopped"))
    monkeypatch.setattr(functions.EpochLoss, "mean", mean)
    stopped = tmp_path / "simsiam" / "stopped"
    half = train_weights(stopped / "checkpoint.pt")
    assert_same_weights(half, train_weights(whole / "checkpoints" / "epoch2.pt"))
    simsiam.main(dataclasses.replace(config, name="stopped", resume=str(stopped)))
    final = train_weights(whole / "checkpoint.pt")
    assert_same_weights(train_weights(stopped / "checkpoint.pt"), final)
    assert_same_weights(train_weights(whole / "checkpoints" / "epoch4.pt"), final)
    assert not torch.equal(half["encoder.0.weight"], final["encoder.0.weight"])

    model = simsiam.SimSiam(image_size=8)
    kept = whole / "checkpoints" / "epoch2.pt"
    epoch, history = functions.restore(
        kept, "simsiam", model, simsiam.make_optimizer(model, config)
    )
    assert epoch == len(history) == 2
    assert_same_weights(model.state_dict(), half)


@pytest.mark.parametrize(("every", "kept"), [(0, []), (1, ["epoch1.pt", "epoch2.pt"]), (3, [])])
def test_checkpoints_are_kept_every_so_many_epochs(tmp_path, every, kept):
    pretrain(tmp_path, keep_every=every)
    assert sorted(path.name for path in tmp_path.glob("checkpoints/*")) == kept


def test_a_healthy_run_learns_and_gives_no_warning(tmp_path, capsys):
    summary = simsiam.main(
        small_config(tmp_path, epochs=5, batch_size=64, stages="pretrain,probe", probe_epochs=20)
    )
    assert "warning" not in capsys.readouterr().out
    assert summary["linear_probe_accuracy"] > 0.85  # raw pixels would give as much, chance 0.1
    rows = list(csv.DictReader((tmp_path / "simsiam" / "run" / "metrics.csv").open()))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) < 0
    assert all(float(row["embedding_std"]) > 0.5 / math.sqrt(128) for row in rows)


@pytest.mark.parametrize(
    ("seconds", "line"),
    [
        (11, "about 1m06s on this device\n"),  # 2 epochs of 3 steps
        (16000, "about 26h40m on this device\n  use a GPU, fewer --epochs, or a cheaper encoder"),
        (0.1, None),
    ],
)
def test_the_time_is_estimated_from_the_first_steps(tmp_path, capsys, monkeypatch, seconds, line):
    clock, step = [0.0], pretraining.Pretraining.step

    def slow(self, *arguments):
        clock[0] += seconds
        step(self, *arguments)

    monkeypatch.setattr(pretraining.Pretraining, "step", slow)
    monkeypatch.setattr(pretraining.time, "perf_counter", lambda: clock[0])
    pretrain(tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("on this device") == (line is not None)
    assert line is None or line in printed


def test_a_constant_encoder_is_a_collapse(tmp_path, capsys):
    model = simsiam.SimSiam(image_size=8)
    with torch.no_grad():
        model.encoder[-3].weight.zero_()  # ReLU passes no gradient back to it at 0 or below
        model.encoder[-3].bias.fill_(-1)
    history, _ = pretrain(tmp_path, model=model)
    assert [row["embedding_std"] for row in history] == pytest.approx([0, 0], abs=1e-6)
    printed = capsys.readouterr().out
    assert printed.count("warning: the embedding collapses") == 1
    assert "(epoch 1: " in printed


@pytest.mark.parametrize(("loss", "warnings"), [(-0.995, 1), (-0.985, 0)])
def test_a_loss_near_minus_one_is_a_collapse_in_the_first_tenth(
    tmp_path, capsys, monkeypatch, loss, warnings
):
    monkeypatch.setattr(simsiam, "negative_cosine_similarity", lambda p, z: p.mean() * 0 + loss)
    pretrain(tmp_path, epochs=20)
    assert capsys.readouterr().out.count("warning: the embedding collapses") == warnings


# ----------------------------------------------------------------------------- command line


def test_command_line_makes_every_artifact(tmp_path):
    home = tmp_path / "a folder with spaces"
    home.mkdir()
    flags = "--dataset digits --epochs 2 --batch-size 64 --probe-epochs 5 --keep-every 1 --name e2e"
    flags += " --labels 20,all --label-seeds 2 --label-steps 20"
    command = [sys.executable, str(REPOSITORY / "simsiam.py"), *flags.split()]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warnings of libraries, no progress bar off a terminal
    folder = home / "results" / "simsiam" / "e2e"
    expected = [*" ".join(ARTIFACTS).split(), "checkpoints"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)
    assert [path.name for path in home.iterdir()] == ["results"]

    summary = json.loads((folder / "summary.json").read_text())
    stages = {"pretrain_seconds", "probe_seconds", "embed_seconds", "study_seconds"}
    numbers = {"final_loss", "linear_probe_accuracy", "knn_accuracy", "label_efficiency"}
    assert stages | numbers | {"seconds", "per_class_accuracy"} <= summary.keys()
    assert -1 <= summary["final_loss"] < 0
    assert list(summary["label_efficiency"]) == list(label_study.STUDY)
    for table in summary["label_efficiency"].values():
        assert list(table) == ["20", "1437"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["script"], config["encoder"], config["labels"]) == ("simsiam", "small", "20,all")

    test = functions.load_images("digits").test
    saved = np.load(folder / "embeddings.npz")
    assert sorted(saved["labels"].tolist()) == sorted(test.labels.tolist())
    for name in "zp":
        assert saved[name].shape == (360, 128)
        assert saved[f"{name}_coordinates"].shape == (360, 2)
        rows = list(csv.DictReader((folder / f"umap_{name}.csv").open()))
        assert [row["class"] for row in rows] == [str(label) for label in saved["labels"]]
        points = np.array([[float(row["x"]), float(row["y"])] for row in rows])
        assert np.array_equal(points, saved[f"{name}_coordinates"].astype(float))
    assert not np.allclose(saved["z"], saved["p"])
    assert not np.allclose(saved["z_coordinates"], saved["p_coordinates"])
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert image.width >= 800
            assert len(set(image.convert("L").tobytes())) > 10
    state = train_weights(folder / "checkpoint.pt")
    model = simsiam.SimSiam(image_size=8).eval()
    model.load_state_dict(state)
    for key, value in load_file(folder / "encoder.safetensors").items():
        assert torch.equal(value, state[f"encoder.{key}"])
    # p is the predictor's output on z, up to bfloat16
    z = torch.from_numpy(saved["z"])
    with torch.no_grad():
        difference = model.predictor(z) - torch.from_numpy(saved["p"])
    assert difference.norm() < 0.02 * np.linalg.norm(saved["p"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--projector-layers 4", "--projector-layers must be 2 or 3"),
        ("--num-ops 0", "--num-ops must be at least 1, not 0"),
        ("--magnitude 31", "--magnitude must be in [0, 30], not 31"),
        ("--magnitude -1", "--magnitude must be in [0, 30], not -1"),
        ("--labels x", "--labels takes whole numbers from 2 and all, not 'x'"),
        ("--labels 0", "not '0'"),
        ("--labels 1", "not '1'"),
        ("--labels 10,,all", "not '10,,all'"),
        ("--labels -5", "--labels"),
        ("--label-seeds 1", "--label-seeds must be at least 2"),
        ("--label-steps 0", "--label-steps must be at least 1"),
        ("--head linear", "invalid choice"),
        ("--stages pretrain,finetune", "--stages knows pretrain,probe,embed,study"),
        ("--keep-every -1", "--keep-every must not be negative"),
        ("--logger csv", "invalid choice"),
    ],
)
def test_bad_flags_exit_with_2_and_one_line(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(functions.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["simsiam.py", "--dataset", "digits", *flags.split()])
    with pytest.raises(SystemExit) as caught:
        functions.run_script(simsiam.main, simsiam.Config, "")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert list(tmp_path.iterdir()) == []
