"""`MODEL_CARD.md`: what a run's encoder is, for people who get it without the run's folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from support import datasets, encoders, files, report
from support.settings import recorded_precision

# How the numbers of `summary.json` came about, in the order of the card.
PROTOCOLS = {
    "linear_probe_accuracy": "Linear probe: {}; a linear layer, trained with Adam on the frozen, "
    "standardised features and the labels of all training images",
    "pixel_probe_accuracy": "Linear probe on raw pixels, without the encoder: {}",
    "knn_accuracy": "kNN: {}; weighted vote of the 200 training images, or all if there are "
    "fewer, with the most similar features, by cosine",
    "few_label_accuracy_encoder": "Few labels: {}; logistic regression on the frozen features",
    "few_label_accuracy_pixels": "Few labels on raw pixels, without the encoder: {}",
    "finetune_accuracy": "Fine-tuned with the labels of all training images: {}; the encoder here "
    "is the one before that",
}

CARD = """---
library_name: pytorch
pipeline_tag: image-feature-extraction
tags:
- self-supervised-learning
- {script}
---

# {script}: {folder}

An encoder, {architecture}, with {parameters:,} parameters, trained without labels by
`{script}.py`. Images {channels} x {side} x {side} become {features:,} features.

## Training

- Data: {data}, {images:,} images, without their labels
{start}- Command: `{command}`
- {epochs} in batches of {batch_size}: {time} on {hardware}, in {precision}
- Code: commit {commit}, {versions}
- Verdict: {verdict}

## Evaluation

{evaluation}

## Use

In a clone of the code, for images that are floats in [0, 1]; and for a folder of any images:

```python
import torch

encoder = torch.hub.load("path/to/clone", "encoder", source="local", weights="encoder.safetensors")
features = encoder(images)  # (B, {channels}, {side}, {side}) -> (B, {features})
```

    python embed.py encoder.safetensors path/to/images

## Limits

- It is meant for research on small images; how good it is on other data is not known.
- The numbers are those of one training, with seed {seed}; other seeds give others.
- The code is under the MIT license. Whoever publishes the weights chooses theirs, and observes
  that of the training images.
"""


def write_card(folder: Path, config_class: Any, data: datasets.ImageData, encoder: Any) -> None:
    """Write `MODEL_CARD.md` of a finished run, with the front matter that model hubs read.

    It says nothing of where the run and its images lie.

    Args:
        folder: of the run; needs `config.json` and `summary.json`.
        config_class: of its script.
        data: what it was trained and evaluated on.
        encoder: with `num_features`.

    Raises:
        UserError: a file of the run is damaged, or the card cannot be written.
    """
    record = files.read_json(folder / "config.json")
    numbers = dict(report.number_rows(folder))
    start = Path(record.get("weights") or "").name or None
    named = {"dataset": data.name, "weights": start, "download_url": None}
    command = report.command_of({**record, **named}, config_class)
    versions = record.get("versions")
    packages = versions.items() if isinstance(versions, dict) else ()
    architecture = record["encoder"]
    if architecture == "small":
        architecture += " (three convolutions)"
    elif architecture.startswith("resnet"):
        architecture += f" ({record['stem']} stem, width {record.get('width', 64)})"
    measured = [f"- {text.format(numbers[k])}" for k, text in PROTOCOLS.items() if k in numbers]
    if measured:
        held_out = record.get("evaluate_on", "test") != "test"
        kind = "held-out training images" if held_out else "test images"
        measured = [f"Accuracy on {len(data.test):,} {kind}:", "", *measured]
    channels, side = data.train.images.shape[1:3]
    text = CARD.format(
        script=config_class.SCRIPT,
        folder=folder.name,
        architecture=architecture,
        parameters=encoders.count_parameters(encoder),
        channels=channels,
        side=side,
        features=encoder.num_features,
        data=data.name,
        start=f"- Start: the weights in `{start}`, whose training is not counted\n"
        if start
        else "",
        images=len(data.train),
        command=shlex.join(command),
        epochs=f"{record['epochs']} epoch{'s' if record['epochs'] > 1 else ''}",
        batch_size=record["batch_size"],
        time=numbers["pretrain_seconds"],
        hardware=record.get("hardware"),
        precision=recorded_precision(record),
        commit=record.get("commit") or "unknown",
        versions=", ".join(f"{package} {version}" for package, version in packages),
        verdict=numbers.get("verdict", "none"),
        evaluation="\n".join(measured) or "Nothing was measured.",
        seed=record["seed"],
    )
    with files.atomic_file(folder / "MODEL_CARD.md") as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
