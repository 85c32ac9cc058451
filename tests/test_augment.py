import colorsys
import random
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import ColorJitter, GaussianBlur, InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import rotate
from torchvision.transforms.v2 import functional as reference

from support import augment

# Each random op with its probability (where it has one) as the first argument. The strengths are
# those of SimCLR; blur gets a sigma that changes every image visibly.
CHANCE = {
    "flip": lambda p, images, g: augment.random_horizontal_flip(images, p, g),
    "flip in crop": lambda p, images, g: augment.random_resized_crop(images, (1, 1), p, g),
    "brightness": lambda p, images, g: augment.color_jitter(images, 0.4, p=p, generator=g),
    "contrast": lambda p, images, g: augment.color_jitter(images, 0, 0.4, p=p, generator=g),
    "saturation": lambda p, images, g: augment.color_jitter(images, 0, 0, 0.4, p=p, generator=g),
    "hue": lambda p, images, g: augment.color_jitter(images, 0, 0, 0, 0.1, p=p, generator=g),
    "jitter": lambda p, images, g: augment.color_jitter(images, 0.4, 0.4, 0.4, 0.1, p, g),
    "grayscale": lambda p, images, g: augment.apply_grayscale(
        images, augment.draw_grayscale(images, p, g)
    ),
    "blur": lambda p, images, g: augment.apply_gaussian_blur(
        images, augment.draw_gaussian_blur(images, (0.5, 2.0), p, g)
    ),
}
RANDOM = {
    "crop": lambda images, g: augment.random_resized_crop(images, (0.2, 1), 0.0, g),
    **{
        name: partial(op, 0.5 if "flip" in name or name == "grayscale" else 1.0)
        for name, op in CHANCE.items()
    },
}
APPLIED = {
    "resized_crop": lambda x: augment.resized_crop(x, torch.tensor([[1.0, 2, 5, 6]] * len(x)), 8),
    "adjust_brightness": lambda x: augment.adjust_brightness(x, torch.full((len(x),), 1.3)),
    "adjust_contrast": lambda x: augment.adjust_contrast(x, torch.full((len(x),), 1.3)),
    "adjust_saturation": lambda x: augment.adjust_saturation(x, torch.full((len(x),), 1.3)),
    "adjust_hue": lambda x: augment.adjust_hue(x, torch.full((len(x),), 0.2)),
    "grayscale": augment.grayscale,
    "blur": lambda x: augment.blur(x, torch.ones(len(x)), 3),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed))


def edge_images(channels, height=9, width=14):
    """Noise, constants, black, white and, in colour, pure colours, grey ramps and ties of two."""
    ramp = torch.linspace(0, 1, width).expand(channels, height, width)
    flat = [torch.full((channels, height, width), value) for value in (0.0, 0.3, 1.0)]
    images = [noise(channels, height, width), ramp, *flat]
    if channels == 3:
        colors = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)]
        colors += [(0.7, 0.7, 0.2), (0.2, 0.7, 0.7), (0.7, 0.2, 0.7), (0.5, 0.5, 0.5 + 1e-4)]
        images += [torch.tensor(c).float()[:, None, None].expand(3, height, width) for c in colors]
    return torch.stack(images)


def assert_same(result, expected):
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.stack(list(expected)), rtol=0, atol=1e-5)


FACTORS = {
    "adjust_brightness": (0.0, 0.4, 1.0, 1.7),
    "adjust_contrast": (0.0, 0.4, 1.0, 1.7),
    "adjust_saturation": (0.0, 0.4, 1.0, 1.7),
    "adjust_hue": (-0.5, -0.37, -0.1, 0.0, 0.1, 0.23, 0.5),
}


@pytest.mark.parametrize(
    ("name", "channels"), [*product(FACTORS, [3]), *product(list(FACTORS)[:3], [1])]
)
def test_adjust_equals_torchvision(name, channels):
    images = edge_images(channels)
    factors = FACTORS[name]
    batch = images.repeat_interleave(len(factors), 0)  # every image with every factor
    factor = torch.tensor(factors).repeat(len(images))
    expected = [getattr(reference, name)(x, f.item()) for x, f in zip(batch, factor, strict=True)]
    assert_same(getattr(augment, name)(batch, factor), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_grayscale_equals_torchvision(channels):
    images = edge_images(channels)
    assert_same(augment.grayscale(images), [reference.rgb_to_grayscale(x, 1) for x in images])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_blur_equals_torchvision(kernel_size, channels):
    sigmas = (0.1, 0.7, 2.0)
    images = edge_images(channels)[:5].repeat_interleave(len(sigmas), 0)
    sigma = torch.tensor(sigmas * (len(images) // len(sigmas)))
    expected = [
        reference.gaussian_blur(x, [kernel_size] * 2, [s.item()] * 2)
        for x, s in zip(images, sigma, strict=True)
    ]
    assert_same(augment.blur(images, sigma, kernel_size), expected)


def border_boxes(height, width):
    corners = [
        (top, left, h, w)
        for h, w in ((1, 1), (4, 5), (height, 3), (2, width))
        for top in (0, height - h)
        for left in (0, width - w)
    ]
    return [(0, 0, height, width), (2, 3, 5, 4), *corners]


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 28, 28), (3, 9, 14), (1, 14, 9)])
@pytest.mark.parametrize("size", [None, 6, (11, 21)])
def test_resized_crop_equals_torchvision(shape, size):
    boxes = border_boxes(*shape[1:])
    images = noise(len(boxes), *shape)
    size = shape[1:] if size is None else size
    both = [size, size] if isinstance(size, int) else list(size)
    expected = [
        reference.resized_crop(x, *box, both, antialias=False)
        for x, box in zip(images, boxes, strict=True)
    ]
    assert_same(augment.resized_crop(images, torch.tensor(boxes).float(), size), expected)


# Powers of two only: for other widths grid_sample's own rounding moves a position by 1e-6 pixels,
# which images in [0, 1] do not show and huge values would.
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 64)])
def test_resized_crop_reads_nothing_outside_its_box(height, width):
    boxes = border_boxes(height, width)
    images = torch.full((len(boxes), 2, height, width), 1e6)
    for image, (top, left, h, w) in zip(images, boxes, strict=True):
        image[:, top : top + h, left : left + w] = noise(2, h, w)
    expected = [
        reference.resized_crop(x, *box, [20, 20], antialias=False)
        for x, box in zip(images, boxes, strict=True)
    ]
    result = augment.resized_crop(images, torch.tensor(boxes).float(), 20)
    assert result.max() <= 1
    assert_same(result, expected)


def test_flip_and_grayscale_equal_torchvision_where_they_apply():
    images = noise(64, 3, 5, 7)
    for op, expected in (
        (CHANCE["flip"], reference.horizontal_flip(images)),
        (CHANCE["grayscale"], reference.rgb_to_grayscale(images, 3)),
    ):
        result = op(0.5, images, seeded())
        changed = (result != images).flatten(1).any(1)
        assert 10 < changed.sum() < 54
        torch.testing.assert_close(result[changed], expected[changed], rtol=0, atol=1e-5)


def test_a_mirrored_crop_is_the_crop_mirrored_by_torchvision():
    images = noise(64, 3, 9, 14)
    plain = augment.random_resized_crop(images, (0.08, 1), 0.0, seeded())
    result = augment.random_resized_crop(images, (0.08, 1), 0.5, seeded())
    mirrored = (result != plain).flatten(1).any(1)
    assert 10 < mirrored.sum() < 54
    torch.testing.assert_close(
        result[mirrored], reference.horizontal_flip(plain[mirrored]), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CHANCE)
def test_probability_0_changes_nothing(name, channels):
    images = noise(32, channels, 8, 8)
    largest = (CHANCE[name](0.0, images, seeded()) - images).abs().max().item()
    assert largest == 0


@pytest.mark.parametrize("name", CHANCE)
def test_probability_1_changes_every_image(name):
    images = noise(200, 3, 8, 8)
    result = CHANCE[name](1.0, images, seeded())
    assert ((result - images).abs().amax((1, 2, 3)) > 1e-5).all()


# Known mistake of public versions: one draw for the whole batch.
@pytest.mark.parametrize("name", CHANCE)
def test_probability_is_per_sample(name):
    images = noise(1000, 3, 8, 8)
    result = CHANCE[name](0.3, images, seeded())
    changed = ((result - images).abs().amax((1, 2, 3)) > 1e-5).sum().item()
    assert stats.binomtest(changed, len(images), 0.3).pvalue > 0.001


@pytest.mark.parametrize("name", [n for n in RANDOM if "flip" not in n and n != "grayscale"])
def test_parameters_are_per_sample(name):
    images = noise(1, 3, 16, 16).repeat(12, 1, 1, 1)
    result = RANDOM[name](images, seeded()).flatten(1)
    assert torch.cdist(result, result).fill_diagonal_(torch.inf).min() > 1e-4


def test_channels_and_pixels_share_their_samples_parameters():
    # A draw per pixel or per channel would pass the tests above.
    images = torch.full((20, 3, 6, 6), 0.4)
    result = augment.color_jitter(images, 0.4, generator=seeded())
    assert torch.equal(result, result[:, :1, :1, :1].expand_as(result))


def global_random_states():
    return str(random.getstate()), str(np.random.get_state()), torch.get_rng_state().tolist()


@pytest.mark.parametrize("name", RANDOM)
def test_random_ops_use_only_their_generator(name):
    images = noise(16, 3, 8, 8)
    generator = seeded(1)
    before = global_random_states()
    first = RANDOM[name](images, generator)
    second = RANDOM[name](images, generator)
    assert global_random_states() == before
    assert not torch.equal(first, second)  # the generator moves on
    torch.manual_seed(123)
    assert torch.equal(RANDOM[name](images, seeded(1)), first)


@pytest.mark.parametrize("name", [*RANDOM, *APPLIED])
def test_inputs_are_not_modified(name):
    images = noise(8, 3, 8, 8)
    before = images.clone()
    result = APPLIED[name](images) if name in APPLIED else RANDOM[name](images, seeded())
    assert torch.equal(images, before)
    result.add_(1)  # not a view of the input either
    assert torch.equal(images, before)


USUAL_RATIO = (3 / 4, 4 / 3)


# In the elongated images many draws fail all ten attempts, so that the fallback takes part.
@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (32, 32, (0.2, 1.0), USUAL_RATIO),
        (64, 64, (0.08, 1.0), USUAL_RATIO),
        (40, 80, (0.5, 1.0), USUAL_RATIO),
        (80, 40, (0.5, 1.0), USUAL_RATIO),
        (24, 96, (0.2, 1.0), USUAL_RATIO),
        (50, 50, (0.3, 1.0), (1.0, 3.0)),
    ],
)
def test_crop_boxes_are_distributed_as_torchvisions(height, width, scale, ratio):
    image = torch.empty(1, height, width)
    batch = image.expand(4000, -1, -1, -1)
    ours = augment.draw_crop_boxes(batch, scale, ratio, seeded())
    torch.manual_seed(1)
    draw = partial(RandomResizedCrop.get_params, image, list(scale), list(ratio))
    theirs = torch.tensor([draw() for _ in range(2000)])
    assert (ours == ours.round()).all()
    assert (ours >= torch.tensor([0, 0, 1, 1])).all()
    assert (ours[:, :2] + ours[:, 2:] <= torch.tensor([height, width])).all()
    for statistic in (
        lambda top, left, h, w: h * w,
        lambda top, left, h, w: np.log(w / h),
        lambda top, left, h, w: top,
        lambda top, left, h, w: left,
        lambda top, left, h, w: top / np.maximum(1, height - h),
        lambda top, left, h, w: left / np.maximum(1, width - w),
        lambda top, left, h, w: top * left,
    ):
        both = [statistic(*boxes.double().numpy().T) for boxes in (ours, theirs)]
        assert stats.ks_2samp(*both).pvalue > 0.001


# No box of twice the image's area fits, so that all ten attempts fail.
@pytest.mark.parametrize("ratio", [USUAL_RATIO, (1.0, 3.0), (0.2, 0.5)])
@pytest.mark.parametrize(("height", "width"), [(20, 101), (101, 20), (31, 30)])
def test_crop_falls_back_to_torchvisions_box(height, width, ratio):
    images = torch.empty(4, 1, height, width)
    expected = RandomResizedCrop.get_params(images, [2.0, 3.0], list(ratio))
    boxes = augment.draw_crop_boxes(images, (2.0, 3.0), ratio, seeded())
    assert boxes.tolist() == [list(expected)] * 4


def read_brightness(strength, count):
    images = torch.full((count, 3, 2, 2), 0.2)
    return augment.color_jitter(images, strength, generator=seeded())[:, 0, 0, 0] / 0.2


def read_contrast(strength, count):
    images = torch.tensor([0.45, 0.55]).expand(count, 3, 1, 2)
    result = augment.color_jitter(images, 0, strength, generator=seeded())
    return (result[:, 0, 0, 1] - result[:, 0, 0, 0]) / 0.1


def read_saturation(strength, count):
    images = torch.tensor([0.55, 0.45, 0.5])[:, None, None].expand(count, 3, 1, 1)
    result = augment.color_jitter(images, 0, 0, strength, generator=seeded())
    return (result[:, 0, 0, 0] - result[:, 1, 0, 0]) / 0.1


def read_hue(strength, count):
    images = torch.tensor([1.0, 0, 0])[:, None, None].expand(count, 3, 1, 1)
    result = augment.color_jitter(images, 0, 0, 0, strength, generator=seeded())
    hue = torch.tensor([colorsys.rgb_to_hsv(*x.flatten().tolist())[0] for x in result])
    return torch.where(hue > 0.5, hue - 1, hue)


READ = (read_brightness, read_contrast, read_saturation, read_hue)


@pytest.mark.parametrize(
    ("position", "strength"),
    [(0, 0.4), (0, 1.5), (1, 0.4), (1, 1.5), (2, 0.4), (2, 1.5), (3, 0.1), (3, 0.4)],
)
def test_jitter_factors_are_distributed_as_torchvisions(position, strength):
    ours = READ[position](strength, 2000)
    strengths = [0.0] * 4
    strengths[position] = strength
    jitter = ColorJitter(*strengths)
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    torch.manual_seed(1)
    theirs = [ColorJitter.get_params(*ranges)[1 + position] for _ in range(2000)]
    low, high = ranges[position]
    assert ours.min() >= low - 1e-5
    assert ours.max() <= high + 1e-5
    assert stats.ks_2samp(ours, theirs).pvalue > 0.001


def test_jitter_draws_its_factors_independently():
    images = torch.tensor([0.2, 0.3]).expand(2000, 3, 1, 2)
    result = augment.color_jitter(images, 0.5, 0.5, generator=seeded())[:, 0, 0]
    brightness = result.mean(1) / 0.25  # contrast leaves the mean of a grey image
    contrast = (result[:, 1] - result[:, 0]) / (0.1 * brightness)
    assert stats.spearmanr(brightness, contrast).pvalue > 0.001


def test_blur_sigma_is_distributed_as_torchvisions():
    images = torch.zeros(2000, 1, 5, 5)
    images[:, :, 2, 2] = 1
    drawn = augment.draw_gaussian_blur(images, (0.3, 2.0), generator=seeded())
    result = augment.apply_gaussian_blur(images, drawn)
    ours = (0.5 / (result[:, 0, 2, 2] / result[:, 0, 2, 1]).log()).sqrt()
    torch.manual_seed(1)
    theirs = [GaussianBlur.get_params(0.3, 2.0) for _ in range(2000)]
    assert stats.ks_2samp(ours, theirs).pvalue > 0.001


def test_each_image_is_rotated_by_an_angle_of_its_own():
    views = augment.random_rotation(noise(1, 16, 16).repeat(64, 1, 1, 1), 90, seeded())
    assert len(views.unique(dim=0)) > 48


@pytest.mark.parametrize("angle", [-90.0, -31.0, 45.0])
def test_rotation_equals_torchvisions(monkeypatch, angle):
    drawn = torch.tensor([(angle / 90 + 1) / 2])
    monkeypatch.setattr(torch, "rand", lambda *size, **options: drawn)
    image = torch.linspace(0.1, 1, 3 * 12 * 16).view(1, 3, 12, 16)
    ours = augment.random_rotation(image, 90, torch.Generator())
    theirs = [
        rotate(image, sign * angle, InterpolationMode.NEAREST, expand=False) for sign in (1, -1)
    ]
    # Nearest pixels at exact halves may fall either way; the direction is a convention.
    assert max(((ours - their).abs() < 1e-6).float().mean() for their in theirs) > 0.98


def test_cutout_greys_a_square_centred_anywhere_in_each_image():
    images = torch.rand(4000, 2, 6, 9) / 4
    views = augment.random_cutout(images, 4, torch.Generator().manual_seed(0))
    seen = set()
    for image, view in zip(images, views, strict=True):
        changed = (view != image).any(0)
        assert torch.equal(view[:, changed], torch.full_like(view[:, changed], 0.5))
        rows, columns = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
        assert changed.sum() == len(rows) * len(columns)  # a rectangle
        seen.add((rows[0].item(), rows[-1].item(), columns[0].item(), columns[-1].item()))
    # A square of 4 around each pixel (y, x) begins two before it and is cut at the border.
    assert seen == {
        (max(0, y - 2), min(5, y + 1), max(0, x - 2), min(8, x + 1))
        for y in range(6)
        for x in range(9)
    }
