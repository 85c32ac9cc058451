"""What all pictures share: their look, how they are saved, legends, panels, bars and texts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from support import datasets, files

WIDTH, HEIGHT = 6.4, 3.6  # inches; 960 pixels wide, read at half of that in a README
STYLE = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "figure.titlesize": 11,
    "figure.labelsize": 10,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "legend.columnspacing": 1.5,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.handletextpad": 0.5,
    "legend.labelspacing": 0.3,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "scatter.edgecolors": "none",
}
# Paul Tol's "vibrant" scheme, safe for colour-blind readers, grey darkened to be visible on white.
LINE_COLORS = ("#0077BB", "#EE7733", "#009988", "#CC3311", "#33BBEE", "#EE3377", "#777777")
TRAIN_COLOR, TEST_COLOR, BEST_COLOR = LINE_COLORS[:3]
# His "muted" scheme, likewise.
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


@contextlib.contextmanager
def new_figure(
    path: Path, title: str = "", height: float = HEIGHT, width: float = WIDTH
) -> Iterator[Any]:
    """An empty figure of so many inches, which is saved when the block ends.

    Within the block everything is drawn in the look of this repository, whatever the user's own
    style is; that one is left as it is, and so is pyplot. The user's fonts supply the letters that
    ours lacks, such as Chinese ones.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    fonts = {"font.family": ["DejaVu Sans", *matplotlib.rcParams["font.family"]]}
    with matplotlib.style.context(STYLE | fonts, after_reset=True):
        figure = Figure(figsize=(width, height))
        if title:
            figure.suptitle(plain(title), wrap=True)
        yield figure
        save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format that the path's suffix names, atomically."""
    with files.atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])


def plain(text: str, longest: int = 200) -> str:
    """A text of the user's, such as the name of a folder, as matplotlib shows it letter by letter.

    It would take `$` for the start of a formula, and leave out of a legend what begins with `_`.
    """
    text = text.encode(errors="replace").decode()  # half a surrogate pair has no glyph
    if len(text) > longest:  # names often differ at their ends
        text = f"{text[: longest // 2]}…{text[len(text) - (longest - 1) // 2 :]}"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def add_panels(figure: Any, count: int, **shared: Any) -> list[Any]:
    """So many axes, two or three in a row; the figure becomes as high as they need."""
    columns = min(count, 2 if count == 4 else 3)
    rows = math.ceil(count / columns)
    figure.set_figheight(HEIGHT + 1.9 * (rows - 1))
    grid = figure.subplots(rows, columns, squeeze=False, **shared).ravel()
    for axes in grid[count:]:
        axes.remove()
    return list(grid[:count])


def label_axes(axes: Any, x: str, y: str) -> None:
    """Label the axes; `epoch` ticks are whole numbers."""
    if x == "epoch":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def hide_axes(axes: Any) -> None:
    """Leave neither ticks nor lines around a picture or a map."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def add_legend(figure: Any) -> Any:
    """One legend of all axes below them; the figure grows by its height.

    What has the same text in several axes is there once, what has it twice in one axes twice.
    """
    shown = {}
    for axes in figure.axes:
        handles, texts = axes.get_legend_handles_labels()
        for place, (handle, text) in enumerate(zip(handles, texts, strict=True)):
            shown[text, texts[:place].count(text)] = handle
    labels = [text for text, _ in shown]
    legend = figure.legend(shown.values(), labels)  # to measure its only column
    width = legend.get_window_extent().width + 20  # pixels, with the gap to the next column
    legend.remove()
    rows = math.ceil(max(1, len(shown)) / max(1, figure.bbox.width // width))
    where = {"loc": "outside lower center", "ncols": max(1, math.ceil(len(shown) / rows))}
    legend = figure.legend(shown.values(), labels, **where)
    figure.set_figheight(figure.get_figheight() + legend.get_window_extent().height / figure.dpi)
    return legend


def draw_line(
    axes: Any, rows: Sequence[dict[str, float]], key: str, label: str, color: str
) -> None:
    """A column of `metrics.csv` over epochs; rows that lack it are left out."""
    points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    marker = "o" if len(points) < 3 else None
    axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker)


def plot_loss(path: Path, history: Sequence[dict[str, float]], title: str) -> None:
    """The column `loss` of `history` over epochs."""
    with new_figure(path, title) as figure:
        axes = figure.subplots()
        draw_line(axes, history, "loss", "train", TRAIN_COLOR)
        label_axes(axes, "epoch", "loss")


def draw_bars(axes: Any, percent: Mapping[str, float]) -> None:
    """Horizontal bars, the first on top, with names and numbers; the figure fits their number."""
    axes.figure.set_figheight(1 + 0.27 * len(percent))
    rows = range(len(percent))
    axes.barh(rows, list(percent.values()), color=TRAIN_COLOR, height=0.7)
    axes.set_yticks(rows, [plain(name, 24) for name in percent])
    for row, value in enumerate(percent.values()):  # at a bar's foot, clear of any line
        where, color = (1, "white") if value > 12 else (value + 1, "black")
        axes.text(where, row, f"{value:.1f}", va="center_baseline", color=color)
    axes.set_xlim(0, 100)
    axes.set_ylim(len(percent) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def separate_texts(texts: Sequence[Any]) -> None:
    """Move texts of one axes apart, each to the nearest free place within the axes.

    A text that touches no other stays, and where there is no room, too. From a text that has left
    its place a thin line leads back there. To be called when all else is drawn.
    """
    axes = texts[0].axes
    axes.figure.draw_without_rendering()  # which lays it out
    frame = axes.get_window_extent()
    columns, rows = np.arange(frame.x0, frame.x1, 5), np.arange(frame.y0, frame.y1, 5)
    grid = np.stack(np.meshgrid(columns, rows), -1).reshape(-1, 2)  # (P, 2), in pixels
    boxes = [text.get_window_extent().padded(6, 1) for text in texts]
    alone_first = sorted(
        zip(texts, boxes, strict=True), key=lambda pair: sum(map(pair[1].overlaps, boxes))
    )
    middles, halves = np.empty((0, 2)), np.empty((0, 2))  # of those that have their place
    for text, box in alone_first:
        half, old = np.array(box.size) / 2, np.array((box.min + box.max) / 2)
        places = np.vstack((old, grid))
        inside = (places - half >= frame.min) & (places + half <= frame.max)  # (P, 2)
        apart = np.any(np.abs(places[:, None] - middles) >= half + halves, axis=2)  # (P, placed)
        free = np.all(inside, axis=1) & np.all(apart, axis=1)
        places = places[free] if free.any() else old[None]
        new = places[((places - old) ** 2).sum(1).argmin()]
        middles, halves = np.vstack((middles, new)), np.vstack((halves, half))
        if (new == old).all():
            continue
        here = axes.transData.transform(text.get_position())
        start = np.clip(here, new - half, new + half)
        text.set_position(axes.transData.inverted().transform(here + new - old))
        if math.dist(start, here) > half[1]:
            ends = axes.transData.inverted().transform((start, here))
            axes.plot(*ends.T, color="#777777", linewidth=0.8, scalex=False, scaley=False)


def class_colors(count: int) -> list[Any]:
    """A colour per class: a colour-blind safe set up to ten, a colour wheel beyond."""
    if count <= len(CLASS_COLORS):
        return CLASS_COLORS[:count]
    import matplotlib

    return list(matplotlib.colormaps["nipy_spectral"](np.linspace(0.05, 0.95, count)))


def plot_sheet(
    path: Path,
    names: Sequence[str],
    groups: Mapping[str, tuple[Sequence[Tensor], Sequence[Sequence[str]] | None]],
    title: str,
) -> None:
    """A contact sheet: images, each with groups of others beside it.

    Args:
        path: where the picture goes.
        names: of the images `(Q,)`.
        groups: by their heading, pictures `(k, C, h, w)`, uint8, for each image, and as many
            words or more to write below them, or None.
        title: of the sheet.
    """
    words = [word for _, captions in groups.values() for row in captions or () for word in row]
    step = max(1.0, 0.15 * max(map(len, words), default=0))  # from a tile to the next
    widths = {heading: step * max(map(len, tiles)) + 0.2 for heading, (tiles, _) in groups.items()}
    columns = max(11.6, sum(widths.values()))
    height = 1.7 * len(names) + 0.7
    with new_figure(path, title, WIDTH * height / columns + 0.3) as figure:
        axes = figure.subplots()
        left = 0.0
        for heading, (tiles, captions) in groups.items():
            axes.text(left, -0.5, heading, weight="bold")
            for row in range(len(names)):
                top = 1.7 * row
                for i, tile in enumerate(tiles[row]):
                    shown = datasets.as_shown(tile).expand(3, -1, -1)
                    pixels = shown.permute(1, 2, 0).numpy()  # (h, w, 3)
                    start = left + step * i
                    box = (start, start + 0.95, top + 0.95, top)
                    axes.imshow(pixels, extent=box, interpolation="nearest")
                    if captions is not None:
                        axes.text(start + 0.47, top + 1.2, captions[row][i], ha="center")
            left += widths[heading]
        for row, name in enumerate(names):
            axes.text(0, 1.7 * row - 0.1, plain(name, 70))
        axes.set_xlim(-0.05, columns)
        axes.set_ylim(height - 0.8, -0.8)
        axes.set_axis_off()
