"""Muon beside PyTorch's, and its orthogonal step beside the singular value decomposition."""

import pytest
import torch
from torch import nn

import moco
import rnn
import simclr
import simsiam
from support import muon
from support.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (6, 40), (40, 6)])
def test_the_step_has_the_momentums_directions_and_singular_values_of_about_one(shape):
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(1, 20, min(shape))
    found = orthogonalize(1e3 * u @ values.diag() @ v)
    inside = u.T @ found @ v.T  # the singular vectors are those of the matrix
    torch.testing.assert_close(inside, inside.diag().diag(), rtol=0, atol=1e-4)
    assert 0.65 < inside.diag().min() < inside.diag().max() < 1.25


@pytest.mark.parametrize("rank", [1, 4, 60])
def test_in_bfloat16_the_step_is_as_near_to_the_polynomial_as_by_the_steps_as_written(rank):
    torch.manual_seed(0)
    matrix = torch.randn(80, rank) @ torch.randn(rank, 200) + 1e-5 * torch.randn(80, 200)
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    exact = (u * values @ v).float()
    written = torch.optim._muon._zeropower_via_newtonschulz(
        matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7
    )
    found = orthogonalize(matrix, torch.bfloat16)
    assert found.dtype == torch.float32
    assert torch.linalg.matrix_norm(found, 2) < 1.25
    assert (found - exact).norm() < 1.3 * (written.float() - exact).norm()
    torch.testing.assert_close(orthogonalize(matrix), exact, rtol=0, atol=1e-3)


def test_a_gradient_of_zero_moves_nothing():
    for dtype in (torch.float32, torch.bfloat16):
        assert not orthogonalize(torch.zeros(3, 4), dtype).any()


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", "bfloat16"), ("float32", "float32")])
def test_a_step_is_computed_in_the_precision_of_the_training(monkeypatch, precision, dtype):
    seen = set()
    monkeypatch.setattr(muon, "orthogonalize", lambda x, dtype: seen.add(dtype) or x)
    config = rnn.Config(optimizer="muon", learning_rate=0.03, precision=precision, device="cpu")
    model = rnn.RowRNN(config, "gru", 8, 10)
    optimizer = rnn.make_optimizer(model, config)
    model(torch.randn(4, 8, 8)).sum().backward()
    optimizer.step()
    assert seen == {getattr(torch, dtype)}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 16, 1), nn.Linear(16, 8)
        )
        self.encoder.append(nn.GRU(8, 4))
        self.head = nn.Linear(8, 4)


def naive_newton_schulz(matrix, coefficients, steps, eps):
    a, b, c = coefficients
    x = matrix.double() / matrix.double().norm()
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.float()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_matrices_of_the_encoder_move_as_by_pytorchs_muon_and_all_else_as_by_adamw(
    monkeypatch, layout
):
    # PyTorch's rounds to bfloat16.
    name = "torch.optim._muon._zeropower_via_newtonschulz"
    monkeypatch.setattr(name, naive_newton_schulz)
    torch.manual_seed(0)
    network = Network().to(memory_format=layout)
    weights = dict(network.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}

    def unfold(value):
        """As PyTorch's takes it: a kernel as a matrix."""
        return value.flatten(1) if value.ndim > 1 else value

    theirs = {name: nn.Parameter(unfold(value).clone()) for name, value in before.items()}
    layers = ("0.weight", "2.weight", "3.weight", "4.weight_ih_l0", "4.weight_hh_l0")
    matrices = [theirs[f"encoder.{layer}"] for layer in layers]
    known = {id(weight) for weight in matrices}
    rest = [weight for weight in theirs.values() if id(weight) not in known]
    optimizers = [
        torch.optim.Muon(matrices, weight_decay=0.3, momentum=0.95),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0),
    ]
    ours = Muon(network.encoder, list(network.parameters()), 1.0, 0.3)
    for rate in (0.02, 0.01, 0.005):
        ours.param_groups[0]["lr"] = optimizers[0].param_groups[0]["lr"] = rate
        optimizers[1].param_groups[0]["lr"] = rate / 10
        for name, weight in weights.items():
            weight.grad = torch.randn_like(weight)  # in its layout
            theirs[name].grad = unfold(weight.grad).clone()
        for optimizer in (ours, *optimizers):
            optimizer.step()
    for name, value in before.items():
        moved = theirs[name] - unfold(value)
        differs = theirs[name] - unfold(weights[name].detach())
        assert moved.norm() > 0, name
        assert differs.norm() < 1e-4 * moved.norm(), name


@pytest.mark.parametrize("script", [simclr, simsiam, moco])
def test_each_method_gives_muon_the_encoders_convolutions_and_adamw_all_else(script):
    model_class = {simclr: "SimCLR", simsiam: "SimSiam", moco: "MoCo"}[script]
    config = script.Config(
        encoder="resnet18", width=8, optimizer="muon", learning_rate=0.03, weight_decay=0.2
    )
    model = getattr(script, model_class)(config, 3, 16)
    optimizer = script.make_optimizer(model, config)
    matrices, rest = ({id(w) for w in group["params"]} for group in optimizer.param_groups)
    assert matrices == {id(w) for w in model.encoder.parameters() if w.ndim == 4}
    trained = {id(w) for name, w in model.named_parameters() if not name.startswith("key_encoder")}
    assert rest == trained - matrices
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0]
    assert optimizer.param_groups[0]["lr"] == 0.03  # not scaled by the batch


def test_rnn_gives_muon_its_recurrent_layers_and_adamw_all_else():
    config = rnn.Config(optimizer="muon", learning_rate=0.03, num_layers=2, bidirectional=True)
    model = rnn.RowRNN(config, "lstm", 8, 10)
    matrices, rest = (group["params"] for group in rnn.make_optimizer(model, config).param_groups)
    assert len(matrices) == 2 * 2 * 2  # of inputs and states, two layers, two directions
    assert {id(w) for w in matrices} < {id(w) for w in model.recurrent.parameters()}
    assert len(matrices) + len(rest) == len(list(model.parameters()))


def test_gradients_stay_and_what_has_none_is_left_alone():
    network = Network()
    before = network.encoder[3].weight.detach().clone()
    optimizer = Muon(network.encoder, list(network.parameters()), 0.1, 0.1)
    network.encoder[0].weight.grad = torch.ones(64, 3, 3, 3)
    optimizer.step()
    assert (network.encoder[0].weight.grad == 1).all()
    assert torch.equal(network.encoder[3].weight, before)
    assert list(optimizer.state) == [network.encoder[0].weight]
