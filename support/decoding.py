"""One image file as pixels: which formats, which values are black and white, how many channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.errors import require

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
) | {".avif", ".heic", ".heif", ".jfif", ".jpe", ".pnm"}
IMAGE_FORMATS = ["JPEG", "PNG", "BMP", "GIF", "WEBP", "AVIF", "TIFF", "PPM"]


@dataclass(frozen=True)
class PixelRules:
    """How all image files of a folder become pixels.

    `channels` is None for colour of files that are grey or in colour; `.npy` files count as images
    when it is given. `value_range` has the values that become black and white where a file's type
    leaves that open: all types but 8 bits and bool. `stack` is `refuse`, or `first` to take the
    first of several images in one file.
    """

    channels: int | None = None
    value_range: tuple[float, float] | None = None
    stack: str = "refuse"

    @classmethod
    def recorded_in(cls, record: dict[str, Any]) -> PixelRules:
        """The rules that a run's `config.json` or its encoder's file names.

        Older ones have none, for there was only one rule.
        """
        value_range = record.get("value_range")
        pair = None if value_range is None else (float(value_range[0]), float(value_range[1]))
        return cls(record.get("channels"), pair, record.get("stack", "first"))

    @property
    def suffixes(self) -> frozenset[str]:
        """Those of the files that are images."""
        return IMAGE_SUFFIXES | {".npy"} if self.channels else IMAGE_SUFFIXES


def check_value_range(low: float, high: float) -> None:
    """Raise UserError unless `--value-range` goes up."""
    good = -math.inf < low < high < math.inf
    require(good, f"--value-range takes a lower and a higher number, not {low:g} {high:g}")


def choose_value_range(low: float, high: float) -> tuple[float, float]:
    """The values that become black and white, for images whose values go from `low` to `high`.

    The smallest range of 1, 8, 10, 12, 14 or 16 bits that holds them, so that the brightness of a
    camera's images, or of floats in [0, 1], does not depend on the brightest pixel; else `low` and
    `high` themselves.
    """
    for bits in (1, 8, 10, 12, 14, 16):
        if low >= 0 and high <= 2**bits - 1:
            return 0.0, 2.0**bits - 1
    return low, high if high > low else low + 1


def read_image(path: Path, size: int, rules: PixelRules) -> np.ndarray:
    """Read an image file of any mode and size: `(H, W, C)`, uint8, or a type of an open range.

    C is 1 or 3, or `rules.channels` if that is another number, for which only `.npy` and `.tif`
    have room. `fit` does the rest. EXIF rotation is applied, transparency of 8-bit images is put on
    white. Of a huge JPEG a smaller version may be read, larger than `size`.

    Raises:
        OSError or another error of Pillow's, numpy's or tifffile's: the file is no image, truncated
            or far too large, holds what is no finite number, several images, or other channels.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        pixels = _with_channels(np.load(path, "r", allow_pickle=False), rules.channels)
        _check_size(math.prod(pixels.shape[:2]))
    elif suffix in (".tif", ".tiff") and _needs_tifffile(path, rules):
        pixels = _read_tiff(path, rules)
    elif rules.channels not in (None, 1, 3):
        raise OSError(f"only .npy and .tif files have {rules.channels} channels")
    else:
        pixels = _read_with_pillow(path, size, rules.stack)
    if pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    if pixels.dtype.kind not in "uif":
        raise OSError(f"{pixels.dtype} is no type of pixels")
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise OSError("some of its values are NaN or infinite")
    return pixels


def fit(pixels: np.ndarray, size: int, rules: PixelRules) -> np.ndarray:
    """Make what `read_image` gave uint8 `(C, size, size)`.

    Where the type leaves the range open, `rules.value_range` is scaled to 0 to 255 and what lies
    outside is clipped. The shorter side is resized to `size` (bicubic, antialiased), the centre is
    cropped. Grey becomes three equal channels and colour becomes grey, if the rules want that.
    """
    from PIL import Image, ImageOps

    if pixels.dtype != np.uint8:
        low, high = rules.value_range
        share = (pixels.astype(np.float64) - low) / (high - low)
        pixels = (share.clip(0, 1) * 255).round().astype(np.uint8)
    in_colour = pixels.shape[2] == 3
    parts = [pixels] if in_colour else [pixels[..., i] for i in range(pixels.shape[2])]
    fitted = []
    for part in parts:
        image = Image.fromarray(np.ascontiguousarray(part))
        if image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        fitted.append(np.asarray(image.convert("L") if rules.channels == 1 else image))
    if in_colour and rules.channels != 1:
        return fitted[0].transpose(2, 0, 1)  # (3, size, size)
    return np.stack(fitted * 3 if len(fitted) == 1 and rules.channels != 1 else fitted)


def _read_with_pillow(path: Path, size: int, stack: str) -> np.ndarray:
    """A grey or colour image `(H, W, 1)` or `(H, W, 3)`."""
    from PIL import Image, ImageOps

    # By its name alone an image could be PostScript, which Pillow hands to Ghostscript.
    formats = IMAGE_FORMATS
    if path.suffix.lower() in (".heic", ".heif"):
        try:
            import pillow_heif
        except ImportError:
            raise OSError("Pillow cannot read it: pip install pillow-heif") from None
        pillow_heif.register_heif_opener()
        formats = [*IMAGE_FORMATS, "HEIF"]
    with Image.open(path, formats=formats) as opened:
        image: Image.Image = opened
        image.draft("RGB", (2 * size, 2 * size))  # decode huge JPEGs at a fraction of their size
        _check_size(image.width * image.height)
        # Besides the photograph, the second image of a phone's JPEG (MPO) has its depth.
        several = getattr(opened, "is_animated", False) and opened.format != "MPO"
        _check_stack(several, stack)
        if opened.format == "PNG" and opened.tile[0].args == "RGB;16B":
            return _upright(_read_16_bit_png(path), opened.getexif().get(0x0112, 1))
        if opened.format == "PNG" and opened.tile[0].args in ("LA;16B", "RGBA;16B"):
            raise OSError("a PNG of 16 bits with transparency: save it without")
        image.load()
        if image.getexif().get(0x0112, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":  # more than 8 bits
            return np.asarray(image)[..., None]  # (H, W, 1)
        if image.mode in ("LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image = image.convert("RGBA")
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))


def _read_16_bit_png(path: Path) -> np.ndarray:
    """A colour PNG of 16 bits `(H, W, 3)`, of which Pillow gives 8 bits at a time."""
    from PIL import Image

    halves = []
    for order in ("RGB;16B", "RGB;16L"):  # taken for little-endian, the lower byte is the upper
        with Image.open(path, formats=("PNG",)) as image:
            image.tile = [image.tile[0]._replace(args=order)]
            halves.append(np.asarray(image).astype(np.uint16))
    return halves[0] * 256 + halves[1]


def _needs_tifffile(path: Path, rules: PixelRules) -> bool:
    """Whether a TIFF is one that Pillow cannot read, or would read wrongly without a word."""
    from PIL import Image, TiffImagePlugin, UnidentifiedImageError

    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if not isinstance(image, TiffImagePlugin.TiffImageFile):
                return False
            tags = image.tag_v2
            bits, signed = max(tags.get(258, (1,))), 2 in tags.get(339, (1,))
            pages_are_channels = image.is_animated and rules.stack == "refuse"
    except UnidentifiedImageError:
        return True
    return (
        rules.channels not in (None, 1, 3)
        or (pages_are_channels and rules.channels is not None)
        or (bits > 8 and tags.get(277, 1) > 1)  # it takes the upper bytes, or noise
        or 0 in tags.get(338, ())  # further channels, which it drops
        or (bits == 8 and signed)
        or (bits > 8 and tags.get(262) == 0)  # white is 0, which it inverts at 8 bits only
        or (bits == 32 and 1 in tags.get(339, (1,)))  # unsigned, which it takes for signed
    )


def _read_tiff(path: Path, rules: PixelRules) -> np.ndarray:
    """A TIFF with tifffile, `(H, W, C)`; its channels may be its pages."""
    try:
        import tifffile
    except ImportError:
        raise OSError("Pillow cannot read it: pip install tifffile") from None

    with tifffile.TiffFile(path) as file:
        pages = len(file.pages)
        _check_stack(pages > 1 and pages != rules.channels, rules.stack)
        part: Any = file.pages[0] if rules.stack == "first" else file.series[0]
        channels = rules.channels or (3 if len(part.shape) == 3 else 1)
        _check_size(math.prod(part.shape) // channels)
        tag = part.keyframe.tags.get(0x0112)
        pixels = _with_channels(part.asarray(), rules.channels)
        if part.keyframe.photometric == 0:  # white is 0
            if pixels.dtype.kind != "u":
                raise OSError("its white is 0: save it with black as 0")
            pixels = 2**part.keyframe.bitspersample - 1 - pixels
        return _upright(pixels, int(tag.value) if tag else 1)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels `(H, W, C)` turned and mirrored as EXIF's orientation says, 1 to 8."""
    if orientation in (5, 6, 7, 8):  # the first row is the left or right side
        pixels, orientation = pixels.swapaxes(0, 1), {5: 1, 6: 2, 7: 3, 8: 4}[orientation]
    turned = {2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1]}
    return turned.get(orientation, pixels)


def _with_channels(array: np.ndarray, channels: int | None) -> np.ndarray:
    """Pixels `(H, W)`, `(H, W, C)` or `(C, H, W)` as `(H, W, C)`."""
    wanted = (1, 3) if channels in (None, 1, 3) else (channels,)
    if array.ndim == 2 and 1 in wanted:
        return array[..., None]
    if array.ndim == 3 and array.shape[2] in wanted:
        return array
    if array.ndim == 3 and array.shape[0] in wanted:
        return array.transpose(1, 2, 0)
    shape = " x ".join(map(str, array.shape))
    raise OSError(
        f"its {shape} values are not of the {channels or '1 or 3'} channels of --channels"
    )


def _check_size(pixels: int) -> None:
    """Refuse what would fill the memory."""
    from PIL import Image

    if pixels > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise OSError(f"{pixels:,} pixels are too many")


def _check_stack(several: bool, stack: str) -> None:
    if several and stack != "first":
        raise OSError("it is a stack of several images: --stack first takes the first one")
