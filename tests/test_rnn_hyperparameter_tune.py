import contextlib
import csv
import dataclasses
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import torch

import functions
import rnn
import rnn_hyperparameter_tune as tune

REPOSITORY = Path(tune.__file__).resolve().parent
FIRST = {name: c[0] for name, c in tune.SPACE.items()}


def small_config(folder: Path, **changes) -> tune.Config:
    settings = {
        "dataset": "digits",
        "cell": "rnn",
        "trials": 3,
        "max_epochs": 1,
        "train_fraction": 0.3,
        "output_dir": str(folder),
        "name": "run",
        "device": "cpu",
    }
    return tune.Config(**{**settings, **changes})


@pytest.fixture
def tiny(monkeypatch):
    """A search space of small models: the sweep's behaviour does not depend on their size."""
    small = {"hidden_size": [8, 16], "num_layers": [1], "batch_size": [64, 128]}
    monkeypatch.setattr(tune, "SPACE", {**tune.SPACE, **small})


def test_the_space_is_the_published_one():
    assert tune.SPACE == {
        "hidden_size": [128, 256, 512],
        "num_layers": [1, 3, 5],
        "l2": [16, 32, 64],
        "l3": [16, 32, 64],
        "learning_rate": (1e-4, 1e-1),
        "weight_decay": (5e-4, 1e-1),
        "batch_size": [32, 64, 128, 256],
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, choices in tune.SPACE.items() for value in choices],
)
def test_every_value_reaches_the_model_the_optimizer_and_the_loader(tmp_path, name, value):
    # The public version suggested hidden_size and num_layers but never passed them on.
    trial = optuna.trial.FixedTrial({**FIRST, name: value})
    config = tune.suggest_config(trial, small_config(tmp_path))
    data, validation = rnn.load_splits(dataclasses.replace(config, train_fraction=1.0))
    module = tune.RowRNNModule(config, "rnn", data, validation)
    optimizer = module.configure_optimizers()["optimizer"].param_groups[0]
    rows, labels = next(iter(module.train_dataloader()))
    linear = [layer for layer in module.model.mlp if isinstance(layer, torch.nn.Linear)]
    found = {
        "hidden_size": module.model.recurrent.hidden_size,
        "num_layers": module.model.recurrent.num_layers,
        "l2": linear[0].out_features,
        "l3": linear[1].out_features,
        "learning_rate": optimizer["lr"],
        "weight_decay": optimizer["weight_decay"],
        "batch_size": len(rows),
    }
    assert found == {**FIRST, name: value}
    assert len(labels) == len(rows)


@pytest.mark.parametrize(
    ("cell", "precision"),
    [("gru", "float32"), ("gru", "bfloat16"), ("lstm", "auto"), ("rnn", "auto")],
)
@pytest.mark.parametrize("augmentation", ["none", "standard"])
def test_lightning_and_rnn_train_end_with_the_same_weights(tmp_path, cell, precision, augmentation):
    config = rnn.Config(
        dataset="digits",
        cells=cell,
        hidden_size=16,
        epochs=2,
        learning_rate=0.01,
        device="cpu",
        precision=precision,
        augmentation=augmentation,
    )
    data, validation = rnn.load_splits(config)
    module = tune.RowRNNModule(config, cell, data, validation)
    start = [p.detach().clone() for p in module.model.parameters()]
    tune.make_trainer(config, []).fit(module)
    model = rnn.make_model(config, cell, data)
    rnn.train(model, cell, (data.train, validation), config, tmp_path, [])
    theirs, ours = module.model.state_dict(), model.state_dict()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    assert not any(map(torch.equal, start, model.parameters()))


def test_a_sweep_writes_its_results_and_goes_on(tmp_path, tiny, capsys):
    best = tune.main(small_config(tmp_path, trials=3))
    folder = tmp_path / "rnn_hyperparameter_tune" / "run"
    assert best == json.loads((folder / "best.json").read_text())
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert [row["trial"] for row in rows] == ["0", "1", "2"]
    values = [float(row["validation_loss"]) for row in rows if row["state"] == "complete"]
    assert best["validation_loss"] == min(values)
    plots = (
        "optimization_history parallel_coordinate param_importances intermediate_values timeline"
    )
    assert {path.stem for path in folder.glob("*.png")} == set(plots.split())
    printed = capsys.readouterr().out
    assert "3/3" in printed
    assert f"--config {folder / 'best.json'}" in printed
    tune.main(small_config(tmp_path, trials=5, resume=str(folder)))
    again = list(csv.DictReader((folder / "trials.csv").open()))
    assert again[:3] == rows
    assert len(again) == 5
    assert len({row["learning_rate"] for row in again}) == 5  # no draw is repeated
    config = rnn.read_best(str(folder / "best.json"))
    assert config.learning_rate == json.loads((folder / "best.json").read_text())["learning_rate"]


def test_the_sampler_is_seeded(tmp_path, tiny):
    results = [
        tune.main(small_config(tmp_path, trials=2, name=name, seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert results[0] == results[1] != results[2]


def test_failed_trials_are_recorded_with_their_reason(tmp_path, tiny, monkeypatch):
    fit, calls = tune.Trainer.fit, []

    def failing(trainer, module):
        calls.append(1)
        if len(calls) == 1:
            raise functions.Diverged("the loss is nan in epoch 1, step 3")
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        fit(trainer, module)

    monkeypatch.setattr(tune.Trainer, "fit", failing)
    tune.main(small_config(tmp_path, trials=4))
    path = tmp_path / "rnn_hyperparameter_tune" / "run" / "trials.csv"
    rows = list(csv.DictReader(path.open()))
    assert [row["state"] for row in rows][:2] == ["fail", "fail"]
    assert "nan in epoch 1, step 3" in rows[0]["reason"]
    assert "out of memory" in rows[1]["reason"]
    assert len(rows) == 4


def test_all_trials_failed(tmp_path, tiny, monkeypatch):
    def failing(trainer, module):
        raise functions.Diverged("the loss is nan")

    monkeypatch.setattr(tune.Trainer, "fit", failing)
    with pytest.raises(functions.UserError, match="all 2 trials failed"):
        tune.main(small_config(tmp_path, trials=2))


def test_an_unexpected_error_is_not_swallowed(tmp_path, tiny, monkeypatch):
    def failing(trainer, module):
        raise ZeroDivisionError

    monkeypatch.setattr(tune.Trainer, "fit", failing)
    with pytest.raises(ZeroDivisionError):
        tune.main(small_config(tmp_path))


def test_pruning_follows_the_study(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda trial: trial.number == 1)
    tune.main(small_config(tmp_path, trials=3, max_epochs=3))
    path = tmp_path / "rnn_hyperparameter_tune" / "run" / "trials.csv"
    rows = list(csv.DictReader(path.open()))
    assert [(row["state"], row["epochs"]) for row in rows] == [
        ("complete", "3"),
        ("pruned", "1"),
        ("complete", "3"),
    ]


def test_another_study_is_refused(tmp_path, tiny, monkeypatch):
    config = small_config(tmp_path, trials=1)
    tune.main(config)
    folder = tmp_path / "rnn_hyperparameter_tune" / "run"
    monkeypatch.setitem(tune.SPACE, "l2", [16])
    with pytest.raises(functions.UserError, match="has space"):
        tune.main(dataclasses.replace(config, resume=str(folder)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage": "postgresql+nothing://host/x"}, "cannot use the study at postgresql"),
        ({"storage": "sqlite:////no/such/folder/x.db"}, "cannot use the study"),
        ({"trials": 0}, "--trials must be at least 1"),
        ({"workers": 0}, "--workers must be at least 1"),
        ({"timeout": -1.0}, "--timeout"),
        ({"dataset": "nowhere"}, "unknown data set"),
    ],
)
def test_user_mistakes(tmp_path, changes, message):
    with pytest.raises(functions.UserError, match=message) as caught:
        tune.main(small_config(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_damaged_study_file(tmp_path, tiny):
    config = small_config(tmp_path, trials=1)
    tune.main(config)
    folder = tmp_path / "rnn_hyperparameter_tune" / "run"
    (folder / "study.db").write_bytes(b"no database" * 1000)
    with pytest.raises(functions.UserError, match="cannot use the study"):
        tune.main(dataclasses.replace(config, resume=str(folder)))


def start(folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, str(REPOSITORY / "rnn_hyperparameter_tune.py"), *flags]
    command += ["--dataset", "digits", "--cell", "rnn", "--name", "run", "--max-epochs", "1"]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def states(folder: Path) -> list[str]:
    path = folder / "results" / "rnn_hyperparameter_tune" / "run" / "study.db"
    study = optuna.load_study(study_name="study", storage=f"sqlite:///{path}")
    return [trial.state.name for trial in study.trials]


def test_ctrl_c_leaves_no_trial_running_and_the_sweep_goes_on(tmp_path):
    process = start(tmp_path, "--trials", "50")
    line = process.stdout.readline()  # the first trial is done, the next one runs
    while line and not re.match(r" +1/50", line):
        line = process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped by Ctrl-C" in errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert "RUNNING" not in states(tmp_path)


def test_too_few_images_are_a_mistake_before_anything_is_made(tmp_path):
    with pytest.raises(functions.UserError, match="larger --train-fraction"):
        tune.main(small_config(tmp_path, train_fraction=0.1))
    assert list(tmp_path.iterdir()) == []


def test_the_winner_s_command_has_what_its_training_needs(tmp_path, tiny, capsys):
    folder = tmp_path / "a b"
    tune.main(small_config(folder, trials=1, seed=3))
    lines = capsys.readouterr().out.splitlines()
    place = lines.index("Train the winner with:")
    words = shlex.split((lines[place + 1] + "\n" + lines[place + 2]).replace("\\\n", ""))
    assert words[:2] == ["python", "rnn.py"]
    config = functions.parse_config(rnn.Config, words[2:], "")
    assert (config.dataset, config.seed, config.device) == ("digits", 3, "cpu")
    assert config.hidden_size in (8, 16)
    assert max(map(len, lines[place : place + 2])) <= 80


def test_a_machine_that_died_before_its_first_heartbeat_is_not_waited_for(
    tmp_path, tiny, monkeypatch
):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    config = small_config(tmp_path, storage=url, trials=2)
    study = tune.open_study(config, tmp_path)
    study._storage.create_new_trial(study._study_id)  # and no more: no heartbeat, no process
    monkeypatch.setattr(tune, "GRACE", 2)
    tune.main(config)
    assert [trial.state.name for trial in study.get_trials()] == ["FAIL", "COMPLETE", "COMPLETE"]


def test_a_trial_that_has_a_name_has_a_heartbeat(tmp_path, tiny, monkeypatch):
    # Otherwise a machine that is killed between the two would be waited for for ever.
    path, found = tmp_path / "shared.db", []
    for name in ("start", "join"):  # Optuna's own first heartbeat may come at any time
        monkeypatch.setattr(optuna.storages._heartbeat.HeartbeatThread, name, lambda self: None)
    real = optuna.trial.Trial.set_user_attr

    def spy(trial, key, value):
        if key == "process":
            with contextlib.closing(sqlite3.connect(path)) as database:
                found.append(database.execute("SELECT trial_id FROM trial_heartbeats").fetchall())
        real(trial, key, value)

    monkeypatch.setattr(optuna.trial.Trial, "set_user_attr", spy)
    tune.main(small_config(tmp_path, storage=f"sqlite:///{path}", trials=1))
    assert found == [[(1,)]]


def test_a_ctrl_c_that_gets_lost_stops_the_sweep_after_the_trial(tmp_path, tiny, monkeypatch):
    fit, calls = tune.Trainer.fit, []

    def losing(trainer, module):
        fit(trainer, module)
        calls.append(1)
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(tune.Trainer, "fit", losing)
    with pytest.raises(KeyboardInterrupt):
        tune.main(small_config(tmp_path, trials=5))
    assert len(calls) == 1


def test_a_lost_trial_is_run_again_with_its_parameters(tmp_path, tiny, monkeypatch):
    fit, calls = tune.Trainer.fit, []

    def stopping(trainer, module):
        calls.append(module.config)
        if len(calls) == 2:
            raise SystemExit(1)  # as Lightning does on Ctrl-C
        fit(trainer, module)

    monkeypatch.setattr(tune.Trainer, "fit", stopping)
    config = small_config(tmp_path, trials=3)
    with pytest.raises(KeyboardInterrupt):
        tune.main(config)
    folder = tmp_path / "rnn_hyperparameter_tune" / "run"
    assert [row["state"] for row in csv.DictReader((folder / "trials.csv").open())] == [
        "complete",
        "fail",
    ]
    tune.main(dataclasses.replace(config, resume=str(folder)))
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert [row["state"] for row in rows] == ["complete", "fail", "complete", "complete"]
    assert [row["retry_of"] for row in rows] == ["", "", "1", ""]
    assert [row["reason"] for row in rows] == ["", "stopped", "", ""]
    assert calls[2] == calls[1] != calls[3]


def test_a_trial_too_many_gives_way(tmp_path, tiny, monkeypatch):
    # Two processes may both see that one trial is missing, and both begin it.
    answers = iter([True] * 5)
    monkeypatch.setattr(tune, "trials_to_begin", lambda *_: next(answers, False))
    best = tune.main(small_config(tmp_path, trials=3))
    assert best["trials"] == 3
    path = tmp_path / "rnn_hyperparameter_tune" / "run" / "trials.csv"
    states = [row["state"] for row in csv.DictReader(path.open())]
    assert states == ["complete"] * 3 + ["fail"]


def test_workers_share_the_trials(tmp_path):
    process = start(tmp_path, "--trials", "5", "--workers", "2", "--train-fraction", "0.2")
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert errors == ""
    assert len(states(tmp_path)) == 5
    assert set(states(tmp_path)) <= {"COMPLETE", "PRUNED"}
    assert "rank trial" in output


def test_a_killed_sweep_leaves_nothing_behind_that_counts(tmp_path):
    process = start(tmp_path, "--trials", "50")
    line = process.stdout.readline()
    while line and not re.match(r" +1/50", line):
        line = process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    path = tmp_path / "results" / "rnn_hyperparameter_tune" / "run" / "study.db"
    study = optuna.load_study(study_name="study", storage=f"sqlite:///{path}")
    tune.forget(study)
    assert "RUNNING" not in states(tmp_path)
    assert sum(map(tune.is_finished, study.trials)) == states(tmp_path).count("COMPLETE")


def test_a_task_of_a_slurm_job_is_a_worker_of_its_own(tmp_path, tiny, monkeypatch):
    # Lightning would take it for a process of one training, and ask for the others.
    for name, value in {
        "NTASKS": "4",
        "NTASKS_PER_NODE": "2",
        "NNODES": "2",
        "PROCID": "3",
        "LOCALID": "1",
        "NODEID": "1",
        "JOB_NAME": "sweep",
        "JOB_ID": "7",
        "STEP_NODELIST": "node[1-2]",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert tune.main(small_config(tmp_path, trials=1))["trials"] == 1
