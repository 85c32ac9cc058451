"""Start-up: the scripts' --help beside `import torch`, and a cached folder of images.

python benchmarks/startup.py
python benchmarks/startup.py --dataset data/cifar10-images
"""

import argparse
import subprocess
import sys
import time

from common import ROOT, in_turns, report


def main() -> None:
    """Time each command as a process, in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", help="a folder of images whose cache exists or is made now")
    parser.add_argument("--rounds", type=int, default=5, help="[5]")
    arguments = parser.parse_args()
    scripts = sorted(p.name for p in ROOT.glob("*.py") if "__main__" in p.read_text("utf-8"))
    commands = {"import torch": ["-c", "import torch"]}
    commands |= {f"{name} --help": [str(ROOT / name), "--help"] for name in scripts}

    def run(command: list[str]) -> None:
        subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)

    seconds = in_turns(
        {name: lambda command=command: run(command) for name, command in commands.items()},
        arguments.rounds,
    )
    rows = [
        {"command": name, "seconds": value, "above torch": value - seconds["import torch"]}
        for name, value in seconds.items()
    ]
    if arguments.dataset:
        import functions

        functions.load_images(arguments.dataset)  # makes the cache
        began = time.perf_counter()
        functions.load_images(arguments.dataset)
        rows.append({"command": "cached images", "seconds": time.perf_counter() - began})
    report("Start-up", rows)


if __name__ == "__main__":
    main()
