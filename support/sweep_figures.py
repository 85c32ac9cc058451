"""The pictures of a sweep, from its study: history, settings, timeline, what mattered."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from support import figures, files

if TYPE_CHECKING:
    import optuna

Results = Sequence[tuple[Any, float]]  # trials of Optuna, each with its value
STATE_COLORS = {"COMPLETE": figures.TRAIN_COLOR, "PRUNED": figures.TEST_COLOR, "FAIL": "black"}


def plot_sweep(
    study: optuna.Study,
    folder: Path,
    title: str,
    value_name: str,
    parameters: Sequence[str],
    winner: int,
) -> None:
    """The pictures of a sweep: history, settings, timeline, what mattered, and trials by epoch.

    Args:
        study: with one trial at least that has a value.
        folder: gets `optimization_history.png`, `settings.png`, `timeline.png`, and, where there
            are two complete trials, `param_importances.png`; where trials report values while they
            run, also `intermediate_values.png`.
        title: of all pictures.
        value_name: what the objective is.
        parameters: those that are searched.
        winner: number of the best trial.
    """
    import optuna.visualization.matplotlib as plots

    results = []  # trials that have a value, with the last one
    for trial in study.get_trials(deepcopy=False):
        reported = [*trial.intermediate_values.values(), trial.value]
        if known := [value for value in reported if value is not None]:
            results.append((trial, known[-1]))
    minimized = study.direction.name == "MINIMIZE"
    # Diverged trials would squeeze all others into a line.
    cap = 1.5 * float(np.median([value for _, value in results])) if minimized else math.inf
    note = value_name
    if max(value for _, value in results) > cap:
        note += f", cut off at {cap:.2f}"
    shown = [(trial, min(cap, value)) for trial, value in results]
    plot_history(folder / "optimization_history.png", shown, minimized, note, title)
    plot_settings(folder / "settings.png", shown, parameters, winner, note, title)
    if any(trial.intermediate_values for trial, _ in shown):
        trials = [trial for trial, _ in shown]
        plot_intermediate_values(folder / "intermediate_values.png", trials, cap, note, title)
    wanted = {"timeline": lambda: plots.plot_timeline(study)}
    if sum(trial.state.name == "COMPLETE" for trial, _ in shown) > 1:  # It compares trials.
        wanted["param_importances"] = lambda: plots.plot_param_importances(
            study, params=list(parameters)
        )
    for name, plot in wanted.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # They are experimental, and dislike a single value.
            _save_optunas_figure(plot, folder / f"{name}.png", f"{title}: {name.replace('_', ' ')}")


def _save_optunas_figure(plot: Any, path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context():  # Optuna changes the style of all later figures.
        drawn: Any = plot().figure
        drawn.axes[0].set_title("", loc="left")  # One of Optuna's titles is there.
        drawn.axes[0].set_title(title)
        drawn.set_size_inches(10, 5)
        with files.atomic_file(path) as temporary:
            drawn.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
        plt.close(drawn)


def plot_history(
    path: Path, results: Results, minimized: bool, value_name: str, title: str
) -> None:
    """The value of each trial over their numbers, and the best so far of those complete."""
    figure = figures.new_figure(8, 4)
    axes = figure.subplots()
    for state, color in STATE_COLORS.items():
        dots = [(trial.number, value) for trial, value in results if trial.state.name == state]
        if dots:
            axes.scatter(*zip(*dots, strict=True), s=14, color=color, label=state.lower())
    done = [(trial.number, v) for trial, v in results if trial.state.name == "COMPLETE"]
    if done:
        numbers, best = map(np.array, zip(*sorted(done), strict=True))
        best = (np.minimum if minimized else np.maximum).accumulate(best)
        last = max(trial.number for trial, _ in results)
        steps = {"where": "post", "color": "#009988", "label": "best so far"}
        axes.step([*numbers, last], [*best, best[-1]], **steps)
    figures.style_axes(axes, "trial", value_name)
    figure.suptitle(title)
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    figures.save_figure(figure, path)


def plot_intermediate_values(
    path: Path, trials: Sequence[Any], cap: float, value_name: str, title: str
) -> None:
    """What trials reported, epoch by epoch; a line is a trial."""
    figure = figures.new_figure(8, 4)
    axes = figure.subplots()
    for state, color in STATE_COLORS.items():
        chosen = [trial for trial in trials if trial.state.name == state]
        for trial in chosen:
            epochs = [step + 1 for step in trial.intermediate_values]
            values = [min(cap, value) for value in trial.intermediate_values.values()]
            label = state.lower() if trial is chosen[0] else None
            axes.plot(epochs, values, color=color, marker=".", alpha=0.5, label=label)
    figures.style_axes(axes, "epoch", value_name)
    figure.suptitle(title)
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    figures.save_figure(figure, path)


def plot_settings(
    path: Path,
    results: Results,
    parameters: Sequence[str],
    winner: int,
    value_name: str,
    title: str,
) -> None:
    """A panel for each setting: its value in each trial against the result; a star is the best."""
    from matplotlib.ticker import LogLocator, NullFormatter

    columns = min(4, len(parameters))
    rows = math.ceil(len(parameters) / columns)
    figure = figures.new_figure(2.6 * columns, 2.3 * rows + 0.8)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for name, axes in zip(parameters, grid.flat, strict=False):
        chosen = [(trial, value) for trial, value in results if name in trial.params]
        drawn = [trial.params[name] for trial, _ in chosen]
        if all(isinstance(value, float) for value in drawn) and len(set(drawn)) > 2:
            places = drawn
            if min(drawn) > 0 and max(drawn) / min(drawn) > 10:
                axes.set_xscale("log")
                wide = max(drawn) / min(drawn) > 100
                axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 3)))
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter(NullFormatter())
        else:  # a column for each choice, within which trials stand side by side
            choices = sorted(set(drawn), key=lambda value: (str(type(value)), value))
            places = [
                choices.index(value) + 0.5 * (trial.number * 0.618 % 1 - 0.5)
                for value, (trial, _) in zip(drawn, chosen, strict=True)
            ]
            axes.set_xticks(range(len(choices)), [str(choice) for choice in choices])
        dots = [(x, y, trial) for x, (trial, y) in zip(places, chosen, strict=True)]
        for state, color in STATE_COLORS.items():
            points = [(x, y) for x, y, trial in dots if trial.state.name == state]
            if points:
                style = {"s": 12, "color": color, "alpha": 0.6, "linewidths": 0}
                axes.scatter(*zip(*points, strict=True), label=state.lower(), **style)
        star = {"s": 130, "color": "#009988", "edgecolors": "white", "zorder": 3, "marker": "*"}
        for x, y, trial in dots:
            if trial.number == winner:
                axes.scatter(x, y, label="best", **star)
        figures.style_axes(axes, name.replace("_", " "), "")
    for axes in grid.flat[len(parameters) :]:
        axes.remove()
    figure.supylabel(value_name, size="medium")
    figure.suptitle(title)
    handles: dict[str, Any] = {}
    for axes in grid.flat[: len(parameters)]:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), frameon=False, loc="outside lower center", ncols=4
    )
    figures.save_figure(figure, path)
