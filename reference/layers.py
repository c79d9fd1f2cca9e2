"""Parameter holders shared by the blocks; the arithmetic is in pointwise.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .pointwise import gated_activation, layer_norm, rms_norm


class LayerNorm(nn.Module):
    """Layer normalisation with scale and bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with scale."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Activation(nn.Module):
    """An activation by name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return gated_activation(x, None, self.name)


def feed_forward(dim: int, multiplier: int, activation: str) -> nn.Sequential:
    """LayerNorm, widen, activate, narrow; no biases in the projections."""
    return nn.Sequential(
        LayerNorm(dim),
        nn.Linear(dim, multiplier * dim, bias=False),
        Activation(activation),
        nn.Linear(multiplier * dim, dim, bias=False),
    )


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[..., H*D]`` to ``[..., H, D]``."""
    return x.unflatten(-1, (heads, -1))
