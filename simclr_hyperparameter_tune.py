"""Search SimCLR's settings for a data set, also for a folder of images that has no labels.

    python simclr_hyperparameter_tune.py --dataset path/to/images --encoder small
    python simclr_hyperparameter_tune.py --dataset digits --encoder small --trials 20 --max-epochs 6
    python simclr_hyperparameter_tune.py --resume results/simclr_hyperparameter_tune/NAME

A trial is a whole training of simclr.py, its schedule annealed to a few epochs, and a score of the
frozen encoder that needs no labels: how well a linear layer tells by how many quarter turns an
image was rotated (SelfAugment, Reed et al. 2021, https://arxiv.org/abs/2009.07724), or one of three
others, which are recorded as well. The better third of the settings is trained again, from the
start, three times as long (successive halving, without waiting for a rung to fill: Li et al. 2020,
https://arxiv.org/abs/1810.05934); the best three are confirmed with other seeds. Where there are
labels, kNN and a linear probe on held-out training images are recorded to audit the scores, and
are never used. The test images are never looked at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
import shlex
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

import functions
import label_free
import simclr
from support import (
    datasets,
    devices,
    encoders,
    figures,
    files,
    runs,
    settings,
    sweep,
    sweep_figures,
)
from support.errors import require
from support.settings import setting

if TYPE_CHECKING:
    import optuna

    Trials = Sequence[optuna.trial.FrozenTrial]

# What is searched, as `sweep.draw` takes it; of the batches those that the images can fill.
SPACE: dict[str, Any] = {
    "learning_rate": (0.02, 0.5),
    "temperature": (0.05, 1.0),
    "crop_scale_min": (0.08, 0.8),
    "jitter": (0.0, 1.0),  # the paper's strength: 0.8, 0.8, 0.8, 0.2 times this
    "grayscale_probability": (0.0, 0.5),
    "weight_decay": (1e-6, 1e-2),
    "batch_size": [64, 128, 256, 512],
    "projection_size": [32, 64, 128, 256],
    "views": [2, 4],
}
BANK, QUERIES = 10_000, 5_000  # at most so many images train the probes, and test them
KEPT = 3  # a third of a rung goes on to the next; the best three are confirmed with three seeds


@dataclass(frozen=True)
class Config(sweep.SweepConfig, trials=60, max_epochs=18):
    """The defaults are for a GPU; fewer epochs and the small encoder are for a laptop."""

    SCRIPT = "simclr_hyperparameter_tune"

    objective: Literal["rotation", "lidar", "rankme", "alphareq"] = setting(
        "rotation", "sweep", "the score that decides; all are recorded"
    )
    encoder: str = setting("resnet18", "model", "as in simclr.py")
    stem: Literal["cifar", "imagenet"] = setting("cifar", "model", "as in simclr.py")
    width: int = setting(64, "model", "as in simclr.py")
    view_size: str | None = setting(None, "model", "as in simclr.py")

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(self.max_epochs >= 2, "--max-epochs must be at least 2: one epoch of four views")

    def unread(self) -> dict[str, str]:
        """As `RunConfig.unread`."""
        return super().unread() | encoders.unread(self.encoder)

    @property
    def rungs(self) -> list[int]:
        """Epochs of the trials, ascending; each rung is three times as long as the one before.

        They are even, as of four views half as many are trained, and at most three.
        """
        first = 2 * max(1, self.max_epochs // (2 * KEPT**2))
        return [n for power in range(3) if (n := first * KEPT**power) <= self.max_epochs]

    @property
    def seeds(self) -> list[int]:
        """The search's seed, and those of the confirmation."""
        return [self.seed + number for number in range(KEPT)]


def suggest_config(
    trial: optuna.trial.BaseTrial, config: Config, space: dict[str, Any]
) -> simclr.Config:
    """The `simclr.Config` of a trial, drawn from `space`.

    Epochs are counted for two views: of four views half as many are trained, in the same time.
    """
    drawn = sweep.draw(trial, space)
    epochs = trial.suggest_categorical("epochs", config.rungs)
    seed = trial.suggest_categorical("seed", config.seeds)
    chosen = trained_config(config, {**drawn, "epochs": epochs, "seed": seed})
    return dataclasses.replace(chosen, knn_every=0, compile="off")  # trials are too short for both


def trained_config(config: Config, parameters: dict[str, Any]) -> simclr.Config:
    """What simclr.py is told for the parameters of a trial."""
    model = {name: getattr(config, name) for name in ("encoder", "stem", "width", "view_size")}
    strength = parameters["jitter"]
    return simclr.Config(
        **config.shared_settings()
        | model
        | parameters
        | {
            "jitter": (0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength),
            "epochs": 2 * parameters["epochs"] // parameters["views"],
        }
    )


def plan_trial(config: Config, search: sweep.Sweep) -> dict[str, Any]:
    """The parameters that the next trial must have; the sampler draws the others.

    First the rungs: a trial among the best third of its rung is trained again on the next one, and
    if there is none, new settings are tried on the first. In the second half of the time, or when
    no more trials are left than that takes, the best three are trained on the last rung with three
    seeds. A search of fewer than eighteen trials confirms a sixth as many settings as it has
    trials, so that at least half of them search.
    """
    trials = [
        trial for trial in search.trials() if trial.state.name != "FAIL" or sweep.is_finished(trial)
    ]
    known = [sweep.parameters_of(trial) for trial in trials]

    def missing(parameters: dict[str, Any], **changes: Any) -> dict[str, Any]:
        wanted = {**parameters, **changes}
        return {} if wanted in known else wanted

    best = best_settings(trials, config)[: min(KEPT, config.trials // (2 * KEPT))]
    confirmation = [
        wanted
        for setting in best
        for seed in config.seeds
        if (wanted := missing(setting, epochs=config.rungs[-1], seed=seed))
    ]
    begun = sum(map(sweep.has_begun, trials))
    if confirmation and (config.trials - begun <= len(confirmation) or search.time_spent() > 0.5):
        return confirmation[0]
    for rung, longer in reversed(list(zip(config.rungs, config.rungs[1:], strict=False))):
        ranked = on_rung(trials, rung, config.seed)
        done = sum(
            sweep.parameters_of(trial).get("epochs") == rung and sweep.is_finished(trial)
            for trial in trials
        )
        for trial in ranked[: done // KEPT]:
            if wanted := missing(trial.params, epochs=longer):
                return wanted
    return {"epochs": config.rungs[0], "seed": config.seed}


def on_rung(trials: Trials, epochs: int, seed: int) -> Trials:
    """The complete trials of so many epochs with this seed, best first."""
    chosen = [
        trial
        for trial in trials
        if trial.state.name == "COMPLETE"
        and (trial.params["epochs"], trial.params["seed"]) == (epochs, seed)
    ]
    return sorted(chosen, key=lambda trial: -trial.value)


def best_settings(trials: Trials, config: Config) -> list[dict[str, Any]]:
    """The parameters of complete trials of the search, best first, each setting once.

    One that came to a longer rung is better than those that did not; one that failed on any rung
    or with any seed is left out.
    """
    same = {"epochs": config.rungs[0], "seed": config.seed}
    # What was stopped or killed fails, too, and is run again.
    ended = [t for t in trials if t.state.name == "FAIL" and sweep.is_finished(t)]
    failed = [{**sweep.parameters_of(t), **same} for t in ended]
    found: list[dict[str, Any]] = []
    for rung in reversed(config.rungs):
        for trial in on_rung(trials, rung, config.seed):
            first = {**trial.params, **same}
            if first not in (*found, *failed):
                found.append(first)
    return found


def load_data(config: Config) -> datasets.ImageData:
    """The training images, a tenth of them in the test images' place.

    Raises:
        UserError: the data cannot be used.
    """
    return functions.load_dataset(config).with_validation_split()


def search_space(data: datasets.ImageData) -> dict[str, Any]:
    """`SPACE` without the batches that are larger than the data.

    Raises:
        UserError: all of them are.
    """
    count, smallest = len(data.train), min(SPACE["batch_size"])
    require(
        count >= smallest,
        f"there are {count} images to train on, fewer than the smallest batch of the search "
        f"({smallest}): a tenth of the images scores the settings, so the folder must hold about "
        f"{smallest * 10 // 9 + 1}, with labels a quarter more",
    )
    return SPACE | {"batch_size": [size for size in SPACE["batch_size"] if size <= count]}


class Objective:
    """Trains and scores one trial. Loads the data once."""

    def __init__(self, config: Config):
        self.config = config
        self.fabric = devices.make_fabric(config.device, config.precision)
        self.data = load_data(config).to(self.fabric.device)
        self.space = search_space(self.data)
        self.scored = dataclasses.replace(
            self.data,
            train=self.data.train.select(functions.fixed_permutation(len(self.data.train))[:BANK]),
            test=self.data.test.select(functions.fixed_permutation(len(self.data.test))[:QUERIES]),
        )

    def __call__(self, trial: optuna.Trial) -> float:
        """Run the trial.

        Raises:
            Diverged: a loss is not finite.
        """
        config = suggest_config(trial, self.config, self.space)
        devices.seed_everything(config.seed)
        model: Any = simclr.SimCLR(config, *self.data.train.images.shape[1:3])
        model = model.to(self.fabric.device).to(memory_format=torch.channels_last)
        silence = io.StringIO()
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stdout(silence),
            contextlib.redirect_stderr(silence),
        ):
            simclr.pretrain(model, self.data, config, runs.Run(Path(folder)), self.fabric)
        scores = label_free.measure(model.encoder, self.scored, self.fabric)
        for name, value in scores.items():
            trial.set_user_attr(name, value)
        return scores[self.config.objective]


def main(config: Config) -> dict[str, Any]:
    """Run the search until `config.trials` are finished; write and return `best.json`'s content.

    Raises:
        UserError: the data or the storage cannot be used, or every trial failed.
    """
    runs.require_package("optuna", "optuna", "a sweep")
    data = load_data(config)  # A mistake shows before there is a run folder.
    space = search_space(data)
    lowest = {name: values[0] for name, values in SPACE.items()}
    lowest |= {"views": max(SPACE["views"]), "epochs": config.rungs[0], "seed": 0}
    trained_config(config, lowest)  # A setting that no trial could run with shows now, too.
    print(data)
    print("trials of", ", ".join(map(str, config.rungs)), "epochs, of four views half as many")
    if config.objective == "rotation":
        print(
            "the rotation probe needs images with an upright orientation; textures, cells or aerial"
        )
        print("pictures have none: search them with another --objective")
        if len(data.test) < 100:
            print(
                f"only {len(data.test)} images score the settings: differences of less than "
                f"{100 / math.sqrt(len(data.test)):.0f} points are chance"  # two standard errors
            )
    names = ("objective", "image_size", "max_epochs", "seed", "encoder", "stem", "width")
    about = {name: getattr(config, name) for name in (*names, "view_size")} | {"space": space}
    return sweep.run_sweep(
        config,
        data.fingerprint(),
        about,
        functools.partial(Objective, config),
        functools.partial(write_results, config=config, data=data),
        direction="maximize",
        plan=functools.partial(plan_trial, config),
    )


def write_results(
    study: optuna.Study, run: runs.Run, config: Config, data: datasets.ImageData
) -> dict[str, Any]:
    """Write the tables and pictures; print the best settings and how to train with them.

    Raises:
        UserError: there are finished trials, and every one failed.
    """
    trials = study.get_trials()
    folder, parameters = run.folder, ["epochs", *SPACE, "seed"]
    attributes = [n for n in (*label_free.SCORES, *label_free.AUDIT) if n != config.objective]
    sweep.write_trials(run, trials, config.objective, parameters, attributes)
    finished = sum(map(sweep.is_finished, trials))
    ranked = ranked_settings(trials, config)
    if not ranked:
        require(not finished, f"all {finished} trials failed: see trials.csv")
        return {}
    title = f"SimCLR sweep on {Path(config.dataset).name}"
    # Longer trainings and other seeds of some settings would be compared with what they are not.
    first = on_rung(trials, config.rungs[0], config.seed)
    winner = next(t for t in first if all(t.params[name] == ranked[0][name] for name in SPACE))
    sweep_figures.plot_sweep(
        study, folder, title, config.objective, list(SPACE), winner.number, first
    )
    if data.classes:
        audit = audit_rows(trials, config)
        files.write_csv(folder / "audit.csv", audit)
        print_audit(audit)
        plot_audit(folder / "audit.png", trials, config, title)
    best = {**ranked[0], "objective": config.objective, "trials": finished}
    files.write_json(folder / "best.json", best)
    print(f"rank trial  epochs  seeds  {config.objective}")
    for rank, row in enumerate(ranked[:5], 1):
        spread = f" ± {row['sd']:.4f}" if row["seeds"] > 1 else ""
        line = f"{rank:4} {row['trial']:5} {row['epochs']:7} {row['seeds']:6}"
        print(f"{line}  {row['score']:.4f}{spread}")
    print("Train with the best settings:")
    print("  python simclr.py", shlex.join(training_flags(best, config)))
    return best


def ranked_settings(trials: Trials, config: Config) -> list[dict[str, Any]]:
    """The settings of the search with the mean and sd of their scores, best first.

    The scores are those of a setting's longest rung; what was confirmed with more seeds is before
    what was not.
    """
    rows = []
    for parameters in best_settings(trials, config):
        for epochs in reversed(config.rungs):
            wanted = [{**parameters, "epochs": epochs, "seed": seed} for seed in config.seeds]
            found = [t for t in trials if t.state.name == "COMPLETE" and t.params in wanted]
            if found:
                break
        values = [trial.value for trial in found]
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        row = {**{name: parameters[name] for name in SPACE}, "epochs": epochs}
        row |= {"score": statistics.fmean(values), "sd": sd, "seeds": len(values)}
        rows.append(row | {"trial": found[0].number})
    return sorted(rows, key=lambda row: (-row["epochs"], -row["seeds"], -row["score"]))


def training_flags(best: dict[str, Any], config: Config) -> list[str]:
    """The words that train simclr.py with the best settings, for its default number of epochs."""
    parameters = {name: best[name] for name in SPACE} | {"seed": config.seed}
    parameters["epochs"] = simclr.Config.epochs
    for name, value in parameters.items():
        if isinstance(value, float):
            parameters[name] = float(f"{value:.3g}")
    chosen = trained_config(config, parameters)
    jitter: Any = tuple(round(value, 3) for value in chosen.jitter)
    chosen = dataclasses.replace(chosen, jitter=jitter, epochs=simclr.Config.epochs)
    return settings.changed_words(chosen)


def audit_rows(trials: Trials, config: Config) -> list[dict[str, Any]]:
    """How well each score ranks the trials of a rung, beside the labels.

    Spearman's rank correlation with the audit and its 95 % interval (Bonett & Wright 2000), and how
    far the linear probe of the score's winner stays behind the best one; of several winners the
    mean counts. A score that is the same for all trials has no row; a rung whose trials all have
    the same accuracy has none at all. Longer rungs hold what the objective has chosen, which lowers
    its own correlation there; and the sampler follows it, so that trials are not independent, and
    the interval is too narrow.
    """
    from scipy.stats import spearmanr

    rows = []
    for epochs in config.rungs:
        chosen = [trial.user_attrs for trial in on_rung(trials, epochs, config.seed)]
        varied = all(len({each[audit] for each in chosen}) > 1 for audit in label_free.AUDIT)
        if len(chosen) < 5 or not varied:
            continue
        best = max(each["linear"] for each in chosen)
        for score in label_free.SCORES:
            row = {"epochs": epochs, "trials": len(chosen), "score": score}
            top = max(each[score] for each in chosen)
            winners = [each["linear"] for each in chosen if each[score] == top]
            if len(winners) == len(chosen):
                continue
            for audit in label_free.AUDIT:
                pairs = [[each[score], each[audit]] for each in chosen]
                r = float(spearmanr(pairs).statistic)
                width = 1.96 * math.sqrt((1 + r**2 / 2) / (len(chosen) - 3))
                low, high = (math.tanh(math.atanh(r * 0.999999) + s * width) for s in (-1, 1))
                row |= {audit: r, f"{audit}_low": low, f"{audit}_high": high}
            winner = statistics.fmean(winners)
            rows.append(row | {"winner": winner, "behind": best - winner})
    return rows


def print_audit(rows: Sequence[dict[str, Any]]) -> None:
    """The rank correlations of the scores with the linear probe, and what their winners lose."""
    if rows:
        print("audit: rank correlation with the linear probe; how far the winner stays behind")
    for row in rows:
        interval = f"[{row['linear_low']:+.2f}, {row['linear_high']:+.2f}]"
        print(
            f"  {row['epochs']:3} epochs, {row['trials']:3} trials  {row['score']:9} "
            f"{row['linear']:+.2f} {interval}  {100 * row['behind']:.1f} points behind"
        )


def plot_audit(path: Path, trials: Trials, config: Config, title: str) -> None:
    """Each score against the linear probe's accuracy; a colour for each rung."""
    with figures.new_figure(path, title) as figure:
        panels = figures.add_panels(figure, len(label_free.SCORES), sharey=True)
        for axes, (name, text) in zip(panels, label_free.SCORES.items(), strict=True):
            for epochs, color in zip(config.rungs, figures.LINE_COLORS, strict=False):
                chosen = [trial.user_attrs for trial in on_rung(trials, epochs, config.seed)]
                points = [(each[name], 100 * each["linear"]) for each in chosen]
                if points:
                    label = f"{epochs} epochs"
                    axes.scatter(*zip(*points, strict=True), facecolor=color, label=label)
            figures.label_axes(axes, text.split(",")[0], "")
        figure.supylabel("linear probe (%)")
        figures.add_legend(figure)


if __name__ == "__main__":
    runs.run_script(main, Config, __doc__)
