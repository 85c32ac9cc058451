from unittest import mock

import pytest
import torch
from torch import nn

from support import recurrent

KINDS = {"rnn": (recurrent.RNN, nn.RNN), "gru": (recurrent.GRU, nn.GRU)}


def pair(kind, layers, size=12, hidden=20, **options):
    torch.manual_seed(0)
    module, other = (
        make(size, hidden, layers, batch_first=True, **options) for make in KINDS[kind]
    )
    other.load_state_dict(module.state_dict())
    return module, other, torch.randn(7, 9, size)


@pytest.mark.parametrize(("layers", "both"), [(1, False), (3, False), (1, True), (2, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_passes_by_hand_equal_pytorchs_in_float32(monkeypatch, kind, layers, both):
    module, other, rows = pair(kind, layers, bidirectional=both)
    ours, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    expected, expected_last = other(theirs)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)  # by hand, unrounded
    recurrence = {"rnn": recurrent.Tanh, "gru": recurrent.Gates}[kind]
    with mock.patch.object(recurrence, "apply", wraps=recurrence.apply) as by_hand:
        outputs, last = module(ours)
    assert by_hand.call_count == layers * (1 + both)
    torch.testing.assert_close(outputs, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(last, expected_last, atol=1e-6, rtol=1e-5)
    weights = torch.randn_like(outputs)  # a gradient for every step, and one for the last states
    ((outputs * weights).sum() + last.square().sum()).backward()
    ((expected * weights).sum() + expected_last.square().sum()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)
    for (name, one), two in zip(module.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_is_close_in_bfloat16(kind, layers):
    module, other, rows = pair(kind, layers, 96, 128)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        outputs, _ = module(rows)
    expected, _ = other(rows)
    assert outputs.dtype == torch.float32
    assert not torch.equal(outputs, expected)
    assert (outputs - expected).norm() / expected.norm() < 0.01
    outputs[:, -1].sum().backward()
    expected[:, -1].sum().backward()
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert (one.grad - two.grad).norm() / two.grad.norm() < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_is_pytorchs_own_without_autocast(kind):
    module, other, rows = pair(kind, 2)
    assert torch.equal(module(rows)[0], other(rows)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_the_same_forward_pass(kind):
    module, _, rows = pair(kind, 2)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        outputs, _ = module(rows)
        with torch.no_grad():
            assert torch.equal(module(rows)[0], outputs)


@pytest.mark.parametrize("both", [False, True])
def test_an_lstm_computes_in_bfloat16_or_where_there_is_no_kernel_in_float32(both):
    torch.manual_seed(0)
    module = recurrent.LSTM(12, 20, 2, batch_first=True, bidirectional=both)
    other = nn.LSTM(12, 20, 2, batch_first=True, bidirectional=both)
    other.load_state_dict(module.state_dict())
    rows = torch.randn(7, 9, 12)
    expected, _ = other(rows)
    for supported in (torch.ops.mkldnn._is_mkldnn_bf16_supported(), False):
        with (
            mock.patch.object(
                torch.ops.mkldnn, "_is_mkldnn_bf16_supported", return_value=supported
            ),
            torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        ):
            outputs, _ = module(rows)
        assert (outputs.float() - expected).norm() / expected.norm() < 0.01
        outputs.float().sum().backward()
    assert torch.equal(outputs, expected)  # float32
