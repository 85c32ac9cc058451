"""What the README says can be typed, and what it shows is there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import functions

ROOT = Path(functions.__file__).resolve().parent
TEXT = (ROOT / "README.md").read_text()
SCRIPTS = ("simclr", "simsiam", "rnn", "rnn_hyperparameter_tune")


def commands():
    """The commands that start one of the scripts, in code blocks and within sentences."""
    blocks = re.findall(r"^    (?=\S)(?:.*\\\n)*.*$", TEXT, re.MULTILINE)
    inline = [part.replace("\n", " ") for part in re.findall(r"`((?:python )[^`]*)`", TEXT)]
    found = []
    for text in (*blocks, *inline):
        words = shlex.split(text.replace("\\\n", " "), comments=True)
        for i, word in enumerate(words):
            if word.removesuffix(".py") in SCRIPTS and word.endswith(".py"):
                found.append((word.removesuffix(".py"), words[i + 1 :]))
    return found


def test_the_readme_has_commands_of_every_script():
    assert {script for script, _ in commands()} == set(SCRIPTS)
    assert len(commands()) > 25


@pytest.mark.parametrize(
    ("script", "flags"), [pytest.param(s, f, id=" ".join((s, *f))) for s, f in commands()]
)
def test_every_command_is_understood(script, flags):
    module = importlib.import_module(script)
    if flags == ["--help"]:
        return
    if "--resume" in flags:  # of a run that is not there
        place = flags.index("--resume")
        flags = flags[:place] + flags[place + 2 :]
    functions.parse_config(module.Config, flags, "")


def test_what_the_readme_points_to_is_there():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", TEXT)
    targets += re.findall(r"`((?:[a-z_/-]+/)?[a-z_]+\.py|docs/[a-z/_.-]+)`", TEXT)
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert missing == []
    assert len(targets) > 20
    for name in re.findall(r"\bmake ([a-z-]+)", TEXT):
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE), name


def test_every_module_is_in_the_layout():
    layout = TEXT[TEXT.index("## Layout") :]
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in layout
