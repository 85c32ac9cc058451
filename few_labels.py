"""What finished encoders buy when few images have labels, beside methods without pretraining.

    python few_labels.py results/simsiam/A results/simclr/B      # finished runs of one data set
    python few_labels.py --labels 10,100 --methods scratch,fixmatch    # FashionMNIST, no run
    python few_labels.py --resume results/few_labels/NAME --workers 2  # trains what is missing only

For each number of labels and each draw of them every method gets the same labelled images, and is
tested on the same images, which it has not seen. Runs that differ in nothing but their seed are one
method, mean ± sd over runs and draws. Writes a row per training to `few_labels.csv`, then
`scores.csv`, `differences.csv`, `table.md` and `few_labels.png`.

No method chooses anything by a draw: settings are fixed, every training takes `--steps` steps, and
its last weights count. So all drawn labels are there to train with. The settings were chosen on
held-out training images, some in an older study, some by `python benchmarks/pilots.py
docs/results/pilots/few_labels.csv RUN`; FixMatch's are the paper's.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import classifiers
import compare
import functions
from support import (
    checkpoints,
    datasets,
    devices,
    encoders,
    files,
    frozen,
    graphs,
    pool,
    pretraining,
    report,
    runs,
    scores,
    settings,
)
from support.errors import Diverged, require
from support.scores import Task
from support.settings import setting


@dataclass(frozen=True)
class Config(classifiers.MethodConfig, dataset=""):
    """The settings of the comparison, besides those of the methods."""

    SCRIPT = "few_labels"

    runs: tuple[str, ...] = setting((), "data", "finished run folders, all of one data set")
    evaluate_on: Literal["test", "validation"] = setting(
        "test", "data", "validation: a tenth of the training images, to choose settings by"
    )
    methods: str = setting("all", "comparison", f"of {', '.join(classifiers.METHODS)}")
    labels: str = setting(
        "10,40,100,250,1000,4000,all", "comparison", "how many labels, of all classes together"
    )
    draws: Literal["balanced", "random"] = setting(
        "balanced", "comparison", "labelled images: as many of each class, or as they come"
    )
    quick_draws: int = setting(20, "comparison", "draws for methods that take seconds")
    slow_draws: int = setting(5, "comparison", "draws for methods that take minutes")
    transductive: bool = setting(
        False, "comparison", "the test images are among the unlabelled ones, too"
    )
    together: bool = setting(
        False, "comparison", "also all runs together: their features side by side"
    )
    workers: int = setting(1, "run", "processes, each with its share of threads")

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("quick_draws", "slow_draws"):
            require(getattr(self, name) >= 2, f"{settings.flag(name)} must be at least 2")
        require(self.workers >= 1, "--workers must be at least 1")
        unknown = set(self.method_names) - classifiers.METHODS.keys()
        require(
            not unknown, f"--methods knows {','.join(classifiers.METHODS)}, not {self.methods!r}"
        )
        self.label_counts(2)

    @property
    def method_names(self) -> tuple[str, ...]:
        """The methods to compare."""
        names = tuple(name.strip() for name in self.methods.split(","))
        return tuple(classifiers.METHODS) if names == ("all",) else tuple(dict.fromkeys(names))

    def label_counts(self, images: int) -> list[int]:
        """The numbers of labels, ascending; those above `images` are left out."""
        parts = [part.strip() for part in self.labels.split(",")]
        good = all(part == "all" or (part.isdecimal() and int(part) > 1) for part in parts)
        require(good, f"--labels takes whole numbers from 2 and all, not {self.labels!r}")
        counts = {images if part == "all" else int(part) for part in parts}
        return sorted(count for count in counts if count <= images)


# What may differ when a comparison goes on: finished rows stay as they are, and further runs are
# named after the earlier ones.
FREE_ON_RESUME = frozenset(
    {"runs", "methods", "labels", "quick_draws", "slow_draws", "together", "workers"}
)


# ---------------------------------------------------------------------------- the trainings


@dataclass(frozen=True)
class Start:
    """What methods start from: a finished run in a `folder`, the pixels, or nothing.

    Runs that differ in nothing but their seed have one `group`, which names them in tables and
    figures. `seconds` are the pretraining's.
    What has `members` has their features, side by side.
    """

    group: str
    kinds: tuple[str, ...]
    seconds: float = 0.0
    folder: Path | None = None
    members: tuple[str, ...] = ()


def read_starts(folders: Sequence[str], together: bool = False) -> dict[str, Start]:
    """What there is to start from, by name; with `together` also all runs together.

    Raises:
        UserError: a folder that holds no finished run, or one that is given twice; fewer than two
            runs to put together.
    """
    read: dict[str, compare.Run] = {}
    for folder in folders:
        run = compare.read_run(Path(folder))[0]
        name = f"{run.script}/{Path(folder).resolve().name}"
        has_encoder = (Path(folder) / "encoder.safetensors").exists()
        require(has_encoder, f"{folder} has no encoder.safetensors: it pretrained no encoder")
        require(name not in read, f"{name} is given twice, or two runs have that name")
        # Runs that were evaluated in other ways are no others.
        known = {k: v for k, v in run.settings.items() if k not in pretraining.EVALUATION}
        read[name] = dataclasses.replace(run, name=name, settings=known)
    groups = compare.group([*read.values()])
    names = [f"{len(runs)} runs of {runs[0].script}" for runs in groups]
    group_of: dict[str, str] = {}
    for members, name in zip(groups, names, strict=True):
        group = name
        if len(members) == 1 or names.count(name) > 1:  # then the first run names them
            more = f" and {len(members) - 1} more" if len(members) > 1 else ""
            group = members[0].name + more
        group_of |= dict.fromkeys((run.name for run in members), group)
    starts = {"nothing": Start("", ("new",)), "pixels": Start("pixels", ("pixels",))}
    for name, run in read.items():
        seconds = float(run.summary.get("pretrain_seconds", 0))
        starts[name] = Start(group_of[name], ("features", "encoder"), seconds, Path(run.folder))
    require(not together or len(read) > 1, "--together needs two runs or more")
    if together:
        seconds, what = sum(start.seconds for start in starts.values()), f"all {len(read)} runs"
        starts[what] = Start(what, ("features",), seconds, members=tuple(read))
    return starts


def list_tasks(config: Config, starts: dict[str, Start], images: int) -> list[Task]:
    """All trainings, the first draw of everything first."""
    tasks = []
    for draw in range(max(config.quick_draws, config.slow_draws)):
        for count in config.label_counts(images):
            for name, start in starts.items():
                for key in config.method_names:
                    method = classifiers.METHODS[key]
                    draws = config.slow_draws if method.slow else config.quick_draws
                    if method.exact and count == images:  # there is one draw of all images
                        draws = 1
                    if draw < draws and set(method.start) & set(start.kinds):
                        tasks.append(Task(key, name, count, draw))
    return tasks


def load_data(config: Config) -> datasets.ImageData:
    """The data set with its test images, whatever `--evaluate-on` says."""
    data = functions.load_dataset(config)
    require(bool(data.classes), f"{data.name} has no labels")
    return data


def prepare(
    folder: Path,
    tasks: Collection[Task],
    starts: dict[str, Start],
    config: Config,
    data: datasets.ImageData,
) -> None:
    """Write the features and neighbours that tasks need, once for all of them and all processes."""
    used = {(task.start, classifiers.METHODS[task.method]) for task in tasks}
    kinds = {"pixels", "features"}
    needs = {(name, method.graph or "features") for name, method in used if kinds & {*method.start}}
    parts = {name: start.members or (name,) for name, start in starts.items()}

    def features(name: str) -> dict[str, Tensor]:
        return extract(starts[name], data, config)

    graphs.prepare(folder, needs, parts, features, config.neighbours, config.transductive)


def extract(start: Start, data: datasets.ImageData, config: Config) -> dict[str, Tensor]:
    """Standardised features of the training and test images, `train` `(N, D)`, `test` `(M, D)`."""
    parts = {"train": data.train, "test": data.test}
    if start.folder is None:
        found = {k: datasets.to_float(part.images).flatten(1) for k, part in parts.items()}
    else:
        encoder = frozen.load_encoder(start.folder, config.device)
        device, network = encoder.fabric.device, encoder.network
        found = {
            k: functions.extract_features(network, part.to(device), encoder.fabric)
            for k, part in parts.items()
        }
    # All training images say how features are spread, however few have labels.
    mean, std = functions.feature_statistics(found["train"])
    return {k: (features - mean) / std for k, features in found.items()}


class Trainer:
    """Does a task, and keeps what several of them share; one per process."""

    def __init__(self, config: Config, folder: Path):
        self.config, self.starts = config, read_starts(config.runs, config.together)
        self.fabric = devices.make_fabric(config.device, config.precision)
        self.data = load_data(config).evaluated_on(config.evaluate_on).to(self.fabric.device)
        self.folder = folder
        self.neighbourhood = functools.cache(graphs.read_neighbourhood)

    def __call__(self, task: Task) -> dict[str, Any]:
        """The row of `few_labels.csv`."""
        from sklearn.metrics import f1_score

        config, data, fabric = self.config, self.data, self.fabric
        method, start = classifiers.METHODS[task.method], self.starts[task.start]
        began, seed = time.perf_counter(), config.seed + task.draw
        drawn = (config.seed, task.draw)
        chosen = datasets.draw_labels(data.train.labels, task.labels, drawn, config.draws)
        devices.seed_everything(seed)
        encoder = features = near = None
        if {"new", "encoder"} & set(method.start):
            encoder = self.make_encoder(start.folder)
        elif method.graph:
            near = self.neighbourhood(graphs.place(self.folder, task.start, method.graph))
        else:
            read = graphs.read_features(self.folder, start.members or (task.start,), chosen)
            features = {part: values.to(fabric.device) for part, values in read.items()}
        chosen = chosen.to(fabric.device)
        images, test = (dataclasses.replace(s, labels=None) for s in (data.train, data.test))
        if config.transductive:
            everything = torch.cat([images.images, test.images])
            images = dataclasses.replace(images, images=everything, paths=None)
        given = classifiers.Given(
            images=images,
            test=test,
            chosen=chosen,
            labels=data.train.labels[chosen],
            classes=len(data.classes),
            encoder=encoder,
            features=features,
            near=near,
            seed=seed,
            config=config,
            fabric=fabric,
        )
        try:
            predictions, truth = method.predict(given).cpu(), data.test.labels.cpu()
        except Diverged as error:
            raise Diverged(
                f"{describe(task)}: {error}; other --methods go on without it"
            ) from error
        row = {**task._asdict(), "accuracy": functions.accuracy(predictions, truth)}
        tested = truth.unique().numpy()  # classes without test images have no score
        row["macro_f1"] = float(f1_score(truth, predictions, labels=tested, average="macro"))
        return row | {"seconds": time.perf_counter() - began}

    def make_encoder(self, folder: Path | None) -> Any:
        """The encoder of a finished run; without one a new encoder, like that of the first run."""
        if folder is not None:
            return frozen.load_encoder(folder, self.config.device).network
        channels, side = self.data.train.images.shape[1:3]
        about: dict[str, Any] = {"encoder": "small", "stem": "cifar"}
        if self.config.runs:
            path = Path(self.config.runs[0]) / "encoder.safetensors"
            _, about = checkpoints.load_tensors(path)
            require({"encoder", "stem"} <= about.keys(), f"{path} does not say what encoder it is")
        width = about.get("width", 64)
        return encoders.make_encoder(about["encoder"], about["stem"], channels, side, width)


def describe(task: Task) -> str:
    """A task in words."""
    return f"{task.method} from {task.start}, {task.labels:,} labels, draw {task.draw + 1}"


def train_missing(
    config: Config, folder: Path, tasks: Sequence[Task], rows: scores.Rows
) -> list[dict[str, Any]]:
    """Do the tasks that have no row yet, and add each row to `few_labels.csv` at once.

    Returns:
        The rows of all tasks, in their order.
    """
    done = {scores.task_of(row): row for row in rows}
    missing = [task for task in tasks if task not in done]
    make_trainer = functools.partial(Trainer, config, folder)
    for row in pool.run_tasks(make_trainer, missing, config.workers) if missing else ():
        task = scores.task_of(row)
        done[task] = row
        files.write_csv(folder / "few_labels.csv", done.values())
        missing = [other for other in missing if other != task]
        if row["seconds"] > 10 or len(missing) % 100 == 0:
            time_left = scores.estimate_time(missing, [*done.values()], config.workers)
            took = f"{row['accuracy']:.1%} in {row['seconds']:.0f} s"
            print(f"{describe(task)}: {took}; {len(missing):,} left, {time_left}")
    return [done[task] for task in tasks]


# ----------------------------------------------------------------------------- the results


def write_results(
    folder: Path, rows: scores.Rows, starts: dict[str, Start], title: str, config: Config
) -> dict[str, Any]:
    """Write the tables and the figure, print the tables, and return what `summary.json` gets."""
    named = []
    styles: dict[str, tuple[str, ...]] = {}
    for row in rows:
        method, start = classifiers.METHODS[row["method"]], starts[row["start"]]
        name = method.label + (f", {start.group}" if start.group else "")
        name += " (transductive)" if config.transductive and method.unlabelled else ""
        named.append(row | {"name": name})
        panel = start.group if "features" in start.kinds else ""
        styles[name] = (panel, method.color, ":" if row["start"] == "pixels" else "-")
    means = scores.summarize(named, {name: start.seconds for name, start in starts.items()})
    plain = frozenset(name for name, (panel, _, _) in styles.items() if not panel)
    differences = scores.find_differences(named, plain)
    files.write_csv(folder / "scores.csv", means)
    files.write_csv(folder / "differences.csv", differences)
    tables = scores.make_tables(means, differences)
    with files.atomic_file(folder / "table.md") as temporary:
        temporary.write_text(tables, encoding="utf-8")
    print(tables)
    scores.plot_scores(folder / "few_labels.png", means, styles, title)
    summary: dict[str, Any] = {}
    for mean in means:
        cells = summary.setdefault(f"accuracy of {mean['name']}", {})
        cells[str(mean["labels"])] = mean["accuracy"]
    summary["mean_accuracy"] = float(np.mean([mean["accuracy"] for mean in means]))
    return summary | {"training_seconds": sum(row["seconds"] for row in rows)}


def with_data_of_runs(config: Config) -> Config:
    """The settings with the data set of the runs, or FashionMNIST, where none is named.

    Raises:
        UserError: the runs are of several data sets, or images are asked for otherwise than theirs.
    """
    records = [files.read_json(Path(folder) / "config.json") for folder in config.runs]
    named = all(isinstance(record.get("dataset"), str) for record in records)
    require(named, "a run's config.json names no data set")
    # A folder may be spelled in several ways; older runs have its name only.
    names = {str(record.get("data") or record["dataset"]): record["dataset"] for record in records}
    names = names or {"": "fashion-mnist"}
    one = 1 in (len(names), len(set(names.values())))
    require(
        one or bool(config.dataset),
        f"the runs are of several data sets: {', '.join(sorted(names.values()))}; if they are "
        "the same images, give one with --dataset",
    )
    first = records[0] if records else {}
    told: dict[str, Any] = {
        name: first[name] for name in ("image_size", "channels", "stack") if name in first
    }
    if first.get("value_range"):
        told["value_range"] = tuple(first["value_range"])
    for name, value in told.items():
        asked = getattr(config, name)
        require(
            asked in (value, getattr(Config, name)),
            f"{settings.flag(name)} is {value} in the runs, not {asked}: leave the flag out",
        )
    if config.data_dir == Config.data_dir:
        told["data_dir"] = first.get("data_dir", config.data_dir)
    return dataclasses.replace(config, dataset=config.dataset or next(iter(names.values())), **told)


def check_runs(config: Config, starts: dict[str, Start], data: datasets.ImageData) -> None:
    """See that the runs' images are those of `data`, and that a resumed comparison keeps its runs.

    Raises:
        UserError: they are not.
    """
    whole = data.fingerprint()
    for name, start in starts.items():
        if start.folder is None:
            continue
        record = files.read_json(start.folder / "config.json")
        seen, part = record.get("data"), record.get("evaluate_on")
        same = seen in (None, whole) or seen == data.evaluated_on(part).fingerprint()
        require(same, f"{name} was trained on other images than {config.dataset} now")
        if config.evaluate_on == "validation" and part != "validation":
            print(f"{name} was pretrained on the held-out images, too, without their labels")
    if config.resume:
        before = files.read_json(Path(config.resume) / "config.json").get("runs", [])
        known, now = ([Path(run).resolve() for run in each] for each in (before, config.runs))
        kept = now[: len(known)] == known and bool(now) == bool(known)
        what = " ".join(before) or "no runs"
        require(kept, f"{config.resume} compares {what}: name them first, then others")


def main(config: Config) -> dict[str, Any]:
    """Train what is missing, write tables and figure, and return what `summary.json` holds.

    Raises:
        UserError: data, settings or run folders that cannot be used.
        Diverged: a loss is not finite.
    """
    starts = read_starts(config.runs, config.together)
    config = with_data_of_runs(config)
    whole = load_data(config)
    check_runs(config, starts, whole)
    data = whole.evaluated_on(config.evaluate_on)
    tasks = list_tasks(config, starts, len(data.train))
    require(bool(tasks), "there is nothing to train: these --methods need runs, or fewer --labels")
    with runs.open_run(config, whole.fingerprint(), FREE_ON_RESUME) as run:
        print(data)
        what = "test images"
        if config.evaluate_on == "validation":
            what = "held-out training images"
            print(f"what are called test images are {what}")
        asked = (int(part) for part in config.labels.split(",") if part.strip().isdecimal())
        if max(asked, default=0) > len(data.train):
            print(f"--labels above {len(data.train):,} are left out")
        rows = scores.read_rows(run.folder / "few_labels.csv")
        missing = set(tasks) - {scores.task_of(row) for row in rows}
        print(
            f"{len(missing):,} of {len(tasks):,} trainings are to do, "
            f"{scores.estimate_time([*missing], rows, config.workers)}"
        )
        prepare(run.folder, missing, starts, config, data)
        rows = train_missing(config, run.folder, tasks, rows)
        shutil.rmtree(run.folder / "features", ignore_errors=True)  # they are gigabytes
        title = f"{len(data.test):,} {what} of {data.name}, {config.draws} draws"
        (run.folder / "summary.json").unlink(missing_ok=True)  # of what was compared before
        summary = run.summarize(write_results(run.folder, rows, starts, title, config))
        report.write_report(run.folder, Config)
        runs.print_folder(run.folder)
    return summary


if __name__ == "__main__":
    runs.run_script(main, Config, __doc__)
