"""The trainings of a comparison by number of labels: their means, differences, tables and figure.

A row is a training: the fields of its `Task`, `accuracy` and `macro_f1` in [0, 1], `seconds`, and
`name`, the line of the table that it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from support import figures, files, progress

Rows = Sequence[dict[str, Any]]


class Task(NamedTuple):
    """A training: of a method, from a run (`simsiam/A`), from `pixels` or from `nothing`."""

    method: str
    start: str
    labels: int
    draw: int


def task_of(row: dict[str, Any]) -> Task:
    """The task that a row is of."""
    return Task(*(row[name] for name in Task._fields))


def estimate_time(tasks: Sequence[Task], rows: Rows, workers: int) -> str:
    """How long so many trainings take, by those that are done."""
    spent: dict[tuple[str, bool, int], list[float]] = {}
    for row in rows:
        spent.setdefault(_kind(task_of(row)), []).append(row["seconds"])
    kinds = [_kind(task) for task in tasks]
    seconds = sum(float(np.mean(spent[kind])) for kind in kinds if kind in spent) / workers
    words = "about" if all(kind in spent for kind in kinds) else "more than"
    if not seconds and words == "more than":
        return "how long they take is known when the first of each kind are done"
    return f"{words} {progress.format_seconds(seconds)}"


def _kind(task: Task) -> tuple[str, bool, int]:
    """What tasks share that take as long as each other."""
    return task.method, task.start == "pixels", task.labels


def summarize(rows: Rows, start_seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Mean and sd over runs and draws, in [0, 1], of each name and number of labels.

    `minutes` are those of one training and of what its start took (`start_seconds`, by name).
    """
    cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["name"], row["labels"]), []).append(row)
    scores = []
    for (name, count), members in cells.items():
        score: dict[str, Any] = {"name": name, "labels": count}
        for key in ("accuracy", "macro_f1"):
            values = [row[key] for row in members]
            score[key] = float(np.mean(values))
            score[f"{key}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        spent = [row["seconds"] + start_seconds.get(row["start"], 0.0) for row in members]
        score |= {"minutes": float(np.mean(spent)) / 60, "trainings": len(members)}
        scores.append(score | {"runs": len({row["start"] for row in members})})
    return scores


def accuracy_interval(accuracy: float, count: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy of so many images, in [0, 1] (Wilson 1927)."""
    from scipy import stats

    return stats.binomtest(round(accuracy * count), count).proportion_ci(method="wilson")


def find_differences(rows: Rows, rivals: frozenset[str]) -> list[dict[str, Any]]:
    """What each name has over the best of its rivals for so many labels, in accuracy.

    The best has the largest mean over the draws that all rivals were trained on. Differences are
    paired: both on the same draws, each the mean over the runs of a name. What has no randomness of
    its own is trained once on all labels, and stands beside every draw there. `low` and `high` are
    a 95 % interval of Student's for other draws and, where a name has several runs, for other
    pretraining seeds, their half-widths combined as independent errors are. The test images stay
    these.
    """
    cells: dict[tuple[str, int], dict[int, list[float]]] = {}
    for row in rows:
        draws = cells.setdefault((row["name"], row["labels"]), {})
        draws.setdefault(row["draw"], []).append(row["accuracy"])

    def mean(cell: tuple[str, int], draw: int) -> float:
        draws = cells[cell]
        return float(np.mean(draws[draw] if len(draws) > 1 else [*draws.values()]))

    def common_draws(compared: Sequence[tuple[str, int]]) -> list[int]:
        drawn = [set(cells[cell]) for cell in compared]
        return sorted(set.intersection(*[draws for draws in drawn if len(draws) > 1] or drawn))

    found = []
    for cell in cells:
        name, count = cell
        others = [(rival, count) for rival in sorted(rivals) if (rival, count) in cells]
        if name in rivals or not others:
            continue
        shared = common_draws(others)
        best = max(others, key=lambda rival: np.mean([mean(rival, draw) for draw in shared]))
        gaps = [mean(cell, draw) - mean(best, draw) for draw in common_draws([cell, best])]
        row = {"name": name, "labels": count, "opponent": best[0], "draws": len(gaps)}
        row |= {"difference": float(np.mean(gaps)), "low": None, "high": None}
        if len(gaps) > 1:
            runs = np.mean([cells[cell][draw] for draw in sorted(cells[cell])], 0)  # each run's
            half = math.hypot(half_width(gaps), half_width(runs))
            row |= {"low": row["difference"] - half, "high": row["difference"] + half}
        found.append(row)
    return found


def half_width(values: Sequence[float]) -> float:
    """Half of Student's 95 % interval of a mean; 0 where a single value says nothing of it."""
    from scipy import stats

    count = len(values)
    return float(stats.sem(values) * stats.t.ppf(0.975, count - 1)) if count > 1 else 0.0


COLUMNS: dict[str, Callable[[str], Any]] = {"method": str, "start": str, "labels": int, "draw": int}
COLUMNS |= dict.fromkeys(("accuracy", "macro_f1", "seconds"), files.finite)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of `few_labels.csv`; none where there is no such file."""
    return files.read_csv(path, COLUMNS)


def make_tables(scores: Rows, differences: Rows) -> str:
    """Markdown tables of accuracy, macro-F1, differences and minutes by number of labels."""

    def percent(row: dict[str, Any], key: str) -> str:
        deviation = row[f"{key}_sd"]
        return f"{100 * row[key]:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")

    def points(row: dict[str, Any]) -> str:
        interval = ""
        if row["low"] is not None:
            interval = f" [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        return f"{100 * row['difference']:+.1f}{interval}"

    parts = []
    for title, rows, cell in (
        ("accuracy in %, mean ± sd", scores, lambda row: percent(row, "accuracy")),
        ("macro-F1 in %, mean ± sd", scores, lambda row: percent(row, "macro_f1")),
        ("points over the best without pretraining, 95 % over draws and runs", differences, points),
        ("minutes, with the pretraining", scores, lambda row: f"{row['minutes']:.1f}"),
    ):
        counts = sorted({row["labels"] for row in rows})
        lines: dict[str, dict[int, str]] = {}
        for row in rows:
            lines.setdefault(row["name"], {})[row["labels"]] = cell(row)
        table = [[title, *(f"{count:,}" for count in counts)]]
        table += [[name, *(cells.get(n, "") for n in counts)] for name, cells in lines.items()]
        if lines:
            parts.append("\n".join(markdown_lines(table)))
    return "\n\n".join(parts) + "\n"


def markdown_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, head first, whose columns are as wide as their texts."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[text.ljust(n) for text, n in zip(row, widths, strict=True)] for row in rows]
    head, *rest = ["| " + " | ".join(row) + " |" for row in padded]
    return [head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rest]


def plot_scores(path: Path, rows: Rows, styles: dict[str, tuple[str, ...]], title: str) -> None:
    """Accuracy over the number of labels, with a band of ± sd: a panel per group of runs.

    The first panel has the methods without pretraining; the best of them at each number is the
    dashed line in the others.

    Args:
        path: where the picture goes.
        rows: of `scores.csv`.
        styles: of each name its panel, colour and line; the panel is empty without pretraining.
        title: of the figure.
    """
    panels: dict[str, list[str]] = {}
    for name, (panel, _, _) in styles.items():
        panels.setdefault(panel or "without pretraining", []).append(name)
    best: dict[int, float] = {}
    for row in rows:
        if row["name"] in panels.get("without pretraining", ()):
            best[row["labels"]] = max(best.get(row["labels"], 0.0), 100 * row["accuracy"])
    ticks = sorted({row["labels"] for row in rows})
    with figures.new_figure(path, title) as figure:
        every = figures.add_panels(figure, len(panels), sharey=True)
        for axes, (panel, names) in zip(every, panels.items(), strict=True):
            for name in names:
                points = sorted((r["labels"], r) for r in rows if r["name"] == name)
                counts = [count for count, _ in points]
                mean = np.array([100 * row["accuracy"] for _, row in points])
                spread = np.array([100 * (row["accuracy_sd"] or 0.0) for _, row in points])
                _, color, line = styles[name]
                label = figures.plain(name.replace(f", {panel}", ""))
                axes.plot(counts, mean, f"o{line}", color=color, label=label)
                low, high = mean - spread, mean + spread
                if len(ticks) > 1:
                    axes.fill_between(counts, low, high, color=color, alpha=0.2, linewidth=0)
                else:
                    axes.vlines(counts, low, high, color=color, alpha=0.4)
            if best and panel != "without pretraining":
                rival, look = sorted(best.items()), {"color": "black", "linestyle": "--"}
                if len(rival) > 1:
                    axes.plot(*zip(*rival, strict=True), label="best without pretraining", **look)
                else:
                    axes.axhline(rival[0][1], label="best without pretraining", **look)
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{n / 1000:g}k" if n >= 1000 else str(n) for n in ticks])
            axes.minorticks_off()
            axes.set_title(figures.plain(panel, 30))
            figures.label_axes(axes, "labelled images", "")
        figure.supylabel("accuracy (%)")
        figures.add_legend(figure)
