"""SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709) on small images, and what it learns.

    python simclr.py                                    # CIFAR-10, ResNet18, 100 epochs, a GPU
    python simclr.py --dataset digits --encoder small   # no download, a minute on a laptop

Pretrains an encoder with NT-Xent, then freezes it: linear probe, kNN, t-SNE, per-class accuracy.
Published for the default recipe: 85.6 % linear, 20 minutes on an A100 (dkobak/simclr-cifar10).

Stem, colour jitter and the missing blur are those of the paper's CIFAR-10 (appendix B.9); both
views share a batch, as in its code. Other than there: ResNet18, SGD without warm-up instead of
LARS, a weight decay of 5e-4 on all weights instead of 1e-6, crops from 0.2 of the area instead of
0.08, grey with probability 0.1 instead of 0.2, a head of 1024 hidden units, 100 epochs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evaluation
import functions
from support import datasets, experiment, muon, pretraining, runs, settings, verdict
from support.errors import require
from support.settings import setting


@dataclass(frozen=True)
class Config(pretraining.PretrainingConfig, weight_decay=5e-4):
    """The defaults are a published recipe for CIFAR-10 on one GPU."""

    SCRIPT = "simclr"
    STAGES = ("pretrain", *evaluation.STAGES)

    projection: Literal["nonlinear", "linear", "none"] = setting(
        "nonlinear", "model", "projection head, used in pretraining only"
    )
    projection_hidden: int = setting(1024, "model", "hidden units of the nonlinear head")
    projection_size: int = setting(128, "model", "outputs of the head")

    batch_size: int = setting(512, "training", "images per step; each gives two views")
    optimizer: Literal["sgd", "adam", "lars", "muon"] = setting(
        "sgd", "training", "sgd and lars with momentum 0.9; muon: try a rate of 0.02, decay of 0.1"
    )
    learning_rate: float = setting(
        0.06, "training", "peak; sgd and lars multiply it by batch size / 256, the others do not"
    )
    temperature: float = setting(0.5, "training", "temperature of NT-Xent")
    loss: Literal["nt-xent", "dcl"] = setting(
        "nt-xent", "training", "dcl: an anchor's own views are left out of its denominator"
    )
    views: int = setting(2, "views", "views of each image, all of which attract each other")

    finetune_epochs: int = setting(20, "evaluation", "epochs of fine-tuning")
    embedding: Literal["tsne", "umap"] = setting("tsne", "evaluation", "map of the embed stage")

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(
            1e-4 <= self.temperature <= 1e4,
            f"--temperature must be in [0.0001, 10000], not {self.temperature}",
        )
        require(2 <= self.views <= 64, f"--views must be in [2, 64], not {self.views}")
        for name in ("projection_hidden", "projection_size", "finetune_epochs"):
            good = 1 <= getattr(self, name) <= 10**6
            require(good, f"{settings.flag(name)} must be at least 1, at most 1,000,000")

    def unread(self) -> dict[str, str]:
        """As `RunConfig.unread`."""
        head = {"linear": ("projection_hidden",), "none": ("projection_hidden", "projection_size")}
        ignored = head.get(self.projection, ())
        return super().unread() | dict.fromkeys(ignored, "--projection nonlinear")


class SimCLR(nn.Module):
    """An encoder f and a projection head g: `z = g(f(images))` (section 2.1)."""

    def __init__(self, config: Config, channels: int, image_size: int):
        super().__init__()
        self.encoder: Any = config.make_encoder(channels, image_size)
        features, size = self.encoder.num_features, config.projection_size
        self.projection_head: nn.Module = nn.Identity()
        if config.projection == "linear":
            self.projection_head = nn.Linear(features, size)
        elif config.projection == "nonlinear":
            hidden = config.projection_hidden
            self.projection_head = nn.Sequential(
                nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, size)
            )

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings `z` `(B, projection_size)` of images `(B, C, H, W)`."""
        return self.projection_head(self.encoder(images))


def nt_xent_loss(
    z: Tensor,
    temperature: float,
    everyone: Tensor | None = None,
    rows: Tensor | None = None,
    views: int = 2,
    decoupled: bool = False,
) -> Tensor:
    """NT-Xent, equation 1 of the paper, averaged over all anchors.

    With V > 2 views each anchor has V - 1 positives: for anchor i the loss is log sum_k exp(s_ik)
    over all k but i, less the mean of s_ip over its positives p (Khosla et al. 2020, equation 2,
    with images for classes). Of two views that is equation 1.

    Args:
        z: `(V B, D)`, the embeddings of the first views, then of the second views, and so on.
        temperature: positive.
        everyone: with several processes, whose anchors `z` `(V b, D)` are a part of: the embeddings
            `(V B, D)` of all of them, with gradients.
        rows: `(V b,)`, the positions of `z` in `everyone`.
        views: V.
        decoupled: leave all views of an anchor's own image out of its denominator, not only itself
            (DCL, Yeh et al. 2022, equation 6).

    Returns:
        A scalar, in float32 also under autocast; when all embeddings are equal log(V B - 1), if
        decoupled log(V B - V).

    Raises:
        UserError: a number of rows that V does not divide, or a temperature that is not positive.
    """
    require(temperature > 0, f"the temperature must be positive, not {temperature}")
    whole = z.ndim == 2 and len(z) > 0 and len(z) % views == 0
    require(whole, f"z must be ({views}B, D), not {tuple(z.shape)}")
    alone = everyone is None or everyone is z
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(z.float(), dim=1)
        everyone = z if alone else F.normalize(everyone.float(), dim=1)
        images = len(everyone) // views  # B; the views of image i are i, i + B, i + 2B, ...
        others = [everyone.roll(shift * images, 0) for shift in range(1, views)]
        partners = torch.stack(others).sum(0)  # (V B, D)
        if rows is None:
            rows = torch.arange(len(z), device=z.device)
        elif not alone:
            partners = partners[rows]
        positive = (z * partners).sum(1) / (temperature * (views - 1))  # (V b,)
        # An anchor is not its own negative; the positives stay in the denominator, once each.
        left_out = rows[:, None]  # (V b, 1)
        if decoupled:
            own = torch.arange(views, device=z.device) * images
            left_out = (left_out + own) % len(everyone)  # (V b, V)
        denominator = LogSumExp.apply(z / temperature, everyone, left_out)  # (V b,)
        return denominator.mean() - positive.mean()


class LogSumExp(torch.autograd.Function):
    """log of the sum of exp(a_i . e_k) over all k but `left_out[i]`; `a` `(n, D)`, `e` `(N, D)`.

    As `(a @ e.T).scatter(1, left_out, -inf).logsumexp(1)`, but with one matrix `(n, N)` instead of
    four: it becomes its own gradient in place.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, e: Tensor, left_out: Tensor) -> Tensor:
        """`(n,)`."""
        similarity = (a @ e.T).scatter_(1, left_out, -torch.inf)  # (n, N)
        result = torch.cat([part.logsumexp(1) for part in similarity.split(256)])
        ctx.save_for_backward(a, e, similarity, result)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients of `a` and `e`; the matrix is spent afterwards."""
        a, e, similarity, result = ctx.saved_tensors
        weight = similarity.sub_(result[:, None]).exp_().mul_(gradient[:, None])  # (n, N)
        return weight @ e, weight.T @ a, None


def make_optimizer(model: Any, config: Config) -> torch.optim.Optimizer:
    """The optimizer at its peak learning rate, scaled by batch size for sgd and lars.

    Muon (Jordan et al. 2024) trains the encoder's matrices, AdamW at a tenth of the rate the rest.
    """
    rate, decay = config.learning_rate, config.weight_decay
    scaled = rate * config.batch_size / 256
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), rate, weight_decay=decay, fused=True)
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), scaled, 0.9, weight_decay=decay, fused=True)
    if config.optimizer == "muon":
        return muon.make_muon(model.encoder, list(model.parameters()), config)
    from pytorch_optimizer import LARS  # leaves biases and norms without decay and adaptation

    return LARS(model.parameters(), scaled, weight_decay=decay, momentum=0.9)


def pretrain(
    model: SimCLR, data: datasets.ImageData, config: Config, run: runs.Run, fabric: Any
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
    decoupled = config.loss == "dcl"
    left_out = config.views if decoupled else 1
    chance = math.log(config.views * config.batch_size - left_out)  # the loss of equal embeddings
    method = verdict.Method(chance_loss=chance, temperature=config.temperature)
    training = pretraining.Pretraining(
        model, optimizer, data.train, config, run, fabric, monitor, method, config.views
    )
    compiled = pretraining.choose_compiler(config, training.steps, fabric.device)
    network, optimizer = fabric.setup(compiled(model), optimizer)
    apply_views, loss_function = compiled(pretraining.apply_views), compiled(nt_xent_loss)
    for epoch in training.epochs():
        for step, images, generator in training.batches(epoch):
            optimizer.param_groups[0]["lr"] = training.rate(peak, step)
            copies = images.repeat(config.views, 1, 1, 1)  # (V b, C, H, W), first views first
            drawn = pretraining.draw_views(copies, config, generator)
            views = apply_views(copies, drawn, config.view_side(epoch))  # (V b, C, H, W) in [0, 1]
            views = data.train.normalize_for_encoder(views)
            if step == 0 and fabric.is_global_zero:
                functions.plot_views(run.folder / "views.png", images, views, data.train)
            z = network(views)  # (V b, D)
            everyone = training.share.gather(z)  # (V B, D), of all processes
            rows = training.share.rows  # (V b,), the places of z among them
            loss = loss_function(z, config.temperature, everyone, rows, config.views, decoupled)
            training.record(loss, z, views)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
    return training.history


def main(config: Config) -> dict[str, Any]:
    """Do the stages of `config` and return what `summary.json` holds.

    Accuracies in [0, 1]; the linear probe's and fine-tuning's are those of the last epoch.

    Raises:
        UserError: data, settings or a run folder that cannot be used.
        Diverged: the loss is not finite.
    """
    if config.optimizer == "lars":
        runs.require_package("pytorch_optimizer", "pytorch-optimizer", "--optimizer lars")
    data = functions.load_dataset(config)
    return experiment.run_experiment(config, data, SimCLR, pretrain, evaluation.STAGES)


if __name__ == "__main__":
    runs.run_script(main, Config, __doc__)
