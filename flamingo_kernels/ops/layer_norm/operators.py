"""The LayerNorm operators of torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flamingo_kernels.ops.layer_norm import impl_cpp
from flamingo_kernels.ops.operator import operator
from flamingo_kernels.precision import accumulator


def _forward_shapes(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    rows = math.prod(x.shape[:-1])  # Size.numel() would fix symbolic sizes to their values
    mean = x.new_empty(rows, dtype=accumulator(x.dtype))
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


def _backward_shapes(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    parameter = x if weight is None else weight
    d_weight = parameter.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    d_bias = x.new_empty(x.shape[-1] if has_bias else 0, dtype=parameter.dtype)
    return x.new_empty(x.shape), d_weight, d_bias


@operator("layer_norm_forward", fake=_forward_shapes)
def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, and mean and 1 / deviation of each row, leading dimensions flattened."""
    if kernel == "cpp":
        return impl_cpp.forward(x, weight, bias, eps)
    from flamingo_kernels.ops.layer_norm import impl_triton

    return impl_triton.forward(x, weight, bias, eps)


@operator("layer_norm_backward", fake=_backward_shapes)
def backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias; no element without a weight or a bias."""
    if kernel == "cpp":
        return impl_cpp.backward(d_out, x, weight, mean, rstd, has_bias)
    from flamingo_kernels.ops.layer_norm import impl_triton

    return impl_triton.backward(d_out, x, weight, mean, rstd, has_bias)
