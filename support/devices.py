"""Where a run computes: device, precision, processes, and the generators of its random numbers."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import warnings
from typing import Any, Literal

import numpy as np
import torch

from support import settings
from support.errors import UserError, require


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step instead of returning it to the system.

    Each step takes the same buffers again. Fresh ones cost page faults: a sixth to a fifth of a
    step of ResNet18 with the ImageNet stem on a CPU. Does nothing without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3  # of malloc.h
        # Larger buffers go back at once: holes of their size in the heap would add up to gigabytes.
        if not mallopt(m_mmap_threshold, 1 << 27):  # 128 MiB
            mallopt(m_mmap_threshold, 1 << 25)  # an old glibc takes 32 MiB at most
        mallopt(m_trim_threshold, (1 << 31) - 1)  # the heap's free end is kept


def process_rank() -> int:
    """This process's number among those of a run, before and after they have found each other."""
    # torchrun's, that of a process which Fabric started (also within a SLURM job), srun's
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return int(next((os.environ[name] for name in names if name in os.environ), 0))


def process_layout(config: settings.RunConfig) -> tuple[int, int]:
    """Processes per node and nodes: torchrun's or SLURM's where one of them starts us.

    Raises:
        UserError: they start another number of processes than --devices asks for.
    """
    devices = getattr(config, "devices", 1)
    here, nodes, starter = devices, 1, ""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here, starter = int(os.environ["LOCAL_WORLD_SIZE"]), "torchrun"
        nodes = int(os.environ["WORLD_SIZE"]) // here
    elif "SLURM_NTASKS" in os.environ:
        from lightning_fabric.plugins.environments import SLURMEnvironment

        if SLURMEnvironment.detect():  # not in an interactive job
            nodes, starter = int(os.environ.get("SLURM_NNODES", 1)), "SLURM"
            here = int(os.environ["SLURM_NTASKS"]) // nodes
    require(
        devices in (1, here, here * nodes),
        f"--devices {devices}, but {starter} starts {here * nodes} processes: leave the flag out, "
        f"or let {starter} start as many",
    )
    return here, nodes


def hardware(device: str) -> str:
    """A short name of the device that `--device` chooses, for records and the first line."""
    chosen = pick_device(device)
    if chosen == "cuda":
        return torch.cuda.get_device_name()
    name = _cpu_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    return "Apple GPU" if chosen == "mps" else f"{name} CPU"


def _cpu_capabilities() -> dict[str, Any]:
    return getattr(torch.cpu, "get_capabilities", dict)()  # missing before torch 2.11


def pick_device(device: str) -> str:
    """Resolve `auto` to the best device there is.

    Raises:
        UserError: the device asked for is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        return next(name for name, there in available.items() if there)
    require(
        available[device],
        f"--device {device}: this machine has none that PyTorch can use; try --device cpu",
    )
    return device


def choose_precision(device: str, precision: str) -> tuple[str, str]:
    """`float32` or `bfloat16`, and why.

    `auto` is bfloat16 autocast on GPUs that support it and on CPUs with units for its products: AMX
    tiles, or AVX-512's. Without them it is emulated, and slower than float32.
    """
    if precision != "auto":
        return precision, "--precision asks for it"
    chosen = pick_device(device)
    if chosen == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        units = ("amx_bf16", "avx512_bf16")
        fast = chosen == "cpu" and any(_cpu_capabilities().get(unit) for unit in units)
    if fast:
        return "bfloat16", "the hardware multiplies in bfloat16"
    return "float32", "the hardware has no units for bfloat16 products"


def pick_precision(device: str, precision: str) -> Literal["bf16-mixed", "32-true"]:
    """Lightning's name for what `choose_precision` says."""
    chosen, _ = choose_precision(device, precision)
    return "bf16-mixed" if chosen == "bfloat16" else "32-true"


def make_fabric(device: str, precision: str, devices: int = 1, nodes: int = 1) -> Any:
    """Lightning Fabric in the precision of `pick_precision`, with DDP for several processes.

    Raises:
        UserError: fewer devices than asked for, a PyTorch without collectives, or a SLURM job of
            another shape.
    """
    import logging

    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces the precision
    chosen, strategy = pick_device(device), "auto"
    if chosen == "cuda":
        torch.backends.cudnn.benchmark = True  # batches have one shape for many steps
    if devices * nodes > 1:
        there = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": os.cpu_count() or 1}[chosen]
        if chosen == "cpu" and "TORCHELASTIC_RUN_ID" in os.environ:
            there = devices  # torchrun's processes may share cores
        require(devices <= there, f"--devices {devices}: this machine has {there} of {chosen}")
        backend = "nccl" if chosen == "cuda" else "gloo"
        require(
            torch.distributed.is_available() and torch.distributed.is_backend_available(backend),
            f"--devices {devices} needs PyTorch's {backend} backend, which this one lacks",
        )
        strategy = "ddp"
        # Lightning's own business, said once per process
        warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather is deprec")
    try:
        return Fabric(
            accelerator=chosen,
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
            precision=pick_precision(device, precision),
        )
    except (RuntimeError, ValueError) as error:
        if "SLURM_NTASKS" not in os.environ:
            raise
        raise UserError(f"this SLURM job cannot be used: {error}".replace("\n", " ")) from error


def make_evaluation_fabric(device: str, precision: str) -> Any:
    """Fabric, in one process, for what was trained in this precision; `auto` if it is not known.

    bfloat16 only where the hardware multiplies in it: an encoder of a GPU on a CPU that has to
    emulate it would take ten times as long.
    """
    return make_fabric(device, "float32" if precision == "float32" else "auto")


def synchronize(device: torch.device) -> None:
    """Wait until the device is done with what it has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    import random

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# Independent streams of random numbers. Results depend on the numbers: a new use takes a new one.
ORDER, VIEWS, HOST_VIEWS, NETWORK = 0, 1, 4, 7
ROW_DROPOUT = 2  # of rnn.py
SUPERVISED_ORDER, SUPERVISED_VIEWS = 2, 3  # of fine-tuning and few_labels.py
KEY_ORDER = 5  # of moco.py
FIXMATCH, FIXMATCH_HOST = 5, 6


def epoch_generator(
    seed: int, epoch: int, device: Any = "cpu", stream: int = ORDER
) -> torch.Generator:
    """A generator for what epoch `epoch` of a run with seed `seed` draws from one of the streams.

    It depends on nothing else, so a resumed epoch repeats an uninterrupted one.
    """
    words = np.random.SeedSequence((seed, epoch, stream)).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def epoch_order(
    count: int, seed: int, epoch: int, device: Any = "cpu", stream: int = ORDER
) -> torch.Tensor:
    """The order `(count,)`, on the device, in which an epoch takes so many images."""
    return torch.randperm(count, generator=epoch_generator(seed, epoch, stream=stream)).to(device)


def seed_network(seed: int, epoch: int, stream: int = NETWORK) -> None:
    """Let what a network draws itself, as for dropout, be the same in a resumed epoch."""
    torch.manual_seed(epoch_generator(seed, epoch, stream=stream).initial_seed())
