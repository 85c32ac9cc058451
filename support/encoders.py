"""The encoders: three convolutions, torchvision's ResNets, or a network of timm's."""

from __future__ import annotations

import difflib
import importlib.util
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.errors import UserError, require


class SmallEncoder(nn.Sequential):
    """Three strided 3x3 convolutions (32, 64, 128), each with ReLU then BatchNorm, flattened.

    2048 features for images of 28 or 32 pixels, 128 for 8 pixels.
    """

    def __init__(self, channels: int, image_size: int):
        layers: list[nn.Module] = []
        for before, after in zip((channels, 32, 64), (32, 64, 128), strict=True):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.ReLU(), nn.BatchNorm2d(after)]
            image_size = (image_size + 1) // 2
        super().__init__(*layers)
        self.num_features = 128 * image_size**2

    def forward(self, images: Tensor) -> Tensor:
        """Features `(B, num_features)`, the channels of a pixel side by side.

        In this order flattening keeps the layout: a gradient in another one than its input makes
        the last BatchNorm's backward pass thirty times slower on a CPU.
        """
        return super().forward(images).permute(0, 2, 3, 1).flatten(1)


KINDS = (((3, 3), (1, 1)), ((1, 1), (0, 0)))  # kernel and padding that SmallMapConv2d knows


class SmallMapConv2d(nn.Conv2d):
    """A 1x1 or padded 3x3 convolution that is matrix products where its output has few pixels.

    A 3x3 one is a product per pixel, without the taps that only see padding: exact, and on a CPU
    up to ten times faster than oneDNN's, which is slow for many channels of few pixels. 2x2 and 1x1
    are the maps in layers 3 and 4 of a ResNet with the ImageNet stem, for images of 32 pixels. On a
    GPU only maps of one pixel are done so. It also keeps clear of oneDNN's bfloat16 weight gradient
    for 1x1 maps at stride 2, which returns uninitialised memory for the taps that see padding (seen
    in torch 2.15 on a CPU with AMX); of a convolution in groups only these maps are done otherwise.
    """

    @classmethod
    def with_weights_of(cls, convolution: nn.Conv2d) -> SmallMapConv2d:
        """Another one's stand-in, which shares its weights."""
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")
        # On no device, so that no random numbers are drawn for weights that are replaced.
        shape: Any = {name: getattr(convolution, name) for name in names}
        own = cls(**shape, bias=False, device="meta")
        own.weight, own.bias = convolution.weight, convolution.bias
        return own

    def forward(self, images: Tensor) -> Tensor:
        """As `nn.Conv2d`'s."""
        (height, width), stride = images.shape[2:], self.stride[0]
        out_h, out_w = (height - 1) // stride + 1, (width - 1) // stride + 1
        whole = self.kernel_size == (1, 1)
        if self.groups > 1:
            if whole or (height, width) != (1, 1):
                return super().forward(images)
            centre = self.weight[:, :, 1:2, 1:2]  # the only tap that does not see padding
            return F.conv2d(images, centre, self.bias, groups=self.groups)
        most = 8 if whole else 4 if self.in_channels >= 512 else 3
        if max(out_h, out_w) > (most if images.device.type == "cpu" else 1):
            return super().forward(images)
        images = images.permute(0, 2, 3, 1)  # (B, H, W, C)
        weight = self.weight.permute(0, 2, 3, 1)  # (O, 3, 3, C)
        if whole:
            seen = images[:, ::stride, ::stride]
            return F.linear(seen, weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        pixels = []
        for row, column in itertools.product(range(out_h), range(out_w)):
            top, left = row * stride - 1, column * stride - 1  # of the 3x3 pixels that it sees
            rows = slice(max(0, top), min(height, top + 3))
            columns = slice(max(0, left), min(width, left + 3))
            taps = weight[
                :, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
            ]
            seen = images[:, rows, columns]
            pixels.append(F.linear(seen.flatten(1), taps.flatten(1), self.bias))  # (B, O)
        return torch.stack(pixels, 1).unflatten(1, (out_h, out_w)).permute(0, 3, 1, 2)


def make_encoder(name: str, stem: str, channels: int, image_size: int, width: int = 64) -> Any:
    """An encoder `(B, C, H, W) -> (B, num_features)` with the attribute `num_features`.

    Args:
        name: `small`; torchvision's `resnet18`, `resnet34`, `resnet50`; or `timm:` and the name of
            a network of timm's. Key names are those of the libraries.
        channels: of the images.
        image_size: height and width of the images; `small` needs it.
        stem: for the ResNets `cifar` (3x3 convolution, stride 1, no max-pool; SimCLR B.9) or
            `imagenet` (7x7, stride 2, max-pool). `small` has none.
        width: channels of a ResNet's first stage, of which the later ones have 2, 4 and 8 times as
            many.

    Raises:
        UserError: another name or stem, or timm's network does not take such images.
    """
    check_name(name)
    require(stem in ("cifar", "imagenet"), f"unknown stem {stem!r}: use cifar or imagenet")
    if name == "small":
        return SmallEncoder(channels, image_size)
    if name.startswith("timm:"):
        return _make_timm_encoder(name, channels, image_size)
    from torchvision.models import resnet

    class ResNet(resnet.ResNet):
        def _make_layer(self, block: Any, planes: int, *others: Any, **named: Any) -> nn.Sequential:
            if planes == 64:  # the first stage
                self.inplanes = width
            return super()._make_layer(block, planes * width // 64, *others, **named)

    block, layers = {
        "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
        "resnet34": (resnet.BasicBlock, [3, 4, 6, 3]),
        "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
    }[name]
    encoder: Any = ResNet(block, layers)
    encoder.num_features = encoder.inplanes
    encoder.fc = nn.Identity()
    encoder.bn1 = nn.BatchNorm2d(width)
    if stem == "cifar":
        encoder.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        encoder.maxpool = nn.Identity()
    elif (channels, width) != (3, 64):
        encoder.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
    nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    _replace_convolutions(encoder)
    return encoder


def _replace_convolutions(encoder: nn.Module) -> None:
    """Put `SmallMapConv2d` in the place of the convolutions that it knows."""
    for parent in list(encoder.modules()):
        for name, child in parent.named_children():
            if (
                type(child) is nn.Conv2d  # timm has kinds of its own
                and (child.kernel_size, child.padding) in KINDS
                and child.dilation == (1, 1)
            ):
                setattr(parent, name, SmallMapConv2d.with_weights_of(child))


def check_name(name: str) -> None:
    """Raise UserError unless `make_encoder` knows an encoder of this name."""
    known = ("small", "resnet18", "resnet34", "resnet50")
    timm_name = name.removeprefix("timm:")
    if timm_name == name:
        require(name in known, f"--encoder knows no {name!r}: use {', '.join(known)}, or timm:NAME")
        return
    there = importlib.util.find_spec("timm") is not None
    require(there, f"--encoder {name} needs another package: pip install timm")
    import timm

    close = difflib.get_close_matches(timm_name, timm.list_models(), 3) or ["resnet18"]
    suggested = ", ".join(f"timm:{other}" for other in close)
    require(timm.is_model(timm_name), f"timm knows no {timm_name!r}: try {suggested}")


def unread(name: str) -> dict[str, str]:
    """The settings that an encoder of this name ignores, and what would give them an effect."""
    ignored = () if name.startswith("resnet") else ("stem", "width")
    return dict.fromkeys(ignored, "a ResNet of torchvision's as --encoder")


def _make_timm_encoder(name: str, channels: int, image_size: int) -> Any:
    """A network of timm's without its classifier, tried out on two images."""
    import timm

    named: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
    timm_name = name.removeprefix("timm:")
    try:
        try:  # transformers are made for one size of images, convolutions take any
            encoder: Any = timm.create_model(timm_name, img_size=image_size, **named)
        except TypeError:
            encoder = timm.create_model(timm_name, **named)
        _replace_convolutions(encoder)
        with torch.no_grad():
            features = encoder.eval()(torch.zeros(2, channels, image_size, image_size))
        encoder.num_features = features.flatten(1).shape[1]
        require(features.ndim == 2, f"its features are {tuple(features.shape)}, not (2, D)")
    except Exception as error:  # a network may raise anything on images that it is not made for
        reason = " ".join(str(error).split())
        size = f"{channels} x {image_size} x {image_size}"
        raise UserError(
            f"--encoder {name} does not take images of {size}: {reason:.200}"
        ) from error
    return encoder.train()


def count_parameters(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
