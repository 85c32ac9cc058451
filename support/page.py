"""`embedding.html`: a map of images as one file that opens offline in a browser.

Zoom with the wheel, drag to move, click a class in the legend to hide it. Hovering a point shows
its image, class, file, what the linear probe says, and its five nearest neighbours.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from support import datasets, figures, files, neighbours

TILE = 32  # pixels; larger images are scaled down, so that 10,000 fit into a few megabytes
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>@TITLE@</title>
<style>
body { margin: 0; font: 15px system-ui, sans-serif; display: flex; height: 100vh; color: #222; }
main { flex: 1; min-width: 0; display: flex; flex-direction: column; }
h1 { font-size: 1.1em; margin: .7em 1em 0; }
#map { flex: 1; min-height: 0; }
aside { width: 15em; padding: 1em; border-left: 1px solid #ddd; overflow-y: auto; }
.tile { background-image: url(@SPRITE@); image-rendering: pixelated; }
.neighbour { display: flex; align-items: center; gap: .7em; margin: .4em 0; }
.wrong { color: #b00020; }
.name { overflow-wrap: anywhere; min-width: 0; }
h2 { font-size: 1em; margin: 1.2em 0 .3em; }
</style>
<main><h1>@TITLE@</h1><div id="map"></div></main>
<aside id="panel">Point at an image. The wheel zooms, dragging moves, a click on a class hides or
shows it.</aside>
<script>@PLOTLY@</script>
<script>
const data = @DATA@;
const webgl = document.createElement("canvas").getContext("webgl");
const traces = data.classes.map((name, label) => ({
  type: webgl ? "scattergl" : "scatter", mode: "markers", name, hoverinfo: "none",
  x: [], y: [], customdata: [], marker: {size: 5, color: data.colors[label]},
}));
data.points.forEach(([x, y], i) => {
  const trace = traces[data.labels[i]];
  trace.x.push(x); trace.y.push(y); trace.customdata.push(i);
});
const axis = {visible: false, zeroline: false};
const layout = {
  dragmode: "pan", hovermode: "closest", margin: {l: 5, r: 5, t: 40, b: 5},
  xaxis: axis, yaxis: {...axis, scaleanchor: "x"},
  showlegend: data.classes.length > 1, legend: {itemsizing: "constant"},
};
const map = document.getElementById("map"), panel = document.getElementById("panel");
Plotly.newPlot(map, traces, layout, {
  scrollZoom: true, responsive: true, displaylogo: false,
  modeBarButtonsToRemove: ["select2d", "lasso2d"],
});

function add(parent, tag, text, kind) {
  const element = parent.appendChild(document.createElement(tag));
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return element;
}
function picture(parent, i, side) {
  const tile = add(parent, "div", undefined, "tile"), columns = data.columns;
  tile.style.width = tile.style.height = side + "px";
  tile.style.flexShrink = 0;
  tile.style.backgroundSize = columns * side + "px auto";
  tile.style.backgroundPosition = `-${i % columns * side}px -${Math.floor(i / columns) * side}px`;
}
function show(i) {
  panel.replaceChildren();
  picture(panel, i, 160);
  const name = k => data.classes[k];
  if (data.labelled) add(panel, "h2", name(data.labels[i]));
  if (data.names) add(panel, "div", data.names[i], "name");
  if (data.predictions) {
    const right = data.predictions[i] === data.labels[i];
    add(panel, "div", "the probe says: " + name(data.predictions[i]), right ? "" : "wrong");
  }
  add(panel, "h2", "nearest neighbours");
  for (const j of data.neighbours[i]) {
    const line = add(panel, "div", undefined, "neighbour");
    picture(line, j, 48);
    if (data.labelled) add(line, "span", name(data.labels[j]));
    else if (data.names) add(line, "span", data.names[j], "name");
  }
}
map.on("plotly_hover", event => show(event.points[0].customdata));
</script>
</html>
"""


def nearest(features: Tensor, count: int = 5) -> Tensor:
    """Positions `(N, count)` of each feature's nearest others by cosine, nearest first."""
    features = F.normalize(features.float(), dim=1)
    return neighbours.find_nearest(features, features, count)[1]


def shrink(images: Tensor, side: int) -> Tensor:
    """Images `(N, C, H, W)`, uint8, as `(N, C, side, side)`; smaller ones as they are."""
    if max(images.shape[2:]) <= side:
        return images
    small = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).byte()


def sprite(images: Tensor) -> tuple[bytes, int]:
    """All images `(N, C, H, W)`, uint8, as the tiles of one WebP, and the number of columns."""
    from PIL import Image

    shown = datasets.as_shown(images)
    tiles = torch.cat([shrink(part.cpu(), TILE) for part in shown.split(500)])
    count, channels, height, width = tiles.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = torch.zeros(rows * columns, channels, height, width, dtype=torch.uint8)
    sheet[:count] = tiles
    sheet = sheet.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = sheet.reshape(rows * height, columns * width, channels).expand(-1, -1, 3)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "WEBP", quality=80)
    return file.getvalue(), columns


def write_page(
    path: Path,
    coordinates: np.ndarray,
    images: Tensor,
    names: np.ndarray | None,
    neighbours: Tensor,
    labels: np.ndarray | None,
    classes: Sequence[str],
    predictions: np.ndarray | None,
    title: str,
) -> None:
    """Write the page, atomically.

    Args:
        path: of the file.
        coordinates: `(N, 2)`.
        images: `(N, C, H, W)`, uint8.
        names: `(N,)`, of their files, or None.
        neighbours: `(N, k)`, the positions of those that each image is shown with.
        labels: `(N,)`, or None.
        classes: their names, none without labels.
        predictions: `(N,)`, the linear probe's, or None.
        title: of the page.
    """
    import matplotlib.colors
    from plotly.offline import get_plotlyjs

    colors = figures.class_colors(len(classes)) or [figures.TRAIN_COLOR]
    tiles, columns = sprite(images)
    data = {
        "classes": list(classes) or ["images"],
        "colors": [matplotlib.colors.to_hex(color) for color in colors],
        "points": np.round(coordinates.astype(float), 3).tolist(),
        "names": None if names is None else names.tolist(),
        "labelled": labels is not None,
        "labels": labels.tolist() if labels is not None else [0] * len(coordinates),
        "predictions": None if predictions is None else predictions.tolist(),
        "neighbours": neighbours.tolist(),
        "columns": columns,
    }
    parts = {
        "@TITLE@": html.escape(title),
        "@SPRITE@": "data:image/webp;base64," + base64.b64encode(tiles).decode(),
        "@PLOTLY@": get_plotlyjs(),
        # A class may be called like a tag: the name of a folder.
        "@DATA@": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = re.sub("|".join(parts), lambda mark: parts[mark[0]], PAGE)
    with files.atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
