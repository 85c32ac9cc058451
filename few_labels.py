"""The label-efficiency study: what a pretrained encoder buys when few images have labels."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functions
from support import datasets, devices, encoders, files, supervised
from support.pretraining import PretrainingConfig, crop_views

# What the label-efficiency study compares: names in the table and in the figure, and colour.
STUDY = {
    "supervised": ("scratch", "from scratch, plain", "#AAAAAA"),
    "supervised-tuned": ("scratch tuned", "from scratch, tuned", "#333333"),
    "linear": ("frozen linear", "frozen encoder, linear", "#0077BB"),
    "mlp": ("frozen MLP", "frozen encoder, MLP", "#009988"),
    "finetuned": ("fine-tuned", "fine-tuned encoder", "#EE7733"),
}


# Both chosen on held-out training images of FashionMNIST with 100 and 1,000 labels: the views of
# pretraining are too strong to learn few images by, and a higher rate forgets the encoder.
STUDY_CROP_SCALE, FINETUNE_RATE = 0.8, 3e-4


def draw_labels(labels: Tensor, count: int, seed: int) -> Tensor:
    """Positions `(count,)` of labelled images: class-balanced, and nested for the same seed.

    The first K are one image of each of the K classes, the next K another one, and so on; a class
    that has no more images is passed over.
    """
    generator = np.random.default_rng(seed)
    values = labels.cpu().numpy()
    classes = generator.permutation(np.unique(values))
    turns = [
        (rank, place, image)
        for place, label in enumerate(classes)
        for rank, image in enumerate(generator.permutation(np.flatnonzero(values == label)))
    ]
    return torch.tensor([int(image) for _, _, image in sorted(turns)[:count]])


def study_stage(
    model: Any,
    data: datasets.ImageData,
    config: PretrainingConfig,
    folder: Path,
    fabric: Any,
) -> dict[str, Any]:
    """Label-efficiency study: what the encoder buys when few training images have labels.

    For each number of labels and each draw of them, five classifiers with the same architecture of
    encoder: trained from scratch plainly (Adam 1e-3, no augmentation) or tuned (mild crops and
    flips, AdamW, the epoch with the lowest loss on a tenth of the labelled images), a linear layer
    and a one-hidden-layer MLP on the frozen encoder, and the encoder fine-tuned like the tuned one
    at a lower rate. All take `config.label_steps` steps, rounded up to whole epochs, with a cosine
    schedule. Writes `label_efficiency.csv` (a row per training; an interrupted study goes on from
    it) and `label_efficiency.png`.

    Returns:
        `label_efficiency`: method, then number of labels, then `accuracy`, `accuracy_sd`,
        `macro_f1` and `macro_f1_sd` over the draws, on the test images, in [0, 1].
    """
    from sklearn.metrics import f1_score

    path = folder / "label_efficiency.csv"
    whole = {"labels": int, "seed": int, "steps": int}
    rows = files.read_csv(
        path,
        {
            **whole,
            "method": str,
            "accuracy": float,
            "macro_f1": float,
            "seconds": float,
        },
    )
    done = {tuple(row[name] for name in (*whole, "method")) for row in rows}
    counts = config.label_counts(len(data.train))
    study = Study(model.encoder, data, config, fabric)
    if any(part.strip() != "all" and int(part) > max(counts) for part in config.labels.split(",")):
        images = f"{len(data.train):,} training images"
        print(f"some of the --labels {config.labels} are left out: there are only {images}")
    print(f"macro-F1 in %, mean ± sd over {config.label_seeds} draws of the labelled images")
    print("labels" + "".join(f"{short:>14}" for short, _, _ in STUDY.values()))
    for count in counts:
        for seed in range(config.label_seeds):
            chosen = draw_labels(data.train.labels, count, seed).to(data.train.images.device)
            for method in STUDY:
                if (count, seed, config.label_steps, method) in done:
                    continue
                began = time.perf_counter()
                predictions = study.predict(method, chosen, seed).cpu()
                truth = data.test.labels.cpu()
                row: dict[str, Any] = {"labels": count, "seed": seed, "steps": config.label_steps}
                row |= {"method": method, "accuracy": functions.accuracy(predictions, truth)}
                row["macro_f1"] = float(f1_score(truth, predictions, average="macro"))
                rows.append({**row, "seconds": time.perf_counter() - began})
                files.write_csv(path, rows)
        print(_study_line(rows, count, config))
    table = {
        method: {str(count): _study_mean(rows, method, count, config) for count in counts}
        for method in STUDY
    }
    title = f"{len(data.test):,} test images of {data.name}, {config.label_seeds} draws"
    plot_label_efficiency(folder / "label_efficiency.png", table, title)
    return {"label_efficiency": table}


def _study_mean(
    rows: list[dict[str, Any]], method: str, count: int, config: PretrainingConfig
) -> dict[str, float]:
    key = (method, count, config.label_steps)
    these = [
        row
        for row in rows
        if (row["method"], row["labels"], row["steps"]) == key and row["seed"] < config.label_seeds
    ]
    result: dict[str, float] = {}
    for name in ("accuracy", "macro_f1"):
        values = [row[name] for row in these]
        result |= {name: float(np.mean(values)), f"{name}_sd": float(np.std(values, ddof=1))}
    return result


def _study_line(rows: list[dict[str, Any]], count: int, config: PretrainingConfig) -> str:
    means = [_study_mean(rows, method, count, config) for method in STUDY]
    cells = [f"{100 * mean['macro_f1']:.1f} ± {100 * mean['macro_f1_sd']:.1f}" for mean in means]
    return f"{count:6,}" + "".join(f"{cell:>14}" for cell in cells)


class Study:
    """The trainings of `study_stage`, on the data and features that they share."""

    def __init__(
        self,
        encoder: nn.Module,
        data: datasets.ImageData,
        config: PretrainingConfig,
        fabric: Any,
    ):
        self.encoder: Any = encoder
        self.data, self.fabric = data, fabric
        self.config = dataclasses.replace(config, crop_scale_min=STUDY_CROP_SCALE)
        self.train, self.test = (
            functions.extract_features(encoder, split, fabric) for split in (data.train, data.test)
        )
        # The unlabelled training images say how features are spread, whatever the labels' number.
        spread, centre = torch.std_mean(self.train, 0)
        self.train, self.test = (
            (features - centre) / spread.clamp(min=1e-6) for features in (self.train, self.test)
        )

    def predict(self, method: str, chosen: Tensor, seed: int) -> Tensor:
        """Classes `(N,)` of the test images after training on the labelled images `chosen`."""
        devices.seed_everything(seed)
        classes = len(self.data.classes)
        if method in ("linear", "mlp"):
            inputs, width = self.train, self.train.shape[1]
            hidden = (nn.Linear(width, 512), nn.BatchNorm1d(512), nn.ReLU())
            classifier = nn.Sequential(
                *(hidden if method == "mlp" else ()),
                nn.Linear(512 if method == "mlp" else width, classes),
            )
        else:
            inputs = self.data.train.images
            channels, height = inputs.shape[1:3]
            if method == "finetuned":
                encoder = copy.deepcopy(self.encoder)
            else:
                config = self.config
                encoder = encoders.make_encoder(
                    config.encoder, config.stem, channels, height, config.width
                )
            classifier = nn.Sequential(encoder, nn.Linear(encoder.num_features, classes))
        classifier = classifier.to(inputs.device).to(memory_format=torch.channels_last)
        decay = 0.0 if method == "supervised" else 0.01
        rate = FINETUNE_RATE if method == "finetuned" else 1e-3
        optimizer = torch.optim.AdamW(classifier.parameters(), rate, weight_decay=decay, fused=True)
        fit = chosen
        held_out = chosen[:0]
        if method in ("supervised-tuned", "finetuned"):
            fit, held_out = self._split(chosen)
        self._fit(method, classifier, optimizer, inputs, fit, held_out, seed)
        if method in ("linear", "mlp"):
            with functions.evaluating(classifier):
                return classifier(self.test).argmax(1)
        return functions.extract_features(classifier, self.data.test, self.fabric).argmax(1)

    def _split(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """A tenth of each class's labelled images for choosing the epoch; none below ten."""
        labels = self.data.train.labels[chosen]
        held_out = torch.zeros_like(labels, dtype=torch.bool)
        for label in labels.unique():
            places = (labels == label).nonzero()[:, 0]
            held_out[places[len(places) - len(places) // 10 :]] = True
        return chosen[~held_out], chosen[held_out]

    def _fit(
        self,
        method: str,
        classifier: nn.Module,
        optimizer: torch.optim.Optimizer,
        inputs: Tensor,
        chosen: Tensor,
        held_out: Tensor,
        seed: int,
    ) -> None:
        """Train; with held-out images keep the weights with the lowest loss on them."""

        def prepare(batch: Tensor, generator: torch.Generator) -> Tensor:
            if method in ("linear", "mlp"):
                return batch
            if method != "supervised":
                batch = crop_views(batch, self.config, generator, crop_only=True)
            return self.data.train.normalize(batch).contiguous(memory_format=torch.channels_last)

        labels = self.data.train.labels
        batch = min(256, len(chosen))
        epochs = math.ceil(self.config.label_steps / (len(chosen) // batch))
        best, best_loss = None, math.inf
        parts = (inputs[chosen], labels[chosen], prepare, epochs, seed, self.fabric)
        for row in supervised.train_classifier(classifier, optimizer, *parts):
            if len(held_out) and row["epoch"] % math.ceil(epochs / 20) == 0:
                split = self.data.train.select(held_out)
                logits = functions.extract_features(classifier, split, self.fabric)
                loss = F.cross_entropy(logits, labels[held_out]).item()
                if loss < best_loss:
                    best, best_loss = copy.deepcopy(classifier.state_dict()), loss
        if best is not None:
            classifier.load_state_dict(best)


def plot_label_efficiency(
    path: Path, table: dict[str, dict[str, dict[str, float]]], title: str
) -> None:
    """Macro-F1 over the number of labels, a line per method of `STUDY` with its deviation."""
    figure = functions.new_figure(7, 4.5)
    axes = figure.subplots()
    for method, values in table.items():
        _, name, color = STUDY[method]
        counts = [int(count) for count in values]
        mean = 100 * np.array([value["macro_f1"] for value in values.values()])
        spread = 100 * np.array([value["macro_f1_sd"] for value in values.values()])
        axes.plot(counts, mean, "o-", color=color, label=name, markersize=4, linewidth=1.5)
        axes.fill_between(counts, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.set_title(title)
    functions.style_axes(axes, "labelled training images", "macro-F1 (%), mean ± sd")
    axes.legend(frameon=False, loc="lower right")
    functions.save_figure(figure, path)
