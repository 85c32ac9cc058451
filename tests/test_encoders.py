import copy
import importlib
import math

import pytest
import torch
import torchvision
from torch import nn

from support import encoders


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "stem", "channels", "image_size", "features"),
    [
        ("small", "cifar", 1, 28, 2048),
        ("small", "cifar", 3, 32, 2048),
        ("small", "cifar", 1, 8, 128),
        ("small", "cifar", 3, 20, 1152),
        ("resnet18", "cifar", 1, 8, 512),
        ("resnet18", "imagenet", 1, 64, 512),
        ("resnet34", "cifar", 3, 32, 512),
        ("resnet50", "cifar", 3, 32, 2048),
        ("resnet50", "imagenet", 3, 64, 2048),
    ],
)
def test_encoder_output_shape(name, stem, channels, image_size, features):
    with torch.device("meta"):  # shapes only, no arithmetic
        encoder = encoders.make_encoder(name, stem, channels, image_size)
        output = encoder(torch.empty(2, channels, image_size, image_size))
    assert output.shape == (2, features)
    assert encoder.num_features == features


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_a_narrow_resnet_has_a_part_of_the_channels(name, stem):
    with torch.device("meta"):
        narrow = encoders.make_encoder(name, stem, 3, 32, 24)
        whole = getattr(torchvision.models, name)(weights=None)
        output = narrow(torch.empty(2, 3, 32, 32))
    assert output.shape == (2, narrow.num_features) == (2, whole.fc.in_features * 24 // 64)
    whole.fc = nn.Identity()
    shapes = {key: tuple(value.shape) for key, value in narrow.state_dict().items()}
    for key, value in whole.state_dict().items():
        first, *rest = value.shape or (0,)
        expected = [first * 24 // 64, *rest]
        if key == "conv1.weight" and stem == "cifar":
            expected[2:] = [3, 3]
        elif len(rest) == 3 and key != "conv1.weight":
            expected[1] = rest[0] * 24 // 64
        assert shapes.pop(key) == (tuple(expected) if value.shape else ())
    assert not shapes


@pytest.mark.parametrize(("stem", "channels", "width"), [("cifar", 3, 64), ("imagenet", 1, 32)])
def test_the_first_layer_begins_as_torchvisions(stem, channels, width):
    torch.manual_seed(0)
    weights = encoders.make_encoder("resnet18", stem, channels, 32, width).conv1.weight
    side = 3 if stem == "cifar" else 7
    assert weights.shape == (width, channels, side, side)
    expected = math.sqrt(2 / (width * side**2))  # He et al. 2015, by the outputs
    assert weights.std().item() == pytest.approx(expected, rel=0.1)  # sd below 0.03


@pytest.mark.parametrize(("stem", "parameters"), [("cifar", 11_168_832), ("imagenet", 11_176_512)])
def test_resnet18_is_torchvisions(stem, parameters):
    encoder = encoders.make_encoder("resnet18", stem, 3, 32)
    with torch.device("meta"):
        reference = torchvision.models.resnet18(weights=None)
        if stem == "cifar":  # SimCLR, appendix B.9
            reference.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    reference.fc = nn.Identity()
    if stem == "cifar":
        reference.maxpool = nn.Identity()
    reference.load_state_dict(encoder.state_dict(), strict=True, assign=True)
    images = normal(2, 3, 32, 32)
    torch.testing.assert_close(encoder.eval()(images), reference.eval()(images))
    assert encoders.count_parameters(encoder) == parameters
    encoder.conv1.requires_grad_(False)
    assert encoders.count_parameters(encoder) == parameters - encoder.conv1.weight.numel()


@pytest.mark.parametrize(
    ("size", "stride"),
    [(1, 1), (1, 2), (2, 2), (2, 1), (3, 2), (4, 2), (3, 1), (5, 2), (7, 2), (4, 1)],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel", "groups"), [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_a_convolution_on_a_small_map_is_torchs(size, stride, layout, kernel, groups):
    channels = 512 if (size, stride) == (4, 1) else 4
    reference = nn.Conv2d(
        channels, 6, kernel, stride, kernel // 2, groups=groups, dtype=torch.float64
    )
    reference = reference.to(memory_format=layout)
    ours = encoders.SmallMapConv2d.with_weights_of(copy.deepcopy(reference))
    images = normal(7, channels, size, size).double().to(memory_format=layout)
    inputs = [images.clone().requires_grad_() for _ in range(2)]
    outputs = [module(x) for module, x in zip((ours, reference), inputs, strict=True)]
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# oneDNN's bfloat16 weight gradient for 1x1 maps at stride 2 held uninitialised memory.
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_resnet_gradients_on_tiny_images_repeat(precision):
    torch.manual_seed(0)
    encoder = encoders.make_encoder("resnet18", "imagenet", 1, 8)
    encoder = encoder.to(memory_format=torch.channels_last)
    images = normal(64, 1, 8, 8)
    assert_gradients_repeat(encoder, images, precision)


def assert_gradients_repeat(encoder, images, precision):
    first = None
    for _ in range(4):
        junk = [torch.full((2**k,), math.nan) for k in range(4, 23)]
        del junk  # memory that is handed out again
        encoder.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision is torch.bfloat16):
            loss = encoder(images).square().mean()
        loss.backward()
        gradients = [p.grad.clone() for p in encoder.parameters()]
        first = first or gradients
        for a, b in zip(first, gradients, strict=True):
            assert torch.equal(a, b)
            assert a.isfinite().all()


@pytest.mark.parametrize(("name", "stem"), [("resnet18", "CIFAR"), ("vgg", "cifar")])
def test_an_unknown_name_or_stem_is_refused(user_error, name, stem):
    with user_error("vgg" if name == "vgg" else "CIFAR", "use"):
        encoders.make_encoder(name, stem, 3, 32)


# timm's


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_vit", "mobilenetv3_small_050"]
)
@pytest.mark.parametrize(("channels", "size"), [(1, 16), (5, 32)])
def test_timms_networks_are_timms(name, channels, size):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    encoder = encoders.make_encoder(f"timm:{name}", "cifar", channels, size)
    assert encoder.training
    sizes = {"img_size": size} if "vit" in name else {}
    reference = timm.create_model(name, num_classes=0, in_chans=channels, **sizes)
    reference.load_state_dict(encoder.state_dict(), strict=True)
    images = normal(3, channels, size, size)
    output = encoder.eval()(images)
    assert output.shape == (3, encoder.num_features)
    torch.testing.assert_close(output, reference.eval()(images))


def test_unknown_networks_of_timms_are_refused(user_error):
    pytest.importorskip("timm")
    with user_error("resnett18", "timm:resnet18"):
        encoders.check_name("timm:resnett18")
    with user_error("timm:test_vit", "1 x 3 x 3"):
        encoders.make_encoder("timm:test_vit", "cifar", 1, 3)


def test_without_timm_its_networks_are_one_line(user_error, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with user_error("pip install timm"):
        encoders.check_name("timm:resnet18")


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_gradients_of_timms_networks_on_tiny_images_repeat(name):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    encoder = encoders.make_encoder(f"timm:{name}", "cifar", 1, 8)
    encoder = encoder.to(memory_format=torch.channels_last)
    assert_gradients_repeat(encoder, normal(64, 1, 8, 8), torch.bfloat16)
