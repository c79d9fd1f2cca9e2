"""The gated activation operators of torch; gates are in the dtype of accumulation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flamingo_kernels.ops.gated_activation import impl_cpp
from flamingo_kernels.ops.operator import Gradient, operator
from flamingo_kernels.ops.single_backward import single_backward


def _forward_shape(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _backward_shapes(
    d_out: Tensor, x: Tensor, gate: Tensor | None, *_: object
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if gate is None else gate.new_empty(gate.shape)


def save(ctx: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    """Keep for :func:`gradients` what they need of a forward's arguments."""
    x, gate, *ctx.options = arguments
    ctx.save_for_backward(x, gate)


@single_backward("gated_activation")
def gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the forward's arguments."""
    x, gate = ctx.saved_tensors
    d_x, d_gate = backward(d_out, x, gate, *ctx.options)
    return d_x, None if gate is None else d_gate, None, None


@operator("gated_activation_forward", fake=_forward_shape, gradient=Gradient(save, gradients))
def forward(x: Tensor, gate: Tensor | None, activation: str, kernel: str) -> Tensor:
    """Return ``tanh(gate) * activation(x)``."""
    if kernel == "cpp":
        return impl_cpp.forward(x, gate, activation)
    from flamingo_kernels.ops.gated_activation import impl_triton

    return impl_triton.forward(x, gate, activation)


@operator("gated_activation_backward", fake=_backward_shapes)
def backward(
    d_out: Tensor, x: Tensor, gate: Tensor | None, activation: str, kernel: str
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and gate; the latter has no element without a gate."""
    if kernel == "cpp":
        return impl_cpp.backward(d_out, x, gate, activation)
    from flamingo_kernels.ops.gated_activation import impl_triton

    return impl_triton.backward(d_out, x, gate, activation)
