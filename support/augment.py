"""Batched augmentation with parameters drawn per sample.

Every op takes float images `(B, C, H, W)` in [0, 1] and returns new ones. Parameters are drawn per
sample from `generator` (torch's, or a `Shard` of one), which must live on the images' device. Ops
come in parts: `draw_*` draws parameters; `apply_*`, `adjust_*` and so on apply given ones, equal to
torchvision's functional ops; `random_*` and so on do both. What applies takes tensors only, so that
it can be compiled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601 luma, as in torchvision


@dataclass(frozen=True)
class Shard:
    """A generator for one of several processes, which together draw what a single one would.

    All processes draw the numbers of all `total` samples; each keeps those of its own `rows`.
    """

    generator: torch.Generator
    rows: Tensor
    total: int


Generator = torch.Generator | Shard
Draws = dict[str, Tensor]


def uniform_numbers(
    shape: tuple[int, ...], generator: Generator | None, device: Any, sample_dim: int = 0
) -> Tensor:
    """Uniform numbers in [0, 1) of a shape that counts samples along `sample_dim`."""
    if not isinstance(generator, Shard):
        return torch.rand(shape, generator=generator, device=device)
    shape = (*shape[:sample_dim], generator.total, *shape[sample_dim + 1 :])
    numbers = torch.rand(shape, generator=generator.generator, device=device)
    return numbers.index_select(sample_dim, generator.rows)


def _uniform(
    count: int, low: float, high: float, images: Tensor, generator: Generator | None
) -> Tensor:
    return uniform_numbers((count,), generator, images.device) * (high - low) + low


def _chosen(images: Tensor, p: float, generator: Generator | None) -> Tensor:
    """Which samples an op with probability `p` applies to, `(B,)`, bool."""
    return uniform_numbers((len(images),), generator, images.device) < p


def _where(name: str, drawn: Draws, changed: Tensor, images: Tensor) -> Tensor:
    """The images that `drawn[name]` chooses changed; all of them where it chooses nothing."""
    return (
        torch.where(drawn[name][:, None, None, None], changed, images) if name in drawn else changed
    )


def draw_crop_boxes(
    images: Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    generator: Generator | None = None,
) -> Tensor:
    """Boxes `(B, 4)` of top, left, height, width with `RandomResizedCrop`'s distribution.

    As in torchvision, ten attempts per sample, then the largest centred box of an allowed ratio.
    """
    count, _, height, width = images.shape
    draws = uniform_numbers((4, count, 10), generator, images.device, sample_dim=1)
    area = height * width * (scale[0] + draws[0] * (scale[1] - scale[0]))  # (B, 10)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + draws[1] * (high - low))
    w = (area * aspect).sqrt().round()
    h = (area / aspect).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)  # (B, 1)
    h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]
    top = (draws[2, :, 0] * (height - h + 1)).floor()  # randint(0, H - h + 1)
    left = (draws[3, :, 0] * (width - w + 1)).floor()
    boxes = torch.stack((top, left, h, w), 1)
    whole_h = min(height, round(width / ratio[0])) if width / height < ratio[0] else height
    whole_w = min(width, round(height * ratio[1])) if width / height > ratio[1] else width
    whole = ((height - whole_h) // 2, (width - whole_w) // 2, whole_h, whole_w)
    fallback = torch.stack([torch.full_like(top, value) for value in whole], 1)
    return torch.where(fits.any(1, keepdim=True), boxes, fallback)


def resized_crop(
    images: Tensor,
    boxes: Tensor,
    size: int | tuple[int, int],
    mirrored: Tensor | None = None,
) -> Tensor:
    """Crop each image to its box and resize bilinearly, without antialiasing.

    Equals `torchvision.transforms.functional.resized_crop(..., antialias=False)`; sample positions
    are clamped to the box, so nothing outside it is read. Crops that `mirrored` `(B,)` marks are
    read from right to left, which costs nothing.
    """
    out_h, out_w = (size, size) if isinstance(size, int) else size
    height, width = images.shape[2:]

    def positions(start: Tensor, length: Tensor, full: int, out: int) -> Tensor:
        centres = (torch.arange(out, device=images.device) + 0.5) / out  # (out,)
        where = start[:, None] + centres * length[:, None] - 0.5  # (B, out), in pixels
        inside = where.clamp(start[:, None], (start + length - 1)[:, None])
        return (2 * inside + 1) / full - 1  # grid_sample's [-1, 1]

    top, left, box_h, box_w = boxes.to(images.dtype).unbind(1)
    y = positions(top, box_h, height, out_h)[:, :, None].expand(-1, -1, out_w)
    x = positions(left, box_w, width, out_w)
    if mirrored is not None:
        x = torch.where(mirrored[:, None], x.flip(1), x)
    x = x[:, None, :].expand(-1, out_h, -1)
    return F.grid_sample(images, torch.stack((x, y), -1), align_corners=False)  # (B, C, out, out)


def draw_resized_crop(
    images: Tensor, scale: tuple[float, float], flip: float, generator: Generator | None
) -> Draws:
    """`boxes` `(B, 4)`, and `mirrored` `(B,)` with probability `flip`."""
    boxes = draw_crop_boxes(images, scale, generator=generator)
    return {"boxes": boxes, "mirrored": _chosen(images, flip, generator)}


def random_resized_crop(
    images: Tensor, scale: tuple[float, float], flip: float, generator: Generator | None
) -> Tensor:
    """A random box of each image, resized to the images' own size.

    It is mirrored with probability `flip`, as `random_horizontal_flip` would do in a second pass.
    """
    height, width = images.shape[2:]
    drawn = draw_resized_crop(images, scale, flip, generator)
    return resized_crop(images, drawn["boxes"], (height, width), drawn["mirrored"])


def random_horizontal_flip(
    images: Tensor, p: float = 0.5, generator: Generator | None = None
) -> Tensor:
    """Mirror each image with probability `p`."""
    chosen = _chosen(images, p, generator)
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def grayscale(images: Tensor) -> Tensor:
    """The luma `(B, 1, H, W)` of RGB images; those of other channels stay as they are."""
    if images.shape[1] != 3:
        return images
    red, green, blue = images.unbind(1)
    luma = (red * GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])
    return luma[:, None]


def _blend(images: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    """`factor * images + (1 - factor) * other`, clamped to [0, 1]; `factor` is `(B,)`."""
    factor = factor[:, None, None, None]
    return (images * factor).add_((1 - factor) * other).clamp_(0, 1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale each image by its factor `(B,)`, clamped to [0, 1]."""
    return (images * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its mean luma, or each channel with its mean; `factor` is `(B,)`."""
    return _blend(images, grayscale(images.mean((2, 3), keepdim=True)), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its own grey version; `factor` is `(B,)`."""
    return _blend(images, grayscale(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB images by `shift` `(B,)`, in [-0.5, 0.5] of a full circle. Exact HSV.

    Value and saturation are kept, so each new channel is V - (V - min) * clamp(min(k, 4 - k), 0, 1)
    with k = (n + 6 hue) mod 6 and n = 5, 3, 1 for red, green, blue. Masks are numbers here: on a
    CPU, torch.where takes as long as 40 additions.
    """
    value, least = images.amax(1), images.amin(1)  # (B, H, W)
    chroma = value - least
    is_largest = (images == value[:, None]).to(images.dtype)
    # Grey has no hue, and its chroma of 0 hides what comes out.
    share = (images - least[:, None]).div_(chroma.clamp_min(1e-12)[:, None])
    red, green, blue = share.unbind(1)
    hues = green - blue, (blue - red).add_(2), (red - green).add_(4)  # where that is the largest
    is_red, is_green, _ = is_largest.unbind(1)
    hue = hues[2].lerp_(hues[1], is_green).lerp_(hues[0], is_red)
    hue.div_(6).add_(shift[:, None, None])  # of a circle
    # k is 2 where this fraction is a half: min(k, 4 - k) is 2 less the distance from there
    offset = 2 - torch.arange(3, device=images.device)[:, None, None] / 3  # (n - 2) / 6, and 1.5
    fraction = torch.add(hue[:, None], offset, out=share).frac_()  # (B, 3, H, W)
    weight = fraction.sub_(0.5).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return weight.mul_(chroma[:, None]).neg_().add_(value[:, None])


def draw_color_jitter(
    images: Tensor,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    p: float = 1.0,
    generator: Generator | None = None,
) -> Draws:
    """`jittered` `(B,)` with probability `p`, and factors `(B,)` of the ops that do something.

    Factors are uniform in [max(0, 1 - strength), 1 + strength], the hue shift in [-hue, hue].
    Saturation and hue are of colours alone: images with other than three channels keep theirs.
    """
    count, in_colour = len(images), images.shape[1] == 3
    jittered = _chosen(images, p, generator)
    drawn = {"jittered": jittered} if p < 1 else {}
    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    for name, strength in strengths.items():
        if strength > 0 and (in_colour or name != "saturation"):
            low, high = max(0.0, 1 - strength), 1 + strength
            drawn[name] = _uniform(count, low, high, images, generator)
    if hue > 0 and in_colour:
        drawn["hue"] = _uniform(count, -hue, hue, images, generator)
    return drawn


def apply_color_jitter(images: Tensor, drawn: Draws) -> Tensor:
    """The ops for which there are factors, in a fixed order, on the images that are `jittered`.

    torchvision shuffles the order; the fixed one lets all samples share each op.
    """
    adjusted = images
    for name, adjust in (
        ("brightness", adjust_brightness),
        ("contrast", adjust_contrast),
        ("saturation", adjust_saturation),
        ("hue", adjust_hue),
    ):
        if name in drawn:
            adjusted = adjust(adjusted, drawn[name])
    return _where("jittered", drawn, adjusted, images)


def color_jitter(
    images: Tensor,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    p: float = 1.0,
    generator: Generator | None = None,
) -> Tensor:
    """`ColorJitter` with probability `p` per sample, as `draw_color_jitter` says."""
    strengths = (brightness, contrast, saturation, hue)
    return apply_color_jitter(images, draw_color_jitter(images, *strengths, p, generator))


def draw_grayscale(images: Tensor, p: float = 0.1, generator: Generator | None = None) -> Draws:
    """`greyed` `(B,)` with probability `p`."""
    return {"greyed": _chosen(images, p, generator)}


def apply_grayscale(images: Tensor, drawn: Draws) -> Tensor:
    """Replace the images that are `greyed` by their luma in all channels."""
    return _where("greyed", drawn, grayscale(images), images)


def blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Gaussian blur with reflected borders; `sigma` `(B,)` in pixels, `kernel_size` odd."""
    radius = kernel_size // 2
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)  # (B, kernel_size)
    kernel /= kernel.sum(1, keepdim=True)
    kernels = (kernel[:, :, None] * kernel[:, None, :]).repeat_interleave(images.shape[1], 0)
    padded = F.pad(images, (radius,) * 4, mode="reflect").flatten(0, 1)[None]
    return F.conv2d(padded, kernels[:, None], groups=len(kernels)).view(images.shape)


def draw_gaussian_blur(
    images: Tensor,
    sigma: tuple[float, float] = (0.1, 2.0),
    p: float = 1.0,
    generator: Generator | None = None,
) -> Draws:
    """`blurred` `(B,)` with probability `p`, and `sigma` `(B,)`, uniform in the range `sigma`."""
    blurred = _chosen(images, p, generator)
    drawn = {"blurred": blurred} if p < 1 else {}
    return drawn | {"sigma": _uniform(len(images), *sigma, images, generator)}


def apply_gaussian_blur(images: Tensor, drawn: Draws, kernel_size: int = 3) -> Tensor:
    """Blur the images that are `blurred`, each with its `sigma`."""
    return _where("blurred", drawn, blur(images, drawn["sigma"], kernel_size), images)


def random_rotation(images: Tensor, degrees: float, generator: Generator) -> Tensor:
    """Rotate each image by an angle in [-degrees, degrees], nearest pixel, black outside."""
    count, _, height, width = images.shape
    draws = uniform_numbers((count,), generator, images.device)
    angle = (2 * draws - 1) * math.radians(degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # affine_grid's coordinates run from -1 to 1 along both sides, whatever their lengths.
    top = torch.stack((cos, -sin * height / width, zero), 1)  # (B, 3)
    bottom = torch.stack((sin * width / height, cos, zero), 1)  # (B, 3)
    matrices = torch.stack((top, bottom), 1)  # (B, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(images, grid, mode="nearest", align_corners=False)


def random_shift(images: Tensor, most: int, generator: Generator) -> Tensor:
    """Shift each image by up to `most` pixels in both directions, black outside."""
    height, width = images.shape[2:]
    padded = F.pad(images, (most,) * 4)
    draws = uniform_numbers((2, len(images), 1), generator, images.device, sample_dim=1)
    start = (draws * (2 * most + 1)).long()  # (2, B, 1)
    y = start[0] + torch.arange(height, device=images.device)  # (B, H)
    x = start[1] + torch.arange(width, device=images.device)  # (B, W)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    shifted = padded.permute(0, 2, 3, 1)[sample, y[:, :, None], x[:, None, :]]  # (B, H, W, C)
    return shifted.permute(0, 3, 1, 2)


def random_cutout(images: Tensor, side: int, generator: Generator) -> Tensor:
    """Put a grey square of `side` pixels into each image, centred anywhere in it.

    What lies outside the image is cut off (DeVries & Taylor 2017, section 3.2).
    """
    height, width = images.shape[2:]
    draws = uniform_numbers((2, len(images), 1), generator, images.device, sample_dim=1)
    inside = []
    for centre, length in zip(draws, (height, width), strict=True):
        start = (centre * length).long() - side // 2  # (B, 1)
        where = torch.arange(length, device=images.device)
        inside.append((where >= start) & (where < start + side))  # (B, length)
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]  # (B, 1, H, W)
    return torch.where(hole, 0.5, images)
