"""SimSiam (Chen & He 2021, https://arxiv.org/abs/2011.10566) on small images, and few labels.

    python simsiam.py                                    # FashionMNIST, small encoder, 100 epochs
    python simsiam.py --dataset digits --epochs 20 --batch-size 64 --stages pretrain,probe,embed
                                                         # no download, a minute

Pretrains without negatives: a predictor, and a gradient that stops at the other view. Then linear
probe, kNN, UMAP of z and p, and the label-efficiency study: what the encoder buys when 10, 100 or
1,000 training images have labels, against supervised training from scratch. The defaults reach
90.4 % in the linear probe, in an hour on one CPU core; the study takes another hour and a half.

Differences from the paper: by default the backbone has three convolutions and no projector, and
views come from RandAugment, drawn for each image; `--head paper --encoder resnet18 --augmentation
crop` is the paper's CIFAR-10 model.
"""

from __future__ import annotations

import interrupt  # noqa: F401

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functions
import label_study
import pretraining
from functions import require, setting


@dataclass(frozen=True)
class Config(pretraining.PretrainingConfig):
    """The defaults are the recipe of the README's FashionMNIST row."""

    dataset: str = setting(
        "fashion-mnist", "data", "cifar10, fashion-mnist, digits, or a path to a folder of images"
    )
    stages: str = setting("pretrain,probe,embed,study", "run", "what to do; with --resume any part")

    encoder: Literal["small", "resnet18", "resnet34", "resnet50"] = setting(
        "small", "model", "small has three convolutions, the ResNets are torchvision's"
    )
    head: Literal["original", "paper"] = setting(
        "original", "model", "original: no projector, predictor D-64-D; paper: 2048, 2048-512-2048"
    )
    projector_layers: int = setting(2, "model", "layers of the paper's projector, 2 or 3")

    learning_rate: float = setting(
        0.1, "training", "SGD's peak, multiplied by batch size / 256; the predictor keeps it"
    )
    weight_decay: float = setting(1e-5, "training", "weight decay")
    keep_every: int = setting(
        10, "training", "epochs between checkpoints that are kept in checkpoints/; 0 for none"
    )

    augmentation: Literal["randaugment", "crop"] = setting(
        "randaugment", "views", "crop: the paper's views, with the settings below"
    )
    num_ops: int = setting(5, "views", "operations of RandAugment on each view")
    magnitude: int = setting(9, "views", "their strength, 0 to 30")

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(self.projector_layers in (2, 3), "--projector-layers must be 2 or 3")
        require(self.num_ops >= 1, f"--num-ops must be at least 1, not {self.num_ops}")
        require(0 <= self.magnitude <= 30, f"--magnitude must be in [0, 30], not {self.magnitude}")
        require(
            self.view_size is None or self.augmentation == "crop",
            "--view-size needs --augmentation crop",
        )


class SimSiam(nn.Module):
    """Encoder, projector and predictor: `z = projector(encoder(images))`, `p = predictor(z)`."""

    def __init__(
        self,
        encoder: str = "small",
        stem: str = "cifar",
        head: str = "original",
        projector_layers: int = 2,
        channels: int = 1,
        image_size: int = 28,
        width: int = 64,
    ):
        super().__init__()
        self.encoder: Any = functions.make_encoder(encoder, stem, channels, image_size, width)
        features = self.encoder.num_features
        if head == "original":
            self.projector: nn.Module = nn.Identity()
            size, hidden = features, 64
        else:  # section 3, "Baseline settings"; the projector's last BatchNorm has no ReLU
            size, hidden = 2048, 512
            layers: list[nn.Module] = []
            for layer in range(projector_layers):
                inputs = size if layer else features
                layers += [nn.Linear(inputs, size, bias=False), nn.BatchNorm1d(size), nn.ReLU()]
            self.projector = nn.Sequential(*layers[:-1])
        self.predictor = nn.Sequential(
            nn.Linear(size, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, size)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`z` and `p`, both `(B, D)`, of images `(B, C, H, W)`."""
        z = self.projector(self.encoder(images))
        return z, self.predictor(z)


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


# ------------------------------------------------------------------------------- RandAugment
# Ops, ranges and rounding are those of torchvision's `RandAugment` on uint8 tensors, with nearest
# neighbours and black outside. There a batch shares one draw; here every sample has its own.

RANDAUGMENT_OPS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness"),
    *("Posterize", "Solarize", "AutoContrast", "Equalize"),
)
MAGNITUDE_BINS = 31  # magnitudes 0 to 30


def draw_randaugment(
    count: int, num_ops: int = 5, generator: functions.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw the ops and signs of `count` samples, all independent and uniform, on the CPU.

    Returns:
        ops: `(count, num_ops)`, int64 indices into `RANDAUGMENT_OPS`, to apply from left to right.
        negative: `(count, num_ops)`, bool, whether to flip the magnitude; unsigned ops ignore it.
    """
    draws = functions.draw((count, 2, num_ops), generator, "cpu")
    ops = (draws[:, 0] * len(RANDAUGMENT_OPS)).long().clamp_(max=len(RANDAUGMENT_OPS) - 1)
    return ops, draws[:, 1] < 0.5


def rand_augment(images: Tensor, ops: Tensor, negative: Tensor, magnitude: int = 9) -> Tensor:
    """RandAugment (Cubuk et al. 2019, https://arxiv.org/abs/1909.13719), a chain of ops per sample.

    Every round sorts the batch by op, so that each op works on one slice.

    Args:
        images: `(B, C, H, W)`, uint8, C = 1 or 3, H and W at least 3, on any device.
        ops: `(B, num_ops)`, from `draw_randaugment`. On the CPU, as is `negative`: cutting the
            slices then needs no wait for a GPU.
        negative: `(B, num_ops)`, bool.
        magnitude: strength of all ops, 0 to 30.

    Returns:
        New images `(B, C, H, W)`, uint8, equal to torchvision's ops on each image alone.
    """
    sizes = [column.bincount(minlength=len(RANDAUGMENT_OPS)).tolist() for column in ops.unbind(1)]
    order = ops.argsort(0)  # (B, num_ops)
    back = order.argsort(0).to(images.device)
    negative = negative.gather(0, order).to(images.device)
    order = order.to(images.device)
    for step, size in enumerate(sizes):
        # index_select copies rows; images[order] copies bytes and takes ten times as long
        images = images.index_select(0, order[:, step])
        groups = zip(
            RANDAUGMENT_OPS, images.split(size), negative[:, step].split(size), strict=True
        )
        for name, group, flipped in groups:
            if len(group) and name != "Identity":
                group.copy_(_apply_op(name, group, flipped, magnitude))
        images = images.index_select(0, back[:, step])
    return images


def _apply_op(name: str, images: Tensor, negative: Tensor, magnitude: int) -> Tensor:
    """One op on all images, `(B, C, H, W)`; the signs `negative` are `(B,)`."""
    sign = 1.0 - 2.0 * negative[:, None, None, None]
    strength = sign * _strength(0.9, magnitude)  # (B, 1, 1, 1)
    match name:
        case "Brightness":
            return _extrapolate(images, torch.zeros_like(strength), strength)
        case "Color":
            return images if images.shape[1] == 1 else _extrapolate(images, _luma(images), strength)
        case "Contrast":
            mean = _luma(images).mean((1, 2, 3), keepdim=True, dtype=torch.float32)
            return _extrapolate(images, mean, strength)
        case "Sharpness":
            return _extrapolate(images, _smooth(images), strength)
        case "Posterize":
            dropped = round(4 * magnitude / (MAGNITUDE_BINS - 1))  # of 8 bits
            return images & (256 - 2**dropped)
        case "Solarize":
            threshold = torch.linspace(255.0, 0.0, MAGNITUDE_BINS)[magnitude].item()
            inverted = (images >= math.ceil(threshold)).to(torch.uint8) * 255
            return images ^ inverted  # x ^ 255 = 255 - x
        case "AutoContrast":
            return _autocontrast(images)
        case "Equalize":
            return _equalize(images)
        case _:
            return _warp(name, images, negative, magnitude)


def _strength(largest: float, magnitude: int) -> float:
    """The op's strength at this magnitude, with the float32 rounding of torchvision."""
    return torch.linspace(0.0, largest, MAGNITUDE_BINS)[magnitude].item()


def _warp(name: str, images: Tensor, negative: Tensor, magnitude: int) -> Tensor:
    """Shear, translate or rotate."""
    height, width = images.shape[2:]
    sources = _warp_sources(name, magnitude, height, width, images.device)
    sources = sources.index_select(0, negative.long())[:, None]  # (B, 1, H * W)
    pixels = F.pad(images.flatten(2), (1, 0))  # (B, C, 1 + H * W), black first
    return pixels.gather(2, sources.expand(-1, images.shape[1], -1)).view_as(images)


@functools.lru_cache(maxsize=64)
def _warp_sources(
    name: str, magnitude: int, height: int, width: int, device: torch.device
) -> Tensor:
    """Where each output pixel comes from: `(2, H * W)`, int64, of the op and of its negative.

    Source pixels count from 1; 0 is black. All samples share the two maps. Their steps are those of
    torchvision, so that positions halfway between two pixels round alike.
    """
    theta = torch.tensor(
        [_warp_matrix(name, sign, magnitude, height, width) for sign in (1, -1)]
    )  # (2, 2, 3)
    grid = torch.ones(height, width, 3)  # x, y, 1, in pixels from the centre
    grid[..., 0] = torch.arange(width) - (width - 1) / 2
    grid[..., 1] = (torch.arange(height) - (height - 1) / 2)[:, None]
    half = torch.tensor([width / 2, height / 2])
    where = grid.view(1, -1, 3) @ (theta.mT / half)  # (2, H * W, 2), in [-1, 1]
    numbers = torch.arange(1.0, height * width + 1).view(1, 1, height, width)
    sources = F.grid_sample(
        numbers.expand(2, -1, -1, -1),
        where.view(2, height, width, 2),
        mode="nearest",
        align_corners=False,
    )  # (2, 1, H, W)
    return sources.long().flatten(1).to(device)


def _warp_matrix(
    name: str, sign: int, magnitude: int, height: int, width: int
) -> list[list[float]]:
    """The map from output to source positions, 2 x 3, in pixels from the image's centre."""
    shear = sign * _strength(0.3, magnitude)
    angle = sign * math.radians(_strength(30.0, magnitude))
    match name:
        case "ShearX":  # the corner at the top left stays
            return [[1, shear, shear * height / 2], [0, 1, 0]]
        case "ShearY":
            return [[1, 0, 0], [shear, 1, shear * width / 2]]
        case "TranslateX":
            return [[1, 0, -sign * int(_strength(150 / 331 * width, magnitude))], [0, 1, 0]]
        case "TranslateY":
            return [[1, 0, 0], [0, 1, -sign * int(_strength(150 / 331 * height, magnitude))]]
        case _:  # Rotate
            cos, sin = math.cos(angle), math.sin(angle)
            return [[cos, -sin, 0], [sin, cos, 0]]


def _extrapolate(images: Tensor, other: Tensor, strength: Tensor) -> Tensor:
    """Move away from `other`, or towards it where `strength` is negative; drop fractions."""
    return (images * (1 + strength)).sub_(strength * other).clamp_(0, 255).to(torch.uint8)


def _luma(images: Tensor) -> Tensor:
    """`(B, 1, H, W)`, uint8."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, 1)  # (B, 1, H, W) each
    return (0.2989 * red + 0.587 * green + 0.114 * blue).to(torch.uint8)


def _smooth(images: Tensor) -> Tensor:
    """3 x 3 means with weight 5 in the centre; pixels at the border stay."""
    wide = images.to(torch.int16)
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]  # (B, C, H - 2, W)
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[:, :, 1:-1, 1:-1]
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = (total / 13).round_()
    return smooth


def _autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel to the full range; constant channels stay."""
    low = images.amin((2, 3), keepdim=True).float()  # (B, C, 1, 1)
    high = images.amax((2, 3), keepdim=True).float()
    constant = low == high
    scale = torch.where(constant, 1.0, 255 / (high - low))
    return ((images - low.masked_fill(constant, 0)) * scale).clamp_(0, 255).to(torch.uint8)


def _equalize(images: Tensor) -> Tensor:
    """Make each channel's histogram as flat as a table of levels can; near-constant ones stay."""
    levels = images.flatten(2).long()  # (B, C, H * W)
    histogram = levels.new_zeros(*levels.shape[:2], 256)
    histogram.scatter_add_(2, levels, torch.ones_like(levels))
    of_brightest = histogram.gather(2, levels.amax(2, keepdim=True))  # (B, C, 1)
    step = (levels.shape[2] - of_brightest) // 255  # pixels per new level
    darker = histogram.cumsum(2) - histogram
    table = ((darker + step // 2) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return table.gather(2, levels).to(torch.uint8).view_as(images)


def make_views(
    images: Tensor,
    config: Config,
    generator: functions.Generator,
    host_generator: functions.Generator,
    size: int | None = None,
) -> Tensor:
    """One random view `(B, C, H, W)` in [0, 1] of each uint8 image `(B, C, H, W)`.

    `generator` lives on the images' device, `host_generator` on the CPU. Crops may have another
    `size` than the images.
    """
    if config.augmentation == "crop":
        return pretraining.crop_views(images, config, generator, size)
    ops, negative = draw_randaugment(len(images), config.num_ops, host_generator)
    return functions.to_float(rand_augment(images, ops, negative, config.magnitude))


def make_optimizer(model: SimSiam, config: Config) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, its rate scaled by batch size / 256; the predictor's stays constant.

    A predictor whose rate does not decay adapts to the latest representations (appendix A).
    """
    predictor: dict[str, Any] = {"params": list(model.predictor.parameters()), "fixed": True}
    rest = [*model.encoder.parameters(), *model.projector.parameters()]
    rate = config.learning_rate * config.batch_size / 256
    fused = rest[0].device.type != "mps"
    return torch.optim.SGD(
        [{"params": rest}, predictor], rate, 0.9, weight_decay=config.weight_decay, fused=fused
    )


def pretrain(
    model: SimSiam, train: functions.Split, config: Config, folder: Path, fabric: Any
) -> list[dict[str, float]]:
    """Algorithm 1 of the paper until `config.epochs`, from the folder's checkpoint if it has one.

    Returns:
        The rows of `metrics.csv`.

    Raises:
        Diverged: the loss is not finite; the last finished epoch's checkpoint is kept.
    """
    optimizer = make_optimizer(model, config)
    training = pretraining.Pretraining(
        "simsiam", model, optimizer, train, config, folder, fabric, collapse_loss=-0.99
    )
    for images, generator in training.batches():
        pairs = images.repeat(2, 1, 1, 1)  # (2B, C, H, W), all first views, then all second views
        views = make_views(pairs, config, generator, training.host_generator, training.view_size)
        views = functions.normalize(views, training.mean, training.std)
        z, p = training.model(views.contiguous(memory_format=torch.channels_last))  # (2B, D)
        (z1, z2), (p1, p2) = z.chunk(2), p.chunk(2)  # (B, D) each
        loss = negative_cosine_similarity(p1, z2) / 2 + negative_cosine_similarity(p2, z1) / 2
        training.step(loss, z)
    return training.history


def embed(
    model: SimSiam, data: functions.ImageData, config: Config, folder: Path, fabric: Any
) -> None:
    """UMAP (10 neighbours, cosine) of z and of p of at most 10,000 test images.

    Training images of a data set without labels. Writes `embeddings.npz` and, for z and p,
    `umap_*.png` and `umap_*.csv` with the coordinates, and `embedding.html` of z.
    """
    mean, std = functions.channel_statistics(data.train.images)
    split = pretraining.split_to_map(data)
    labels = None if split.labels is None else split.labels.cpu().numpy()
    arrays = {} if labels is None else {"labels": labels}
    for name, tail in (("z", ()), ("p", (model.predictor,))):
        network = nn.Sequential(model.encoder, model.projector, *tail)
        features = functions.extract_features(network, split.images, mean, std, fabric)
        points = functions.project_2d(features, "umap", config.seed, neighbours=10)
        arrays |= {name: features.cpu().numpy(), f"{name}_coordinates": points}
        title = f"UMAP of {name} of {len(split):,} images of {data.name}"
        functions.plot_scatter(folder / f"umap_{name}.png", points, labels, data.classes, title)
        rows = [{"x": float(x), "y": float(y)} for x, y in points]
        if labels is not None:
            rows = [row | {"class": data.classes[k]} for row, k in zip(rows, labels, strict=True)]
        functions.write_csv(folder / f"umap_{name}.csv", rows)
        if name == "z":
            pretraining.write_map(folder, data, features, points, title)
    arrays |= {"features": arrays["z"], "coordinates": arrays["z_coordinates"]}
    functions.write_arrays(folder / "embeddings.npz", **arrays)


def main(config: Config) -> dict[str, Any]:
    """Do the stages of `config` and return what `summary.json` holds.

    Accuracies in [0, 1]; the linear probe's is that of the last epoch.

    Raises:
        UserError: data, settings or a run folder that cannot be used.
        Diverged: the loss is not finite.
    """

    def make_model(channels: int, image_size: int) -> SimSiam:
        head = (config.head, config.projector_layers)
        return SimSiam(config.encoder, config.stem, *head, channels, image_size, config.width)

    stages = {"probe": pretraining.probe_stage, "embed": embed, "study": label_study.study_stage}
    return pretraining.run_pretraining(
        "simsiam", config, make_model, pretrain, stages, pretraining.EVALUATION
    )


if __name__ == "__main__":
    functions.run_script(main, Config, __doc__)
