"""NFNet F0-F6 without the classifier (Brock et al. 2021, arXiv 2102.06171).

The structure and the parameter names are those of timm's dm_nfnet models, so their weights load.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .pointwise import gated_activation

# Blocks per stage.
DEPTHS = {f"F{n}": (1 * (n + 1), 2 * (n + 1), 6 * (n + 1), 3 * (n + 1)) for n in range(7)}
# Factor that restores unit variance after the activation of a unit Gaussian.
GAMMA = {"gelu": 1.7015043497085571, "relu": 1.7139588594436646}
STANDARDISATION_EPS = 1e-5
SQUEEZE_EXCITE_GAIN = 2.0


def variant(name: str, image_size: int = 320) -> SimpleNamespace:
    """The configuration of ``F0`` ... ``F6``; 320 pixels is Flamingo's training resolution."""
    return SimpleNamespace(
        kind="nfnet",
        image_size=image_size,
        widths=(256, 512, 1536, 1536),
        depths=DEPTHS[name],
        stem_width=128,
        group_width=128,
        bottleneck_ratio=0.5,
        se_ratio=0.5,
        alpha=0.2,
        feature_multiplier=2.0,
        stochastic_depth=0.0,
        activation="gelu",
        output_dim=3072,
    )


def round_to_eight(channels: float) -> int:
    """Nearest multiple of 8, at least 8."""
    return max(8, int(channels + 4) // 8 * 8)


def standardise(weight: Tensor, gain: Tensor) -> Tensor:
    """Filters ``[out, in, kh, kw]`` with mean 0, variance 1 / fan_in, times gain per filter."""
    fan_in = weight[0].numel()
    mean = weight.mean((1, 2, 3), keepdim=True)
    variance = ((weight - mean) ** 2).mean((1, 2, 3), keepdim=True)
    unit = (weight - mean) / torch.sqrt(variance + STANDARDISATION_EPS)
    return gain * unit / math.sqrt(fan_in)


class ScaledStdConv(nn.Module):
    """Convolution with standardised filters, and padding to ceil(size / stride) outputs."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.stride = stride
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1))
        nn.init.kaiming_normal_(self.weight, nonlinearity="linear")

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.shape[-1]
        top, bottom = self._padding(x.shape[-2], kernel)
        left, right = self._padding(x.shape[-1], kernel)
        x = F.pad(x, (left, right, top, bottom))
        weight = standardise(self.weight, self.gain)
        return F.conv2d(x, weight, self.bias, self.stride, groups=self.groups)

    def _padding(self, size: int, kernel: int) -> tuple[int, int]:
        outputs = math.ceil(size / self.stride)
        total = max((outputs - 1) * self.stride + kernel - size, 0)
        return total // 2, total - total // 2


class Downsample(nn.Module):
    """Average pooling for the stride, then a 1x1 convolution for the width."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = ScaledStdConv(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            # A window cut off by the border averages what it has.
            x = F.avg_pool2d(x, 2, self.stride, ceil_mode=True, count_include_pad=False)
        return self.conv(x)


class SqueezeExcite(nn.Module):
    """Channel gates in (0, 1) from the spatial mean (arXiv 1709.01507)."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        hidden = round_to_eight(channels * ratio)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(squeezed))))


class Block(nn.Module):
    """Pre-activation bottleneck: ``shortcut + alpha * skipinit_gain * branch``.

    beta divides by the standard deviation expected at the input; drop_rate is the probability that
    a training sample skips the branch.
    """

    def __init__(
        self,
        config: Any,
        in_channels: int,
        out_channels: int,
        stride: int,
        beta: float,
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.activation = config.activation
        self.alpha = config.alpha
        self.beta = beta
        self.drop_rate = drop_rate
        groups = round_to_eight(out_channels * config.bottleneck_ratio) // config.group_width
        if groups == 0:
            raise ValueError(
                f"bottleneck of width {out_channels} holds no group of {config.group_width}"
            )
        middle = groups * config.group_width
        self.downsample = None
        if in_channels != out_channels or stride != 1:
            self.downsample = Downsample(in_channels, out_channels, stride)
        self.conv1 = ScaledStdConv(in_channels, middle, 1)
        self.conv2 = ScaledStdConv(middle, middle, 3, stride, groups)
        self.conv2b = ScaledStdConv(middle, middle, 3, 1, groups)
        self.conv3 = ScaledStdConv(middle, out_channels, 1)
        self.attn_last = SqueezeExcite(out_channels, config.se_ratio)
        self.skipinit_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.beta * activate(x, self.activation)
        shortcut = x if self.downsample is None else self.downsample(branch)
        branch = self.conv1(branch)
        branch = self.conv2(activate(branch, self.activation))
        branch = self.conv2b(activate(branch, self.activation))
        branch = self.conv3(activate(branch, self.activation))
        branch = SQUEEZE_EXCITE_GAIN * self.attn_last(branch)
        if self.training and self.drop_rate > 0.0:
            branch = drop_samples(branch, self.drop_rate)
        return shortcut + self.alpha * self.skipinit_gain * branch


def activate(x: Tensor, activation: str) -> Tensor:
    """Activation times the gamma that keeps unit variance."""
    return GAMMA[activation] * gated_activation(x, None, activation)


def drop_samples(x: Tensor, rate: float) -> Tensor:
    """Zero whole samples with probability rate, and scale the others to keep the mean."""
    kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= rate
    return torch.where(kept, x / (1.0 - rate), 0.0)


class Stem(nn.Module):
    """Four 3x3 convolutions with total stride 4."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.conv1 = ScaledStdConv(3, width // 8, 3, 2)
        self.conv2 = ScaledStdConv(width // 8, width // 4, 3)
        self.conv3 = ScaledStdConv(width // 4, width // 2, 3)
        self.conv4 = ScaledStdConv(width // 2, width, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = activate(self.conv1(x), self.activation)
        x = activate(self.conv2(x), self.activation)
        x = activate(self.conv3(x), self.activation)
        return self.conv4(x)


class NFNet(nn.Module):
    """Images to a row-major list of features.

    Parameters
    ----------
    config : object
        widths, depths, stem_width, group_width, bottleneck_ratio, se_ratio, alpha,
        feature_multiplier, stochastic_depth and activation (gelu or relu).

    Raises
    ------
    ValueError
        For an activation without a known gamma, or a bottleneck narrower than one group.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.activation not in GAMMA:
            raise ValueError(f"activation is {config.activation!r}, not one of {sorted(GAMMA)}")
        self.activation = config.activation
        self.stem = Stem(config.stem_width, config.activation)
        self.stages = nn.ModuleList()
        channels = config.stem_width
        total = sum(config.depths)
        built = 0
        variance = 1.0
        for stage, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            blocks = nn.ModuleList()
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                drop_rate = config.stochastic_depth * built / max(total - 1, 1)
                beta = variance**-0.5
                blocks.append(Block(config, channels, width, stride, beta, drop_rate))
                if index == 0:
                    variance = 1.0  # the downsampling convolution starts the stream afresh
                variance += config.alpha**2
                channels = width
                built += 1
            self.stages.append(blocks)
        self.final_conv = ScaledStdConv(channels, int(channels * config.feature_multiplier), 1)

    def forward(self, images: Tensor) -> Tensor:
        """images ``[N, 3, H, W]``, normalised -> ``[N, S, output_dim]``."""
        x = self.stem(images)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        x = activate(self.final_conv(x), self.activation)
        return x.flatten(2).transpose(1, 2)
