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
from pictures import unrendered
from torch import nn

import functions
import moco
import simclr
import simsiam
from support import augment, checkpoints, devices, errors, pretraining, runs, settings

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
        self.projector = nn.Linear(24, 16)
        self.predictor = nn.Linear(16, 16)
        self.kind = kind

    def forward(self, images):
        z = self.projector(self.encoder(images))
        return (z, self.predictor(z)) if self.kind == "simsiam" else z + 0 * self.predictor(z)


def train(module, data, folder, fabric, **changes):
    """Losses, first gradients and last weights of five steps."""
    config = module.Config(
        batch_size=32,
        epochs=1,
        knn_every=0,
        keep_every=0,
        device="cpu",
        precision="float32",
        learning_rate=0.1,
        **changes,
    )
    torch.manual_seed(0)
    model = moco.MoCo(config, 1, 8) if module is moco else Model(module.__name__)
    model, gradients, losses = model.double(), [], []
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    record = pretraining.Pretraining.record

    def spy(self, loss, z, views=None):
        if losses:  # the step before is done
            gradients.append([weight.grad.clone() for weight in trained])
        losses.append(fabric.all_reduce(loss.detach()).item())
        record(self, loss, z, views)

    folder.mkdir(parents=True)
    pretraining.Pretraining.record = spy
    try:
        with unrendered():
            module.pretrain(model, data, config, runs.Run(folder), fabric)
    finally:
        pretraining.Pretraining.record = record
    state = model.state_dict()
    # The running statistics are those of the first process's parts of the batch.
    return losses, gradients[0], [state[name] for name in state if "running" not in name]


def diverge(data, folder, fabric):
    """Whether this process stops when the last step of an epoch spoils the weights."""
    config = simclr.Config(batch_size=32, epochs=2, knn_every=0, device="cpu")
    model, monitor = Model("simclr").double(), functions.Monitor(data.train, 0, fabric)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    folder.mkdir()
    training = pretraining.Pretraining(
        model, optimizer, data.train, config, runs.Run(folder), fabric, monitor
    )
    try:
        for epoch in training.epochs():
            for _ in training.batches(epoch):
                training.record(torch.tensor(1.0), torch.rand(32, 16))
            model.projector.bias.data[3] = torch.nan
    except errors.Diverged as error:
        return "projector.bias is not finite after epoch 1" in str(error)
    return False


def worker(folder):
    """Trainings of five steps in float64; rank 0 saves what came of them."""
    world, folder = int(os.environ.get("WORLD_SIZE", 1)), Path(folder)
    torch.Tensor.float = torch.Tensor.double  # what asks for float32
    fabric = devices.make_fabric("cpu", "float32", world)
    fabric.launch()
    data = functions.load_images("digits")
    data = dataclasses.replace(data, train=data.train.select(torch.arange(5 * 32)))
    rank = fabric.global_rank
    results = {
        module.__name__: train(module, data, folder / f"{module.__name__}{rank}", fabric)
        for module in (simclr, simsiam)
    }
    for symmetric in (False, True):
        changes = {"encoder": "small", "queue_size": 96, "bn_splits": 4, "symmetric": symmetric}
        place = folder / f"moco{symmetric}{rank}"
        results[f"moco {symmetric}"] = train(moco, data, place, fabric, **changes)
    stopped = fabric.all_gather(torch.tensor(diverge(data, folder / f"nan{rank}", fabric)))
    results["stopped"] = stopped.flatten().tolist()
    if rank == 0:
        torch.save(results, folder / "result.pt")
    if world > 1:  # gloo's threads may abort a process that ends before the others are done
        fabric.barrier()
        torch.distributed.destroy_process_group()


def start_workers(world, folder):
    code = WORKER.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(folder))
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "GROUP_RANK": "0"}
    environment |= {"LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "none"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    to_float = torch.Tensor.float
    try:
        worker(folder)
    finally:
        torch.Tensor.float = to_float
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def together(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("together")
    processes = start_workers(request.param, folder)
    try:
        assert [process.wait(120) for process in processes] == [0] * request.param
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return torch.load(folder / "result.pt", weights_only=True)


def difference(ours, expected):
    return max((a - b).abs().max().item() for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("kind", ["simclr", "simsiam", "moco False", "moco True"])
def test_several_processes_train_as_one(alone, together, kind):
    losses, gradients, weights = together[kind]
    assert len(losses) == 5
    assert losses == pytest.approx(alone[kind][0], abs=1e-9)
    assert difference(gradients, alone[kind][1]) < 1e-9
    assert difference(weights, alone[kind][2]) < 1e-9
    assert max(g.abs().max() for g in gradients) > 1e-3


def test_all_processes_stop_when_a_weight_is_not_finite(together):
    assert len(together["stopped"]) >= 2
    assert all(together["stopped"])


def test_sharded_views_are_those_of_one_process():
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    config = simclr.Config(blur_probability=0.5)
    pairs = images.repeat(2, 1, 1, 1)
    whole = pretraining.crop_views(pairs, config, torch.Generator().manual_seed(1))
    batch = (0, images, torch.Generator().manual_seed(1))
    ((_, _, augmented),) = simsiam.make_views(iter([batch]), simsiam.Config(), None)
    for rank in range(2):
        part = torch.arange(8)[4 * rank : 4 * rank + 4]
        rows = torch.cat((part, part + 8))
        shard = augment.Shard(torch.Generator().manual_seed(1), rows, 16)
        views = pretraining.crop_views(pairs[rows], config, shard)
        torch.testing.assert_close(views, whole[rows])
        shard = augment.Shard(torch.Generator().manual_seed(1), rows, 16)
        batch = (0, images[part], shard)
        ((_, _, views),) = simsiam.make_views(iter([batch]), simsiam.Config(), None)
        assert torch.equal(views, augmented[rows])


COMMAND = (
    *("simclr.py", "--dataset", "digits", "--encoder", "small", "--batch-size", "256"),
    *("--stages", "pretrain", "--knn-every", "2", "--devices", "2", "--device", "cpu"),
    *("--checkpoint-seconds", "0"),  # after every epoch
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


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_devices_on_the_command_line(tmp_path):
    process = start(tmp_path, "--epochs", "2")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
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
        assert f"--resume {folder}" in err
    done = checkpoints.load(folder / "checkpoint.pt")["epoch"]
    assert done >= 1
    config = settings.load_config(simclr.Config, folder)
    config = dataclasses.replace(config, resume=str(folder), devices=1, stages="probe")
    with pytest.raises(errors.UserError, match="finished"):  # and can be read by one process
        simclr.main(config)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_terminal_or_batch_system_stops_all_processes(tmp_path, number, code):
    process = start(tmp_path, "--epochs", "400")
    folder = tmp_path / "simclr" / "run"
    wait_for_an_epoch(process, folder)
    assert children(process.pid)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=30)  # not the minutes that a collective would wait
    assert process.returncode == code
    # The others may find that the first one has gone before they find their own signal.
    (line,) = [line for line in err.splitlines() if line.startswith("stopped by ")]
    assert f"--resume {folder}" in line
    assert checkpoints.load(folder / "checkpoint.pt")["epoch"] >= 1


def test_more_devices_than_there_are(user_error, monkeypatch):
    with user_error("--batch-size 512", "--devices 3"):
        simclr.Config(devices=3)
    monkeypatch.setattr(devices, "pick_device", lambda device: "mps")  # one at most
    with user_error("--devices 2", "has 1 of mps"):
        devices.make_fabric("mps", "float32", 2)
    monkeypatch.undo()
    with user_error("--devices 100000", "of cpu"):
        devices.make_fabric("cpu", "float32", 100_000)
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda backend: False)
    with user_error("--devices 2", "gloo"):
        devices.make_fabric("cpu", "float32", 2)


def test_a_slurm_job_that_lightning_refuses_is_one_line(user_error, monkeypatch):
    for name, value in {"NTASKS": "2", "NNODES": "1", "PROCID": "0", "JOB_NAME": "x"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    with user_error("SLURM", "--ntasks-per-node=2"):
        devices.make_fabric("cpu", "float32", 2)


@pytest.mark.parametrize(
    ("environment", "count", "layout"),
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
def test_processes_are_those_that_are_started(monkeypatch, user_error, environment, count, layout):
    for name in ("SLURM_NTASKS", "SLURM_NNODES", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = simclr.Config(devices=count)
    if isinstance(layout, str):
        with user_error(layout):
            devices.process_layout(config)
    else:
        assert devices.process_layout(config) == layout


def fail(monkeypatch, capsys, error):
    """What a script whose work raises `error` prints."""

    def work():
        raise error

    monkeypatch.setattr(runs.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit):
        runs.exit_cleanly(work)
    return capsys.readouterr().err


def test_what_one_process_meets_is_said_by_it(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    printed = fail(monkeypatch, capsys, torch.OutOfMemoryError())
    assert printed.startswith("process 1: error: out of memory")
    for alike in (errors.UserError("x"), errors.Diverged("x"), KeyboardInterrupt()):
        assert fail(monkeypatch, capsys, alike) == ""  # the first process says it
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert fail(monkeypatch, capsys, errors.UserError("x")) == "error: x\n"


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
    assert devices.process_rank() == rank


def test_independent_processes_under_srun_all_say_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_PROCID", "3")
    printed = fail(monkeypatch, capsys, errors.UserError("no such file"))
    assert printed == "error: no such file\n"
