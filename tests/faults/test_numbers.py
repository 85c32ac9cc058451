"""Numbers that are not finite, and memory that runs out, in every training.

A fault is put into the loss of step k of one training: the loss itself is NaN or infinite, or it is
finite and its gradient is not, or the allocator gives up. `steps_done` counts the updates that the
optimizers really made.
"""

import contextlib
import csv
import io
import json
import math
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from commands import REPOSITORY, last_words, rows_of
from fault_tools import digest, result_of
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

import moco
import rnn
import rnn_hyperparameter_tune as tune
import simclr
import simsiam
from support import checkpoints, runs, settings
from support.errors import Diverged

pytestmark = pytest.mark.slow

OUT_OF_MEMORY = {
    "CPU": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 17179869184 bytes. Error code 12\nmore lines"
    ),
    "GPU": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "Python": MemoryError,
}


class Poison(torch.autograd.Function):
    """The same value, with a gradient times `factor`."""

    @staticmethod
    def forward(context, value, factor):
        context.factor = factor
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * context.factor, None


PRETRAINING = {"dataset": "digits", "encoder": "small", "epochs": 3, "batch_size": 256}
PRETRAINING |= {"knn_every": 0, "probe_epochs": 3, "few_labels": 0, "device": "cpu"}
PRETRAINING |= {"name": "run", "checkpoint_seconds": 0.0}
STEPS = 5  # of an epoch of 1,437 images
ROWS = {"dataset": "digits", "cells": "gru", "hidden_size": 8, "batch_size": 256, "epochs": 3}
ROWS |= {"device": "cpu", "name": "run", "checkpoint_seconds": 0.0}


def pretraining(module, stage, where, **changes):
    values = {**PRETRAINING, "stages": stage if stage == "pretrain" else f"pretrain,{stage}"}
    losses = {"simclr": (simclr, "nt_xent_loss")}
    losses["moco"] = (moco, "info_nce_loss")
    losses["simsiam"] = (simsiam, "negative_cosine_similarity")
    return SimpleNamespace(
        module=module,
        stage=stage,
        config=lambda folder: module.Config(output_dir=str(folder), **{**values, **changes}),
        # The only function whose calls belong to this training and no other.
        loss=losses[module.Config.SCRIPT] if stage == "pretrain" else (F, "cross_entropy"),
        calls=2 if (module, stage) == (simsiam, "pretrain") else 1,  # of the loss, a step
        where=where,
    )


# `where` are steps: in a later epoch, and the last one, which no other loss follows; each with its
# epoch and its number there. The probe takes 3 steps in each of 3 epochs.
USUAL = {8: (2, 3), 15: (3, 5)}
TRAININGS = {
    "simclr": pretraining(simclr, "pretrain", USUAL),
    "simsiam": pretraining(simsiam, "pretrain", USUAL),
    "moco": pretraining(moco, "pretrain", USUAL),
    "rnn": SimpleNamespace(
        module=rnn,
        stage="train",
        config=lambda folder: rnn.Config(output_dir=str(folder), **ROWS),
        loss=(rnn, "loss_function"),
        calls=1,
        where=USUAL,
    ),
    "finetune": pretraining(simclr, "finetune", USUAL, finetune_epochs=3),
    "probe": pretraining(simclr, "probe", {5: (2, 2), 9: (3, 3)}),
}
EVERYWHERE = [(name, step) for name, training in TRAININGS.items() for step in training.where]


def folder_of(training, place):
    return place / training.module.Config.SCRIPT / "run"


@pytest.fixture
def steps_done():
    """A list that grows by an entry with every update of a weight."""
    done = []
    hook = register_optimizer_step_post_hook(lambda *_: done.append(1))
    yield done
    hook.remove()


def spoil(patch, training, step, fault):
    """Let `fault` change the loss of the training's step number `step`."""
    module, name = training.loss
    original, calls = getattr(module, name), []

    def spoiled(*arguments, **options):
        loss = original(*arguments, **options)
        if torch.is_grad_enabled() and loss.requires_grad:
            calls.append(1)
            if len(calls) == (step - 1) * training.calls + 1:
                return fault(loss)
        return loss

    patch.setattr(module, name, spoiled)


def raises(make):
    def fault(loss):
        raise make()

    return fault


LOSSES = {"nan": lambda loss: loss * math.nan, "inf": lambda loss: loss * math.inf}
GRADIENTS = {
    "nan": lambda loss: Poison.apply(loss, math.nan),
    # Finite, but its square, which Adam keeps, is not: that weight would never move again.
    "square overflows": lambda loss: Poison.apply(loss, 1e30),
}


@pytest.fixture
def on_terminal(monkeypatch, capsys):
    """Runs a script's `main` as its command line does; returns exit code and last words."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}

    def start(training, *arguments):
        capsys.readouterr()
        script = training.module.Config.SCRIPT
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        code = 0
        try:
            runs.run_script(training.module.main, training.module.Config, "")
        except SystemExit as left:
            code = left.code
        return code, last_words(capsys.readouterr().err)

    yield start
    for number, handler in before.items():
        signal.signal(number, handler)


def arguments_of(training, folder):
    """The command line of a training's config."""
    config, words = training.config(folder), []
    for name, value in vars(config).items():
        if value != getattr(training.module.Config, name):
            words += [settings.flag(name), str(value)]
    return words


def outcome(folder):
    """What a run leaves, without times: weights, tables, and numbers."""
    found = {"result": result_of(folder)}
    for path in sorted(folder.glob("*.csv")):
        found[path.name] = rows_of(path)
    for path in sorted(folder.glob("*.safetensors")):
        found[path.name] = digest(load_file(path))
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text())
        found["summary"] = {k: v for k, v in summary.items() if not k.endswith("seconds")}
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """By training: what it leaves without a fault, made when it is first asked for."""
    known = {}

    def ask(name):
        if name not in known:
            place, training = tmp_path_factory.mktemp(name), TRAININGS[name]
            with contextlib.redirect_stdout(io.StringIO()):
                training.module.main(training.config(place))
            known[name] = outcome(folder_of(training, place))
        return known[name]

    return ask


def check_kept(folder):
    """Every file of weights is whole and finite, and so is the optimizer's state."""
    for path in folder.glob("*checkpoint.pt"):
        state = checkpoints.load(path)
        kept = [state["model"], *state["optimizer"]["state"].values()]
        for values in kept:
            for key, value in values.items():
                assert not isinstance(value, torch.Tensor) or value.isfinite().all(), (path, key)
    for path in folder.glob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values()), path
    for path in folder.glob("*.csv"):
        for row in rows_of(path):
            assert not {"nan", "inf", "-inf"} & set(row.values()), f"{path}: {row}"
    if (folder / "summary.json").exists():
        text = (folder / "summary.json").read_text()
        assert not re.search("NaN|Infinity", text), text


def check_goes_on(on_terminal, training, folder, expected):
    """What is kept is good, and resuming it ends as if nothing had happened."""
    check_kept(folder)
    code, errors = on_terminal(training, "--resume", folder)
    assert (code, errors) == (0, [])
    assert outcome(folder) == expected


@pytest.mark.parametrize(("name", "step"), EVERYWHERE)
@pytest.mark.parametrize("value", LOSSES)
def test_loss_that_is_not_finite_stops_before_the_update(
    tmp_path, monkeypatch, on_terminal, steps_done, uninterrupted, name, step, value
):
    training = TRAININGS[name]
    folder = folder_of(training, tmp_path)
    with monkeypatch.context() as patch:
        spoil(patch, training, step, LOSSES[value])
        code, errors = on_terminal(training, *arguments_of(training, tmp_path))
    assert code == 1
    (line,) = errors
    epoch, within = training.where[step]
    assert f"epoch {epoch}, step {within}" in line
    before = 0 if training.stage in ("pretrain", "train") else 3 * STEPS
    assert len(steps_done) == before + step - 1
    assert not list(folder.rglob("*.tmp"))
    check_goes_on(on_terminal, training, folder, uninterrupted(name))


@pytest.mark.parametrize(("name", "step"), EVERYWHERE)
@pytest.mark.parametrize("value", GRADIENTS)
def test_gradient_that_is_not_finite_reaches_no_file(
    tmp_path, monkeypatch, on_terminal, uninterrupted, name, step, value
):
    training = TRAININGS[name]
    folder = folder_of(training, tmp_path)
    with monkeypatch.context() as patch:
        spoil(patch, training, step, GRADIENTS[value])
        code, errors = on_terminal(training, *arguments_of(training, tmp_path))
    if value == "square overflows" and code == 0:
        check_kept(folder)
        return  # SGD keeps no squares: a huge step, after which all is finite
    assert code == 1
    (line,) = errors
    assert re.search(r"epoch \d+", line)
    check_goes_on(on_terminal, training, folder, uninterrupted(name))


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "CPU") for name in TRAININGS), ("simclr", "GPU"), ("simclr", "Python")],
)
def test_lack_of_memory_is_one_line_with_a_hint(
    tmp_path, monkeypatch, on_terminal, uninterrupted, name, kind
):
    training = TRAININGS[name]
    folder = folder_of(training, tmp_path)
    with monkeypatch.context() as patch:
        spoil(patch, training, min(training.where), raises(OUT_OF_MEMORY[kind]))
        code, errors = on_terminal(training, *arguments_of(training, tmp_path))
    assert code == 1
    (line,) = errors
    assert all(part in line for part in ("out of memory", "--batch-size", str(folder)))
    check_goes_on(on_terminal, training, folder, uninterrupted(name))


def test_real_lack_of_memory_on_the_command_line(tmp_path):
    words = "--dataset digits --device cpu --encoder small --projection-hidden 1000000"
    limited = ["bash", "-c", 'ulimit -v 6000000; exec "$@"', "bash", sys.executable]
    words += " --projection-size 1000000 --name run"
    done = subprocess.run(
        [*limited, str(REPOSITORY / "simclr.py"), *words.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (line,) = last_words(done.stderr)
    assert "out of memory" in line
    assert done.returncode == 1


# the sweep


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Runs a small sweep of four trials whose step `step` has `fault`; returns trials.csv."""
    small = {"hidden_size": [8], "num_layers": [1], "batch_size": [256]}
    monkeypatch.setattr(tune, "SPACE", {**tune.SPACE, **small})
    training = SimpleNamespace(loss=(rnn, "loss_function"), calls=1)
    values = {"dataset": "digits", "cell": "gru", "trials": 4, "max_epochs": 2, "pruner": "none"}
    values |= {"device": "cpu", "name": "run"}

    def start(step, fault):
        with monkeypatch.context() as patch:
            spoil(patch, training, step, fault)
            best = tune.main(tune.Config(**values, output_dir=str(tmp_path)))
        folder = tmp_path / "rnn_hyperparameter_tune" / "run"
        assert math.isfinite(best["validation_loss"])
        assert best["trial"] != 1
        with (folder / "trials.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["state"] for row in rows] == ["complete", "fail", "complete", "complete"]
        return rows[1]["reason"]

    return start


# 1,293 images in 5 steps an epoch, 10 a trial: number 12 is the second of the second trial.
@pytest.mark.parametrize(("step", "where"), [(12, (1, 2)), (20, (2, 5))])
def test_diverged_trial_fails_with_its_reason_and_the_sweep_goes_on(sweep, steps_done, step, where):
    assert f"epoch {where[0]}, step {where[1]}" in sweep(step, LOSSES["nan"])
    assert len(steps_done) == 30 + step - 11


@pytest.mark.parametrize("step", [12, 20])
def test_trial_whose_gradient_is_not_finite_fails(sweep, step):
    assert re.search("epoch|validation loss", sweep(step, GRADIENTS["nan"]))


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_trial_without_memory_fails_with_its_reason_and_the_sweep_goes_on(sweep, kind):
    reason = sweep(12, raises(OUT_OF_MEMORY[kind]))
    assert "out of memory" in reason
    assert len(reason.splitlines()) == 1


def test_optimizer_that_is_not_finite_is_found():
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    checkpoints.check_finite(2, model, optimizer)
    optimizer.state[model.weight]["exp_avg_sq"][1, 1] = math.inf
    with pytest.raises(Diverged, match="epoch 2"):
        checkpoints.check_finite(2, model, optimizer)
