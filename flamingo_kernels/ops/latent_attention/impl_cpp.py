"""Latent attention on the CPU through the native library; see ``contract``."""

from __future__ import annotations

from torch import Tensor

from flamingo_kernels._cpp import attention

forward = attention.latent_attention_forward


def backward(d_out: Tensor, *arguments) -> tuple[Tensor, ...]:
    # Autograd may hand in an expanded gradient, as of a sum: the only copy made here.
    if d_out.stride(-1) != 1 and d_out.shape[-1] != 1:
        d_out = d_out.contiguous()
    return attention.latent_attention_backward(d_out, *arguments)
