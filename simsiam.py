"""SimSiam (Chen & He 2021, https://arxiv.org/abs/2011.10566) on small images.

    python simsiam.py                                    # FashionMNIST, small encoder, 100 epochs
    python simsiam.py --dataset digits --epochs 20 --batch-size 64   # no download, a minute

Pretrains without negatives: a predictor, and a gradient that stops at the other view. Then linear
probe, kNN and UMAP of z and p. With `--epochs 23` it gets 91.1 ± 0.3 % in the linear probe and
86.9 % by kNN (three seeds), in a quarter of an hour on one quiet CPU core. What the encoder buys
when few images have labels is told by few_labels.py.

Differences from the paper: by default the backbone has three convolutions and no projector, both
views share a BatchNorm pass, and views come from RandAugment, drawn for each image; `--head paper
--encoder resnet18 --augmentation crop --batch-size 512 --learning-rate 0.03 --weight-decay 5e-4` is
the paper's CIFAR-10 model and recipe (appendix D). The default rate is for the small encoder.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evaluation
import functions
from support import (
    augment,
    datasets,
    experiment,
    files,
    muon,
    pretraining,
    randaugment,
    runs,
    verdict,
)
from support.errors import require
from support.settings import setting


@dataclass(frozen=True)
class Config(
    pretraining.PretrainingConfig,
    dataset="fashion-mnist",
    encoder="small",
    batch_size=128,
    weight_decay=1e-5,
    keep_every=10,
    grayscale_probability=0.2,
):
    """The defaults are the recipe of the README's row of 23 epochs, for 100."""

    SCRIPT = "simsiam"

    head: Literal["original", "paper"] = setting(
        "original", "model", "original: no projector, predictor D-64-D; paper: 2048, 2048-512-2048"
    )
    projector_layers: int = setting(2, "model", "layers of the paper's projector, 2 or 3")

    optimizer: Literal["sgd", "muon"] = setting(
        "sgd", "training", "sgd with momentum 0.9; muon: try a rate of 0.02 and a decay of 0.1"
    )
    learning_rate: float = setting(
        1.6, "training", "peak; sgd multiplies it by batch size / 256, and its predictor keeps it"
    )

    augmentation: Literal["randaugment", "crop"] = setting(
        "randaugment", "views", "crop: the paper's views, with the other settings here"
    )
    num_ops: int = setting(5, "views", "operations of RandAugment on each view")
    magnitude: int = setting(9, "views", "their strength, 0 to 30")

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(self.projector_layers in (2, 3), "--projector-layers must be 2 or 3")
        require(1 <= self.num_ops <= 100, f"--num-ops must be in [1, 100], not {self.num_ops}")
        require(0 <= self.magnitude <= 30, f"--magnitude must be in [0, 30], not {self.magnitude}")
        require(
            self.optimizer != "muon" or self.learning_rate <= 0.5,
            f"--optimizer muon with --learning-rate {self.learning_rate:g}, which is SGD's: "
            "try 0.02, and --weight-decay 0.1",
        )

    def unread(self) -> dict[str, str]:
        """As `RunConfig.unread`."""
        ignored = super().unread()
        if self.head == "original":
            ignored["projector_layers"] = "--head paper"
        if self.augmentation == "crop":
            return ignored | dict.fromkeys(("num_ops", "magnitude"), "--augmentation randaugment")
        return ignored | dict.fromkeys(pretraining.CROP_SETTINGS, "--augmentation crop")


class SimSiam(nn.Module):
    """Encoder, projector and predictor: `z = projector(encoder(images))`, `p = predictor(z)`."""

    def __init__(self, config: Config, channels: int, image_size: int):
        super().__init__()
        self.encoder: Any = config.make_encoder(channels, image_size)
        features, size, hidden = self.encoder.num_features, 2048, 512
        if config.head == "original":
            self.projector: nn.Module = nn.Identity()
            size, hidden = features, 64
        else:  # section 3, "Baseline settings", and the reference code's last BatchNorm
            layers: list[nn.Module] = []
            for inputs in (features, *[size] * (config.projector_layers - 1)):
                layers += [nn.Linear(inputs, size, bias=False), nn.BatchNorm1d(size), nn.ReLU()]
            self.projector = nn.Sequential(*layers[:-2], nn.BatchNorm1d(size, affine=False))
            from torchvision.models import resnet

            for block in self.encoder.modules():  # which begins as the identity (appendix A)
                if isinstance(block, resnet.BasicBlock | resnet.Bottleneck):
                    nn.init.zeros_(getattr(block, "bn3", block.bn2).weight)
        self.predictor = nn.Sequential(
            nn.Linear(size, hidden, bias=config.head == "original"),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, size),
        )

    def forward(self, *views: Tensor) -> tuple[Tensor, Tensor]:
        """`z` and `p`, both `(B, D)`, of B images `(B, C, H, W)`.

        They may come in several parts, which then go through the network one by one: BatchNorm
        takes its statistics of each.
        """
        z = [self.projector(self.encoder(part)) for part in views]
        p = [self.predictor(part) for part in z]
        return torch.cat(z), torch.cat(p)


def negative_cosine_similarity(p: Tensor, z: Tensor) -> Tensor:
    """D(p, z) of equation 1, averaged over the batch, with the stop-gradient of equation 3.

    Args:
        p: `(B, D)`, the predictor's output for one view.
        z: `(B, D)`, the other view's projection; no gradient flows through it.

    Returns:
        A scalar in [-1, 1], in float32 also under autocast.
    """
    with torch.autocast(p.device.type, enabled=False):
        return -F.cosine_similarity(p.float(), z.detach().float(), dim=1).mean()


def make_views(
    batches: Iterator[tuple[int, Tensor, augment.Generator]], config: Config, size: int | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Two random views of each image of each batch.

    Args:
        batches: the steps' numbers, uint8 images `(b, C, H, W)` and generators, which are on the
            images' device for crops and on the CPU for RandAugment.
        config: the settings of the group `views`.
        size: side of cropped views; None for that of the images.

    Yields:
        The step, its images, and their views `(2b, C, H, W)` in [0, 1], all first views, then all
        second views.
    """
    if config.augmentation == "crop":
        for step, images, generator in batches:
            pairs = images.repeat(2, 1, 1, 1)  # (2b, C, H, W)
            yield step, images, pretraining.crop_views(pairs, config, generator, size)
        return
    # Eight batches at a time: each op of RandAugment then works on one large slice, not on eight.
    while group := list(itertools.islice(batches, 8)):
        steps, parts, generators = zip(*group, strict=True)
        count = 2 * len(parts[0])
        drawn = [randaugment.draw_randaugment(count, config.num_ops, g) for g in generators]
        ops, negative = map(torch.cat, zip(*drawn, strict=True))
        many = torch.cat([part.repeat(2, 1, 1, 1) for part in parts])  # (8 * 2b, C, H, W)
        views = randaugment.rand_augment(many, ops, negative, config.magnitude)
        for step, images, pairs in zip(steps, parts, views.split(count), strict=True):
            yield step, images, datasets.to_float(pairs)


def make_optimizer(model: SimSiam, config: Config) -> torch.optim.Optimizer:
    """SGD at its peak rate, scaled by batch size / 256, or Muon (Jordan et al. 2024).

    SGD has a second group, of the predictor: one whose rate does not decay adapts to the latest
    representations (Table 1c). Under Muon it decays as all else does.
    """
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "muon":
        return muon.make_muon(model.encoder, list(model.parameters()), config)
    rest = [*model.encoder.parameters(), *model.projector.parameters()]
    groups = [{"params": rest}, {"params": list(model.predictor.parameters())}]
    scaled = rate * config.batch_size / 256
    return torch.optim.SGD(groups, scaled, 0.9, weight_decay=decay, fused=True)


def pretrain(
    model: SimSiam, data: datasets.ImageData, config: Config, run: runs.Run, fabric: Any
) -> list[dict[str, Any]]:
    """Algorithm 1 of the paper until `config.epochs`, from the folder's checkpoint if it has one.

    Returns:
        The rows of `metrics.csv`.

    Raises:
        Diverged: the loss is not finite; the last checkpoint is kept.
    """
    optimizer = make_optimizer(model, config)
    peak = optimizer.param_groups[0]["lr"]
    monitor = functions.Monitor(data.train, config.knn_every, fabric)
    # The paper's model sees one view at a time, ours both: half as many BatchNorm passes.
    passes = 2 if config.head == "paper" else 1
    method = verdict.Method(chance_loss=0.0, collapse_loss=-1.0, passes=passes)
    training = pretraining.Pretraining(
        model, optimizer, data.train, config, run, fabric, monitor, method
    )
    compiled = pretraining.choose_compiler(config, training.steps, fabric.device)
    network, optimizer = fabric.setup(compiled(model), optimizer)
    on_host = config.augmentation == "randaugment"
    for epoch in training.epochs():
        batches = training.batches(epoch, on_host)
        for step, images, views in make_views(batches, config, config.view_side(epoch)):
            optimizer.param_groups[0]["lr"] = training.rate(peak, step)  # SGD's predictor keeps it
            views = data.train.normalize_for_encoder(views)
            if step == 0 and fabric.is_global_zero:
                functions.plot_views(run.folder / "views.png", images, views, data.train)
            z, p = network(*views.chunk(passes))  # (2b, D) each
            (z1, z2), (p1, p2) = z.chunk(2), p.chunk(2)  # (b, D) each
            loss = negative_cosine_similarity(p1, z2) / 2 + negative_cosine_similarity(p2, z1) / 2
            training.record(loss, z, views)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
    return training.history


def embed(
    model: SimSiam, data: datasets.ImageData, config: Config, folder: Path, fabric: Any
) -> None:
    """UMAP (10 neighbours, cosine) of z and of p of at most 10,000 test images.

    Training images of a data set without labels. Writes `embeddings.npz` and, for z and p,
    `umap_*.png` and `umap_*.csv` with the coordinates, and `embedding.html` of z.
    """
    index, split = evaluation.images_to_map(data)
    arrays = evaluation.identify_images(split, index)
    labels = arrays.get("labels")
    has_umap = runs.has_package("umap", "umap-learn", "the map of z and p")
    for name, tail in (("z", ()), ("p", (model.predictor,))):
        network = nn.Sequential(model.encoder, model.projector, *tail)
        features = functions.extract_features(network, split, fabric)
        arrays[name] = features.cpu().numpy()
        if not has_umap:
            continue
        points = functions.project_2d(features, "umap", config.seed, neighbours=10)
        arrays[f"{name}_coordinates"] = points
        title = f"UMAP of {name} of {len(split):,} images of {data.name}"
        functions.plot_scatter(folder / f"umap_{name}.png", points, labels, data.classes, title)
        rows = [{"x": float(x), "y": float(y)} for x, y in points]
        if labels is not None:
            rows = [row | {"class": data.classes[k]} for row, k in zip(rows, labels, strict=True)]
        files.write_csv(folder / f"umap_{name}.csv", rows)
        if name == "z":
            evaluation.write_map_page(folder, data, (index, split), features, points, title)
    arrays["features"] = arrays["z"]
    if has_umap:
        arrays["coordinates"] = arrays["z_coordinates"]
    files.write_arrays(folder / "embeddings.npz", **arrays)


def main(config: Config) -> dict[str, Any]:
    """Do the stages of `config` and return what `summary.json` holds.

    Accuracies in [0, 1]; the linear probe's is that of the last epoch.

    Raises:
        UserError: data, settings or a run folder that cannot be used.
        Diverged: the loss is not finite.
    """
    data = functions.load_dataset(config)
    stages = {"probe": evaluation.probe, "embed": embed}
    return experiment.run_experiment(config, data, SimSiam, pretrain, stages)


if __name__ == "__main__":
    runs.run_script(main, Config, __doc__)
