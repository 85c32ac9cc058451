"""Run a committed result again, with the settings of its config.json, and compare.

python docs/results/reproduce.py simclr-digits
python docs/results/reproduce.py rnn-best-lstm --dataset cifar10    # with other flags at the end

It ends with a table of what is committed and what came out here. Two means agree when they differ
by at most two spreads. The spread is the sd of the committed runs, but at least that of drawing
the test images anew, sqrt(p (1 - p) / N).
"""

import importlib
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent.parent
sys.path.insert(0, str(ROOT))

import compare  # noqa: E402
from support.settings import changed_flags  # noqa: E402

SCORES = {"linear_probe_accuracy": "linear probe", "knn_accuracy": "kNN", "test_accuracy": "test"}
TEST_IMAGES = {"digits": 360}  # CIFAR-10 and FashionMNIST have 10,000


def commands(committed: dict, name: str) -> list[list[str]]:
    """Words after `python`: the run called `name`, and its last evaluation with --resume."""
    script = committed["script"]
    config_class = importlib.import_module(script).Config
    folder = f"results/{script}/{name}"
    words = [word for flag in changed_flags(committed, config_class).values() for word in flag]
    made = [[f"{script}.py", *words, "--name", name]]
    if Path(folder, "config.json").exists():  # a reproduction that was stopped goes on
        made = [[f"{script}.py", "--resume", folder]]
    for resumed in committed.get("resumed", [])[-1:]:
        words = shlex.split(resumed["command"])
        if "study" in words:  # a stage of older versions, which few_labels.py has replaced
            continue
        words[words.index("--resume") + 1] = folder
        made.append(words)
    return made


def find_configs(result: str = "*") -> list[Path]:
    """`config.json` of all runs of a result.

    A result with encoders has a folder for each run; else a run's files lie in the result's own
    folder, and end in `-seed1` or the like where there are several.
    """
    return sorted(
        [*RESULTS.glob(f"{result}/config*.json"), *RESULTS.glob(f"{result}/*/config.json")]
    )


def read_committed(result: str) -> list[compare.Run]:
    """The runs of a committed result, in the order of `find_configs`."""
    committed = []
    for config in find_configs(result):
        source, suffix = config.parent, config.stem.removeprefix("config")
        with tempfile.TemporaryDirectory() as folder:
            for name in ("config.json", "summary.json", "metrics.csv"):
                path = source / f"{Path(name).stem}{suffix}{Path(name).suffix}"
                shutil.copy(path, Path(folder, name))
            committed += compare.read_run(Path(folder))
    for run in committed:
        run.settings.pop("precision", None)  # what other processors got belongs to the spread
    return committed


def compare_scores(committed: Sequence[compare.Run], here: Sequence[compare.Run]) -> list[str]:
    """Both means of each score and whether they agree, for runs that differ in their seed."""
    lines = []
    images = TEST_IMAGES.get(committed[0].settings["dataset"], 10_000)
    for key, title in SCORES.items():
        before, now = ([run.summary.get(key) for run in runs] for runs in (committed, here))
        if None in before + now or not now:
            continue
        mean = statistics.mean(before)
        spread = (mean * (1 - mean) / images) ** 0.5
        if len(before) > 1:
            spread = max(spread, statistics.stdev(before))
        difference = statistics.mean(now) - mean
        verdict = "agrees" if abs(difference) <= 2 * spread else "DIFFERS"
        lines.append(
            f"  {title:14}{mean:7.1%} of {len(before)}{statistics.mean(now):9.1%} of {len(now)}"
            f"{100 * difference:+8.1f}  {verdict}: two spreads are {200 * spread:.1f} points"
        )
    return lines


def best_of_sweep(folder: Path) -> str:
    """A line on the winner of a sweep: rnn.py's have a loss, simclr.py's a score without labels."""
    best = json.loads((folder / "best.json").read_text())
    if "validation_loss" in best:
        return f"best validation loss {best['validation_loss']:.3f} in {folder}"
    return f"best score by {best['objective']} {best['score']:.3f} in {folder}"


def main() -> None:
    """Do all runs of the result that the first argument names."""
    known = sorted({path.relative_to(RESULTS).parts[0] for path in find_configs()})
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        print(f"error: name one of {', '.join(known)}", file=sys.stderr)
        raise SystemExit(2)
    source, more = RESULTS / sys.argv[1], sys.argv[2:]
    folders = []
    for path in find_configs(source.name):
        name = "-".join(["reproduced", *path.relative_to(RESULTS).with_suffix("").parts])
        name = name.replace("-config", "")
        committed = json.loads(path.read_text())
        folders.append(Path("results", committed["script"], name))
        for words in commands(committed, name):
            print("python", shlex.join(words + more), flush=True)
            script = ROOT / words[0]
            done = subprocess.run([sys.executable, str(script), *words[1:], *more])
            if done.returncode:
                raise SystemExit(done.returncode)
    if not (folders[0] / "summary.json").exists():  # a sweep
        print(*map(best_of_sweep, (source, folders[0])), sep="\n")
        return
    committed = read_committed(source.name)
    here = dict(
        zip(map(id, committed), [r for f in folders for r in compare.read_run(f)], strict=True)
    )
    print(f"\n{'':14}{'committed':>14}{'here':>14}")
    for runs in compare.group(committed):
        print(f"{runs[0].name} {runs[0].cell}")
        print(*compare_scores(runs, [here[id(run)] for run in runs]), sep="\n")


if __name__ == "__main__":
    main()
