"""What the README says can be typed, and what it shows is there."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightly.loss import BarlowTwinsLoss

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
    for name in {"--resume", "--config"} & set(flags):  # of a run that is not there
        place = flags.index(name)
        flags = flags[:place] + flags[place + 2 :]
    functions.parse_config(module.Config, flags, "")


def test_what_the_readme_points_to_is_there():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", TEXT)
    targets += re.findall(r"`((?:[a-z_/-]+/)?[a-z_]+\.py|docs/[a-z/_.-]+)`", TEXT)
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert missing == []
    assert len(targets) > 20
    for name in re.findall(r"\bmake ([a-z-]+)", TEXT):
        name = re.sub("^reproduce-.*", "reproduce-%", name)
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE), name


def python_blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_encoder_works_elsewhere_as_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    encoder = functions.make_encoder("resnet18", "cifar", 3, 32)
    facts = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    functions.save_weights(tmp_path / "encoder.safetensors", encoder, {"about": json.dumps(facts)})
    (code,) = [block for block in python_blocks(TEXT) if "encoder.safetensors" in block]
    names = {}
    exec(code, names)
    mean, std = (torch.tensor(facts[name]) for name in ("mean", "std"))
    expected = encoder.eval()(functions.normalize(names["images"], mean, std))
    torch.testing.assert_close(names["features"], expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """The script of docs/adding_an_experiment.md."""
    (code,) = python_blocks((ROOT / "docs/adding_an_experiment.md").read_text())
    path = tmp_path_factory.mktemp("added") / "barlow_twins.py"
    path.write_text(code)
    return path


def test_the_added_experiment_runs(added, tmp_path):
    flags = "--dataset digits --encoder small --epochs 2 --few-labels 0 --probe-epochs 3"
    done = subprocess.run(
        [sys.executable, str(added), *flags.split(), "--name", "run", "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads((tmp_path / "results/barlow_twins/run/summary.json").read_text())
    assert summary["linear_probe_accuracy"] > 0.3


def test_the_added_loss_is_lightlys(added, monkeypatch):
    monkeypatch.syspath_prepend(str(added.parent))
    z1, z2 = torch.randn(2, 32, 6, generator=torch.Generator().manual_seed(0))
    ours = importlib.import_module("barlow_twins").barlow_twins_loss(z1, z2, 5e-3)
    torch.testing.assert_close(ours, BarlowTwinsLoss(lambda_param=5e-3)(z1, z2))


def test_every_module_is_in_the_layout():
    layout = TEXT[TEXT.index("## Layout") :]
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in layout
