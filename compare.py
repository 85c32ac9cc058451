"""Compare finished runs: their numbers in a table, their curves in one figure.

    python compare.py results/rnn/a results/rnn/b
    python compare.py results/simclr/* --figure comparison.png

Reads `config.json`, `metrics.csv` and `summary.json` of the run folders, of any script that trains
epochs and of older versions. Runs that differ in nothing but their seed are one row (mean ± sd) and
one curve (mean, with a band of one standard deviation). The cells of rnn.py are rows of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import figures, files, scores
from support.errors import require
from support.runs import exit_cleanly
from support.settings import FREE_ON_RESUME, Parser, recorded_precision, value_before

# What config.json says of a run's surroundings, and settings that change no result: `config` is the
# file that others came from.
NOT_COMPARED = (FREE_ON_RESUME - {"dataset"}) | {
    "script", "command", "commit", "versions", "hardware", "threads", "processes", "started",
    "resumed", "config", "computed_in", "precision_because", "stages",
}  # fmt: skip
# The table's columns: a key of summary.json, and what stands above its numbers.
COLUMNS = {
    "linear_probe_accuracy": "linear probe %",
    "knn_accuracy": "kNN %",
    "few_label_accuracy_encoder": "few labels %",
    "finetune_accuracy": "fine-tuned %",
    "validation_accuracy": "validation %",
    "test_accuracy": "test %",
    "final_loss": "loss",
    "seconds": "minutes",
}
FIGURE_SUFFIXES = (".png", ".pdf", ".svg")
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
    folder: str = ""


def number_or_none(text: str) -> float | None:
    """A number of metrics.csv; an empty field, as of kNN between its epochs, is None."""
    return files.finite(text) if text else None


def read_run(folder: Path) -> list[Run]:
    """The run in a folder, one entry per cell.

    Raises:
        UserError: no folder of a finished run, or a file of it is damaged.
    """
    require(folder.is_dir(), f"there is no run folder {folder}")
    config = files.read_json(folder / "config.json")
    path = folder / "summary.json"
    require(path.exists(), f"{folder} has no summary.json: the run is not finished, or is a sweep")
    summary = files.read_json(path)
    path = folder / "metrics.csv"
    require(path.is_file(), f"{folder} has no metrics.csv")
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.readline().strip().split(",")
    kinds: dict[str, Callable[[str], Any]] = {"epoch": files.whole, "cell": str, "verdict": str}
    rows = files.read_csv(path, {name: kinds.get(name, number_or_none) for name in head})
    require("epoch" in head and bool(rows), f"{path} is damaged: it holds no epochs")
    script = str(config.get("script", "?"))
    settings = settings_before(script) | config | {"precision": recorded_precision(config)}
    for name in NOT_COMPARED | {"cells"}:  # a cell is a row of its own
        settings.pop(name, None)
    part = str(settings.get("evaluate_on"))
    if part.startswith("fold-"):  # each has other images in the data set's two parts
        settings |= {"evaluate_on": "fold", "fold": part}
        settings.pop("data", None)
    runs = []
    for cell in dict.fromkeys(row.get("cell", "") for row in rows):
        prefix = f"{cell}_" if cell else ""
        runs.append(
            Run(
                str(config.get("name") or folder.resolve().name),
                script,
                cell,
                settings,
                [row for row in rows if row.get("cell", "") == cell],
                {k.removeprefix(prefix): v for k, v in summary.items() if k.startswith(prefix)},
                str(folder),
            )
        )
    return runs


def settings_before(script: str) -> dict[str, Any]:
    """What each setting of a script was before the script had it, for runs of older versions."""
    path = Path(__file__).with_name(f"{script}.py")
    # The name is from a file: no other module than a script beside this one may be imported.
    if not script.isidentifier() or not path.is_file():
        return {}
    config_class = getattr(importlib.import_module(script), "Config", None)
    fields = dataclasses.fields(config_class) if config_class else ()
    values = {field.name: value_before(field) for field in fields}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}  # as JSON has it


def group(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in nothing but their seed or fold together, in order of appearance.

    A setting that one of them lacks, because the script has it no more, is no difference. Of the
    data set the pixels count, where both runs say what they were, and not its name.
    """
    groups: list[list[Run]] = []
    for run in runs:
        for others in groups:
            seeds = [(o.settings.get("seed"), o.settings.get("fold")) for o in others]
            new = (run.settings.get("seed"), run.settings.get("fold")) not in seeds
            if new and all(are_alike(run, other) for other in others):
                others.append(run)
                break
        else:
            groups.append([run])
    return groups


def are_alike(run: Run, other: Run) -> bool:
    """Whether two runs differ in nothing but their seed or fold, as `group` says."""
    known = run.settings.get("data") and other.settings.get("data")
    both = run.settings.keys() & other.settings.keys()
    both -= {"seed", "fold", "dataset" if known else "data"}
    same = all(run.settings[key] == other.settings[key] for key in both)
    return same and (run.script, run.cell) == (other.script, other.cell)


def name_groups(groups: Sequence[Sequence[Run]]) -> list[str]:
    """A name for each group: that of its first run, and the cell where there are several."""
    names = []
    several = len({runs[0].cell for runs in groups}) > 1
    for runs in groups:
        parts = [runs[0].name, runs[0].cell if several else ""]
        names.append(" ".join(part for part in parts if part))
    scripts = [runs[0].script for runs in groups]
    if len(set(names)) < len(names):  # runs of several scripts may have the same name
        names = [f"{script} {name}" for script, name in zip(scripts, names, strict=True)]
    if len(set(names)) < len(names):  # and so may those of one script in several places
        names = [f"{runs[0].folder} {runs[0].cell}".strip() for runs in groups]
    return names


def shown_value(run: Run, key: str) -> float | None:
    """A number of the summary as the table has it: accuracies in percent, time in minutes."""
    value = run.summary.get(key)
    if isinstance(value, dict):
        value = value.get("mean")
    if not isinstance(value, int | float):
        return None
    return value / 60 if key == "seconds" else value * 100 if "accuracy" in key else value


def make_table(groups: Sequence[Sequence[Run]], names: Sequence[str]) -> list[list[str]]:
    """The table's rows, head first; columns that no run fills are left out."""
    rows = [["run", "seeds", *COLUMNS.values()]]
    for runs, name in zip(groups, names, strict=True):
        row = [name, str(len(runs))]
        for key in COLUMNS:
            values = [value for run in runs if (value := shown_value(run, key)) is not None]
            digits = 3 if key == "final_loss" else 1
            text = f"{statistics.mean(values):.{digits}f}" if values else ""
            if len(values) > 1:
                text += f" ± {statistics.stdev(values):.{digits}f}"
            if 0 < len(values) < len(runs):
                text += f" (of {len(values)})"
            row.append(text)
        rows.append(row)
    kept = [i for i in range(len(rows[0])) if i < 2 or any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def describe_differences(groups: Sequence[Sequence[Run]], names: Sequence[str]) -> list[str]:
    """A line per group with the settings that other groups have, too, but with other values."""
    lines = []
    for runs, name in zip(groups, names, strict=True):
        first = runs[0]
        others = [other[0].settings for other in groups]
        pixels = {other.get("data") for other in others}
        hidden = {"seed", "fold"}
        if len(pixels) == 1 and None not in pixels:  # under two names, perhaps
            hidden.add("dataset")
        keys = [
            key
            for key, value in first.settings.items()
            if key not in hidden and any(other.get(key, value) != value for other in others)
        ]
        words = [f"{key} {first.settings[key]}" for key in keys]
        if words:
            lines.append(f"{name}: {', '.join(words)}")
    return lines


def plot_curves(groups: Sequence[Sequence[Run]], names: Sequence[str], path: Path) -> None:
    """Overlay the curves: a colour per group, dashed on training images of rnn.py."""
    title = ""
    if any(run.cell for runs in groups for run in runs):
        title = "Training images dashed, validation images solid"
    many = len(groups) > len(figures.LINE_COLORS)
    colors = figures.class_colors(len(groups)) if many else figures.LINE_COLORS[: len(groups)]
    with figures.new_figure(path, title) as figure:
        panels = figures.add_panels(figure, len(PANELS))
        for axes, (unit, columns) in zip(panels, PANELS.items(), strict=True):
            for runs, name, color in zip(groups, names, colors, strict=True):
                for column, style in columns.items():
                    curve = mean_curve(runs, column, 100 if "%" in unit else 1)
                    if not curve:
                        continue
                    epochs, means, low, high = zip(*curve, strict=True)
                    label = figures.plain(name, 70) if style == "-" else None
                    marker = "o" if len(epochs) < 3 else None
                    axes.plot(epochs, means, style, color=color, label=label, marker=marker)
                    if len(runs) > 1:
                        axes.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
            figures.label_axes(axes, "epoch", unit)
        figures.add_legend(figure)


def mean_curve(
    runs: Sequence[Run], column: str, factor: float
) -> list[tuple[int, float, float, float]]:
    """Epoch, mean, mean - sd and mean + sd over the runs, for the epochs that all of them have."""
    series = [
        {row["epoch"]: row[column] * factor for row in run.rows if row.get(column) is not None}
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
    """Print the table and draw the figure; return the table's rows, head first.

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
    suffixes = ", ".join(FIGURE_SUFFIXES)
    require(parsed.figure.suffix in FIGURE_SUFFIXES, f"--figure must end in one of {suffixes}")
    places = [folder.resolve() for folder in parsed.runs]
    for folder, place in zip(parsed.runs, places, strict=True):
        require(places.count(place) == 1, f"{folder} is given twice")
    runs = [run for folder in parsed.runs for run in read_run(folder)]
    require(len(runs) > 1, "give at least two runs to compare")
    groups = group(runs)
    names = name_groups(groups)
    rows = make_table(groups, names)
    print("\n".join(scores.markdown_lines(rows)))
    for line in describe_differences(groups, names):
        print(line)
    plot_curves(groups, names, parsed.figure)
    print(f"The curves are in {parsed.figure}.")
    return rows


if __name__ == "__main__":
    exit_cleanly(lambda: main(sys.argv[1:]))
