"""Run a committed result again, with the settings of its config.json.

python docs/results/reproduce.py simclr-digits
python docs/results/reproduce.py rnn-best-lstm --dataset cifar10    # with other flags at the end
"""

import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent.parent
sys.path.insert(0, str(ROOT))

from support.settings import changed_flags  # noqa: E402


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
