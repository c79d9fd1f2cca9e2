"""The dtype of sums, on which all kernels agree."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over values of ``dtype``: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@overload
def accumulated(parameter: Tensor, x: Tensor) -> Tensor: ...
@overload
def accumulated(parameter: Tensor | None, x: Tensor) -> Tensor | None: ...
def accumulated(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """Convert a gate, weight or bias of any floating dtype to the dtype of sums over ``x``."""
    dtype = accumulator(x.dtype)
    return parameter if parameter is None or parameter.dtype == dtype else parameter.to(dtype)
