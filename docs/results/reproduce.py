"""Run a committed result again, with the settings of its config.json.

python docs/results/reproduce.py simclr-digits
python docs/results/reproduce.py rnn-best-lstm --dataset cifar10    # with other flags at the end
"""

import dataclasses
import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent.parent
sys.path.insert(0, str(ROOT))

from support.settings import value_before  # noqa: E402

# These say where the result lies, and which file other settings came from, and nothing else of it.
LEFT_OUT = ("name", "output_dir", "data_dir", "resume", "config")


def flags(settings: dict, config_class: type) -> list[str]:
    """The flags that give these settings, where they are not the default.

    A setting that is not among them, because the script got it later, takes the value that means
    what the script did before.
    """
    settings = dict(settings)
    # On another machine `auto` may mean something else than what was computed.
    precisions = {"32-true": "float32", "bf16-mixed": "bfloat16"}
    if settings.get("computed_in") in precisions:
        settings["precision"] = precisions[settings["computed_in"]]
    made = []
    for field in dataclasses.fields(config_class):
        value = settings.get(field.name, value_before(field))
        value = tuple(value) if isinstance(value, list) else value
        if value == field.default or field.name in LEFT_OUT:
            continue
        name = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            made.append(name if value else name.replace("--", "--no-", 1))
        else:
            made += [name, *map(str, value if isinstance(value, tuple) else [value])]
    return made


def commands(committed: dict, name: str) -> list[list[str]]:
    """Words after `python`: the run called `name`, and its last evaluation with --resume."""
    script = committed["script"]
    config_class = importlib.import_module(script).Config
    folder = f"results/{script}/{name}"
    made = [[f"{script}.py", *flags(committed, config_class), "--name", name]]
    if Path(folder, "config.json").exists():  # a reproduction that was stopped goes on
        made = [[f"{script}.py", "--resume", folder]]
    for resumed in committed.get("resumed", [])[-1:]:
        words = shlex.split(resumed["command"])
        words[words.index("--resume") + 1] = folder
        made.append(words)
    return made


def main() -> None:
    """Do all runs of the result that the first argument names."""
    known = sorted({path.parent.name for path in RESULTS.glob("*/config*.json")})
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        print(f"error: name one of {', '.join(known)}", file=sys.stderr)
        raise SystemExit(2)
    source, more = RESULTS / sys.argv[1], sys.argv[2:]
    for path in sorted(source.glob("config*.json")):
        name = f"reproduced-{source.name}{path.stem.removeprefix('config')}"
        for words in commands(json.loads(path.read_text()), name):
            print("python", shlex.join(words + more), flush=True)
            script = ROOT / words[0]
            done = subprocess.run([sys.executable, str(script), *words[1:], *more])
            if done.returncode:
                raise SystemExit(done.returncode)
    print(f"the committed numbers are in docs/results/{source.name}")


if __name__ == "__main__":
    main()
