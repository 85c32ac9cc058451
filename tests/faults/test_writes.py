"""Faults in the middle of every kind of write: what was there before stays, the error is one line.

A process dies either by SIGKILL at a call (`os.fsync`, `os.replace`), or in the middle of a file at
an exact byte: there the kernel's file-size limit sends SIGXFSZ, whose default action cannot be
caught by any layer, Python's or C++'s. A full disk is a real one (a small tmpfs) where this process
may mount, and always one on which no file can grow. The image cache is the exception among the
files: a run can do without it, so a fault while it is written costs the cache only, and says so.
"""

import builtins
import contextlib
import errno
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_tools import COUNT, REPOSITORY, digest, forked, result_of, rows_of
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import functions
import rnn
import rnn_hyperparameter_tune as tune
import simclr

pytestmark = pytest.mark.slow
POINTS = max(3, COUNT // 50)


def write_checkpoint(path, version):
    model = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256))
    nn.init.constant_(model[0].weight, version)
    nn.init.zeros_(model[0].bias)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rows = [{"epoch": n + 1, "loss": 0.5, "seconds": 1.0} for n in range(version)]
    functions.save_checkpoint(path, "simclr", version, model, optimizer, rows, simclr.Config())


def write_png(path, version):
    figure = functions.new_figure(4, 3)
    figure.subplots().plot(range(9), np.arange(9) ** version)
    functions.save_figure(figure, path)


def write_safetensors(path, version):
    model = nn.Linear(64, 256)
    nn.init.constant_(model.weight, version)
    nn.init.zeros_(model.bias)
    functions.save_weights(path, model, {})


def write_arrays(path, version):
    functions.write_arrays(path, a=np.random.default_rng(version).random(5000))


WRITERS = {
    "checkpoint.pt": write_checkpoint,
    "metrics.csv": lambda path, version: functions.write_csv(
        path, [{"epoch": epoch, "loss": version / 3} for epoch in range(2000)]
    ),
    "summary.json": lambda path, version: functions.write_json(path, {"a": str(version) * 20_000}),
    "loss.png": write_png,
    "encoder.safetensors": write_safetensors,
    "embeddings.npz": write_arrays,
}
every_writer = pytest.mark.parametrize("name", WRITERS)


def content(path):
    """What a reader gets, or the error it gets."""
    if path.suffix == ".pt":  # the name of the temporary file is inside: bytes differ
        return digest(functions.load_checkpoint(path, "simclr"))
    return path.read_bytes()


@pytest.fixture
def versions(tmp_path):
    """Writes version 1 of a file and returns its path, both versions' content, and the size."""

    def arrange(name):
        contents = []
        for folder, version in (("v2", 2), ("run", 1)):
            path = tmp_path / folder / name
            path.parent.mkdir()
            WRITERS[name](path, version)
            contents.insert(0, content(path))
        assert contents[0] != contents[1]
        return path, *contents, (tmp_path / "v2" / name).stat().st_size

    return arrange


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_file(size):
    """Let the process die when a file of it grows beyond `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def around(name, act, after=False, at=0):
    """Replace `os.<name>` by one that calls `act` at its call number `at`, before or after."""
    original, calls = getattr(os, name), []

    def replaced(*arguments, **options):
        calls.append(1)
        here = len(calls) == at + 1
        if here and not after:
            act()
        result = original(*arguments, **options)
        if here and after:
            act()
        return result

    setattr(os, name, replaced)


# each writer alone


@every_writer
def test_death_inside_the_file_keeps_the_previous_one(versions, name):
    path, old, _, size = versions(name)
    draw = random.Random(name)
    for limit in (0, 1, size - 1, *(draw.randrange(size) for _ in range(POINTS))):

        def action(limit=limit):
            die_in_file(limit)
            WRITERS[name](path, 2)

        assert forked(action).detail == signal.SIGXFSZ, limit
        assert content(path) == old, limit


@every_writer
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_death_around_a_call_leaves_one_of_the_two(versions, name, call, after):
    path, old, new, _ = versions(name)

    def action():
        around(call, die, after)
        WRITERS[name](path, 2)

    assert forked(action).detail == signal.SIGKILL
    assert content(path) == (new if (call, after) == ("replace", True) else old)
    WRITERS[name](path, 2)  # what the dead process left does not hinder
    assert content(path) == new


def failing(code, at=0):
    """`open` whose files cannot take more than `at` bytes altogether."""
    original, written = builtins.open, [0]

    class File(io.FileIO):
        def write(self, block):
            written[0] += len(block)
            if written[0] > at:
                raise OSError(code, os.strerror(code))
            return super().write(block)

    def opened(path, mode="r", *arguments, **options):
        if not set(mode) & set("wax+") or not str(path).endswith(".tmp"):
            return original(path, mode, *arguments, **options)
        file = File(path, mode.replace("b", "").replace("t", ""))
        buffer = io.BufferedRandom(file) if "+" in mode else io.BufferedWriter(file)
        if "b" in mode:
            return buffer
        return io.TextIOWrapper(buffer, options.get("encoding"), newline=options.get("newline"))

    return opened


def raising(code):
    def raises(*_):
        raise OSError(code, os.strerror(code))

    return raises


@every_writer
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("call", ["write", "later write", "fsync", "replace"])
def test_error_of_the_disk_keeps_the_previous_file(
    versions, monkeypatch, user_error, name, code, call
):
    path, old, new, size = versions(name)
    with monkeypatch.context() as patch:
        if call in ("fsync", "replace"):
            patch.setattr(os, call, raising(code))
        elif name == "checkpoint.pt":  # PyTorch's own writer says it in its own way

            def save(state, target):
                Path(target).write_bytes(b"half" * (call != "write"))
                raise RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64")

            patch.setattr(torch, "save", save)
        else:
            at = size // 2 if call == "later write" and name != "loss.png" else 0
            for module in (builtins, io):
                patch.setattr(module, "open", failing(code, at))
        with user_error(path):
            WRITERS[name](path, 2)
    assert content(path) == old
    assert list(path.parent.iterdir()) == [path]
    WRITERS[name](path, 2)
    assert content(path) == new


@every_writer
def test_error_that_sealing_meets_is_one_of_the_disk(versions, monkeypatch, user_error, name):
    if name != "checkpoint.pt":
        pytest.skip("only checkpoints are sealed")
    path, old, _, _ = versions(name)
    with monkeypatch.context() as patch:
        for module in (builtins, io):
            patch.setattr(module, "open", failing(errno.EIO))
        with user_error(path):
            WRITERS[name](path, 2)
    assert content(path) == old
    assert list(path.parent.iterdir()) == [path]


@every_writer
def test_disk_on_which_no_file_can_grow(versions, small_disk, user_error, name):
    path, old, _, size = versions(name)
    draw = random.Random(name)
    for limit in (0, size - 1, *(draw.randrange(size) for _ in range(POINTS))):
        with small_disk(limit), user_error(path):
            WRITERS[name](path, 2)
        assert content(path) == old, limit
        assert list(path.parent.iterdir()) == [path], limit


@contextlib.contextmanager
def tiny_disk(folder, size, inodes=0):
    """A file system of `size` bytes at `folder`; a function that makes it larger."""
    folder.mkdir(exist_ok=True)
    options = f"size={size},nr_inodes={inodes}"
    mount = shutil.which("mount")
    command = [mount, "-t", "tmpfs", "-o", options, "none", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield lambda: subprocess.run(
            [mount, "-o", "remount,size=100m,nr_inodes=0", str(folder)], check=True
        )
    finally:
        # Lazily: an exception that a test still holds may keep a file open.
        subprocess.run(["umount", "-l", str(folder)], check=True)


@every_writer
def test_full_disk_keeps_the_previous_file(tmp_path, versions, user_error, name):
    _, old, new, size = versions(name)
    page = resource.getpagesize()
    with tiny_disk(tmp_path / "disk", (size // page + 2) * page) as enlarge:
        there = tmp_path / "disk" / name
        WRITERS[name](there, 1)
        (tmp_path / "disk" / "filler").write_bytes(bytes(min(page, size // 2)))
        with user_error(there, *([] if name == "checkpoint.pt" else ["No space left"])):
            WRITERS[name](there, 2)
        assert content(there) == old
        assert {file.name for file in there.parent.iterdir()} == {name, "filler"}
        enlarge()
        WRITERS[name](there, 2)
        assert content(there) == new


# the image cache


@pytest.fixture
def images(tmp_path):
    """A folder of images and a function that loads it and checks what arrived."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8)
    (tmp_path / "in").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "in" / f"{number:02}.png")

    def load(data_dir):
        data = functions.load_images(str(tmp_path / "in"), data_dir, 8)
        np.testing.assert_array_equal(data.train.images, pixels.transpose(0, 3, 1, 2))

    return load


def cache_files(data_dir):
    return sorted(path.suffix for path in data_dir.rglob("*") if path.is_file())


def test_death_while_the_cache_is_written(tmp_path, images):
    data_dir = tmp_path / "data"
    size = 30 * 3 * 8 * 8 + 128
    draw = random.Random(0)
    for limit in (0, 1, 100, size - 1, *(draw.randrange(size) for _ in range(POINTS))):

        def action(limit=limit):
            die_in_file(limit)
            images(data_dir)

        assert forked(action).detail == signal.SIGXFSZ, limit
        images(data_dir)
        shutil.rmtree(data_dir)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_death_around_the_cache_s_renames(tmp_path, images, at, after):
    def action():
        around("replace", die, after, at)
        images(tmp_path / "data")

    assert forked(action).detail == signal.SIGKILL
    images(tmp_path / "data")
    images(tmp_path / "data")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EXDEV])
@pytest.mark.parametrize("call", ["posix_fallocate", "replace", "mkdir"])
def test_error_of_the_disk_costs_only_the_cache(tmp_path, monkeypatch, capsys, images, call, code):
    with monkeypatch.context() as patch:
        patch.setattr(os, call, raising(code))
        images(tmp_path / "data")
    (line,) = capsys.readouterr().out.splitlines()
    assert "without a cache" in line
    assert str(tmp_path / "data") in line
    assert os.strerror(code) in line
    assert cache_files(tmp_path / "data") == []
    assert list((tmp_path / "data").rglob(".*")) == []
    images(tmp_path / "data")
    assert cache_files(tmp_path / "data") == [".json", ".npy"]


def test_full_disk_costs_only_the_cache(tmp_path, capsys, images):
    with tiny_disk(tmp_path / "disk", 2 * resource.getpagesize()) as enlarge:
        images(tmp_path / "disk")
        assert "No space left" in capsys.readouterr().out
        assert cache_files(tmp_path / "disk") == []
        enlarge()
        images(tmp_path / "disk")
        assert cache_files(tmp_path / "disk") == [".json", ".npy"]


# whole runs


def settings(folder, **changes):
    values = {"dataset": "digits", "encoder": "small", "epochs": 3, "batch_size": 256}
    values |= {"projection_hidden": 16, "stages": "pretrain", "knn_every": 0, "keep_every": 2}
    values |= {"device": "cpu", "output_dir": str(folder), "name": "run"}
    return simclr.Config(**{**values, **changes})


def flags(config):
    """The command line of `settings`."""
    words = []
    for name, value in vars(config).items():
        if value != getattr(simclr.Config, name):
            words += [functions.flag(name), str(value)]
    return words


def run(config):
    """The run, in a process of its own."""

    def action():
        torch.set_num_threads(1)
        sys.stdout = io.StringIO()
        simclr.main(config)

    return forked(action, 120)


def results(folder):
    return [
        result_of(folder, "simclr"),
        digest(functions.load_checkpoint(folder / "checkpoints" / "epoch2.pt", "simclr")["model"]),
        digest(dict(sorted(load_file(folder / "encoder.safetensors").items()))),
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The results of a run without faults, and how often it calls fsync and replace."""
    folder = tmp_path_factory.mktemp("whole")
    calls = {}
    for name in ("fsync", "replace"):
        note = folder / name

        def action(name=name, note=note):
            torch.set_num_threads(1)
            sys.stdout = io.StringIO()
            original = getattr(os, name)

            def counted(*arguments, **options):
                with note.open("a") as file:
                    file.write(".")
                return original(*arguments, **options)

            setattr(os, name, counted)
            simclr.main(settings(folder, name=name))

        assert forked(action, 120).kind == "returned"
        calls[name] = note.stat().st_size
    found = [results(folder / "simclr" / name) for name in ("fsync", "replace")]
    assert found[0] == found[1]
    assert calls["fsync"] == calls["replace"] >= 10
    return found[0], calls["fsync"]


def check_resumes(folder, expected):
    """What a fault left must be whole, and end as if nothing had happened."""
    for path in folder.rglob("*.pt"):
        functions.load_checkpoint(path, "simclr")
    if (folder / "metrics.csv").exists():
        rows_of(folder / "metrics.csv")
    outcome = run(functions.parse_config(simclr.Config, ["--resume", str(folder)], ""))
    assert outcome.kind == "returned", outcome.detail
    assert results(folder) == expected


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_run_resumes_to_the_same_result(tmp_path, uninterrupted, call):
    expected, calls = uninterrupted
    draw = random.Random(call)
    # Call 0 writes config.json: a run killed there never began.
    for at in sorted(draw.sample(range(1, calls), min(calls - 1, max(2, COUNT // 100)))):
        after = draw.random() < 0.5

        def action(at=at, after=after):
            torch.set_num_threads(1)
            sys.stdout = io.StringIO()
            around(call, die, after, at)
            simclr.main(settings(tmp_path, name=f"{at}"))

        assert forked(action, 120).detail == signal.SIGKILL, at
        check_resumes(tmp_path / "simclr" / f"{at}", expected)


SITECUSTOMIZE = """
import errno, os, signal
call, at, fault = os.environ["FAULT"].split(",")
original, calls = getattr(os, call), []
def replaced(*arguments, **options):
    calls.append(1)
    if len(calls) == int(at):
        if fault == "KILL":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))
    return original(*arguments, **options)
setattr(os, call, replaced)
"""


def command(folder, *words, **environment):
    """The real command line, in `folder`."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return subprocess.run(
        [sys.executable, str(REPOSITORY / words[0]), *map(str, words[1:])],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize("fault", ["KILL", "ENOSPC", "EIO"])
def test_fault_on_the_real_command_line(tmp_path, uninterrupted, call, at, fault):
    # Writes: config.json, checkpoint.pt and metrics.csv, then the kept checkpoint of epoch 2.
    named = {2: "checkpoint.pt", 4: "checkpoints/epoch2.pt"}[at]
    words = ["simclr.py", *flags(settings(tmp_path))]
    environment = {"FAULT": f"{call},{at},{fault}", "PYTHONPATH": str(tmp_path / "site")}
    done = command(tmp_path, *words, **environment)
    folder = tmp_path / "simclr" / "run"
    if fault == "KILL":
        assert done.returncode == -signal.SIGKILL
    else:
        assert done.returncode not in (0, -signal.SIGKILL)
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert str(folder / named) in line
        assert os.strerror(getattr(errno, fault)) in line
        assert not list(folder.rglob("*.tmp"))
    check_resumes(folder, uninterrupted[0])


def test_run_on_a_disk_that_fills_up(tmp_path, uninterrupted):
    expected, _ = uninterrupted
    folder = tmp_path / "disk" / "simclr" / "run"
    with tiny_disk(tmp_path / "disk", 1_300_000) as enlarge:
        done = command(tmp_path, "simclr.py", *flags(settings(tmp_path / "disk")))
        assert done.returncode not in (0, None)
        assert done.returncode > 0
        (line,) = done.stderr.splitlines()
        assert str(folder) in line
        assert not list(folder.rglob("*.tmp"))
        enlarge()
        check_resumes(folder, expected)


def test_run_on_a_disk_without_room_for_another_name(tmp_path, uninterrupted):
    # results, its two folders, config.json, checkpoint.pt and metrics.csv fit, `checkpoints` not.
    folder = tmp_path / "disk" / "simclr" / "run"
    with tiny_disk(tmp_path / "disk", 100_000_000, inodes=7) as enlarge:
        done = command(tmp_path, "simclr.py", *flags(settings(tmp_path / "disk")))
        assert done.returncode > 0
        (line,) = done.stderr.splitlines()
        assert str(folder) in line
        enlarge()
        check_resumes(folder, uninterrupted[0])


def test_temporary_folder_on_another_file_system(tmp_path, uninterrupted):
    other = Path("/dev/shm")
    if not other.is_dir() or os.stat(other).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is no other file system")
    before = set(other.iterdir())
    done = command(tmp_path, "simclr.py", *flags(settings(tmp_path)), TMPDIR=str(other))
    assert (done.returncode, done.stderr) == (0, "")
    assert results(tmp_path / "simclr" / "run") == uninterrupted[0]
    assert set(other.iterdir()) <= before


def test_no_temporary_folder_at_all(tmp_path, monkeypatch, images):
    # What is renamed must be on the file system of its target, so nothing may go elsewhere.
    monkeypatch.setattr("tempfile.gettempdir", lambda: pytest.fail("used the temporary folder"))
    images(tmp_path / "data")
    for name, write in WRITERS.items():
        write(tmp_path / name, 1)


@pytest.mark.parametrize(
    ("method", "name"), [("mkdir", "checkpoints"), ("unlink", "finetune_checkpoint.pt")]
)
def test_error_of_the_disk_at_other_calls(tmp_path, monkeypatch, capsys, method, name):
    config = settings(tmp_path, stages="pretrain,finetune", finetune_epochs=1, epochs=2)
    original = getattr(Path, method)

    def failing_call(path, *arguments, **options):
        if path.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        original(path, *arguments, **options)

    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.setattr(sys, "argv", ["simclr.py", *flags(config)])
    monkeypatch.setattr(Path, method, failing_call)
    try:
        with pytest.raises(SystemExit) as left:
            functions.run_script(simclr.main, simclr.Config, "")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert left.value.code not in (0, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line
    assert os.strerror(errno.EIO) in line


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "SPACE", {**tune.SPACE, "hidden_size": [8], "num_layers": [1]})
    monkeypatch.setattr(tune, "draw", lambda *_: None)
    values = {"dataset": "digits", "cell": "rnn", "trials": 3, "max_epochs": 1}
    values |= {"train_fraction": 0.3, "device": "cpu", "name": "run"}
    return lambda **changes: tune.Config(**{**values, "output_dir": str(tmp_path), **changes})


def test_sweep_on_a_disk_that_fills_up(tmp_path, sweep, monkeypatch, user_error):
    with tiny_disk(tmp_path / "disk", 1_000_000) as enlarge:
        config = sweep(output_dir=str(tmp_path / "disk"))
        filler, train_step = tmp_path / "disk" / "filler", tune.RowRNNModule.training_step

        def step(module, batch, index):
            if not filler.exists():
                with contextlib.suppress(OSError):
                    filler.write_bytes(bytes(1_000_000))
            return train_step(module, batch, index)

        with monkeypatch.context() as patch:
            patch.setattr(tune.RowRNNModule, "training_step", step)
            with user_error("study.db"):
                tune.main(config)
        enlarge()
        filler.unlink()
        folder = tmp_path / "disk" / "rnn_hyperparameter_tune" / "run"
        best = tune.main(sweep(resume=str(folder), output_dir=str(tmp_path / "disk")))
        assert best["trials"] == 3


def test_recurrent_run_on_a_disk_that_fills_up(tmp_path, user_error):
    values = {"dataset": "digits", "cells": "rnn", "hidden_size": 64, "epochs": 3, "device": "cpu"}
    with tiny_disk(tmp_path / "disk", 1_000_000) as enlarge:
        config = rnn.Config(**values, output_dir=str(tmp_path / "disk"), name="run")
        folder = tmp_path / "disk" / "rnn" / "run"
        (tmp_path / "disk" / "filler").write_bytes(bytes(1_000_000 - 130_000))
        with user_error(folder):
            rnn.main(config)
        assert not list(folder.rglob("*.tmp"))
        if (folder / "checkpoint.pt").exists():
            functions.load_checkpoint(folder / "checkpoint.pt", "rnn")
        enlarge()
        rnn.main(functions.parse_config(rnn.Config, ["--resume", str(folder)], ""))
        rnn.main(rnn.Config(**values, output_dir=str(tmp_path), name="whole"))
        assert result_of(folder, "rnn") == result_of(tmp_path / "rnn" / "whole", "rnn")
