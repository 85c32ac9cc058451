import itertools
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from support import devices

REPOSITORY = Path(devices.__file__).resolve().parents[1]


# random numbers


def test_generators_of_seeds_epochs_and_streams_differ():
    keys = list(itertools.product((0, 1, 2**63 - 1), range(4), range(4)))
    generators = [devices.epoch_generator(seed, epoch, stream=n) for seed, epoch, n in keys]
    drawn = [torch.rand(2000, generator=generator) for generator in generators]
    assert len({values.numpy().tobytes() for values in drawn}) == len(keys)
    correlations = np.corrcoef(torch.stack(drawn))
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 0.12  # 5 deviations of independent ones


def test_a_generator_depends_on_its_key_alone():
    first = torch.rand(5, generator=devices.epoch_generator(7, 3, stream=1))
    torch.manual_seed(9)
    devices.epoch_generator(7, 2, stream=1)
    assert torch.equal(torch.rand(5, generator=devices.epoch_generator(7, 3, "cpu", 1)), first)
    before = torch.get_rng_state()
    devices.epoch_generator(1, 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 2**32 + 5, 2**63 - 1])
def test_a_seed_fixes_every_generator(seed):
    def numbers():
        return random.random(), np.random.rand(), torch.rand(1).item()

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        devices.seed_everything(seed)
        first = numbers()
        assert numbers() != first
        devices.seed_everything(seed)
        assert numbers() == first
    random.setstate(states[0])
    np.random.set_state(states[1])


# devices and precision


def set_hardware(monkeypatch, cuda=False, mps=False, bfloat16=False, **units):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bfloat16)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ({}, "cpu"),
        ({"cuda": True}, "cuda"),
        ({"mps": True}, "mps"),
        ({"cuda": True, "mps": True}, "cuda"),
    ],
)
def test_auto_is_the_best_device_there_is(monkeypatch, user_error, there, chosen):
    set_hardware(monkeypatch, **there)
    assert devices.pick_device("auto") == chosen
    for device in ("cuda", "mps", "cpu"):
        if device in {"cpu", *there}:
            assert devices.pick_device(device) == device
        else:
            with user_error(f"--device {device}", "--device cpu"):
                devices.pick_device(device)


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({}, "32-true"),
        ({"amx_bf16": True}, "bf16-mixed"),
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": False, "avx512_bf16": False, "avx2": True}, "32-true"),
        ({"cuda": True, "bfloat16": True}, "bf16-mixed"),
        ({"cuda": True, "amx_bf16": True}, "32-true"),
        ({"mps": True, "amx_bf16": True}, "32-true"),
    ],
    ids=str,
)
def test_bfloat16_is_chosen_where_the_hardware_multiplies_in_it(monkeypatch, there, expected):
    set_hardware(monkeypatch, **there)
    assert devices.pick_precision("auto", "auto") == expected
    assert devices.pick_precision("auto", "float32") == "32-true"
    assert devices.pick_precision("auto", "bfloat16") == "bf16-mixed"


# memory


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_freed_memory_is_kept_for_the_next_step():
    program = """
import resource, torch
from support import devices

def faults():
    for step in range(10):
        if step == 4:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for size in (40, 60):  # MB: above the largest threshold that glibc chooses by itself
            torch.zeros(size, 250_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
devices.keep_freed_memory()
print(faults())
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    returned, kept = map(int, done.stdout.split())
    assert kept < returned / 4
