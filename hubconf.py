"""Finished encoders for `torch.hub.load`, from a clone of this repository.

encoder = torch.hub.load("path/to/clone", "encoder", source="local", weights="path/to/run")
features = encoder(images)  # float (B, C, H, W) in [0, 1] -> (B, D)
"""

import pathlib
import typing

import torch

from support import frozen

dependencies = ["lightning_fabric", "numpy", "safetensors", "torch", "torchvision"]


def encoder(weights: str) -> torch.nn.Module:
    """The encoder of a finished run of simclr.py, simsiam.py or moco.py, in eval mode, on the CPU.

    It takes float images `(B, C, image_size, image_size)` in [0, 1], with the channels of its
    training images, normalises them as those were, and returns features `(B, num_features)`.

    Args:
        weights: the run folder, or its `encoder.safetensors` under any name.

    Raises:
        UserError: there is none, it is damaged, or it does not say what it is.
    """
    from torchvision.transforms import Normalize

    found = frozen.load_encoder(pathlib.Path(weights).expanduser(), "cpu")
    normalize = Normalize(found.mean.tolist(), found.std.tolist())
    model: typing.Any = torch.nn.Sequential(normalize, found.network).eval()
    model.num_features, model.image_size = found.network.num_features, found.size
    return model


def simclr_digits() -> torch.nn.Module:
    """What `make demo` trains: 128 features of handwritten digits `(B, 1, 8, 8)`, with ink 1."""
    folder = pathlib.Path(__file__).parent / "docs" / "results" / "simclr-digits"
    return encoder(str(folder / "encoder.safetensors"))
