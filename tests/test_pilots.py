import csv
import subprocess
import sys
from pathlib import Path

import functions
from support import files

ROOT = Path(functions.__file__).parent
FLAGS = "--encoder small --epochs 1 --probe-epochs 2 --few-labels 0 --batch-size 128"


def call(folder, *words):
    command = [sys.executable, str(ROOT / "benchmarks/pilots.py"), "table.csv", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_pilots_are_scored_on_held_out_training_images_and_run_once(tmp_path):
    rows = [{"name": name, "script": "simclr", "flags": FLAGS} for name in ("one", "two")]
    files.write_csv(tmp_path / "table.csv", rows)
    first = call(tmp_path, "--only", "one", "--dataset", "digits", "--device", "cpu")
    assert first.returncode == 0, first.stderr
    assert "digits: 1,293 training images, 144 test images" in first.stdout  # of 1,437
    (scored,) = csv.DictReader((tmp_path / "table-scores.csv").open())
    folder = tmp_path / "results/pilots/table/simclr/one"
    summary = files.read_json(folder / "summary.json")
    assert float(scored["linear_probe_accuracy"]) == summary["linear_probe_accuracy"]
    assert float(scored["knn_accuracy"]) == summary["knn_accuracy"]
    assert files.read_json(folder / "config.json")["evaluate_on"] == "validation"
    elsewhere = {**scored, "name": "two", "knn_accuracy": 0.25}
    files.write_csv(tmp_path / "table-scores.csv", [scored, elsewhere])
    again = call(tmp_path, "--only", "one", "--dataset", "digits")
    assert again.returncode == 0, again.stderr
    assert "training images" not in again.stdout  # nothing ran
    assert [line.split()[0] for line in again.stdout.splitlines()] == ["one", "two"]
    assert len((tmp_path / "table-scores.csv").read_text().splitlines()) == 3
    assert "25.0%" in call(tmp_path).stdout  # both rows have a score
    assert call(tmp_path, "--only", "three").returncode == 2
    files.write_csv(tmp_path / "table.csv", [{**rows[0], "script": "other"}])
    strange = call(tmp_path)
    assert strange.returncode == 2
    assert len(strange.stderr.splitlines()) == 1


def test_rows_run_side_by_side_and_one_error_stops_the_others(tmp_path):
    rows = [{"name": name, "script": "simclr", "flags": FLAGS} for name in ("one", "two")]
    files.write_csv(tmp_path / "table.csv", rows)
    both = call(tmp_path, "--jobs", "2", "--dataset", "digits", "--device", "cpu")
    assert both.returncode == 0, both.stderr
    began = [both.stdout.index(f"== {name}") for name in ("one", "two")]
    assert max(began) < both.stdout.index("linear probe")  # the second did not wait for the first
    assert len((tmp_path / "table-scores.csv").read_text().splitlines()) == 3
    endless = FLAGS.replace("--epochs 1", "--epochs 9999")
    rows = [{**rows[0], "name": "long", "flags": endless}, {**rows[0], "name": "bad"}]
    files.write_csv(tmp_path / "table.csv", [rows[0], {**rows[1], "flags": "--epochs 0"}])
    stopped = call(tmp_path, "--jobs", "2", "--dataset", "digits", "--device", "cpu")
    assert stopped.returncode == 2  # and not after 9,999 epochs
    assert "bad ended with exit code 2; call this again" in stopped.stderr
