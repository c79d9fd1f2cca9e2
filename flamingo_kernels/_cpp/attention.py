"""The attention kernels of the native library, on CPU tensors.

Shape letters as in ``csrc/include/flamingo_cpu.h``.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from flamingo_kernels._cpp import library


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4)]


class _MediaAttentionParams(ctypes.Structure):
    _fields_ = [
        *((name, _Tensor) for name in ("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v")),
        *((name, ctypes.c_void_p) for name in ("first", "last", "gate", "d_gate")),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "tokens", "media", "latents", "heads", "kv_heads", "head_dim")
        ),
        ("scale", ctypes.c_double),
        ("execution", library.Execution),
    ]


class _LatentAttentionParams(ctypes.Structure):
    _fields_ = [
        *((name, _Tensor) for name in ("q", "k_media", "v_media", "k_latents", "v_latents")),
        *((name, _Tensor) for name in ("out", "d_out", "d_q", "d_k_media", "d_v_media")),
        *((name, _Tensor) for name in ("d_k_latents", "d_v_latents")),
        *((name, ctypes.c_void_p) for name in ("lengths", "lse")),
        *((name, ctypes.c_int64) for name in ("items", "latents", "features", "heads", "head_dim")),
        ("scale", ctypes.c_double),
        ("execution", library.Execution),
    ]


def _describe(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()[:-1]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


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
    out = torch.empty(q.shape, dtype=q.dtype)
    unused = (None, ())
    _call_media(
        "flamingo_media_attention_forward",
        (_describe(q), _describe(k), _describe(v), _describe(out), *[unused] * 4),
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
    d_q, d_k, d_v = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
    d_gate = torch.zeros(0, dtype=q.dtype) if gate is None else torch.zeros_like(gate)
    tensors = (_describe(t) for t in (d_out, d_q, d_k, d_v))
    _call_media(
        "flamingo_media_attention_backward",
        (_describe(q), _describe(k), _describe(v), (None, ()), *tensors),
        (first, last, gate, None if gate is None else d_gate),
        q,
        k,
        scale,
    )
    return d_q, d_k, d_v, d_gate


def _call_media(
    name: str,
    tensors: tuple,
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
    params = _MediaAttentionParams(
        *tensors,
        first.data_ptr(),
        last.data_ptr(),
        _pointer(gate),
        _pointer(d_gate),
        batch,
        tokens,
        media,
        latents,
        heads,
        kv_heads,
        head_dim,
        scale,
        library.execution(q.dtype),
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
    out = torch.empty(q.shape, dtype=q.dtype)
    accumulation = torch.promote_types(q.dtype, torch.float32)
    lse = torch.empty((items, heads, latents), dtype=accumulation)
    inputs = (_describe(t) for t in (q, k_media, v_media, k_latents, v_latents, out))
    _call_latent(
        "flamingo_latent_attention_forward",
        (*inputs, *[(None, ())] * 6),
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
    gradients = tuple(torch.empty(t.shape, dtype=t.dtype) for t in inputs)
    _call_latent(
        "flamingo_latent_attention_backward",
        tuple(_describe(t) for t in (*inputs, out, d_out, *gradients)),
        lengths,
        lse,
        q,
        k_media,
        scale,
    )
    return gradients


def _call_latent(
    name: str,
    tensors: tuple,
    lengths: Tensor | None,
    lse: Tensor,
    q: Tensor,
    k_media: Tensor,
    scale: float,
) -> None:
    if lengths is not None:
        lengths = lengths.to(torch.int64).contiguous()
    items, latents, heads, head_dim = q.shape
    params = _LatentAttentionParams(
        *tensors,
        _pointer(lengths),
        lse.data_ptr(),
        items,
        latents,
        k_media.shape[1],
        heads,
        head_dim,
        scale,
        library.execution(q.dtype),
    )
    library.call(name, params)
