"""The LayerNorm operators of torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flamingo_kernels.ops.layer_norm import impl_cpp
from flamingo_kernels.ops.operator import Gradient, operator
from flamingo_kernels.ops.single_backward import single_backward
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


def save(ctx: Any, arguments: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep for :func:`gradients` what they need of a forward's arguments and output."""
    x, weight, bias, _eps, kernel = arguments
    _out, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.options = (bias is not None, kernel)


@single_backward("layer_norm")
def gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the forward's arguments."""
    x, weight, mean, rstd = ctx.saved_tensors
    has_bias, kernel = ctx.options
    has_bias = has_bias and ctx.needs_input_grad[2]
    d_x, d_weight, d_bias = backward(d_out, x, weight, mean, rstd, has_bias, kernel)
    return d_x, None if weight is None else d_weight, d_bias if has_bias else None, None, None


@operator("layer_norm_forward", fake=_forward_shapes, gradient=Gradient(save, gradients))
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
