"""Resident memory and throughput of simclr.py on a folder that is larger than it should hold.

    python benchmarks/larger_than_memory.py                  # 200,000 images of 64x64, 2.4 GB
    python benchmarks/larger_than_memory.py --images 5000

Makes the folder, then pretrains one epoch twice, each in a process of its own: once from the
memory-mapped cache, which it decodes first, once from a copy of it in memory. Resident memory is
`RssAnon`, which leaves out the page cache: the system takes that back when it needs the memory.
"""

import argparse
import dataclasses
import io
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import apart, report
from PIL import Image

from support import datasets, files


def make_folder(folder: Path, count: int, size: int) -> None:
    """`count` JPEG files of noise in two classes; every thousandth differs from those before."""
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    for start in range(0, count, 1000):
        coarse = draw.integers(0, 256, (8, 8, 3), np.uint8)
        content = io.BytesIO()
        Image.fromarray(coarse).resize((size, size)).save(content, "JPEG")
        for number in range(start, min(start + 1000, count)):
            (folder / "ab"[number % 2] / f"{number}.jpg").write_bytes(content.getvalue())


def resident() -> float:
    """Anonymous resident memory of this process in GB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise SystemExit("this system does not say RssAnon: use Linux")


def measure(folder: str, size: int, copied: bool) -> tuple[float, float, float]:
    """Pretrain one epoch in this process; images/s, seconds to load, growth of memory in GB."""
    import torch

    import functions
    import simclr

    load = functions.load_images

    def loading(*arguments: Any) -> datasets.ImageData:
        nonlocal loaded
        began = time.perf_counter()
        data = load(*arguments)
        if copied:
            train = dataclasses.replace(data.train, images=data.train.images.clone())
            data = dataclasses.replace(data, train=train)
        loaded = time.perf_counter() - began
        return data

    functions.load_images = loading
    torch.ones(1000, 1000).mm(torch.ones(1000, 1000))  # what the libraries take by themselves
    loaded, peak, before, running = 0.0, 0.0, resident(), True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, resident())
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory() as output:
        config = simclr.Config(
            dataset=folder,
            data_dir=str(Path(folder).parent / "data"),
            image_size=size,
            output_dir=output,
            name="run",
            encoder="small",
            epochs=1,
            stages="pretrain",
            knn_every=0,
        )
        simclr.main(config)
        rows = files.read_csv(
            Path(output, "simclr", "run", "metrics.csv"),
            {"images_per_second": float},
        )
    running = False
    watcher.join()
    return rows[-1]["images_per_second"], loaded, peak - before


def main() -> None:
    """Measure both ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200_000, help="[200000]")
    parser.add_argument("--size", type=int, default=64, help="side in pixels [64]")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "images")
        make_folder(folder, arguments.images, arguments.size)
        for name, copied in (("memory-mapped", False), ("copied", True)):
            (rate, loading, memory), _ = apart(measure, str(folder), arguments.size, copied)
            row = {"images are": name, "images/s": rate, "loading s": loading}
            rows.append({**row, "memory GB": memory})
    gigabytes = arguments.images * 3 * arguments.size**2 / 1e9
    size = f"{arguments.images:,} of {arguments.size} pixels, {gigabytes:.2f} GB"
    report(f"Folder of images, {size}", rows)


if __name__ == "__main__":
    main()
