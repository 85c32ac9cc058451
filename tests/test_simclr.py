import csv
import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import functions
import pretraining
import simclr
import simsiam

REPOSITORY = Path(simclr.__file__).resolve().parent
CIFAR10_IMAGES = REPOSITORY / "data" / "cifar10-images"
ARTIFACTS = (
    "config.json metrics.csv checkpoint.pt encoder.safetensors summary.json embeddings.npz",
    "predictions.npz embedding.html",
    "loss.png probe.png tsne.png confusion_matrix.png per_class_accuracy.png probe.csv",
)
TIMES = {"seconds", "images_per_second"}


def small_config(folder: Path, **changes) -> simclr.Config:
    settings = {
        "dataset": "digits",
        "encoder": "small",
        "epochs": 2,
        "batch_size": 128,
        "projection_hidden": 32,
        "probe_epochs": 3,
        "output_dir": str(folder),
        "name": "run",
        "device": "cpu",
    }
    return simclr.Config(**{**settings, **changes})


def run_command(folder: Path, flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "simclr.py"), "--dataset", "digits", *flags.split()]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def weights_hash(folder: Path) -> str:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest()


def metrics(folder: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    rows = csv.DictReader((folder / name).open())
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.fixture
def stop_in_epoch(monkeypatch):
    """Make a loop stop, as by Ctrl-C, at the end of an epoch before that epoch is saved."""

    def arrange(epoch: int) -> None:
        mean = functions.EpochLoss.mean

        def stopping(losses: functions.EpochLoss) -> float:
            if losses.epoch == epoch:
                monkeypatch.setattr(functions.EpochLoss, "mean", mean)
                raise KeyboardInterrupt
            return mean(losses)

        monkeypatch.setattr(functions.EpochLoss, "mean", stopping)

    return arrange


def test_command_line_makes_every_artifact(tmp_path):
    home = tmp_path / "a folder with spaces"
    home.mkdir()
    command = [sys.executable, str(REPOSITORY / "simclr.py"), "--dataset", "digits"]
    command += [
        "--encoder",
        "small",
        "--epochs",
        "3",
        "--batch-size",
        "128",
        "--probe-epochs",
        "20",
        "--name",
        "e2e",
    ]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warnings of libraries, no progress bar off a terminal
    folder = home / "results" / "simclr" / "e2e"
    assert sorted(path.name for path in folder.iterdir()) == sorted(" ".join(ARTIFACTS).split())
    assert [path.name for path in home.iterdir()] == ["results"]  # nothing outside the run folder

    summary = json.loads((folder / "summary.json").read_text())
    assert {"final_loss", "linear_probe_accuracy", "knn_accuracy", "seconds"} <= summary.keys()
    # Three epochs on digits: far above chance, and not above what is possible.
    assert 0.7 < summary["linear_probe_accuracy"] <= 1
    assert 0.5 < summary["knn_accuracy"] <= 1
    assert list(summary["per_class_accuracy"]) == list("0123456789")
    for name, value in summary["per_class_accuracy"].items():
        assert f"Accuracy for class: {name} is {100 * value:.1f} %" in done.stdout
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80

    config = json.loads((folder / "config.json").read_text())
    assert config["epochs"] == 3
    assert config["seed"] == 0
    assert "--name e2e" in config["command"]
    assert [row["epoch"] for row in metrics(folder)] == ["1", "2", "3"]
    saved = np.load(folder / "embeddings.npz")
    assert saved["features"].shape == (360, 128)
    assert saved["coordinates"].shape == (360, 2)
    assert sorted(np.unique(saved["labels"])) == list(range(10))
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert image.width >= 800
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    for key, value in load_file(folder / "encoder.safetensors").items():
        assert torch.equal(value, state[f"encoder.{key}"])


def test_main_returns_the_summary(tmp_path):
    returned = simclr.main(small_config(tmp_path, stages="pretrain,probe"))
    assert returned == json.loads((tmp_path / "simclr" / "run" / "summary.json").read_text())


def test_same_seed_same_run_and_another_seed_another(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        simclr.main(small_config(tmp_path, stages="pretrain", name=name, seed=seed))
    a, b, c = (tmp_path / "simclr" / name for name in "abc")
    assert weights_hash(a) == weights_hash(b) != weights_hash(c)
    assert metrics(a) == metrics(b)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lars"])
def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path, stop_in_epoch, optimizer):
    config = small_config(
        tmp_path, stages="pretrain", epochs=4, optimizer=optimizer, knn_every=2, warmup_epochs=1
    )
    simclr.main(config)
    stop_in_epoch(3)
    with pytest.raises(KeyboardInterrupt) as caught:
        simclr.main(dataclasses.replace(config, name="stopped"))
    folder = tmp_path / "simclr" / "stopped"
    assert f"--resume {folder}" in caught.value.__notes__[0]
    assert len(metrics(folder)) == 2
    simclr.main(dataclasses.replace(config, name="stopped", resume=str(folder)))
    assert weights_hash(folder) == weights_hash(tmp_path / "simclr" / "run")
    assert metrics(folder) == metrics(tmp_path / "simclr" / "run")


def test_knn_checks_and_later_stages_do_not_change_the_training(tmp_path):
    simclr.main(small_config(tmp_path, stages="pretrain", name="a", knn_every=0))
    simclr.main(small_config(tmp_path, stages="pretrain,probe", name="b", knn_every=1))
    assert weights_hash(tmp_path / "simclr" / "a") == weights_hash(tmp_path / "simclr" / "b")


def test_stages_run_alone_and_leave_the_others_files_alone(tmp_path):
    config = small_config(tmp_path)
    first = simclr.main(config)
    folder = tmp_path / "simclr" / "run"
    pretraining = ("checkpoint.pt", "encoder.safetensors", "loss.png", "metrics.csv")
    before = {name: (folder / name).read_bytes() for name in pretraining}
    for name in ("probe.png", "tsne.png", "embeddings.npz"):
        (folder / name).unlink()
    again = dataclasses.replace(config, resume=str(folder), stages="probe,embed")
    second = simclr.main(again)
    without_times = [
        {k: v for k, v in s.items() if not k.endswith("seconds")} for s in (first, second)
    ]
    assert without_times[0] == without_times[1]
    assert {name: (folder / name).read_bytes() for name in pretraining} == before
    assert (folder / "probe.png").exists()
    assert (folder / "tsne.png").exists()
    third = simclr.main(dataclasses.replace(again, stages="finetune", finetune_epochs=1))
    assert third["linear_probe_accuracy"] == first["linear_probe_accuracy"]
    assert {name: (folder / name).read_bytes() for name in pretraining} == before
    assert (folder / "finetune.png").exists()


def test_stages_without_pretraining_need_a_finished_run(tmp_path, stop_in_epoch):
    config = small_config(tmp_path)
    with pytest.raises(functions.UserError, match="needs --resume"):
        simclr.main(dataclasses.replace(config, stages="probe"))
    stop_in_epoch(2)
    with pytest.raises(KeyboardInterrupt):
        simclr.main(config)
    folder = str(tmp_path / "simclr" / "run")
    with pytest.raises(functions.UserError, match="finished 1 of 2 epochs"):
        simclr.main(dataclasses.replace(config, resume=folder, stages="probe"))


def test_finetuning_beats_chance_and_resumes_exactly(tmp_path, stop_in_epoch):
    config = small_config(
        tmp_path, stages="pretrain,finetune", finetune_epochs=4, flip_probability=0.0
    )
    whole = simclr.main(config)
    assert whole["finetune_accuracy"] > 0.5
    stop_in_epoch(3)  # pretraining has two epochs, so this is fine-tuning's third
    with pytest.raises(KeyboardInterrupt):
        simclr.main(dataclasses.replace(config, name="stopped"))
    folder = tmp_path / "simclr" / "stopped"
    assert len(metrics(folder, "finetune.csv")) == 2
    rest = dataclasses.replace(config, name="stopped", resume=str(folder), stages="finetune")
    with pytest.raises(functions.UserError, match="begun with --finetune-epochs 4"):
        simclr.main(dataclasses.replace(rest, finetune_epochs=2))
    assert simclr.main(rest)["finetune_accuracy"] == whole["finetune_accuracy"]
    assert metrics(folder, "finetune.csv") == metrics(tmp_path / "simclr" / "run", "finetune.csv")
    assert not (folder / "finetune_checkpoint.pt").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    config = small_config(tmp_path, epochs=3, stages="pretrain")
    loss = simclr.nt_xent_loss
    calls = []

    def poisoned(z: torch.Tensor, temperature: float, *others: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return loss(z, temperature, *others) * (float("nan") if len(calls) == 11 + 4 else 1)

    monkeypatch.setattr(simclr, "nt_xent_loss", poisoned)  # 1437 // 128 = 11 steps per epoch
    with pytest.raises(functions.Diverged, match="nan in epoch 2, step 4"):
        simclr.main(config)
    folder = tmp_path / "simclr" / "run"
    state = functions.load_checkpoint(folder / "checkpoint.pt", "simclr")
    assert state["epoch"] == 1
    assert all(value.isfinite().all() for value in state["model"].values())
    assert len(metrics(folder)) == 1


def test_divergence_exits_with_1_and_one_line(tmp_path):
    command = [sys.executable, str(REPOSITORY / "simclr.py"), "--dataset", "digits"]
    command += [
        "--encoder",
        "small",
        "--epochs",
        "2",
        "--optimizer",
        "adam",
        "--learning-rate",
        "1e30",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the loss is nan in epoch 1, step 2")
    assert len(done.stderr.splitlines()) == 1


def image_folder(folder: Path, names: list[str]) -> Path:
    draw = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (12, 12, 3), np.uint8)).save(folder / name)
    return folder


def test_a_folder_without_labels_trains_and_skips_what_needs_labels(tmp_path, capsys):
    pictures = image_folder(tmp_path / "flat", [f"{i}.png" for i in range(20)])
    config = small_config(
        tmp_path, dataset=str(pictures), batch_size=8, image_size=16, data_dir=str(tmp_path)
    )
    summary = simclr.main(dataclasses.replace(config, stages="pretrain,probe,embed,finetune"))
    printed = capsys.readouterr().out
    assert "probe is skipped: it needs labels" in printed
    assert "finetune is skipped: it needs labels" in printed
    assert "linear_probe_accuracy" not in summary
    saved = np.load(tmp_path / "simclr" / "run" / "embeddings.npz")
    assert saved["coordinates"].shape == (20, 2)
    assert "labels" not in saved
    assert (tmp_path / "simclr" / "run" / "tsne.png").exists()


def test_a_small_folder_with_labels_goes_through_every_stage(tmp_path):
    names = [f"{split}/{c}/{i}.png" for split in ("train", "test") for c in "ab" for i in "12345"]
    pictures = image_folder(tmp_path / "pictures", names)
    config = small_config(
        tmp_path, dataset=str(pictures), data_dir=str(tmp_path), batch_size=4, image_size=16
    )
    assert set(simclr.main(config)["per_class_accuracy"]) == {"a", "b"}


@pytest.mark.parametrize("dataset", ["cifar10-images", "fashion-mnist"])
def test_real_images(tmp_path, monkeypatch, dataset):
    there = {"cifar10-images": CIFAR10_IMAGES, "fashion-mnist": functions.DEBIAN_FASHION_MNIST}
    if not there[dataset].is_dir():
        pytest.skip(f"{there[dataset]} is not here (README, 'Data')")
    name = str(CIFAR10_IMAGES) if dataset == "cifar10-images" else dataset
    whole = functions.load_images(name, REPOSITORY / "data")
    few = functions.hold_out(whole.train, 0.04)[1], functions.hold_out(whole.test, 0.05)[1]
    part = dataclasses.replace(whole, train=few[0], test=few[1])
    monkeypatch.setattr(functions, "load_images", lambda *args: part)
    config = small_config(
        tmp_path, dataset=name, epochs=4, probe_epochs=20, stages="pretrain,probe"
    )
    summary = simclr.main(config)
    # Chance is 0.1; a linear layer on 2,000 CIFAR-10 images' raw pixels reaches 0.27.
    assert summary["linear_probe_accuracy"] > (0.3 if dataset == "cifar10-images" else 0.7)
    assert list(summary["per_class_accuracy"]) == list(whole.classes)


def test_images_are_normalised_with_the_training_statistics_only(tmp_path, monkeypatch):
    used = []
    normalize = functions.normalize

    def spy(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        used.append((mean.tolist(), std.tolist()))
        return normalize(images, mean, std)

    monkeypatch.setattr(functions, "normalize", spy)
    simclr.main(small_config(tmp_path, stages="pretrain,probe,embed,finetune", finetune_epochs=1))
    train = functions.load_images("digits").train.images.numpy() / 255
    assert len(used) > 10
    for mean, std in used:
        assert mean == pytest.approx([train.mean()], abs=1e-6)
        assert std == pytest.approx([train.std()], abs=1e-6)


def test_the_probe_leaves_the_encoder_as_it_was(tmp_path, monkeypatch):
    seen = []
    probe = functions.linear_probe

    def spy(*args, **kwargs):
        seen.append(args)
        return probe(*args, **kwargs)

    monkeypatch.setattr(functions, "linear_probe", spy)
    config = small_config(tmp_path, precision="float32")
    simclr.main(config)
    model = simclr.SimCLR("small", "cifar", "nonlinear", 32, 128, 1, 8)
    folder = tmp_path / "simclr" / "run"
    functions.restore(folder / "checkpoint.pt", "simclr", model)
    model.eval()
    train = functions.load_images("digits").train.images
    mean, std = functions.channel_statistics(train)
    with torch.no_grad():
        features = model.encoder(functions.normalize(functions.to_float(train), mean, std))
    # What the probe saw is what the saved encoder gives in eval mode, without augmentation.
    assert torch.allclose(seen[0][0], features, atol=1e-5)


def test_views_are_drawn_per_sample_and_per_view():
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).repeat(32, 1, 1, 1)
    views = pretraining.crop_views(images, simclr.Config(), torch.Generator().manual_seed(0))
    assert views.shape == (32, 3, 32, 32)
    assert views.min() >= 0
    assert views.max() <= 1
    distances = torch.cdist(views.flatten(1), views.flatten(1)) + torch.eye(32) * 1e3
    assert distances.min() > 0.1  # one image, 32 different views


def test_views_with_everything_off_are_the_images():
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    config = simclr.Config(
        crop_scale_min=1.0,
        flip_probability=0.0,
        jitter_probability=0.0,
        grayscale_probability=0.0,
        blur_probability=0.0,
    )
    views = pretraining.crop_views(images, config, torch.Generator().manual_seed(0))
    whole = functions.draw_crop_boxes(
        images, (1.0, 1.0), generator=torch.Generator().manual_seed(0)
    )
    kept = (whole[:, 2] == 8) & (whole[:, 3] == 8)  # a box of another ratio may still be drawn
    assert torch.allclose(views[kept], images[kept] / 255, atol=1e-6)


def test_smaller_views_are_the_crop_at_that_size():
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    off = {f"{name}_probability": 0.0 for name in ("flip", "jitter", "grayscale", "blur")}
    config = simclr.Config(encoder="resnet18", crop_scale_min=1.0, **off)
    views = pretraining.crop_views(images, config, torch.Generator().manual_seed(0), 8)
    boxes = functions.draw_crop_boxes(
        images, (1.0, 1.0), generator=torch.Generator().manual_seed(0)
    )
    assert views.shape == (6, 3, 8, 8)
    kept = (boxes[:, 2] == 16) & (boxes[:, 3] == 16)
    assert kept.any()
    # Bilinear at half the size is the mean of four pixels.
    assert torch.allclose(views[kept], F.avg_pool2d(images[kept] / 255, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "epochs", "sides"),
    [
        ("8", 3, [8, 8, 8]),
        ("8,12,16", 3, [8, 12, 16]),
        ("8,8,16", 6, [8, 8, 8, 8, 16, 16]),
        ("8, 16", 3, [8, 8, 16]),
    ],
)
def test_view_sizes_share_the_epochs(tmp_path, monkeypatch, sizes, epochs, sides):
    seen = []
    original = simclr.SimCLR.forward

    def forward(model, images):
        seen.append(images.shape[2:])
        return original(model, images)

    monkeypatch.setattr(simclr.SimCLR, "forward", forward)
    config = small_config(
        tmp_path, encoder="resnet18", width=8, view_size=sizes, epochs=epochs, batch_size=700
    )
    simclr.main(dataclasses.replace(config, stages="pretrain", knn_every=0))
    assert seen == [(side, side) for side in sides for _ in range(2)]  # two batches per epoch


def test_the_time_that_is_left_counts_larger_views(tmp_path):
    config = simclr.Config(view_size="16,16,24", epochs=6)
    model = simclr.SimCLR(width=8)
    training = pretraining.Pretraining(
        "simclr",
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        functions.load_images("digits").train,
        config,
        tmp_path,
        functions.make_fabric("cpu", "float32"),
    )
    assert training._epochs_after(2) == 1 + 2 * 2.25
    assert training._epochs_after(4) == 1
    assert training._epochs_after(5) == 0


@pytest.mark.parametrize("width", [0, 12, -8, 2048])
def test_width_is_checked(user_error, width):
    with user_error("--width", str(width)):
        simclr.Config(width=width)


def test_views_of_another_size_need_an_encoder_and_views_that_have_one(user_error):
    with user_error("--view-size", "ResNet"):
        simclr.Config(encoder="small", view_size="8")
    for text in ("0", "8,", "", "-8", "8.5", "8;16", "1" * 5000):
        with user_error("--view-size", "1 to 9,999"):
            simclr.Config(view_size=text)
    with user_error("--view-size", "more parts"):
        simclr.Config(view_size="8,16,24", epochs=2)
    with user_error("--view-size", "--augmentation crop"):
        simsiam.Config(encoder="resnet18", view_size="8")


@pytest.mark.parametrize(
    ("encoder", "projection"),
    [("small", "nonlinear"), ("resnet18", "linear"), ("resnet34", "none"), ("resnet50", "linear")],
)
def test_model_shapes(encoder, projection):
    model = simclr.SimCLR(encoder, "imagenet", projection, 24, 12)
    features = model.encoder.num_features
    z = model(torch.rand(2, 3, 32, 32))
    assert z.shape == (2, features if projection == "none" else 12)
    heads = {
        "none": 0,
        "linear": features * 12 + 12,
        "nonlinear": features * 24 + 24 + 24 * 12 + 12,
    }
    assert functions.count_parameters(model.projection_head) == heads[projection]


@pytest.mark.parametrize(("optimizer", "expected"), [("sgd", 0.02), ("adam", 0.01), ("lars", 0.02)])
def test_learning_rate_scaling(optimizer, expected):
    config = simclr.Config(optimizer=optimizer, learning_rate=0.01, batch_size=512)
    made = simclr.make_optimizer(torch.nn.Linear(2, 2), config)
    assert made.param_groups[0]["lr"] == pytest.approx(expected)


def test_lars_leaves_biases_and_norms_without_decay_and_adaptation():
    layer = torch.nn.Linear(3, 3)
    before = [p.detach().clone() for p in (layer.weight, layer.bias)]
    config = simclr.Config(optimizer="lars", learning_rate=1.0, batch_size=256, weight_decay=0.1)
    optimizer = simclr.make_optimizer(layer, config)
    layer.weight.grad, layer.bias.grad = torch.ones(3, 3), torch.ones(3)
    optimizer.step()
    assert torch.allclose(layer.bias, before[1] - 1)  # plain SGD
    # You et al. 2017: local rate 0.001 |w| / (|g| + decay |w|), on g + decay w
    norm = before[0].norm()
    local = 0.001 * norm / (3 + 0.1 * norm)
    assert torch.allclose(layer.weight, before[0] - local * (1 + 0.1 * before[0]), atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dataset nowhere", "unknown data set or missing folder 'nowhere'"),
        ("--dataset digits --batch-size 5000", "larger than the data set"),
        ("--batch-size 1", "--batch-size must be at least 2"),
        ("--temperature 0", "--temperature must be a positive"),
        ("--epochs 0", "--epochs must be at least 1"),
        ("--stages pretrain,bake", "--stages knows"),
        ("--jitter 1 1 1 0.7", "hue <= 0.5"),
        ("--crop-scale-min 0", "--crop-scale-min"),
        ("--flip-probability 2", "--flip-probability must be in"),
        ("--probe-epochs 0", "--probe-epochs must be at least 1"),
        ("--knn-every -1", "--knn-every must not be negative"),
        ("--resume nowhere", "not a run folder"),
        ("--epoch 3", "unrecognized arguments"),
        ("--encoder resnet19", "invalid choice"),
    ],
)
def test_user_mistakes_are_user_errors(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(functions.UserError, match=message) as caught:
        simclr.main(functions.parse_config(simclr.Config, flags.split(), "text"))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_a_cuda_device_that_is_not_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(functions.UserError, match="--device cuda"):
        simclr.main(small_config(tmp_path, device="cuda"))
