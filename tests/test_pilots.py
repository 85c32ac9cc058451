import csv
import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import functions
from support import files

ROOT = Path(functions.__file__).parent
FLAGS = "--encoder small --epochs 1 --probe-epochs 2 --few-labels 0 --batch-size 128"
ROWS = [{"name": name, "script": "simclr", "flags": FLAGS} for name in ("one", "two")]


@pytest.fixture
def pilots(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("pilots")


@pytest.fixture
def call(pilots, monkeypatch):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["pilots.py", "table.csv", *words])
        pilots.main()

    return call


def read_scores():
    with open("table-scores.csv", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_pilots_are_scored_on_held_out_training_images_and_run_once(
    pilots, call, monkeypatch, capfd, user_error, run_here
):
    def start(command):
        code = run_here(command).returncode
        return SimpleNamespace(poll=lambda: code, returncode=code)

    monkeypatch.setattr(pilots, "subprocess", SimpleNamespace(Popen=start))
    files.write_csv(Path("table.csv"), ROWS)
    call("--jobs", "2", "--dataset", "digits", "--device", "cpu")
    said = capfd.readouterr().out
    assert said.count("digits: 1,293 training images, 144 test images") == 2  # of 1,437
    scores = read_scores()
    assert list(scores) in (["one", "two"], ["two", "one"])
    for name, scored in scores.items():
        folder = Path("results/pilots/table/simclr", name)
        summary = files.read_json(folder / "summary.json")
        assert float(scored["linear_probe_accuracy"]) == summary["linear_probe_accuracy"]
        assert float(scored["knn_accuracy"]) == summary["knn_accuracy"]
        assert files.read_json(folder / "config.json")["evaluate_on"] == "validation"
    # A score that is not asked for is kept, and what has its scores does not run again.
    elsewhere = {**scores["two"], "knn_accuracy": 0.25}
    files.write_csv(Path("table-scores.csv"), [scores["one"], elsewhere])
    call("--only", "one", "--dataset", "digits", "--device", "cpu")
    said = capfd.readouterr().out
    assert "training images" not in said
    assert [line.split()[0] for line in said.splitlines()] == ["one", "two"]
    assert "25.0%" in said
    with user_error("has no row ['three']"):
        call("--only", "three")
    # A row with other flags must not get the scores of its old run.
    for flags in (f"{FLAGS} --temperature 0.1", FLAGS.removesuffix(" --batch-size 128")):
        files.write_csv(Path("table.csv"), [{**ROWS[0], "flags": flags}])
        with user_error("simclr/one was run with other flags"):
            call("--dataset", "digits", "--device", "cpu")
    files.write_csv(Path("table.csv"), ROWS)
    with user_error("simclr/one was run with other flags"):
        call("--only", "one", "--dataset", "digits", "--device", "cpu", "--seed", "5")
    # Scores on two data sets must not stand in one file.
    with user_error("table-scores.csv has scores on digits"):
        call("--only", "one", "--dataset", "fashion-mnist")
    # The summary of a cell is there before the next has begun.
    for flags in ("--epochs 1", "--epochs 1 --cells lstm,gru"):
        files.write_csv(Path("table.csv"), [{"name": "one", "script": "rnn", "flags": flags}])
        with user_error("row 1", "one of its cells"):
            call()
    files.write_csv(Path("table.csv"), [{**ROWS[0], "script": "other"}])
    with user_error("row 1", "scripts are simclr"):
        call()
    # A comma outside quotes would cut the flags short.
    Path("table.csv").write_text("name,script,flags\none,simclr,--view-size 16,24 --epochs 1\n")
    with user_error("row 1", "quotes"):
        call()
    Path("table.csv").write_text("name,flags\none,--epochs 1\n")
    with user_error("needs the columns name, script, flags"):
        call()
    Path("table.csv").write_bytes(b"\xff\xfe\x00")
    with user_error("cannot read table.csv"):
        call()


def test_two_jobs_run_at_the_same_time(pilots, tmp_path, monkeypatch):
    # Each ends when the other has begun; one that ran alone would wait for it in vain.
    code = (
        "import pathlib, sys, time\n"
        "mine, other = map(pathlib.Path, sys.argv[1:])\n"
        "mine.touch()\n"
        "until = time.monotonic() + 20\n"
        "while not other.exists():\n"
        "    time.sleep(0.02)\n"
        "    if time.monotonic() > until: sys.exit(1)\n"
    )
    others = {"one": "two", "two": "one"}

    def begin(row, *_):
        names = (row["name"], others[row["name"]])
        return subprocess.Popen([sys.executable, "-c", code, *(tmp_path / n for n in names)])

    monkeypatch.setattr(pilots, "begin", begin)
    folders = dict.fromkeys(others, tmp_path / "no run")
    done = pilots.run_side_by_side(ROWS, folders, [], 2)
    assert {row["name"] for row in done} == {"one", "two"}


def test_after_an_error_the_others_are_done(pilots, tmp_path, monkeypatch, user_error):
    codes = {"two": "raise SystemExit(2)", "one": "import time; time.sleep(1)"}
    rows = [{"name": name} for name in codes]

    def begin(row, *_):
        return subprocess.Popen([sys.executable, "-c", codes[row["name"]]])

    monkeypatch.setattr(pilots, "begin", begin)
    folders = dict.fromkeys(codes, tmp_path / "no run")
    for jobs in (1, 2):
        done = []
        with user_error("two ended with exit code 2", "call this again"):
            done.extend(pilots.run_side_by_side(rows, folders, [], jobs))
        assert done == [{"name": "one"}]


def test_two_calls_beside_each_other_lose_no_score(pilots, call, monkeypatch):
    def begin(row, *_):
        # While this row runs, a call from elsewhere finishes the other.
        files.write_csv(Path("table-scores.csv"), [{**ROWS[1], "knn_accuracy": 0.25, "minutes": 1}])
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(pilots, "begin", begin)
    monkeypatch.setattr(pilots, "read_score", lambda row, _: {**row, "minutes": 1})
    files.write_csv(Path("table.csv"), ROWS)
    call("--only", "one")
    assert read_scores().keys() == {"one", "two"}
