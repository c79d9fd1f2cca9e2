"""The attention kernels of the native library, on CPU tensors.

Shape letters as in ``csrc/include/flamingo_cpu.h``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from flamingo_kernels._cpp import library
from flamingo_kernels._cpp.library import address, new_like
from flamingo_kernels.precision import accumulator

_TENSOR = "5q"  # flamingo_tensor: an address and four strides
_MEDIA_PARAMS = struct.Struct("@" + 8 * _TENSOR + "4q" + "7q" + "d" + library.EXECUTION + "4x")
_LATENT_PARAMS = struct.Struct("@" + 12 * _TENSOR + "2q" + "5q" + "d" + library.EXECUTION + "4x")
_ABSENT = (0, 0, 0, 0, 0)


def _layouts(*tensors: Tensor) -> list[int]:
    """Address and four strides of each, of 4 or 5 dimensions; the last stride, 1, is not used."""
    layouts: list[int] = []
    for tensor in tensors:
        layouts.append(tensor.data_ptr())
        layouts += tensor.stride()[:4]
    return layouts


def media_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    last: Tensor,
    gate: Tensor | None,
    scale: float,
) -> Tensor:
    """``flamingo_media_attention_forward``: out [B, T, H, D], contiguous."""
    out = new_like(q)
    layouts = (*_layouts(q, k, v, out), *_ABSENT * 4)
    _call_media("flamingo_media_attention_forward", layouts, q, k, first, last, gate, None, scale)
    return out


def media_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    last: Tensor,
    gate: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``flamingo_media_attention_backward``: dq, dk, dv contiguous; dgate empty without a gate."""
    d_q, d_k, d_v = (new_like(t) for t in (q, k, v))
    d_gate = torch.zeros(0, dtype=q.dtype) if gate is None else torch.zeros_like(gate)
    layouts = (*_layouts(q, k, v), *_ABSENT, *_layouts(d_out, d_q, d_k, d_v))
    to = None if gate is None else d_gate
    _call_media("flamingo_media_attention_backward", layouts, q, k, first, last, gate, to, scale)
    return d_q, d_k, d_v, d_gate


def _call_media(
    name: str,
    layouts: Sequence[int],
    q: Tensor,
    k: Tensor,
    first: Tensor,
    last: Tensor,
    gate: Tensor | None,
    d_gate: Tensor | None,
    scale: float,
) -> None:
    # The ranges are small: a strided view of them is laid out anew.
    first, last = first.contiguous(), last.contiguous()
    batch, tokens, heads, head_dim = q.shape
    _, media, latents, kv_heads, _ = k.shape
    params = _MEDIA_PARAMS.pack(
        *layouts,
        first.data_ptr(),
        last.data_ptr(),
        address(gate),
        address(d_gate),
        batch,
        tokens,
        media,
        latents,
        heads,
        kv_heads,
        head_dim,
        scale,
        *library.execution(q.dtype),
    )
    library.call(name, params)


def latent_attention_forward(
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``flamingo_latent_attention_forward``: out [N, L, H, D] and lse [N, H, L], contiguous."""
    items, latents, heads, _ = q.shape
    out = new_like(q)
    lse = torch.empty((items, heads, latents), dtype=accumulator(q.dtype))
    layouts = (*_layouts(q, k_media, v_media, k_latents, v_latents, out), *_ABSENT * 6)
    _call_latent("flamingo_latent_attention_forward", layouts, lengths, lse, q, k_media, scale)
    return out, lse


def latent_attention_backward(
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
) -> tuple[Tensor, ...]:
    """``flamingo_latent_attention_backward``: gradients of the five inputs, contiguous."""
    inputs = (q, k_media, v_media, k_latents, v_latents)
    gradients = tuple(new_like(t) for t in inputs)
    layouts = _layouts(*inputs, out, d_out, *gradients)
    _call_latent("flamingo_latent_attention_backward", layouts, lengths, lse, q, k_media, scale)
    return gradients


def _call_latent(
    name: str,
    layouts: Sequence[int],
    lengths: Tensor | None,
    lse: Tensor,
    q: Tensor,
    k_media: Tensor,
    scale: float,
) -> None:
    if lengths is not None:
        lengths = lengths.to(torch.int64).contiguous()
    items, latents, heads, head_dim = q.shape
    params = _LATENT_PARAMS.pack(
        *layouts,
        address(lengths),
        lse.data_ptr(),
        items,
        latents,
        k_media.shape[1],
        heads,
        head_dim,
        scale,
        *library.execution(q.dtype),
    )
    library.call(name, params)
