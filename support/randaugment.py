"""RandAugment (Cubuk et al. 2019, https://arxiv.org/abs/1909.13719), drawn for each image."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from support import augment

# Ops, ranges and rounding are those of torchvision's `RandAugment` on uint8 tensors, with nearest
# neighbours and black outside. There a batch shares one draw; here every sample has its own.

RANDAUGMENT_OPS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
MAGNITUDE_BINS = 31  # magnitudes 0 to 30


def draw_randaugment(
    count: int, num_ops: int = 5, generator: augment.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw the ops and signs of `count` samples, all independent and uniform, on the CPU.

    Returns:
        ops: `(count, num_ops)`, int64 indices into `RANDAUGMENT_OPS`, to apply from left to right.
        negative: `(count, num_ops)`, bool, whether to flip the magnitude; unsigned ops ignore it.
    """
    draws = augment.uniform_numbers((count, 2, num_ops), generator, "cpu")
    return (draws[:, 0] * len(RANDAUGMENT_OPS)).long(), draws[:, 1] < 0.5


def rand_augment(images: Tensor, ops: Tensor, negative: Tensor, magnitude: int = 9) -> Tensor:
    """RandAugment (Cubuk et al. 2019, https://arxiv.org/abs/1909.13719), a chain of ops per sample.

    Every round sorts the batch by op, so that each op works on one slice.

    Args:
        images: `(B, C, H, W)`, uint8, H and W at least 3, on any device. Of C channels other than 3
            "Color" leaves them as they are, and "Contrast" takes each by itself.
        ops: `(B, num_ops)`, from `draw_randaugment`. On the CPU, as is `negative`: cutting the
            slices then needs no wait for a GPU.
        negative: `(B, num_ops)`, bool.
        magnitude: strength of all ops, 0 to 30.

    Returns:
        New images `(B, C, H, W)`, uint8, equal to torchvision's ops on each image alone.
    """
    sizes = [column.bincount(minlength=len(RANDAUGMENT_OPS)).tolist() for column in ops.unbind(1)]
    order = ops.argsort(0)  # (B, num_ops)
    places = torch.stack((order, order.argsort(0), negative.gather(0, order).long()))
    if images.device.type == "cuda":  # one copy that nobody waits for
        places = places.pin_memory()
    order, back, flipped = places.to(images.device, non_blocking=True)
    negative = flipped.bool()
    for step, size in enumerate(sizes):
        # index_select copies rows; images[order] copies bytes and takes ten times as long
        images = images.index_select(0, order[:, step])
        groups = zip(
            RANDAUGMENT_OPS, images.split(size), negative[:, step].split(size), strict=True
        )
        for name, group, flipped in groups:
            if len(group) and name != "Identity":
                group.copy_(_apply_op(name, group, flipped, magnitude))
        images = images.index_select(0, back[:, step])
    return images


def _apply_op(name: str, images: Tensor, negative: Tensor, magnitude: int) -> Tensor:
    """One op on all images, `(B, C, H, W)`; the signs `negative` are `(B,)`."""
    sign = 1.0 - 2.0 * negative[:, None, None, None]
    strength = sign * _strength(0.9, magnitude)  # (B, 1, 1, 1)
    match name:
        case "Brightness":
            return _extrapolate(images, torch.zeros_like(strength), strength)
        case "Color":
            return images if images.shape[1] != 3 else _extrapolate(images, _luma(images), strength)
        case "Contrast":
            mean = _luma(images).mean((2, 3), keepdim=True, dtype=torch.float32)
            return _extrapolate(images, mean, strength)
        case "Sharpness":
            return _extrapolate(images, _smooth(images), strength)
        case "Posterize":
            dropped = round(4 * magnitude / (MAGNITUDE_BINS - 1))  # of 8 bits
            return images & (256 - 2**dropped)
        case "Solarize":
            threshold = torch.linspace(255.0, 0.0, MAGNITUDE_BINS)[magnitude].item()
            inverted = (images >= math.ceil(threshold)).to(torch.uint8) * 255
            return images ^ inverted  # x ^ 255 = 255 - x
        case "AutoContrast":
            return _autocontrast(images)
        case "Equalize":
            return _equalize(images)
        case _:
            return _warp(name, images, negative, magnitude)


def _strength(largest: float, magnitude: int) -> float:
    """The op's strength at this magnitude, with the float32 rounding of torchvision."""
    return torch.linspace(0.0, largest, MAGNITUDE_BINS)[magnitude].item()


def _warp(name: str, images: Tensor, negative: Tensor, magnitude: int) -> Tensor:
    """Shear, translate or rotate."""
    height, width = images.shape[2:]
    sources = _warp_sources(name, magnitude, height, width, images.device)
    sources = sources.index_select(0, negative.long())[:, None]  # (B, 1, H * W)
    pixels = F.pad(images.flatten(2), (1, 0))  # (B, C, 1 + H * W), black first
    return pixels.gather(2, sources.expand(-1, images.shape[1], -1)).view_as(images)


@functools.lru_cache(maxsize=256)  # FixMatch draws 25 magnitudes of the five ops
def _warp_sources(
    name: str, magnitude: int, height: int, width: int, device: torch.device
) -> Tensor:
    """Where each output pixel comes from: `(2, H * W)`, int64, of the op and of its negative.

    Source pixels count from 1; 0 is black. All samples share the two maps. Their steps are those of
    torchvision, so that positions halfway between two pixels round alike.
    """
    theta = torch.tensor(
        [_warp_matrix(name, sign, magnitude, height, width) for sign in (1, -1)]
    )  # (2, 2, 3)
    grid = torch.ones(height, width, 3)  # x, y, 1, in pixels from the centre
    grid[..., 0] = torch.arange(width) - (width - 1) / 2
    grid[..., 1] = (torch.arange(height) - (height - 1) / 2)[:, None]
    half = torch.tensor([width / 2, height / 2])
    where = grid.view(1, -1, 3) @ (theta.mT / half)  # (2, H * W, 2), in [-1, 1]
    numbers = torch.arange(1.0, height * width + 1).view(1, 1, height, width)
    sources = F.grid_sample(
        numbers.expand(2, -1, -1, -1),
        where.view(2, height, width, 2),
        mode="nearest",
        align_corners=False,
    )  # (2, 1, H, W)
    return sources.long().flatten(1).to(device)


def _warp_matrix(
    name: str, sign: int, magnitude: int, height: int, width: int
) -> list[list[float]]:
    """The map from output to source positions, 2 x 3, in pixels from the image's centre."""
    shear = sign * _strength(0.3, magnitude)
    angle = sign * math.radians(_strength(30.0, magnitude))
    match name:
        case "ShearX":  # the corner at the top left stays
            return [[1, shear, shear * height / 2], [0, 1, 0]]
        case "ShearY":
            return [[1, 0, 0], [shear, 1, shear * width / 2]]
        case "TranslateX":
            return [[1, 0, -sign * int(_strength(150 / 331 * width, magnitude))], [0, 1, 0]]
        case "TranslateY":
            return [[1, 0, 0], [0, 1, -sign * int(_strength(150 / 331 * height, magnitude))]]
        case _:  # Rotate
            cos, sin = math.cos(angle), math.sin(angle)
            return [[cos, -sin, 0], [sin, cos, 0]]


def _extrapolate(images: Tensor, other: Tensor, strength: Tensor) -> Tensor:
    """Move away from `other`, or towards it where `strength` is negative; drop fractions."""
    return (images * (1 + strength)).sub_(strength * other).clamp_(0, 255).to(torch.uint8)


def _luma(images: Tensor) -> Tensor:
    """`(B, 1, H, W)`, uint8, of RGB images; those of other channels stay as they are."""
    if images.shape[1] != 3:
        return images
    red, green, blue = images.split(1, 1)  # (B, 1, H, W) each
    return (0.2989 * red + 0.587 * green + 0.114 * blue).to(torch.uint8)


def _smooth(images: Tensor) -> Tensor:
    """3 x 3 means with weight 5 in the centre; pixels at the border stay."""
    wide = images.to(torch.int16)
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]  # (B, C, H - 2, W)
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[:, :, 1:-1, 1:-1]
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = (total / 13).round_()
    return smooth


def _autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel to the full range; constant channels stay."""
    low = images.amin((2, 3), keepdim=True).float()  # (B, C, 1, 1)
    high = images.amax((2, 3), keepdim=True).float()
    constant = low == high
    scale = torch.where(constant, 1.0, 255 / (high - low))
    return ((images - low.masked_fill(constant, 0)) * scale).clamp_(0, 255).to(torch.uint8)


def _equalize(images: Tensor) -> Tensor:
    """Make each channel's histogram as flat as a table of levels can; near-constant ones stay."""
    levels = images.flatten(2).long()  # (B, C, H * W)
    histogram = levels.new_zeros(*levels.shape[:2], 256)
    histogram.scatter_add_(2, levels, torch.ones_like(levels))
    of_brightest = histogram.gather(2, levels.amax(2, keepdim=True))  # (B, C, 1)
    step = (levels.shape[2] - of_brightest) // 255  # pixels per new level
    darker = histogram.cumsum(2) - histogram
    table = ((darker + step // 2) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return table.gather(2, levels).to(torch.uint8).view_as(images)
