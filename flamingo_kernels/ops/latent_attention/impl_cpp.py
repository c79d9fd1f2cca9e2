"""Latent attention on the CPU through the native library; see ``contract``."""

from __future__ import annotations

from torch import Tensor

from flamingo_kernels._cpp import attention

bind_forward = attention.bind_latent_attention_forward


def forward(*arguments) -> tuple[Tensor, Tensor]:
    *tensors, lengths, scale = arguments
    lse = attention.new_lse(tensors[0])
    return bind_forward(*tensors, scale)(*tensors, lengths, lse), lse


def backward(d_out: Tensor, *arguments) -> tuple[Tensor, ...]:
    # Autograd may hand in an expanded gradient, as of a sum: the only copy made here.
    if d_out.stride(-1) != 1 and d_out.shape[-1] != 1:
        d_out = d_out.contiguous()
    return attention.latent_attention_backward(d_out, *arguments)
