"""The sweep of simclr.py: its space, its rungs, its scores without labels, its results."""

import csv
import dataclasses
import itertools
import json
import shlex
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import torch
from scipy.stats import spearmanr

import functions
import label_free
import simclr
import simclr_hyperparameter_tune as tune
from support import datasets, devices, pretraining, settings, sweep
from support.errors import UserError

FIRST = {
    name: choices[0] if isinstance(choices, tuple) else choices[1]
    for name, choices in tune.SPACE.items()
} | {"epochs": 2, "seed": 0}


def make_config(folder: Path, **changes) -> tune.Config:
    about = {"dataset": "digits", "encoder": "small", "device": "cpu", "max_epochs": 18}
    return tune.Config(**{**about, "output_dir": str(folder), "name": "run", **changes})


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in tune.SPACE.items() for value in values]
)
def test_every_value_reaches_the_training(tmp_path, name, value):
    trial = optuna.trial.FixedTrial({**FIRST, name: value})
    found = tune.suggest_config(trial, make_config(tmp_path, image_size=16), tune.SPACE)
    strength = value if name == "jitter" else FIRST["jitter"]
    assert found.jitter == pytest.approx([0.8 * strength] * 3 + [0.2 * strength])
    if name != "jitter":
        assert getattr(found, name) == value
    assert (found.dataset, found.image_size, found.encoder) == ("digits", 16, "small")
    assert (found.knn_every, found.compile) == (0, "off")


@pytest.mark.usefixtures("in_memory")
def test_four_views_are_trained_half_as_many_epochs(tmp_path):
    config = make_config(tmp_path)
    epochs = [
        tune.trained_config(config, {**FIRST, "views": views, "epochs": epochs, "seed": 3}).epochs
        for views, epochs in [(2, 6), (4, 6), (4, 2)]
    ]
    assert epochs == [6, 3, 1]


@pytest.fixture
def in_memory(monkeypatch):
    """A study that is in no database: trials that train nothing would wait for its commits."""

    def open_study(config, folder, direction, pruner):
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(direction=direction)
        return study, study._storage

    monkeypatch.setattr(sweep, "_open_study", open_study)


def run_search(tmp_path, trials, value, **changes):
    """A search whose trials take no time: `value(params)` is the score, an error fails."""
    config = make_config(tmp_path, trials=trials, **changes)

    def objective(trial):
        tune.suggest_config(trial, config, tune.SPACE)
        return value(trial.params)

    with sweep.open_sweep(
        config, tmp_path, {}, direction="maximize", plan=lambda s: tune.plan_trial(config, s)
    ) as search:
        search.run(lambda: objective)
        return config, search.study.get_trials()


@pytest.mark.usefixtures("in_memory")
def test_the_best_third_of_each_rung_goes_on_and_the_best_three_are_confirmed(tmp_path):
    config, trials = run_search(tmp_path, 40, lambda p: p["temperature"] + 0.001 * p["epochs"])
    assert config.rungs == [2, 6, 18]
    assert len(trials) == 40
    search, confirmation = trials[:31], trials[31:]
    assert {t.params["seed"] for t in search} == {0}
    rungs = [[t for t in search if t.params["epochs"] == epochs] for epochs in config.rungs]
    assert sum(map(len, rungs)) == 31
    for rung, longer in itertools.pairwise(rungs):
        # Without waiting for a rung to be full, no more than a third of it goes on, and nothing
        # twice; none of those that could go on is left.
        settings_of = [t.params["temperature"] for t in longer]
        assert len(set(settings_of)) == len(settings_of)
        assert set(settings_of) <= {t.params["temperature"] for t in rung}
        best = sorted((t.params["temperature"] for t in rung), reverse=True)[: len(rung) // 3]
        assert set(best) <= set(settings_of)
    for number, trial in enumerate(search):  # each was among the best third of what was there then
        epochs = trial.params["epochs"]
        if epochs > 2:
            before = [t for t in trials[:number] if t.params["epochs"] == epochs // 3]
            better = sum(t.params["temperature"] > trial.params["temperature"] for t in before)
            assert better < len(before) // 3
    # The three best are on the last rung with three seeds, the search's own among them.
    best = tune.best_settings(search, config)[:3]
    last = [t for t in trials if t.params["epochs"] == 18]
    for chosen in best:
        seeds = sorted(
            t.params["seed"] for t in last if t.params["temperature"] == chosen["temperature"]
        )
        assert seeds == [0, 1, 2]
    assert {t.params["epochs"] for t in confirmation if t.params["seed"] > 0} == {18}


@pytest.mark.usefixtures("in_memory")
def test_half_of_the_time_is_left_to_confirm(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sweep.Sweep, "time_spent", lambda self: 0.6 if self.count_finished() >= 12 else 0.1
    )
    _, trials = run_search(tmp_path, 40, lambda p: p["temperature"], max_epochs=2)
    seeds = [t.params["seed"] for t in trials]
    assert (set(seeds[:12]), sorted(seeds[12:18])) == ({0}, [1, 1, 1, 2, 2, 2])


@pytest.mark.usefixtures("in_memory")
def test_the_winner_has_the_best_mean_of_those_confirmed(tmp_path):
    def lucky(p):  # The best of the search owes it to the seed.
        return p["temperature"] - 0.5 * (p["temperature"] > 0.8 and p["seed"] > 0)

    config, trials = run_search(tmp_path, 40, lucky, seed=1)
    ranked = tune.ranked_settings(trials, config)
    confirmed = [row for row in ranked if row["seeds"] == 3]
    assert ranked[: len(confirmed)] == confirmed
    assert len(confirmed) == 3
    for row in confirmed:
        values = [
            t.value
            for t in trials
            if t.params["temperature"] == row["temperature"] and t.params["epochs"] == 18
        ]
        assert row["score"] == pytest.approx(np.mean(values))
        assert row["sd"] == pytest.approx(np.std(values, ddof=1))
    assert confirmed[0]["score"] == max(row["score"] for row in confirmed)


@pytest.mark.usefixtures("in_memory")
def test_failed_trials_count_among_those_of_a_rung_but_never_go_on(tmp_path):
    def value(p):
        if p["temperature"] > 0.3:
            raise tune.sweep.Diverged("the loss is nan")
        return p["temperature"]

    _config, trials = run_search(tmp_path, 30, value)
    assert {t.state.name for t in trials} == {"COMPLETE", "FAIL"}
    assert all(t.params["epochs"] == 2 for t in trials if t.state.name == "FAIL")


@pytest.mark.parametrize(("trials", "searched"), [(3, 3), (6, 3), (12, 6), (18, 9), (30, 21)])
@pytest.mark.usefixtures("in_memory")
def test_at_most_half_of_the_trials_confirm(tmp_path, trials, searched):
    _config, made = run_search(tmp_path, trials, lambda p: p["temperature"], max_epochs=2)
    assert len(made) == trials
    first = [t for t in made if t.params["seed"] == 0]
    assert len(first) >= searched
    seeds = [t.params["seed"] for t in made if t not in first]
    assert sorted(seeds) == sorted([1, 2] * (len(seeds) // 2))


@pytest.mark.usefixtures("in_memory")
def test_trials_that_run_leave_the_confirmation_its_share(tmp_path):
    config = make_config(tmp_path, trials=20, max_epochs=2)
    open_sweep = sweep.open_sweep(
        config, tmp_path, {}, direction="maximize", plan=lambda s: tune.plan_trial(config, s)
    )
    with open_sweep as search:
        running = []
        while not search.is_over():
            while len(running) < 8 and (trial := search.begin_trial()):  # as eight workers do
                tune.suggest_config(trial, config, tune.SPACE)
                running.append(trial)
            done = running.pop(0)
            search.end_trial(done, sweep.Outcome("COMPLETE", done.params["temperature"]))
        ranked = tune.ranked_settings(search.study.get_trials(), config)
    assert [row["seeds"] for row in ranked[:3]] == [3, 3, 3]


@pytest.mark.usefixtures("in_memory")
def test_what_diverged_with_any_seed_does_not_win(tmp_path):
    def value(p):
        if p["seed"] == 2 and p["temperature"] > 0.5:
            raise tune.sweep.Diverged("the loss is nan")
        return p["temperature"]

    config, trials = run_search(tmp_path, 40, value)
    failed = {t.params["temperature"] for t in trials if t.state.name == "FAIL"}
    assert failed
    ranked = {row["temperature"] for row in tune.ranked_settings(trials, config)}
    assert not failed & ranked
    # What was stopped by Ctrl-C fails without a reason, and says nothing about its settings.
    for trial in trials:
        trial.user_attrs.pop("reason", None)
    assert failed & {row["temperature"] for row in tune.ranked_settings(trials, config)}


def turned(images: np.ndarray) -> datasets.ImageData:
    """Data without labels of float images `(N, H, W)`, three quarters of them to train on."""
    pixels = torch.from_numpy(images.astype(np.uint8))[:, None]
    cut = len(pixels) * 3 // 4
    parts = (datasets.Split(part, None) for part in (pixels[:cut], pixels[cut:]))
    return datasets.ImageData("turned", (), *parts).with_statistics()


class Pixels(torch.nn.Module):
    """An encoder that shows the pixels."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        return images.flatten(1) * self.scale


def test_the_rotation_probe_knows_up_from_down_and_guesses_where_there_is_none():
    noise = np.random.default_rng(0).integers(0, 100, (400, 8, 8))
    upright = noise.copy()
    upright[:, :2] += 120
    assert label_free.rotation_accuracy(Pixels(), turned(upright), None) > 0.99
    assert label_free.rotation_accuracy(Pixels(), turned(noise), None) == pytest.approx(
        0.25, abs=0.06
    )


def test_of_many_images_the_rotation_probe_takes_some_of_all(monkeypatch):
    seen = []
    result = SimpleNamespace(accuracy=0.5)
    monkeypatch.setattr(functions, "linear_probe", lambda *given, **_: seen.append(given) or result)
    numbers = np.zeros((8000, 2, 2))
    numbers[:, 0, 0], numbers[:, 0, 1] = np.divmod(np.arange(8000), 256)
    data = turned(numbers)
    label_free.rotation_accuracy(Pixels(), data, None)
    ((features, labels, others, _),) = seen
    assert labels.bincount().tolist() == [5000] * 4
    assert len(others) == 4 * 2000
    pixels = ((features[:5000] * data.train.std + data.train.mean) * 255).round()
    shown = pixels[:, 0] * 256 + pixels[:, 1]
    assert len(shown.unique()) == 5000
    assert 2900 < shown.mean() < 3100  # of 6,000; a folder's first ones are of one class


def test_lidar_is_the_rank_of_what_separates_images():
    torch.manual_seed(0)
    # Twelve directions tell images apart; twenty others, however strong, change with the view.
    means = torch.linalg.qr(torch.randn(400, 12, dtype=torch.float64))[0] * 20
    views = torch.randn(10, 400, 32, dtype=torch.float64)
    views[..., :12] = means + 0.1 * views[..., :12]
    views[..., 12:] *= 5
    found = label_free.discriminant_rank(views)
    assert 11.5 < found < 13.5

    # The same from sums over images and views, and the matrix's own root.
    mu, n, v = views.mean(0), 400, 10
    within, between = np.zeros((32, 32)), np.zeros((32, 32))
    for i in range(n):
        d = (mu[i] - mu.mean(0)).numpy()
        between += np.outer(d, d) / n
        for k in range(v):
            e = (views[k, i] - mu[i]).numpy()
            within += np.outer(e, e) / (n * v)
    values, vectors = np.linalg.eigh(within + 1e-4 * np.eye(32))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    p = np.linalg.eigvalsh(root @ between @ root).clip(0)
    p = p / p.sum() + 1e-7
    assert found == pytest.approx(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req_finds_the_exponent(alpha):
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(300, 64, dtype=torch.float64) - 0)[0]
    q = torch.linalg.qr(q - q.mean(0))[0]  # centred, orthogonal
    features = q * torch.arange(1, 65, dtype=torch.float64).pow(-alpha / 2)
    assert label_free.alpha_req(features + 3) == pytest.approx(alpha, abs=1e-6)


def test_alpha_req_looks_at_the_third_to_the_hundredth():
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(400, 150, dtype=torch.float64))[0]
    q = torch.linalg.qr(q - q.mean(0))[0]
    values = torch.arange(1, 151, dtype=torch.float64).pow(-1.5)
    values[:2], values[100:], values[50:100] = 9, 1e-6, values[50:100] / 4
    x, y = np.log(np.arange(3, 101)), values[2:100].log().numpy()
    assert label_free.alpha_req(q * values.sqrt()) == pytest.approx(-np.polyfit(x, y, 1)[0])


def test_the_scores_are_of_the_encoders_features_and_the_probes_of_held_out_images():
    digits = functions.load_images("digits")
    train, test = digits.train.select(torch.arange(150)), digits.test.select(torch.arange(90))
    data = dataclasses.replace(digits, train=train, test=test).with_statistics()
    scores = label_free.measure(Pixels(), data, None)
    mean, std = data.train.mean, data.train.std

    def features(images):
        return ((images - mean) / std).flatten(1)

    known, asked = (features(part.images / 255) for part in (train, test))
    assert scores["rankme"] == pytest.approx(functions.rank_me(known))
    assert scores["alphareq"] == pytest.approx(-abs(label_free.alpha_req(known) - 1))
    labelled = known, train.labels, asked, test.labels
    assert scores["linear"] == functions.linear_probe(*labelled, epochs=20).accuracy < 0.95
    assert scores["knn"] == functions.knn_accuracy(*labelled)
    parts = []
    for part in (train, test):
        turned = [np.rot90(part.images, quarters, (2, 3)).copy() for quarters in range(4)]
        pixels = torch.from_numpy(np.concatenate(turned)) / 255
        parts += [features(pixels), torch.arange(4).repeat_interleave(len(part))]
    assert scores["rotation"] == pytest.approx(
        functions.linear_probe(*parts, epochs=20).accuracy, abs=0.02
    )
    generator, config = devices.epoch_generator(0, 0), simclr.Config()
    images = train.images[functions.fixed_permutation(150)]
    views = [pretraining.crop_views(images, config, generator) for _ in range(10)]
    expected = label_free.discriminant_rank(torch.stack([*map(features, views)]).double())
    assert scores["lidar"] == pytest.approx(expected, rel=1e-4)


def test_the_audit_is_spearman_s_correlation_and_the_winner_s_distance(tmp_path):
    config = make_config(tmp_path)
    rng = np.random.default_rng(0)
    trials = []
    for number in range(12):
        scores = {name: float(rng.random()) for name in (*label_free.SCORES, *label_free.AUDIT)}
        distributions = {
            name: optuna.distributions.CategoricalDistribution([value])
            for name, value in FIRST.items()
        }
        trials.append(
            optuna.trial.create_trial(
                params=FIRST, distributions=distributions, value=scores["rotation"],
                user_attrs=scores,
            )
        )  # fmt: skip
        trials[-1].number = number
    rows = tune.audit_rows(trials, config)
    assert [row["score"] for row in rows] == list(label_free.SCORES)
    for row in rows:
        table = [[t.user_attrs[row["score"]], t.user_attrs["linear"]] for t in trials]
        assert row["linear"] == pytest.approx(spearmanr(table).statistic)
        assert -1 <= row["linear_low"] < row["linear"] < row["linear_high"] <= 1
        assert row["behind"] == max(b for _, b in table) - max(table)[1]
    # Two trials win: labels do not decide between them. What is the same for all ranks nothing.
    for trial in trials:
        trial.user_attrs["lidar"] = float(trial.number < 2)
        trial.user_attrs["alphareq"] = -1.0
    rows = {row["score"]: row for row in tune.audit_rows(trials, config)}
    assert rows.keys() == label_free.SCORES.keys() - {"alphareq"}
    mean = np.mean([trial.user_attrs["linear"] for trial in trials[:2]])
    assert rows["lidar"]["winner"] == pytest.approx(mean)
    # Nor can a score rank what is all as accurate.
    for trial in trials:
        trial.user_attrs["knn"] = 1.0
    assert tune.audit_rows(trials, config) == []


@pytest.mark.usefixtures("unrendered_pictures")
def test_a_search_of_digits_ends_with_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "SPACE", {**tune.SPACE, "batch_size": [256], "views": [2]})
    monkeypatch.setattr(tune, "BANK", 200)
    config = make_config(tmp_path, trials=6, max_epochs=2, seed=4)
    best = tune.main(config)
    folder = tmp_path / "simclr_hyperparameter_tune" / "run"
    assert best == json.loads((folder / "best.json").read_text())
    with (folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert all(0.25 < float(row["rotation"]) < 1 and float(row["lidar"]) > 1 for row in rows)
    assert {"audit.csv", "audit.png", "settings.png", "report.html"} <= {
        path.name for path in folder.iterdir()
    }
    lines = capsys.readouterr().out.splitlines()
    held_out = "digits: 1,293 training images, 144 test images"  # the test images are 360
    assert any(line.startswith(held_out) for line in lines)
    words = shlex.split(lines[lines.index("Train with the best settings:") + 1])
    chosen = settings.parse_config(simclr.Config, words[2:], "")
    for name in ("temperature", "learning_rate", "weight_decay", "crop_scale_min"):
        assert getattr(chosen, name) == pytest.approx(best[name], rel=0.01)
    assert (chosen.batch_size, chosen.encoder, chosen.epochs, chosen.seed) == (256, "small", 100, 4)


def test_images_without_labels_are_scored_and_not_audited():
    data = functions.load_images("digits")
    bare = dataclasses.replace(
        data,
        classes=(),
        train=dataclasses.replace(data.train.select(torch.arange(300)), labels=None),
        test=dataclasses.replace(data.test.select(torch.arange(100)), labels=None),
    ).with_statistics()
    scores = label_free.measure(Pixels(), bare, None)
    assert set(scores) == set(label_free.SCORES)


def test_batches_that_the_images_cannot_fill_are_not_searched():
    data = functions.load_images("digits").with_validation_split()  # 1,293 to train on
    assert tune.search_space(data) == tune.SPACE
    fewer = dataclasses.replace(data, train=data.train.select(torch.arange(255)))
    assert tune.search_space(fewer) == tune.SPACE | {"batch_size": [64, 128]}


@pytest.mark.parametrize("count", [49, 99, 100])
def test_a_search_says_how_much_of_its_score_is_chance(tmp_path, monkeypatch, capsys, count):
    data = functions.load_images("digits")
    data = dataclasses.replace(data, test=data.test.select(torch.arange(count)))
    monkeypatch.setattr(tune, "load_data", lambda config: data)
    monkeypatch.setattr(sweep, "run_sweep", lambda *arguments, **keywords: {})
    tune.main(make_config(tmp_path))
    # Two standard errors of an accuracy of a half, from drawings.
    error = np.random.default_rng(0).binomial(count, 0.5, 100_000).std() / count
    line = (
        f"only {count} images score the settings: "
        f"differences of less than {200 * error:.0f} points are chance\n"
    )
    assert (line in capsys.readouterr().out) == (count < 100)


def test_too_few_images_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "SPACE", {**tune.SPACE, "batch_size": [2048, 4096]})
    with pytest.raises(UserError, match=r"fewer than the smallest batch of the search \(2048\)"):
        tune.main(make_config(tmp_path))
    assert not (tmp_path / "simclr_hyperparameter_tune").exists()
