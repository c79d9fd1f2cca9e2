"""The latent attention operators of torch, and which implementation each kernel name runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flamingo_kernels.ops.latent_attention import impl_cpp
from flamingo_kernels.ops.latent_attention.arguments import Arguments
from flamingo_kernels.ops.operator import Gradient, operator
from flamingo_kernels.ops.single_backward import single_backward
from flamingo_kernels.precision import accumulator


def _forward_shapes(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    items, latents, heads, _ = q.shape
    lse = q.new_empty((items, heads, latents), dtype=accumulator(q.dtype))
    return q.new_empty(q.shape), lse


def _backward_shapes(d_out: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in arguments[:5])


def save(ctx: Any, arguments: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep inputs, output and one number per query; to_out keeps the output alive."""
    *inputs, scale, kernel = arguments
    ctx.save_for_backward(*inputs, *output)
    ctx.options = (scale, kernel)


@single_backward("latent_attention")
def gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the forward's arguments."""
    return *backward(d_out, *ctx.saved_tensors, *ctx.options), None, None, None


@operator("latent_attention_forward", fake=_forward_shapes, gradient=Gradient(save, gradients))
def forward(
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    lengths: Tensor | None,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Return the output, and log(sum(exp(scores))) per query, [N, H, L], accumulation dtype."""
    arguments = Arguments(q, k_media, v_media, k_latents, v_latents, lengths, scale)
    if kernel == "cpp":
        return impl_cpp.forward(arguments)
    from flamingo_kernels.ops.latent_attention import impl_triton

    return impl_triton.forward(arguments)


@operator("latent_attention_backward", fake=_backward_shapes)
def backward(
    d_out: Tensor,
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k_media, v_media, k_latents and v_latents."""
    arguments = Arguments(q, k_media, v_media, k_latents, v_latents, lengths, scale)
    if kernel == "cpp":
        return impl_cpp.backward(d_out, arguments, out, lse)
    from flamingo_kernels.ops.latent_attention import impl_triton

    return impl_triton.backward(d_out, arguments, out, lse)
