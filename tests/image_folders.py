"""Folders of images of one colour each, which tell where an image of a data set comes from."""

import sys

import pytest
import torch
from PIL import Image

import functions

needs_names_of_bytes = pytest.mark.skipif(
    sys.platform in ("darwin", "win32"), reason="file names must be Unicode there"
)


def make_folder(root, *names):
    """Write an image of a colour of its own under each name; return colour -> name."""
    by_colour = {}
    for i, name in enumerate(names):
        colour = (i, 255 - i, i * 7 % 256)
        by_colour[colour] = name
        write_image(root / name, colour)
    return by_colour


def write_image(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def names_of(split, by_colour):
    """The file names that the images of a split come from, told by their colours."""
    pixels = split.images.flatten(2)  # (N, 3, H * W)
    assert torch.equal(pixels, pixels[..., :1].expand_as(pixels))
    return [by_colour[tuple(colour)] for colour in pixels[..., 0].tolist()]


def load_folder(root, data_dir, size=8):
    return functions.load_images(str(root), data_dir, size)
