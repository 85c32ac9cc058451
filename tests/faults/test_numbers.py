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
import shlex
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fault_tools import REPOSITORY, digest, result_of, rows_of
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

import functions
import rnn
import rnn_hyperparameter_tune as tune
import simclr
import simsiam
from functions import Diverged

pytestmark = pytest.mark.slow

CPU_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 17179869184 bytes. Error code 12 (Cannot allocate memory)\nmore lines"
)
OUT_OF_MEMORY = {
    "CPU": lambda: RuntimeError(CPU_MEMORY),
    "GPU": lambda: torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"
    ),
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
PRETRAINING |= {"labels": "100", "label_seeds": 2, "label_steps": 4, "name": "run"}
STEPS = 5  # of an epoch of 1,437 images
ROWS = {"dataset": "digits", "cells": "gru", "hidden_size": 8, "batch_size": 256, "epochs": 3}
ROWS |= {"device": "cpu", "name": "run"}


def pretraining(module, stage, **changes):
    values = {**PRETRAINING, "stages": stage if stage == "pretrain" else f"pretrain,{stage}"}
    name = module.__name__
    return SimpleNamespace(
        module=module,
        script=name,
        stage=stage,
        config=lambda folder: module.Config(output_dir=str(folder), **{**values, **changes}),
        folder=lambda folder: folder / name / "run",
        # The only function whose calls belong to this training and no other.
        loss={
            "simclr": (simclr, "nt_xent_loss"),
            "simsiam": (simsiam, "negative_cosine_similarity"),
        }[name]
        if stage == "pretrain"
        else (F, "cross_entropy"),
        calls=2 if (name, stage) == ("simsiam", "pretrain") else 1,  # of the loss, a step
    )


TRAININGS = {
    "simclr": pretraining(simclr, "pretrain"),
    "simsiam": pretraining(simsiam, "pretrain"),
    "rnn": SimpleNamespace(
        module=rnn,
        script="rnn",
        stage="train",
        config=lambda folder: rnn.Config(output_dir=str(folder), **ROWS),
        folder=lambda folder: folder / "rnn" / "run",
        loss=(rnn, "loss_function"),
        calls=1,
    ),
    "finetune": pretraining(simclr, "finetune", finetune_epochs=3),
    "study": pretraining(simclr, "study"),
    "probe": pretraining(simclr, "probe"),
}
every_training = pytest.mark.parametrize("name", TRAININGS)
# Steps in the first, a later and the last epoch; the last one is followed by no other loss. A
# training of the study takes 4 steps in 4 epochs, the probe 3 in each of 3.
WHERE = {
    **{name: {1: (1, 1), 8: (2, 3), 15: (3, 5)} for name in ("simclr", "simsiam", "rnn")},
    "finetune": {1: (1, 1), 8: (2, 3), 15: (3, 5)},
    "study": {1: (1, 1), 7: (3, 1), 40: (4, 1)},
    "probe": {1: (1, 1), 5: (2, 2), 9: (3, 3)},
}
EVERYWHERE = [(name, step) for name, steps in WHERE.items() for step in steps]


@pytest.fixture
def steps_done():
    """A list that grows by an entry with every update of a weight."""
    done = []
    hook = register_optimizer_step_post_hook(lambda *_: done.append(1))
    yield done
    hook.remove()


def spoil(patch, training, step, fault):
    """Let `fault` change the loss of the training's step number `step`; say when it begins."""
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


LOSSES = {
    "nan": lambda loss: loss * math.nan,
    "inf": lambda loss: loss * math.inf,
    "-inf": lambda loss: loss * -math.inf,
}
GRADIENTS = {
    "nan": lambda loss: Poison.apply(loss, math.nan),
    "inf": lambda loss: Poison.apply(loss, math.inf),
    # Finite, but its square, which Adam keeps, is not: that weight would never move again.
    "square overflows": lambda loss: Poison.apply(loss, 1e30),
}


@pytest.fixture
def on_terminal(monkeypatch, capsys):
    """Runs a script's `main` as its command line does; returns exit code and error lines."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}

    def start(training, *arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [f"{training.script}.py", *map(str, arguments)])
        code = 0
        try:
            functions.run_script(training.module.main, training.module.Config, "")
        except SystemExit as left:
            code = left.code
        return code, capsys.readouterr().err.splitlines()

    yield start
    for number, handler in before.items():
        signal.signal(number, handler)


def arguments_of(training, folder):
    """The command line of a training's config."""
    config, words = training.config(folder), []
    for name, value in vars(config).items():
        if value != getattr(training.module.Config, name):
            words += [functions.flag(name), str(value)]
    return words


def outcome(training, folder):
    """What a run leaves, without times: weights, tables, and numbers."""
    found = {"result": result_of(folder, training.script)}
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
            folder, training = tmp_path_factory.mktemp(name), TRAININGS[name]
            with contextlib.redirect_stdout(io.StringIO()):
                training.module.main(training.config(folder))
            known[name] = outcome(training, training.folder(folder))
        return known[name]

    return ask


def check_kept(folder, script):
    """Every file of weights is whole and finite, and so is the optimizer's state."""
    for path in folder.glob("*checkpoint.pt"):
        kind = script if path.name == "checkpoint.pt" else f"{script}-finetune"
        state = functions.load_checkpoint(path, kind)
        assert all(value.isfinite().all() for value in state["model"].values()), path
        for values in state["optimizer"]["state"].values():
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    assert value.isfinite().all(), f"{path}: the optimizer's {key}"
    for path in folder.glob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values()), path
    for path in folder.glob("*.csv"):
        for row in rows_of(path):
            assert not {"nan", "inf", "-inf"} & set(row.values()), f"{path}: {row}"
    if (folder / "summary.json").exists():
        text = (folder / "summary.json").read_text()
        assert not re.search("NaN|Infinity", text), text


@pytest.mark.parametrize(("name", "step"), EVERYWHERE)
@pytest.mark.parametrize("value", LOSSES)
def test_loss_that_is_not_finite_stops_before_the_update(
    tmp_path, monkeypatch, on_terminal, steps_done, uninterrupted, name, step, value
):
    training = TRAININGS[name]
    folder = training.folder(tmp_path)
    before = 0 if training.stage in ("pretrain", "train") else 3 * STEPS
    with monkeypatch.context() as patch:
        spoil(patch, training, step, LOSSES[value])
        code, errors = on_terminal(training, *arguments_of(training, tmp_path))
    assert code == 1
    (line,) = errors
    # The study's steps are those of one of its trainings.
    epoch, within = WHERE[name][step]
    assert f"epoch {epoch}, step {within}" in line
    assert line.startswith("error: ")
    assert str(folder) in shlex.split(line[line.index("python ") :])
    assert len(steps_done) == before + step - 1
    check_kept(folder, training.script)
    assert not list(folder.rglob("*.tmp"))
    code, errors = on_terminal(training, "--resume", folder)
    assert (code, errors) == (0, [])
    assert outcome(training, folder) == uninterrupted(name)


@pytest.mark.parametrize(("name", "step"), EVERYWHERE)
@pytest.mark.parametrize("value", GRADIENTS)
def test_gradient_that_is_not_finite_reaches_no_file(
    tmp_path, monkeypatch, on_terminal, uninterrupted, name, step, value
):
    training = TRAININGS[name]
    folder = training.folder(tmp_path)
    with monkeypatch.context() as patch:
        spoil(patch, training, step, GRADIENTS[value])
        code, errors = on_terminal(training, *arguments_of(training, tmp_path))
    check_kept(folder, training.script)
    if value == "square overflows" and code == 0:
        return  # SGD keeps no squares: a huge step, after which all is finite
    assert code == 1
    (line,) = errors
    assert re.search(r"epoch \d+", line)
    code, errors = on_terminal(training, "--resume", folder)
    assert (code, errors) == (0, [])
    assert outcome(training, folder) == uninterrupted(name)


@every_training
@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_lack_of_memory_is_one_line_with_a_hint(
    tmp_path, monkeypatch, on_terminal, uninterrupted, name, kind
):
    training = TRAININGS[name]
    folder = training.folder(tmp_path)
    step = list(WHERE[name])[1]
    with monkeypatch.context() as patch:
        spoil(patch, training, step, raises(OUT_OF_MEMORY[kind]))
        code, errors = on_terminal(training, *arguments_of(training, tmp_path))
    assert code == 1
    (line,) = errors
    assert "out of memory" in line
    assert "--batch-size" in line
    assert str(folder) in line
    check_kept(folder, training.script)
    code, errors = on_terminal(training, "--resume", folder)
    assert (code, errors) == (0, [])
    assert outcome(training, folder) == uninterrupted(name)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(CPU_MEMORY), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (torch.OutOfMemoryError("anything"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyError("out of memory"), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_lack_of_memory_looks_like(error, expected):
    assert functions.is_out_of_memory(error) == expected


@pytest.mark.parametrize(
    "words",
    [
        "rnn.py --cells gru --hidden-size 2000000",
        "simclr.py --encoder small --projection-hidden 1000000000000",
    ],
)
def test_real_lack_of_memory_on_the_command_line(tmp_path, words):
    script, *rest = words.split()
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / script), *rest, "--dataset", "digits", "--device", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert done.returncode in (1, 2)


# the sweep


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Runs a small sweep of four trials whose step `step` has `fault`; returns trials.csv."""
    small = {"hidden_size": [8], "num_layers": [1], "batch_size": [256]}
    monkeypatch.setattr(tune, "SPACE", {**tune.SPACE, **small})
    monkeypatch.setattr(tune, "draw", lambda *_: None)
    training = SimpleNamespace(loss=(rnn, "loss_function"), calls=1)

    def start(step, fault):
        config = tune.Config(
            dataset="digits",
            cell="gru",
            trials=4,
            max_epochs=2,
            pruner="none",
            device="cpu",
            output_dir=str(tmp_path),
            name="run",
        )
        with monkeypatch.context() as patch:
            if fault is not None:
                spoil(patch, training, step, fault)
            best = tune.main(config)
        folder = tmp_path / "rnn_hyperparameter_tune" / "run"
        assert json.loads((folder / "best.json").read_text()) == best
        with (folder / "trials.csv").open(newline="") as file:
            return best, list(csv.DictReader(file))

    return start


# 1,293 images in 5 steps an epoch, 10 a trial: number 12 is the second of the second trial.
@pytest.mark.parametrize(("step", "where"), [(12, (1, 2)), (20, (2, 5))])
@pytest.mark.parametrize("value", LOSSES)
def test_diverged_trial_fails_with_its_reason_and_the_sweep_goes_on(
    sweep, steps_done, step, where, value
):
    best, rows = sweep(step, LOSSES[value])
    assert [row["state"] for row in rows] == ["complete", "fail", "complete", "complete"]
    assert f"epoch {where[0]}, step {where[1]}" in rows[1]["reason"]
    assert len(steps_done) == 30 + step - 11
    assert math.isfinite(best["validation_loss"])
    assert best["trial"] != 1


@pytest.mark.parametrize("step", [12, 20])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_trial_whose_gradient_is_not_finite_fails(sweep, step, value):
    best, rows = sweep(step, GRADIENTS[value])
    assert [row["state"] for row in rows] == ["complete", "fail", "complete", "complete"]
    assert re.search("epoch|validation loss", rows[1]["reason"])
    assert math.isfinite(best["validation_loss"])


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_trial_without_memory_fails_with_its_reason_and_the_sweep_goes_on(sweep, kind):
    _, rows = sweep(12, raises(OUT_OF_MEMORY[kind]))
    assert [row["state"] for row in rows] == ["complete", "fail", "complete", "complete"]
    assert "out of memory" in rows[1]["reason"]
    assert len(rows[1]["reason"].splitlines()) == 1


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
@pytest.mark.parametrize("place", ["make_model", "Batches", "make_optimizer", "evaluate"])
def test_trial_whose_memory_runs_out_anywhere_fails_alone(sweep, monkeypatch, place, kind):
    original, calls = getattr(rnn, place), []

    def limited(*arguments, **options):
        calls.append(1)
        if len(calls) == 2 * (place == "evaluate") + 2:
            raise OUT_OF_MEMORY[kind]()
        return original(*arguments, **options)

    monkeypatch.setattr(rnn, place, limited)
    _, rows = sweep(0, None)
    assert [row["state"] for row in rows].count("fail") == 1
    assert len(rows) == 4
    (reason,) = [row["reason"] for row in rows if row["state"] == "fail"]
    assert "out of memory" in reason


# the pieces


def test_checkpoint_takes_no_optimizer_that_is_not_finite(tmp_path):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters())
    path = tmp_path / "checkpoint.pt"
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    functions.save_checkpoint(path, "simclr", 1, model, optimizer, [], simclr.Config())
    before = path.read_bytes()
    optimizer.state[model.weight]["exp_avg_sq"][1, 1] = math.inf
    with pytest.raises(Diverged, match="epoch 2"):
        functions.save_checkpoint(path, "simclr", 2, model, optimizer, [], simclr.Config())
    assert path.read_bytes() == before


def test_probe_does_not_report_numbers_of_weights_that_are_not_finite(monkeypatch):
    features, labels = torch.randn(600, 4, generator=torch.Generator().manual_seed(0)), None
    labels = (features[:, 0] > 0).long()
    training = SimpleNamespace(loss=(F, "cross_entropy"), calls=1)
    spoil(monkeypatch, training, 4, GRADIENTS["nan"])  # the last step of two epochs
    with pytest.raises(Diverged, match="epoch 2"):
        functions.linear_probe(features, labels, features, labels, epochs=2)
