"""Elementwise ops and norms, in fp32 at least (fp64 for fp64); outputs in the input dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype that sums, norms and softmax are computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def activate(x: Tensor, activation: str) -> Tensor:
    """``squared_relu`` (Flamingo A.1.4), ``gelu`` (exact, with erf) or ``relu``.

    Raises
    ------
    ValueError
        For any other name.
    """
    if activation == "squared_relu":
        return torch.relu(x) ** 2
    if activation == "gelu":
        return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))
    if activation == "relu":
        return torch.relu(x)
    raise ValueError(f"activation is {activation!r}, not squared_relu, gelu or relu")


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """``x + tanh(gate) * y`` (Flamingo Fig. 4); gate has one value or one per feature of x."""
    dtype = working_dtype(x)
    return (x.to(dtype) + torch.tanh(gate.to(dtype)) * y.to(dtype)).to(x.dtype)


def gated_activation(x: Tensor, gate: Tensor | None = None, activation: str = "gelu") -> Tensor:
    """``tanh(gate) * activation(x)``, or ``activation(x)`` without a gate."""
    dtype = working_dtype(x)
    activated = activate(x.to(dtype), activation)
    if gate is not None:
        activated = torch.tanh(gate.to(dtype)) * activated
    return activated.to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer normalisation over the last dimension with the biased variance."""
    dtype = working_dtype(x)
    centred = x.to(dtype) - x.to(dtype).mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
    return (normed * weight.to(dtype) + bias.to(dtype)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Division by the root mean square over the last dimension, then a learned scale."""
    dtype = working_dtype(x)
    mean_square = (x.to(dtype) ** 2).mean(-1, keepdim=True)
    return (x.to(dtype) / torch.sqrt(mean_square + eps) * weight.to(dtype)).to(x.dtype)
