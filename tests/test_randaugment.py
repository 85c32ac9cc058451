from itertools import product
from unittest import mock

import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torchvision.transforms import RandAugment

from support import randaugment

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 20, 31), (1, 17, 12)]
OPS = randaugment.RANDAUGMENT_OPS


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(channels, height, width):
    """Digits, smooth images, noise, and the edge cases of contrast and equalisation."""
    shape = (channels, height, width)
    digits = torch.from_numpy(load_digits().images[: 3 * channels]).float() * 15  # 0 to 240
    digits = digits.view(3, channels, 8, 8)
    smooth = 255 * torch.rand(3, channels, 5, 5, generator=seeded(1))
    scaled = [F.interpolate(x, (height, width), mode="bilinear") for x in (digits, smooth)]
    noise = torch.randint(0, 256, (2, *shape), dtype=torch.uint8, generator=seeded(2))
    faint = noise[:1] % 3 + 100
    two_levels = (noise[:1] > 250).byte() * 255  # too few bright pixels to equalise
    one_pixel = torch.zeros(1, *shape, dtype=torch.uint8)
    one_pixel[..., 3, 4] = 200
    flat = [torch.full((1, *shape), level, dtype=torch.uint8) for level in (0, 1, 77, 255)]
    mixed = noise[:1].clone()
    mixed[:, 0] = 9  # a constant channel beside others
    scaled = torch.cat(scaled).round().byte()
    return torch.cat([scaled, noise, faint, two_levels, one_pixel, *flat, mixed])


def naive(image, op, negative, magnitude):
    """torchvision's RandAugment on one image, when it draws this op and this sign."""

    def drawn(count, shape):
        return torch.full(shape, {len(OPS): op, 2: int(negative)}[count])

    with mock.patch.object(torch, "randint", drawn):
        return RandAugment(num_ops=1, magnitude=magnitude)(image)


def naive_chains(images, ops, negative, magnitude):
    results = []
    for image, chain, signs in zip(images, ops.tolist(), negative.tolist(), strict=True):
        for op, sign in zip(chain, signs, strict=True):
            image = naive(image, op, sign, magnitude)
        results.append(image)
    return torch.stack(results)


def assert_equal(result, expected):
    assert result.dtype == torch.uint8
    assert result.shape == expected.shape
    assert (result != expected).sum() == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_each_op_equals_torchvisions_on_every_image(name, shape):
    images = pictures(*shape)
    op = OPS.index(name)
    for magnitude, negative in product((0, 1, 4, 9, 19, 30), (False, True)):
        ops = torch.full((len(images), 1), op)
        result = randaugment.rand_augment(
            images, ops, torch.full_like(ops, negative).bool(), magnitude
        )
        assert_equal(result, torch.stack([naive(x, op, negative, magnitude) for x in images]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("magnitude", [9, 14])
def test_mixed_chains_equal_the_naive_loop(shape, magnitude):
    images = pictures(*shape).repeat(4, 1, 1, 1)
    draws = randaugment.draw_randaugment(len(images), 5, seeded(magnitude))
    result = randaugment.rand_augment(images, *draws, magnitude)
    assert_equal(result, naive_chains(images, *draws, magnitude))


def test_the_default_magnitude_is_nine():
    images = pictures(1, 28, 28)
    draws = randaugment.draw_randaugment(len(images), 5, seeded())
    assert_equal(randaugment.rand_augment(images, *draws), naive_chains(images, *draws, 9))


@pytest.mark.parametrize("op", [*range(len(OPS)), None], ids=[*OPS, "chains"])
def test_input_is_not_modified_nor_shared(op):
    images = pictures(1, 28, 28)
    ops, negative = randaugment.draw_randaugment(len(images), 5, seeded())
    ops = ops if op is None else torch.full_like(ops, op)
    before = [value.clone() for value in (images, ops, negative)]
    result = randaugment.rand_augment(images, ops, negative)
    result.zero_()
    for value, old in zip((images, ops, negative), before, strict=True):
        assert torch.equal(value, old)


def test_inputs_with_other_strides_and_sizes():
    images = pictures(3, 32, 32)
    ops, negative = randaugment.draw_randaugment(len(images), 5, seeded(5))
    expected = randaugment.rand_augment(images, ops, negative)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert_equal(randaugment.rand_augment(channels_last, ops, negative), expected)
    assert_equal(randaugment.rand_augment(images[:0], ops[:0], negative[:0]), images[:0])
    assert_equal(randaugment.rand_augment(images, ops[:, :0], negative[:, :0]), images)


def test_sizes_do_not_mix_up_their_warps():
    # The maps of source pixels are kept between calls.
    for shape, magnitude in product([(1, 20, 31), (1, 31, 20), (1, 28, 28)], (9, 20)):
        images = pictures(*shape)[:2]
        for name in ("ShearX", "TranslateX", "TranslateY", "Rotate"):
            ops = torch.full((2, 1), OPS.index(name))
            negative = torch.tensor([[False], [True]])
            result = randaugment.rand_augment(images, ops, negative, magnitude)
            assert_equal(result, naive_chains(images, ops, negative, magnitude))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("channels", [1, 3])
def test_gpu_equals_cpu(channels):
    images = pictures(channels, 32, 32).repeat(8, 1, 1, 1)
    draws = randaugment.draw_randaugment(len(images), 5, seeded(6))
    on_gpu = randaugment.rand_augment(images.cuda(), *draws)
    assert on_gpu.is_cuda
    # Contrast: the means may differ in the last bit, and with them a level.
    assert (on_gpu.cpu() != randaugment.rand_augment(images, *draws)).float().mean() < 1e-3


# draws


def test_draws_have_the_documented_types():
    ops, negative = randaugment.draw_randaugment(7, 3, seeded())
    assert ops.shape == negative.shape == (7, 3)
    assert ops.dtype == torch.int64
    assert negative.dtype == torch.bool
    assert ops.device.type == negative.device.type == "cpu"


def test_equal_images_become_different():
    images = pictures(1, 28, 28)[:1].expand(64, -1, -1, -1)
    result = randaugment.rand_augment(images, *randaugment.draw_randaugment(64, 5, seeded()))
    assert len(result.flatten(1).unique(dim=0)) > 55


def test_ops_are_uniform_and_independent_of_round_and_sign():
    count = 60_000
    ops, negative = randaugment.draw_randaugment(count, 3, seeded(7))
    for column, signs in zip(ops.unbind(1), negative.unbind(1), strict=True):
        cells = (2 * column + signs).bincount(minlength=2 * len(OPS))  # op and sign together
        assert stats.chisquare(cells.numpy()).pvalue > 1e-4
    for first, second in [(0, 1), (1, 2), (0, 2)]:
        pairs = (len(OPS) * ops[:, first] + ops[:, second]).bincount(minlength=len(OPS) ** 2)
        assert stats.chisquare(pairs.numpy()).pvalue > 1e-4
        signs = (2 * negative[:, first].long() + negative[:, second]).bincount(minlength=4)
        assert stats.chisquare(signs.numpy()).pvalue > 1e-4
    neighbours = (len(OPS) * ops[:-1, 0] + ops[1:, 0]).bincount(minlength=len(OPS) ** 2)
    assert stats.chisquare(neighbours.numpy()).pvalue > 1e-4


def test_draws_come_from_the_generator_alone():
    state = torch.get_rng_state()
    first = randaugment.draw_randaugment(64, 5, seeded(8))
    generator = seeded(8)
    again = randaugment.draw_randaugment(64, 5, generator)
    following = randaugment.draw_randaugment(64, 5, generator)
    assert torch.equal(torch.get_rng_state(), state)
    for one, two, three in zip(first, again, following, strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one, three)
