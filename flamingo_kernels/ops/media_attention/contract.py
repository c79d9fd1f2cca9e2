"""The media attention operators: what every ``impl_{kernel}.py`` here offers; torch only."""

from __future__ import annotations

from torch import Tensor

from flamingo_kernels.ops.kernel_op import kernel_op

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor first, Tensor last, Tensor? gate, float scale, "
    "bool single_item, str kernel"
)


def _forward_shapes(q: Tensor, *_) -> Tensor:
    return q.new_empty(q.shape)


def _backward_shapes(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, gate, *_
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_gate = q.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_gate


forward = kernel_op("media_attention", "forward", f"({_INPUTS}) -> Tensor", _forward_shapes)
# The gradient of the gate has no element where there is no gate.
backward = kernel_op(
    "media_attention",
    "backward",
    f"(Tensor d_out, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_shapes,
)
