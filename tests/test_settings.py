import dataclasses
import json
import re
import shlex
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import rnn
from simclr import Config
from support import settings
from support.errors import UserError
from support.settings import load_config, parse_config, setting

HINTS = typing.get_type_hints(Config)
FIELDS = {field.name: field for field in dataclasses.fields(Config)}


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
    others = {"stages": "probe,embed", "labels": "7,all", "view_size": "16,24"}
    others |= {"encoder": "small", "channels": 5, "value_range": (-1.5e-05, 9.0)}
    return others.get(name, "another one")


def arguments_for(name, value):
    if isinstance(value, bool):
        return [settings.flag(name) if value else settings.flag("no_" + name)]
    return [settings.flag(name), *map(str, value if isinstance(value, tuple) else (value,))]


def save(folder, config, lacks=()):
    """Write a run folder's `config.json`, without some settings; return its path."""
    values = {"script": config.SCRIPT, **dataclasses.asdict(config)}
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in lacks}))
    return path


# the command line


def test_no_flags_are_the_defaults():
    assert parse_config(Config, [], "") == Config()


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "resume"])
def test_every_setting_is_a_flag_that_arrives(name):
    value = other_value(name)
    config = parse_config(Config, ["--dataset", "images", *arguments_for(name, value)], "")
    assert config == dataclasses.replace(Config(dataset="images"), **{name: value})
    assert type(getattr(config, name)) is type(value)


def test_flags_beside_resume_meet_the_saved_settings(tmp_path):
    save(tmp_path, Config(batch_size=384))
    resumed = parse_config(Config, ["--resume", str(tmp_path), "--devices", "3"], "")
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
        ("--resume ''", ["--resume", "empty"]),
        ("--resume=", ["--resume", "empty"]),
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
        ["--dataset", "images", "--image-size", "8"],
        ["--dataset", "images", "--image-size", "1024"],
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
        assert re.search(rf"^ {{1,4}}{settings.flag(name)}\b", section, re.MULTILINE)
        assert "".join(field.metadata["help"].split()) in "".join(section.split())
        if field.default is not None:
            default = field.default if isinstance(field.default, tuple) else [field.default]
            assert f"[{''.join(map(str, default))}]" in "".join(section.split())


# config.json


def edited(**changes):
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


NO_CONFIGS = {
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "empty": lambda path: path.write_text(""),
    "truncated": lambda path: path.write_text(path.read_text()[:200]),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda path: path.write_text("[]"),
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
def test_a_spoiled_config_is_refused(tmp_path, user_error, spoil):
    spoil(save(tmp_path, Config(epochs=7)))
    with user_error(tmp_path):
        parse_config(Config, ["--resume", str(tmp_path)], "")


def test_no_run_folder_is_refused(tmp_path, user_error):
    for path in (tmp_path / "missing", tmp_path):
        with user_error(path, "not a run folder"):
            load_config(Config, path)


def test_another_scripts_folder_names_both_scripts(tmp_path, user_error):
    save(tmp_path, Config())
    with user_error(tmp_path, "simclr.py", "rnn.py"):
        load_config(rnn.Config, tmp_path)


def test_a_saved_config_comes_back(tmp_path, capsys):
    for config in (Config(), *(Config(**{n: other_value(n)}) for n in FIELDS if n != "resume")):
        save(tmp_path, config)
        assert load_config(Config, tmp_path) == config
    assert capsys.readouterr().out == ""  # no setting is missing


@dataclass(frozen=True)
class Newer(settings.TrainingConfig, epochs=7, name="example"):
    """A script's settings, some of which its older versions lack."""

    SCRIPT = "newer"

    blur: float = setting(0.5, "views", "how much", before=0.0)
    method: str | None = setting("good", "views", "which", before=None)
    sizes: tuple[int, int] = setting((3, 4), "views", "how large")


def test_a_setting_that_a_folder_lacks_takes_what_was_done_before_there_was_one(tmp_path, capsys):
    save(tmp_path, Newer(sizes=(5, 6), blur=0.1, epochs=3), lacks=("blur", "method", "seed"))
    assert load_config(Newer, tmp_path) == Newer(blur=0.0, method=None, sizes=(5, 6), epochs=3)
    (line,) = capsys.readouterr().out.splitlines()
    for word in (str(tmp_path), "--blur 0.0", "--method unset", "--seed 0"):
        assert word in line
    assert "--sizes" not in line
    save(tmp_path, Newer(), lacks=("sizes", "epochs"))
    assert load_config(Newer, tmp_path) == Newer()


@pytest.mark.parametrize(
    ("computed_in", "precision"), [("32-true", "float32"), ("bf16-mixed", "bfloat16")]
)
def test_an_older_folder_goes_on_in_the_precision_that_it_chose(tmp_path, computed_in, precision):
    path = save(tmp_path, Config(precision="auto"))
    edited(computed_in=computed_in)(path)
    assert load_config(Config, tmp_path).precision == precision


# from Python


def test_class_keywords_are_other_defaults_of_inherited_settings():
    config = Newer()
    assert (config.epochs, config.name, config.seed) == (7, "example", 0)
    assert (settings.TrainingConfig().epochs, settings.TrainingConfig().name) == (100, None)
    ours = {field.name: field for field in dataclasses.fields(Newer)}
    theirs = {field.name: field for field in dataclasses.fields(settings.TrainingConfig)}
    assert list(ours)[: len(theirs)] == list(theirs)  # in --help they stay where they were
    for text in ("help", "group"):
        assert ours["epochs"].metadata[text] == theirs["epochs"].metadata[text]
    assert parse_config(Newer, ["--epochs", "9"], "").epochs == 9
    with pytest.raises(UserError, match="--epochs"):
        Newer(epochs="9")


WRONG_TYPES = [
    {"epochs": "3"},
    {"epochs": 3.0},
    {"epochs": True},
    {"learning_rate": "0.1"},
    {"output_dir": Path("results")},
    {"data_dir": None},
    {"name": 3},
    {"encoder": "vgg"},
    {"encoder": None},
    {"pixel_baseline": 1},
    {"jitter": [0.4, 0.4, 0.4, 0.1]},
    {"jitter": (0.4, 0.4, 0.4)},
    {"jitter": (0.4, 0.4, 0.4, "0.1")},
]


@pytest.mark.parametrize("wrong", WRONG_TYPES, ids=str)
def test_types_are_checked_from_python_too(user_error, wrong):
    ((name, value),) = wrong.items()
    with user_error(settings.flag(name), repr(value)):
        Config(**wrong)


def test_whole_numbers_are_numbers():
    assert Config(learning_rate=1, jitter=(0, 0, 0, 0)).learning_rate == 1
