"""Everything that a run needs to go on, and weights for elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from support import files
from support.errors import Diverged, UserError, require


def check_finite(epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """See that no gradient spoiled the weights or what the optimizer remembers.

    Raises:
        Diverged: one of them is not finite (the last loss was).
    """
    tensors = dict(model.state_dict())
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"the optimizer's {k} {number}": v for k, v in values.items()}
    for name, value in tensors.items():
        if isinstance(value, Tensor) and not value.isfinite().all():
            raise Diverged(f"{name} is not finite after epoch {epoch}")


@contextlib.contextmanager
def advice_on_divergence() -> Iterator[None]:
    """Let a training that leaves checkpoints say what to do when it diverges."""
    try:
        yield
    except Diverged as error:
        error.add_note("Try a new run with a lower --learning-rate")
        raise


def save(
    path: Path,
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, Any]],
    config: Any,
) -> None:
    """Write everything that the run needs to go on after `epoch` finished epochs, atomically.

    The rows of `metrics.csv` are part of it, so that the table and the weights always agree. Call
    `check_finite` before.
    """
    state = {
        "epoch": epoch,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history,
        "config": dataclasses.asdict(config),
    }
    with files.atomic_file(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch reports a full disk so
            raise OSError(str(error).splitlines()[0]) from error
        _append_checksum(temporary)


class Saver:
    """Saves a checkpoint when `--checkpoint-seconds` have passed since the last, and at the end."""

    def __init__(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: Any):
        self.path, self.model, self.optimizer, self.config = path, model, optimizer, config
        self.last = time.monotonic()
        self.seconds = 0.0  # that the last call took

    def save(self, epoch: int, history: list[dict[str, Any]]) -> None:
        """As the function `save`, if it is due."""
        began = time.monotonic()
        if epoch == self.config.epochs or began - self.last >= self.config.checkpoint_seconds:
            save(self.path, epoch, self.model, self.optimizer, history, self.config)
            self.last = time.monotonic()
        self.seconds = time.monotonic() - began


# torch.load does not notice every changed byte, and the archive's own checksums do not cover its
# directory, so the SHA-256 of the whole is kept as its comment: an archive ends with the comment's
# length (2 bytes) and the comment.
_LENGTH = (64).to_bytes(2, "little")


def _append_checksum(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.truncate()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, os.SEEK_END)
        file.write(_LENGTH + digest.encode())


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, on the CPU, without running any code from the file.

    Raises:
        UserError: missing, truncated, damaged, or not a checkpoint.
    """
    require(path.is_file(), f"{path} is missing: the run has no finished epoch to go on from")
    content = path.read_bytes()
    digest = hashlib.sha256(content[:-66]).hexdigest()
    whole = content[-66:] == _LENGTH + digest.encode()
    require(whole, f"{path} is damaged or no checkpoint (its checksum is wrong)")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on what it does not know
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} is not a readable checkpoint: {reason}") from error
    wanted = {"epoch", "model", "optimizer", "history", "config"}
    good = isinstance(state, dict) and wanted <= state.keys()
    require(good, f"{path} is not a checkpoint of these scripts")
    return state


def _check_shapes(
    state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> None:
    """Raise ValueError unless all tensors are like those that they replace.

    A fused optimizer does not look, and reads beyond the end of a momentum of another shape.
    """
    pairs = [(value, state["model"].get(name)) for name, value in model.state_dict().items()]
    if optimizer is not None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for number, values in state["optimizer"]["state"].items():
            pairs += [(weights[number], value) for k, value in values.items() if k != "step"]
    for own, saved in pairs:
        if saved is None:  # a momentum before the first step; load_state_dict sees missing weights
            continue
        if (saved.shape, saved.dtype, saved.layout) != (own.shape, own.dtype, own.layout):
            raise ValueError(f"a tensor is {saved.dtype} {tuple(saved.shape)}")


def restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> tuple[int, list[dict[str, Any]]]:
    """Load a checkpoint into `model` and `optimizer`; return its epoch and history.

    Raises:
        UserError: as `load`, or the weights do not fit the model.
    """
    state = load(path)
    try:
        _check_shapes(state, model, optimizer)
        model.load_state_dict(state["model"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} does not fit the model of its config.json: {reason}") from error
    return state["epoch"], state["history"]


def load_weights(path: Path, model: nn.Module) -> str:
    """Give a model the tensors of a file that have its names and shapes; no code of it is run.

    Args:
        path: of its encoder's weights: an `encoder.safetensors`, or a state dict that `torch.save`
            wrote, such as torchvision's `.pth` files; or of all its weights: a `checkpoint.pt`.
        model: with an attribute `encoder`; its other tensors stay as they are.

    Returns:
        A line that says what was taken and what was not.

    Raises:
        UserError: the file cannot be read, or nothing in it fits.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    require(path.is_file(), f"there are no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(found, dict) and isinstance(found.get("model"), dict):
                found = found["model"]
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the weights of {path}: {error}") from error
    except Exception as error:  # torch.load raises nearly anything on what it does not know
        raise UserError(f"{path} holds no weights that can be read without running code") from error
    own, fitting = model.state_dict(), {}
    for name, value in found.items() if isinstance(found, dict) else ():
        for place in (name, f"encoder.{name}"):
            if place in own and getattr(value, "shape", None) == own[place].shape:
                fitting[place] = value
    require(bool(fitting), f"nothing in {path} has the names and shapes of this encoder")
    model.load_state_dict(fitting, strict=False)
    encoder = [name for name in own if name.startswith("encoder.")]
    missing = [name.removeprefix("encoder.") for name in encoder if name not in fitting]
    shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
    rest = f"; new are {shown}" if missing else ""
    taken = len(encoder) - len(missing)
    return f"{taken} of the encoder's {len(encoder)} tensors are those of {path}{rest}"


def save_weights(path: Path, model: nn.Module, metadata: dict[str, str]) -> None:
    """Write a model's weights under its own key names as safetensors, atomically."""
    save_tensors(path, model.state_dict(), metadata)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write named tensors as safetensors, atomically."""
    from safetensors.torch import save

    state = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with files.atomic_file(path) as temporary:
        temporary.write_bytes(save(state, metadata))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file, on the CPU, and what the entry `about` of it says.

    Without that entry the second is empty. Nothing in the file is run.

    Raises:
        UserError: it is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads((file.metadata() or {}).get("about", "{}"))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as safetensors: {reason}") from error
    require(isinstance(about, dict), f"{path} is damaged: its entry `about` is no JSON object")
    return tensors, about
