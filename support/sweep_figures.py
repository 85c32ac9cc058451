"""The pictures of a sweep, from its study: history, settings, timeline, what mattered."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from support import figures

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
    compared: Sequence[Any] | None = None,
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
        compared: the trials that can be compared, where not all can; the timeline has all.
    """
    import optuna

    ended = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    compared = sorted(ended if compared is None else compared, key=lambda trial: trial.number)
    results = []  # trials that have a value, with the last one
    for trial in compared:
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
    plot_timeline(folder / "timeline.png", ended, title)
    if sum(trial.state.name == "COMPLETE" for trial, _ in shown) > 1:  # It compares trials.
        same = optuna.create_study(direction=study.direction)
        same.add_trials(compared)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It dislikes a setting with a single value.
            shares = optuna.importance.get_param_importances(same, params=list(parameters))
        plot_importances(folder / "param_importances.png", shares, title)


def scatter_by_state(axes: Any, dots: Sequence[tuple[Any, float, float]], **look: Any) -> None:
    """Dots `(trial, x, y)`, a colour for each state of the trials."""
    for state, color in STATE_COLORS.items():
        points = [(x, y) for trial, x, y in dots if trial.state.name == state]
        if points:
            axes.scatter(*zip(*points, strict=True), facecolor=color, label=state.lower(), **look)


def plot_history(
    path: Path, results: Results, minimized: bool, value_name: str, title: str
) -> None:
    """The value of each trial over their numbers, and the best so far of those complete."""
    with figures.new_figure(path, title) as figure:
        axes = figure.subplots()
        scatter_by_state(axes, [(trial, trial.number, value) for trial, value in results])
        done = [(trial.number, v) for trial, v in results if trial.state.name == "COMPLETE"]
        if done:
            numbers, best = map(np.array, zip(*sorted(done), strict=True))
            best = (np.minimum if minimized else np.maximum).accumulate(best)
            last = max(trial.number for trial, _ in results)
            steps = {"where": "post", "color": figures.BEST_COLOR, "label": "best so far"}
            axes.step([*numbers, last], [*best, best[-1]], **steps)
        figures.label_axes(axes, "trial", value_name)
        figures.add_legend(figure)


def plot_intermediate_values(
    path: Path, trials: Sequence[Any], cap: float, value_name: str, title: str
) -> None:
    """What trials reported, epoch by epoch; a line is a trial."""
    with figures.new_figure(path, title) as figure:
        axes = figure.subplots()
        first = {trial.state.name: trial for trial in reversed(trials)}  # stands for its state
        for trial in trials:
            epochs = [step + 1 for step in trial.intermediate_values]
            values = [min(cap, value) for value in trial.intermediate_values.values()]
            state = trial.state.name
            label = state.lower() if trial is first[state] else None
            look = {"color": STATE_COLORS[state], "alpha": 0.5, "linewidth": 1}
            axes.plot(epochs, values, marker=".", label=label, **look)
        figures.label_axes(axes, "epoch", value_name)
        figures.add_legend(figure)


def plot_timeline(path: Path, trials: Sequence[Any], title: str) -> None:
    """When each trial ran, as a bar from its start to its end."""
    first = min(trial.datetime_start for trial in trials)
    with figures.new_figure(path, title) as figure:
        axes = figure.subplots()
        for state, color in STATE_COLORS.items():
            chosen = [trial for trial in trials if trial.state.name == state]
            starts = [(trial.datetime_start - first).total_seconds() / 3600 for trial in chosen]
            hours = [trial.duration.total_seconds() / 3600 for trial in chosen]
            if chosen:
                look = {"color": color, "label": state.lower()}
                axes.barh([trial.number for trial in chosen], hours, left=starts, **look)
        figures.label_axes(axes, "hours since the first trial began", "trial")
        figures.add_legend(figure)


def plot_importances(path: Path, shares: Mapping[str, float], title: str) -> None:
    """How much each setting mattered, by Optuna's estimate; the shares add up to 1."""
    with figures.new_figure(path, title) as figure:
        axes = figure.subplots()
        figures.draw_bars(axes, {n.replace("_", " "): 100 * v for n, v in shares.items()})
        figures.label_axes(axes, "importance (%)", "")


def plot_settings(
    path: Path,
    results: Results,
    parameters: Sequence[str],
    winner: int,
    value_name: str,
    title: str,
) -> None:
    """A panel for each setting: its value in each trial against the result; a star is the best."""
    with figures.new_figure(path, title) as figure:
        panels = figures.add_panels(figure, len(parameters), sharey=True)
        for name, axes in zip(parameters, panels, strict=True):
            chosen = [(trial, value) for trial, value in results if name in trial.params]
            places = scale_axis(axes, {trial.number: trial.params[name] for trial, _ in chosen})
            dots = [(trial, places[trial.number], value) for trial, value in chosen]
            scatter_by_state(axes, dots, alpha=0.6)
            star = {"s": 130, "facecolor": figures.BEST_COLOR, "edgecolor": "white", "marker": "*"}
            for trial, x, y in dots:
                if trial.number == winner:
                    axes.scatter(x, y, label="best", zorder=3, **star)
            figures.label_axes(axes, name.replace("_", " "), "")
        figure.supylabel(value_name)
        figures.add_legend(figure)


def scale_axis(axes: Any, drawn: Mapping[int, Any]) -> Mapping[int, float]:
    """Give the x axis scale and ticks for what trials have drawn; return where each trial stands.

    `drawn` and what is returned have the trials' numbers as keys.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    values = set(drawn.values())
    if len(values) <= 2 or not all(isinstance(value, float) for value in values):
        # A column for each choice, within which trials stand side by side.
        choices = sorted(values, key=lambda value: (str(type(value)), value))
        axes.set_xticks(range(len(choices)), [str(choice) for choice in choices])
        axes.set_xlim(-0.5, len(choices) - 0.5)
        return {
            number: choices.index(value) + 0.5 * (number * 0.618 % 1 - 0.5)
            for number, value in drawn.items()
        }
    low, high = min(values), max(values)
    if low > 0 and high / low > 10:
        axes.set_xscale("log")
        if high / low < 100:  # a power of ten or two say too little
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
    return drawn
