"""The look that all pictures share, and what each must keep: legible, whole, nothing overlaps."""

import datetime
import itertools
import math
import warnings
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optuna
import pytest
import torch
from matplotlib.text import Text

import classify
import compare
import encoded
import functions
import label_free
import simclr_hyperparameter_tune as tune
from support import datasets, figures, scores, sweep_figures

LONG = "a/name/of quite some length"


def draw_curves(path):
    rows = [{"epoch": e, "train_loss": 1 / e, "validation_loss": 2 / e} for e in range(1, 30)]
    groups = [[compare.Run(LONG, "rnn", "gru", {}, rows, {})] for _ in range(9)]
    compare.plot_curves(groups, [f"{LONG} {i}" for i in range(9)], path)


def draw_scores(path, panels=3):
    styles = {"nearest mean": ("", "#CCBB44", "-"), "FixMatch": ("", "#CC3311", "-")}
    for panel in ["simclr/base", "simsiam/A", LONG][: panels - 1]:
        styles |= {f"{n}, {panel}": (panel, c, s) for n, (_, c, s) in list(styles.items())[:2]}
    rows = [
        {"name": name, "labels": count, "accuracy": 0.2 * math.log10(count), "accuracy_sd": 0.05}
        for name in styles
        for count in (10, 100, 1000, 10000, 60000)
    ]
    scores.plot_scores(path, rows, styles, "10,000 test images of fashion-mnist, 5 draws")


def make_study(space, count=12):
    """A study in which nothing but the first setting, a logarithmic one, matters."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    for number in range(count):
        trial = study.ask()
        for name, choices in space.items():
            if isinstance(choices, list):
                trial.suggest_categorical(name, choices)
            else:
                trial.suggest_float(name, *choices, log=choices[0] > 0)
        value = 2 + math.log10(trial.params[next(iter(space))])
        for epoch in range(2 + number % 4):
            trial.report(value + 1 / (epoch + 1), epoch)
        if number % 4:
            study.tell(trial, value)
        else:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    study.ask()  # it still runs
    return study


def draw_sweep(path, space=tune.SPACE, count=12):
    study = make_study(space, count)
    title, best = "SimCLR sweep on cifar10-images", study.best_trial.number
    sweep_figures.plot_sweep(study, path.parent, title, "rotation", [*space], best)


def draw_audit(path):
    trials = [
        SimpleNamespace(
            state=optuna.trial.TrialState.COMPLETE,
            params={"epochs": epochs, "seed": 0},
            value=epochs / 99,
            user_attrs={name: 0.01 * epochs**power for power, name in enumerate(SCORES)},
        )
        for epochs in (2, 6, 18)
    ]
    tune.plot_audit(path, trials, tune.Config(max_epochs=18), "SimCLR sweep on cifar10-images")


SCORES = [*label_free.SCORES, "linear"]


def draw_sheet(path):
    tiles = torch.randint(256, (12, 5, 3, 8, 8), dtype=torch.uint8)
    groups = {"": (tiles[:, :1], None)}
    for head in ("nearest in the folder", "nearest training images"):
        groups[head] = (tiles, [["0.123"] * 5] * 12)
    figures.plot_sheet(path, [f"test/{LONG}.png"] * 12, groups, "Neighbours of cifar10-images")


def draw_doubts(path):
    labels = torch.arange(40) % 10
    images = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8)
    names = np.array([f"{functions.FASHION_MNIST_CLASSES[i]}/{LONG}.png" for i in labels])
    labelled = encoded.Collection(names, images, torch.arange(40), torch.randn(40, 16))
    found = torch.rand(40, 10).softmax(1)
    names = functions.FASHION_MNIST_CLASSES
    classify.plot_labelled(path, labelled, names, labels, found, channels=3)


def draw_map(count, spread=1.0, names=functions.FASHION_MNIST_CLASSES):
    def draw(path):
        draws = np.random.default_rng(0)
        labels = np.arange(30 * count) % count
        middles = draws.normal(size=(count, 2)) * spread
        points = middles[labels] + draws.normal(size=(len(labels), 2))
        points -= [np.median(points[labels == k], 0) - middles[k] for k in labels]
        functions.plot_scatter(path, points, labels, names[:count], "t-SNE of 10,000 images")

    return draw


def draw_history(path):
    names = ("loss", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
    rows = [{"epoch": e, **{n: 1 / (e + 1) for n in names}} for e in range(1, 51)]
    functions.plot_loss_and_accuracy(path, rows, f"Linear probe on the frozen encoder, {LONG}")


def draw_matrix(count):
    def draw(path):
        names = [f"a name, {i}" for i in range(count)]
        matrix = torch.rand(count, count, generator=torch.Generator().manual_seed(0))
        functions.plot_confusion_matrix(path, matrix + torch.eye(count), names, "Linear probe")

    return draw


def draw_views(path):
    images = torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8)
    split = datasets.ImageData("", (), datasets.Split(images, None), None).with_statistics().train
    functions.plot_views(path, images, split.normalize(torch.cat((images, images))), split)


LONG_NAMES = [f"{i} of {LONG}" for i in range(60)]
PICTURES = {
    "curves": draw_curves,
    "few labels, 2 panels": lambda path: draw_scores(path, 2),
    "few labels, 4 panels": lambda path: draw_scores(path, 4),
    "audit": draw_audit,
    "contact sheet": draw_sheet,
    "least likely labels": draw_doubts,
    "map": draw_map(10),
    "map with long names": draw_map(20, 0.01, LONG_NAMES),
    "map with many names": draw_map(60, 1, LONG_NAMES),
    "loss and accuracy": draw_history,
    "accuracy per class": lambda path: functions.plot_per_class(
        path, {name: i / 9 for i, name in enumerate(functions.CIFAR10_CLASSES)}, "Linear probe"
    ),
    "confusion of 10": draw_matrix(10),
    "confusion of 20": draw_matrix(20),
    "confusion of 60": draw_matrix(60),
    "views": draw_views,
    "sweep": draw_sweep,
}


def texts_of(figure):
    """The texts that are seen, without the labels of ticks that lie beyond the axes' limits."""
    beyond = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    beyond |= {tick.label1, tick.label2}
    found = [text for text in figure.findobj(Text) if text not in beyond]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def within(box, frame):
    horizontally = frame.x0 <= box.x0 < box.x1 <= frame.x1
    return horizontally and frame.y0 <= box.y0 < box.y1 <= frame.y1


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written, by the name of their file."""
    kept, save = {}, figures.save_figure

    def keep(figure, path):
        save(figure, path)
        kept[path.stem] = figure

    monkeypatch.setattr(figures, "save_figure", keep)
    return kept


@pytest.mark.parametrize("name", PICTURES)
def test_texts_are_legible_at_half_the_size_and_whole_and_apart(tmp_path, drawn, name):
    PICTURES[name](tmp_path / "a.png")
    assert len(drawn) == (5 if name == "sweep" else 1)
    for figure in drawn.values():
        if name not in ("confusion of 20", "confusion of 60"):
            assert figure.bbox.width == pytest.approx(960)  # 480 pixels in a README
        texts = texts_of(figure)
        assert texts
        for text in texts:
            assert text.get_size() * figure.dpi / 72 / 2 >= 10, text  # pixels, at half the size
            assert within(text.get_window_extent(), figure.bbox), text
        straight = [text for text in texts if text.get_rotation() in (0, 90)]
        corners = np.array([text.get_window_extent().get_points() for text in straight])
        low, high = corners[:, 0], corners[:, 1]  # (T, 2)
        common = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)  # (T, T, 2)
        depth = common.min(2) * (1 - np.eye(len(straight)))
        # Boxes have a margin for accents and tails, which neighbours may share.
        assert depth.max() < 4


def test_the_user_s_style_is_neither_used_nor_changed(tmp_path):
    draw_history(tmp_path / "a.png")
    with plt.style.context("dark_background"):
        matplotlib.rcParams["font.size"] = 30
        before = dict(matplotlib.rcParams), plt.get_fignums()
        draw_history(tmp_path / "b.png")
        draw_sweep(tmp_path / "a")  # Optuna's own pictures would change it
        assert (dict(matplotlib.rcParams), plt.get_fignums()) == before
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_user_s_font_has_the_letters_that_ours_lacks(tmp_path):
    def draw():
        with figures.new_figure(tmp_path / "a.png", "a \u1d81"):
            pass

    with pytest.warns(UserWarning, match="missing from"):
        draw()
    with matplotlib.rc_context({"font.family": "STIXGeneral"}), warnings.catch_warnings():
        warnings.simplefilter("error")
        draw()


def test_a_figure_that_fails_is_not_written(tmp_path):
    with pytest.raises(ZeroDivisionError), figures.new_figure(tmp_path / "a.png") as figure:
        figure.subplots().plot([1 / 0])
    assert not list(tmp_path.iterdir())


def boxes_of_names(figure):
    return [text.get_window_extent() for text in figure.axes[0].texts]


@pytest.mark.parametrize("names", [functions.FASHION_MNIST_CLASSES, LONG_NAMES[:20]])
@pytest.mark.parametrize("spread", [0.0, 0.3, 100.0])
def test_names_on_a_map_are_apart_and_within_it(tmp_path, drawn, names, spread):
    draw_map(len(names), spread, names)(tmp_path / "a.png")
    boxes = boxes_of_names(drawn["a"])
    assert len(boxes) == len(names)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    frame = drawn["a"].axes[0].get_window_extent()
    assert all(within(box, frame) for box in boxes)


def test_a_map_is_drawn_in_the_same_way_again(tmp_path):
    for stem in ("first", "again"):
        draw_map(10, 0.01)(tmp_path / f"{stem}.png")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_a_name_on_a_map_moves_no_further_than_it_must(tmp_path, drawn):
    # Three at one point and one far from them, whose place is its own.
    points = np.array([[0, 0], [0, 0], [0, 0], [9, 9], [-9, -9], [9, -9]], float)
    labels = np.array([0, 1, 2, 3, 4, 4])
    functions.plot_scatter(tmp_path / "a.png", points, labels, ["a", "b", "c", "d", "e"], "title")
    axes = drawn["a"].axes[0]
    moved = {}
    for text, median in zip(axes.texts, [(0, 0)] * 3 + [(9, 9), (0, -9)], strict=True):
        way = axes.transData.transform(text.get_position()) - axes.transData.transform(median)
        moved[text.get_text()] = math.hypot(*way)
    assert moved["a"] == moved["d"] == moved["e"] == 0
    height = axes.texts[0].get_window_extent().height
    assert 0.5 * height < moved["b"] < 2 * height
    assert 0.5 * height < moved["c"] < 2 * height


def test_a_line_leads_from_a_name_that_has_moved_to_its_place(tmp_path, drawn):
    points = np.zeros((5, 2))
    points = np.vstack((points, [[9, 9], [-9, -9]]))
    labels = np.array([0, 1, 2, 3, 4, 5, 5])
    names = [f"a rather long name {i}" for i in range(6)]
    functions.plot_scatter(tmp_path / "a.png", points, labels, names, "title")
    axes = drawn["a"].axes[0]
    assert len(axes.lines) >= 2  # whose names stand beyond the first two above and below
    boxes = boxes_of_names(drawn["a"])
    for line in axes.lines:
        (start, end) = line.get_xydata()
        np.testing.assert_allclose(end, 0, atol=1e-9)
        x, y = axes.transData.transform(start)
        assert any(box.padded(8).contains(x, y) for box in boxes)
    left, right = axes.get_xlim()
    assert left < -9 < 9 < right < 12  # the lines widen nothing


def test_a_legend_has_each_text_once_and_fits(tmp_path, drawn):
    for length in (1, 20, 40):
        with figures.new_figure(tmp_path / f"{length}.png") as figure:
            for axes in figures.add_panels(figure, 2):
                for i in range(12):
                    axes.plot([0, i], label=f"{i:02} {'w' * length}")
            figures.add_legend(figure)
        legend = figure.legends[0]
        assert len(legend.get_texts()) == 12
        box = legend.get_window_extent()
        assert within(box, figure.bbox)
        assert all(box.y1 <= axes.get_window_extent().y0 for axes in figure.axes)
        # The panels do not shrink.
        assert figure.axes[0].get_window_extent().height > 2.5 * figure.dpi


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (7, 3)])
def test_panels_stand_in_rows(tmp_path, count, columns):
    with figures.new_figure(tmp_path / "a.png") as figure:
        panels = figures.add_panels(figure, count)
    assert len(panels) == len(figure.axes) == count
    assert len({round(axes.get_position().x0, 2) for axes in panels}) == columns
    assert all(axes.get_window_extent().height > figure.dpi for axes in panels)


# what they show


def test_scores_have_a_panel_without_pretraining_and_one_for_each_group(tmp_path, drawn):
    draw_scores(tmp_path / "a.png", 3)
    first, *others = drawn["a"].axes
    assert [axes.get_title() for axes in others] == ["simclr/base", "simsiam/A"]
    assert len(first.lines) == 2
    for axes in others:  # the methods, and the best without pretraining
        assert [line.get_linestyle() for line in axes.lines] == ["-", "-", "--"]
        np.testing.assert_allclose(axes.lines[0].get_xydata()[1], (100, 40))


def test_a_legend_has_every_line_even_those_that_are_called_alike(tmp_path, drawn):
    with figures.new_figure(tmp_path / "a.png", "title") as figure:
        for axes in figures.add_panels(figure, 2):
            for name in ("one", "one", "two"):
                axes.plot([0, 1], label=name)
        figures.add_legend(figure)
    texts = [text.get_text() for text in drawn["a"].legends[0].get_texts()]
    assert texts == ["one", "one", "two"]


def test_long_names_that_differ_at_their_ends_stay_different():
    names = [figures.plain(f"diabetic_retinopathy_grade_{n}", 24) for n in range(3)]
    assert names[0] == "diabetic_ret…thy_grade_0"
    assert len(set(names)) == 3


def test_bars_of_the_timeline_are_hours(tmp_path, drawn):
    start = datetime.datetime(2026, 1, 1, 23)
    trials = []
    for number, (state, begin, minutes) in enumerate(
        [("COMPLETE", 0, 60), ("PRUNED", 30, 15), ("COMPLETE", 90, 45)]
    ):
        begin = start + datetime.timedelta(minutes=begin)
        duration = datetime.timedelta(minutes=minutes)
        trial = SimpleNamespace(number=number, state=SimpleNamespace(name=state))
        trial.datetime_start, trial.duration = begin, duration
        trials.append(trial)
    sweep_figures.plot_timeline(tmp_path / "a.png", trials, "title")
    bars = {
        round(bar.get_y() + bar.get_height() / 2): (bar.get_x(), bar.get_width())
        for bar in drawn["a"].axes[0].patches
    }
    assert bars == {0: (0, 1), 1: (0.5, 0.25), 2: (1.5, 0.75)}
    assert [text.get_text() for text in drawn["a"].legends[0].get_texts()] == ["complete", "pruned"]


def test_the_setting_that_matters_has_the_longest_bar(tmp_path, drawn):
    space = {"learning_rate": (1e-4, 1.0), "views": [2, 4], "jitter": (0.0, 1.0)}
    draw_sweep(tmp_path / "a", space, count=60)
    axes = drawn["param_importances"].axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    widths = [bar.get_width() for bar in axes.patches]
    assert sorted(names) == ["jitter", "learning rate", "views"]
    assert names[0] == "learning rate"
    assert widths[0] > 60
    assert sum(widths) == pytest.approx(100)


def test_a_state_of_many_trials_is_in_the_legend_once(tmp_path, drawn):
    draw_sweep(tmp_path / "a", count=12)
    for name in ("optimization_history", "timeline", "intermediate_values"):
        texts = [text.get_text() for text in drawn[name].legends[0].get_texts()]
        assert sorted({*texts} - {"best so far"}) == ["complete", "pruned"]
        assert len(texts) == len({*texts})


def test_a_trial_that_still_runs_is_in_no_picture(tmp_path, drawn):
    study = make_study(tune.SPACE, count=8)
    running = study.ask()
    running.report(1e-9, 0)  # would be the best
    sweep_figures.plot_sweep(
        study, tmp_path, "title", "loss", [*tune.SPACE], study.best_trial.number
    )
    lines = drawn["intermediate_values"].axes[0].lines
    assert len(lines) == 8
    dots = [part.get_offsets() for part in drawn["optimization_history"].axes[0].collections]
    assert sorted(np.concatenate(dots)[:, 0]) == [*range(8)]
