"""Run folders outlive versions: those in fixtures/runs are of the version of November 2026.

`simclr` is finished, `simsiam` has done 2 of 3 epochs and `rnn` 2 of 4; `expected.json` is what an
undisturbed run came to. Another processor rounds otherwise, so numbers are compared with a margin.
"""

import csv
import importlib
import json
import shutil
from pathlib import Path

import pytest
from pictures import unrendered
from PIL import Image

import compare
import embed
import functions
from support import files, settings

RUNS = Path(__file__).parent / "fixtures" / "runs"
UNFINISHED = {"simsiam": "linear_probe_accuracy", "rnn": "gru_test_accuracy"}


def go_on(script, folder, *flags):
    """What the script's `main` returns for a copy of a run, resumed."""
    module = importlib.import_module(script)
    flags = ["--resume", str(folder), "--data-dir", str(folder.parent), *flags]
    return module.main(settings.parse_config(module.Config, flags, ""))


def rows_of(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Copies of the three runs, gone on with to their end, and what their `main` returned."""
    home = tmp_path_factory.mktemp("runs")
    shutil.copytree(RUNS, home, dirs_exist_ok=True)
    with unrendered():
        return home, {script: go_on(script, home / script) for script in UNFINISHED}


@pytest.mark.parametrize("script", UNFINISHED)
def test_an_unfinished_run_goes_on_to_its_end(finished, script):
    home, summaries = finished
    before, after = rows_of(RUNS / script), rows_of(home / script)
    epochs = json.loads((RUNS / script / "config.json").read_text())["epochs"]
    assert [int(row["epoch"]) for row in after] == list(range(1, epochs + 1))
    for old, new in zip(before, after, strict=False):
        assert old.items() <= new.items()
    if script == "simsiam":  # it was begun before there were verdicts
        assert "verdict" not in before[0]
        assert [row["verdict"] for row in after] == ["", "", "good"]
    expected = json.loads((RUNS / script / "expected.json").read_text())
    assert expected.keys() <= summaries[script].keys()
    name = UNFINISHED[script]
    assert summaries[script][name] == pytest.approx(expected[name], abs=0.05)
    loss = "final_loss" if script == "simsiam" else "gru_final_loss"
    assert summaries[script][loss] == pytest.approx(expected[loss], rel=0.05)


@pytest.mark.usefixtures("unrendered_pictures")
def test_a_finished_run_is_evaluated_again(tmp_path):
    shutil.copytree(RUNS / "simclr", tmp_path / "run")
    (tmp_path / "run" / "probe.safetensors").unlink()
    summary = go_on("simclr", tmp_path / "run", "--stages", "probe")
    expected = json.loads((RUNS / "simclr" / "summary.json").read_text())
    assert expected.keys() <= summary.keys()
    assert summary["final_loss"] == expected["final_loss"]
    for name in ("linear_probe_accuracy", "knn_accuracy"):
        # The linear probe has another rate since; an image is 0.3 %.
        assert summary[name] == pytest.approx(expected[name], abs=0.03 if "probe" in name else 0.01)
    assert rows_of(tmp_path / "run") == rows_of(RUNS / "simclr")
    said, then = (
        files.read_arrays(folder / "predictions.npz")["predictions"]
        for folder in (tmp_path / "run", RUNS / "simclr")
    )
    assert (said == then).mean() > 0.98


def test_old_runs_are_compared(finished):
    home, summaries = finished
    head, *table = compare.main(
        [*(str(home / name) for name in ("simclr", *UNFINISHED)), "--figure", str(home / "all.png")]
    )
    assert len(table) == 3
    shown = [dict(zip(head, row, strict=True)) for row in table]
    then = json.loads((RUNS / "simclr" / "summary.json").read_text())
    assert shown[0]["linear probe %"] == f"{100 * then['linear_probe_accuracy']:.1f}"
    assert shown[2]["test %"] == f"{100 * summaries['rnn']['gru_test_accuracy']:.1f}"


@pytest.mark.usefixtures("unrendered_pictures")
def test_an_old_encoder_embeds(finished, tmp_path):
    home, _ = finished
    test = functions.load_images("digits").test
    (tmp_path / "in").mkdir()
    for i in range(100):
        Image.fromarray(test.images[i, 0].numpy()).save(tmp_path / "in" / f"{i:03}.png")
    for script in ("simclr", "simsiam"):
        output = tmp_path / script
        flags = ["--output", str(output), "--device", "cpu", "--data-dir", str(tmp_path)]
        embed.main([str(home / script), str(tmp_path / "in"), *flags])
        said = files.read_arrays(output / "features.npz")["predictions"]
        then = files.read_arrays(home / script / "predictions.npz")["predictions"]
        assert (said == then[:100]).mean() > 0.98


LACKING = {
    "simclr": {"views": 2, "loss": "nt-xent", "compile": "off", "checkpoint_seconds": 0.0},
    "simsiam": {"weights": None, "compile": "off", "width": 64},
    "rnn": {"pooling": "last", "bidirectional": False, "checkpoint_seconds": 0.0},
}


@pytest.mark.parametrize("script", LACKING)
def test_a_setting_that_a_run_lacks_means_what_was_done_then(tmp_path, capsys, script):
    shutil.copytree(RUNS / script, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    for name in LACKING[script]:
        del saved[name]
    path.write_text(json.dumps(saved))
    config_class = importlib.import_module(script).Config
    config = settings.load_config(config_class, tmp_path / "run")
    for name, value in LACKING[script].items():
        assert getattr(config, name) == value
    (line,) = capsys.readouterr().out.splitlines()
    for name, value in LACKING[script].items():
        assert f"{settings.flag(name)} {'unset' if value is None else value}" in line
