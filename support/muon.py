"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), an optimizer of matrices.

A step along the momentum would go farthest where the gradients agree most. Muon makes all singular
values of the momentum about 1 first, so that every direction is learned at the same pace.

`torch.optim.Muon` takes no kernels of convolutions, and always computes in bfloat16, which a CPU
without units for it does twenty times slower than float32 (oneDNN held to AVX2, 256 x 2,304).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from support import devices, settings


def orthogonalize(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """U V' of a matrix U S V' `(m, n)`, nearly: singular values become 0.7 to 1.2, tiny ones less.

    Five Newton-Schulz steps x <- (a + b x x' + c (x x')^2) x with the coefficients of the page
    above, computed in `dtype`. The factors before x are multiplied first, as they are matrices of
    the smaller side: in float32 that takes a third of the time of the steps as written. In bfloat16
    the first three steps are applied before the last two: what rounding adds to directions that a
    matrix lacks grows from step to step, and five at once make of it hundreds of times the rest (a
    matrix of rank 1). Applied so, the result is as near to that of exact numbers as the steps as
    written are.
    """
    wide = len(matrix) <= matrix.shape[1]
    x = matrix if wide else matrix.T  # (r, c), r <= c
    x = (x / (x.norm() + 1e-7)).to(dtype)  # no singular value is above 1 then
    for steps in (5,) if dtype == torch.float32 else (3, 2):
        gram = x @ x.T  # (r, r)
        product = factor = newton_schulz_factor(gram)
        for _ in range(steps - 1):
            gram = factor @ gram @ factor  # all are polynomials in the first gram, so they commute
            factor = newton_schulz_factor(gram)
            product = factor @ product
        x = product @ x  # (r, c)
    return (x if wide else x.T).to(matrix.dtype)


def newton_schulz_factor(gram: Tensor) -> Tensor:
    """The matrix a + b gram + c gram^2 of `(r, r)`."""
    factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
    factor.diagonal().add_(3.4445)
    return factor


def find_matrices(module: nn.Module) -> set[Tensor]:
    """The weights that multiply: of convolutions, linear and recurrent layers, not of norms.

    A kernel counts as a matrix with a row for each output channel, and the gates of a recurrent
    layer are one matrix together: one by one they learn no more, and a training takes a third to a
    half as long again (docs/row_by_row.md).
    """
    matrices = set()
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            matrices.add(layer.weight)
        elif isinstance(layer, nn.RNNBase):
            named = layer.named_parameters()
            matrices |= {weight for name, weight in named if name.startswith("weight")}
    return matrices


class Muon(torch.optim.AdamW):
    """Muon for the matrices of an encoder, AdamW for all other weights.

    Biases, norms and what follows the encoder have a tenth of the rate and no weight decay. The
    schedule sets the rate of the first group, of the matrices; the second follows it.

    Args:
        encoder: whose convolutions, linear and recurrent layers are meant.
        weights: all that are trained, those of the encoder among them.
        rate: of the matrices: how far each of their directions moves in a step.
        weight_decay: of the matrices, decoupled: each step takes off this share times the rate.
        dtype: of the matrix products of a step.
    """

    def __init__(
        self,
        encoder: nn.Module,
        weights: list[nn.Parameter],
        rate: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
    ):
        matrices = find_matrices(encoder)
        groups = [
            {"params": [w for w in weights if w in matrices], "weight_decay": weight_decay},
            {"params": [w for w in weights if w not in matrices], "weight_decay": 0.0},
        ]
        super().__init__(groups, rate, betas=(0.9, 0.95), fused=True)
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move all weights that have a gradient; return the loss of `closure`, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first, second = self.param_groups
        second["lr"] = first["lr"] / 10
        gradients = [weight.grad for weight in first["params"]]
        for weight in first["params"]:
            if weight.grad is not None:
                self._step_matrix(weight, first["lr"], first["weight_decay"])
            weight.grad = None  # AdamW leaves out what has none
        super().step()
        for weight, gradient in zip(first["params"], gradients, strict=True):
            weight.grad = gradient
        return loss

    def _step_matrix(self, weight: Tensor, rate: float, decay: float) -> None:
        state, momentum = self.state[weight], 0.95
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
            state["step"] = torch.zeros(())  # AdamW looks for it in all states that it loads
        buffer = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
        ahead = weight.grad.lerp(buffer, momentum)  # Nesterov's
        rows, columns = len(weight), weight[0].numel()
        update = orthogonalize(ahead.flatten(1), self._dtype).reshape(weight.shape)
        weight.mul_(1 - rate * decay).add_(update, alpha=-rate * max(1, rows / columns) ** 0.5)


def make_muon(
    encoder: nn.Module, weights: list[nn.Parameter], config: settings.TrainingConfig
) -> Muon:
    """Muon with the rate and decay of `config`, in bfloat16 where the training is."""
    precision = devices.pick_precision(config.device, config.precision)
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    return Muon(encoder, weights, config.learning_rate, config.weight_decay, dtype)
