"""What all pictures share: an empty figure, how it is saved, its colours and its texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from support import files

TRAIN_COLOR, TEST_COLOR = "#0077BB", "#EE7733"  # blue and orange, safe for colour-blind readers
# Paul Tol's "muted" scheme, grey darkened to be visible on white.
CLASS_COLORS = [
    "#332288",
    "#88CCEE",
    "#44AA99",
    "#117733",
    "#999933",
    "#DDCC77",
    "#CC6677",
    "#882255",
    "#AA4499",
    "#777777",
]


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, outside pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format that the path's suffix names, atomically."""
    with files.atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])


def plain(text: str, longest: int = 200) -> str:
    """A text of the user's, such as the name of a folder, as matplotlib shows it letter by letter.

    It would take `$` for the start of a formula, and leave out of a legend what begins with `_`.
    """
    text = text.encode(errors="replace").decode()  # half a surrogate pair has no glyph
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def style_axes(axes: Any, x: str, y: str) -> None:
    """Label the axes, with a light grid and without the box; `epoch` ticks are whole numbers."""
    if x == "epoch":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def class_colors(count: int) -> list[Any]:
    """A colour per class: a colour-blind safe set up to ten, a colour wheel beyond."""
    if count <= len(CLASS_COLORS):
        return CLASS_COLORS[:count]
    import matplotlib

    return list(matplotlib.colormaps["nipy_spectral"](np.linspace(0.05, 0.95, count)))
