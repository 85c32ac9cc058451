"""What a release needs: a citation, a version, a workflow, locked packages, weights with sums."""

import datetime
import hashlib
import os
import re
import shutil
import subprocess

import pytest
import release
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = release.ROOT


def make_dry_run(*arguments):
    """The commands that `make` would run if nothing were there yet."""
    # `make test LOCKED=1` hands its variables on to every make below it.
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "LOCKED")}
    command = ["make", "--always-make", "--dry-run", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


# ---------------------------------------------------------------------------------- citation


def test_the_citation_has_what_its_format_requires_and_the_changelogs_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    # https://github.com/citation-file-format/citation-file-format, schema 1.2.0
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    newest = re.search(
        r"^## (\S+)(?: \((.*)\))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+", newest[1])
    assert citation["version"] == newest[1]
    assert citation["date-released"] == datetime.date.fromisoformat(newest[2])


def test_the_citation_names_the_licence_and_its_holder():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    licence = (ROOT / "LICENSE").read_text()
    assert licence.startswith(f"{citation['license']} License\n")
    holder = re.search(r"^Copyright \(c\) \d{4} (.*)$", licence, re.MULTILINE)[1]
    assert citation["authors"] == [{"name": holder}]


# ------------------------------------------------------------------------------ installation

# Stands for Python, and for that of the environment: writes down what is asked of its modules.
FAKE_PYTHON = """#!/bin/sh
[ "$1" = -m ] || exit 0
echo "$2 $3 $(for last; do :; done; echo "$last")" >> calls
case "$2 $3" in
"venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
"pip config") printf "$PIP_SETTINGS" ;;
"uv pip") exit "$UV_CODE" ;;
esac
"""


@pytest.mark.parametrize(
    ("pip_settings", "uv_code", "installed_by"),
    [
        ("", 0, ["uv"]),
        ("global.timeout='60'\n", 0, ["uv"]),
        ("global.index-url='https://mine'\n", 0, ["pip"]),
        ("global.find-links='/wheels'\n", 0, ["pip"]),
        ("install.constraint='versions.txt'\n", 0, ["pip"]),
        ("", 1, ["uv", "pip"]),
    ],
)
def test_uv_installs_unless_pip_is_told_from_where_or_uv_fails(
    tmp_path, pip_settings, uv_code, installed_by
):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PIP_SETTINGS": pip_settings}
    environment["UV_CODE"] = str(uv_code)
    subprocess.run(
        ["make", "install", f"PYTHON={python}"], cwd=tmp_path, env=environment, check=True
    )
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert [module for module, _, last in calls if last == "requirements.txt"] == installed_by
    assert (tmp_path / ".venv" / "installed").exists()


# ---------------------------------------------------------------------------------- workflow


def test_the_workflow_runs_the_tests_where_they_are_promised():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 takes `on` for a truth value
    (job,) = workflow["jobs"].values()
    assert job["runs-on"].startswith("ubuntu-")
    assert job["strategy"]["matrix"] == {"python-version": ["3.11", "3.13"]}
    setup = next(step["with"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert setup["python-version"] == "${{ matrix.python-version }}"
    assert setup["cache"] == "pip"
    assert list(ROOT.glob(setup["cache-dependency-path"]))
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test"]
    assert "-m pytest" in make_dry_run("test")


# ---------------------------------------------------------------------------- locked packages


def wanted():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def locked():
    """The requirements of the lock, each with its hashes."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    pins = []
    for line in lines:
        hashes = [word for word in line if word.startswith("--hash=")]
        pins.append((Requirement(" ".join(line[: len(line) - len(hashes)])), hashes))
    return pins


@pytest.mark.parametrize("requirement", wanted(), ids=lambda requirement: requirement.name)
def test_the_lock_has_one_version_of_each_requirement_that_it_allows(requirement):
    name = canonicalize_name(requirement.name)
    (pin,) = [pin for pin, _ in locked() if canonicalize_name(pin.name) == name]
    assert pin.marker is None
    (exact,) = pin.specifier
    assert exact.operator == "=="
    assert requirement.specifier.contains(exact.version)


def test_the_lock_pins_everything_by_hash_and_names_no_host():
    pins = locked()
    assert len(pins) > len(wanted())
    for pin, hashes in pins:
        assert [exact.operator for exact in pin.specifier] == ["=="], pin
        assert hashes, pin
        for value in hashes:
            assert re.fullmatch("--hash=sha256:[0-9a-f]{64}", value)
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert not re.search(
        r"^\s*(-[a-z]|--(?!hash))", text, re.MULTILINE
    )  # no option, of an index, say


@pytest.mark.parametrize("target", ["demo", "cpu-hour", "test", "reproduce-simclr-digits"])
def test_make_installs_the_lock_when_it_is_asked_to(target):
    assert "-r requirements.txt" in make_dry_run(target)
    assert "requirements.lock" not in make_dry_run(target)
    assert "-r requirements.lock" in make_dry_run(target, "LOCKED=1")
    assert "-r requirements.txt" not in make_dry_run(target, "LOCKED=1")


# ------------------------------------------------------------------------------------ weights


def write_run(folder, weights):
    folder.mkdir(parents=True)
    (folder / "encoder.safetensors").write_bytes(weights)
    text = 'weights="encoder.safetensors"\npython embed.py encoder.safetensors images\n'
    (folder / "MODEL_CARD.md").write_text(text)
    return folder


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_a_release_has_the_weights_and_cards_of_reproduced_runs_with_their_sums(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "results/simclr/reproduced-digits", b"d" * 1234)
    write_run(tmp_path / "results/moco/reproduced-hour", b"h")
    write_run(tmp_path / "results/moco/mine", b"m")
    (tmp_path / "results/rnn/reproduced-lstm").mkdir(parents=True)  # which has no encoder
    release.main([])
    names = {"digits.safetensors", "digits.md", "hour.safetensors", "hour.md"}
    assert {path.name for path in (tmp_path / "release").iterdir()} == names | {"SHA256SUMS"}
    assert (tmp_path / "release/digits.safetensors").read_bytes() == b"d" * 1234
    card = (tmp_path / "release/digits.md").read_text()
    assert card == 'weights="digits.safetensors"\npython embed.py digits.safetensors images\n'
    sums = (tmp_path / "release/SHA256SUMS").read_text()
    for name in names:
        content = (tmp_path / "release" / name).read_bytes()
        assert f"{hashlib.sha256(content).hexdigest()}  {name}\n" in sums
    assert "1,234 bytes  release/digits.safetensors" in capsys.readouterr().out

    release.main(["results/moco/mine"])  # beside what is there
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(check, cwd="release", capture_output=True, text=True, check=True)
    expected = {f"{name}: OK" for name in names | {"mine.safetensors", "mine.md"}}
    assert set(done.stdout.splitlines()) == expected
    (tmp_path / "release/mine.safetensors").write_bytes(b"n")
    assert subprocess.run(check, cwd="release", capture_output=True, check=False).returncode == 1


def test_what_cannot_be_released_is_one_line(tmp_path, monkeypatch, user_error):
    monkeypatch.chdir(tmp_path)
    with user_error("results/*/reproduced-*"):
        release.main([])
    runs = [write_run(tmp_path / "results" / name / "run", b"") for name in ("simclr", "moco")]
    with user_error("same name", "run"):
        release.main([str(run) for run in runs])
    (runs[0] / "MODEL_CARD.md").unlink()
    with user_error(runs[0], "MODEL_CARD.md"):
        release.main([str(runs[0])])
    with user_error("nowhere", "encoder.safetensors"):
        release.main(["nowhere"])


def test_make_releases_the_named_runs_into_a_folder_that_git_ignores():
    assert "docs/results/release.py a b\n" in make_dry_run("release", "RUNS=a b")
    assert "/release/" in (ROOT / ".gitignore").read_text().splitlines()
