"""The committed results: the README's numbers are theirs, and they can be run again."""

import csv
import dataclasses
import importlib
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import reproduce

import compare
import functions
import rnn
from support import settings

ROOT = Path(functions.__file__).resolve().parent
RESULTS = reproduce.find_configs()
SHAPE = {"hidden_size", "num_layers", "bidirectional", "pooling"}


def table(page, heading):
    """The rows of the first table below a heading, as head of the column to cell."""
    text = (ROOT / page).read_text()
    part = text[text.index(f"{heading}\n") :]
    lines = re.search(r"^\|.*\n(\|.*\n)+", part, re.MULTILINE)[0].splitlines()
    head, _, *rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def measured(name):
    """The runs of a committed result, those of other seeds together."""
    return compare.group(reproduce.read_committed(name))


def scores(text):
    """The column of compare.py's table and the number of each result such as `kNN 69.0 ± 0.2 %`."""
    columns = {"linear": "linear probe %", "kNN": "kNN %", "": "test %"}
    found = re.findall(r"(linear|kNN|) ?\b(\d+\.\d(?: ± \d+\.\d)?) %", text)
    return {(columns[name], value) for name, value in found}


def shown(runs):
    """What compare.py shows of runs that differ in their seed, without their name."""
    (_, row) = compare.make_table([runs], ["name"])
    return row[1:]


def is_time(text, runs):
    """Whether the README's time is that of the runs, in minutes or from shortest to longest."""
    seconds = [r.summary["seconds"] - r.summary.get("study_seconds", 0) for r in runs]
    minutes = f"{statistics.mean(seconds) / 60:.0f} min"
    return text in (minutes, f"{round(min(seconds))} to {round(max(seconds))} s")


def is_processor(text, name):
    """Whether a README's `2 Xeon or EPYC cores` or `H100` is what the config.json files say."""
    configs = [json.loads(path.read_text()) for path in reproduce.find_configs(name)]
    if "core" not in text:  # a GPU
        return all(text in config["hardware"].split() for config in configs)
    cores, processors = re.fullmatch(r"(\d) (.*) cores?", text).groups()
    known = {(str(config["threads"]), config["hardware"].split()[1]) for config in configs}
    return {(cores, processor) for processor in processors.split(" or ")} <= known


def rows_of_results():
    name = None
    for row in table("README.md", "## Results"):
        name = name if row["`make reproduce-`"] == "the same" else row["`make reproduce-`"]
        yield pytest.param(name.strip("`"), row, id=f"{row['script']} {row['setting']}")


@pytest.mark.parametrize(("name", "row"), list(rows_of_results()))
def test_the_results_table_says_what_was_measured(name, row):
    assert is_processor(row["on"], name)
    if row["script"].startswith("sweep"):
        best = json.loads((ROOT / "docs/results" / name / "best.json").read_text())
        assert row["result"] == f"validation loss {best['validation_loss']:.3f}"
        return
    script, cell = re.fullmatch(r"`(\w+)\.py` ?(\w*)", row["script"]).groups()
    said = {("seeds", row["seeds"]), *scores(row["result"])}
    assert len(said) > 1
    right = [
        runs
        for runs in measured(name)
        if (runs[0].script, runs[0].cell) == (script, cell.lower())
        and said <= set(zip(*compare.make_table([runs], ["name"]), strict=True))
        and is_time(row["time"].strip(" *"), runs)
    ]
    assert right, [shown(runs) for runs in measured(name)]


def test_the_hour_is_what_was_measured():
    by_epochs = {len(runs[0].rows): runs for runs in measured("simclr-cpu-hour")}
    rows = table("docs/cpu_hour.md", "# An hour on two cores")
    assert {int(row["`--epochs`"]) for row in rows} == set(by_epochs)
    for row in rows:
        runs = by_epochs[epochs := int(row["`--epochs`"])]
        seeds, *scores, _, _ = shown(runs)
        columns = ("linear probe", "kNN", "10 labels per class")
        assert [row[name] for name in columns] == [f"{score} %" for score in scores]
        assert row["seeds"] == seeds
        small, large = (slice(epochs * 3 // 4), slice(epochs * 3 // 4, None))  # views of 16 and 24
        seconds = [
            sum(statistics.median(s) * len(s) for s in (all_of[small], all_of[large]))
            for all_of in ([epoch["seconds"] for epoch in run.rows] for run in runs)
        ]
        assert row["one core"] == f"{statistics.mean(seconds) / 60:.0f} min"
        assert row["two cores"] == f"{(epochs * (41 * 3 + 82) / 4 + 60) / 60:.0f} min"


def test_the_hour_with_sgd_is_what_was_measured():
    by_epochs = {str(len(runs[0].rows)): runs for runs in measured("simclr-hour-sgd")}
    rows = table("docs/cpu_hour.md", "## With SGD")
    assert {row["`--epochs`"] for row in rows} == set(by_epochs)
    for row in rows:
        seeds, *scores, _, minutes = shown(by_epochs[row["`--epochs`"]])
        columns = ("linear probe °", "kNN", "10 labels per class")
        assert [row[name] for name in columns] == [f"{score} %" for score in scores]
        assert row["seeds"] == seeds
        assert row["minutes"] == minutes.split()[0]


def test_the_hour_with_muon_is_what_was_measured():
    text = " ".join((ROOT / "docs/cpu_hour.md").read_text().split())
    ((seeds, linear, near, few, *_),) = [shown(runs) for runs in measured("simclr-hour-rate-0.04")]
    assert seeds == "2"
    assert f"{linear} % in the linear probe, {near} % by kNN and {few} % from 10 labels" in text
    with (ROOT / "docs/results/pilots/simclr-scores.csv").open(newline="") as file:
        scores = {row["name"]: row for row in csv.DictReader(file)}
    for row in table("docs/cpu_hour.md", "## With Muon"):
        score = scores[row["pilot"]]
        assert row["linear probe"] == f"{100 * float(score['linear_probe_accuracy']):.1f} %"
        assert row["kNN"] == f"{100 * float(score['knn_accuracy']):.1f} %"
        config = settings.parse_config(
            importlib.import_module("simclr").Config, shlex.split(score["flags"]), ""
        )
        assert row["`--epochs`"] == str(config.epochs)
        assert f"--view-size {row['`--view-size`']} " in score["flags"]
        assert f"--learning-rate {row['`--learning-rate`']} " in score["flags"]
        assert f"--temperature {row['`--temperature`']} " in score["flags"]


def test_four_views_are_what_was_measured():
    ((_, linear, near, *_),) = [shown(runs) for runs in measured("simclr-four-views")]
    text = " ".join((ROOT / "docs/cpu_hour.md").read_text().split())
    assert f"{linear} % in the linear probe and {near} % by kNN" in text
    with (ROOT / "docs/results/pilots/simclr-scores.csv").open(newline="") as file:
        scores = {row["name"]: row for row in csv.DictReader(file)}
    said = table("docs/cpu_hour.md", "## What has been tried since")
    assert {row["pilot"] for row in said} == {name for name in scores if name.endswith("-20")}
    for row in said:
        for column in ("linear probe", "kNN"):
            score = float(scores[row["pilot"]][f"{column.lower().replace(' ', '_')}_accuracy"])
            assert row[column] == f"{score:.1%}".replace("%", " %")


def test_the_cells_are_what_was_measured():
    known = []
    results = (ROOT / "docs/results").glob("rnn-*")
    for folder in (path for path in results if any(path.rglob("summary*.json"))):  # no sweeps
        for runs in measured(folder.name):
            settings_of_run = runs[0].settings
            config = rnn.Config(**{k: settings_of_run[k] for k in SHAPE & settings_of_run.keys()})
            weights = rnn.RowRNN(config, runs[0].cell, 96, 10).parameters()
            seeds, validation, test, *_ = shown(runs)
            known.append(
                {
                    "cell": runs[0].cell.upper(),
                    "directions": "2" if config.bidirectional else "1",
                    "layers": str(config.num_layers),
                    "units": str(config.hidden_size),
                    "MLP sees": {"last": "last row", "mean": "mean"}[config.pooling],
                    "augmented": "no" if settings_of_run["augmentation"] == "none" else "yes",
                    "optimizer": settings_of_run.get("optimizer", "adam").capitalize(),
                    "parameters": f"{sum(w.numel() for w in weights) / 1e6:.2f} M",
                    "epochs": str(len(runs[0].rows)),
                    "seeds": seeds,
                    "minutes": f"{statistics.mean(r.summary['seconds'] for r in runs) / 60:.0f}",
                    "validation": validation,
                    "test": test,
                    "`make reproduce-`": f"`{folder.name}`",
                }
            )
    said = table("docs/row_by_row.md", "# Row by row")
    assert sorted(said, key=str) == sorted(known, key=str)


def test_the_pilots_of_the_cells_are_what_was_measured():
    with (ROOT / "docs/results/pilots/rows-scores.csv").open(newline="") as file:
        scores = {row["name"]: float(row["validation_accuracy"]) for row in csv.DictReader(file)}
    said = {row["pilot"]: row["validation"] for row in table("docs/row_by_row.md", "## What helps")}
    assert said == {name: f"{score:.1%}".replace("%", " %") for name, score in scores.items()}


def test_simsiams_pilots_are_what_was_measured():
    rows = table("docs/results.md", "## SimSiam's rate")
    with (ROOT / "docs/results/pilots/simsiam-scores.csv").open(newline="") as file:
        scores = list(csv.DictReader(file))
    assert len(rows) == len(scores)
    for row, score in zip(rows, scores, strict=True):
        flags = shlex.split(score["flags"])
        said = {"--learning-rate": row["rate"], "--batch-size": row["batch"]}
        assert {flag: flags[flags.index(flag) + 1] for flag in said} == said
        assert row["pilot"] == score["name"]
        assert row["linear probe °"] == f"{float(score['linear_probe_accuracy']):.1%}".replace(
            "%", " %"
        )
        assert row["kNN"] == f"{float(score['knn_accuracy']):.1%}".replace("%", " %")


def test_twice_as_many_epochs_of_simsiam_bring_what_was_measured():
    [runs] = measured("simsiam-fashion-mnist-46-epochs")
    _, linear, knn, *_ = shown(runs)
    said = f"{linear} % in the linear probe and {knn} % by kNN"
    assert said in (ROOT / "docs/results.md").read_text()
    assert {(run.settings["epochs"], run.settings["learning_rate"]) for run in runs} == {(46, 1.6)}


def test_simsiam_with_muon_brings_what_was_measured():
    [runs] = measured("simsiam-fashion-mnist-muon")
    seeds, linear, knn, few_labels, *_ = shown(runs)
    said = f"{linear} % in the linear probe, {knn} % by kNN and {few_labels} % from 10 labels"
    assert said in (ROOT / "docs/results.md").read_text()
    assert seeds == "3"


def test_muon_is_what_was_measured():
    scores = []
    for name, data in (("simclr", ""), ("cifar-small", ""), ("fashion", ", FashionMNIST")):
        with (ROOT / f"docs/results/pilots/{name}-scores.csv").open(newline="") as file:
            scores += [(score, data) for score in csv.DictReader(file)]
    for row in table("docs/results.md", "## Muon"):
        found = [
            score
            for score, data in scores
            if describe_pilot(score, data, ", rate" in row["optimizer"]) == tuple(row.values())[:4]
            and row["linear probe"] == f"{100 * float(score['linear_probe_accuracy']):.1f} %"
            and row["kNN"] == f"{100 * float(score['knn_accuracy']):.1f} %"
        ]
        assert len(found) == 1, row


def describe_pilot(score, data, with_rate):
    """The columns of the table of Muon that tell the run on this data, SGD's rate on demand."""
    config_class = importlib.import_module(score["script"]).Config
    config = settings.parse_config(config_class, shlex.split(score["flags"]), "")
    muon = config.optimizer == "muon"
    optimizer = "Muon" if muon else "SGD"
    if muon or with_rate:
        usual = {"rate": (config.learning_rate, 0.02 if muon else None)}
        if muon:
            usual["decay"] = (config.weight_decay, 0.1)
        usual["batch"] = (config.batch_size, 256 if config.encoder == "resnet18" else 128)
        if score["script"] == "simclr":
            usual["temperature"] = (config.temperature, 0.1)
        others = [f", {name} {value:g}" for name, (value, known) in usual.items() if value != known]
        optimizer += "".join(others)
    optimizer += ", `--loss dcl`" * (getattr(config, "loss", "") == "dcl")
    titles = {"simclr": "SimCLR", "moco": "MoCo", "simsiam": "SimSiam"}
    encoder = config.encoder.replace("resnet18", "ResNet18") + data
    return titles[score["script"]], encoder, str(config.epochs), optimizer


def test_what_mocos_queue_begins_with_makes_what_was_measured():
    def pilots(name):
        path = ROOT / f"docs/results/pilots/{name}-scores.csv"
        with path.open(newline="") as file:
            return {row["name"]: row for row in csv.DictReader(file)}

    def percent(row):
        scores = (row["linear_probe_accuracy"], row["knn_accuracy"])
        return [f"{100 * float(score):.1f} %" for score in scores]

    where = {
        "small, FashionMNIST": (pilots("fashion"), "-batch-128"),
        "small, CIFAR-10 JPEG": (pilots("cifar-small"), ""),
        "ResNet18 of width 32, CIFAR-10 JPEG": (pilots("cifar-resnet"), ""),
    }
    rows = table("docs/results.md", "### What MoCo's queue begins with")
    assert len(rows) == 4
    for row in rows:
        (encoder, rate, epochs, *scores) = row.values()
        found, end = where[encoder]
        before = found[f"moco-rate-{rate}{end}"]
        name = f"moco-keys-rate-{rate}{end}" if "small" in encoder else "moco-keys"
        assert scores == percent(before) + percent(found[name])
        assert before["flags"] == found[name]["flags"]
        flags = shlex.split(before["flags"])
        assert flags[flags.index("--epochs") + 1] == epochs
        assert flags[flags.index("--learning-rate") + 1] == rate
    text = " ".join((ROOT / "docs/results.md").read_text().split())
    for name in ("moco-warmup", "moco-keys-warmup", "moco-plain-batch-norm"):
        linear, knn = percent(pilots("cifar-resnet")[name])
        assert f"({linear.removesuffix(' %')} and {knn})" in text


def test_few_labels_are_what_was_measured():
    summary = json.loads((ROOT / "docs/results/simsiam-fashion-mnist/summary.json").read_text())
    rows = table("docs/few_labels.md", "## The older study")
    assert len(rows) == 5
    for row in rows:
        labels, *said = (cell.replace(",", "") for cell in row.values())
        scores = [method[labels] for method in summary["label_efficiency"].values()]
        means = [f"{100 * s['macro_f1']:.1f} ± {100 * s['macro_f1_sd']:.1f}" for s in scores]
        assert said == means


@pytest.mark.parametrize(
    ("data", "heading", "counts"),
    [
        ("fashion", "## Results", ("10", "100", "1,000")),
        ("methods", "### Encoders of three methods", ("10", "40", "100", "250", "1,000", "4,000")),
        ("muon", "### SimSiam with Muon", ("10", "40", "100", "250", "1,000", "4,000")),
        ("cifar", "## CIFAR-10", ("100", "1,000", "4,000")),
    ],
)
def test_few_labels_together_are_what_was_measured(data, heading, counts):
    names = {"pixels": ["pixels"], "SimSiam": ["3 runs of simsiam"], "all three": ["all 3 runs"]}
    names |= {name: [f"3 runs of {name.lower()}"] for name in ("SimCLR", "MoCo")}
    with (ROOT / f"docs/results/few-labels/{data}-scores.csv").open() as file:
        scores = {(row["name"], f"{int(row['labels']):,}"): row for row in csv.DictReader(file)}
    said = {
        (", ".join([row["method"], *names.get(row["from"], [])]), labels): row[labels]
        for row in table("docs/few_labels.md", heading)
        for labels in counts
    }
    assert said == {
        key: f"{100 * float(row['accuracy']):.1f} ± {100 * float(row['accuracy_sd']):.1f}"
        for key, row in scores.items()
    }


def test_the_differences_of_few_labels_are_what_was_measured():
    known = set()
    for path in (ROOT / "docs/results/few-labels").glob("*-differences.csv"):
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["low"]]
        values = [[100 * float(row[key]) for key in ("difference", "low", "high")] for row in rows]
        known |= {"{:.1f} [{:.1f}, {:.1f}]".format(*value) for value in values}
    text = (ROOT / "docs/few_labels.md").read_text().replace("points [", "[")
    said = re.findall(r"\d+\.\d \[.*?\]", " ".join(text.split()))
    assert len(said) >= 10
    assert set(said) <= known


@pytest.mark.parametrize(
    ("name", "heading"),
    [
        ("fashion-mnist-encoders", "## Three methods in equal minutes"),
        ("cifar10-encoders", "### The same on CIFAR-10"),
        ("cifar10-resnets", "### The same with a ResNet"),
    ],
)
def test_three_methods_are_what_was_measured(name, heading):
    found = {runs[0].script: runs for runs in measured(name)}
    rows = table("docs/results.md", heading)
    assert {row[""].lower() for row in rows} == set(found)
    for row in rows:
        runs = found[row[""].lower()]
        assert [row[name] for name in ("seeds", "linear probe", "kNN")] == shown(runs)[:3]
        assert row["epochs"] == str(len(runs[0].rows))
        fastest = min(epoch["seconds"] for run in runs for epoch in run.rows)
        assert row["minutes"] == f"{fastest * len(runs[0].rows) / 60:.0f}"
        few = statistics.mean(r.summary["few_label_accuracy_encoder"]["mean"] for r in runs)
        assert row["10 labels per class"] == f"{100 * few:.1f}"


def test_the_scores_without_labels_are_what_was_measured():
    said = table("docs/results.md", "## Settings without labels")
    for data, name in (("FashionMNIST", "fashion-mnist"), ("CIFAR-10 JPEG", "cifar10")):
        with (ROOT / f"docs/results/simclr-sweep-{name}/audit.csv").open(newline="") as file:
            rows = {row["score"]: row for row in csv.DictReader(file)}
        assert [row["score"] for row in said] == list(rows)
        for line in said:
            row = {k: float(v) for k, v in rows[line["score"]].items() if k != "score"}
            interval = f"[{row['linear_low']:.2f}, {row['linear_high']:.2f}]"
            assert line[data] == f"{row['linear']:.2f} {interval}"
            assert line[f"{data}, behind"] == f"{100 * row['behind']:.1f}"


def test_the_winners_of_the_sweeps_are_what_was_measured():
    data = {"fashion-mnist": "FashionMNIST", "data/cifar10-images": "CIFAR-10 JPEG"}
    kinds = {2: "the defaults", 4: "the winner's"}
    found = {
        (data[runs[0].settings["dataset"]], kinds[runs[0].settings["views"]]): runs
        for runs in measured("simclr-sweep-winners")
    }
    rows = table("docs/results.md", "### The winners beside the defaults")
    assert {(row["data"], row["settings"]) for row in rows} == found.keys()
    for row in rows:
        runs = found[row["data"], row["settings"]]
        assert [row[name] for name in ("seeds", "linear probe", "kNN")] == shown(runs)[:3]
        assert row["epochs"] == str(len(runs[0].rows))
        fastest = min(epoch["seconds"] for run in runs for epoch in run.rows)
        assert row["minutes"] == f"{fastest * len(runs[0].rows) / 60:.0f}"
    for name, sweep in (("FashionMNIST", "fashion-mnist"), ("CIFAR-10 JPEG", "cifar10")):
        best = json.loads((ROOT / f"docs/results/simclr-sweep-{sweep}/best.json").read_text())
        trained = found[name, "the winner's"][0].settings
        for setting in best.keys() & trained.keys() - {"epochs", "jitter"}:
            assert trained[setting] == pytest.approx(best[setting], rel=0.01) or (
                (name, setting) == ("FashionMNIST", "grayscale_probability")  # of one channel
            )


def folder_labels():
    """What benchmarks/folder_labels.py printed, as lines, for digits, FashionMNIST and CIFAR-10."""
    text = (ROOT / "docs/results/folder-labels.txt").read_text()
    return [part.splitlines() for part in text.split("$ ")[1:]]


def test_how_far_to_trust_cross_validation_and_groups_is_what_was_measured():
    text = " ".join((ROOT / "docs/own_images.md").read_text().split())
    gaps, spreads, shares = {}, [], []
    for part in folder_labels():
        start = next(i for i, line in enumerate(part) if line.startswith("accuracy by cross"))
        for line in part[start + 1 : start + 4]:
            name, cells = line.split(": ")
            gap, spread = map(float, cells.split(", ")[2].split(" ± "))
            gaps.setdefault(name == "the better one", []).append(gap)
            spreads.append(spread)
        shares.append(round(float(part[start + 4].split(": ")[1].split(" ± ")[0])))
    assert f"up to {max(gaps[True])} points above the accuracy" in text
    assert min(gaps[True]) >= 0
    assert f"a given method's up to {-min(gaps[False])} below" in text
    assert max(gaps[False]) <= 0
    assert [round(min(spreads)), round(max(spreads))] == [2, 6]
    assert "off by two to six points" in text
    assert "{} % of the digits, {} % of FashionMNIST and {} % of CIFAR-10".format(*shares) in text


def test_the_classes_of_small_folders_are_what_was_measured():
    _, *parts = folder_labels()
    said = table("docs/own_images.md", "all in `docs/results/folder-labels.txt`):")
    for data, part in zip(("FashionMNIST", "CIFAR-10"), parts, strict=True):
        _, head, *lines = part[: len(said) + 2]
        names = head.split(": ")[1].split(", ")
        places = names.index("logistic regression"), names.index("spreading 20 0.9")
        for row, line in zip(said, lines, strict=True):
            counts, scores = line.split(": ")
            assert counts == f"{row['images']}, {row['labels of each class']}"
            shown = row[f"{data}: logistic regression"], row[f"{data}: label spreading"]
            assert shown == tuple(scores.split(", ")[place] for place in places)


def test_the_speed_table_says_what_was_measured():
    command = [sys.executable, str(ROOT / "benchmarks/table.py")]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = (ROOT / "docs/speed.md").read_text()
    assert made in text, "after `make bench` put what benchmarks/table.py prints into docs/speed.md"


def assert_same_settings(config, committed):
    ours = json.loads(json.dumps(dataclasses.asdict(config)))
    committed = json.loads(json.dumps(committed))
    both = ours.keys() & committed.keys() - settings.PLACES - config.unread().keys()
    assert {key: ours[key] for key in both} == {key: committed[key] for key in both}
    assert len(both) > 10


@pytest.mark.parametrize(
    "path", RESULTS, ids=["/".join(p.with_suffix("").parts[-2:]) for p in RESULTS]
)
def test_a_result_is_run_again_with_its_settings(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    committed = json.loads(path.read_text())
    script = committed["script"]
    first, *later = reproduce.commands(committed, "again")
    config_class = importlib.import_module(script).Config
    for field in dataclasses.fields(config_class):
        if field.name in committed:
            committed[field.name] = settings.saved_value(field, committed)
    config = settings.parse_config(config_class, first[1:], "")
    if "computed_in" in committed:  # another machine may not choose the same
        kinds = {"32-true": "float32", "bf16-mixed": "bfloat16"}
        committed["precision"] = kinds[committed["computed_in"]]
    assert_same_settings(config, committed)
    for field in dataclasses.fields(config_class):  # which later versions brought
        if field.name not in committed:
            assert getattr(config, field.name) == settings.value_before(field)
    # Whatever else was a setting then must mean what the script does now.
    known = {field.name for field in dataclasses.fields(config_class)} | compare.NOT_COMPARED
    known |= {"data", "labels", "label_seeds", "label_steps"}  # of what few_labels.py has replaced
    others = {key: committed[key] for key in committed.keys() - known - {"computed_in"}}
    assert others.items() <= {"finetune": False}.items()
    folder = tmp_path / "results" / script / "again"
    folder.mkdir(parents=True)
    record = {"script": script, **dataclasses.asdict(config)}
    (folder / "config.json").write_text(json.dumps(record))
    for words in later:
        resumed = settings.parse_config(config_class, words[1:], "")
        assert resumed.resume == f"results/{script}/again"
        assert resumed.dataset == config.dataset


def test_a_setting_that_a_result_lacks_is_what_the_script_did_before():
    @dataclasses.dataclass(frozen=True)
    class Config(settings.RunConfig):
        speed: str = settings.setting("fast", "run", "new in this version", before="slow")
        careful: bool = settings.setting(True, "run", "as ever")

    flags = settings.changed_flags({"seed": 3, "stack": "refuse"}, Config)
    assert flags == {"--seed": ["--seed", "3"], "--speed": ["--speed", "slow"]}
    flags = settings.changed_flags({"speed": "fast", "careful": False, "stack": "refuse"}, Config)
    assert flags == {"--careful": ["--no-careful"]}


@pytest.mark.parametrize(
    ("target", "result"),
    [("demo", "simclr-digits/config"), ("cpu-hour", "simclr-cpu-hour/hour-seed0/config")],
)
def test_a_target_of_make_has_the_settings_of_its_result(target, result):
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    recipe = re.search(rf"^{target}:.*\n\t\$\(BIN\)/python simclr.py (.*)", text, re.MULTILINE)
    flags = shlex.split(recipe[1].replace("$(or $(DATASET),cifar10)", "data/cifar10-images"))
    config = settings.parse_config(importlib.import_module("simclr").Config, flags, "")
    committed = json.loads((ROOT / f"docs/results/{result}.json").read_text())
    if "precision_because" in committed:  # what `auto` chose on the machine that ran it
        committed["precision"] = config.precision
    assert_same_settings(config, committed)


def test_the_winner_of_a_sweep_is_told():
    told = {path.parent: reproduce.best_of_sweep(path.parent) for path in RESULTS if is_sweep(path)}
    assert len(told) >= 4
    assert all(re.search(r"\d\.\d{3} in ", line) for line in told.values())


def is_sweep(path):
    return (path.parent / "best.json").exists()


@pytest.mark.usefixtures("unrendered_pictures")
def test_a_result_is_reproduced(tmp_path, monkeypatch, capsys, run_here):
    # A short result of a version whose default of --patience was another, and without --dropout.
    result = {"script": "rnn", "dataset": "digits", "cells": "rnn", "epochs": 1, "seed": 7}
    result |= {"patience": 3, "train_fraction": 0.1, "name": "then", "output_dir": "elsewhere"}
    committed = tmp_path / "committed" / "old"
    committed.mkdir(parents=True)
    (committed / "config.json").write_text(json.dumps(result))
    (committed / "summary.json").write_text(json.dumps({"rnn_test_accuracy": 0.999}))
    (committed / "metrics.csv").write_text("cell,epoch\nrnn,1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "RESULTS", committed.parent)
    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(run=run_here))
    folder = tmp_path / "results" / "rnn" / "reproduced-old"
    for way in ("--patience 3", "--resume"):  # the second time everything is done
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "old", "--device", "cpu"])
        reproduce.main()
        said = capsys.readouterr().out
        (command,) = [line for line in said.splitlines() if line.startswith("python ")]
        assert way in command
        assert "DIFFERS" in said  # one epoch on a tenth of the images does not get 99.9 %
    config = json.loads((folder / "config.json").read_text())
    assert (config["seed"], config["patience"], config["device"]) == (7, 3, "cpu")
    assert len(config["resumed"]) == 1
    assert json.loads((folder / "summary.json").read_text())["rnn_test_accuracy"] > 0
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "nothing"])
    with pytest.raises(SystemExit) as caught:
        reproduce.main()
    assert caught.value.code == 2
    assert "error: name one of old" in capsys.readouterr().err
    # A run that fails ends it, with the script's exit code.
    failed = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(reproduce.subprocess, "run", lambda command: failed)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "old"])
    with pytest.raises(SystemExit) as caught:
        reproduce.main()
    assert caught.value.code == 3


def make_run(dataset="digits", **summary):
    return compare.Run("a", "simclr", "", {"dataset": dataset}, [], summary)


@pytest.mark.parametrize(
    ("committed", "here", "agrees"),
    [
        ([0.90], [0.93], True),  # two binomial spreads of 360 images are 3.2 points
        ([0.90], [0.94], False),
        ([0.90, 0.80], [0.98], True),  # the sd of 7.1 points is larger
        ([0.90, 0.80], [0.998], False),
        ([0.99, 0.99, 0.99], [0.98], True),  # equal runs have no spread of their own
    ],
)
def test_a_reproduction_agrees_within_two_spreads(committed, here, agrees):
    runs = [[make_run(knn_accuracy=value) for value in values] for values in (committed, here)]
    (line,) = reproduce.compare_scores(*runs)
    assert ("agrees" in line) is agrees
    assert f"{100 * (statistics.mean(here) - statistics.mean(committed)):+.1f}" in line


def test_more_test_images_have_a_smaller_spread():
    runs = [[make_run("cifar10", knn_accuracy=value)] for value in (0.90, 0.91)]
    assert "DIFFERS: two spreads are 0.6 points" in reproduce.compare_scores(*runs)[0]


def test_runs_of_several_processors_are_one_result(tmp_path, monkeypatch):
    (tmp_path / "made").mkdir()
    for number, kind in enumerate(("bf16-mixed", "32-true")):
        config = {"script": "simclr", "seed": number, "computed_in": kind}
        (tmp_path / f"made/config-{number}.json").write_text(json.dumps(config))
        (tmp_path / f"made/summary-{number}.json").write_text("{}")
        (tmp_path / f"made/metrics-{number}.csv").write_text("epoch\n1\n")
    folder = tmp_path / "made" / "seed2"  # a run with its encoder has a folder of its own
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"script": "simclr", "seed": 2}))
    (folder / "summary.json").write_text("{}")
    (folder / "metrics.csv").write_text("epoch\n1\n")
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path)
    (runs,) = compare.group(reproduce.read_committed("made"))
    assert [run.settings["seed"] for run in runs] == [0, 1, 2]
