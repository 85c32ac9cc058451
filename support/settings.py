"""Settings: a frozen dataclass whose fields are flags, and which `config.json` brings back."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from support import decoding, files
from support.errors import UserError, require

SIDES = {"cifar10": 32, "fashion-mnist": 28, "digits": 8}  # what --image-size does not change
_MISSING = object()


def setting(
    default: Any, group: str, text: str, before: Any = _MISSING, retired: tuple[str, ...] = ()
) -> Any:
    """A `Config` field with its default, its group in `--help` and its line there.

    `before` is the value that means what the scripts did when they had no such setting; run folders
    from then take it. Without it that is the default. `retired` are parts of a text with commas
    that older versions knew; they are left out of what run folders say.
    """
    metadata = {"group": group, "help": text, "retired": retired}
    if before is not _MISSING:
        metadata["before"] = before
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """The settings every experiment script has.

    A script inherits them, and gives some another default in the line of its class:
    `class Config(RunConfig, seed=7)`.
    """

    SCRIPT: ClassVar[str] = ""  # the script's name

    dataset: str = setting(
        "cifar10", "data", "cifar10, fashion-mnist, digits, or a path to a folder of images"
    )
    data_dir: str = setting("data", "data", "where downloads and the image cache are kept")
    image_size: int = setting(32, "data", "side in pixels to which a folder's images are resized")
    channels: int | None = setting(
        None,
        "data",
        "of a folder's images: 1 for grey, 3 for colour, other numbers from .npy and .tif files "
        "[3; .npy files are taken with this flag only]",
    )
    value_range: tuple[float, float] | None = setting(
        None,
        "data",
        "values that become black and white in a folder's images of more than 8 bits [the smallest "
        "of 1, 8, 10, 12, 14 and 16 bits that holds the training images, else their extremes]",
    )
    stack: Literal["refuse", "first"] = setting(
        "refuse",
        "data",
        "first: of a file with several images (pages, frames) take the first",
        before="first",
    )
    unlabelled: bool = setting(
        False, "data", "take all images below the folder, whose folders are then no classes"
    )
    download_url: str | None = setting(
        None, "data", "another address of the data set's archive (same MD5 check)"
    )
    output_dir: str = setting("results", "run", "where run folders are made")
    name: str | None = setting(None, "run", "name of the run folder (default: time and seed)")
    resume: str | None = setting(None, "run", "run folder to continue, with its own settings")
    seed: int = setting(0, "run", "seed of everything that is random")
    logger: Literal["none", "tensorboard", "wandb"] = setting(
        "none", "run", "where the numbers go besides metrics.csv"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "run", "where to compute")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "run", "auto: bfloat16 autocast where the hardware has units for it"
    )

    def __init_subclass__(cls, **defaults: Any) -> None:
        """Take other defaults for inherited settings."""
        super().__init_subclass__()
        inherited = {field.name: field for field in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls.__base__)
        own = inspect.get_annotations(cls)
        for name, default in defaults.items():
            own[name] = hints[name]
            metadata = inherited[name].metadata
            setattr(cls, name, dataclasses.field(default=default, metadata=metadata))
        cls.__annotations__ = own

    def __post_init__(self) -> None:
        """Check types, and the ranges that hold for every script."""
        for name, hint in field_types(type(self)).items():
            value = getattr(self, name)
            require(has_type(value, hint), f"{flag(name)} cannot be {value!r:.60}")
        require(0 <= self.seed < 2**63, f"--seed must be in [0, 2^63), not {self.seed}")
        require(
            8 <= self.image_size <= 1024,
            f"--image-size must be between 8 and 1024 pixels, not {self.image_size}",
        )
        good = self.channels is None or 1 <= self.channels <= 1024
        require(good, f"--channels must be between 1 and 1024, not {self.channels}")
        decoding.check_value_range(*self.value_range or (0, 1))
        require(self.resume != "", "--resume takes a run folder, not an empty name")
        if self.name is not None:
            require(
                self.name not in ("", ".", "..") and not set(self.name) & set("/\\\0"),
                f"--name must be a plain folder name, not {self.name!r}",
            )

    @property
    def pixel_rules(self) -> decoding.PixelRules:
        """How the image files of a folder become pixels."""
        return decoding.PixelRules(self.channels, self.value_range, self.stack)

    @classmethod
    def to_start_from(cls, arguments: Sequence[str]) -> Any:
        """What the flags of a command line change: with `--resume` the folder's, else the defaults.

        Raises:
            UserError: a run folder that cannot be read.
        """
        folder = find_flag("--resume", arguments)
        return load_config(cls, folder) if folder else cls()

    def unread(self) -> dict[str, str]:
        """The settings that have no effect beside the others, and what would give them one."""
        return {"image_size": "a folder of images"} if self.dataset in SIDES else {}


@dataclass(frozen=True)
class TrainingConfig(RunConfig):
    """The settings every training has besides."""

    epochs: int = setting(100, "training", "passes over the training images")
    batch_size: int = setting(256, "training", "images per step")
    learning_rate: float = setting(1e-3, "training", "peak learning rate")
    weight_decay: float = setting(0.0, "training", "weight decay")
    checkpoint_seconds: float = setting(
        30.0, "run", "least time between two checkpoints; the last epoch has one in any case", 0.0
    )

    def __post_init__(self) -> None:
        """Check ranges that hold for every training."""
        super().__post_init__()
        require(self.epochs >= 1, f"--epochs must be at least 1, not {self.epochs}")
        require(self.batch_size >= 2, f"--batch-size must be at least 2, not {self.batch_size}")
        require(
            0 < self.learning_rate < math.inf,
            f"--learning-rate must be a positive number, not {self.learning_rate}",
        )
        require(
            0 <= self.weight_decay < math.inf,
            f"--weight-decay must not be negative, not {self.weight_decay}",
        )
        require(
            0 <= self.checkpoint_seconds < math.inf,
            f"--checkpoint-seconds must not be negative, not {self.checkpoint_seconds}",
        )


# Settings that say where a run computes and what it does next, not what it is: they may differ
# from the saved ones when a run is resumed. Of the data set the pixels count, not the spelling.
FREE_ON_RESUME = frozenset(
    {"dataset", "data_dir", "download_url", "output_dir", "name", "resume", "device", "logger"}
    | {"devices", "compile", "checkpoint_seconds"}
)


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are `UserError`s: one line, exit code 2, like every other.

    It also takes -1e-05 for a number, as Python writes it, where argparse sees a flag.
    """

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def error(self, message: str) -> typing.NoReturn:
        """Raise what argparse would print."""
        raise UserError(f"{message} (see --help)")


def flag(name: str) -> str:
    """The command-line spelling of a setting's name."""
    return "--" + name.replace("_", "-")


def field_types(config_class: Any) -> dict[str, Any]:
    """The type of each setting."""
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def _flag_type(hint: Any) -> tuple[type, dict[str, Any]]:
    """The type of a flag's values, and argparse's keyword arguments for it."""
    if isinstance(hint, types.UnionType):  # `int | None`
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is Literal:
        return str, {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        return parts[0], {"type": parts[0], "nargs": "*" if ... in parts else len(parts)}
    if hint is bool:
        return bool, {"action": argparse.BooleanOptionalAction}
    return hint, {"type": hint}


def parse_config(config_class: type[RunConfig], arguments: Sequence[str], text: str) -> Any:
    """Parse a command line into a `Config`.

    With `--resume RUN_FOLDER` the settings saved there are the defaults, and `open_run` refuses a
    flag that contradicts them. A setting of the type `tuple[str, ...]` is words without a flag.

    Raises:
        UserError: an unknown flag, a bad value, one without effect, or a run folder that cannot be
            read.
    """
    defaults = config_class.to_start_from(arguments)
    parser = Parser(
        usage="%(prog)s [flags]",
        description=text,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=34, width=100
        ),
    )
    groups: dict[str, Any] = {}
    hints = field_types(config_class)
    for field in dataclasses.fields(config_class):
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        default = getattr(defaults, field.name)
        kind, options = _flag_type(hints[field.name])
        if "choices" not in options and kind is not bool:
            options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        note = "" if default in (None, "", ()) else f" [{shown}]"
        word = field.name if options.get("nargs") == "*" else flag(field.name)
        groups[group].add_argument(
            word, default=default, help=field.metadata["help"] + note.replace("%", "%%"), **options
        )
    values = vars(parser.parse_args(arguments)).items()
    changed: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values}
    config = config_class(**changed)
    if config.resume is None:
        for name, needed in config.unread().items():
            same = getattr(config, name) == getattr(defaults, name)
            require(same, f"{flag(name)} has no effect without {needed}")
    return config


def find_flag(name: str, arguments: Sequence[str]) -> str | None:
    """The value of one flag of a command line, None when it is not there."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, dest="value")
    return parser.parse_known_args(arguments)[0].value


def load_config(config_class: Any, folder: str | Path, quiet: bool = False) -> Any:
    """The `Config` saved in a run folder's `config.json`, checked as a command line is.

    A setting that the folder lacks, because it is from an older version, takes the value that means
    what the script did then; a line says so, unless `quiet`.

    Raises:
        UserError: no such file, no JSON, another script's, or a value of a wrong type.
    """
    path = Path(folder) / "config.json"
    require(path.is_file(), f"{folder} is not a run folder: it has no config.json")
    saved = files.read_json(path)
    script = saved.get("script")
    require(
        script == config_class.SCRIPT,
        f"{folder} is a run of {script}.py, not of {config_class.SCRIPT}.py",
    )
    values: dict[str, Any] = {}
    lacking = []
    for field in dataclasses.fields(config_class):
        value = saved_value(field, saved)
        if field.name not in saved:
            lacking.append(f"{flag(field.name)} {'unset' if value is None else value}")
        values[field.name] = value
    values["precision"] = recorded_precision(saved)
    if lacking and not quiet:
        print(
            f"{folder} is of an older version, which did what this one does with "
            + ", ".join(lacking)
        )
    try:
        return config_class(**values)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def recorded_precision(record: dict[str, Any]) -> Any:
    """The precision in which the run of a `config.json` computed; `auto` if that is not known.

    Older versions left `auto` in it; what that chose stands beside it, in Lightning's words.
    """
    chosen = {"32-true": "float32", "bf16-mixed": "bfloat16"}
    return chosen.get(str(record.get("computed_in")), record.get("precision", "auto"))


# These say where a run lies, and which file other settings came from, and nothing else of it.
PLACES = frozenset({"name", "output_dir", "data_dir", "resume", "config"})


def changed_flags(record: dict[str, Any], config_class: Any) -> dict[str, list[str]]:
    """The words that give the settings of a `config.json` to its script, where not the default.

    By flag: `{"--epochs": ["--epochs", "3"], "--pixel-baseline": ["--pixel-baseline"]}`. A setting
    that is not among them, because the script got it later, takes the value that means what the
    script did before; `auto` precision that which was computed in. Where a run lies is left out,
    and what had no effect.
    """
    # On another machine `auto` may mean something else than what was computed.
    saved = record | {"precision": recorded_precision(record)}
    made, hints = {}, field_types(config_class)
    values = {field.name: saved_value(field, saved) for field in dataclasses.fields(config_class)}
    left_out = PLACES | config_class(**values).unread().keys()
    for field in dataclasses.fields(config_class):
        value = values[field.name]
        if value == field.default or field.name in left_out or value is None:
            continue
        name = flag(field.name)
        if ... in typing.get_args(hints[field.name]):
            made[name] = [*value]
        elif isinstance(value, bool):
            made[name] = [name if value else name.replace("--", "--no-", 1)]
        else:
            made[name] = [name, *map(str, value if isinstance(value, tuple) else [value])]
    return made


def changed_words(config: RunConfig) -> list[str]:
    """The words that give these settings to their script, where not the default."""
    flags = changed_flags(dataclasses.asdict(config), type(config))
    words = [word for each in flags.values() for word in each]
    if config.data_dir != type(config).data_dir:
        words = ["--data-dir", config.data_dir, *words]
    return words


def value_before(field: dataclasses.Field) -> Any:
    """The value of a setting that means what the scripts did before they had it."""
    return field.metadata.get("before", field.default)


def saved_value(field: dataclasses.Field, saved: dict[str, Any]) -> Any:
    """The value of a setting in a `config.json` of this version or an older one."""
    value = saved.get(field.name, value_before(field))
    retired = field.metadata["retired"]
    if retired and isinstance(value, str):
        value = ",".join(part for part in value.split(",") if part.strip() not in retired)
    return tuple(value) if isinstance(value, list) else value


def has_type(value: Any, hint: Any) -> bool:
    """Whether a value is of a setting's type; a whole number is a `float`, too."""
    if isinstance(hint, types.UnionType):
        return any(has_type(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if ... in parts:
            return isinstance(value, tuple) and all(has_type(part, parts[0]) for part in value)
        fits = isinstance(value, tuple) and len(value) == len(parts)
        return fits and all(map(has_type, value, parts))
    return type(value) is hint or (hint is float and type(value) is int)
