import math

import pytest
import torch
import torch.nn.functional as F

from simclr import nt_xent_loss
from support.errors import UserError


def embeddings(pairs, size=8, seed=0):
    return torch.randn(2 * pairs, size, generator=torch.Generator().manual_seed(seed))


def loop_over_positives(z, temperature, views, decoupled=False):
    """Equation 2 of Khosla et al. 2020 with images for classes, term by term, in float64."""
    z = z.double()
    images, total = len(z) // views, 0.0
    for i in range(len(z)):
        own = [k for k in range(len(z)) if k % images == i % images]
        others = [k for k in range(len(z)) if (k not in own if decoupled else k != i)]
        weights = {
            k: ((z[i] @ z[k]) / (z[i].norm() * z[k].norm()) / temperature).exp()
            for k in range(len(z))
        }
        positives = [k for k in own if k != i]
        for p in positives:
            share = weights[p] / sum(weights[k] for k in others)
            total = total - share.log() / len(positives)
    return total / len(z)


def paper_loss(z, temperature, count_positive=1):
    """Equation 1 of Chen et al. 2020 and the average after it, term by term, in float64."""
    z = z.double()
    half = len(z) // 2
    total = 0.0
    for i in range(len(z)):
        positive = (i + half) % len(z)
        terms = []
        for k in range(len(z)):
            if k != i:
                cosine = (z[i] @ z[k]) / (z[i].norm() * z[k].norm())
                copies = count_positive if k == positive else 1
                terms += [(cosine / temperature).exp()] * copies
        own = (z[i] @ z[positive]) / (z[i].norm() * z[positive].norm())
        total = total - ((own / temperature).exp() / sum(terms)).log()
    return total / len(z)


def value_and_gradient(loss, z):
    z = z.clone().requires_grad_()
    value = loss(z)
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach(), gradient


@pytest.fixture
def float64(monkeypatch):
    """Let the loss compute in float64, where it asks for float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_equals_the_papers_equation(float64, pairs, temperature):
    z = embeddings(pairs).double()
    ours = value_and_gradient(lambda z: nt_xent_loss(z, temperature), z)
    expected = value_and_gradient(lambda z: paper_loss(z, temperature), z)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("pairs", "temperature"), [(2, 1.0), (16, 0.05), (300, 0.5)])
def test_equals_lightly(float64, pairs, temperature):
    z = embeddings(pairs, 32).double()
    reference = pytest.importorskip("lightly.loss").NTXentLoss(temperature)
    ours = value_and_gradient(lambda z: nt_xent_loss(z, temperature), z)
    expected = value_and_gradient(lambda z: reference(*z.chunk(2)), z)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decoupled", [False, True], ids=["nt-xent", "dcl"])
@pytest.mark.parametrize(("views", "images"), [(2, 4), (3, 2), (4, 5)])
def test_every_other_view_is_a_positive(float64, views, images, decoupled):
    z = torch.randn(views * images, 6, generator=torch.Generator().manual_seed(1)).double()
    options = {"views": views, "decoupled": decoupled}
    ours = value_and_gradient(lambda z: nt_xent_loss(z, 0.3, **options), z)
    expected = value_and_gradient(lambda z: loop_over_positives(z, 0.3, **options), z)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("pairs", "temperature"), [(2, 1.0), (50, 0.1)])
def test_decoupled_equals_lightly(float64, pairs, temperature):
    z = embeddings(pairs, 32).double()
    reference = pytest.importorskip("lightly.loss").DCLLoss(temperature)
    ours = value_and_gradient(lambda z: nt_xent_loss(z, temperature, decoupled=True), z)
    expected = value_and_gradient(lambda z: reference(*F.normalize(z, dim=1).chunk(2)), z)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decoupled", [False, True], ids=["nt-xent", "dcl"])
@pytest.mark.parametrize("views", [2, 3])
def test_shares_of_several_processes_average_to_the_whole(float64, views, decoupled):
    whole = torch.randn(views * 6, 5, generator=torch.Generator().manual_seed(2)).double()
    options = {"views": views, "decoupled": decoupled}
    expected = value_and_gradient(lambda z: nt_xent_loss(z, 0.3, **options), whole)

    def in_shares(z):
        parts = torch.arange(views * 6).view(views, 3, 2).transpose(0, 1).flatten(1)  # (3, 2V)
        return sum(nt_xent_loss(z[rows], 0.3, z, rows, **options) for rows in parts) / 3

    ours = value_and_gradient(in_shares, whole)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_positive_is_once_in_the_denominator():
    # Known mistake of public versions: once as the first column, once in the masked matrix.
    z = embeddings(4)
    ours = nt_xent_loss(z, 0.5).item()
    assert ours < paper_loss(z, 0.5, count_positive=2).item() - 0.05
    assert ours > paper_loss(z, 0.5, count_positive=0).item() + 0.05


@pytest.mark.parametrize("pairs", [1, 2, 100])
def test_equal_embeddings_give_the_log_of_the_number_of_candidates(pairs):
    z = embeddings(1)[:1].expand(2 * pairs, -1)
    assert nt_xent_loss(z, 0.1).item() == pytest.approx(math.log(2 * pairs - 1), abs=2e-5)
    z = z[:1].expand(3 * pairs, -1)
    assert nt_xent_loss(z, 0.1, views=3).item() == pytest.approx(math.log(3 * pairs - 1), abs=2e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_orthogonal_pairs_have_a_closed_form(temperature):
    # Positives have cosine 1, the 2B - 2 others 0.
    z = torch.eye(6).repeat(2, 1)
    expected = math.log(1 + 10 * math.exp(-1 / temperature))
    assert nt_xent_loss(z, temperature).item() == pytest.approx(expected, abs=1e-5)


def test_views_may_be_swapped(float64):
    z = embeddings(6).double()
    value, gradient = value_and_gradient(lambda z: nt_xent_loss(z, 0.5), z)
    swapped = value_and_gradient(lambda z: nt_xent_loss(z, 0.5), z.roll(6, 0))
    torch.testing.assert_close(swapped, (value, gradient.roll(6, 0)))
    other_pairs = torch.cat((z[:6], z[6:].roll(1, 0)))
    assert abs(nt_xent_loss(other_pairs, 0.5) - value) > 1e-3


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_length_of_z_does_not_matter(float64, factor):
    z = embeddings(6).double()
    value, gradient = value_and_gradient(lambda z: nt_xent_loss(z, 0.5), z)
    lengths = torch.linspace(0.5, 2, 12)[:, None].double() * factor
    scaled = value_and_gradient(lambda z: nt_xent_loss(z, 0.5), z * lengths)
    torch.testing.assert_close(scaled, (value, gradient / lengths), rtol=1e-9, atol=1e-12)
    assert (z * gradient).sum(1).abs().max() < 1e-12  # no pull along z itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_in_float32_under_autocast(dtype):
    def under_autocast(z):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nt_xent_loss(z, 0.05)
        assert loss.dtype == torch.float32
        return loss  # the backward pass is outside, as in training

    z = embeddings(16).to(dtype)
    value, gradient = value_and_gradient(under_autocast, z)
    expected = value_and_gradient(lambda z: nt_xent_loss(z, 0.05), z.to(torch.float32))
    assert value.item() == pytest.approx(expected[0].item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected[1].to(dtype))


def test_small_temperatures_do_not_overflow():
    # exp(1 / 0.005) is above float32's largest number.
    z = embeddings(16)
    value, gradient = value_and_gradient(lambda z: nt_xent_loss(z, 0.005), z)
    assert value.item() == pytest.approx(paper_loss(z, 0.005).item(), rel=1e-4)
    assert gradient.isfinite().all()


def test_input_is_not_modified():
    z = F.normalize(embeddings(4), dim=1)
    before = z.clone()
    nt_xent_loss(z, 1.0)
    assert torch.equal(z, before)


@pytest.mark.parametrize("temperature", [0, -0.5, math.nan])
def test_refuses_a_temperature_that_is_not_positive(temperature):
    with pytest.raises(UserError, match="temperature must be positive"):
        nt_xent_loss(embeddings(2), temperature)


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (4,), (2, 2, 4)])
def test_refuses_what_is_not_two_views(shape):
    with pytest.raises(UserError, match="2B, D"):
        nt_xent_loss(torch.ones(shape), 0.5)


def test_one_matrix_of_similarities_is_kept_for_the_backward_pass():
    kept, z = [], torch.randn(20, 5, requires_grad=True)

    def pack(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        nt_xent_loss(z, 0.5)
    assert kept.count((20, 20)) == 1
