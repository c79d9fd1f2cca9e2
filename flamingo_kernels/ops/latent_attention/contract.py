"""The latent attention operators: what every ``impl_{kernel}.py`` here offers; torch only."""

from __future__ import annotations

from torch import Tensor

from flamingo_kernels.ops.kernel_op import kernel_op
from flamingo_kernels.precision import accumulator

_INPUTS = (
    "Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, Tensor v_latents, Tensor? lengths"
)


def _forward_shapes(q: Tensor, *_) -> tuple[Tensor, Tensor]:
    items, latents, heads, _ = q.shape
    lse = q.new_empty((items, heads, latents), dtype=accumulator(q.dtype))
    return q.new_empty(q.shape), lse


def _backward_shapes(d_out: Tensor, *arguments) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in arguments[:5])


# The second result is log(sum(exp(scores))) per query, [N, H, L] in the dtype of accumulation.
forward = kernel_op(
    "latent_attention",
    "forward",
    f"({_INPUTS}, float scale, str kernel) -> (Tensor, Tensor)",
    _forward_shapes,
)
backward = kernel_op(
    "latent_attention",
    "backward",
    f"(Tensor d_out, {_INPUTS}, Tensor out, Tensor lse, float scale, str kernel) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_shapes,
)
