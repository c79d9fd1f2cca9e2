"""The gated residual operators of torch; gates are in the dtype of accumulation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flamingo_kernels.ops.gated_residual import impl_cpp
from flamingo_kernels.ops.operator import Gradient, operator
from flamingo_kernels.ops.single_backward import single_backward


def _forward_shape(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _backward_shapes(d_out: Tensor, y: Tensor, gate: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def save(ctx: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    """Keep for :func:`gradients` what they need of a forward's arguments."""
    _x, y, gate, kernel = arguments
    ctx.save_for_backward(y, gate)
    ctx.kernel = kernel


@single_backward("gated_residual")
def gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the forward's arguments."""
    y, gate = ctx.saved_tensors
    return d_out, *backward(d_out, y, gate, ctx.kernel), None


@operator("gated_residual_forward", fake=_forward_shape, gradient=Gradient(save, gradients))
def forward(x: Tensor, y: Tensor, gate: Tensor, kernel: str) -> Tensor:
    """Return ``x + tanh(gate) * y``."""
    if kernel == "cpp":
        return impl_cpp.forward(x, y, gate)
    from flamingo_kernels.ops.gated_residual import impl_triton

    return impl_triton.forward(x, y, gate)


@operator("gated_residual_backward", fake=_backward_shapes)
def backward(d_out: Tensor, y: Tensor, gate: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of y and gate; that of x is ``d_out`` itself."""
    if kernel == "cpp":
        return impl_cpp.backward(d_out, y, gate)
    from flamingo_kernels.ops.gated_residual import impl_triton

    return impl_triton.backward(d_out, y, gate)
