"""The table of docs/speed.md, from what `make bench` measured on each kind of processor.

python benchmarks/table.py
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PROCESSORS = {
    "intel-xeon-amx": "Intel Xeon, AMX",
    "amd-epyc-avx512-bf16": "AMD EPYC, AVX-512",
}
SIMCLR = {
    "original": "PIL images in a DataLoader, plain Adam",
    "lightly": "lightly's example",
}
IN_FLOAT32 = {f"float32 {way}": f"ours in float32, beside {way}" for way in SIMCLR}

# What is timed, the heading in the results, its column and unit, and the alternatives.
ROWS: list[tuple[str, str, str, str, dict[str, str]]] = [
    (
        "augmentation, the original's recipe",
        "Augmentation",
        "images/s",
        "images/s",
        {
            "torchvision_pil": "torchvision per PIL image",
            "torchvision_v2": "torchvision v2 per tensor image",
            "kornia": "kornia",
        },
    ),
    (
        "RandAugment, colour",
        "RandAugment, 512 x 3",
        "images/s",
        "images/s",
        {"one_draw_for_all": "torchvision, one draw for all images"},
    ),
    (
        "SimCLR epoch, ResNet18, ImageNet stem, batch 1,024",
        "SimCLR epoch, ResNet18, imagenet",
        "s per epoch",
        "s",
        SIMCLR | IN_FLOAT32,
    ),
    (
        "SimCLR epoch, ResNet18, CIFAR stem, batch 256",
        "SimCLR epoch, ResNet18, cifar",
        "s per epoch",
        "s",
        SIMCLR | IN_FLOAT32,
    ),
    (
        "SimSiam epoch, FashionMNIST, RandAugment",
        "SimSiam epoch",
        "s per epoch",
        "s",
        {"per_batch": "one draw per batch", "per_image": "one draw per image"},
    ),
    (
        "linear probe, 100 epochs, 50,000 images",
        "Linear probe",
        "seconds",
        "s",
        {"original": "encoding in every epoch", "scikit-learn": "LogisticRegression, encoded once"},
    ),
    (
        "t-SNE, 10,000 x 512",
        "t-SNE",
        "seconds",
        "s",
        {"sklearn_plain": "scikit-learn", "open_tsne": "openTSNE"},
    ),
    (
        "embed.py's features, small encoder",
        "Features of images",
        "images/s",
        "images/s",
        {"encoder_alone": "the encoder alone, on tensors in memory"},
    ),
]


def number(value: float) -> str:
    """Two or three digits that a reader can compare."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def section(results: dict[str, Any], title: str) -> list[dict[str, Any]]:
    """The rows under the heading that begins with `title`; none if it was not measured."""
    return next((rows for key, rows in results.items() if key.startswith(title)), [])


def find_row(rows: list[dict[str, Any]], column: str, value: str) -> dict[str, Any]:
    """The row that has this value; an empty one if it was not measured."""
    return next((row for row in rows if row[column] == value), {})


def ratio(measured: dict[str, dict[str, Any]], way: str) -> str:
    """How many times as long an alternative takes, and its memory; empty if not measured."""
    other = way.removeprefix("float32 ")
    name = "time / ours" if other == way else "time / ours in float32"
    value = measured.get(other, {}).get(name)
    if value is None:
        return ""
    memory = measured["ours_in_float32" if other != way else other].get("GiB")
    return number(value) + (f" ({memory:.1f} GiB)" if memory else "")


def lines(every: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The cells of the table: what is timed, beside what, and a pair of columns per processor."""
    table = []
    for label, title, column, unit, others in ROWS:
        if not any(section(results, title) for results in every.values()):
            continue
        for i, (way, beside) in enumerate(others.items()):
            cells = [label if i == 0 else "", beside]
            for results in every.values():
                measured = {row["way"]: row for row in section(results, title)}
                ours = measured.get("ours", {})  # empty if not measured on this processor
                memory = f", {ours['GiB']:.1f} GiB" if "GiB" in ours else ""
                shown = f"{number(ours[column])} {unit}{memory}" if ours and i == 0 else ""
                cells.append(shown)
                cells.append(ratio(measured, way))
            table.append(cells)
    for cell in ("rnn", "lstm", "gru"):
        cells = [f"{cell.upper()} epoch, batch 64", "PIL images in a DataLoader, two more passes"]
        for results in every.values():
            row = find_row(section(results, "Row-sequence"), "cell", cell)
            cells.append(f"{number(row['ours s'])} s, {row['ours GiB']:.1f} GiB" if row else "")
            cells.append(f"{number(row['ratio'])} ({row['original GiB']:.1f} GiB)" if row else "")
        table.append(cells)
    for command in ("simclr.py --help", "rnn_hyperparameter_tune.py --help", "cached images"):
        cells = [command if "images" not in command else "CIFAR-10 from its cache"]
        cells.append("" if "images" in command else "above `import torch`")
        for results in every.values():
            row = find_row(section(results, "Start-up"), "command", command)
            cells.append(f"{number(row['seconds'])} s" if row else "")
            cells.append(f"{row['above torch']:.1f} s" if "above torch" in row else "")
        table.append(cells)
    return table


def main() -> None:
    """Print the table in Markdown."""
    paths = sorted(RESULTS.glob("*.json"), key=lambda path: path.stem, reverse=True)
    every = {path.stem: json.loads(path.read_text()) for path in paths}
    head = ["ours", "beside"]
    for stem in every:
        head += [PROCESSORS.get(stem, stem), "ratio"]
    table = [head, ["---"] * len(head), *lines(every)]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in table))


if __name__ == "__main__":
    main()
