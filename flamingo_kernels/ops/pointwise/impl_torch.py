"""Pointwise ops in stock PyTorch. Any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "squared_relu": lambda x: F.relu(x).square(),
    "relu": F.relu,
}


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + y.to(x.dtype) * torch.tanh(gate).to(x.dtype)


def gated_activation(x: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    activated = ACTIVATIONS[activation](x)
    return activated if gate is None else activated * torch.tanh(gate).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
