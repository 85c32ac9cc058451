"""Damaged and hostile files: refused in one line, or provably harmless; never a traceback.

`FAULT_COUNT` mutated files in all, each from a seed of its own. Harmless means that what was loaded
equals the original. Three kinds of file carry nothing by which every change could be told:

- JSON that people may edit (config.json, best.json, summary.json): another value is harmless if it
  is of the setting's type and passes the config's own checks. Nothing of another type may pass.
- JPEG, BMP, GIF, TIFF and WebP have no checksum of their pixels: an image is harmless if it is
  refused or decoded to its right shape. PNG has one, so a PNG must come out equal or be refused.
- a table of finished trainings that lost whole rows at its end is what an interrupted study leaves.

No script reads metrics.csv or encoder.safetensors: they are written anew from the checkpoint, and
that is what is tested.
"""

import contextlib
import csv
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import math
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
import types
import typing
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_tools import COUNT, REPOSITORY, digest, forked, mutate, mutate_json, rows_of
from PIL import Image
from safetensors.torch import load_file
from torchvision.datasets import CIFAR10

import functions
import label_study
import pretraining
import rnn
import rnn_hyperparameter_tune as tune
import simclr
from functions import UserError

pytestmark = pytest.mark.slow
SECONDS = 2.0
MEMORY = 400 << 20  # how much more a process may take for a hostile file
IDX_SHAPE = (6, 28, 28)


# originals of each kind of file


def quiet():
    """In a child: one thread, no output, nothing that only costs time."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = io.StringIO()
    functions._git_commit = lambda: None
    for name in ("plot_loss", "plot_label_efficiency"):
        setattr(functions, name, lambda *_, **__: None)
    tune.draw = lambda *_: None


def settings(folder):
    return simclr.Config(
        dataset="digits",
        encoder="small",
        epochs=2,
        batch_size=256,
        projection_hidden=16,
        stages="pretrain",
        knn_every=0,
        labels="4,8",
        label_seeds=2,
        label_steps=2,
        device="cpu",
        output_dir=str(folder),
        name="run",
    )


def make_run(folder):
    """A run that was killed after the first of two epochs."""

    def action():
        quiet()
        replace, calls = os.replace, []

        def dying(*arguments):
            replace(*arguments)
            calls.append(1)
            if len(calls) == 3:  # config.json, checkpoint.pt, metrics.csv
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = dying
        simclr.main(settings(folder))

    assert forked(action).detail == signal.SIGKILL
    run = folder / "simclr" / "run"
    functions.save_weights(run / "encoder.safetensors", torch.nn.Linear(9, 9), {})
    functions.write_json(run / "summary.json", SUMMARY)
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
    functions.write_json(folder / "best.json", BEST)
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


def sweep_config(folder):
    return tune.Config(
        dataset="digits",
        cell="rnn",
        trials=8,
        max_epochs=2,
        device="cpu",
        output_dir=str(folder),
        name="run",
    )


def make_study(folder):
    """A finished sweep of eight trials."""
    assert forked(lambda: fill_study(folder)).kind == "returned"
    return folder / "rnn_hyperparameter_tune" / "run"


def fill_study(folder):
    import optuna

    config = sweep_config(folder)
    with functions.open_run("rnn_hyperparameter_tune", config) as run:
        study = tune.open_study(config, run)
        draw = random.Random(0)
        kinds = {
            name: optuna.distributions.FloatDistribution(*choices, log=True)
            if isinstance(choices, tuple)
            else optuna.distributions.CategoricalDistribution(choices)
            for name, choices in tune.SPACE.items()
        }
        for number in range(8):
            params = {
                name: draw.uniform(*choices) if isinstance(choices, tuple) else draw.choice(choices)
                for name, choices in tune.SPACE.items()
            }
            trial = optuna.trial.create_trial(
                params=params,
                distributions=kinds,
                value=draw.random(),
                intermediate_values={0: 2.0 + number, 1: 1.5 + number},
            )
            study.add_trial(trial)


# how a script reads them; all of it in a child


def load_checkpoint(folder):
    model = simclr.SimCLR("small", "cifar", "nonlinear", 16, 128, 1, 8)
    optimizer = simclr.make_optimizer(model, settings(folder))
    epoch, history = functions.restore(folder / "checkpoint.pt", "simclr", model, optimizer)
    return digest([epoch, history, model.state_dict(), optimizer.state_dict()])


def load_config(folder):
    config = functions.parse_config(simclr.Config, ["--resume", str(folder)], "")
    with functions.open_run("simclr", config, simclr.EVALUATION):
        return {k: v for k, v in dataclasses.asdict(config).items() if k != "resume"}


def load_best(folder):
    config = rnn.read_best(str(folder / "best.json"))
    return {k: v for k, v in dataclasses.asdict(config).items() if k != "config"}


def load_summary(folder):
    summary = functions.update_summary(folder, {"final_loss": 1.25})
    pretraining.report(summary, folder)
    return summary


def load_resumed(folder):
    simclr.main(functions.parse_config(simclr.Config, ["--resume", str(folder)], ""))
    encoder = load_file(folder / "encoder.safetensors")  # the order inside the file is random
    return [rows_of(folder / "metrics.csv"), digest(dict(sorted(encoder.items())))]


class Trainer:
    """In place of `label_study.Study`: predicts untrained, and says what it was asked for."""

    asked: typing.ClassVar[list] = []

    def __init__(self, *_):
        pass

    def predict(self, method, chosen, seed):
        key = (str(len(chosen)), str(seed), "2", method)
        Trainer.asked.append(key)
        return torch.tensor([len(chosen) + 3 * seed + len(method), 1, 2, 3] * 2) % 4


def study_rows(folder):
    with (folder / "label_efficiency.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def load_labels(folder):
    """The rows that were there; those that had to be trained again at the end are `missing`."""
    label_study.Study = Trainer
    Trainer.asked = []
    split = functions.Split(torch.zeros(40, 1, 8, 8, dtype=torch.uint8), torch.arange(40) % 4)
    test = functions.Split(split.images[:8], split.labels[:8])
    data = functions.ImageData("tiny", tuple("abcd"), split, test)
    model = types.SimpleNamespace(encoder=None)
    label_study.study_stage(model, data, settings(folder), folder, None)
    rows = study_rows(folder)
    keys = [(row["labels"], row["seed"], row["steps"], row["method"]) for row in rows]
    missing = [key for key in keys if key in Trainer.asked]
    numbers = ("accuracy", "macro_f1")  # 0.70 is 0.7
    return {
        "rows": [
            [*key, *(float(row[name]) for name in numbers)]
            for key, row in zip(keys, rows, strict=True)
        ],
        "kept in order": keys[len(keys) - len(missing) :] == missing,
    }


def make_labels(folder):
    def action():
        quiet()
        load_labels(folder)

    assert forked(action).kind == "returned"
    return folder


def load_data(data):
    parts = [data.name, list(data.classes), data.train.images, data.train.labels]
    parts += [data.test.images, data.test.labels] if data.test else []
    return digest(parts)


def load_cifar(folder):
    return load_data(functions.load_images("cifar10", folder))


def load_idx(folder):
    return digest(torch.from_numpy(functions._read_idx(folder / "images.gz", IDX_SHAPE)))


def load_folder(folder):
    return load_data(functions.load_images(str(folder / "in"), folder / "data", 8))


def load_shape(folder):
    return list(functions.load_images(str(folder / "in"), folder / "data", 8).train.images.shape)


def load_study(folder):
    def never(*_):
        raise Repeated

    tune.run_trials = never
    config = functions.parse_config(tune.Config, ["--resume", str(folder)], "")
    try:
        tune.main(config)
    except Repeated:
        return "finished trials are lost and would be run again"
    return [(folder / name).read_text() for name in ("trials.csv", "best.json")]


class Repeated(BaseException):
    """A sweep that was finished would run trials."""


# another value that is as good as the original's


def typed(config_class, saved):
    """The `Config` of these JSON values, or None when one is of a wrong type or out of range."""
    values = {}
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if field.name not in saved:
            return None
        value, hint = saved[field.name], hints[field.name]
        if value is None and field.default is None:
            continue
        if isinstance(hint, types.UnionType):
            hint = typing.get_args(hint)[0]
        if typing.get_origin(hint) is typing.Literal:
            good = value in typing.get_args(hint) and isinstance(value, str)
        elif typing.get_origin(hint) is tuple:
            good = isinstance(value, list) and all(type(part) in (int, float) for part in value)
            good = good and len(value) == len(typing.get_args(hint))
            value = tuple(value) if good else value
        else:
            good = type(value) is hint or (hint is float and type(value) is int)
        if not good:
            return None
        values[field.name] = value
    with contextlib.suppress(UserError):
        return config_class(**values)
    return None


def fine_config(folder, content):
    record = json.loads((folder / "config.json").read_text())
    config = typed(simclr.Config, record)
    if config is None:
        return False
    wanted = {k: v for k, v in dataclasses.asdict(config).items() if k != "resume"}
    return json.loads(json.dumps(wanted)) == json.loads(json.dumps(content))


def fine_best(folder, content):
    saved = json.loads((folder / "best.json").read_text())
    for name, original in BEST.items():
        field = "cells" if name == "cell" else name
        if field not in ("cells", *rnn.Config.__dataclass_fields__) or name in (
            *("epochs", "train_fraction", "trial", "trials", "validation_loss"),
        ):
            continue
        value = saved.get(name)
        right = type(value) is type(original) or (
            isinstance(original, float) and type(value) is int
        )
        if not right or content[field] != value:
            return False
    return saved.get("augmentation") in ("none", "standard", "original")


def fine_summary(folder, content):
    def numbers(value):
        if isinstance(value, dict):
            return all(map(numbers, value.values()))
        return type(value) in (int, float) and math.isfinite(value)

    shown = {key: value for key, value in content.items() if key in SUMMARY}
    return all(
        numbers(value) and isinstance(value, dict) == isinstance(SUMMARY[key], dict)
        for key, value in shown.items()
    )


def fine_labels(folder, content):
    return content["kept in order"] and content["rows"] == original("label_efficiency.csv")["rows"]


def equal(folder, content):
    return False


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file: what share of `FAULT_COUNT` it has, how it is made, damaged and read."""

    share: int
    make: typing.Callable
    files: str  # a pattern of the files to damage
    load: typing.Callable
    fine: typing.Callable = equal
    mutate: typing.Callable = mutate


KINDS = {
    "checkpoint.pt": Kind(150, make_run, "checkpoint.pt", load_checkpoint),
    "config.json": Kind(130, make_run, "config.json", load_config, fine_config, mutate_json),
    "best.json": Kind(100, make_best, "best.json", load_best, fine_best, mutate_json),
    "summary.json": Kind(40, make_run, "summary.json", load_summary, fine_summary, mutate_json),
    "metrics.csv": Kind(20, make_run, "metrics.csv", load_resumed),
    "encoder.safetensors": Kind(20, make_run, "encoder.safetensors", load_resumed),
    "label_efficiency.csv": Kind(
        100, make_labels, "label_efficiency.csv", load_labels, fine_labels
    ),
    "CIFAR batches": Kind(70, make_cifar_batches, "*/*batch*", load_cifar),
    "CIFAR archive": Kind(40, make_cifar_archive, "*.gz", load_cifar),
    "idx": Kind(100, make_idx, "*.gz", load_idx),
    "PNG": Kind(70, lambda folder: make_images(folder, "png"), "in/*.png", load_folder),
    "other images": Kind(
        70,
        lambda folder: make_images(folder, "jpg", "bmp", "gif", "webp", "tif", "ppm"),
        "in/*",
        load_shape,
    ),
    "image cache": Kind(50, make_cache, "data/cache/*", load_folder),
    "study.db": Kind(40, make_study, "study.db", load_study),
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
                good = content == expected or kind.fine(folder, content)
                result, message = ("harmless", "") if good else ("accepted", str(content)[:300])
            except UserError as error:
                result, message = "refused", str(error)
                if len(message.splitlines()) != 1:
                    result = "several lines"
                elif str(folder) not in message:
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
def test_mutated_file_never_makes_a_traceback(name):
    assert not those(name, "traceback")


@every_kind
def test_mutated_file_is_refused_in_one_line_that_names_it(name):
    assert not those(name, "several lines", "names no file")


@every_kind
def test_mutated_file_is_never_silently_accepted(name):
    assert not those(name, "accepted")


@every_kind
def test_mutated_file_takes_no_time(name):
    slow = [case for case in outcomes(name) if case[3] > SECONDS]
    assert not slow


def test_the_mutations_are_real_ones():
    kinds = ("checkpoint.pt", "config.json", "idx", "CIFAR batches")
    refused = [case for name in kinds for case in outcomes(name) if case[1] == "refused"]
    assert len(refused) > len([case for name in kinds for case in outcomes(name)]) / 3


# a sample on the real command line


def command(script, *words, cwd):
    return subprocess.run(
        [sys.executable, str(REPOSITORY / f"{script}.py"), *map(str, words)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def words_for(name, folder):
    match name:
        case "best.json":
            return ["rnn", "--dataset", "digits", "--config", folder / "best.json"]
        case "study.db":
            return ["rnn_hyperparameter_tune", "--resume", folder]
        case "PNG" | "other images":
            return ["simclr", "--dataset", folder / "in", "--data-dir", folder / "data"]
        case "CIFAR batches" | "CIFAR archive":
            return ["simclr", "--dataset", "cifar10", "--data-dir", folder]
        case "idx":
            raw = folder / "FashionMNIST" / "raw"
            raw.mkdir(parents=True)
            (folder / "images.gz").rename(raw / "train-images-idx3-ubyte.gz")
            return ["simclr", "--dataset", "fashion-mnist", "--data-dir", folder]
        case _:
            return ["simclr", "--resume", folder]


COMMANDS = [
    *("checkpoint.pt", "config.json", "best.json", "study.db", "PNG", "idx"),
    *("CIFAR batches", "CIFAR archive", "other images"),
]


@pytest.mark.parametrize("number", range(max(2, round(20 * COUNT / 1000))))
def test_mutated_file_on_the_command_line(tmp_path, number):
    name = COMMANDS[number % len(COMMANDS)]
    # The next one that the loader itself refuses.
    for attempt in range(1000, 1200):
        folder, _, what = damage(name, 1000 * number + attempt)
        outcome = forked(lambda folder=folder: (prepare(), KINDS[name].load(folder)))
        if outcome.kind == "UserError":
            break
    shutil.rmtree(folder)
    folder, _, what = damage(name, 1000 * number + attempt)
    done = command(*words_for(name, folder), cwd=tmp_path)
    assert "Traceback" not in done.stderr, what
    assert done.returncode == 2, what
    (line,) = done.stderr.splitlines()
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


def state_of(folder):
    return functions.load_checkpoint(folder / "checkpoint.pt", "simclr")


def forge(folder, change, **options):
    """A sealed checkpoint in which `change` altered the state; what resumes it."""
    state = state_of(folder)
    state = change(state) or state
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    (folder / "checkpoint.pt").write_bytes(seal(buffer.getvalue() + b".." * bool(options)))
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
    "a payload in the optimizer": lambda canary: put(
        "optimizer", "state", 0, value=Payload(canary)
    ),
    "sparse weights": lambda canary: put(*WEIGHT, value=sparse),
    "sparse weights out of range": lambda canary: put(*WEIGHT, value=bad_sparse),
    "sparse momentum": lambda canary: put(*MOMENTUM, value=sparse),
    "quantized weights": lambda canary: put(*WEIGHT, value=quantized),
    "quantized momentum": lambda canary: put(*MOMENTUM, value=quantized),
    "weights on no device": lambda canary: put(*WEIGHT, value=lambda t: t.to("meta")),
    "momentum on no device": lambda canary: put(*MOMENTUM, value=lambda t: t.to("meta")),
    "weights of an absurd size": lambda canary: put(*WEIGHT, value=huge),
    "momentum of an absurd size": lambda canary: put(*MOMENTUM, value=huge),
    "momentum of another shape": lambda canary: put(*MOMENTUM, value=torch.zeros(2, 2)),
    "momentum that is text": lambda canary: put(*MOMENTUM, value="much"),
    "complex weights": lambda canary: put(*WEIGHT, value=lambda t: t.to(torch.complex64)),
    "weights that are not finite": lambda canary: put(*WEIGHT, value=lambda t: t * math.nan),
    "momentum that is not finite": lambda canary: put(*MOMENTUM, value=lambda t: t * math.nan),
    "a huge epoch": lambda canary: put("epoch", value=10**30),
    "an epoch below 0": lambda canary: put("epoch", value=-1),
    "an epoch that is text": lambda canary: put("epoch", value="1"),
    "an epoch that is a tensor": lambda canary: put("epoch", value=torch.ones(3)),
    "no history": lambda canary: put("history", value=[]),
    "a history that is text": lambda canary: put("history", value="loss"),
    "a history of numbers": lambda canary: put("history", value=[1]),
    "a history of other rows": lambda canary: put("history", value=[{"epoch": 1}]),
    "a history of text": lambda canary: put("history", 0, "seconds", value="long"),
    "a history that is too long": lambda canary: put("history", value=lambda rows: rows * 9),
    "another run's settings": lambda canary: put("config", "seed", value=99),
    "settings that are text": lambda canary: put("config", value="none"),
    "a learning rate that is text": lambda canary: put(
        "optimizer", "param_groups", 0, "momentum", value="fast"
    ),
    "nested lists": lambda canary: put("history", value=[nested(200)]),
}


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


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
    assert outcome.kind == "returned", outcome
    assert outcome.detail == original("metrics.csv")


def raw(content):
    def make(folder, canary):
        run = copy_of("checkpoint.pt", canary.parent.name)
        (run / "checkpoint.pt").write_bytes(content(run, canary))
        return lambda: load_resumed(run)

    return make


def zipped(members, kind=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return seal(buffer.getvalue())


def bomb(folder, canary):
    """A gigabyte of zeros in a megabyte, as one of the weights."""
    state = {**state_of(folder), "model": {"weight": torch.zeros(1)}}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    weight = next(name for name in members if name.endswith("data/0"))
    members[weight] = bytes(1 << 30)
    return zipped(members, zipfile.ZIP_DEFLATED)


def global_call(folder, canary):
    """A pickle that calls os.system, spelled out by hand, in a zip of PyTorch's layout."""
    code = f"cposix\nsystem\n(Vmkdir {canary}\ntR.".encode()
    return zipped({"archive/data.pkl": code, "archive/version": b"3\n"})


def old_format(folder, canary):
    buffer = io.BytesIO()
    torch.save(Payload(canary), buffer, _use_new_zipfile_serialization=False)
    return seal(buffer.getvalue() + b"..")


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


def wide_gif(path, canary):
    path.write_bytes(
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6) + b"\x2c"
        + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x44\x01\x00\x3b"
    )  # fmt: skip


def deep_tiff(path, canary):
    """A TIFF that announces a strip of 4 GB."""
    tags = [(256, 60000), (257, 60000), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1)]
    tags += [(278, 60000), (279, 3_600_000_000)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4))


def idx_file(content):
    def make(folder, canary):
        (folder / "images.gz").write_bytes(content)
        return lambda: load_idx(folder)

    return make


def labels_out_of_range(folder, canary):
    """FashionMNIST whose files are whole, but whose labels are no classes."""
    raw_folder = folder / "FashionMNIST" / "raw"
    raw_folder.mkdir(parents=True)
    for prefix, count in (("train", 60000), ("t10k", 10000)):
        pixels = np.zeros((count, 28, 28), np.uint8)
        labels = np.full(count, 200, np.uint8)
        for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            path = raw_folder / f"{prefix}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(idx(array), 1))
    return lambda: load_data(functions.load_images("fashion-mnist", folder))


def run_file(name, content=None, link=None):
    """A run folder from elsewhere, one file of which is hostile."""

    def make(folder, canary):
        run = copy_of("checkpoint.pt", canary.parent.name)
        (run / name).unlink(missing_ok=True)
        if link:
            (run / name).symlink_to(link)
        else:
            (run / name).write_text(content)
        load = {"summary.json": load_summary, "label_efficiency.csv": load_labels}
        return lambda: load.get(name, load_config)(run)

    return make


def config_with(**changes):
    def make(folder, canary):
        run = copy_of("checkpoint.pt", canary.parent.name)
        record = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(record | changes))
        return lambda: load_config(run)

    return make


def best_with(**changes):
    def make(folder, canary):
        (folder / "best.json").write_text(json.dumps(BEST | changes))

        def action():
            config = rnn.read_best(str(folder / "best.json"))
            rnn.make_model(config, config.cells, functions.load_images("digits"))

        return action

    return make


def deep_best(folder, canary):
    (folder / "best.json").write_text(DEEP_JSON)
    return lambda: load_best(folder)


ZERO_BLOCK = gzip.compress(bytes(1 << 25), 1)
DEEP_JSON = "[" * 100_000 + "]" * 100_000
HOSTILE = {
    "checkpoint: a pickle": raw(lambda folder, canary: seal(pickle.dumps(Payload(canary)) + b"..")),
    "checkpoint: PyTorch's old format": raw(old_format),
    "checkpoint: a call of os.system": raw(global_call),
    "checkpoint: TorchScript": raw(script_module),
    "checkpoint: a decompression bomb": raw(bomb),
    "checkpoint: names that lead out": raw(
        lambda folder, canary: zipped({"../../canary": b"x", str(canary): b"x"})
    ),
    "checkpoint: an absurd pickle": raw(
        lambda folder, canary: zipped(
            {"archive/data.pkl": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "archive/version": b"3"}
        )
    ),
    "CIFAR: an archive with a payload": wrong_archive,
    "CIFAR: a batch with a payload": payload_batch,
    "CIFAR: a payload in a right archive": payload_in_a_right_archive,
    "CIFAR: ../ in a name": archive_with(member("../../canary", content=b"x")),
    "CIFAR: a link out": archive_with(member(f"{INSIDE}/more", tarfile.SYMTYPE, "CANARY")),
    "CIFAR: a hard link out": archive_with(member(f"{INSIDE}/x", tarfile.LNKTYPE, "../../canary")),
    "CIFAR: a link and a file through it": archive_with(
        member("out", tarfile.SYMTYPE, "../.."), member("out/canary", content=b"x")
    ),
    "CIFAR: a device": archive_with(member(f"{INSIDE}/null", tarfile.CHRTYPE)),
    "CIFAR: a pipe": archive_with(member(f"{INSIDE}/pipe", tarfile.FIFOTYPE)),
    "idx: a gzip bomb": idx_file(16 * ZERO_BLOCK),
    "idx: an absurd header": idx_file(
        gzip.compress(struct.pack(">BBBB3i", 0, 0, 8, 3, *[2**31 - 1] * 3))
    ),
    "idx: 255 dimensions": idx_file(gzip.compress(b"\0\0\x08\xff" + b"\x7f\xff\xff\xff" * 255)),
    "FashionMNIST: labels that are no classes": labels_out_of_range,
    "image: 100,000 x 100,000": image(
        "0.png", lambda path, _: path.write_bytes(png(100_000, 100_000))
    ),
    "image: 2^31 x 1": image("0.png", lambda path, _: path.write_bytes(png(2**31 - 1, 1))),
    "image: 0 x 0": image("0.png", lambda path, _: path.write_bytes(png(0, 0))),
    "image: 13,000 x 13,000 of zeros": image(
        "0.png", lambda path, _: path.write_bytes(png(13_000, 13_000, bytes(13_000 * 39_001)))
    ),
    "image: a wide GIF": image("0.gif", wide_gif),
    "image: a TIFF of 60,000 x 60,000": image("0.tif", deep_tiff),
    "image: PostScript": image("0.png", postscript),
    "image: a pipe": image("0.png", lambda path, _: os.mkfifo(path)),
    "image: a device": image("0.png", lambda path, _: path.symlink_to("/dev/zero")),
    "config.json: deep lists": run_file("config.json", '{"seed": ' + DEEP_JSON + "}"),
    "config.json: a device": run_file("config.json", link="/dev/zero"),
    "config.json: a flag in a list": config_with(jitter=[0.4, 0.4, 0.4, 0.1, "--epochs", 99]),
    "config.json: --help in a list": config_with(jitter=["--help"]),
    "config.json: an empty list for a switch": config_with(pixel_baseline=[]),
    "config.json: a list for a number": config_with(epochs=[2]),
    "config.json: text for a number": config_with(epochs="2"),
    "config.json: a number for a text": config_with(dataset=5),
    "config.json: no list of resumptions": config_with(resumed=5),
    "config.json: an absurd size": config_with(projection_hidden=10**30),
    "summary.json: a device": run_file("summary.json", link="/dev/zero"),
    "summary.json: deep lists": run_file("summary.json", '{"a": ' + DEEP_JSON + "}"),
    "summary.json: text for seconds": run_file("summary.json", '{"probe_seconds": "long"}'),
    "label_efficiency.csv: a device": run_file("label_efficiency.csv", link="/dev/zero"),
    "best.json: deep lists": deep_best,
    "best.json: an absurd size": best_with(hidden_size=10**30),
    "best.json: a huge size": best_with(hidden_size=10**7, num_layers=5),
    "best.json: a million layers": best_with(num_layers=10**6),
    "best.json: no finite rate": best_with(learning_rate=math.inf),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_file_is_refused(tmp_path, what):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    canary = tmp_path / "canary"
    check_refused(HOSTILE[what](folder, canary), canary)
    assert not list(tmp_path.rglob("canary"))


def test_absurd_header_of_safetensors_is_refused_by_its_reader(tmp_path):
    # No script reads such a file; people do, with this library.
    from safetensors import SafetensorError

    path = tmp_path / "encoder.safetensors"
    for length in (2**63, 2**40, 100_000_001, 1000):
        path.write_bytes(struct.pack("<Q", length) + b'{"a":{"dtype":"F32"}}')
        with pytest.raises(SafetensorError):
            load_file(path)


@pytest.mark.parametrize("name", ["payload", "global"])
def test_the_payloads_are_live_ones(tmp_path, name):
    canary = tmp_path / "canary"
    content = pickle.dumps(Payload(canary))
    if name == "global":
        content = f"cposix\nsystem\n(Vmkdir {canary}\ntR.".encode()
    pickle.loads(content)
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
        ("summary.json", lambda path: functions.write_json(path, {})),
        ("metrics.csv", lambda path: functions.write_csv(path, [{"a": 1}])),
        ("a.npz", lambda path: functions.write_arrays(path, a=np.zeros(3))),
    ):
        (folder / name).symlink_to(ours)
        write(folder / name)
        assert not (folder / name).is_symlink()
    assert ours.read_text() == "precious"
