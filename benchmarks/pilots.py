"""Short runs of a table of settings, scored on held-out training images: how recipes are chosen.

    python benchmarks/pilots.py docs/results/pilots/simclr.csv --dataset data/cifar10-images
    python benchmarks/pilots.py my_table.csv --only base --dataset digits --jobs 2

A row of the table is a run: `name`, `script`, `flags`. Self-supervised runs keep a tenth of the
training images back (`--evaluate-on validation`) and are scored on them by linear probe and kNN;
few_labels.py's by the mean over methods and numbers of labels; rnn.py's have validation images.
What each run of `simclr.csv` gets goes into `simclr-scores.csv` beside it. A second call leaves out
the rows that have a score, wherever it was made, and goes on with the one that was stopped, so a
longer table takes the time of its new rows. `--only NAMES` runs these rows here, scored or not;
`--jobs N` runs N rows at a time: small networks leave most of a GPU, or of many cores, to others.
Other flags, like `--dataset`, are given to all rows. Another data set wants a table of its own.
"""

import csv
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import ROOT

from support import files, settings
from support.errors import UserError, require
from support.runs import exit_cleanly

SHARED = {
    "simclr": ["--evaluate-on", "validation", "--stages", "pretrain,probe", "--knn-every", "0"],
    "moco": ["--evaluate-on", "validation", "--stages", "pretrain,probe", "--knn-every", "0"],
    "simsiam": ["--evaluate-on", "validation", "--stages", "pretrain,probe", "--knn-every", "0"],
    "few_labels": ["--evaluate-on", "validation"],
    "rnn": [],
}
SCORES = ("linear_probe_accuracy", "knn_accuracy", "validation_accuracy", "mean_accuracy")


def is_finished(folder: Path) -> bool:
    """Whether a run has its scores."""
    path = folder / "summary.json"
    return path.exists() and any(key.endswith(SCORES) for key in files.read_json(path))


def check_flags(row: dict[str, str], folder: Path, flags: list[str]) -> None:
    """Raise UserError when a row's run was begun with other flags than it would get now."""
    if (folder / "config.json").exists():
        mine = [*SHARED[row["script"]], *shlex.split(row["flags"]), *flags]
        words = shlex.split(files.read_json(folder / "config.json")["command"])[1:]
        alike = words[:-4] == mine  # the last four say where the run is
        require(alike, f"{folder} was run with other flags: rename the row or move the folder")


def begin(row: dict[str, str], folder: Path, flags: list[str]) -> subprocess.Popen:
    """Start a row, or go on with it where it was stopped."""
    script = [sys.executable, str(ROOT / f"{row['script']}.py")]
    if not (folder / "config.json").exists():
        where = ["--output-dir", str(folder.parents[1]), "--name", folder.name]
        command = [*script, *SHARED[row["script"]], *shlex.split(row["flags"]), *flags, *where]
    else:
        command = [*script, "--resume", str(folder)]
    print(f"== {row['name']}", flush=True)
    return subprocess.Popen(command)


def run_side_by_side(
    table: list[dict[str, str]], folders: dict[str, Path], flags: list[str], jobs: int
) -> Iterator[dict[str, str]]:
    """The rows of a table, each as soon as it is finished, so many at a time.

    Raises:
        UserError: runs ended with an error; the others have been done.
    """
    failed = []
    waiting = [row for row in table if not is_finished(folders[row["name"]])]
    yield from (row for row in table if row not in waiting)
    running: list[tuple[dict[str, str], subprocess.Popen]] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                row = waiting.pop(0)
                running.append((row, begin(row, folders[row["name"]], flags)))
            time.sleep(0.1)
            for row, process in running[:]:
                if process.poll() is not None:
                    running.remove((row, process))
                    if process.returncode == 0:
                        yield row
                    else:
                        failed.append(f"{row['name']} ended with exit code {process.returncode}")
        require(not failed, f"{', '.join(failed)}: see above; call this again")
    finally:
        for _, process in running:
            process.terminate()
        for _, process in running:
            process.wait()


def read_score(row: dict[str, str], folder: Path) -> dict[str, Any]:
    """A row with the scores of its finished run."""
    summary = files.read_json(folder / "summary.json")
    about = files.read_json(folder / "config.json")
    scores = {
        score: value
        for score in SCORES
        for key, value in summary.items()
        if key.endswith(score) and isinstance(value, float)
    }
    names = ("dataset", "hardware", "threads", "computed_in", "commit")
    about = {name: about.get(name) for name in names}
    return {**row, **scores, "minutes": round(summary["seconds"] / 60, 1), **about}


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table.

    Raises:
        UserError: it is not one, or has a row that cannot be run.
    """
    require(path.is_file(), f"there is no table {path}")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for number, row in enumerate(table, 1):
        values = [row.get("name"), row.get("script"), row.get("flags")]
        require(None not in values, f"{path} needs the columns name, script, flags")
        require(None not in row, f"row {number} of {path}: put quotes around flags with a comma")
        known = ", ".join(SHARED)
        require(row["script"] in SHARED, f"row {number} of {path}: scripts are {known}")
        cells = settings.find_flag("--cells", shlex.split(row["flags"])) or ""
        one = row["script"] != "rnn" or (cells != "" and "," not in cells)
        require(one, f"row {number} of {path}: give rnn one of its cells with --cells")
    return table


def read_scores(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file of scores by their names, none where there is no such file yet."""
    if not files.read_csv(path, dict.fromkeys(("name", "flags", "minutes"), str)):  # or damaged
        return {}
    with path.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def main() -> None:
    """Run the rows of a table, and print the scores."""
    parser = settings.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("table", type=Path, help="CSV with the columns name, script, flags")
    parser.add_argument("--only", help="names of rows, with commas between them")
    parser.add_argument("--jobs", type=int, default=1, help="rows that run at a time [1]")
    parser.add_argument("--results", type=Path, default=Path("results/pilots"))
    arguments, flags = parser.parse_known_args()
    table = read_table(arguments.table)
    path = arguments.table.with_name(f"{arguments.table.stem}-scores.csv")
    scores = read_scores(path)
    new = [row["name"] for row in table if scores.get(row["name"], {}).get("flags") != row["flags"]]
    wanted = arguments.only.split(",") if arguments.only else new
    unknown = set(wanted) - {row["name"] for row in table}
    require(not unknown, f"{arguments.table} has no row {sorted(unknown)}")
    require(arguments.jobs >= 1, "--jobs must be at least 1")
    dataset = settings.find_flag("--dataset", flags)
    for row in scores.values():
        other = dataset and row.get("dataset") and Path(row["dataset"]).name != Path(dataset).name
        require(not other, f"{path} has scores on {row.get('dataset')}: copy the table for others")
    chosen = [row for row in table if row["name"] in wanted]
    parent = arguments.results / arguments.table.stem
    folders = {row["name"]: parent / row["script"] / row["name"] for row in chosen}
    for row in chosen:
        check_flags(row, folders[row["name"]], flags)
    for row in run_side_by_side(chosen, folders, flags, arguments.jobs):
        # Another call may have added rows in the meantime.
        scores = {**read_scores(path), row["name"]: read_score(row, folders[row["name"]])}
        files.write_csv(path, list(scores.values()))
    for row in scores.values():
        numbers = "  ".join(f"{float(row[score]):.1%}" for score in SCORES if row.get(score))
        print(f"{row['name']:30} {numbers}  {row['minutes']} min")


if __name__ == "__main__":
    exit_cleanly(main)
