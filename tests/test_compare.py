import csv
import runpy
import statistics
import sys
from pathlib import Path

import pytest
from PIL import Image

import compare
from support import errors, files

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "docs" / "results"


def make_run(folder, rows, summary, **settings):
    folder.mkdir(parents=True)
    config = {
        "script": "simclr",
        "name": folder.name,
        "seed": 0,
        "epochs": 2,
        "command": folder.name,
    }
    files.write_json(folder / "config.json", config | settings)
    files.write_json(folder / "summary.json", summary)
    files.write_csv(folder / "metrics.csv", rows)
    return str(folder)


def simclr_run(folder, seed, probe, loss, **settings):
    rows = [
        {"epoch": 1, "loss": loss + 1, "knn_held_out": None},
        {"epoch": 2, "loss": loss, "knn_held_out": probe - 0.1},
    ]
    summary = {"linear_probe_accuracy": probe, "final_loss": loss, "seconds": 90}
    few = {"labels_per_class": 10, "mean": 0.5, "sd": 0.1, "draws": 5}
    summary["few_label_accuracy_encoder"] = few
    return make_run(folder, rows, summary, seed=seed, **settings)


def rnn_run(folder, **settings):
    rows = [
        {"cell": cell, "epoch": epoch, "train_loss": 1 / epoch, "validation_loss": 2 / epoch}
        | {"train_accuracy": 0.5, "validation_accuracy": 0.25}
        for cell in ("rnn", "gru")
        for epoch in (1, 2, 3)
    ]
    summary = {"rnn_test_accuracy": 0.3, "gru_test_accuracy": 0.4, "seconds": 120}
    summary |= {"rnn_seconds": 60, "gru_seconds": 30, "gru_final_loss": 0.125}
    return make_run(folder, rows, summary, script="rnn", cells="rnn,gru", **settings)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_runs_of_one_recipe_are_one_row_and_others_are_not(tmp_path):
    recipe = {"temperature": 0.5, "learning_rate": 0.1}
    changes = {
        "a": {},
        "seed-1": {"commit": "other", "device": "cuda", "stages": "pretrain"},
        "faster": {"learning_rate": 0.2},
        "other-images": {"dataset": "digits"},
        # The first run is of a version without these, which computed as with these values.
        "newer": {"width": 64, "jitter": [0.4, 0.4, 0.4, 0.1]},
        "newer-and-narrow": {"width": 32},
        "newer-and-plain": {"jitter": [0, 0, 0, 0]},
        "of-this-script": {"script": "one"},
        "of-that-script": {"script": "another"},
    }
    runs = [
        simclr_run(tmp_path / name, seed, 0.7 + seed / 100, 3.0, **recipe | changed)
        for seed, (name, changed) in enumerate(changes.items())
    ]
    runs.append(simclr_run(tmp_path / "same-seed", 0, 0.6, 3.0, **recipe))
    head, *rows = compare.main([*runs, "--figure", "curves.svg"])
    probe = head.index("linear probe %")
    others = [*changes.keys() - {"a", "seed-1", "newer"}, "same-seed"]
    assert {row[0]: row[1] for row in rows} == {"a": "3"} | dict.fromkeys(others, "1")
    deviation = 100 * statistics.stdev([0.7, 0.71, 0.74])
    assert rows[0][probe] == f"71.7 ± {deviation:.1f}"
    assert Path("curves.svg").read_text().lstrip().startswith("<?xml")


def test_folds_are_one_row_and_other_data_another(tmp_path):
    changes = {
        "one": {"evaluate_on": "fold-1", "data": "aa"},
        "two": {"evaluate_on": "fold-2", "data": "bb"},
        "tested": {"data": "cc"},
        "others": {"evaluate_on": "fold-1", "data": "dd", "dataset": "photos"},
        "again": {"evaluate_on": "fold-2", "data": "bb"},
    }
    runs = [simclr_run(tmp_path / name, 0, 0.5, 4.0, **more) for name, more in changes.items()]
    _, *rows = compare.main(runs)
    assert [row[:2] for row in rows] == [
        ["one", "2"],
        ["tested", "1"],
        ["others", "1"],
        ["again", "1"],
    ]


def test_of_the_data_set_the_pixels_count_and_not_its_name(tmp_path):
    runs = [
        simclr_run(tmp_path / name, seed, 0.5, 4.0, dataset=dataset, data=data)
        for seed, (name, dataset, data) in enumerate(
            [("a", "photos", "aa"), ("b", "/elsewhere/photos", "aa"), ("c", "photos", "bb")]
        )
    ]
    _, first, other = compare.main(runs)
    assert (first[:2], other[:2]) == (["a", "2"], ["c", "1"])


def test_a_run_of_unknown_pixels_puts_no_others_together(tmp_path):
    known = {"a": {}, "b": {"data": "aa"}, "c": {"data": "bb"}}
    runs = [
        simclr_run(tmp_path / name, seed, 0.5, 4.0, **more)
        for seed, (name, more) in enumerate(known.items())
    ]
    _, first, other = compare.main(runs)
    assert (first[:2], other[:2]) == (["a", "2"], ["c", "1"])


def test_two_names_of_the_same_pixels_are_no_difference(tmp_path, capsys):
    for name, dataset, rate in (("a", "photos", 1), ("b", "/elsewhere/photos", 2)):
        simclr_run(tmp_path / name, 0, 0.5, 4.0, dataset=dataset, data="aa", learning_rate=rate)
    compare.main(["a", "b"])
    assert "a: learning_rate 1\nb: learning_rate 2\n" in capsys.readouterr().out


def test_older_runs_recorded_the_precision_that_auto_chose_beside_it(tmp_path, capsys):
    records = [
        {"precision": "float32", "computed_in": "32-true"},
        {"precision": "auto", "computed_in": "32-true"},
        {"precision": "auto", "computed_in": "bf16-mixed"},
    ]
    runs = [simclr_run(tmp_path / f"s{i}", i, 0.5, 4.0, **r) for i, r in enumerate(records)]
    _, first, other = compare.main(runs)
    assert (first[:2], other[:2]) == (["s0", "2"], ["s2", "1"])
    assert "s2: precision bfloat16" in capsys.readouterr().out.splitlines()


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    runs = [simclr_run(tmp_path / p / "best", 0, 0.5, 4.0, temperature=t) for p, t in ("u1", "v2")]
    _, *rows = compare.main(runs)
    assert [row[0] for row in rows] == runs


def test_seeds_are_one_row_with_mean_and_deviation(tmp_path, capsys):
    probes = [0.7, 0.72, 0.77]
    runs = [
        simclr_run(tmp_path / f"s{i}", i, p, 3.0, temperature=0.5) for i, p in enumerate(probes)
    ]
    runs.append(simclr_run(tmp_path / "other", 5, 0.5, 4.0, temperature=0.2))
    head, seeds, other = compare.main([*runs, "--figure", "curves.png"])
    assert head == ["run", "seeds", "linear probe %", "few labels %", "loss", "minutes"]
    mean, sd = 100 * statistics.mean(probes), 100 * statistics.stdev(probes)
    assert seeds == [
        "s0",
        "3",
        f"{mean:.1f} ± {sd:.1f}",
        "50.0 ± 0.0",
        "3.000 ± 0.000",
        "1.5 ± 0.0",
    ]
    assert other == ["other", "1", "50.0", "50.0", "4.000", "1.5"]
    printed = capsys.readouterr().out
    assert "| s0 " in printed
    assert "other: temperature 0.2" in printed.splitlines()
    assert "epochs" not in printed  # the same in both
    assert "" not in printed.splitlines()
    assert Image.open("curves.png").size[0] == 960


def test_a_mean_of_fewer_values_than_runs_says_so(tmp_path):
    runs = [simclr_run(tmp_path / f"s{i}", i, 0.5 + i / 10, 3.0) for i in range(3)]
    path = Path(runs[2], "summary.json")  # it was stopped before its probe
    files.write_json(path, {"final_loss": 3.0, "seconds": 90})
    head, row = compare.main(runs)
    said = dict(zip(head, row, strict=True))
    assert said["seeds"] == "3"
    assert said["linear probe %"] == "55.0 ± 7.1 (of 2)"
    assert said["loss"] == "3.000 ± 0.000"


def test_the_cells_of_rnn_are_rows(tmp_path):
    runs = [rnn_run(tmp_path / "a"), rnn_run(tmp_path / "b", hidden_size=512, seed=1)]
    rows = compare.main(runs)
    assert rows[0] == ["run", "seeds", "test %", "loss", "minutes"]
    assert rows[1:3] == [["a rnn", "1", "30.0", "", "1.0"], ["a gru", "1", "40.0", "0.125", "0.5"]]
    assert [row[0] for row in rows[3:]] == ["b rnn", "b gru"]


def test_a_curve_is_the_mean_where_all_runs_have_a_value():
    series = [
        [{"epoch": 1.0, "loss": 3.0}, {"epoch": 2.0, "loss": 2.0}, {"epoch": 3.0, "loss": 1.0}],
        [{"epoch": 1.0, "loss": 5.0, "knn_held_out": 0.5}, {"epoch": 2.0, "loss": None}],
    ]
    runs = [compare.Run("a", "simclr", "", {}, rows, {}) for rows in series]
    (point,) = compare.mean_curve(runs, "loss", 10)
    assert point == pytest.approx((1, 40, 40 - 200**0.5, 40 + 200**0.5))
    assert compare.mean_curve(runs, "knn_held_out", 100) == []
    assert compare.mean_curve(runs[1:], "knn_held_out", 100) == [(1, 50, 50, 50)]


def test_compares_the_committed_runs_which_are_of_older_versions():
    folders = [path.parent for path in RESULTS.glob("*/summary.json")]
    assert len(folders) > 10
    _, *rows = compare.main([*map(str, folders), "--figure", "curves.pdf"])
    assert Path("curves.pdf").read_bytes().startswith(b"%PDF")
    assert len(rows) == len(folders) + 1  # two cells are in one of the folders
    runs = compare.read_run(RESULTS / "rnn-original")
    assert [run.cell for run in runs] == ["rnn", "lstm"]
    *_, last = csv.DictReader((RESULTS / "rnn-original" / "metrics.csv").open())
    assert last["cell"] == "lstm"
    assert runs[1].rows[-1] == {k: v if k == "cell" else float(v) for k, v in last.items()}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "summary.json").unlink(), "not finished"),
        (lambda run: (run / "metrics.csv").unlink(), "no metrics.csv"),
        (lambda run: (run / "metrics.csv").write_text("loss\n1\n"), "holds no epochs"),
        (lambda run: (run / "metrics.csv").write_text("epoch,loss\n1,x\n"), "is damaged"),
        (lambda run: (run / "metrics.csv").write_text("epoch,loss\n,1\n"), "is damaged"),
        (lambda run: (run / "config.json").write_text("{"), "is damaged"),
        (lambda run: (run / "config.json").unlink(), "cannot read"),
        (lambda run: run.rename(run.with_name("c")), "there is no run folder"),
    ],
)
def test_user_mistakes(tmp_path, spoil, message):
    runs = [simclr_run(tmp_path / name, 0, 0.7, 3.0, x=name) for name in ("a", "b")]
    spoil(tmp_path / "b")
    with pytest.raises(errors.UserError, match=message):
        compare.main(runs)
    assert not Path("comparison.png").exists()


def test_the_figure_shows_means_in_percent_and_training_images_dashed(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(compare.figures, "save_figure", lambda figure, path: drawn.append(figure))
    runs = [rnn_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    rows = [{"cell": "gru", "epoch": 1, "train_accuracy": 0.5, "validation_accuracy": 0.35}]
    runs.append(make_run(tmp_path / "2", rows, {}, script="rnn", cells="gru", seed=2))
    compare.main([*runs, "--figure", "curves.png"])
    (figure,) = drawn
    _, panel = figure.axes
    lines = {(line.get_label(), line.get_linestyle()): line.get_xydata() for line in panel.lines}
    names = {name for name, _ in lines if not name.startswith("_")}
    assert names == {"0 rnn", "0 gru"}
    assert lines["0 rnn", "-"].tolist() == [[1, 25], [2, 25], [3, 25]]
    (mean,) = lines["0 gru", "-"].tolist()  # of the epoch that all three have
    assert mean == [1, pytest.approx((25 + 25 + 35) / 3)]
    dashed = [xy for (_, style), xy in lines.items() if style == "--"]
    assert dashed
    assert all((xy[:, 1] == 50).all() for xy in dashed)
    band = panel.collections[3].get_paths()[0].vertices[:, 1]  # gru's, on validation images
    deviation = statistics.stdev([25, 25, 35])
    assert (band.min(), band.max()) == pytest.approx((mean[1] - deviation, mean[1] + deviation))


def test_one_run_is_not_enough_and_neither_is_the_same_twice(tmp_path, user_error):
    run = simclr_run(tmp_path / "a", 0, 0.7, 3.0)
    with user_error("at least two"):
        compare.main([run])
    with user_error("is given twice"):
        compare.main([run, "../" + tmp_path.name + "/a"])


@pytest.mark.parametrize("figure", ["", "x", "x.txt", "no/x.png"])
def test_a_figure_that_cannot_be_written(tmp_path, user_error, figure):
    runs = [simclr_run(tmp_path / name, 0, 0.7, 3.0, x=name) for name in ("a", "b")]
    with user_error("cannot write no/x.png" if "/" in figure else "--figure must end in one of"):
        compare.main([*runs, "--figure", figure])


def test_runs_of_two_scripts_are_told_apart_by_what_both_have(tmp_path, capsys):
    first = simclr_run(tmp_path / "a", 0, 0.7, 3.0, probe_epochs=5, views=2)
    other = simclr_run(tmp_path / "b", 0, 0.8, 3.0, probe_epochs=100, script="moco")
    compare.main([first, other])
    said = capsys.readouterr().out
    assert "probe_epochs 5" in said
    assert "probe_epochs 100" in said
    assert "views" not in said


def test_as_a_command(tmp_path, monkeypatch, capsys, signals):
    runs = [simclr_run(tmp_path / name, 0, 0.7, 3.0, x=name) for name in ("a", "b")]
    monkeypatch.setattr(sys, "argv", ["compare.py", *runs, "--figure", "x.txt"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(compare.__file__, run_name="__main__")
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --figure must end in one of")
