"""What kernels of every kind agree on: the dtype of sums, the scale of scores."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulated(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """A gate, weight or bias, of any shape and floating dtype, in the dtype of sums over ``x``."""
    dtype = accumulator(x.dtype)
    return parameter if parameter is None or parameter.dtype == dtype else parameter.to(dtype)


def score_scale(q: Tensor, scale: float | None) -> float:
    """Multiplier of attention scores: ``scale``, or ``D ** -0.5`` of ``q`` [..., D]."""
    return q.shape[-1] ** -0.5 if scale is None else scale
