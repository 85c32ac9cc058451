"""Several processes on the CPU (gloo) against one with the same global batch."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import functions
import pretraining
import simclr
import simsiam

ROOT = Path(__file__).resolve().parent.parent
WORKER = """
import sys, torch, pathlib
sys.path[:0] = [{root!r}, {tests!r}]
torch.set_num_threads(1)
import test_distributed
test_distributed.worker({folder!r})
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Model(nn.Module):
    """Without BatchNorm, which on the CPU has each process's own statistics."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh())
        self.head = nn.Linear(24, 16)
        self.predictor = nn.Linear(16, 16)
        self.kind = kind

    def forward(self, images):
        z = self.head(self.encoder(images))
        return (z, self.predictor(z)) if self.kind == "simsiam" else z + 0 * self.predictor(z)

    @property
    def projector(self):
        return self.head


def settings(kind):
    shared = {"dataset": "digits", "batch_size": 32, "epochs": 1, "knn_every": 0, "device": "cpu"}
    shared |= {"precision": "float32", "learning_rate": 0.1, "keep_every": 0}
    return (simsiam if kind == "simsiam" else simclr).Config(**shared)


def worker(folder):
    """Trainings of five steps; rank 0 saves their losses, first gradients and weights."""
    world = int(os.environ["WORLD_SIZE"])
    fabric = functions.make_fabric("cpu", "float32", world)
    fabric.launch()
    train = functions.load_images("digits").train.select(torch.arange(5 * 32))
    step, results = pretraining.Pretraining.step, {}
    for name in ("simclr", "simsiam", "wrong scale"):
        kind = "simsiam" if name == "simsiam" else "simclr"
        scale = world if name == "wrong scale" else 1
        model, gradients, losses = Model(kind), [], []

        def spy(self, loss, z, model=model, gradients=gradients, losses=losses, scale=scale):
            step(self, loss * scale, z)
            losses.append(self.losses.values[self.losses.step - 1].item())
            gradients.append([p.grad.clone() for p in model.parameters()])

        pretraining.Pretraining.step = spy
        subfolder = Path(folder) / name
        subfolder.mkdir(exist_ok=True)
        {"simclr": simclr, "simsiam": simsiam}[kind].pretrain(
            model, train, settings(kind), subfolder, fabric
        )
        results[name] = (losses, gradients[0], list(model.state_dict().values()))
    if fabric.global_rank == 0:
        torch.save(results, Path(folder) / "result.pt")


def run(world, folder):
    code = WORKER.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(folder))
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "GROUP_RANK": "0"}
    environment |= {"LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "none"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    assert [process.wait(120) for process in processes] == [0] * world
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(1, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def together(tmp_path_factory, request):
    return run(request.param, tmp_path_factory.mktemp("together"))


def difference(ours, expected):
    return max((a - b).abs().max().item() for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("kind", ["simclr", "simsiam"])
def test_several_processes_train_as_one(alone, together, kind):
    losses, gradients, weights = together[kind]
    assert len(losses) == 5
    assert losses[0] == pytest.approx(alone[kind][0][0], abs=1e-6)
    assert difference(gradients, alone[kind][1]) < 1e-6
    assert difference(weights, alone[kind][2]) < 1e-5
    assert max(g.abs().max() for g in gradients) > 1e-3


def test_a_wrong_scale_is_noticed(alone, together):
    _, gradients, weights = together["wrong scale"]
    assert difference(gradients, alone["simclr"][1]) > 1e-3
    assert difference(weights, alone["simclr"][2]) > 1e-3


def test_loss_of_parts_is_the_loss_of_the_whole():
    torch.manual_seed(0)
    z = torch.randn(24, 8)
    whole = simclr.nt_xent_loss(z, 0.3)
    parts = []
    for rank in range(3):
        part = torch.arange(12)[4 * rank : 4 * rank + 4]
        rows = torch.cat((part, part + 12))
        parts.append(simclr.nt_xent_loss(z[rows], 0.3, z, rows))
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


@pytest.mark.parametrize("shape", [(6,), (6, 5), (3, 6, 5)])
def test_shards_draw_what_one_process_draws(shape):
    dim = shape.index(6)
    whole = functions.draw(shape, torch.Generator().manual_seed(3), "cpu", dim)
    assert whole.shape == shape
    for rows in (torch.tensor([0, 1, 4]), torch.tensor([2, 3, 5])):
        shard = functions.Shard(torch.Generator().manual_seed(3), rows, 6)
        local = tuple(3 if i == dim else size for i, size in enumerate(shape))
        part = functions.draw(local, shard, "cpu", dim)
        assert torch.equal(part, whole.index_select(dim, rows))


def test_sharded_views_are_those_of_one_process():
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    config = simclr.Config(blur_probability=0.5)
    pairs = images.repeat(2, 1, 1, 1)
    whole = pretraining.crop_views(pairs, config, torch.Generator().manual_seed(1))
    augmented = simsiam.make_views(pairs, simsiam.Config(), None, torch.Generator().manual_seed(1))
    for rank in range(2):
        part = torch.arange(8)[4 * rank : 4 * rank + 4]
        rows = torch.cat((part, part + 8))
        shard = functions.Shard(torch.Generator().manual_seed(1), rows, 16)
        views = pretraining.crop_views(pairs[rows], config, shard)
        torch.testing.assert_close(views, whole[rows])
        shard = functions.Shard(torch.Generator().manual_seed(1), rows, 16)
        views = simsiam.make_views(pairs[rows], simsiam.Config(), None, shard)
        assert torch.equal(views, augmented[rows])


COMMAND = (
    *("simclr.py", "--dataset", "digits", "--encoder", "small", "--batch-size", "256"),
    *("--stages", "pretrain", "--knn-every", "2", "--devices", "2", "--device", "cpu"),
)


def start(folder, *flags):
    return subprocess.Popen(
        [sys.executable, *COMMAND, "--output-dir", str(folder), "--name", "run", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def test_two_devices_on_the_command_line(tmp_path):
    process = start(tmp_path, "--epochs", "2")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out.count("final loss") == 1  # one process prints
    assert "2 x " in out
    folder = tmp_path / "simclr" / "run"
    assert json.loads((folder / "config.json").read_text())["processes"] == 2
    assert len((folder / "metrics.csv").read_text().splitlines()) == 3
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


def children(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def wait_for_an_epoch(process, folder):
    for _ in range(600):
        if (folder / "checkpoint.pt").exists() or process.poll() is not None:
            break
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("victim", ["child", "parent"])
def test_a_killed_process_ends_all_and_the_run_goes_on_alone(tmp_path, victim):
    process = start(tmp_path, "--epochs", "400")
    folder = tmp_path / "simclr" / "run"
    wait_for_an_epoch(process, folder)
    others = children(process.pid)
    assert others
    os.kill(others[0] if victim == "child" else process.pid, signal.SIGKILL)
    _, err = process.communicate(timeout=30)  # its pipes are shared: all are gone
    assert process.returncode != 0
    if victim == "child":
        assert "Traceback" not in err
    done = functions.load_checkpoint(folder / "checkpoint.pt", "simclr")["epoch"]
    assert done >= 1
    config = functions.load_config(simclr.Config, folder)
    config = dataclasses.replace(config, resume=str(folder), devices=1, stages="probe")
    with pytest.raises(functions.UserError, match="finished"):  # and can be read by one process
        simclr.main(config)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_terminal_or_batch_system_stops_all_processes(tmp_path, number, code):
    process = start(tmp_path, "--epochs", "400")
    folder = tmp_path / "simclr" / "run"
    wait_for_an_epoch(process, folder)
    assert children(process.pid)
    began = time.monotonic()
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert process.returncode == code
    (line,) = err.splitlines()
    assert f"--resume {folder}" in line
    assert functions.load_checkpoint(folder / "checkpoint.pt", "simclr")["epoch"] >= 1


def test_more_devices_than_there_are(user_error, monkeypatch):
    with user_error("--batch-size 512", "--devices 3"):
        simclr.Config(devices=3)
    monkeypatch.setattr(functions, "pick_device", lambda device: "mps")  # one at most
    with user_error("--devices 2", "has 1 of mps"):
        functions.make_fabric("mps", "float32", 2)
    monkeypatch.undo()
    with user_error("--devices 100000", "of cpu"):
        functions.make_fabric("cpu", "float32", 100_000)
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda backend: False)
    with user_error("--devices 2", "gloo"):
        functions.make_fabric("cpu", "float32", 2)


def test_a_slurm_job_that_lightning_refuses_is_one_line(user_error, monkeypatch):
    for name, value in {"NTASKS": "2", "NNODES": "1", "PROCID": "0", "JOB_NAME": "x"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    with user_error("SLURM", "--ntasks-per-node=2"):
        functions.make_fabric("cpu", "float32", 2)


def test_ddp_mean_is_what_the_exact_gradient_needs():
    """The closed form behind `gather`: mean over ranks of local means, gradients summed."""
    torch.manual_seed(0)
    z = torch.randn(8, 4, requires_grad=True)
    whole = simclr.nt_xent_loss(z, 0.5)
    (expected,) = torch.autograd.grad(whole, z)
    total = torch.zeros_like(z)
    for rank in range(2):
        part = torch.arange(4)[2 * rank : 2 * rank + 2]
        rows = torch.cat((part, part + 4))
        (gradient,) = torch.autograd.grad(simclr.nt_xent_loss(z[rows], 0.5, z, rows), z)
        total += gradient / 2
    torch.testing.assert_close(total, expected)
    assert F.mse_loss(2 * total, expected) > 1e-6


@pytest.mark.parametrize(
    ("environment", "devices", "layout"),
    [
        ({}, 4, (4, 1)),
        ({"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "x"}, 1, (4, 2)),
        ({"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "x"}, 4, (4, 2)),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "x"}, 4, "--devices 4, but SLURM starts 1 "),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "interactive"}, 4, (4, 1)),
        (
            {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"},
            4,
            "--devices 4, but torchrun starts 2 ",
        ),
    ],
)
def test_processes_are_those_that_are_started(
    monkeypatch, user_error, environment, devices, layout
):
    for name in ("SLURM_NTASKS", "SLURM_NNODES", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = simclr.Config(devices=devices)
    if isinstance(layout, str):
        with user_error(layout):
            functions.process_layout(config)
    else:
        assert functions.process_layout(config) == layout


def test_what_one_process_meets_is_said_by_it(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for error, said in (
        (torch.OutOfMemoryError(), "process 1: error: words\n"),
        (functions.UserError(), ""),  # which all processes meet
    ):
        with pytest.raises(SystemExit):
            functions._exit_with(1, "error: words", error)
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"RANK": "5", "LOCAL_RANK": "1"}, 5),  # torchrun
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, 3),  # srun
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "2"}, 2),  # --devices 4 in an interactive SLURM job
    ],
)
def test_rank_of_a_process(monkeypatch, environment, rank):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert functions.process_rank() == rank


def test_independent_processes_under_srun_all_say_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(SystemExit):
        functions._exit_with(2, "error: no such file", ValueError())
    assert capsys.readouterr().err == "error: no such file\n"
