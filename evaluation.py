"""What follows a self-supervised pretraining: linear probe, map, fine-tuning.

Each is a function of the model, the data, the settings, the run folder and Fabric, writes its own
files and no other stage's, and returns what it adds to `summary.json`.

Letters in shape comments: N images, B batch, C H W channels, height, width, D features, K classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functions
from support import (
    checkpoints,
    datasets,
    devices,
    experiment,
    files,
    frozen,
    page,
    pretraining,
    progress,
    runs,
    supervised,
)
from support.errors import require


def probe(
    model: Any, data: datasets.ImageData, config: Any, folder: Path, fabric: Any
) -> dict[str, Any]:
    """Linear probe, kNN, per-class accuracy and the few-label score on the frozen encoder.

    Writes `probe.csv`, `probe.png`, `per_class_accuracy.png`, `confusion_matrix.png`, the probe
    itself to `probe.safetensors`, and its classes of the test images to `predictions.npz`.

    Returns:
        What it adds to `summary.json`: accuracies in [0, 1].
    """
    labels, test_labels = data.train.labels, data.test.labels
    features, test_features = (
        functions.extract_features(model.encoder, part, fabric) for part in (data.train, data.test)
    )

    def train_probe(known: Tensor, new: Tensor) -> functions.ProbeResult:
        options = {"epochs": config.probe_epochs, "seed": config.seed}
        return functions.linear_probe(known, labels, new, test_labels, **options)

    result = train_probe(features, test_features)
    # What this evaluation leaves out, and an earlier one may not have, goes from the summary.
    optional = ("pixel_probe_accuracy", "few_label_accuracy_encoder", "few_label_accuracy_pixels")
    summary: dict[str, Any] = {
        **dict.fromkeys(optional),
        "linear_probe_accuracy": result.accuracy,
        "knn_accuracy": functions.knn_accuracy(features, labels, test_features, test_labels),
    }
    files.write_csv(folder / "probe.csv", result.history)
    frozen.save_probe(folder / "probe.safetensors", result.tensors, data.classes)
    everything = torch.arange(len(data.test))
    arrays = {"predictions": result.predictions.numpy(), **identify_images(data.test, everything)}
    files.write_arrays(folder / "predictions.npz", **arrays)
    title = f"Linear probe on the frozen encoder, {data.name}: {result.accuracy:.1%}"
    functions.plot_loss_and_accuracy(folder / "probe.png", result.history, title)
    title = f"Linear probe, {data.name}"
    summary["per_class_accuracy"] = functions.report_classes(
        result.predictions, data, folder, "", title
    )
    inputs = {"encoder": [features, test_features]}
    if config.pixel_baseline:
        pixels = [datasets.to_float(part.images).flatten(1) for part in (data.train, data.test)]
        inputs["pixels"] = pixels
        summary["pixel_probe_accuracy"] = train_probe(*pixels).accuracy
    if config.few_labels:
        for name, (known, new) in inputs.items():
            summary[f"few_label_accuracy_{name}"] = functions.few_label_accuracy(
                known, labels, new, test_labels, config.few_labels
            )
    return summary


def images_to_map(data: datasets.ImageData) -> tuple[Tensor, datasets.Split]:
    """At most 10,000 test images (training images when there are no labels), and where they stand.

    They are a random choice that is the same every time, in the order of the data set.
    """
    split = data.test or data.train
    index = functions.fixed_permutation(len(split))[:10_000].sort().values
    return index, split.select(index)


def identify_images(split: datasets.Split, index: Tensor) -> dict[str, np.ndarray]:
    """What tells in an `.npz` which image a row is of, for images at `index` in their split.

    `index`, and `labels` and `paths` (of a folder's files) where there are any.
    """
    arrays = {"index": index.numpy()}
    if split.labels is not None:
        arrays["labels"] = split.labels.cpu().numpy()
    if split.paths is not None:
        arrays["paths"] = split.paths
    return arrays


def write_map_page(
    folder: Path,
    data: datasets.ImageData,
    mapped: tuple[Tensor, datasets.Split],
    features: Tensor,
    coordinates: np.ndarray,
    title: str,
) -> None:
    """Write `embedding.html`: the map of what `images_to_map` chose, with the images.

    It shows the linear probe's predictions when the probe stage has been done.
    """
    if not runs.has_package("plotly", "plotly", "embedding.html"):
        return
    index, split = mapped
    predictions = None
    path = folder / "predictions.npz"
    if data.test is not None and path.exists():
        arrays = files.read_arrays(path)
        require("predictions" in arrays, f"{path} is damaged: it lacks the predictions")
        predictions = arrays["predictions"][index.numpy()]
    labels = None if split.labels is None else split.labels.cpu().numpy()
    page.write_page(
        folder / "embedding.html",
        coordinates=coordinates,
        images=split.images,
        names=split.paths,
        neighbours=page.nearest(features),
        labels=labels,
        classes=data.classes,
        predictions=predictions,
        title=title,
    )


def embed(model: Any, data: datasets.ImageData, config: Any, folder: Path, fabric: Any) -> None:
    """Map the encoder's output (before the head) to two dimensions, at most 10,000 images.

    Test images, or the training images of a data set without labels. Writes `embeddings.npz`,
    `tsne.png` or `umap.png`, and `embedding.html`.
    """
    index, split = images_to_map(data)
    features = functions.extract_features(model.encoder, split, fabric)
    arrays = {"features": features.cpu().numpy(), **identify_images(split, index)}
    if config.embedding == "umap" and not runs.has_package("umap", "umap-learn", "umap.png"):
        files.write_arrays(folder / "embeddings.npz", **arrays)
        return
    coordinates = functions.project_2d(features, config.embedding, config.seed)
    files.write_arrays(folder / "embeddings.npz", **arrays, coordinates=coordinates)
    method = {"tsne": "t-SNE", "umap": "UMAP"}[config.embedding]
    title = f"{method} of {len(split):,} images of {data.name}, {config.encoder}"
    path = folder / f"{config.embedding}.png"
    functions.plot_scatter(path, coordinates, arrays.get("labels"), data.classes, title)
    write_map_page(folder, data, (index, split), features, coordinates, title)


def finetune(
    model: Any, data: datasets.ImageData, config: Any, folder: Path, fabric: Any
) -> dict[str, Any]:
    """Train the encoder and a linear layer on the labels (SimCLR, appendix B.8).

    Adam 1e-3, batch 256, cosine, crops and flips only. An interrupted stage goes on from
    `finetune_checkpoint.pt`. Writes `finetune.csv`, `finetune.png`, `finetune_*.png` and
    `finetuned_encoder.safetensors`.

    Returns:
        What it adds to `summary.json`: accuracies of the last epoch, in [0, 1].

    Raises:
        UserError: an interrupted stage had another number of epochs.
        Diverged: the loss is not finite.
    """
    devices.seed_everything(config.seed)
    layer = nn.Linear(model.encoder.num_features, len(data.classes))
    # A copy, as other stages want the frozen one; with plain BatchNorm, whatever pretraining had.
    encoder = config.make_encoder(*data.train.images.shape[1:3])
    encoder.load_state_dict(model.encoder.state_dict())
    classifier = nn.Sequential(encoder, layer).to(fabric.device)
    classifier = classifier.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-3, fused=True)
    checkpoint = folder / "finetune_checkpoint.pt"
    history: list[dict[str, Any]] = []
    if checkpoint.exists():
        begun = checkpoints.load(checkpoint)["config"].get("finetune_epochs")
        require(
            begun == config.finetune_epochs,
            f"{checkpoint} was begun with --finetune-epochs {begun}: give the same, or delete it "
            "to begin anew",
        )
        _, history = checkpoints.restore(checkpoint, classifier, optimizer)
        files.write_csv(folder / "finetune.csv", history)

    def prepare(images: Tensor, generator: torch.Generator) -> Tensor:
        images = pretraining.crop_views(images, config, generator, crop_only=True)
        return data.train.normalize_for_encoder(images)

    epochs_left = config.finetune_epochs - len(history)
    with progress.bar(epochs_left * len(data.train), "finetune") as bar:
        for row in supervised.train_classifier(
            classifier,
            optimizer,
            data.train.images,
            data.train.labels,
            prepare,
            epochs=config.finetune_epochs,
            seed=config.seed,
            fabric=fabric,
            start=len(history),
        ):
            logits = functions.extract_features(classifier, data.test, fabric)
            row["test_loss"] = F.cross_entropy(logits, data.test.labels).item()
            row["test_accuracy"] = functions.accuracy(logits.argmax(1), data.test.labels)
            history.append(row)
            checkpoints.check_finite(row["epoch"], classifier, optimizer)
            checkpoints.save(checkpoint, row["epoch"], classifier, optimizer, history, config)
            files.write_csv(folder / "finetune.csv", history)
            bar.update(len(data.train))
    logits = functions.extract_features(classifier, data.test, fabric)
    predictions = logits.argmax(1)
    final = functions.accuracy(predictions, data.test.labels)
    title = f"Fine-tuned on all labels, {data.name}: {final:.1%}"
    functions.plot_loss_and_accuracy(folder / "finetune.png", history, title)
    title = f"Fine-tuned, {data.name}"
    print("After fine-tuning:")
    accuracies = functions.report_classes(predictions.cpu(), data, folder, "finetune_", title)
    checkpoints.save_weights(folder / "finetuned_encoder.safetensors", encoder, {})
    return {"finetune_accuracy": final, "finetune_per_class_accuracy": accuracies}


STAGES: dict[str, experiment.Stage] = {"probe": probe, "embed": embed, "finetune": finetune}
