"""Gather encoders and model cards for a release page in release/, with their checksums.

python docs/results/release.py                          # of all results/*/reproduced-*
python docs/results/release.py results/simclr/NAME ...  # of these runs

Check them with `sha256sum -c SHA256SUMS`.
"""

import hashlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from support import files  # noqa: E402
from support.errors import require  # noqa: E402
from support.runs import exit_cleanly  # noqa: E402


def main(arguments: Sequence[str]) -> None:
    """Copy what the runs have as NAME.safetensors and NAME.md; write SHA256SUMS of all in release/.

    Raises:
        UserError: no run, one without an encoder or a card, or two of one name.
    """
    found = sorted(
        path.parent for path in Path("results").glob("*/reproduced-*/encoder.safetensors")
    )
    folders = [Path(argument) for argument in arguments] or found
    require(bool(folders), "there is no results/*/reproduced-* with an encoder: name run folders")
    names = [folder.resolve().name.removeprefix("reproduced-") for folder in folders]
    require(len(set(names)) == len(names), f"two runs have the same name: {', '.join(names)}")
    release = Path("release")
    files.make_folder(release)
    for folder, name in zip(folders, names, strict=True):
        for file in ("encoder.safetensors", "MODEL_CARD.md"):
            require(
                (folder / file).is_file(),
                f"{folder} has no {file}: let the run finish, with --resume",
            )
        shutil.copyfile(folder / "encoder.safetensors", release / f"{name}.safetensors")
        card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
        card = card.replace("encoder.safetensors", f"{name}.safetensors")
        (release / f"{name}.md").write_text(card, encoding="utf-8")
    lines = []
    for path in sorted(release.glob("*.*")):
        content = path.read_bytes()
        lines.append(f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")
        print(f"{len(content):12,} bytes  {path}")
    (release / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    exit_cleanly(lambda: main(sys.argv[1:]))
