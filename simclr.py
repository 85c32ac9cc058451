"""SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709) on small images, and what it learns.

    python simclr.py                                    # CIFAR-10, ResNet18, 100 epochs, a GPU
    python simclr.py --dataset digits --encoder small   # no download, a minute on a laptop

Pretrains an encoder with NT-Xent, then freezes it: linear probe, kNN, t-SNE, per-class accuracy.
Published for the default recipe: 85.6 % linear, 20 minutes on an A100 (dkobak/simclr-cifar10).

Differences from the paper, as is usual on CIFAR-10: 3x3 stem without max-pool (appendix B.9),
weaker colour jitter, no blur, SGD instead of LARS; both views go through the encoder in one batch.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functions
from functions import require, setting

STAGES = ("pretrain", "probe", "embed", "finetune")


@dataclass(frozen=True)
class Config(functions.TrainingConfig):
    """The defaults are the recipe of the README's CIFAR-10 row."""

    stages: str = setting(
        "pretrain,probe,embed", "run", f"what to do, of {','.join(STAGES)}; with --resume any part"
    )
    finetune: bool = setting(False, "run", "also do the finetune stage")

    encoder: Literal["small", "resnet18", "resnet34", "resnet50"] = setting(
        "resnet18", "model", "small has three convolutions, the ResNets are torchvision's"
    )
    stem: Literal["cifar", "imagenet"] = setting(
        "cifar", "model", "first layer of a ResNet: 3x3 for small images, or the original 7x7"
    )
    projection: Literal["nonlinear", "linear", "none"] = setting(
        "nonlinear", "model", "projection head, used in pretraining only"
    )
    projection_hidden: int = setting(1024, "model", "hidden units of the nonlinear head")
    projection_size: int = setting(128, "model", "outputs of the head")

    batch_size: int = setting(512, "training", "images per step; each gives two views")
    optimizer: Literal["sgd", "adam", "lars"] = setting(
        "sgd", "training", "sgd and lars with momentum 0.9"
    )
    learning_rate: float = setting(
        0.06, "training", "peak; sgd and lars multiply it by batch size / 256, adam does not"
    )
    weight_decay: float = setting(5e-4, "training", "weight decay")
    schedule: Literal["cosine", "constant"] = setting(
        "cosine", "training", "learning rate after the warm-up"
    )
    warmup_epochs: int = setting(0, "training", "epochs of linear warm-up")
    temperature: float = setting(0.5, "training", "temperature of NT-Xent")
    knn_every: int = setting(
        10, "training", "epochs between kNN checks on held-out training images; 0 for none"
    )

    crop_scale_min: float = setting(0.2, "views", "smallest area of a crop, as a share")
    flip_probability: float = setting(0.5, "views", "probability of a horizontal flip")
    jitter: tuple[float, float, float, float] = setting(
        (0.4, 0.4, 0.4, 0.1), "views", "strength of brightness, contrast, saturation, hue"
    )
    jitter_probability: float = setting(0.8, "views", "probability of the colour jitter")
    grayscale_probability: float = setting(0.1, "views", "probability of losing the colours")
    blur_probability: float = setting(0.0, "views", "probability of a 3x3 Gaussian blur")

    probe_epochs: int = setting(100, "evaluation", "epochs of the linear probe")
    few_labels: int = setting(10, "evaluation", "labels per class of the few-label score; 0: none")
    pixel_baseline: bool = setting(False, "evaluation", "also probe the raw pixels, to compare")
    finetune_epochs: int = setting(20, "evaluation", "epochs of fine-tuning")
    embedding: Literal["tsne", "umap"] = setting("tsne", "evaluation", "map of the embed stage")

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        unknown = set(self.stage_names) - set(STAGES)
        require(not unknown, f"--stages knows {','.join(STAGES)}, not {self.stages!r}")
        require(
            0 < self.temperature < math.inf,
            f"--temperature must be a positive number, not {self.temperature}",
        )
        require(0 < self.crop_scale_min <= 1, "--crop-scale-min must be above 0, at most 1")
        require(
            all(0 <= strength < math.inf for strength in self.jitter) and self.jitter[3] <= 0.5,
            f"--jitter takes four numbers, not below 0, hue <= 0.5; not {self.jitter}",
        )
        for name in ("flip", "jitter", "grayscale", "blur"):
            value = getattr(self, f"{name}_probability")
            require(0 <= value <= 1, f"--{name}-probability must be in [0, 1], not {value}")
        for name in ("projection_hidden", "projection_size", "probe_epochs", "finetune_epochs"):
            require(getattr(self, name) >= 1, f"{functions.flag(name)} must be at least 1")
        for name in ("warmup_epochs", "knn_every", "few_labels"):
            require(getattr(self, name) >= 0, f"{functions.flag(name)} must not be negative")

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The stages to do."""
        names = [name.strip() for name in self.stages.split(",")]
        return tuple(names + ["finetune"] * (self.finetune and "finetune" not in names))


# Settings of the stages after pretraining: a finished run may be evaluated again with others.
EVALUATION = frozenset(
    {"stages", "finetune", "probe_epochs", "few_labels", "pixel_baseline", "finetune_epochs"}
    | {"embedding"}
)


class SimCLR(nn.Module):
    """An encoder f and a projection head g: `z = g(f(images))` (section 2.1)."""

    def __init__(
        self,
        encoder: str = "resnet18",
        stem: str = "cifar",
        projection: str = "nonlinear",
        projection_hidden: int = 1024,
        projection_size: int = 128,
        channels: int = 3,
        image_size: int = 32,
    ):
        super().__init__()
        self.encoder = functions.make_encoder(encoder, stem, channels, image_size)
        features = self.encoder.num_features
        self.projection_head: nn.Module = {
            "nonlinear": lambda: nn.Sequential(
                nn.Linear(features, projection_hidden),
                nn.ReLU(),
                nn.Linear(projection_hidden, projection_size),
            ),
            "linear": lambda: nn.Linear(features, projection_size),
            "none": nn.Identity,
        }[projection]()

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings `z` `(B, projection_size)` of images `(B, C, H, W)`."""
        return self.projection_head(self.encoder(images))


def nt_xent_loss(z: Tensor, temperature: float) -> Tensor:
    """NT-Xent, equation 1 of the paper, averaged over all 2B anchors.

    Args:
        z: `(2B, D)`, the embeddings of the first views, then of the second views.
        temperature: positive.

    Returns:
        A scalar, in float32 also under autocast; log(2B - 1) when all embeddings are equal.

    Raises:
        UserError: an odd number of rows, or a temperature that is not positive.
    """
    require(temperature > 0, f"the temperature must be positive, not {temperature}")
    require(z.ndim == 2 and len(z) % 2 == 0 < len(z), f"z must be (2B, D), not {tuple(z.shape)}")
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(z.float(), dim=1)
        similarity = (z / temperature) @ z.T  # (2B, 2B)
        positive = similarity.diagonal(len(z) // 2)  # (B,): the pairs i, i + B
        # An anchor is not its own negative; the positive stays in the denominator, once.
        diagonal = torch.eye(len(z), dtype=torch.bool, device=z.device)
        denominator = similarity.masked_fill_(diagonal, -torch.inf).logsumexp(1)  # (2B,)
        return denominator.mean() - positive.mean()


def two_views(images: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """The paper's augmentation (appendix A), drawn anew for each of the two views.

    Args:
        images: `(B, C, H, W)`, uint8.
        config: probabilities and strengths.
        generator: on the images' device.

    Returns:
        `(2B, C, H, W)` in [0, 1], all first views, then all second views.
    """
    views = functions.to_float(images).repeat(2, 1, 1, 1)  # (2B, C, H, W)
    views = functions.random_resized_crop(
        views, scale=(config.crop_scale_min, 1.0), generator=generator
    )
    views = functions.random_horizontal_flip(views, config.flip_probability, generator)
    views = functions.color_jitter(views, *config.jitter, config.jitter_probability, generator)
    if config.grayscale_probability > 0:
        views = functions.random_grayscale(views, config.grayscale_probability, generator)
    if config.blur_probability > 0:
        views = functions.gaussian_blur(views, 3, (0.1, 2.0), config.blur_probability, generator)
    return views


def make_optimizer(model: nn.Module, config: Config) -> tuple[torch.optim.Optimizer, float]:
    """The optimizer and its peak learning rate, scaled by batch size for sgd and lars."""
    rate, decay = config.learning_rate, config.weight_decay
    scaled = rate * config.batch_size / 256
    fused = next(model.parameters()).device.type != "mps"
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), rate, weight_decay=decay, fused=fused), rate
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(), scaled, 0.9, weight_decay=decay, fused=fused
        ), scaled
    from pytorch_optimizer import LARS  # leaves biases and norms without decay and adaptation

    return LARS(model.parameters(), scaled, weight_decay=decay, momentum=0.9), scaled


def pretrain(
    model: SimCLR, train: functions.Split, config: Config, folder: Path, fabric: Any
) -> list[dict[str, float]]:
    """Train until `config.epochs`, from the folder's checkpoint when it has one.

    After each epoch: `checkpoint.pt`, then a row of `metrics.csv`.

    Returns:
        The rows of `metrics.csv`.

    Raises:
        Diverged: the loss is not finite; the last finished epoch's checkpoint is kept.
    """
    mean, std = functions.channel_statistics(train.images)
    optimizer, peak = make_optimizer(model, config)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    checkpoint = folder / "checkpoint.pt"
    start, history = 0, []
    if config.resume is not None and checkpoint.exists():
        start, history = functions.restore(checkpoint, "simclr", model, optimizer)
        functions.write_csv(folder / "metrics.csv", history)
    steps = len(train) // config.batch_size  # the last, smaller batch would have fewer negatives
    images_left = (config.epochs - start) * steps * config.batch_size
    monitor = Monitor(train, mean, std) if config.knn_every and train.labels is not None else None
    with functions.progress_bar(images_left, "pretrain") as bar:
        for epoch in range(start, config.epochs):
            began = time.perf_counter()
            order = torch.randperm(
                len(train), generator=functions.epoch_generator(config.seed, epoch)
            ).to(fabric.device)
            generator = functions.epoch_generator(config.seed, epoch, fabric.device, stream=1)
            losses = functions.EpochLoss(steps, epoch + 1, fabric.device)
            model.train()
            for step in range(steps):
                rate = functions.scheduled_rate(
                    peak,
                    epoch * steps + step,
                    config.epochs * steps,
                    config.warmup_epochs * steps,
                    config.schedule,
                )
                optimizer.param_groups[0]["lr"] = rate
                index = order[step * config.batch_size : (step + 1) * config.batch_size]
                views = two_views(train.images[index], config, generator)  # (2B, C, H, W)
                views = functions.normalize(views, mean, std)
                z = wrapped(views.contiguous(memory_format=torch.channels_last))  # (2B, D)
                loss = nt_xent_loss(z, config.temperature)
                losses.add(loss)
                optimizer.zero_grad()
                fabric.backward(loss)
                wrapped_optimizer.step()
                bar.update(config.batch_size)
            row = {"epoch": epoch + 1, "loss": losses.mean(), "learning_rate": rate}
            row["seconds"] = time.perf_counter() - began
            row["images_per_second"] = steps * config.batch_size / row["seconds"]
            row["embedding_std"] = functions.embedding_std(z.detach())
            row["rank_me"] = functions.rank_me(z.detach())
            if monitor and ((epoch + 1) % config.knn_every == 0 or epoch + 1 == config.epochs):
                row["knn_held_out"] = monitor.accuracy(model.encoder, fabric)
            history.append(row)
            functions.save_checkpoint(
                checkpoint, "simclr", epoch + 1, model, optimizer, history, config
            )
            functions.write_csv(folder / "metrics.csv", history)
            if (epoch + 1) % max(1, config.epochs // 20) == 0:
                knn = f"  kNN {row['knn_held_out']:.1%}" if "knn_held_out" in row else ""
                left = functions.format_seconds(row["seconds"] * (config.epochs - epoch - 1))
                bar.write(
                    f"epoch {epoch + 1:4}/{config.epochs}  loss {row['loss']:.4f}  "
                    f"{row['images_per_second']:,.0f} images/s  {left} left{knn}"
                )
    return history


class Monitor:
    """kNN accuracy on training images held out of the bank, so that the test set stays unseen."""

    def __init__(self, train: functions.Split, mean: Tensor, std: Tensor):
        order, fifth = shuffled(len(train)), max(1, len(train) // 5)
        self.queries = train.select(order[:fifth][:5_000])
        self.bank = train.select(order[fifth:][:20_000])
        self.mean, self.std = mean, std

    def accuracy(self, encoder: nn.Module, fabric: Any) -> float:
        """In [0, 1]."""
        bank, queries = (
            functions.extract_features(encoder, split.images, self.mean, self.std, fabric)
            for split in (self.bank, self.queries)
        )
        return functions.knn_accuracy(bank, self.bank.labels, queries, self.queries.labels)


def shuffled(count: int) -> Tensor:
    """The positions of `count` images in a random order that is the same every time."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def probe(
    model: SimCLR, data: functions.ImageData, config: Config, folder: Path, fabric: Any
) -> dict[str, Any]:
    """Linear probe, kNN, per-class accuracy and the few-label score on the frozen encoder.

    Writes `probe.csv`, `probe.png`, `per_class_accuracy.png` and `confusion_matrix.png`.
    """
    mean, std = functions.channel_statistics(data.train.images)
    train, test = (
        functions.extract_features(model.encoder, split.images, mean, std, fabric)
        for split in (data.train, data.test)
    )
    train_labels, test_labels = data.train.labels, data.test.labels
    result = functions.linear_probe(
        train, train_labels, test, test_labels, config.probe_epochs, seed=config.seed
    )
    summary: dict[str, Any] = {
        "linear_probe_accuracy": result.accuracy,
        "knn_accuracy": functions.knn_accuracy(train, train_labels, test, test_labels),
    }
    functions.write_csv(folder / "probe.csv", result.history)
    title = f"Linear probe on the frozen encoder, {data.name}: {result.accuracy:.1%}"
    functions.plot_loss_and_accuracy(folder / "probe.png", result.history, title)
    summary["per_class_accuracy"] = functions.report_classes(
        result.predictions, data, folder, "", f"Linear probe, {data.name}"
    )
    inputs = {"encoder": (train, test)}
    if config.pixel_baseline:
        inputs["pixels"] = tuple(
            functions.to_float(split.images).flatten(1) for split in (data.train, data.test)
        )
        summary["pixel_probe_accuracy"] = functions.linear_probe(
            inputs["pixels"][0],
            train_labels,
            inputs["pixels"][1],
            test_labels,
            config.probe_epochs,
            seed=config.seed,
        ).accuracy
    if config.few_labels:
        for name, (known, unknown) in inputs.items():
            score, deviation = functions.few_label_accuracy(
                known, train_labels, unknown, test_labels, config.few_labels
            )
            summary[f"few_label_accuracy_{name}"] = {
                "labels_per_class": config.few_labels,
                "mean": score,
                "sd": deviation,
                "draws": 5,
            }
    return summary


def embed(
    model: SimCLR, data: functions.ImageData, config: Config, folder: Path, fabric: Any
) -> None:
    """Map the encoder's output (before the head) to two dimensions, at most 10,000 images.

    Test images, or the training images of a data set without labels. Writes `embeddings.npz` and
    `tsne.png` or `umap.png`.
    """
    mean, std = functions.channel_statistics(data.train.images)
    split = data.test or data.train
    split = split.select(shuffled(len(split))[:10_000])
    features = functions.extract_features(model.encoder, split.images, mean, std, fabric)
    coordinates = functions.project_2d(features, config.embedding, config.seed)
    labels = None if split.labels is None else split.labels.cpu().numpy()
    functions.write_arrays(
        folder / "embeddings.npz",
        features=features.cpu().numpy(),
        coordinates=coordinates,
        **({} if labels is None else {"labels": labels}),
    )
    method = {"tsne": "t-SNE", "umap": "UMAP"}[config.embedding]
    title = f"{method} of {len(split):,} images of {data.name}, {config.encoder}"
    path = folder / f"{config.embedding}.png"
    functions.plot_scatter(path, coordinates, labels, data.classes, title)


def finetune(
    model: SimCLR, data: functions.ImageData, config: Config, folder: Path, fabric: Any
) -> dict[str, Any]:
    """Train the encoder and a linear layer on the labels (appendix B.8), crops and flips only.

    Adam 1e-3, batch 256, cosine. An interrupted stage goes on from `finetune_checkpoint.pt`.
    Writes `finetune.csv`, `finetune.png`, `finetune_*.png` and `finetuned_encoder.safetensors`.
    """
    mean, std = functions.channel_statistics(data.train.images)
    functions.seed_everything(config.seed)
    layer = nn.Linear(model.encoder.num_features, len(data.classes))
    classifier = nn.Sequential(model.encoder, layer).to(fabric.device)
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-3, fused=fabric.device.type != "mps")
    wrapped, wrapped_optimizer = fabric.setup(classifier, optimizer)
    checkpoint = folder / "finetune_checkpoint.pt"
    start, history = 0, []
    if checkpoint.exists():
        start, history = functions.restore(checkpoint, "simclr-finetune", classifier, optimizer)
    train, test = data.train, data.test
    batch = min(256, len(train))
    steps = len(train) // batch
    total = (config.finetune_epochs - start) * steps * batch
    with functions.progress_bar(total, "finetune") as bar:
        for epoch in range(start, config.finetune_epochs):
            order = torch.randperm(
                len(train), generator=functions.epoch_generator(config.seed, epoch, stream=2)
            ).to(fabric.device)
            generator = functions.epoch_generator(config.seed, epoch, fabric.device, stream=3)
            losses = functions.EpochLoss(steps, epoch + 1, fabric.device)
            correct = torch.zeros((), dtype=torch.long, device=fabric.device)
            classifier.train()
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = functions.scheduled_rate(
                    1e-3, epoch * steps + step, config.finetune_epochs * steps, 0, "cosine"
                )
                index = order[step * batch : (step + 1) * batch]
                images = functions.random_resized_crop(
                    functions.to_float(train.images[index]),
                    scale=(config.crop_scale_min, 1.0),
                    generator=generator,
                )
                images = functions.random_horizontal_flip(
                    images, config.flip_probability, generator
                )
                images = functions.normalize(images, mean, std)
                logits = wrapped(images.contiguous(memory_format=torch.channels_last))  # (B, K)
                loss = F.cross_entropy(logits, train.labels[index])
                losses.add(loss)
                optimizer.zero_grad()
                fabric.backward(loss)
                wrapped_optimizer.step()
                correct += (logits.argmax(1) == train.labels[index]).sum()
                bar.update(batch)
            logits = functions.extract_features(classifier, test.images, mean, std, fabric)
            history.append(
                {
                    "epoch": epoch + 1,
                    "train_loss": losses.mean(),
                    "train_accuracy": correct.item() / (steps * batch),
                    "test_loss": F.cross_entropy(logits, test.labels).item(),
                    "test_accuracy": functions.accuracy(logits.argmax(1), test.labels),
                }
            )
            functions.save_checkpoint(
                checkpoint, "simclr-finetune", epoch + 1, classifier, optimizer, history, config
            )
            functions.write_csv(folder / "finetune.csv", history)
    accuracy = history[-1]["test_accuracy"]
    title = f"Fine-tuned on all labels, {data.name}: {accuracy:.1%}"
    functions.plot_loss_and_accuracy(folder / "finetune.png", history, title)
    accuracies = functions.report_classes(
        logits.argmax(1).cpu(), data, folder, "finetune_", f"Fine-tuned, {data.name}"
    )
    functions.save_weights(folder / "finetuned_encoder.safetensors", model.encoder, {})
    checkpoint.unlink()
    return {"finetune_accuracy": accuracy, "finetune_per_class_accuracy": accuracies}


def main(config: Config) -> dict[str, Any]:
    """Do the stages of `config` and return what `summary.json` holds.

    Accuracies in [0, 1]; the linear probe's and fine-tuning's are those of the last epoch.

    Raises:
        UserError: data, settings or a run folder that cannot be used.
        Diverged: the loss is not finite.
    """
    stages = config.stage_names
    require(
        "pretrain" in stages or config.resume is not None,
        "--stages without pretrain needs --resume RUN_FOLDER",
    )
    device = functions.pick_device(config.device)
    data = functions.load_images(
        config.dataset, config.data_dir, config.image_size, config.download_url
    )
    require(
        config.batch_size <= len(data.train),
        f"--batch-size {config.batch_size} is larger than the data set ({len(data.train)} images)",
    )
    fabric = functions.make_fabric(config.device, config.precision)
    channels, height = data.train.images.shape[1:3]
    functions.seed_everything(config.seed)
    model = SimCLR(
        config.encoder,
        config.stem,
        config.projection,
        config.projection_hidden,
        config.projection_size,
        channels,
        height,
    ).to(device, memory_format=torch.channels_last)
    with functions.open_run("simclr", config, EVALUATION) as folder:
        precision = functions.pick_precision(config.device, config.precision)
        print(data)
        print(
            f"SimCLR with {config.encoder}, {functions.count_parameters(model) / 1e6:.1f} M "
            f"parameters, on {functions.hardware(config.device)} ({precision})"
        )
        data = data.to(device)
        if "pretrain" in stages:
            history = pretrain(model, data.train, config, folder, fabric)
            mean, std = functions.channel_statistics(data.train.images)
            functions.save_weights(
                folder / "encoder.safetensors",
                model.encoder,
                {
                    "encoder": config.encoder,
                    "stem": config.stem,
                    "mean": str(mean.tolist()),
                    "std": str(std.tolist()),
                },
            )
            title = f"SimCLR pretraining on {data.name}, {config.encoder}"
            functions.plot_loss(folder / "loss.png", history, title)
        else:
            epoch, history = functions.restore(folder / "checkpoint.pt", "simclr", model)
            require(
                epoch == config.epochs,
                f"{folder} has finished {epoch} of {config.epochs} epochs: let it finish first, "
                "with pretrain among the --stages",
            )
        summary = functions.update_summary(
            folder,
            {
                "final_loss": history[-1]["loss"],
                "pretrain_seconds": sum(row["seconds"] for row in history),
            },
        )
        work = {"probe": probe, "embed": embed, "finetune": finetune}
        for stage in (stage for stage in work if stage in stages):
            if stage != "embed" and not data.classes:
                print(f"{stage} is skipped: it needs labels, and {data.name} has none")
                continue
            began = time.perf_counter()
            values = work[stage](model, data, config, folder, fabric) or {}
            values[f"{stage}_seconds"] = time.perf_counter() - began
            summary = functions.update_summary(folder, values)
        report(summary, config, folder)
    return summary


def report(summary: dict[str, Any], config: Config, folder: Path) -> None:
    """Print the numbers and where everything is."""
    print(f"final loss            {summary['final_loss']:.4f}")
    for key, name in (
        ("linear_probe_accuracy", "linear probe"),
        ("pixel_probe_accuracy", "  on raw pixels"),
        ("knn_accuracy", "kNN"),
        ("few_label_accuracy_encoder", "{} labels per class"),
        ("few_label_accuracy_pixels", "  on raw pixels"),
        ("finetune_accuracy", "fine-tuned"),
    ):
        value = summary.get(key)
        if isinstance(value, dict):
            name = name.format(value["labels_per_class"])
            print(f"{name:21} {value['mean']:.1%} ± {value['sd']:.1%} over {value['draws']} draws")
        elif value is not None:
            print(f"{name:21} {value:.1%}")
    print(f"time                  {functions.format_seconds(summary['seconds'])}")
    functions.print_folder(folder)


if __name__ == "__main__":
    functions.run_script(main, Config, __doc__)
