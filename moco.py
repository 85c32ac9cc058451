"""MoCo (He et al. 2020, https://arxiv.org/abs/1911.05722) on small images: a queue of negatives.

    python moco.py                                      # CIFAR-10, ResNet18, 200 epochs, a GPU
    python moco.py --dataset digits --encoder small --batch-size 128 --queue-size 512 --epochs 100
                                                        # no download, a minute on a laptop

Pretrains an encoder with InfoNCE: a view's query is to find the key of its image's other view among
the keys of earlier batches, which a slowly moving copy of the encoder made and a queue keeps. Then
linear probe, kNN, t-SNE, per-class accuracy, as in simclr.py. The paper's second version (Chen et
al. 2020, https://arxiv.org/abs/2003.04297) brought the nonlinear head and colour jitter, the third
(Chen et al. 2021, https://arxiv.org/abs/2104.02057) the symmetric loss.

The authors' demo for CIFAR-10 reports for ResNet18, by kNN on the head's output, 82.6 % after 200
epochs and 88.7 % after 800, with the symmetric loss 85.3 and 89.7. `--projection linear
--crop-scale-min 0.08` makes the defaults the demo's. Its symmetric loss is the sum of the two of
which `--symmetric` takes the mean; `--learning-rate 0.06 --weight-decay 2.5e-4` make up for that.

Differences from the paper, as in the demo: the stem of CIFAR-10, no blur, a shorter queue that a
faster key encoder fills, and BatchNorm over parts of the batch instead of a GPU's share of it.
Unlike the demo's, the queue begins with keys of images: one direction tells all images from random
vectors, and a short training stays there.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evaluation
import functions
from support import (
    augment,
    datasets,
    devices,
    experiment,
    muon,
    pretraining,
    runs,
    settings,
    verdict,
)
from support.errors import require
from support.settings import setting


@dataclass(frozen=True)
class Config(
    pretraining.PretrainingConfig, epochs=200, weight_decay=5e-4, grayscale_probability=0.2
):
    """The defaults are those of the authors' demo for CIFAR-10, with the head of v2."""

    SCRIPT = "moco"
    STAGES = ("pretrain", *evaluation.STAGES)

    projection: Literal["nonlinear", "linear"] = setting(
        "nonlinear", "model", "projection head, used in pretraining only; linear: that of v1"
    )
    projection_size: int = setting(128, "model", "outputs of the head")
    bn_splits: int = setting(
        8, "model", "parts of the batch with BatchNorm statistics of their own; 1: plain BatchNorm"
    )

    batch_size: int = setting(512, "training", "images per step; each gives two views")
    optimizer: Literal["sgd", "muon"] = setting(
        "sgd", "training", "sgd with momentum 0.9; muon: try a rate of 0.02 and a decay of 0.1"
    )
    learning_rate: float = setting(0.03, "training", "peak; sgd multiplies it by batch size / 256")
    temperature: float = setting(0.1, "training", "temperature of InfoNCE")
    queue_size: int = setting(
        4096, "training", "keys that serve as negatives; far fewer than there are images"
    )
    key_momentum: float = setting(
        0.99, "training", "share of itself that the key encoder keeps in a step, the paper's m"
    )
    symmetric: bool = setting(False, "training", "each view is a query, and a key for the other")

    finetune_epochs: int = setting(20, "evaluation", "epochs of fine-tuning")
    embedding: Literal["tsne", "umap"] = setting("tsne", "evaluation", "map of the embed stage")

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require(
            1e-4 <= self.temperature <= 1e4,
            f"--temperature must be in [0.0001, 10000], not {self.temperature}",
        )
        require(
            0 <= self.key_momentum < 1, f"--key-momentum must be in [0, 1), not {self.key_momentum}"
        )
        for name in ("projection_size", "bn_splits", "queue_size", "finetune_epochs"):
            good = 1 <= getattr(self, name) <= 10**6
            require(good, f"{settings.flag(name)} must be at least 1, at most 1,000,000")
        require(
            self.batch_size % self.bn_splits == 0 and self.batch_size >= 2 * self.bn_splits,
            f"--batch-size {self.batch_size} does not divide into --bn-splits {self.bn_splits} "
            "parts of two images or more",
        )


class SplitBatchNorm(nn.Module):
    """BatchNorm over each `images` images of a batch, as if they were on a GPU of their own.

    In evaluation it is the BatchNorm that it was made of, whose tensors it shares. The running
    statistics move towards the mean of the parts' statistics, as in the authors' demo. It is no
    `nn.BatchNorm2d`: the parts of several processes are never synchronised.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, whole: nn.BatchNorm2d, images: int):
        super().__init__()
        self.images, self.eps = images, whole.eps
        self.momentum: Any = whole.momentum
        self.weight, self.bias = whole.weight, whole.bias
        for name, buffer in whole.named_buffers():
            self.register_buffer(name, buffer)
        for name, child in whole.named_children():  # timm's have the activation in them
            self.add_module(name, child)

    def forward(self, images: Tensor) -> Tensor:
        """As `nn.BatchNorm2d`'s."""
        outputs = self.normalize(images)
        for child in self.children():
            outputs = child(outputs)
        return outputs

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize `(B, C, H, W)` by its parts' statistics, in evaluation by the running ones."""
        if not self.training:
            whole = (self.running_mean, self.running_var, self.weight, self.bias)
            return F.batch_norm(images, *whole, False, self.momentum, self.eps)
        parts = len(images) // self.images
        means = self.running_mean.repeat(parts, 1)  # (parts, C)
        variances = self.running_var.repeat(parts, 1)  # (parts, C)
        # Both compute the same: a GPU is slow at many small kernels, a CPU at the folding's copies.
        normalize = self.fold_parts if images.is_cuda else self.take_parts
        outputs = normalize(images, means, variances)
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        return outputs

    def take_parts(self, images: Tensor, means: Tensor, variances: Tensor) -> Tensor:
        """Normalize one part after the other; moves `means` and `variances` `(parts, C)`."""
        affine = (self.weight, self.bias, True, self.momentum, self.eps)
        outputs = [
            F.batch_norm(part, mean, variance, *affine)
            for part, mean, variance in zip(
                images.split(self.images), means, variances, strict=True
            )
        ]
        return torch.cat(outputs)

    def fold_parts(self, images: Tensor, means: Tensor, variances: Tensor) -> Tensor:
        """Normalize all parts at once, each as channels of its own, as `take_parts` does."""
        parts, channels = means.shape
        folded = images.permute(0, 2, 3, 1).unflatten(0, (parts, -1))  # (parts, b, H, W, C)
        folded = folded.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)  # (b, parts C, H, W)
        moved = (means.view(-1), variances.view(-1))
        affine = (self.weight.repeat(parts), self.bias.repeat(parts))
        outputs = F.batch_norm(folded, *moved, *affine, True, self.momentum, self.eps)
        outputs = outputs.permute(0, 2, 3, 1).unflatten(3, (parts, channels))
        return outputs.permute(3, 0, 1, 2, 4).flatten(0, 1).permute(0, 3, 1, 2)


def split_batch_norms(network: nn.Module, images: int) -> None:
    """Replace each BatchNorm of a network by one over each `images` images of a batch."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, SplitBatchNorm(child, images))


class MoCo(nn.Module):
    """An encoder and a head for queries, a copy of both for keys, and the queue (section 3.2)."""

    queue: Tensor  # (K, D), keys of length 1, the oldest first

    def __init__(self, config: Config, channels: int, image_size: int):
        super().__init__()
        self.encoder: Any = config.make_encoder(channels, image_size)
        if config.bn_splits > 1:
            split_batch_norms(self.encoder, config.batch_size // config.bn_splits)
        features, size = self.encoder.num_features, config.projection_size
        layers: list[nn.Module] = [nn.Linear(features, size)]
        if config.projection == "nonlinear":  # Chen et al. 2020, section 3
            layers = [nn.Linear(features, features), nn.ReLU(), *layers]
        self.projection_head = nn.Sequential(*layers)
        both = nn.Sequential(self.encoder, self.projection_head)
        self.key_encoder = copy.deepcopy(both).requires_grad_(False)
        keys = torch.randn(config.queue_size, size)
        self.register_buffer("queue", F.normalize(keys, dim=1))

    def forward(self, *views: Tensor) -> Tensor:
        """Embeddings `(B, projection_size)`, the queries, of B images `(B, C, H, W)`.

        They may come in several parts, which then go through the network one by one.
        """
        return torch.cat([self.projection_head(self.encoder(part)) for part in views])

    def query_parameters(self) -> list[nn.Parameter]:
        """Those that are trained, in the order of the key encoder's."""
        return [*self.encoder.parameters(), *self.projection_head.parameters()]

    @torch.no_grad()
    def update_key_encoder(self, momentum: float) -> None:
        """Equation 2: each weight keeps a share `momentum` of itself and takes the query's rest."""
        keys = self.key_encoder.parameters()
        for key, query in zip(keys, self.query_parameters(), strict=True):
            key.lerp_(query, 1 - momentum)

    def enqueue(self, keys: Tensor) -> None:
        """Put keys `(n, D)` of length 1 at the queue's end; the n oldest leave it."""
        self.queue.copy_(torch.cat([self.queue, keys])[-len(self.queue) :])


def info_nce_loss(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """InfoNCE, equation 1 of the paper, averaged over the queries.

    Args:
        q: `(n, D)`, the queries.
        k: `(n, D)`, the positive key of each.
        queue: `(K, D)`, the negative keys of all, of length 1.
        temperature: positive.

    Returns:
        A scalar, in float32 also under autocast; log(K + 1) when all embeddings are equal.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = F.normalize(q.float(), dim=1), F.normalize(k.float(), dim=1)
        positive = (q * k).sum(1, keepdim=True)  # (n, 1)
        logits = torch.cat([positive, q @ queue.T], 1) / temperature  # (n, 1 + K)
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


@torch.no_grad()
def encode_keys(
    network: nn.Module, views: Tensor, order: Tensor, share: pretraining.Share
) -> Tensor:
    """Keys `(B, D)` of length 1 of the views of all processes, in the batch's order.

    They are encoded in another order, by other processes, and so in other parts of BatchNorm than
    the queries: statistics that a query and its key have in common would tell the two apart from
    the others (section 3.3, "Shuffling BN").

    Args:
        network: the key encoder.
        views: `(b, C, H, W)`, this process's.
        order: `(B,)`, a permutation, the same in all processes.
        share: this process's part of the batch.
    """
    views = share.gather(views)[order[share.part]]  # (b, C, H, W), of other images
    keys = network(views.contiguous(memory_format=torch.channels_last))  # (b, D)
    return share.gather(F.normalize(keys.float(), dim=1))[order.argsort()]  # (B, D)


def make_optimizer(model: MoCo, config: Config) -> torch.optim.Optimizer:
    """SGD at its peak rate, scaled by batch size / 256, or Muon (Jordan et al. 2024)."""
    weights, rate, decay = model.query_parameters(), config.learning_rate, config.weight_decay
    if config.optimizer == "muon":
        return muon.make_muon(model.encoder, weights, config)
    scaled = rate * config.batch_size / 256
    return torch.optim.SGD(weights, scaled, 0.9, weight_decay=decay, fused=True)


def pretrain(
    model: MoCo, data: datasets.ImageData, config: Config, run: runs.Run, fabric: Any
) -> list[dict[str, Any]]:
    """Algorithm 1 of the paper until `config.epochs`, from the folder's checkpoint if it has one.

    Several processes do what one would, but for BatchNorm: its running statistics are those of the
    first one's parts, and with one part, on CPUs, each process has statistics of its own.

    Returns:
        The rows of `metrics.csv`.

    Raises:
        Diverged: the loss is not finite; the last checkpoint is kept.
    """
    optimizer = make_optimizer(model, config)
    peak = optimizer.param_groups[0]["lr"]
    monitor = functions.Monitor(data.train, config.knn_every, fabric)
    chance = math.log(config.queue_size + 1)  # the loss of equal embeddings
    method = verdict.Method(chance_loss=chance, temperature=config.temperature)
    training = pretraining.Pretraining(
        model, optimizer, data.train, config, run, fabric, monitor, method, views=1
    )
    if not training.history:
        model.update_key_encoder(momentum=0)  # the encoder may have been given with --weights
    compiled = pretraining.choose_compiler(config, training.steps, fabric.device)
    network, optimizer = fabric.setup(compiled(model), optimizer)
    key_network = compiled(model.key_encoder)
    apply_views, loss_function = compiled(pretraining.apply_views), compiled(info_nce_loss)
    if fabric.is_global_zero and config.queue_size > len(data.train):
        print(
            f"--queue-size {config.queue_size} is more than the {len(data.train)} images: each is "
            "among its own negatives; take a smaller one"
        )

    def make_view(images: Tensor, epoch: int, generator: augment.Generator) -> Tensor:
        drawn = pretraining.draw_views(images, config, generator)
        views = apply_views(images, drawn, config.view_side(epoch))
        return data.train.normalize_for_encoder(views)  # (b, C, H, W)

    def make_keys(view: Tensor, shuffling: torch.Generator) -> Tensor:
        order = torch.randperm(config.batch_size, generator=shuffling, device=view.device)
        with fabric.autocast():
            return encode_keys(key_network, view, order, training.share)  # (B, D)

    for epoch in training.epochs():
        shuffling = devices.epoch_generator(config.seed, epoch, fabric.device, devices.KEY_ORDER)
        if epoch == 0:  # Fill the queue with keys of batches of the epochs after the last.
            fill = math.ceil(config.queue_size / config.batch_size)
            later = map(training.batches, itertools.count(config.epochs))
            batches = itertools.islice(itertools.chain.from_iterable(later), fill)
            for _, images, generator in batches:
                model.enqueue(make_keys(make_view(images, 0, generator), shuffling))
        for step, images, generator in training.batches(epoch):
            optimizer.param_groups[0]["lr"] = training.rate(peak, step)
            x1, x2 = (make_view(images, epoch, generator) for _ in range(2))
            if step == 0 and fabric.is_global_zero:
                views = torch.cat([x1, x2])
                functions.plot_views(run.folder / "views.png", images, views, data.train)
            query_views, key_views = ((x1, x2), (x2, x1)) if config.symmetric else ((x1,), (x2,))
            keys = [make_keys(view, shuffling) for view in key_views]  # (B, D) each
            q = network(*query_views)  # (b, D); symmetric (2b, D), whose loss is the mean of both
            k = torch.cat([part[training.share.part] for part in keys])  # (b, D) or (2b, D), as q
            loss = loss_function(q, k, model.queue, config.temperature)
            training.record(loss, q[: len(images)])
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            model.update_key_encoder(config.key_momentum)
            model.enqueue(torch.cat(keys))  # (B, D); symmetric (2B, D)
    return training.history


def main(config: Config) -> dict[str, Any]:
    """Do the stages of `config` and return what `summary.json` holds.

    Accuracies in [0, 1]; the linear probe's and fine-tuning's are those of the last epoch.

    Raises:
        UserError: data, settings or a run folder that cannot be used.
        Diverged: the loss is not finite.
    """
    processes, nodes = devices.process_layout(config)
    require(
        config.bn_splits == 1 or config.bn_splits % (processes * nodes) == 0,
        f"--bn-splits {config.bn_splits} does not divide among {processes * nodes} processes",
    )
    data = functions.load_dataset(config)
    return experiment.run_experiment(config, data, MoCo, pretrain, evaluation.STAGES)


if __name__ == "__main__":
    runs.run_script(main, Config, __doc__)
