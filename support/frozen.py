"""A finished encoder and its probe, written by a run, and read from its folder or a file alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from support import checkpoints, datasets, decoding, devices, encoders, files, settings
from support.errors import UserError, require


@dataclass(frozen=True)
class Encoder:
    """A finished encoder and what is known of it.

    `mean` and `std` `(C,)` are those of its training images, `size` their side in pixels, `rules`
    how their files became pixels. `fabric` computes in the precision of the training, if the device
    has units for it. `record` is the run's `config.json`, empty for a file alone. `probe` is empty
    without a linear probe.
    """

    network: Any
    name: str
    size: int
    mean: Tensor
    std: Tensor
    rules: decoding.PixelRules
    fabric: Any
    record: dict[str, Any]
    probe: dict[str, Tensor]
    classes: tuple[str, ...]


def save_encoder(path: Path, encoder: nn.Module, config: Any, data: datasets.ImageData) -> None:
    """Write a finished encoder, and what `load_encoder` must know to use it, atomically."""
    facts = {"encoder": config.encoder, "stem": config.stem, "width": config.width}
    facts |= {"mean": data.train.mean.tolist(), "std": data.train.std.tolist()}
    facts["size"] = data.train.images.shape[2]  # side of the images in pixels
    # How a folder's files became pixels, to read other files in the same way.
    rules = dataclasses.replace(config.pixel_rules, value_range=data.value_range)
    facts |= dataclasses.asdict(rules)
    facts["computed_in"] = devices.pick_precision(config.device, config.precision)
    checkpoints.save_weights(path, encoder, _about(facts))


def save_probe(path: Path, probe: dict[str, Tensor], classes: Sequence[str]) -> None:
    """Write a linear probe on the encoder beside it, atomically."""
    checkpoints.save_tensors(path, probe, _about({"classes": classes}))


def _about(facts: dict[str, Any]) -> dict[str, str]:
    # One entry: safetensors writes several in random order.
    return {"about": json.dumps(facts)}


def load_encoder(path: Path, device: str) -> Encoder:
    """The encoder of a run folder, or in a safetensors file that a run wrote.

    Raises:
        UserError: there is none, it is damaged, or it does not say what it is.
    """
    require(path.exists(), f"there is no run folder or file {path}")
    file = path / "encoder.safetensors" if path.is_dir() else path
    require(
        file.exists(),
        f"{path} has no encoder.safetensors: it is no finished run of simclr.py, simsiam.py or "
        "moco.py",
    )
    weights, about = checkpoints.load_tensors(file)
    require(
        about.keys() >= {"encoder", "stem", "mean", "std"},
        f"{file} does not say what encoder it is: take encoder.safetensors of a finished run",
    )
    folder = file.resolve().parent
    is_run = file.name == "encoder.safetensors" and (folder / "config.json").exists()
    record = files.read_json(folder / "config.json") if is_run else {}
    if "script" not in record:  # other programs have a file of that name, too
        is_run, record = False, {}
    # Files of older versions name neither the side nor the precision.
    dataset, side = str(record.get("dataset")), record.get("image_size")
    size: Any = about.get("size", settings.SIDES.get(dataset, side))
    require(
        size is not None,
        f"{file} does not say how large its images are: put its run's config.json beside it",
    )
    fabric = devices.make_evaluation_fabric(device, settings.recorded_precision(record | about))
    try:
        mean, std = (torch.tensor(about[name], device=fabric.device) for name in ("mean", "std"))
        shape = (len(mean), size, about.get("width", 64))
        rules = decoding.PixelRules.recorded_in(about)
        network = encoders.make_encoder(about["encoder"], about["stem"], *shape)
        network.load_state_dict(weights)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} does not hold the encoder that it names: {reason}") from error
    probe: dict[str, Tensor] = {}
    classes: list[str] = []
    if is_run and (folder / "probe.safetensors").exists():
        probe, about = checkpoints.load_tensors(folder / "probe.safetensors")
        classes = about.get("classes", [])
        fits = probe.keys() == {"weight", "bias", "mean", "std"} and (
            probe["weight"].shape == (len(classes), network.num_features)
        )
        require(fits, f"{folder / 'probe.safetensors'} is of another encoder: repeat the probe")
    network = network.to(fabric.device).to(memory_format=torch.channels_last)
    name = folder.name if is_run else file.stem
    return Encoder(network, name, size, mean, std, rules, fabric, record, probe, tuple(classes))
