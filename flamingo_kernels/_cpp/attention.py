"""The attention kernels of the native library, on CPU tensors.

Shape letters as in ``csrc/include/flamingo_cpu.h``. The params structs are packed with ``struct``:
ctypes takes longer to fill one in than a decoding step takes to compute.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from flamingo_kernels._cpp import library

# flamingo_tensor is an address and four strides; flamingo_execution is three int32.
_TENSOR, _EXECUTION = "5q", "3i4x"
_MEDIA_PARAMS = struct.Struct("@" + 8 * _TENSOR + "4q" + "7q" + "d" + _EXECUTION)
_LATENT_PARAMS = struct.Struct("@" + 12 * _TENSOR + "2q" + "5q" + "d" + _EXECUTION)
_ABSENT = (0, 0, 0, 0, 0)


def _describe(tensor: Tensor) -> tuple[int, ...]:
    """Address and four strides of a tensor of 4 or 5 dimensions; the last one, 1, is not used."""
    return (tensor.data_ptr(), *tensor.stride()[:4])


def _new(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


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
    out = _new(q)
    tensors = (*_describe(q), *_describe(k), *_describe(v), *_describe(out), *_ABSENT * 4)
    _call_media(
        "flamingo_media_attention_forward",
        tensors,
        (first, last, gate, None),
        q,
        k,
        scale,
    )
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
    d_q, d_k, d_v = (_new(t) for t in (q, k, v))
    d_gate = torch.zeros(0, dtype=q.dtype) if gate is None else torch.zeros_like(gate)
    tensors = [*_describe(q), *_describe(k), *_describe(v), *_ABSENT]
    for tensor in (d_out, d_q, d_k, d_v):
        tensors += _describe(tensor)
    _call_media(
        "flamingo_media_attention_backward",
        tensors,
        (first, last, gate, None if gate is None else d_gate),
        q,
        k,
        scale,
    )
    return d_q, d_k, d_v, d_gate


def _call_media(
    name: str,
    tensors: Sequence[int],
    small: tuple[Tensor | None, ...],
    q: Tensor,
    k: Tensor,
    scale: float,
) -> None:
    first, last, gate, d_gate = small
    # The ranges are small: a strided view of them is laid out anew.
    first, last = first.contiguous(), last.contiguous()
    batch, tokens, heads, head_dim = q.shape
    _, media, latents, kv_heads, _ = k.shape
    params = _MEDIA_PARAMS.pack(
        *tensors,
        first.data_ptr(),
        last.data_ptr(),
        _address(gate),
        _address(d_gate),
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
    out = _new(q)
    accumulation = torch.promote_types(q.dtype, torch.float32)
    lse = torch.empty((items, heads, latents), dtype=accumulation)
    inputs = (q, k_media, v_media, k_latents, v_latents, out)
    _call_latent(
        "flamingo_latent_attention_forward",
        (*(value for t in inputs for value in _describe(t)), *_ABSENT * 6),
        lengths,
        lse,
        q,
        k_media,
        scale,
    )
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
    gradients = tuple(_new(t) for t in inputs)
    _call_latent(
        "flamingo_latent_attention_backward",
        [value for t in (*inputs, out, d_out, *gradients) for value in _describe(t)],
        lengths,
        lse,
        q,
        k_media,
        scale,
    )
    return gradients


def _call_latent(
    name: str,
    tensors: Sequence[int],
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
        *tensors,
        _address(lengths),
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
