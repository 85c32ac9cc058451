"""Faults in the middle of every kind of write: what was there before stays, the error is one line.

A process dies either by SIGKILL at a call (`os.fsync`, `os.replace`), or in the middle of a file at
an exact byte: there the kernel's file-size limit sends SIGXFSZ, whose default action cannot be
caught by any layer, Python's or C++'s. A full disk is a real one (a small tmpfs) where this process
may mount, and always one on which no file can grow. The image cache is the exception among the
files: a run can do without it, so a fault while it is written costs the cache only, and says so.
"""

import contextlib
import dataclasses
import errno
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from fault_tools import COUNT, digest, forked, result_of
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import functions
import rnn
import rnn_hyperparameter_tune as tune
import simclr
from support import checkpoints, figures, files, settings

pytestmark = pytest.mark.slow
POINTS = max(3, COUNT // 50)


def write_checkpoint(path, version):
    model = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256))
    nn.init.constant_(model[0].weight, version)
    nn.init.zeros_(model[0].bias)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rows = [{"epoch": n + 1, "loss": 0.5, "seconds": 1.0} for n in range(version)]
    checkpoints.save(path, version, model, optimizer, rows, simclr.Config())


def write_png(path, version):
    with figures.new_figure(path) as figure:
        figure.subplots().plot(range(9), np.arange(9) ** version)


def write_safetensors(path, version):
    model = nn.Linear(64, 256)
    nn.init.constant_(model.weight, version)
    nn.init.zeros_(model.bias)
    checkpoints.save_weights(path, model, {})


def write_arrays(path, version):
    files.write_arrays(path, a=np.random.default_rng(version).random(5000))


WRITERS = {
    "checkpoint.pt": write_checkpoint,
    "metrics.csv": lambda path, version: files.write_csv(
        path, [{"epoch": epoch, "loss": version / 3} for epoch in range(2000)]
    ),
    "summary.json": lambda path, version: files.write_json(path, {"a": str(version) * 20_000}),
    "loss.png": write_png,
    "encoder.safetensors": write_safetensors,
    "embeddings.npz": write_arrays,
}
every_writer = pytest.mark.parametrize("name", WRITERS)


def content(path):
    """What a reader gets, or the error it gets."""
    if path.suffix == ".pt":  # the name of the temporary file is inside: bytes differ
        return digest(checkpoints.load(path))
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


def raising(code):
    def raises(*_):
        raise OSError(code, os.strerror(code))

    return raises


@every_writer
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_error_of_the_disk_keeps_the_previous_file(versions, monkeypatch, user_error, name, call):
    path, old, new, _ = versions(name)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, raising(errno.EIO))
        with user_error(path, os.strerror(errno.EIO)):
            WRITERS[name](path, 2)
    assert content(path) == old
    assert list(path.parent.iterdir()) == [path]
    WRITERS[name](path, 2)
    assert content(path) == new


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
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
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
    size = 60 * 3 * 8 * 8 + 128
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


def test_full_disk_costs_only_the_cache(tmp_path, images):
    with tiny_disk(tmp_path / "disk", 2 * resource.getpagesize()) as enlarge:
        # In a process of its own: memory that no disk can hold is a SIGBUS.
        assert forked(lambda: images(tmp_path / "disk")).kind == "returned"
        assert cache_files(tmp_path / "disk") == []
        enlarge()
        images(tmp_path / "disk")
        assert cache_files(tmp_path / "disk") == [".json", ".npy"]


# whole runs


def settings_in(folder):
    return simclr.Config(
        dataset="digits",
        encoder="small",
        epochs=3,
        batch_size=256,
        projection_hidden=16,
        stages="pretrain",
        knn_every=0,
        keep_every=2,
        checkpoint_seconds=0.0,
        device="cpu",
        output_dir=str(folder),
        name="run",
    )


def run(config, arrange=lambda: None):
    """The run, in a process of its own, after `arrange` there."""

    def action():
        torch.set_num_threads(1)
        sys.stdout = io.StringIO()
        arrange()
        simclr.main(config)

    return forked(action, 120)


def results(folder):
    return [
        result_of(folder),
        digest(checkpoints.load(folder / "checkpoints" / "epoch2.pt")["model"]),
        digest(dict(sorted(load_file(folder / "encoder.safetensors").items()))),
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The results of a run without faults."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(settings_in(folder)).kind == "returned"
    return results(folder / "simclr" / "run")


def check_resumes(folder, expected):
    """What a fault left must be whole, and end as if nothing had happened."""
    assert not list(folder.rglob("*.tmp"))
    for path in folder.rglob("*.pt"):
        checkpoints.load(path)
    outcome = run(settings.parse_config(simclr.Config, ["--resume", str(folder)], ""))
    assert outcome.kind == "returned", outcome.detail
    assert results(folder) == expected


@pytest.mark.parametrize("call", ["fsync", "replace"])
# Writes: config.json, checkpoint.pt and metrics.csv, then the kept checkpoint of epoch 2.
@pytest.mark.parametrize(("at", "name"), [(1, "checkpoint.pt"), (3, "checkpoints/epoch2.pt")])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_run_that_meets_an_error_of_the_disk(tmp_path, uninterrupted, call, at, name, code):
    outcome = run(settings_in(tmp_path), lambda: around(call, raising(code), at=at))
    assert outcome.kind == "UserError"
    folder = tmp_path / "simclr" / "run"
    assert str(folder / name) in outcome.detail
    assert os.strerror(code) in outcome.detail
    check_resumes(folder, uninterrupted)


def test_run_on_a_disk_that_fills_up(tmp_path, uninterrupted):
    folder = tmp_path / "disk" / "simclr" / "run"
    with tiny_disk(tmp_path / "disk", 1_300_000) as enlarge:
        outcome = run(settings_in(tmp_path / "disk"))
        assert outcome.kind == "UserError"
        assert str(folder) in outcome.detail
        enlarge()
        check_resumes(folder, uninterrupted)


def test_no_temporary_folder_at_all(tmp_path, monkeypatch, images):
    # What is renamed must be on the file system of its target, so nothing may go elsewhere.
    monkeypatch.setattr("tempfile.gettempdir", lambda: pytest.fail("used the temporary folder"))
    images(tmp_path / "data")
    for name, write in WRITERS.items():
        write(tmp_path / name, 1)


def test_sweep_on_a_disk_that_fills_up(tmp_path, monkeypatch, user_error):
    monkeypatch.setattr(tune, "SPACE", {**tune.SPACE, "hidden_size": [8], "num_layers": [1]})
    disk, loss_function = tmp_path / "disk", rnn.loss_function
    folder, filler = disk / "rnn_hyperparameter_tune" / "run", disk / "filler"
    config = tune.Config(
        dataset="digits",
        cell="rnn",
        trials=3,
        max_epochs=1,
        train_fraction=0.3,
        device="cpu",
        output_dir=str(disk),
        name="run",
    )

    def filling(*arguments):
        if not filler.exists():
            with contextlib.suppress(OSError):
                filler.write_bytes(bytes(1_000_000))
        return loss_function(*arguments)

    with tiny_disk(disk, 1_000_000) as enlarge:
        with monkeypatch.context() as patch:
            patch.setattr(rnn, "loss_function", filling)
            with user_error(disk):
                tune.main(config)
        enlarge()
        filler.unlink()
        best = tune.main(dataclasses.replace(config, resume=str(folder)))
        assert best["trials"] == 3
