"""The media attention operators of torch, and which implementation each kernel name runs.

Gates are in the dtype of accumulation. The gradient of the gate has no element without a gate.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flamingo_kernels.ops.media_attention import impl_cpp
from flamingo_kernels.ops.media_attention.arguments import Arguments
from flamingo_kernels.ops.media_attention.segment_sizes import table_entries
from flamingo_kernels.ops.operator import Gradient, operator
from flamingo_kernels.ops.single_backward import single_backward


def _segments_shape(
    first: Tensor, last: Tensor, media: int, kv_heads: int, single_item: bool, kernel: str
) -> Tensor:
    batch, tokens = first.shape
    return first.new_empty((batch, table_entries(media, tokens, single_item), 4))


def _forward_shape(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


def _backward_shapes(
    d_out: Tensor, segments: Tensor | None, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, _first, _last, gate, *_ = inputs
    d_gate = q.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_gate


@operator("media_attention_segments", fake=_segments_shape)
def segments(
    first: Tensor, last: Tensor, media: int, kv_heads: int, single_item: bool, kernel: str
) -> Tensor:
    """Return the segment table, int32 [B, entries, 4]; only Triton's backward needs one."""
    from flamingo_kernels.ops.media_attention import impl_triton

    return impl_triton.segments(first, last, media, kv_heads, single_item)


def save(
    ctx: Any, arguments: tuple[Any, ...], output: Tensor, segments: Tensor | None = None
) -> None:
    """Keep the inputs alone, with the segments; the backward recomputes the softmax."""
    *tensors, scale, single_item, kernel = arguments
    ctx.save_for_backward(segments, *tensors)
    ctx.options = (scale, single_item, kernel)


@single_backward("media_cross_attention")
def gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the forward's arguments."""
    saved = ctx.saved_tensors
    d_q, d_k, d_v, d_gate = backward(d_out, *saved, *ctx.options)
    return d_q, d_k, d_v, None, None, None if saved[-1] is None else d_gate, None, None, None


@operator("media_attention_forward", fake=_forward_shape, gradient=Gradient(save, gradients))
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    last: Tensor,
    gate: Tensor | None,
    scale: float,
    single_item: bool,
    kernel: str,
) -> Tensor:
    """Return the output [B, T, H, D]."""
    arguments = Arguments(q, k, v, first, last, gate, scale, single_item)
    if kernel == "cpp":
        return impl_cpp.forward(arguments)
    from flamingo_kernels.ops.media_attention import impl_triton

    return impl_triton.forward(arguments)


@operator("media_attention_backward", fake=_backward_shapes)
def backward(
    d_out: Tensor,
    segments: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    last: Tensor,
    gate: Tensor | None,
    scale: float,
    single_item: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and gate.

    A kernel that needs the segment table and is given none makes its own.
    """
    arguments = Arguments(q, k, v, first, last, gate, scale, single_item)
    if kernel == "cpp":
        return impl_cpp.backward(d_out, arguments)
    from flamingo_kernels.ops.media_attention import impl_triton

    return impl_triton.backward(d_out, segments, arguments)
