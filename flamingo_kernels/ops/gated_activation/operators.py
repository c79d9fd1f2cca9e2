"""The gated activation operators of torch; gates are in the dtype of accumulation."""

from __future__ import annotations

from torch import Tensor

from flamingo_kernels.ops.gated_activation import impl_cpp
from flamingo_kernels.ops.operator import operator


def _forward_shape(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _backward_shapes(
    d_out: Tensor, x: Tensor, gate: Tensor | None, *_: object
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if gate is None else gate.new_empty(gate.shape)


@operator("gated_activation_forward", fake=_forward_shape)
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
