"""The sweep of rnn.py: its space, its trials under Lightning, its results."""

import csv
import dataclasses
import itertools
import json
import shlex
import signal
from pathlib import Path

import optuna
import pytest
import torch

import rnn
import rnn_hyperparameter_tune as tune
from support import runs, settings, sweep, sweep_figures

FIRST = {name: choices[0] for name, choices in tune.SPACE.items()}
# The sweep's behaviour does not depend on the size of the models.
SMALL = {"hidden_size": [8, 16], "num_layers": [1], "batch_size": [64, 128]}


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


def folder_of(config: tune.Config) -> Path:
    return Path(config.output_dir) / "rnn_hyperparameter_tune" / "run"


def rows_of(config: tune.Config) -> list[dict[str, str]]:
    with (folder_of(config) / "trials.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def tiny(monkeypatch):
    """A space of small models, and no plots."""
    monkeypatch.setattr(tune, "SPACE", {**tune.SPACE, **SMALL})
    monkeypatch.setattr(sweep_figures, "plot_sweep", lambda *_: None)


@pytest.fixture(scope="module")
def digits():
    return rnn.load_splits(rnn.Config(dataset="digits"))


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
def test_every_value_reaches_the_model_the_optimizer_and_the_loader(tmp_path, digits, name, value):
    # The public version suggested hidden_size and num_layers but never passed them on.
    trial = optuna.trial.FixedTrial({**FIRST, name: value})
    config = tune.suggest_config(trial, small_config(tmp_path))
    module = tune.make_module(config, "rnn", *digits)
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
    ("name", "value"), [(name, value) for name, values in tune.WIDE.items() for value in values]
)
def test_the_wide_space_reaches_the_trial_and_its_winner(tmp_path, name, value):
    first = FIRST | {wide: values[0] for wide, values in tune.WIDE.items()} | {name: value}
    config = small_config(tmp_path, space="wide", augmentation="none")
    found = tune.suggest_config(optuna.trial.FixedTrial(first), config)
    assert {wide: getattr(found, wide) for wide in first} == first
    (tmp_path / "best.json").write_text(
        json.dumps({"cell": "rnn", "augmentation": "none", **first})
    )
    winner = rnn.read_best(str(tmp_path / "best.json"))
    assert {wide: getattr(winner, wide) for wide in first} == first


def test_muon_has_rates_of_its_own_and_reaches_the_trial_and_its_winner(tmp_path):
    config = small_config(tmp_path, optimizer="muon", trials=1, max_epochs=1)
    assert config.search_space == tune.SPACE | tune.MUON
    best = tune.main(config)
    assert 5e-3 <= best["learning_rate"] <= 1e-1
    assert 1e-2 <= best["weight_decay"] <= 1
    trial = tune.suggest_config(optuna.trial.FixedTrial(best), config)
    winner = rnn.read_best(str(next(tmp_path.rglob("best.json"))))
    assert (trial.optimizer, winner.optimizer) == ("muon", "muon")
    assert winner.learning_rate == trial.learning_rate == best["learning_rate"]


def test_a_trial_has_the_settings_of_the_sweep(tmp_path):
    changes = {"seed": 7, "max_epochs": 4, "augmentation": "original", "precision": "bfloat16"}
    config = tune.suggest_config(
        optuna.trial.FixedTrial(FIRST), small_config(tmp_path, image_size=16, **changes)
    )
    found = (config.dataset, config.seed, config.epochs, config.augmentation, config.precision)
    assert found == ("digits", 7, 4, "original", "bfloat16")
    assert (config.image_size, config.device, config.train_fraction) == (16, "cpu", 0.3)
    assert config.cell_names == ["rnn"]


@pytest.mark.parametrize(
    ("cell", "precision", "augmentation", "optimizer"),
    [
        ("gru", "float32", "standard", "adam"),
        ("gru", "bfloat16", "none", "adam"),
        ("lstm", "auto", "standard", "muon"),
        ("rnn", "auto", "none", "adam"),
    ],
)
def test_lightning_and_rnn_train_end_with_the_same_weights(
    tmp_path, digits, cell, precision, augmentation, optimizer
):
    config = rnn.Config(
        dataset="digits",
        cells=cell,
        hidden_size=16,
        epochs=4,
        learning_rate=1.0,  # so high that the loss rises, and the scheduler has something to do
        patience=0,
        device="cpu",
        precision=precision,
        augmentation=augmentation,
        optimizer=optimizer,
    )
    module = tune.make_module(config, cell, *digits)
    start = [p.detach().clone() for p in module.model.parameters()]
    trainer = tune.make_trainer(config, [])
    trainer.fit(module)
    model = rnn.make_model(config, cell, digits[0])
    history = []
    rnn.train(model, cell, (digits[0].train, digits[1]), config, runs.Run(tmp_path), history)
    theirs, ours = module.model.state_dict(), model.state_dict()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    assert not any(map(torch.equal, start, model.parameters()))
    assert history[-1]["learning_rate"] < 1
    loss = trainer.callback_metrics["validation_loss"].item()
    assert loss == pytest.approx(history[-1]["validation_loss"], rel=1e-6)


@pytest.fixture
def scripted(monkeypatch, tiny):
    """Let the validation losses be those of a list, one after the other."""

    def set_losses(losses):
        given = iter(losses)

        def evaluate(model, split):
            assert len(split) == 144  # the test images are 360
            return next(given), None

        monkeypatch.setattr(rnn, "evaluate", evaluate)

    return set_losses


def test_a_trial_s_value_is_the_validation_loss_of_its_last_epoch(tmp_path, scripted):
    scripted([3.0, 1.0, 2.0, 2.5, 2.25, 1.5])
    config = small_config(tmp_path, trials=2, max_epochs=3)
    best = tune.main(config)
    assert [float(row["validation_loss"]) for row in rows_of(config)] == [2.0, 1.5]
    assert (best["validation_loss"], best["trial"]) == (1.5, 1)
    with sweep.open_sweep(config, folder_of(config), {}) as search:
        reported = [trial.intermediate_values for trial in search.trials()]
    assert reported == [{0: 3.0, 1: 1.0, 2: 2.0}, {0: 2.5, 1: 2.25, 2: 1.5}]


def test_a_hopeless_trial_is_stopped_early(tmp_path, scripted):
    # The median of five trials counts, from the second epoch on.
    scripted([1.0, 1.125, 1.25] * 5 + [9.0, 9.0] + [9.0, 1.0, 1.0])
    config = small_config(tmp_path, trials=7, max_epochs=3)
    assert tune.main(config)["trials"] == 7
    found = [(row["state"], row["epochs"], row["validation_loss"]) for row in rows_of(config)]
    assert found == [("complete", "3", "1.25")] * 5 + [
        ("pruned", "2", "9.0"),
        ("complete", "3", "1.0"),
    ]


@pytest.mark.parametrize(("pruner", "stops"), [("none", False), ("hyperband", True)])
def test_other_pruners_stop_trials_or_none(tmp_path, scripted, pruner, stops):
    scripted(itertools.count(1.0))  # each trial is worse than those before
    config = small_config(tmp_path, trials=8, max_epochs=3, pruner=pruner)
    tune.main(config)
    found = {row["state"] for row in rows_of(config)}
    assert found == ({"complete", "pruned"} if stops else {"complete"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The settings of a finished sweep of three trials, what it returned and what it printed."""
    config = small_config(tmp_path_factory.mktemp("a b"), seed=3)
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr(tune, "SPACE", {**tune.SPACE, **SMALL})
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(words)))
        best = tune.main(config)
    return config, best, "\n".join(lines)


def test_a_sweep_writes_its_results(finished):
    config, best, printed = finished
    folder = folder_of(config)
    assert best == json.loads((folder / "best.json").read_text())
    rows = rows_of(config)
    assert [row["trial"] for row in rows] == ["0", "1", "2"]
    assert best["validation_loss"] == min(float(row["validation_loss"]) for row in rows)
    chosen = rows[best["trial"]]
    assert all(float(chosen[name]) == best[name] for name in tune.SPACE)
    plots = "optimization_history settings param_importances intermediate_values "
    assert {path.stem for path in folder.glob("*.png")} == set((plots + "timeline").split())
    assert "3/3" in printed
    config = rnn.read_best(str(folder / "best.json"))
    assert config.learning_rate == best["learning_rate"]


def test_the_winner_s_command_has_what_its_training_needs(finished):
    _, best, printed = finished
    lines = printed.splitlines()
    place = lines.index("Train the winner with:")
    words = shlex.split((lines[place + 1] + "\n" + lines[place + 2]).replace("\\\n", ""))
    assert words[:2] == ["python", "rnn.py"]
    config = settings.parse_config(rnn.Config, words[2:], "")
    assert (config.dataset, config.seed, config.device) == ("digits", 3, "cpu")
    assert config.hidden_size == best["hidden_size"]
    assert max(map(len, lines[place : place + 2])) <= 80


def test_names_with_dollars_are_no_formulas(finished, tmp_path):
    config, best, _ = finished
    folder = folder_of(config)
    with sweep.open_sweep(config, folder, {}) as search:
        named = dataclasses.replace(config, dataset="images/price_$5_$10")
        assert tune.write_results(search.study, runs.Run(tmp_path), named) == best
    assert (tmp_path / "timeline.png").exists()


def test_a_sweep_stopped_by_ctrl_c_goes_on_with_the_trials_that_are_left(
    tmp_path, tiny, monkeypatch, capsys, signals
):
    configs, step = [], rnn.loss_function

    def stopped(*arguments):
        if len(configs) == 2 and configs[-1] is not None:
            configs.append(None)
            signal.raise_signal(signal.SIGINT)  # which Lightning turns into an exit
        return step(*arguments)

    suggest = tune.suggest_config
    monkeypatch.setattr(
        tune, "suggest_config", lambda *a: configs.append(suggest(*a)) or configs[-1]
    )
    monkeypatch.setattr(rnn, "loss_function", stopped)
    config = small_config(tmp_path, augmentation="none")
    with pytest.raises(SystemExit) as left:
        runs.exit_cleanly(lambda: tune.main(config))
    assert left.value.code == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert "stopped by Ctrl-C" in line
    assert "--resume" in line
    assert [row["state"] for row in rows_of(config)] == ["complete", "fail"]
    best = tune.main(settings.parse_config(tune.Config, ["--resume", str(folder_of(config))], ""))
    rows = rows_of(config)
    assert best["trials"] == 3
    assert [row["state"] for row in rows] == ["complete", "fail", "complete", "complete"]
    assert [row["retry_of"] for row in rows] == ["", "", "1", ""]
    assert [row["reason"] for row in rows] == ["", "stopped", "", ""]
    first, lost, _, again, new = configs
    assert all(getattr(again, name) == getattr(lost, name) for name in tune.SPACE)
    assert len({c.learning_rate for c in (first, lost, new)}) == 3


def test_a_trial_that_diverges_fails_alone(tmp_path, tiny, monkeypatch):
    loss, calls = rnn.loss_function, itertools.count(1)
    monkeypatch.setattr(
        rnn, "loss_function", lambda *a: loss(*a) * (float("nan") if next(calls) == 2 else 1)
    )
    config = small_config(tmp_path)
    assert tune.main(config)["trials"] == 3
    rows = rows_of(config)
    assert [row["state"] for row in rows] == ["fail", "complete", "complete"]
    assert "the loss is nan in epoch 1, step 2" in rows[0]["reason"]


def test_a_sweep_whose_trials_all_fail_is_a_mistake(tmp_path, tiny, monkeypatch, user_error):
    monkeypatch.setattr(rnn, "loss_function", lambda *_: torch.tensor(float("inf")))
    with user_error("all 2 trials failed"):
        tune.main(small_config(tmp_path, trials=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "nowhere"}, "unknown data set"),
        ({"train_fraction": 0.1}, "larger --train-fraction"),
        ({"train_fraction": 1.5}, "--train-fraction must be"),
        ({"storage": "sqlite://"}, "ends with the process"),
    ],
)
def test_mistakes_are_found_before_anything_is_made(tmp_path, user_error, changes, message):
    with user_error(message):
        tune.main(small_config(tmp_path, **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_other_images_is_refused(tmp_path, tiny, user_error):
    config = small_config(tmp_path, trials=1)
    tune.main(config)
    with user_error("has data"), sweep.open_sweep(config, folder_of(config), {"data": "other"}):
        pass


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


@pytest.mark.parametrize(
    "change", [{"cell": "gru"}, {"max_epochs": 2}, {"augmentation": "none"}, {"seed": 1}]
)
def test_other_trials_have_no_place_in_a_shared_study(tmp_path, tiny, user_error, change):
    config = small_config(tmp_path, trials=1, storage=f"sqlite:///{tmp_path / 'shared.db'}")
    tune.main(config)
    with user_error(f"has {next(iter(change))} "):
        tune.main(dataclasses.replace(config, name="other", **change))


def test_a_study_needs_a_storage(user_error):
    with user_error("--study has no effect without --storage"):
        settings.parse_config(tune.Config, ["--study", "mine"], "")
