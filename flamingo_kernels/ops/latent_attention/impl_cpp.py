"""Latent attention on the CPU through the native library; see ``contract``."""

from __future__ import annotations

from torch import Tensor

from flamingo_kernels._cpp import attention

bind_forward = attention.bind_latent_attention_forward


def forward(
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    tensors, lse = (q, k_media, v_media, k_latents, v_latents), attention.new_lse(q)
    return bind_forward(*tensors, scale)(*tensors, lengths, lse), lse


def backward(d_out: Tensor, *arguments) -> tuple[Tensor, ...]:
    # Autograd may hand in an expanded gradient, as of a sum: the only copy made here.
    if d_out.stride(-1) != 1 and d_out.shape[-1] != 1:
        d_out = d_out.contiguous()
    return attention.latent_attention_backward(d_out, *arguments)
