"""Runs at whose pictures nobody looks."""

import contextlib

import pytest
from PIL import Image

from support import figures, files


@contextlib.contextmanager
def unrendered():
    """Save one pixel in the place of each picture: to render them takes longer than a short run.

    The figures are made as ever, up to the last text. What they look like is for the tests of
    pictures, and for those of what a run leaves behind, which count the pixels.
    """

    def save_figure(figure, path):
        with files.atomic_file(path) as temporary:
            Image.new("RGB", (1, 1)).save(temporary, format=path.suffix[1:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save_figure", save_figure)
        yield
