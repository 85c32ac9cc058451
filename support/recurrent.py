"""`nn.RNN` and `nn.GRU` whose matrix products run in bfloat16 on a CPU, and `nn.LSTM`.

PyTorch has a bfloat16 kernel for LSTMs there, on processors with AVX-512; its RNN and GRU do
everything in bfloat16 step by step, tanh thirty times slower than in float32 included, so they gain
nothing from matrix units. Here the products are bfloat16 and the rest float32, with the backward
pass by hand. Weights, names and results (up to rounding) are those of PyTorch's modules, which take
over everywhere else.

T steps, B batch, H hidden units.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tanh(torch.autograd.Function):
    """h_t = tanh(projected_t + W h_(t-1)), from h = 0."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, weight: Tensor) -> Tensor:
        """All h_t `(T, B, H)`, float32, of `projected` `(T, B, H)` and `weight` `(H, H)`."""
        steps, batch, hidden = projected.shape
        weight = weight.to(projected.dtype)
        transposed = weight.t().contiguous()
        states = projected.new_zeros(steps + 1, batch, hidden, dtype=torch.float32)
        rounded = torch.zeros_like(states, dtype=projected.dtype)
        now = zip(projected, rounded[:-1], states[1:], rounded[1:], strict=True)
        for inputs, last, state, rounded_state in now:
            product = torch.mm(last, transposed)  # (B, H)
            torch.add(inputs.float(), product, out=state).tanh_()
            rounded_state.copy_(state)
        ctx.save_for_backward(states, rounded, weight)
        return states[1:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Through time, from the last step to the first."""
        states, rounded, weight = ctx.saved_tensors
        before = torch.empty_like(rounded[1:])  # gradients before the tanh, (T, B, H)
        earlier: Any = 0
        parts = [part.unbind() for part in (gradient, before, states[1:])]
        for arriving, here, state in zip(*map(reversed, parts), strict=True):
            here.copy_(torch.ops.aten.tanh_backward(arriving + earlier, state))
            earlier = torch.mm(here, weight)
        return before, (before.flatten(0, 1).t() @ rounded[:-1].flatten(0, 1)).float()


class Gates(torch.autograd.Function):
    """The gated recurrence of `nn.GRU`.

    `projected` holds the inputs to the reset, update and new gate with all biases but one: the new
    gate's recurrent bias, which the reset gate multiplies, is `bias`.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """All h_t `(T, B, H)`, float32, of `(T, B, 3H)`, `(3H, H)` and `(H,)`."""
        steps, batch, _ = projected.shape
        hidden = weight.shape[1]
        weight = weight.to(projected.dtype)
        transposed = weight.t().contiguous()
        states = projected.new_zeros(steps + 1, batch, hidden, dtype=torch.float32)
        rounded = torch.zeros_like(states, dtype=projected.dtype)
        kept = []
        now = zip(*(projected, states[:-1], rounded[:-1], states[1:], rounded[1:]), strict=True)
        for inputs, last, rounded_last, state, rounded_state in now:
            inputs = inputs.float()  # (B, 3H)
            product = torch.mm(rounded_last, transposed)  # (B, 3H)
            gates = (inputs[:, : 2 * hidden] + product[:, : 2 * hidden]).sigmoid_()
            reset, update = gates.chunk(2, 1)
            candidate = bias + product[:, 2 * hidden :]
            new = torch.addcmul(inputs[:, 2 * hidden :], reset, candidate).tanh_()
            torch.lerp(new, last, update, out=state)
            rounded_state.copy_(state)
            kept += [gates, candidate, new]
        ctx.save_for_backward(states, rounded, weight, *kept)
        return states[1:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Through time, from the last step to the first."""
        states, rounded, weight, *kept = ctx.saved_tensors
        steps, batch, hidden = gradient.shape
        # Gradients before the gates' non-linearities: of the inputs, and of the products.
        inputs = rounded.new_empty(steps, batch, 3 * hidden)
        products = torch.empty_like(inputs)
        earlier: Any = 0
        parts = [part.unbind() for part in (gradient, inputs, products, states[:-1])]
        parts += [kept[0::3], kept[1::3], kept[2::3]]
        for arriving, d_inputs, d_products, last, gates, candidate, new in zip(
            *map(reversed, parts), strict=True
        ):
            reset, update = gates.chunk(2, 1)
            arriving = arriving + earlier
            passed = arriving * update
            d_new = torch.ops.aten.tanh_backward(arriving - passed, new)
            d_update = torch.ops.aten.sigmoid_backward(arriving * (last - new), update)
            d_reset = torch.ops.aten.sigmoid_backward(d_new * candidate, reset)
            d_inputs.copy_(torch.cat((d_reset, d_update, d_new), 1))
            d_products.copy_(d_inputs)
            d_products[:, 2 * hidden :] = d_new * reset
            earlier = passed.add_(torch.mm(d_products, weight))
        flat = products.flatten(0, 1)  # (T B, 3H)
        d_weight = (flat.t() @ rounded[:-1].flatten(0, 1)).float()
        return inputs, d_weight, flat[:, 2 * hidden :].sum(0, dtype=torch.float32)


def _forward(
    module: nn.RNNBase, rows: Tensor, states_of: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """What the module's own `forward` returns; `states_of` computes a layer in one direction."""
    outputs, last = rows.transpose(0, 1), []  # (T, B, I)
    for layer in range(module.num_layers):
        directions = []
        for suffix in ("", "_reverse")[: 1 + module.bidirectional]:
            weights = [
                getattr(module, f"{name}_l{layer}{suffix}")
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ]
            inputs = outputs.flip(0) if suffix else outputs
            states = states_of(inputs, *weights)  # (T, B, H)
            last.append(states[-1])
            directions.append(states.flip(0) if suffix else states)
        outputs = torch.cat(directions, 2) if module.bidirectional else states
    return outputs.transpose(0, 1), torch.stack(last)


def _tanh_states(
    rows: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> Tensor:
    return Tanh.apply(F.linear(rows, weight_ih, bias_ih + bias_hh), weight_hh)


def _gated_states(
    rows: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> Tensor:
    hidden = weight_hh.shape[1]
    outside, inside = bias_hh.split([2 * hidden, hidden])
    bias = bias_ih + F.pad(outside, (0, hidden))
    return Gates.apply(F.linear(rows, weight_ih, bias), weight_hh, inside)


def _by_hand(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and torch.is_autocast_enabled("cpu")


class RNN(nn.RNN):
    """`nn.RNN(batch_first=True)` with tanh, without a first state and dropout."""

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Outputs `(B, T, H)` and last states `(layers, B, H)` of `(B, T, I)`."""
        return _forward(self, rows, _tanh_states) if _by_hand(rows) else super().forward(rows)


class GRU(nn.GRU):
    """`nn.GRU(batch_first=True)`, without a first state and dropout."""

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Outputs `(B, T, H)` and last states `(layers, B, H)` of `(B, T, I)`."""
        return _forward(self, rows, _gated_states) if _by_hand(rows) else super().forward(rows)


class LSTM(nn.LSTM):
    """`nn.LSTM(batch_first=True)`, without a first state; float32 where bfloat16 has no kernel."""

    def forward(self, rows: Tensor) -> tuple[Tensor, Any]:  # type: ignore[override]
        """Outputs `(B, T, H)` and last states `(layers, B, H)`, h and c, of `(B, T, I)`."""
        plain = _by_hand(rows) and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        with torch.autocast("cpu", enabled=False) if plain else contextlib.nullcontext():
            return super().forward(rows.float() if plain else rows)
