"""A self-supervised experiment from its settings to its report: pretraining, then stage by stage.

Model, loss and steps are the scripts' own; `pretraining` surrounds the steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from support import (
    checkpoints,
    datasets,
    devices,
    encoders,
    figures,
    files,
    frozen,
    model_card,
    progress,
    report,
    runs,
    scores,
    verdict,
)
from support.errors import UserError, require
from support.pretraining import EVALUATION, READ_BY, PretrainingConfig

Stage = Callable[[Any, datasets.ImageData, Any, Path, Any], dict[str, Any] | None]


def run_experiment(
    config: Any,
    data: datasets.ImageData,
    make_model: Callable[[Any, int, int], nn.Module],
    pretrain: Callable[[Any, datasets.ImageData, Any, runs.Run, Any], list[dict[str, Any]]],
    stages: Mapping[str, Stage],
) -> dict[str, Any]:
    """Pretrain (or restore a finished run), then do the other stages of `config`.

    A stage may keep `<stage>_checkpoint.pt` in the folder while it works.

    Args:
        config: the script's `Config`.
        data: what it names.
        make_model: from `config` and the images' channels and side to a model with an attribute
            `encoder`, which has `num_features`.
        pretrain: trains the model and returns the rows of `metrics.csv`.
        stages: by name; each returns what it adds to `summary.json`.

    Returns:
        What `summary.json` holds.

    Raises:
        UserError: data, settings or a run folder that cannot be used.
        Diverged: the loss is not finite.
    """
    processes, nodes = devices.process_layout(config)
    # Processes that train alone, like the tasks of an interactive SLURM job, all have folders.
    main_process = processes * nodes == 1 or devices.process_rank() == 0
    config, line = with_warm_restart(config)
    if line and main_process:
        print(line)
    data = data.evaluated_on(config.evaluate_on)
    check_fit(config, data, processes * nodes)
    fabric = devices.make_fabric(config.device, config.precision, processes, nodes)
    unread = frozenset(k for k, stage in READ_BY.items() if stage not in config.stage_names)
    opened: Any = contextlib.nullcontext()
    if main_process:
        opened = runs.open_run(config, data.fingerprint(), EVALUATION, unread)
    with opened as run:
        fabric.launch()
        folder = fabric.broadcast(str(run.folder) if run else "")
        run = run or runs.Run(Path(folder))  # the others log nothing
        model = prepare_model(make_model, data, config, run, fabric)
        if main_process:
            print_setup(config, data, model, fabric.world_size)
        data = data.to(fabric.device)
        if "pretrain" in config.stage_names:
            with checkpoints.advice_on_divergence():
                history = pretrain(model, data, config, run, fabric)
            if fabric.world_size > 1:  # what follows is one process's work, with its own BatchNorm
                torch.distributed.destroy_process_group()
            if not main_process:
                return {}
            title = f"{type(model).__name__} pretraining on {data.name}, {config.encoder}"
            figures.plot_loss(run.folder / "loss.png", history, title)
            frozen.save_encoder(run.folder / "encoder.safetensors", model.encoder, config, data)
        else:
            if not main_process:
                return {}
            epoch, history = checkpoints.restore(run.folder / "checkpoint.pt", model)
            require(
                epoch == config.epochs,
                f"{run.folder} has finished {epoch} of {config.epochs} epochs: let it finish "
                "first, with pretrain among the --stages",
            )
        names = ("seconds", "measure_seconds", "checkpoint_seconds")
        seconds = sum(row.get(name, 0) for row in history for name in names)
        values = {"final_loss": history[-1]["loss"], "pretrain_seconds": seconds}
        if "verdict" in history[-1]:  # not of a run from before there were verdicts
            values["verdict"] = verdict.describe(history[-1]["verdict"])
        run.summarize(values, config.epochs)
        do_stages(stages, model, data, config, run)
        summary = files.read_json(run.folder / "summary.json")
        report.write_report(run.folder, type(config))
        model_card.write_card(run.folder, type(config), data, model.encoder)
        print_results(summary, run.folder)
        print_what_next(summary, config, data, run.folder)
    return summary


def prepare_model(
    make_model: Callable[[Any, int, int], nn.Module],
    data: datasets.ImageData,
    config: PretrainingConfig,
    run: runs.Run,
    fabric: Any,
) -> Any:
    """A new model on the device, with `--weights` unless the run has a checkpoint to go on from."""
    devices.seed_everything(config.seed)
    model: Any = make_model(config, *data.train.images.shape[1:3])
    begun = config.resume is not None and (run.folder / "checkpoint.pt").exists()
    if config.weights is not None and not begun:
        line = checkpoints.load_weights(Path(config.weights).expanduser(), model)
        if fabric.is_global_zero:
            print(line)
    model = model.to(fabric.device).to(memory_format=torch.channels_last)
    if fabric.world_size == 1 or fabric.device.type != "cuda":
        return model
    if config.encoder.startswith("timm:"):  # whose norms have the activation in them
        import timm.layers

        return timm.layers.convert_sync_batchnorm(model)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def do_stages(
    stages: Mapping[str, Stage],
    model: Any,
    data: datasets.ImageData,
    config: PretrainingConfig,
    run: runs.Run,
) -> None:
    """Do the stages after pretraining that `config` asks for; `summary.json` has what they find."""
    fabric = devices.make_evaluation_fabric(config.device, config.precision)
    for name, stage in stages.items():
        if name not in config.stage_names:
            continue
        if name != "embed" and not data.classes:
            print(f"{name} is skipped: it needs labels, and {data.name} has none")
            continue
        began = time.perf_counter()
        values = stage(model, data, config, run.folder, fabric) or {}
        values[f"{name}_seconds"] = time.perf_counter() - began
        run.summarize(values, config.epochs)
        (run.folder / f"{name}_checkpoint.pt").unlink(missing_ok=True)


def with_warm_restart(config: Any) -> tuple[Any, str]:
    """The settings of a new run and a line that says so, if `config` is longer than a finished run.

    The new one starts from the old one's weights and has a schedule of its own; the old one's rate
    has come to its end. Otherwise the settings stay as they are, and the line is empty.
    """
    folder = Path(config.resume or "")
    checkpoint = folder / "checkpoint.pt"
    if config.resume is None or not checkpoint.exists():
        return config, ""
    saved = files.read_json(folder / "config.json")
    finished = saved.get("epochs") == checkpoints.load(checkpoint)["epoch"] < config.epochs
    if not finished or "pretrain" not in config.stage_names:
        return config, ""
    line = (
        f"{folder} has finished its {saved['epochs']} epochs: a new run starts from its weights, "
        f"with a schedule of {config.epochs} epochs (a warm restart)"
    )
    name = None if config.name == saved.get("name") else config.name
    return dataclasses.replace(config, resume=None, name=name, weights=str(checkpoint)), line


def check_fit(config: PretrainingConfig, data: datasets.ImageData, processes: int) -> None:
    """See at the start whether all stages can be done with this data.

    Raises:
        UserError: they cannot.
    """
    require(
        "pretrain" in config.stage_names or config.resume is not None,
        "--stages without pretrain needs --resume RUN_FOLDER",
    )
    if config.weights is not None and config.resume is None:
        path = Path(config.weights).expanduser()
        require(path.is_file(), f"there are no weights at {path}")
    images = len(data.train)
    require(images > 1, f"{data.name} has a single training image: pretraining takes two at least")
    require(
        config.batch_size <= images,
        f"--batch-size {config.batch_size} is larger than the data set ({images} images): try "
        f"{2 ** int(math.log2(max(4, images)) - 1)}",
    )
    require(
        config.batch_size % processes == 0 and config.batch_size >= 2 * processes,
        f"--batch-size {config.batch_size} does not divide among {processes} processes, two images "
        "or more for each",
    )
    mapped = len(data.test or data.train)
    require(
        "embed" not in config.stage_names or mapped >= 5,
        f"a map takes at least 5 images, not {mapped}: leave embed out of --stages",
    )


def print_setup(
    config: PretrainingConfig, data: datasets.ImageData, model: nn.Module, processes: int
) -> None:
    """Print what is trained, on what, and where."""
    print(data)
    if config.evaluate_on != "test":
        print("what are called test images are held-out training images")
    several = f"{processes} x " if processes > 1 else ""
    print(
        f"{type(model).__name__} with {config.encoder}, "
        f"{encoders.count_parameters(model) / 1e6:.1f} M parameters, on "
        f"{several}{devices.hardware(config.device)} "
        f"({devices.pick_precision(config.device, config.precision)})"
    )


def print_results(summary: dict[str, Any], folder: Path) -> None:
    """Print the numbers and where everything is.

    Raises:
        UserError: somebody has changed `summary.json`, and not for the better.
    """
    try:
        print(f"final loss            {summary['final_loss']:.4f}")
        for key, name in (
            ("linear_probe_accuracy", "linear probe"),
            ("pixel_probe_accuracy", "  on raw pixels"),
            ("knn_accuracy", "kNN"),
            ("few_label_accuracy_encoder", "{} labels per class"),
            ("few_label_accuracy_pixels", "  on raw pixels"),
            ("finetune_accuracy", "fine-tuned"),
        ):
            value = summary.get(key)
            if isinstance(value, dict):
                name = name.format(value["labels_per_class"])
                print(
                    f"{name:21} {value['mean']:.1%} ± {value['sd']:.1%} over {value['draws']} draws"
                )
            elif value is not None:
                print(f"{name:21} {value:.1%}")
        if "verdict" in summary:
            print(f"verdict               {summary['verdict']}")
        print(f"time                  {progress.format_seconds(summary['seconds'])}")
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'summary.json'} is damaged: {error!r}") from error
    runs.print_folder(folder)


def print_what_next(
    summary: dict[str, Any], config: PretrainingConfig, data: datasets.ImageData, folder: Path
) -> None:
    """Print how far a small test set is to be trusted, and a command that uses the encoder."""
    if "linear_probe_accuracy" in summary and len(data.test) < 1000:
        count, found = len(data.test), summary["linear_probe_accuracy"]
        low, high = scores.accuracy_interval(found, count)
        interval = f"{low:.1%} to {high:.1%}"
        print(f"the linear probe's 95 % interval, of {count} test images, is {interval}")
    if data.classes:
        words = ["few_labels.py", str(folder)]
        words += ["--methods", "mean,linear,spreading"]  # those that take seconds
        if config.evaluate_on != "test":
            words += ["--evaluate-on", "validation"]
        print("What it buys when few images have labels:")
    else:
        words = ["embed.py", str(folder), config.dataset]
        print("What it sees in them:")
    print("  python", shlex.join(words))
