import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import compare
import functions

REPOSITORY = Path(__file__).resolve().parent.parent


def make_run(folder, rows, summary, **settings):
    folder.mkdir(parents=True)
    config = {
        "script": "simclr",
        "name": folder.name,
        "seed": 0,
        "epochs": 2,
        "command": folder.name,
    }
    functions.write_json(folder / "config.json", config | settings)
    functions.write_json(folder / "summary.json", summary)
    functions.write_csv(folder / "metrics.csv", rows)
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


def test_the_same_seed_twice_is_two_rows_and_a_new_setting_no_difference(tmp_path):
    runs = [
        simclr_run(tmp_path / "a", 0, 0.7, 3.0, temperature=0.5),
        simclr_run(tmp_path / "again", 0, 0.7, 3.0, temperature=0.5),
        simclr_run(tmp_path / "newer", 1, 0.8, 3.0, temperature=0.5, width=64),
    ]
    head, first, second = compare.main([*runs, "--figure", "curves.png"])
    probe = head.index("linear probe %")
    assert (first[1], first[probe]) == ("2", f"75.0 ± {100 * statistics.stdev([0.7, 0.8]):.1f}")
    assert (second[1], second[probe]) == ("1", "70.0")


def test_seeds_are_one_row_with_mean_and_deviation(tmp_path, capsys):
    probes = [0.7, 0.72, 0.77]
    runs = [
        simclr_run(tmp_path / f"s{i}", i, p, 3.0, temperature=0.5) for i, p in enumerate(probes)
    ]
    runs.append(simclr_run(tmp_path / "other", 0, 0.5, 4.0, temperature=0.2))
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
    assert "other: temperature 0.2" in printed
    assert "epochs" not in printed  # the same in both
    assert Image.open("curves.png").size[0] > 1000


def test_the_cells_of_rnn_are_rows(tmp_path):
    rows = compare.main([rnn_run(tmp_path / "a"), rnn_run(tmp_path / "b", hidden_size=512)])
    assert rows[0] == ["run", "seeds", "test %", "loss", "minutes"]
    assert rows[1:3] == [["a rnn", "1", "30.0", "", "1.0"], ["a gru", "1", "40.0", "0.125", "0.5"]]
    assert [row[0] for row in rows[3:]] == ["b rnn", "b gru"]


def test_a_curve_is_the_mean_where_all_runs_have_a_value(tmp_path):
    runs = [
        compare.read_run(Path(simclr_run(tmp_path / f"s{i}", i, 0.7, loss)))[0]
        for i, loss in enumerate((2.0, 4.0))
    ]
    (one, two) = compare.mean_curve(runs, "loss", 1)
    assert one == pytest.approx((1, 4, 4 - 2**0.5, 4 + 2**0.5))
    assert two == pytest.approx((2, 3, 3 - 2**0.5, 3 + 2**0.5))
    assert [point[0] for point in compare.mean_curve(runs, "knn_held_out", 100)] == [2]
    assert compare.mean_curve(runs, "train_loss", 1) == []


def test_reads_the_committed_runs():
    runs = compare.read_run(REPOSITORY / "docs" / "results" / "rnn-original")
    assert [run.cell for run in runs] == ["rnn", "lstm"]
    path = REPOSITORY / "docs" / "results" / "rnn-original" / "metrics.csv"
    last = [row for row in csv.DictReader(path.open()) if row["cell"] == "lstm"][-1]
    assert runs[1].rows[-1]["validation_loss"] == float(last["validation_loss"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "summary.json").unlink(), "not finished"),
        (lambda run: (run / "metrics.csv").unlink(), "no metrics.csv"),
        (lambda run: (run / "metrics.csv").write_text("loss\n1\n"), "holds no epochs"),
        (lambda run: (run / "metrics.csv").write_text("epoch,loss\n1,x\n"), "is damaged"),
        (lambda run: (run / "config.json").write_text("{"), "is damaged"),
        (lambda run: (run / "config.json").unlink(), "cannot read"),
    ],
)
def test_user_mistakes(tmp_path, spoil, message):
    runs = [simclr_run(tmp_path / name, 0, 0.7, 3.0, x=name) for name in ("a", "b")]
    spoil(tmp_path / "b")
    with pytest.raises(functions.UserError, match=message):
        compare.main(runs)
    assert not Path("comparison.png").exists()


def test_one_run_is_not_enough(tmp_path):
    with pytest.raises(functions.UserError, match="at least two"):
        compare.main([simclr_run(tmp_path / "a", 0, 0.7, 3.0)])


def test_as_a_command(tmp_path):
    runs = [simclr_run(tmp_path / name, 0, 0.7, 3.0, x=name) for name in ("a", "b")]
    script = [sys.executable, str(REPOSITORY / "compare.py")]
    done = subprocess.run([*script, *runs, "--figure", "no/x.png"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write no/x.png")
    piped = subprocess.Popen(
        [*script, *runs], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    piped.stdout.close()
    errors = piped.stderr.read()
    assert (piped.wait(), errors) == (141, "stopped: nobody reads the output any more\n")
    assert json.loads(Path(runs[0], "config.json").read_text())["name"] == "a"
