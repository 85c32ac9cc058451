"""What a GPU is, whether it computes what the CPU does, and what a step and an epoch cost there.

    python benchmarks/gpu.py facts
    python benchmarks/gpu.py agree                      # one step on both, from the same views
    python benchmarks/gpu.py profile                    # ten steps, operation by operation
    python benchmarks/gpu.py epochs simclr --dataset data/cifar10-images

`bash benchmarks/gpu.sh` runs all of it, and the trainings. `--device cpu --tiny` tries it anywhere.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT

import simclr
from support import devices, muon, pretraining, runs

# Relative differences that rounding explains, of the loss and of the gradient as a vector: float32
# keeps 24 bits, TF32, the default of a GPU's convolutions, 11, bfloat16 8, and the layers add up: a
# gradient in bfloat16 is 0.29 of its length away from that in float32 on an H100, 0.31 on a CPU.
ALLOWED = {"float32": (1e-5, 3e-2), "tf32": (1e-3, 1.5e-1), "bfloat16": (1e-2, 4e-1)}


def facts(device: str) -> dict[str, Any]:
    """Names and versions, and the rate of a large matrix product in TFLOP/s."""
    found: dict[str, Any] = {"hardware": devices.hardware(device), "torch": torch.__version__}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"memory GiB": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    size = 8192 if device == "cuda" else 1024
    for name in ("float32", "bfloat16"):
        a = torch.randn(size, size, device=device, dtype=getattr(torch, name))
        seconds = min(timed(lambda a=a: a @ a, device) for _ in range(5))
        found[f"{name} TFLOP/s"] = round(2 * size**3 / seconds / 1e12, 2)
    return found


def timed(call: Any, device: str) -> float:
    """Seconds of a call, until the device is done."""
    devices.synchronize(torch.device(device))
    began = time.perf_counter()
    call()
    devices.synchronize(torch.device(device))
    return time.perf_counter() - began


def make_step(device: str, precision: str, config: simclr.Config) -> tuple[Any, Any, Any]:
    """A model of the default recipe, a batch of random images, and a function for one step."""
    torch.manual_seed(0)
    model = simclr.SimCLR(config, 3, 32).to(device).to(memory_format=torch.channels_last).train()
    images = torch.randint(
        0, 256, (config.batch_size, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator()
    )

    def step(views: torch.Tensor) -> torch.Tensor:
        enabled = precision == "bfloat16"
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            z = model(views.contiguous(memory_format=torch.channels_last))
        loss = simclr.nt_xent_loss(z, config.temperature)
        model.zero_grad()
        loss.backward()
        return loss.detach()

    return model, images, step


def agree(device: str, config: simclr.Config) -> None:
    """Loss and gradients of one step on the CPU in float32, and on the device from the same views.

    Exits with 1 where they differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    _, images, _ = make_step("cpu", "float32", config)
    pairs = images.repeat(2, 1, 1, 1)
    drawn = pretraining.draw_views(pairs, config, generator)
    views = pretraining.apply_views(pairs, drawn)
    there = {name: value.to(device) for name, value in drawn.items()}
    gap = (pretraining.apply_views(pairs.to(device), there).cpu() - views).abs().max().item()
    print(f"views: largest difference {gap:.1e} of 1")
    results = {}
    for where, precision in (("cpu", "float32"), *((device, name) for name in ALLOWED)):
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        model, _, step = make_step(where, precision, config)
        loss = step(views.to(where) - 0.5).item()
        gradient = torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
        results[where, precision, len(results)] = loss, gradient
    loss, gradient = results.pop(("cpu", "float32", 0))
    failed = gap > 1e-3
    for (where, precision, _), (other, values) in results.items():
        difference = (values - gradient).norm().item() / gradient.norm().item()
        print(
            f"{where} {precision}: loss {other:.6f} beside {loss:.6f}, "
            f"gradients differ by {difference:.1e} of their length"
        )
        of_loss, of_gradient = ALLOWED[precision]
        failed = failed or abs(other / loss - 1) > of_loss or difference > of_gradient
    matrix = torch.randn(256, 2304, generator=generator)
    step = muon.orthogonalize(matrix)
    for dtype, allowed in ((torch.float32, 1e-3), (torch.bfloat16, 5e-2)):
        values = muon.orthogonalize(matrix.to(device), dtype).cpu()
        difference = ((values - step).norm() / step.norm()).item()
        print(f"Muon in {dtype}: the step differs by {difference:.1e} of its length")
        failed = failed or difference > allowed
    if failed:
        sys.exit("the device does not compute what the CPU does")


def profile(device: str, config: simclr.Config) -> None:
    """Ten steps with views, loss and update: the costliest operations, and the time of a step."""
    model, images, step = make_step(device, "bfloat16", config)
    images = images.to(device)
    optimizer = simclr.make_optimizer(model, config)
    generator = torch.Generator(device).manual_seed(0)

    def whole() -> None:
        pairs = images.repeat(2, 1, 1, 1)
        step(pretraining.crop_views(pairs, config, generator) - 0.5)
        optimizer.step()

    for _ in range(5):
        whole()
    seconds = statistics.median(timed(whole, device) for _ in range(10))
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(10):
            whole()
        devices.synchronize(torch.device(device))
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))
    print(f"a step of {config.batch_size} images: {1000 * seconds:.2f} ms")
    if device == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


def epochs(script: str, device: str, flags: list[str], count: int) -> None:
    """Seconds per epoch of a script, the median of all epochs but the first, plain and compiled."""
    for compiled in ("off", "on"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / f"{script}.py"), *flags, "--device", device]
            command += ["--epochs", str(count + 1), "--stages", "pretrain", "--compile", compiled]
            command += ["--knn-every", "0", "--output-dir", folder, "--name", "x"]
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
            wall = time.perf_counter() - began
            with open(Path(folder, script, "x", "metrics.csv"), newline="") as file:
                seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
        print(
            f"{script} {' '.join(flags)}, --compile {compiled}: "
            f"{statistics.median(seconds[1:]):.3f} s per epoch (median of {count}), the first "
            f"{seconds[0]:.1f} s, all with start-up {wall:.1f} s",
            flush=True,
        )


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("facts", "agree", "profile", "epochs"))
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="of epochs: a script and its flags"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small encoder and batch")
    parser.add_argument("--count", type=int, default=5, help="epochs to time")
    arguments = parser.parse_args()
    if bool(arguments.command) != (arguments.what == "epochs"):
        parser.error("epochs takes a script and its flags, the others nothing; --device goes first")
    devices.pick_device(arguments.device)
    config = simclr.Config()
    if arguments.tiny:
        config = simclr.Config(encoder="small", batch_size=64)
    match arguments.what:
        case "facts":
            print(json.dumps(facts(arguments.device), indent=2))
        case "agree":
            agree(arguments.device, config)
        case "profile":
            profile(arguments.device, config)
        case "epochs":
            script, *flags = arguments.command
            epochs(script, arguments.device, flags, arguments.count)


if __name__ == "__main__":
    runs.exit_cleanly(main)
