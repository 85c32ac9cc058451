import contextlib
import csv
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import typing
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import functions
import simclr
from functions import (
    Diverged,
    UserError,
    load_checkpoint,
    load_config,
    open_run,
    parse_config,
    restore,
    run_script,
    save_checkpoint,
    save_weights,
    update_summary,
    write_arrays,
    write_csv,
    write_json,
)
from simclr import Config

REPOSITORY = Path(functions.__file__).resolve().parent
HINTS = typing.get_type_hints(Config)
FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def flag(name):
    return "--" + name.replace("_", "-")


def other_value(name):
    """A valid value that is not the default."""
    default, hint = FIELDS[name].default, HINTS[name]
    if typing.get_origin(hint) is Literal:
        return next(choice for choice in typing.get_args(hint) if choice != default)
    if isinstance(default, tuple):
        return tuple(value / 2 for value in default)
    if isinstance(default, bool):
        return not default
    if name == "width":
        return 24
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return default / 2 or 0.5
    return {"stages": "probe,embed", "labels": "7,all", "view_size": "16,24"}.get(
        name, "another one"
    )


def arguments_for(name, value):
    if isinstance(value, bool):
        return [flag(name) if value else flag("no_" + name)]
    return [flag(name), *map(str, value if isinstance(value, tuple) else (value,))]


# the command line


def test_no_flags_are_the_defaults():
    assert parse_config(Config, [], "") == Config()


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "resume"])
def test_every_setting_is_a_flag_that_arrives(name):
    value = other_value(name)
    config = parse_config(Config, arguments_for(name, value), "")
    assert config == dataclasses.replace(Config(), **{name: value})
    assert type(getattr(config, name)) is type(value)


def test_flags_beside_resume_meet_the_saved_settings(tmp_path):
    config = dataclasses.replace(Config(), batch_size=384, output_dir=str(tmp_path), name="run")
    with open_run("simclr", config) as folder:
        pass
    resumed = parse_config(Config, ["--resume", str(folder), "--devices", "3"], "")
    assert (resumed.batch_size, resumed.devices) == (384, 3)  # 512 would not divide


def test_negated_and_equal_sign_flags():
    assert (
        parse_config(Config, ["--pixel-baseline", "--no-pixel-baseline"], "").pixel_baseline
        is False
    )
    assert parse_config(Config, ["--batch-size=64"], "").batch_size == 64


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--bogus 3", ["--bogus", "--help"]),
        ("stray", ["stray"]),
        ("--epoch 3", ["--epoch"]),  # no abbreviations: a later flag would change their meaning
        ("--batch_size 3", ["--batch_size"]),
        ("--epochs", ["--epochs"]),
        ("--epochs many", ["--epochs", "many"]),
        ("--epochs 1.5", ["--epochs", "1.5"]),
        ("--temperature warm", ["--temperature", "warm"]),
        ("--device gpu", ["--device", "gpu", "cuda"]),
        ("--encoder vgg", ["--encoder", "vgg", "resnet18"]),
        ("--pixel-baseline yes", ["yes"]),
        ("--jitter 0.4", ["--jitter", "4"]),
        ("--jitter 0.4 0.4 0.4 0.1 0.1", ["0.1"]),
        ("--jitter 0.4 0.4 much 0.1", ["--jitter", "much"]),
        ("--epochs 0", ["--epochs", "0"]),
        ("--epochs -5", ["--epochs", "-5"]),
        ("--batch-size 1", ["--batch-size", "1"]),
        ("--learning-rate 0", ["--learning-rate", "0"]),
        ("--learning-rate nan", ["--learning-rate", "nan"]),
        ("--learning-rate inf", ["--learning-rate", "inf"]),
        ("--weight-decay -0.1", ["--weight-decay", "-0.1"]),
        ("--weight-decay nan", ["--weight-decay", "nan"]),
        ("--seed -1", ["--seed", "-1"]),
        ("--seed 18446744073709551616", ["--seed", "18446744073709551616"]),
        ("--image-size 7", ["--image-size", "7"]),
        ("--image-size 1025", ["--image-size", "1025"]),
        ("--name a/b", ["--name", "a/b"]),
        ("--name ..", ["--name", ".."]),
        ("--name ''", ["--name"]),
        ("--temperature 0", ["--temperature", "0"]),
        ("--temperature nan", ["--temperature", "nan"]),
        ("--temperature inf", ["--temperature", "inf"]),
        ("--stages pretrain,dance", ["--stages", "dance", "embed"]),
        ("--stages ''", ["--stages"]),
        ("--crop-scale-min 0", ["--crop-scale-min"]),
        ("--crop-scale-min 1.1", ["--crop-scale-min"]),
        ("--crop-scale-min nan", ["--crop-scale-min"]),
        ("--jitter -0.1 0.4 0.4 0.1", ["--jitter"]),
        ("--jitter 0.4 0.4 0.4 0.6", ["--jitter"]),
        ("--jitter 0.4 nan 0.4 0.1", ["--jitter"]),
        ("--jitter 0.4 inf 0.4 0.1", ["--jitter"]),
        ("--flip-probability 1.1", ["--flip-probability", "1.1"]),
        ("--jitter-probability -0.1", ["--jitter-probability", "-0.1"]),
        ("--grayscale-probability nan", ["--grayscale-probability", "nan"]),
        ("--blur-probability 2", ["--blur-probability", "2"]),
        ("--projection-hidden 0", ["--projection-hidden"]),
        ("--projection-size 0", ["--projection-size"]),
        ("--probe-epochs 0", ["--probe-epochs"]),
        ("--finetune-epochs 0", ["--finetune-epochs"]),
        ("--warmup-epochs -1", ["--warmup-epochs"]),
        ("--knn-every -1", ["--knn-every"]),
        ("--few-labels -1", ["--few-labels"]),
    ],
)
def test_bad_flags_and_values_are_named_in_one_line(user_error, arguments, words):
    with user_error(*words):
        parse_config(Config, shlex.split(arguments), "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch-size", "2"],
        ["--epochs", "1"],
        ["--image-size", "8"],
        ["--image-size", "1024"],
        ["--crop-scale-min", "1"],
        ["--jitter", "0", "0", "0", "0.5"],
        ["--flip-probability", "0"],
        ["--flip-probability", "1"],
        ["--knn-every", "0"],
        ["--few-labels", "0"],
        ["--warmup-epochs", "0"],
        ["--weight-decay", "0"],
        ["--stages", "pretrain, embed"],
        ["--seed", str(2**32 - 1)],
    ],
    ids=" ".join,
)
def test_the_ends_of_the_ranges_are_allowed(arguments):
    parse_config(Config, arguments, "")


def test_largest_seed_can_be_used():
    with torch.random.fork_rng():
        functions.seed_everything(2**32 - 1)
        functions.epoch_generator(2**32 - 1, 0)
    np.random.seed(0)


def test_help_lists_every_setting_in_its_group(capsys):
    with pytest.raises(SystemExit) as left:
        parse_config(Config, ["--help"], "What it does: 85.6 % of it.")
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "What it does: 85.6 % of it." in shown
    sections = dict(re.findall(r"^(\w[\w ]*):\n((?:  .*\n)+)", shown, re.MULTILINE))
    groups = {field.metadata["group"] for field in FIELDS.values()}
    assert groups <= sections.keys()
    for name, field in FIELDS.items():
        section = sections[field.metadata["group"]]
        assert re.search(rf"^ {{1,4}}{flag(name)}\b", section, re.MULTILINE)
        assert "".join(field.metadata["help"].split()) in "".join(section.split())
        if field.default is not None:
            default = field.default if isinstance(field.default, tuple) else [field.default]
            assert f"[{''.join(map(str, default))}]" in "".join(section.split())


# the run folder


@pytest.fixture
def started(tmp_path):
    """The folder of a run with some settings other than the defaults, and its config."""
    config = Config(
        dataset="digits", output_dir=str(tmp_path), name="run", device="cpu", epochs=7, seed=3
    )
    with open_run("simclr", config) as folder:
        return folder, config


def resume(folder, *arguments):
    return parse_config(Config, ["--resume", str(folder), *arguments], "")


def test_folder_records_settings_and_circumstances(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["simclr.py", "--name", "a b", "--epochs", "3"])
    config = Config(dataset="digits", output_dir=str(tmp_path / "new" / "er"), name="a b", epochs=3)
    with open_run("simclr", config) as folder:
        assert folder == tmp_path / "new" / "er" / "simclr" / "a b"
        record = json.loads((folder / "config.json").read_text())
    for name, value in dataclasses.asdict(config).items():
        assert record[name] == (list(value) if isinstance(value, tuple) else value)
    assert record["script"] == "simclr"
    assert shlex.split(record["command"])[-5:] == sys.argv
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["hardware"]
    assert record["threads"] == torch.get_num_threads()
    head = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False)
    if commit.returncode == 0:
        assert record["commit"].removesuffix("-dirty") == commit.stdout.strip()
    else:
        assert record["commit"] is None


def test_existing_folder_is_refused_and_left_alone(started, user_error):
    folder, config = started
    before = (folder / "config.json").read_bytes()
    with user_error(folder, "--name", "--resume"), open_run("simclr", config):
        pass
    assert (folder / "config.json").read_bytes() == before


@pytest.mark.parametrize("below", ["file", "file/results", "results"])
def test_output_folder_that_cannot_be_written_is_named(tmp_path, user_error, below):
    (tmp_path / "file").write_text("")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "simclr").write_text("")
    config = Config(output_dir=str(tmp_path / below), device="cpu")
    with user_error(tmp_path / below), open_run("simclr", config):
        pass


def test_runs_without_a_name_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "20250101-120000")
    config = Config(output_dir=str(tmp_path), device="cpu", seed=5)
    folders = []
    for _ in range(3):
        with open_run("simclr", config) as folder:
            folders.append(folder)
    assert len(set(folders)) == 3
    assert all((folder / "config.json").is_file() for folder in folders)
    assert all("seed5" in folder.name for folder in folders)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, SystemExit, UserError])
@pytest.mark.parametrize("name", ["run", "a run"])
def test_error_says_how_to_go_on(tmp_path, error, name):
    config = Config(output_dir=str(tmp_path), name=name, device="cpu", epochs=7)
    with pytest.raises(error) as caught, open_run("simclr", config) as folder:
        raise error
    (note,) = caught.value.__notes__
    assert str(folder) in note
    (folder / "checkpoint.pt").touch()
    with pytest.raises(error) as caught, open_run("simclr", resume(folder)):
        raise error
    (note,) = caught.value.__notes__
    python, script, *arguments = shlex.split(note[note.index("python") :])
    assert (python, script) == ("python", "simclr.py")
    again = parse_config(Config, arguments, "")
    assert again == dataclasses.replace(config, resume=str(folder))
    with open_run("simclr", again) as reopened:
        assert reopened == folder


def test_no_error_no_note_and_the_result_of_the_block_stays(started):
    folder, _ = started
    assert [path.name for path in folder.iterdir()] == ["config.json"]


# continuing a run


def test_resume_takes_the_saved_settings(started):
    folder, config = started
    assert load_config(Config, folder) == config
    again = resume(folder)
    assert again == dataclasses.replace(config, resume=str(folder))
    before = json.loads((folder / "config.json").read_text())
    with open_run("simclr", again) as reopened:
        assert reopened == folder
    after = json.loads((folder / "config.json").read_text())
    assert len(after.pop("resumed")) == 1 + len(before.pop("resumed"))
    assert after == before


CHANGED = {
    "epochs": 8,
    "seed": 4,
    "dataset": "cifar10",
    "temperature": 0.1,
    "jitter": (0.2, 0.2, 0.2, 0.1),
    "encoder": "small",
    "precision": "float32",
}


@pytest.mark.parametrize(("name", "value"), CHANGED.items())
def test_resume_refuses_a_contradiction_and_names_both_values(started, user_error, name, value):
    folder, config = started
    values = [*arguments_for(name, getattr(config, name)), *arguments_for(name, value)]
    again = resume(folder, *arguments_for(name, value))
    with user_error(folder, *values), open_run("simclr", again):
        pass


@pytest.mark.parametrize("name", ["epochs", "seed"])
def test_resume_refuses_a_contradiction_that_is_the_default(started, user_error, name):
    folder, config = started
    default = FIELDS[name].default
    assert default != getattr(config, name)
    again = resume(folder, *arguments_for(name, default))
    with user_error(flag(name), default, getattr(config, name)), open_run("simclr", again):
        pass


def test_resume_allows_a_flag_that_repeats_the_saved_value(started):
    folder, _ = started
    with open_run("simclr", resume(folder, "--epochs", "7", "--dataset", "digits")):
        pass


FREE = ("data_dir", "download_url", "output_dir", "name", "device")


@pytest.mark.parametrize("name", [*FREE, *sorted(simclr.EVALUATION)])
def test_resume_allows_other_places_and_another_evaluation(started, name):
    folder, config = started
    value = "auto" if name == "device" else other_value(name)
    assert value != getattr(config, name)
    again = resume(folder, *arguments_for(name, value))
    assert getattr(again, name) == value
    with open_run("simclr", again, simclr.EVALUATION) as reopened:
        assert reopened == folder
    if name in simclr.EVALUATION:
        with pytest.raises(UserError), open_run("simclr", again):
            pass


def test_moved_run_is_resumed_where_it_is_now(started, tmp_path):
    folder, _ = started
    moved = folder.rename(tmp_path / "elsewhere")
    with open_run("simclr", resume(moved)) as reopened:
        assert reopened == moved
    assert not folder.exists()


def edited(**changes):
    def edit(path):
        record = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in record.items() if v != "DELETE"}))

    return edit


NO_CONFIGS = {
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "empty": lambda path: path.write_text(""),
    "truncated": lambda path: path.write_text(path.read_text()[:200]),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda path: path.write_text("[]"),
    "without a setting": edited(temperature="DELETE"),
    "text for a number": edited(epochs="seven"),
    "a fraction for a whole number": edited(epochs=7.5),
    "a bool for a number": edited(epochs=True),
    "null for a number": edited(epochs=None),
    "no such choice": edited(encoder="vgg"),
    "a list for a choice": edited(encoder=["small", "resnet18"]),
    "a list too short": edited(jitter=[0.4, 0.4, 0.4]),
    "text in a list": edited(jitter=[0.4, 0.4, 0.4, "much"]),
    "text for a bool": edited(pixel_baseline="perhaps"),
    "a dict for a bool": edited(pixel_baseline={}),
    "out of range": edited(temperature=-1),
}


@pytest.mark.parametrize("spoil", NO_CONFIGS.values(), ids=NO_CONFIGS)
def test_folder_with_a_spoiled_config_is_refused(started, user_error, spoil):
    folder, _ = started
    spoil(folder / "config.json")
    with user_error(folder):
        resume(folder)


def test_resume_of_no_folder_is_refused(tmp_path, user_error):
    for path in (tmp_path / "missing", tmp_path):
        with user_error(path, "not a run folder"):
            resume(path)


def test_resume_of_another_scripts_run_is_refused(started, user_error):
    folder, _ = started
    with user_error("simclr", "simsiam"), open_run("simsiam", resume(folder)):
        pass


# checkpoints


def make_model(seed=0, width=16):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, 4))
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def train(model, optimizer, steps=range(3)):
    for step in steps:
        batch = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


HISTORY = [
    {"epoch": 1, "loss": 1 / 3, "seconds": 0.5},
    {"epoch": 2, "loss": 0.1, "seconds": 0.25, "knn_held_out": 1e-17},
]


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with its model and optimizer."""
    model, optimizer = make_model()
    train(model, optimizer)
    path = tmp_path / "run" / "checkpoint.pt"
    path.parent.mkdir()
    save_checkpoint(path, "simclr", 2, model, optimizer, HISTORY, Config(epochs=7))
    return path, model, optimizer


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_restored_run_goes_on_as_if_never_stopped(saved):
    path, model, optimizer = saved
    model2, optimizer2 = make_model(seed=1)
    assert not equal(model.state_dict(), model2.state_dict())
    assert restore(path, "simclr", model2, optimizer2) == (2, HISTORY)
    assert equal(model.state_dict(), model2.state_dict())  # also BatchNorm's statistics
    for a, b in zip(model.parameters(), model2.parameters(), strict=True):
        momentum = optimizer.state[a]["momentum_buffer"]
        assert momentum.abs().max() > 0
        assert torch.equal(momentum, optimizer2.state[b]["momentum_buffer"])
    train(model, optimizer, range(3, 6))
    train(model2, optimizer2, range(3, 6))
    assert equal(model.state_dict(), model2.state_dict())


def test_weights_alone_can_be_restored(saved):
    path, model, _ = saved
    model2, _ = make_model(seed=1)
    assert restore(path, "simclr", model2) == (2, HISTORY)
    assert equal(model.state_dict(), model2.state_dict())


def test_later_training_does_not_reach_the_checkpoint_or_its_config(saved):
    path, model, optimizer = saved
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, optimizer)
    state = load_checkpoint(path, "simclr")
    assert equal(state["model"], before)
    assert state["config"] == dataclasses.asdict(Config(epochs=7))


@pytest.mark.parametrize("name", ["0.weight", "1.running_var"])
def test_weights_that_are_not_finite_never_replace_a_checkpoint(saved, name):
    path, model, optimizer = saved
    before = path.read_bytes()
    model.state_dict()[name].view(-1)[3] = math.nan
    with pytest.raises(Diverged, match=rf"{name} is not finite after epoch 3"):
        save_checkpoint(path, "simclr", 3, model, optimizer, HISTORY, Config(epochs=7))
    assert path.read_bytes() == before


class Payload:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def seal(content):
    """With a right checksum, so that what is inside has to be checked."""
    content = content[:-2]
    return content + b"\x40\x00" + hashlib.sha256(content).hexdigest().encode()


def torch_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return seal(buffer.getvalue())


def zip_file(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return seal(buffer.getvalue())


def without(name):
    return lambda good: torch_file(
        {k: v for k, v in torch.load(io.BytesIO(good)).items() if k != name}
    )


def flipped_tensor(good):
    model, optimizer = make_model()
    train(model, optimizer)
    weight = model[0].weight.detach().numpy().tobytes()
    middle = good.index(weight) + len(weight) // 2
    return good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]


SPOILED = {
    "empty": lambda good: b"",
    "a byte": lambda good: good[:1],
    "a tenth": lambda good: good[: len(good) // 10],
    "half": lambda good: good[: len(good) // 2],
    "without its end": lambda good: good[:-1],
    "a flipped bit in a weight": flipped_tensor,
    "zeros": lambda good: bytes(len(good)),
    "zeroed half": lambda good: good[: len(good) // 2] + bytes(len(good) // 2),
    "random": lambda good: random.Random(0).randbytes(len(good)),
    "text": lambda good: b"not a checkpoint\n",
    "a zip of text": lambda good: zip_file(readme="hello"),
    "an empty zip": lambda good: zip_file(),
    "a pickled dict": lambda good: pickle.dumps({"script": "simclr"}),
    "a list": lambda good: torch_file([1, 2]),
    "a tensor": lambda good: torch_file(torch.zeros(3)),
    "weights only": lambda good: torch_file(make_model()[0].state_dict()),
    "a whole module": lambda good: torch_file(make_model()[0]),
    **{f"without {name}": without(name) for name in ("script", "epoch", "optimizer", "history")},
    "weights of no kind": lambda good: torch_file(
        {**torch.load(io.BytesIO(good)), "model": [1], "optimizer": None}
    ),
    "optimizer of no kind": lambda good: torch_file(
        {**torch.load(io.BytesIO(good)), "optimizer": "sgd"}
    ),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_spoiled_checkpoint_is_refused(saved, user_error, spoil):
    path, model, optimizer = saved
    path.write_bytes(spoil(path.read_bytes()))
    with user_error(path):
        restore(path, "simclr", model, optimizer)


def test_a_flip_anywhere_is_refused(saved):
    path, *_ = saved
    good = path.read_bytes()
    for position in range(0, len(good), len(good) // 120):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x55]) + good[position + 1 :])
        with pytest.raises(UserError, match="checksum"):
            load_checkpoint(path, "simclr")


@pytest.mark.parametrize("kind", ["pickle", "torch, old format", "torch", "inside a checkpoint"])
def test_code_in_a_checkpoint_is_not_run(saved, tmp_path, user_error, kind):
    path, model, optimizer = saved
    payload = Payload(tmp_path / "canary")
    if kind == "pickle":
        path.write_bytes(seal(pickle.dumps(payload) + b".."))
    elif kind == "inside a checkpoint":
        path.write_bytes(torch_file({**load_checkpoint(path, "simclr"), "history": payload}))
    else:
        buffer = io.BytesIO()
        torch.save(payload, buffer, _use_new_zipfile_serialization=kind == "torch")
        path.write_bytes(seal(buffer.getvalue() + b".." * (kind != "torch")))
    with user_error(path):
        restore(path, "simclr", model, optimizer)
    assert not (tmp_path / "canary").exists()
    if kind != "pickle":
        torch.load(path, weights_only=False)
        assert (tmp_path / "canary").exists()  # the payload was a live one


def test_missing_and_foreign_checkpoints_are_refused(saved, user_error):
    path, model, optimizer = saved
    with user_error(path, "simclr", "simsiam"):
        restore(path, "simsiam", model, optimizer)
    for other in (path.with_name("none.pt"), path.parent):
        with user_error(other):
            restore(other, "simclr", model, optimizer)


def test_checkpoint_of_another_model_or_optimizer_is_refused(saved, user_error):
    path, model, _ = saved
    shallower, deeper = nn.Sequential(*model[:2]), nn.Sequential(*model, nn.Linear(4, 4))
    for other in (make_model(width=17)[0], shallower, deeper):
        with user_error(path):
            restore(path, "simclr", other)
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    with user_error(path):
        restore(path, "simclr", model, torch.optim.SGD(groups, 0.1, momentum=0.9))


# writing without losing what was there


def write_checkpoint(path):
    model, optimizer = make_model(width=512)
    train(model, optimizer)
    save_checkpoint(path, "simclr", 3, model, optimizer, HISTORY, Config())


WRITERS = {
    "checkpoint": write_checkpoint,
    "json": lambda path: write_json(path, {"key": "x" * 10_000}),
    "csv": lambda path: write_csv(path, [{"epoch": i} for i in range(5000)]),
    "arrays": lambda path: write_arrays(path, a=np.random.default_rng(0).random(5000)),
    "encoder": lambda path: save_weights(path, make_model(width=512)[0], {}),
}
every_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@pytest.fixture
def previous(tmp_path):
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(b"the previous one")
    return path


def check_untouched(path):
    assert path.read_bytes() == b"the previous one"
    assert list(path.parent.iterdir()) == [path]


@every_writer
def test_writers_replace_the_file_and_leave_nothing_else(previous, write):
    write(previous)
    assert len(previous.read_bytes()) > 5000
    assert list(previous.parent.iterdir()) == [previous]


@every_writer
def test_content_is_on_the_disk_before_the_name_is(previous, monkeypatch, write):
    synced, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(file):
        synced.append(os.fstat(file).st_ino)
        fsync(file)

    def checked_replace(source, target):
        assert os.stat(source).st_ino in synced
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", checked_replace)
    write(previous)
    assert os.stat(previous).st_ino in synced


@every_writer
def test_full_disk_keeps_the_previous_file(previous, user_error, small_disk, write):
    with small_disk(4000), user_error(previous):
        write(previous)
    check_untouched(previous)


@every_writer
def test_failed_rename_keeps_the_previous_file(previous, monkeypatch, user_error, write):
    def replace(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", replace)
    with user_error(previous, "Permission denied"):
        write(previous)
    check_untouched(previous)


@every_writer
def test_place_that_cannot_be_written_is_named(previous, tmp_path, user_error, write):
    for path in (previous / "below", tmp_path / "missing" / "file"):
        with user_error(path):
            write(path)
    check_untouched(previous)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError),
        (RuntimeError("enforce fail at inline_container.cc:659\nunexpected pos 64"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (SystemExit(143), SystemExit),
    ],
    ids=["OSError", "RuntimeError", "Ctrl-C", "SIGTERM"],
)
def test_interrupted_checkpoint_keeps_the_previous_one(previous, monkeypatch, raised, expected):
    def half(value, target):
        Path(target).write_bytes(b"half")
        raise raised

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(expected) as caught:
        write_checkpoint(previous)
    if expected is UserError:
        assert str(previous) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    check_untouched(previous)


# tables, summary, encoder


def test_csv_has_the_columns_of_all_rows_and_exact_numbers(tmp_path):
    path = tmp_path / "metrics.csv"
    rows = [{"epoch": 1, "loss": 1 / 3}, {"epoch": 2, "loss": 1e-300, "knn": 0.1 + 0.2}]
    write_csv(path, rows[:1])
    write_csv(path, rows)
    with open(path, newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["epoch", "loss", "knn"]
    assert [int(row["epoch"]) for row in table] == [1, 2]
    assert [float(row["loss"]) for row in table] == [1 / 3, 1e-300]
    assert [row["knn"] for row in table] == ["", repr(0.1 + 0.2)]


def test_summary_keeps_the_other_stages_and_adds_up_their_seconds(tmp_path):
    update_summary(tmp_path, {"final_loss": 1.0, "pretrain_seconds": 10.0})
    update_summary(tmp_path, {"accuracy": 0.5, "probe_seconds": 4.0})
    returned = update_summary(tmp_path, {"accuracy": 0.6, "probe_seconds": 3.0, "embed_seconds": 1})
    assert returned == json.loads((tmp_path / "summary.json").read_text())
    assert returned == {
        "final_loss": 1.0,
        "accuracy": 0.6,
        "pretrain_seconds": 10.0,
        "probe_seconds": 3.0,
        "embed_seconds": 1,
        "seconds": 14.0,
    }


def test_damaged_summary_is_named(tmp_path, user_error):
    (tmp_path / "summary.json").write_text('{"final_loss": 1')
    with user_error(tmp_path / "summary.json"):
        update_summary(tmp_path, {})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_encoder_is_read_back_by_safetensors(tmp_path, layout):
    encoder = functions.make_encoder("small", "cifar", 3, 8).to(memory_format=layout)
    encoder(torch.rand(4, 3, 8, 8))  # moves BatchNorm's statistics off their start
    path = tmp_path / "encoder.safetensors"
    save_weights(path, encoder, {"encoder": "small"})
    state = load_file(path)
    assert equal(state, encoder.state_dict())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"encoder": "small"}
    other = functions.make_encoder("small", "cifar", 3, 8)
    other.load_state_dict(state)
    images = torch.rand(4, 3, 8, 8)
    assert torch.allclose(other.eval()(images), encoder.eval()(images), atol=1e-6)


# importing and exit codes

LOOK = """
import random, signal, sys
import numpy, torch
def state():
    return (
        random.getstate(), [part.tobytes() if hasattr(part, "tobytes") else part
        for part in numpy.random.get_state()], torch.get_rng_state().tolist(),
        torch.get_num_threads(), torch.get_default_dtype(), signal.getsignal(signal.SIGTERM),
        torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(),
    )
before = state()
loaded = set(sys.modules)
import simclr
assert state() == before
heavy = {"matplotlib", "sklearn", "torchvision", "lightning_fabric", "PIL", "optuna", "umap"}
print(sorted(heavy & set(sys.modules) - loaded))
"""


def run_python(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_importing_does_nothing(tmp_path):
    done = run_python(tmp_path, "-c", LOOK)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
    assert list(tmp_path.iterdir()) == []


def test_mistake_exits_with_2_and_one_line(tmp_path):
    done = run_python(tmp_path, str(REPOSITORY / "simclr.py"), "--dataset", "no/such/folder")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "no/such/folder" in line
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def signals():
    """Signals as a script in a terminal finds them; afterwards as they were."""
    terminate = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("SIGTERM was not handled"))
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    user = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, user)
    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, interrupt)


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(5)


def throw(error):
    raise error


@pytest.mark.parametrize(
    ("act", "code", "words"),
    [
        (lambda: None, None, []),
        (lambda: throw(UserError("no such\nthing")), 2, ["error: no such thing"]),
        (lambda: throw(Diverged("the loss is nan")), 1, ["error: the loss is nan"]),
        (lambda: send(signal.SIGINT), 130, ["Ctrl-C"]),
        (lambda: send(signal.SIGTERM), 143, ["SIGTERM"]),
        (lambda: send(signal.SIGUSR1), 138, ["SIGUSR1"]),
        (lambda: torch.empty(2**62, dtype=torch.uint8), 1, ["out of memory", "--batch-size"]),
        (lambda: throw(MemoryError()), 1, ["out of memory", "--batch-size"]),
    ],
    ids=[
        *("success", "mistake", "divergence", "Ctrl-C", "SIGTERM"),
        *("SIGUSR1", "PyTorch's memory", "Python's memory"),
    ],
)
def test_exit_codes_and_the_command_to_go_on(
    tmp_path, monkeypatch, capsys, signals, act, code, words
):
    monkeypatch.setattr(sys, "argv", ["simclr.py", "--output-dir", str(tmp_path), "--name", "run"])

    def main(config):
        with open_run("simclr", config) as folder:
            (folder / "checkpoint.pt").touch()
            act()

    with pytest.raises(SystemExit) if code else contextlib.nullcontext() as left:
        run_script(main, Config, "")
    lines = capsys.readouterr().err.splitlines()
    if code is None:
        assert lines == []
        return
    assert left.value.code == code
    (line,) = lines
    for word in words:
        assert word in line
    # What is copied from "python" to the end of the line must work.
    command = shlex.split(line[line.index("python simclr.py") :])
    assert command[-2:] == ["--resume", str(tmp_path / "simclr" / "run")]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="not on this system")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_a_callback_that_swallows_it_is_not_lost(number, code):
    # Numba's ctypes callbacks and destructors print what they raise, and go on.
    program = f"""
import functions, os, time

class Callback:
    def __del__(self):
        os.kill(os.getpid(), {int(number)})
        time.sleep(0.01)

def work():
    Callback()
    print("it went on")
    time.sleep(20)

functions.exit_cleanly(work)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "it went on\n"
    assert done.returncode == code
    (line,) = done.stderr.splitlines()
    assert line.startswith("stopped by ")


def test_what_is_torn_down_half_made_adds_no_line_to_a_stop():
    program = """
import functions, os, signal

class Half:  # as llvmlite's objects are, when a signal comes while they are made
    def __del__(self):
        raise AttributeError("no attribute")

def work():
    half = Half()
    os.kill(os.getpid(), signal.SIGTERM)

functions.exit_cleanly(work)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "stopped by SIGTERM\n")


def test_bad_flag_exits_with_2_before_anything_is_done(monkeypatch, capsys, signals):
    monkeypatch.setattr(sys, "argv", ["simclr.py", "--epochs", "many"])
    with pytest.raises(SystemExit) as left:
        run_script(lambda config: pytest.fail("it started"), Config, "")
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "--epochs" in line


def test_a_bug_keeps_its_traceback(monkeypatch, signals):
    monkeypatch.setattr(sys, "argv", ["simclr.py"])
    with pytest.raises(ZeroDivisionError):
        run_script(lambda config: 1 / 0, Config, "")


def test_freed_memory_is_kept_for_the_next_step():
    program = """
import resource, sys, torch, functions
if sys.argv[1] == "keep":
    functions.keep_freed_memory()
for step in range(30):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (40, 60):  # MB: above the largest threshold that glibc chooses by itself
        torch.zeros(size, 250_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {
        word: int(
            subprocess.run(
                [sys.executable, "-c", program, word],
                cwd=Path(functions.__file__).parent,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for word in ("keep", "return")
    }
    assert faults["keep"] < faults["return"] / 10
