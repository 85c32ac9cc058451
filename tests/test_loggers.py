import csv
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import functions
import rnn
import rnn_hyperparameter_tune as tune
import simclr
import simsiam

SCRIPTS = [simclr, simsiam]


def small_config(script, folder, **changes):
    settings = {
        "dataset": "digits",
        "encoder": "small",
        "stages": "pretrain",
        "epochs": 3,
        "batch_size": 256,
        "knn_every": 2,
        "output_dir": str(folder),
        "name": "run",
        "device": "cpu",
        "logger": "tensorboard",
    }
    return script.Config(**{**settings, **changes})


def metrics(folder):
    """Every number of `metrics.csv` as name: {epoch: value}."""
    columns = {}
    for row in csv.DictReader((folder / "metrics.csv").open()):
        for name, value in row.items():
            if value:
                columns.setdefault(name, {})[int(row["epoch"])] = float(value)
    return columns


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert list(folder.rglob("events.out.tfevents*"))
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_has_the_numbers_of_each_cell(tmp_path):
    pytest.importorskip("tensorboard")
    config = rnn.Config(
        dataset="digits",
        cells="rnn,gru",
        hidden_size=8,
        epochs=2,
        output_dir=str(tmp_path),
        name="run",
        device="cpu",
        logger="tensorboard",
    )
    rnn.main(config)
    folder = tmp_path / "rnn" / "run"
    expected = {}
    for row in csv.DictReader((folder / "metrics.csv").open()):
        for name in row.keys() - {"cell"}:
            values = expected.setdefault(f"{row['cell']}_{name}", {})
            values[int(row["epoch"])] = pytest.approx(float(row[name]), rel=1e-6)
    assert len(expected) == 14
    found = scalars(folder)
    assert {name: found[name] for name in expected} == expected


def test_tensorboard_has_the_trials_of_a_sweep(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(tune.SPACE, "hidden_size", [8, 16, 32])
    config = tune.Config(
        dataset="digits",
        cell="rnn",
        trials=2,
        max_epochs=1,
        output_dir=str(tmp_path),
        name="run",
        device="cpu",
        logger="tensorboard",
    )
    tune.main(config)
    folder = tmp_path / "rnn_hyperparameter_tune" / "run"
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    found = scalars(folder)
    for name in ("validation_loss", "hidden_size", "learning_rate"):
        expected = {i: pytest.approx(float(row[name]), rel=1e-6) for i, row in enumerate(rows)}
        assert found[name] == expected


@pytest.mark.parametrize("script", SCRIPTS)
def test_tensorboard_has_the_numbers_of_metrics_csv(tmp_path, monkeypatch, script):
    pytest.importorskip("tensorboard")
    config = small_config(script, tmp_path)
    mean = functions.EpochLoss.mean

    def stopping(losses):
        if losses.epoch == 3:
            raise KeyboardInterrupt
        return mean(losses)

    monkeypatch.setattr(functions.EpochLoss, "mean", stopping)
    with pytest.raises(KeyboardInterrupt):
        script.main(config)
    folder = tmp_path / script.__name__ / "run"
    assert list(scalars(folder)["loss"]) == [1, 2]  # written although the run was stopped
    monkeypatch.setattr(functions.EpochLoss, "mean", mean)
    script.main(dataclasses.replace(config, resume=str(folder)))
    expected = metrics(folder)
    assert {"epoch", "loss", "learning_rate", "embedding_std", "knn_held_out"} <= expected.keys()
    assert expected["knn_held_out"].keys() == {2, 3}
    logged = scalars(folder)
    assert logged.keys() == expected.keys()
    for name, values in expected.items():
        assert logged[name] == pytest.approx(values, rel=1e-6)


def test_no_logger_leaves_no_logs(tmp_path):
    simclr.main(small_config(simclr, tmp_path, logger="none", epochs=1))
    names = {path.name for path in (tmp_path / "simclr" / "run").iterdir()}
    weights = {"checkpoint.pt", "encoder.safetensors"}
    assert names == weights | {"config.json", "loss.png", "metrics.csv", "summary.json"}


def test_wandb_offline_leaves_the_numbers_in_the_run_folder_and_ends(tmp_path):
    pytest.importorskip("wandb")
    flags = "--dataset digits --encoder small --stages pretrain --epochs 2 --batch-size 256"
    flags += " --name run --logger wandb"
    command = [sys.executable, simsiam.__file__, *flags.split()]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"WANDB_MODE": "offline", "HOME": str(tmp_path / "home")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    folder = tmp_path / "results" / "simsiam" / "run"
    (run,) = folder.glob("wandb/offline-run-*/*.wandb")
    content = run.read_bytes()
    for name, values in metrics(folder).items():
        assert name.encode() in content
        for value in values.values():
            number = value if name != "epoch" else int(value)
            assert json.dumps(number).encode() in content
    assert {path.name for path in tmp_path.iterdir()} <= {"results", "home"}


def test_two_wandb_runs_of_one_process_are_two(tmp_path, monkeypatch, request):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    request.addfinalizer(wandb.finish)
    for name in "ab":
        simclr.main(small_config(simclr, tmp_path, epochs=1, name=name, logger="wandb"))
    for name in "ab":
        (run,) = (tmp_path / "simclr" / name).glob("wandb/offline-run-*/*.wandb")
        loss = metrics(tmp_path / "simclr" / name)["loss"][1]
        assert json.dumps(loss).encode() in run.read_bytes()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys, script, logger):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == logger else find_spec(name, *rest),
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(functions.signal, "signal", lambda *_: None)
    flags = f"--dataset digits --encoder small --epochs 1 --stages pretrain --logger {logger}"
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags.split()])
    with pytest.raises(SystemExit) as caught:
        functions.run_script(script.main, script.Config, "")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"pip install {logger}" in line
    assert list(Path(tmp_path).iterdir()) == []
