"""Damaged and hostile files: refused in one line, or provably harmless; never a traceback.

`FAULT_COUNT` mutated files in all, each from a seed of its own. Harmless means that what was loaded
equals the original, with two exceptions:

- JSON and CSV files of ours carry no checksum: what still parses may be believed, but it must not
  end in a traceback. Settings are checked like those of a command line.
- JPEG, BMP, GIF, TIFF and WebP have no checksum of their pixels: an image is harmless if it is
  refused or decoded to its right shape. PNG has one, so a PNG must come out equal or be refused.

Study files are in test_killed_sweep.py.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import traceback
import typing
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import REPOSITORY, last_words, rows_of
from fault_tools import COUNT, digest, forked, mutate, mutate_json
from PIL import Image
from torch import nn
from torchvision.datasets import CIFAR10

import compare
import evaluation
import few_labels
import functions
import rnn
import simclr
from support import checkpoints, datasets, experiment, files, pretraining, runs, settings
from support.errors import UserError

pytestmark = pytest.mark.slow
SECONDS = 3.0
MEMORY = 400 << 20  # how much more a process may take for a hostile file
IDX_SHAPE = (6, 28, 28)


# originals of each kind of file


def quiet():
    """In a child: one thread, and an output that takes what a terminal takes."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = io.TextIOWrapper(io.BytesIO(), "utf-8")
    runs.show_lines_at_once()


def small_config(folder):
    return simclr.Config(
        dataset="digits",
        encoder="small",
        epochs=2,
        batch_size=256,
        projection_hidden=16,
        stages="pretrain",
        knn_every=0,
        checkpoint_seconds=0.0,
        device="cpu",
        output_dir=str(folder),
        name="run",
    )


def make_run(folder):
    """A run that was killed after the first of two epochs."""

    def action():
        quiet()
        replace = os.replace

        def dying(source, target):
            replace(source, target)
            if Path(target).name == "metrics.csv":  # the last file of an epoch
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = dying
        simclr.main(small_config(folder))

    assert forked(action).detail == signal.SIGKILL
    run = folder / "simclr" / "run"
    files.write_json(run / "summary.json", SUMMARY)
    return run


SUMMARY = {
    "final_loss": 1.25,
    "pretrain_seconds": 3.5,
    "linear_probe_accuracy": 0.875,
    "probe_seconds": 1.5,
    "few_label_accuracy_encoder": {"labels_per_class": 10, "mean": 0.5, "sd": 0.1, "draws": 5},
    "seconds": 5.0,
}
BEST = {
    **{"cell": "gru", "hidden_size": 256, "num_layers": 3, "l2": 32, "l3": 16},
    **{"learning_rate": 0.00123, "weight_decay": 0.00456, "batch_size": 64},
    "augmentation": "none",
    **{"validation_loss": 1.25, "trial": 7, "trials": 9, "epochs": 10, "train_fraction": 1.0},
}


def make_best(folder):
    files.write_json(folder / "best.json", BEST)
    return folder


def make_pair(folder):
    """Two runs to compare."""
    run = make_run(folder)
    shutil.copytree(run, folder / "other")
    return run


def make_predictions(folder):
    files.write_arrays(folder / "predictions.npz", predictions=np.arange(8) % 4)
    return folder


def md5(content):
    return hashlib.md5(content).hexdigest()


def cifar_files():
    """A CIFAR-10 of three images a batch: its files by name."""
    pixels = np.random.default_rng(0).integers(0, 256, (18, 3072), np.uint8)
    batches = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    files = {"batches.meta": pickle.dumps({"label_names": list("abcdefghij")}, 2)}
    for i, name in enumerate(batches):
        batch = {"data": pixels[3 * i : 3 * i + 3], "labels": [i, i + 1, i + 2]}
        files[name] = pickle.dumps(batch, 2)
    return files


def believe(files, archive=b""):
    """Let torchvision take these files, and this archive, for the right ones."""
    lists = [[name, md5(content)] for name, content in files.items() if name != "batches.meta"]
    CIFAR10.train_list, CIFAR10.test_list = lists[:5], lists[5:]
    CIFAR10.meta = {**CIFAR10.meta, "md5": md5(files["batches.meta"])}
    CIFAR10.tgz_md5 = md5(archive)
    CIFAR10.url = f"http://127.0.0.1:9/{CIFAR10.filename}"


def tar_gz(files, *members):
    """An archive of `files` in CIFAR-10's folder, and of further members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if content else None)
    return buffer.getvalue()


def make_cifar_batches(folder):
    (folder / CIFAR10.base_folder).mkdir()
    for name, content in cifar_files().items():
        (folder / CIFAR10.base_folder / name).write_bytes(content)
    return folder


@functools.cache
def cifar_archive():
    return tar_gz(cifar_files())


def make_cifar_archive(folder):
    (folder / CIFAR10.filename).write_bytes(cifar_archive())
    return folder


def idx(array):
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def make_idx(folder):
    pixels = np.random.default_rng(0).integers(0, 256, IDX_SHAPE, np.uint8)
    (folder / "images.gz").write_bytes(gzip.compress(idx(pixels)))
    return folder


def make_images(folder, *suffixes):
    (folder / "in").mkdir()
    for number in range(6):
        y, x = np.mgrid[:12, :12]
        pixels = np.stack((20 * x, 20 * y, 7 * x + 9 * y + number), 2).astype(np.uint8)
        path = folder / "in" / f"{number}.{suffixes[number % len(suffixes)]}"
        Image.fromarray(pixels).save(path)
    return folder


def make_cache(folder):
    make_images(folder, "png")
    functions.load_images(str(folder / "in"), folder / "data", 8)
    return folder


# how a script reads them; all of it in a child


def optimizer_of(config):
    """Takes the settings that a training takes."""
    return simclr.make_optimizer(nn.Linear(1, 1), config)


def load_checkpoint(folder):
    config = small_config(folder)
    model = simclr.SimCLR(config, 1, 8)
    optimizer = simclr.make_optimizer(model, config)
    epoch, history = checkpoints.restore(folder / "checkpoint.pt", model, optimizer)
    return digest([epoch, history, model.state_dict(), optimizer.state_dict()])


def load_config(folder):
    config = settings.parse_config(simclr.Config, ["--resume", str(folder)], "")
    with runs.open_run(config, None, pretraining.EVALUATION):
        optimizer_of(config)


def load_best(folder):
    config = rnn.read_best(str(folder / "best.json"))
    rnn.make_optimizer(nn.Linear(1, 1), config)


def load_summary(folder):
    experiment.print_results(runs.Run(folder).summarize({"final_loss": 1.25}), folder)


def load_pair(folder):
    other = folder.with_name("other")
    if not other.exists():
        shutil.copytree(pristine("compared runs").parents[1] / "other", other)
    compare.main([str(folder), str(other), "--figure", str(folder / "figure.png")])


def load_resumed(folder):
    simclr.main(settings.parse_config(simclr.Config, ["--resume", str(folder)], ""))
    return rows_of(folder / "metrics.csv")


def tiny_data():
    split = datasets.Split(torch.zeros(40, 1, 8, 8, dtype=torch.uint8), torch.arange(40) % 4)
    test = datasets.Split(split.images[:8], split.labels[:8])
    return datasets.ImageData("tiny", tuple("abcd"), split, test).with_statistics()


def load_labels(folder):
    few_labels.main(settings.parse_config(few_labels.Config, ["--resume", str(folder)], ""))


def make_labels(folder):
    values = {"dataset": "digits", "methods": "mean", "labels": "20,40", "quick_draws": 3}
    values |= {"output_dir": str(folder), "name": "run", "device": "cpu"}
    config = few_labels.Config(**values)
    assert forked(lambda: (quiet(), few_labels.main(config))).kind == "returned"
    return folder / "few_labels" / "run"


def load_predictions(folder):
    features = torch.eye(8)
    evaluation.write_map_page(
        folder,
        tiny_data(),
        evaluation.images_to_map(tiny_data()),
        features,
        features.numpy()[:, :2],
        "a map",
    )
    return digest((folder / "embedding.html").read_text())


def load_data(data):
    parts = [data.name, list(data.classes), data.train.images, data.train.labels]
    parts += [data.test.images, data.test.labels] if data.test else []
    return digest(parts)


def load_cifar(folder):
    return load_data(functions.load_images("cifar10", folder))


def load_idx(folder):
    return digest(torch.from_numpy(datasets.read_idx(folder / "images.gz", IDX_SHAPE)))


def load_folder(folder):
    return load_data(functions.load_images(str(folder / "in"), folder / "data", 8))


def load_cache(folder):  # which goes by the path of the images
    images = pristine("image cache") / "in"
    return load_data(functions.load_images(str(images), folder / "data", 8))


def load_shape(folder):
    return list(functions.load_images(str(folder / "in"), folder / "data", 8).train.images.shape)


def equal(expected, content):
    return content == expected


def believed(expected, content):
    return True


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file: what share of `FAULT_COUNT` it has, how it is made, damaged and read."""

    share: int
    make: typing.Callable
    files: str  # a pattern of the files to damage
    load: typing.Callable
    good: typing.Callable = equal
    mutate: typing.Callable = mutate


OTHER_IMAGES = ("jpg", "bmp", "gif", "webp", "tif", "ppm")
KINDS = {
    "checkpoint.pt": Kind(150, make_run, "checkpoint.pt", load_checkpoint),
    "config.json": Kind(130, make_run, "config.json", load_config, believed, mutate_json),
    "best.json": Kind(100, make_best, "best.json", load_best, believed, mutate_json),
    "summary.json": Kind(60, make_run, "summary.json", load_summary, believed, mutate_json),
    "compared runs": Kind(80, make_pair, "*[yg].json", load_pair, believed, mutate_json),
    "compared tables": Kind(40, make_pair, "metrics.csv", load_pair, believed),
    "metrics.csv": Kind(10, make_run, "metrics.csv", load_resumed),  # it is written anew
    "few_labels.csv": Kind(80, make_labels, "few_labels.csv", load_labels, believed),
    "predictions.npz": Kind(40, make_predictions, "*.npz", load_predictions),
    "CIFAR batches": Kind(60, make_cifar_batches, "*/*batch*", load_cifar),
    "CIFAR archive": Kind(40, make_cifar_archive, "*.gz", load_cifar),
    "idx": Kind(60, make_idx, "*.gz", load_idx),
    "PNG": Kind(50, lambda folder: make_images(folder, "png"), "in/*.png", load_folder),
    "other images": Kind(60, lambda folder: make_images(folder, *OTHER_IMAGES), "in/*", load_shape),
    "image cache": Kind(40, make_cache, "data/cache/*", load_cache),
}
every_kind = pytest.mark.parametrize("name", KINDS)
STATE = {}


@functools.cache
def pristine(name):
    """A folder with an undamaged file of this kind."""
    folder = STATE["folder"] / name.replace(" ", "-")
    folder.mkdir()
    return KINDS[name].make(folder)


@functools.cache
def original(name):
    """What an undamaged file is loaded as."""
    folder = copy_of(name, "original")  # made here, so that the children find it
    outcome = forked(lambda: (prepare(), KINDS[name].load(folder))[1])
    assert outcome.kind == "returned", outcome.detail
    return outcome.detail


def prepare():
    quiet()
    believe(cifar_files(), cifar_archive())


def copy_of(name, number):
    folder = STATE["folder"] / "copies" / f"{name.replace(' ', '-')}-{number}"
    return Path(shutil.copytree(pristine(name), folder))  # keeps the times, by which a cache goes


def damage(name, number):
    """A folder with a damaged file, its path, and what was done to it."""
    kind, draw = KINDS[name], random.Random(f"{name} {number}")
    folder = copy_of(name, number)
    path = draw.choice(sorted(folder.glob(kind.files)))
    stat = path.stat()
    what, content = kind.mutate(path.read_bytes(), draw)
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return folder, path, f"{name} {number}: {path.name}: {what}"


@functools.cache
def outcomes(name):
    """How each mutated file of a kind fared: (what was done, result, message, seconds)."""
    expected, kind = original(name), KINDS[name]
    current = STATE["folder"] / "current"
    current.write_text("the undamaged file")

    def action():
        prepare()
        # The libraries that a first call imports are part of the start-up.
        kind.load(copy_of(name, "warm"))
        results = []
        for number in range(max(2, round(kind.share * COUNT / 1000))):
            folder, _, what = damage(name, number)
            current.write_text(what)
            signal.alarm(60)
            began = time.process_time()  # a busy machine is not the file's fault
            try:
                content = json.loads(json.dumps(kind.load(folder)))
                good = kind.good(expected, content)
                result, message = ("harmless", "") if good else ("accepted", str(content)[:300])
            except UserError as error:
                result, message = "refused", str(error)
                if str(folder) not in message:
                    result = "names no file"
            except BaseException:
                lines = traceback.format_exc(limit=-3).splitlines()
                result, message = "traceback", "\n".join(lines[-7:])[-1500:]
            results.append([what, result, message, time.process_time() - began])
            shutil.rmtree(folder)
        return results

    outcome = forked(action, 3000)
    assert outcome.kind == "returned", f"{current.read_text()}: {outcome}"
    return outcome.detail


def those(name, *results):
    found = [case for case in outcomes(name) if case[1] in results]
    lines = [f"{what}: {result}: {message}" for what, result, message, _ in found[:5]]
    return f"{len(found)} of {len(outcomes(name))}:\n" + "\n".join(lines) if found else ""


@pytest.fixture(scope="module", autouse=True)
def state(tmp_path_factory):
    STATE["folder"] = tmp_path_factory.mktemp("hostile")


@every_kind
@pytest.mark.parametrize("result", ["traceback", "names no file", "accepted"])
def test_no_mutated_file_ends_in_a(name, result):
    assert not those(name, result)


@every_kind
def test_mutated_file_takes_no_time(name):
    assert not [case for case in outcomes(name) if case[3] > SECONDS]


def test_the_mutations_are_real_ones():
    cases = [case for name in KINDS for case in outcomes(name)]
    refused = sum(result == "refused" for _, result, _, _ in cases)
    print(f"{len(cases)} mutated files: {refused} refused")
    assert refused > len(cases) / 3


# a sample on the real command line


COMMANDS = {
    "checkpoint.pt": lambda folder: ["simclr", "--resume", folder],
    "config.json": lambda folder: ["simclr", "--resume", folder],
    "best.json": lambda folder: ["rnn", "--dataset", "digits", "--config", folder / "best.json"],
    "PNG": lambda folder: ["simclr", "--dataset", folder / "in", "--data-dir", folder / "data"],
    "CIFAR archive": lambda folder: ["simclr", "--dataset", "cifar10", "--data-dir", folder],
}


@pytest.mark.parametrize("number", range(max(2, round(20 * COUNT / 1000))))
def test_mutated_file_on_the_command_line(tmp_path, number):
    name = list(COMMANDS)[number % len(COMMANDS)]
    # The next one that the loader itself refuses.
    for attempt in range(1000, 1200):
        folder, _, what = damage(name, 1000 * number + attempt)
        outcome = forked(lambda folder=folder: (prepare(), KINDS[name].load(folder)))
        if outcome.kind == "UserError":
            break
    shutil.rmtree(folder)
    folder, _, what = damage(name, 1000 * number + attempt)
    script, *words = COMMANDS[name](folder)
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / f"{script}.py"), *map(str, words)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, what
    (line,) = last_words(done.stderr)
    assert line.startswith("error: "), what


# hostile files


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def seal(content):
    """With a right checksum, so that what is inside has to be checked."""
    content = content[:-2]
    return content + b"\x40\x00" + hashlib.sha256(content).hexdigest().encode()


def forge(folder, change):
    """A sealed checkpoint in which `change` altered the state; what resumes it."""
    state = checkpoints.load(folder / "checkpoint.pt")
    state = change(state) or state
    buffer = io.BytesIO()
    torch.save(state, buffer)
    (folder / "checkpoint.pt").write_bytes(seal(buffer.getvalue()))
    return lambda: load_resumed(folder)


def put(*path, value):
    """A change of one value inside a checkpoint."""

    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value(state[path[-1]]) if callable(value) else value

    return change


WEIGHT = ("model", "projection_head.2.weight")
MOMENTUM = ("optimizer", "state", 0, "momentum_buffer")


def sparse(tensor):
    place = torch.zeros(tensor.ndim, 1, dtype=torch.long)
    return torch.sparse_coo_tensor(place, torch.ones(1), tensor.shape)


def bad_sparse(tensor):
    place = torch.tensor([[1 << 40], [1 << 40]])
    return torch.sparse_coo_tensor(place, torch.ones(1), tensor.shape, check_invariants=False)


def quantized(tensor):
    return torch.quantize_per_tensor(tensor.float().flatten(), 0.1, 0, torch.qint8).view(
        tensor.shape
    )


def huge(tensor):
    return torch.zeros(1).expand(1 << 40)


STATES = {
    "a payload": lambda canary: lambda state: Payload(canary),
    "a payload in the history": lambda canary: put("history", value=[Payload(canary)]),
    "sparse weights out of range": lambda canary: put(*WEIGHT, value=bad_sparse),
    "sparse momentum": lambda canary: put(*MOMENTUM, value=sparse),
    "quantized momentum": lambda canary: put(*MOMENTUM, value=quantized),
    "weights on no device": lambda canary: put(*WEIGHT, value=lambda t: t.to("meta")),
    "momentum on no device": lambda canary: put(*MOMENTUM, value=lambda t: t.to("meta")),
    "momentum of an absurd size": lambda canary: put(*MOMENTUM, value=huge),
    "momentum of another shape": lambda canary: put(*MOMENTUM, value=torch.zeros(2, 2)),
    "momentum that is text": lambda canary: put(*MOMENTUM, value="much"),
    "complex weights": lambda canary: put(*WEIGHT, value=lambda t: t.to(torch.complex64)),
}


def check_refused(action, canary, seconds=30):
    outcome = forked(lambda: (quiet(), action())[1], seconds, 2 << 30)
    assert outcome.kind == "UserError", outcome
    assert len(outcome.detail.splitlines()) == 1
    assert not canary.exists()
    assert outcome.grown < MEMORY
    assert outcome.seconds < 10  # with what it imports


@pytest.mark.parametrize("what", STATES)
def test_hostile_checkpoint_is_refused(tmp_path, what):
    folder = copy_of("checkpoint.pt", what.replace(" ", "-"))
    canary = tmp_path / "canary"
    check_refused(forge(folder, STATES[what](canary)), canary)


def test_the_forged_checkpoints_differ_in_nothing_else():
    folder = copy_of("checkpoint.pt", "forged")
    action = forge(folder, lambda state: None)
    outcome = forked(lambda: (quiet(), action())[1])
    assert outcome.detail == original("metrics.csv")


def raw(content):
    def make(folder, canary):
        run = copy_of("checkpoint.pt", canary.parent.name)
        (run / "checkpoint.pt").write_bytes(content(run, canary))
        return lambda: load_resumed(run)

    return make


def global_call(folder, canary):
    """A pickle that calls os.system, spelled out by hand, in a zip of PyTorch's layout."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", f"cposix\nsystem\n(Vmkdir {canary}\ntR.")
        archive.writestr("archive/version", "3\n")
    return seal(buffer.getvalue())


def script_module(folder, canary):
    """A TorchScript archive, which is code."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return seal(buffer.getvalue())


def archive_with(*members, files=None):
    """CIFAR-10's archive with more in it, whose MD5 is taken for the right one."""

    def make(folder, canary):
        content = tar_gz(files or cifar_files(), *(member(canary) for member in members))
        shutil.rmtree(folder / CIFAR10.base_folder, ignore_errors=True)
        (folder / CIFAR10.filename).write_bytes(content)
        believe(cifar_files(), content)
        return lambda: load_cifar(folder)

    return make


def member(name, kind=tarfile.REGTYPE, link="", content=b""):
    def make(canary):
        info = tarfile.TarInfo(name.replace("CANARY", str(canary)))
        info.type, info.linkname = kind, link.replace("CANARY", str(canary))
        return info, content

    return make


INSIDE = CIFAR10.base_folder


def wrong_archive(folder, canary):
    files = cifar_files() | {"data_batch_1": pickle.dumps(Payload(canary), 2)}
    believe(cifar_files(), cifar_archive())
    (folder / CIFAR10.filename).write_bytes(tar_gz(files))
    return lambda: load_cifar(folder)


def payload_batch(folder, canary):
    believe(cifar_files())
    make_cifar_batches(folder)
    (folder / INSIDE / "data_batch_2").write_bytes(pickle.dumps(Payload(canary), 2))
    return lambda: load_cifar(folder)


def payload_in_a_right_archive(folder, canary):
    files = cifar_files() | {"test_batch": pickle.dumps(Payload(canary), 2)}
    return archive_with(files=files)(folder, canary)


def png(width, height, data=b""):
    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    )


def image(name, content):
    """A folder of images, one of which is hostile."""

    def make(folder, canary):
        make_images(folder, "png")
        (folder / "in" / name).unlink(missing_ok=True)
        content(folder / "in" / name, canary)
        return lambda: load_folder(folder)

    return make


def postscript(path, canary):
    """An EPS under another name, and a Ghostscript that says that it was run."""
    tools = path.parent.parent / "tools"
    tools.mkdir()
    for tool in ("gs", "gswin64c"):
        (tools / tool).write_text(f"#!/bin/sh\nmkdir {canary}\nexit 0\n")
        (tools / tool).chmod(0o755)
    os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 12\n%%EndComments\nshowpage\n%%EOF\n"
    )


def strange_class(folder, canary):
    for name in (b"caf\xe9", b"tea"):
        place = os.path.join(os.fsencode(folder), b"in", name)
        os.makedirs(place)
        for number in range(5):
            Image.new("L", (8, 8)).save(os.path.join(place, b"%d.png" % number))
    return lambda: load_folder(folder)


def idx_file(content):
    def make(folder, canary):
        (folder / "images.gz").write_bytes(content)
        return lambda: load_idx(folder)

    return make


def run_file(name, content=None, link=None):
    """A run folder from elsewhere, one file of which is hostile."""

    def make(folder, canary):
        run = copy_of("checkpoint.pt", canary.parent.name)
        (run / name).unlink(missing_ok=True)
        if link:
            (run / name).symlink_to(link)
        else:
            (run / name).write_text(content)
        load = {"summary.json": load_summary}
        return lambda: load.get(name, load_config)(run)

    return make


def deep_best(folder, canary):
    (folder / "best.json").write_text(DEEP_JSON)
    return lambda: load_best(folder)


ZERO_BLOCK = gzip.compress(bytes(1 << 25), 1)
DEEP_JSON = "[" * 100_000 + "]" * 100_000
HOSTILE = {
    "checkpoint: a pickle": raw(lambda folder, canary: seal(pickle.dumps(Payload(canary)) + b"..")),
    "checkpoint: a call of os.system": raw(global_call),
    "checkpoint: TorchScript": raw(script_module),
    "CIFAR: an archive with a payload": wrong_archive,
    "CIFAR: a batch with a payload": payload_batch,
    "CIFAR: a payload in a right archive": payload_in_a_right_archive,
    "CIFAR: ../ in a name": archive_with(member("../../canary", content=b"x")),
    "CIFAR: a link out": archive_with(member(f"{INSIDE}/more", tarfile.SYMTYPE, "CANARY")),
    "idx: a gzip bomb": idx_file(16 * ZERO_BLOCK),
    "idx: an absurd header": idx_file(
        gzip.compress(struct.pack(">BBBB3i", 0, 0, 8, 3, *[2**31 - 1] * 3))
    ),
    "image: 100,000 x 100,000": image(
        "0.png", lambda path, _: path.write_bytes(png(100_000, 100_000))
    ),
    "image: 13,000 x 13,000 of zeros": image(
        "0.png", lambda path, _: path.write_bytes(png(13_000, 13_000, bytes(13_000 * 39_001)))
    ),
    "image: PostScript": image("0.png", postscript),
    "image: a pipe": image("0.png", lambda path, _: os.mkfifo(path)),
    "image: a device": image("0.png", lambda path, _: path.symlink_to("/dev/zero")),
    "image: a class whose name is no UTF-8": strange_class,
    "config.json: deep lists": run_file("config.json", '{"seed": ' + DEEP_JSON + "}"),
    "config.json: a device": run_file("config.json", link="/dev/zero"),
    "summary.json: a device": run_file("summary.json", link="/dev/zero"),
    "summary.json: deep lists": run_file("summary.json", '{"a": ' + DEEP_JSON + "}"),
    "best.json: deep lists": deep_best,
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_file_is_refused(tmp_path, what):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    canary = tmp_path / "canary"
    check_refused(HOSTILE[what](folder, canary), canary)
    assert not list(tmp_path.rglob("canary"))


def test_the_payload_is_a_live_one(tmp_path):
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.exists()


def test_ghostscript_would_have_been_run(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "a").mkdir()

    def action():
        quiet()
        postscript(tmp_path / "a" / "0.png", canary)
        with contextlib.suppress(Exception), Image.open(tmp_path / "a" / "0.png") as opened:
            opened.load()
        return canary.exists()

    assert forked(action).detail is True


def test_written_files_do_not_follow_links(tmp_path):
    # A run folder from elsewhere in which names are links to files of ours.
    ours = tmp_path / "ours"
    ours.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    for name, write in (
        ("summary.json", lambda path: files.write_json(path, {})),
        ("metrics.csv", lambda path: files.write_csv(path, [{"a": 1}])),
        ("a.npz", lambda path: files.write_arrays(path, a=np.zeros(3))),
    ):
        (folder / name).symlink_to(ours)
        write(folder / name)
        assert not (folder / name).is_symlink()
    assert ours.read_text() == "precious"
