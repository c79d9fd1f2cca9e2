"""NFNet-F0 to F6: the normaliser-free ResNet that is Flamingo's vision encoder.

Brock et al. 2021, "High-Performance Large-Scale Image Recognition Without Normalization"
(arXiv 2102.06171). Parameter names and shapes are those of timm's `dm_nfnet_f*`, without the
classifier head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_kernels.precision import accumulator
from flamingo_kernels.vision.config import ACTIVATION_GAINS, NFNET_VARIANTS, NFNetConfig
from flamingo_kernels.vision.protocol import Channels, check_images

__all__ = ["NFNET_VARIANTS", "NFNet"]

_STEM_STRIDES = (2, 1, 1, 2)
_STAGE_STRIDES = (1, 2, 2, 2)
_STANDARDISATION_EPS = 1e-5
# A squeeze-excite output is sigmoid-gated, which halves it on average; this restores the scale.
_SQUEEZE_EXCITE_GAIN = 2.0
_SQUEEZE_EXCITE_DIVISOR = 8


class ScaledActivation(nn.Module):
    """An activation times a constant that keeps unit variance for unit-variance input."""

    def __init__(self, name: str, scale: float = 1.0) -> None:
        super().__init__()
        self.function = getattr(F, name)
        self.scale = ACTIVATION_GAINS[name] * scale

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) * self.scale


class ScaledStdConv2d(nn.Conv2d):
    """Convolution with standardised weights and "SAME" padding (Brock et al. 2021, eq. 1).

    Each output filter is shifted and scaled to mean 0 and variance 1 / fan-in, then multiplied by
    its learned gain. The statistics are taken in at least fp32. With stride s the output is
    ceil(size / s), and the odd padding pixel, if there is one, goes to the right and the bottom.
    """

    def __init__(
        self, in_width: int, out_width: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(in_width, out_width, kernel, stride, groups=groups)
        self.gain = nn.Parameter(torch.ones(out_width, 1, 1, 1))
        _init_convolution(self)

    def standardised_weight(self) -> Tensor:
        """Return the filters as they are applied, in the dtype of ``weight``."""
        weight = self.weight.to(accumulator(self.weight.dtype))
        variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
        fan_in = weight[0].numel()
        scale = self.gain * (variance + _STANDARDISATION_EPS).rsqrt() * fan_in**-0.5
        return ((weight - mean) * scale).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        padding = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        if any(padding):
            x = F.pad(x, padding)
        return F.conv2d(x, self.standardised_weight(), self.bias, stride, groups=self.groups)


class SqueezeExcite(nn.Module):
    """Multiplies each channel by a sigmoid gate computed from the mean of all channels."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        half = _SQUEEZE_EXCITE_DIVISOR // 2
        rounded = int(width * ratio + half) // _SQUEEZE_EXCITE_DIVISOR * _SQUEEZE_EXCITE_DIVISOR
        squeezed = max(rounded, _SQUEEZE_EXCITE_DIVISOR)
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)
        _init_convolution(self.fc1)
        _init_convolution(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class Downsample(nn.Module):
    """The shortcut where width or resolution change: 2x2 mean, then a 1x1 convolution."""

    def __init__(self, in_width: int, out_width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = ScaledStdConv2d(in_width, out_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.avg_pool2d(x, 2, self.stride, ceil_mode=True, count_include_pad=False)
        return self.conv(x)


class NFNetBlock(nn.Module):
    """Pre-activation bottleneck: x + alpha * gain * branch(activation(x) / sqrt(variance)).

    Parameters
    ----------
    config : NFNetConfig
        Ratios and scales of all blocks.
    in_width, out_width, stride : int
        Channels in and out, and stride of the block.
    variance : float
        Expected variance of the input at initialisation.
    drop_rate : float
        Probability, per sample and in training only, of leaving out the branch. Kept branches are
        divided by 1 - drop_rate, so evaluation needs no correction.
    """

    def __init__(
        self,
        config: NFNetConfig,
        in_width: int,
        out_width: int,
        stride: int,
        variance: float,
        drop_rate: float,
    ) -> None:
        super().__init__()
        inner = int(out_width * config.bottleneck_ratio)
        groups = inner // config.group_width
        self.alpha = config.alpha
        self.drop_rate = drop_rate
        self.act1 = ScaledActivation(config.activation, scale=variance**-0.5)
        self.act = ScaledActivation(config.activation)
        self.downsample = None
        if in_width != out_width or stride != 1:
            self.downsample = Downsample(in_width, out_width, stride)
        self.conv1 = ScaledStdConv2d(in_width, inner, 1)
        self.conv2 = ScaledStdConv2d(inner, inner, 3, stride, groups)
        self.conv2b = ScaledStdConv2d(inner, inner, 3, 1, groups)
        self.conv3 = ScaledStdConv2d(inner, out_width, 1)
        self.attn_last = SqueezeExcite(out_width, config.se_ratio)
        self.skipinit_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(x)
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.act(out))
        out = self.conv2b(self.act(out))
        out = self.conv3(self.act(out))
        out = self.attn_last(out) * (_SQUEEZE_EXCITE_GAIN * self.alpha)
        if self.training and self.drop_rate > 0.0:
            keep = 1.0 - self.drop_rate
            out = out * (out.new_empty(len(out), 1, 1, 1).bernoulli_(keep) / keep)
        return out * self.skipinit_gain + shortcut


class NFNet(nn.Module):
    """NFNet feature extractor, images [N, 3, H, W] -> features [N, S, output_dim].

    S is the final grid flattened row by row. With four stages the total stride is 32 and a side
    of the grid is ceil(side / 32): 81 features at 288 pixels, 100 at 320, 225 at 480.

    Stochastic depth (Huang et al. 2016, arXiv 1603.09382, eq. 4): of L blocks in all, block l
    (counted from 1) is dropped at rate ``stochastic_depth * l / L``, in training mode only.

    Parameters
    ----------
    config : NFNetConfig
        Sizes; ``NFNetConfig.from_variant`` has those of F0 to F6.

    Raises
    ------
    ValueError, TypeError
        From ``forward``: the images are not a floating [N, 3, H, W] tensor.
    """

    image_mean: Channels | None = (0.485, 0.456, 0.406)
    image_std: Channels | None = (0.229, 0.224, 0.225)

    def __init__(self, config: NFNetConfig) -> None:
        super().__init__()
        self.config = config
        self.output_dim = config.output_dim
        self.image_size = config.image_size

        self.stem = nn.Sequential()
        width = 3
        for i, stride in enumerate(_STEM_STRIDES, start=1):
            if i > 1:
                self.stem.add_module(f"act{i}", ScaledActivation(config.activation))
            out_width = config.stem_width >> (len(_STEM_STRIDES) - i)
            self.stem.add_module(f"conv{i}", ScaledStdConv2d(width, out_width, 3, stride))
            width = out_width

        total = sum(config.depths)
        self.stages = nn.Sequential()
        index = 0
        variance = 1.0
        strides = _STAGE_STRIDES[: len(config.depths)]
        for stage_width, depth, stride in zip(config.widths, config.depths, strides, strict=True):
            blocks = nn.Sequential()
            for i in range(depth):
                index += 1
                drop_rate = config.stochastic_depth * index / total
                block_stride = stride if i == 0 else 1
                blocks.append(
                    NFNetBlock(config, width, stage_width, block_stride, variance, drop_rate)
                )
                # The first block of a stage normalises its shortcut too, which resets the
                # variance to 1; each branch then adds alpha squared.
                variance = (1.0 if i == 0 else variance) + config.alpha**2
                width = stage_width
            self.stages.append(blocks)

        self.final_conv = ScaledStdConv2d(width, config.output_dim, 1)
        self.final_act = ScaledActivation(config.activation)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images)
        grid = self.final_act(self.final_conv(self.stages(self.stem(images))))
        return grid.flatten(2).transpose(1, 2)


def _init_convolution(convolution: nn.Conv2d) -> None:
    nn.init.kaiming_normal_(convolution.weight, mode="fan_in", nonlinearity="linear")
    nn.init.zeros_(convolution.bias)
