"""What the README and the pages in docs/ say can be typed, and what they show is there."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from lightly.loss import BarlowTwinsLoss
from test_pretraining import compute_in_float64, make_data, metrics

import functions
from support import checkpoints, encoders, settings

ROOT = Path(functions.__file__).resolve().parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
SCRIPTS = {
    path.stem: module
    for path in ROOT.glob("*.py")
    if hasattr(module := importlib.import_module(path.stem), "Config")
}


def commands(text):
    """The commands that start a script, in code blocks and within sentences: its name and flags."""
    blocks = re.findall(r"^    (?=\S)(?:.*\\\n)*.*$", text, re.MULTILINE)
    inline = [part.replace("\n", " ") for part in re.findall(r"`((?:python )[^`]*)`", text)]
    found = []
    for part in (*blocks, *inline):
        words = shlex.split(part.replace("\\\n", " "), comments=True)
        starts = [i for i, word in enumerate(words) if word.endswith(".py") and "/" not in word]
        found += [(words[i].removesuffix(".py"), words[i + 1 :]) for i in starts]
    return found


def understands(config_class, flags):
    """Whether a command's flags are its script's; those of a run that is not there are left out."""
    for name in {"--resume", "--config"} & set(flags):
        place = flags.index(name)
        flags = flags[:place] + flags[place + 2 :]
    return settings.parse_config(config_class, flags, "")


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_command_is_understood(page):
    for name, flags in commands(page.read_text()):
        if name in SCRIPTS and flags != ["--help"]:
            understands(SCRIPTS[name].Config, flags)
        elif name != "barlow_twins":  # which docs/adding_an_experiment.md makes
            assert (ROOT / f"{name}.py").exists()


def test_the_readme_is_short_and_has_every_script():
    text = PAGES[0].read_text()
    assert len(text.splitlines()) <= 200
    assert {name for name, _ in commands(text)} >= SCRIPTS.keys()


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_what_a_page_points_to_is_there(page):
    text = page.read_text()
    found = re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text)
    for target, heading in [*found, *((source, "") for source in re.findall('src="(.*?)"', text))]:
        path = page.parent / target if target else page
        assert path.exists(), target
        if heading:  # as GitHub makes anchors of headings
            heads = re.findall("^#+ (.*)", path.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads]
    for name in re.findall(r"`((?:[a-z_/-]+/)?[a-z_]+\.py|docs/[a-z/_.-]+)`", text):
        if name == "barlow_twins.py":  # which docs/adding_an_experiment.md makes
            continue
        assert (ROOT / name).exists() or (ROOT / "support" / name).exists(), name
    for name in re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE):
        name = re.sub("^reproduce-.*", "reproduce-%", name)
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE), name


def test_every_page_is_linked_from_the_readme():
    text = PAGES[0].read_text()
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name}" not in text] == []


def test_every_module_is_in_the_layout():
    top = PAGES[0].read_text().partition("## Layout")[2]
    below = (ROOT / "CONTRIBUTING.md").read_text().partition("| `support/` | |")[2]
    names = [path.name for path in ROOT.glob("*.py")]
    assert [name for name in names if f"`{name}`" not in top] == []
    names = [path.name for path in ROOT.glob("support/[!_]*.py")]
    assert [name for name in names if f"`{name}`" not in below] == []


def python_blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_encoder_works_elsewhere_as_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    encoder = encoders.make_encoder("resnet18", "cifar", 3, 32)
    facts = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    about = {"about": json.dumps(facts)}
    checkpoints.save_weights(tmp_path / "encoder.safetensors", encoder, about)
    text = (ROOT / "docs/run_folder.md").read_text()
    (code,) = [block for block in python_blocks(text) if "encoder.safetensors" in block]
    names = {}
    exec(code, names)
    mean, std = (torch.tensor(facts[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        expected = encoder.eval()((names["images"] - mean) / std)
    difference = (names["features"] - expected).norm() / expected.norm()
    assert difference < 1e-4  # rounding; other statistics make it 1


# ------------------------------------------------------------------- docs/adding_an_experiment.md

ADDING = (ROOT / "docs" / "adding_an_experiment.md").read_text()


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """The script of docs/adding_an_experiment.md, imported."""
    (code,) = python_blocks(ADDING)
    folder = tmp_path_factory.mktemp("added")
    (folder / "barlow_twins.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module("barlow_twins")
        del sys.modules["barlow_twins"]


def test_the_added_experiment_runs_and_goes_on(added, tmp_path, monkeypatch):
    ((name, flags),) = [(name, flags) for name, flags in commands(ADDING)]
    assert name == "barlow_twins"
    assert understands(added.Config, flags).dataset == "digits"
    monkeypatch.setattr(functions, "load_images", lambda *_: make_data())
    flags = "--encoder small --epochs 2 --batch-size 14 --few-labels 0 --probe-epochs 1"
    flags += " --projection-size 16 --knn-every 0 --device cpu --name run --output-dir"
    summary = added.main(understands(added.Config, [*flags.split(), str(tmp_path)]))
    folder = tmp_path / "barlow_twins" / "run"
    assert summary == json.loads((folder / "summary.json").read_text())
    assert 0 <= summary["linear_probe_accuracy"] <= 1
    rows = metrics(folder)
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])

    def stop(*_):
        raise KeyboardInterrupt

    # Stopped after its first epoch it goes on as if it had not been.
    config = understands(added.Config, [*flags.replace("run", "stopped").split(), str(tmp_path)])
    with monkeypatch.context() as patch:
        patch.setattr(added.pretraining.files, "write_csv", stop)
        with pytest.raises(KeyboardInterrupt):
            added.main(config)
    stopped = tmp_path / "barlow_twins" / "stopped"
    added.main(settings.parse_config(added.Config, ["--resume", str(stopped)], ""))
    assert metrics(stopped) == rows


def test_the_added_loss_is_lightlys(added, monkeypatch):
    compute_in_float64(monkeypatch)
    z1, z2 = torch.randn(2, 32, 6, generator=torch.Generator().manual_seed(0)).double()
    ours = added.barlow_twins_loss(z1, z2, 5e-3)
    expected = BarlowTwinsLoss(lambda_param=5e-3)(z1, z2)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
