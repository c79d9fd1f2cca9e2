"""The gated residual operators of torch; gates are in the dtype of accumulation."""

from __future__ import annotations

from torch import Tensor

from flamingo_kernels.ops.gated_residual import impl_cpp
from flamingo_kernels.ops.operator import operator


def _forward_shape(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _backward_shapes(d_out: Tensor, y: Tensor, gate: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


@operator("gated_residual_forward", fake=_forward_shape)
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
