import importlib.metadata
import json
import re
import shlex
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from image_folders import write_image
from pictures import unrendered

import simclr
from support import settings


def run(home, **changes):
    """The folder of a short run in `home`, its card, and its card's lines about accuracy."""
    values = {"output_dir": str(home / "results"), "data_dir": str(home / "data"), "name": "run"}
    values |= {"encoder": "small", "epochs": 1, "batch_size": 256, "knn_every": 0}
    values |= {"probe_epochs": 2, "device": "cpu", "precision": "float32"}
    with unrendered():
        simclr.main(simclr.Config(**{**values, **changes}))
    folder = home / "results" / "simclr" / "run"
    text = (folder / "MODEL_CARD.md").read_text()
    part = re.search(r"^## Evaluation\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1]
    return SimpleNamespace(folder=folder, text=text, evaluation=part.strip())


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on the digits with all stages."""
    changes = {"dataset": "digits", "seed": 3, "pixel_baseline": True, "finetune_epochs": 1}
    stages = "pretrain,probe,finetune"
    return run(tmp_path_factory.mktemp("digits"), stages=stages, **changes)


def test_the_numbers_are_those_of_the_summary(digits):
    summary = json.loads((digits.folder / "summary.json").read_text())
    for begin, key in (
        ("Linear probe:", "linear_probe_accuracy"),
        ("Linear probe on raw pixels, without the encoder:", "pixel_probe_accuracy"),
        ("kNN:", "knn_accuracy"),
        ("Few labels:", "few_label_accuracy_encoder"),
        ("Few labels on raw pixels, without the encoder:", "few_label_accuracy_pixels"),
        ("Fine-tuned with the labels of all training images:", "finetune_accuracy"),
    ):
        (line,) = [line for line in digits.evaluation.splitlines() if f"- {begin}" in line]
        shown = [float(number) for number in re.findall(r"([\d.]+)%", line)]
        value = summary[key]
        values = [value["mean"], value["sd"]] if isinstance(value, dict) else [value]
        assert shown == pytest.approx([100 * value for value in values], abs=0.0501)
    assert len(digits.evaluation.splitlines()) == 2 + 6
    assert digits.evaluation.startswith("Accuracy on 360 test images:")
    assert f"- Verdict: {summary['verdict']}\n" in digits.text


def test_the_card_says_what_the_encoder_is_and_how_it_was_made(digits):
    weights = 32 * (9 + 1 + 2) + 64 * (32 * 9 + 1 + 2) + 128 * (64 * 9 + 1 + 2)
    assert f"small (three convolutions), with {weights:,} parameters" in digits.text
    assert "Images 1 x 8 x 8 become 128 features." in digits.text
    assert "digits, 1,437 images, without their labels" in digits.text
    record = json.loads((digits.folder / "config.json").read_text())
    for fact in (record["hardware"], record["commit"] or "unknown", "seed 3"):
        assert fact in digits.text
    for name in ("torch", "numpy"):
        assert f"{name} {importlib.metadata.version(name)}" in digits.text
    assert "- 1 epoch in batches of 256" in digits.text
    assert "in float32" in digits.text
    (command,) = re.findall(r"^- Command: `python simclr.py (.*)`$", digits.text, re.MULTILINE)
    again = settings.parse_config(simclr.Config, shlex.split(command), "")
    assert (again.dataset, again.encoder, again.epochs, again.seed) == ("digits", "small", 1, 3)


def test_a_model_hub_reads_the_front_matter(digits):
    card = huggingface_hub.ModelCard(digits.text)
    assert card.data.to_dict() == {
        "library_name": "pytorch",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["self-supervised-learning", "simclr"],
    }
    assert card.text.strip().startswith("# simclr: run\n")


def test_the_card_loads_its_encoder(digits, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", digits.text, re.MULTILINE | re.DOTALL)
    clone = simclr.__file__.removesuffix("simclr.py")
    monkeypatch.chdir(digits.folder)
    names = {"images": torch.rand(5, 1, 8, 8)}
    exec(code.replace("path/to/clone", clone), names)
    assert names["features"].shape == (5, 128)


def test_a_card_does_not_say_where_the_images_and_weights_lie(digits, tmp_path):
    home = tmp_path / "secret place"
    for i in range(20):
        write_image(home / "my cells" / f"{i}.png", (i, 2 * i, 3 * i))
    weights = home / "start.safetensors"
    weights.write_bytes((digits.folder / "encoder.safetensors").read_bytes())
    card = run(
        home,
        dataset=str(home / "my cells"),
        weights=str(weights),
        download_url="https://internal.example",
        image_size=8,
        batch_size=10,
    )
    assert "secret" not in card.text
    assert str(tmp_path) not in card.text
    assert "internal" not in card.text
    assert "- Data: my cells, 20 images, without their labels\n" in card.text
    assert "--dataset 'my cells'" in card.text
    assert "--weights start.safetensors" in card.text
    assert "- Start: the weights in `start.safetensors`" in card.text
    assert "- Start" not in digits.text
    assert "Images 3 x 8 x 8 become" in card.text
    assert card.evaluation == "Nothing was measured."  # there are no labels


def test_what_was_not_measured_is_left_out(tmp_path):
    home = {"dataset": "digits", "stages": "pretrain,probe", "evaluate_on": "validation"}
    card = run(tmp_path, few_labels=0, **home)
    assert card.evaluation.startswith("Accuracy on 144 held-out training images:")
    assert [line[:6] for line in card.evaluation.splitlines()[2:]] == ["- Line", "- kNN:"]
    assert "1,293 images" in card.text
    assert "Fine-tuned" not in card.text


def test_a_width_is_named_where_there_is_one(tmp_path):
    changes = {"encoder": "resnet18", "width": 8, "stem": "imagenet", "stages": "pretrain"}
    card = run(tmp_path, dataset="digits", batch_size=1024, **changes)
    assert "resnet18 (imagenet stem, width 8), with" in card.text
    assert card.evaluation == "Nothing was measured."
