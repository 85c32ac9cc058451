"""Compare finished runs: their numbers in a table, their curves in one figure.

    python compare.py results/rnn/a results/rnn/b
    python compare.py results/simclr/* --figure comparison.png

Reads `config.json`, `metrics.csv` and `summary.json` of the run folders, of any script. Runs that
differ in nothing but their seed are one row (mean ± sd) and one curve (mean, with a band of one
standard deviation). The cells of rnn.py are rows of their own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import functions
from support import files
from support.errors import require
from support.runs import exit_cleanly
from support.settings import FREE_ON_RESUME, Parser

# What config.json says besides the settings, and settings that change no result.
FACTS = frozenset(
    {"command", "commit", "versions", "hardware", "threads", "processes", "started", "resumed"}
    | {"data", *FREE_ON_RESUME}
) - {"dataset"}
COLUMNS = {  # key of the summary to the head of a column
    "linear_probe_accuracy": "linear probe %",
    "knn_accuracy": "kNN %",
    "few_label_accuracy_encoder": "few labels %",
    "finetune_accuracy": "fine-tuned %",
    "validation_accuracy": "validation %",
    "test_accuracy": "test %",
    "final_loss": "loss",
    "seconds": "minutes",
}
# Paul Tol's "bright" scheme, whose lines are easier to tell apart than the classes' colours.
COLORS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#555555")
KINDS = (".png", ".pdf", ".svg")
# Which columns of metrics.csv a panel shows, and the style of each.
PANELS = {
    "loss": {"loss": "-", "train_loss": "--", "validation_loss": "-"},
    "accuracy (%)": {"knn_held_out": "-", "train_accuracy": "--", "validation_accuracy": "-"},
}


@dataclass(frozen=True)
class Run:
    """One cell of a run of rnn.py, or a run of another script."""

    name: str
    script: str
    cell: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]


def number(text: str) -> float | None:
    """A cell of metrics.csv; empty ones, as of kNN between its epochs, are None."""
    return files.finite(text) if text else None


def read_run(folder: Path) -> list[Run]:
    """The run in a folder, one entry per cell.

    Raises:
        UserError: no folder of a finished run, or a file of it is damaged.
    """
    config = files.read_json(folder / "config.json")
    path = folder / "summary.json"
    require(path.exists(), f"{folder} has no summary.json: the run is not finished, or is a sweep")
    summary = files.read_json(path)
    path = folder / "metrics.csv"
    require(path.is_file(), f"{folder} has no metrics.csv")
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.readline().strip().split(",")
    kinds: dict[str, Callable[[str], Any]] = {
        name: str if name == "cell" else number for name in head
    }
    rows = files.read_csv(path, kinds)
    require({"epoch"} <= set(head) and bool(rows), f"{path} is damaged: it holds no epochs")
    settings = {k: v for k, v in config.items() if k not in FACTS}
    cells = list(dict.fromkeys(row.get("cell", "") for row in rows))
    return [
        Run(
            str(config.get("name") or folder.resolve().name),
            str(config.get("script", "?")),
            cell,
            {k: v for k, v in settings.items() if k != "cells"},
            [row for row in rows if row.get("cell", "") == cell],
            {k.removeprefix(f"{cell}_"): v for k, v in summary.items() if not cell or cell in k},
        )
        for cell in cells
    ]


def group(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in nothing but their seed together, in order of appearance.

    A setting that one of them lacks, because the script got it later, is no difference.
    """
    groups: list[list[Run]] = []
    for run in runs:
        for others in groups:
            first = others[0]
            both = run.settings.keys() & first.settings.keys() - {"seed"}
            alike = all(run.settings[key] == first.settings[key] for key in both)
            alike &= (run.script, run.cell) == (first.script, first.cell)
            if alike and run.settings.get("seed") not in [o.settings.get("seed") for o in others]:
                others.append(run)
                break
        else:
            groups.append([run])
    return groups


def labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """A name for each group: that of its first run, and the cell where there are several."""
    names = []
    several = len({runs[0].cell for runs in groups}) > 1
    for runs in groups:
        parts = [runs[0].name, runs[0].cell if several else ""]
        names.append(" ".join(part for part in parts if part))
    scripts = [runs[0].script for runs in groups]
    if len(set(names)) < len(names):  # the same name of several scripts
        names = [f"{script} {name}" for script, name in zip(scripts, names, strict=True)]
    return names


def value_of(run: Run, key: str) -> float | None:
    """A number of the summary: accuracies in percent, time in minutes."""
    value = run.summary.get(key)
    if isinstance(value, dict):
        value = value.get("mean")
    if not isinstance(value, int | float):
        return None
    return value / 60 if key == "seconds" else value * 100 if "accuracy" in key else value


def table(groups: Sequence[Sequence[Run]], names: Sequence[str]) -> list[list[str]]:
    """The table's cells, head first; columns that no run fills are left out."""
    rows = [["run", "seeds", *COLUMNS.values()]]
    for runs, name in zip(groups, names, strict=True):
        row = [name, str(len(runs))]
        for key in COLUMNS:
            values = [value for run in runs if (value := value_of(run, key)) is not None]
            digits = 3 if key == "final_loss" else 1
            text = f"{statistics.mean(values):.{digits}f}" if values else ""
            if len(values) > 1:
                text += f" ± {statistics.stdev(values):.{digits}f}"
            row.append(text)
        rows.append(row)
    kept = [i for i in range(len(rows[0])) if i < 2 or any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def differences(groups: Sequence[Sequence[Run]], names: Sequence[str]) -> list[str]:
    """A line per group with the settings in which the groups of its script differ."""
    lines = []
    for runs, name in zip(groups, names, strict=True):
        first = runs[0]
        others = [other[0].settings for other in groups if other[0].script == first.script]
        keys = [
            key
            for key, value in first.settings.items()
            if key != "seed" and any(other.get(key, value) != value for other in others)
        ]
        words = [f"{key} {first.settings[key]}" for key in keys]
        if words:
            lines.append(f"{name}: {', '.join(words)}")
    return lines


def plot_curves(groups: Sequence[Sequence[Run]], names: Sequence[str], path: Path) -> None:
    """Overlay the curves: a colour per group, dashed on training images of rnn.py."""
    figure = functions.new_figure(10, 4)
    several = len(groups) > len(COLORS)
    colors = functions.class_colors(len(groups)) if several else COLORS[: len(groups)]
    for axes, (title, columns) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for runs, name, color in zip(groups, names, colors, strict=True):
            for column, style in columns.items():
                curve = mean_curve(runs, column, 100 if "%" in title else 1)
                if not curve:
                    continue
                epochs, means, low, high = zip(*curve, strict=True)
                label = functions.plain(name) if style == "-" else None
                marker = "o" if len(epochs) < 3 else None
                axes.plot(epochs, means, style, color=color, label=label, marker=marker)
                if len(runs) > 1:
                    axes.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
        functions.style_axes(axes, "epoch", title)
    shown = {
        text: handle
        for axes in figure.axes
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if any(run.cell for runs in groups for run in runs):
        figure.suptitle("Training images dashed, validation images solid", fontsize=10)
    figure.legend(
        shown.values(), shown, loc="outside lower center", ncols=min(4, len(shown)), frameon=False
    )
    functions.save_figure(figure, path)


def mean_curve(
    runs: Sequence[Run], column: str, factor: float
) -> list[tuple[int, float, float, float]]:
    """Epoch, mean, mean - sd and mean + sd over the runs, for the epochs that all of them have."""
    series = [
        {int(row["epoch"]): row[column] * factor for row in run.rows if row.get(column) is not None}
        for run in runs
    ]
    curve = []
    for epoch in sorted(set.intersection(*map(set, series))):
        values = [values[epoch] for values in series]
        mean = statistics.mean(values)
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        curve.append((epoch, mean, mean - sd, mean + sd))
    return curve


def main(arguments: Sequence[str]) -> list[list[str]]:
    """Print the table and draw the figure; return the table's cells.

    Raises:
        UserError: a folder that holds no finished run, or a figure that cannot be written.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument(
        "--figure",
        type=Path,
        default=Path("comparison.png"),
        help="picture to write: PNG, PDF or SVG [comparison.png]",
    )
    parsed = parser.parse_args(arguments)
    kind = parsed.figure.suffix
    require(kind in KINDS, f"--figure takes a name that ends in {', '.join(KINDS)}")
    places = [folder.resolve() for folder in parsed.runs]
    twice = [
        str(run) for run, place in zip(parsed.runs, places, strict=True) if places.count(place) > 1
    ]
    require(not twice, f"{' and '.join(twice)} are the same run")
    runs = [run for folder in parsed.runs for run in read_run(folder)]
    require(len(runs) > 1, "give at least two runs to compare")
    groups = group(runs)
    names = labels(groups)
    rows = table(groups, names)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for i, row in enumerate(rows):
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(*differences(groups, names), sep="\n")
    plot_curves(groups, names, parsed.figure)
    print(f"The curves are in {parsed.figure}.")
    return rows


if __name__ == "__main__":
    exit_cleanly(lambda: main(sys.argv[1:]))
