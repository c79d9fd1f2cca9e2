"""The attention kernels of the native library, on CPU tensors.

Shape letters as in ``csrc/include/flamingo_cpu.h``. A forward is bound once to tensors that lie
alike, which packs all but addresses; what is bound is then called with such tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from flamingo_kernels._cpp import library
from flamingo_kernels._cpp.library import address, new_like
from flamingo_kernels.precision import accumulator

_STRIDES = struct.Struct("4q")
_TENSOR = f"q{_STRIDES.size}s"  # flamingo_tensor: an address and four strides
_MEDIA_SIZES = struct.Struct("@7qd2i")  # up to the threads
_LATENT_SIZES = struct.Struct("@5qd2i")
_MEDIA_END = f"4q{_MEDIA_SIZES.size}si4x"
_LATENT_END = f"2q{_LATENT_SIZES.size}si4x"
_MEDIA_PARAMS = struct.Struct("@" + 8 * _TENSOR + _MEDIA_END)
_LATENT_PARAMS = struct.Struct("@" + 12 * _TENSOR + _LATENT_END)
# A forward is given no gradients: zeros in their place.
_MEDIA_FORWARD_PARAMS = struct.Struct("@" + 4 * _TENSOR + f"{4 * 40}s" + _MEDIA_END)
_LATENT_FORWARD_PARAMS = struct.Struct("@" + 6 * _TENSOR + f"{6 * 40}s" + _LATENT_END)


def _strides(tensor: Tensor) -> bytes:
    """All but the last, which is 1, of 4 or 5 dimensions."""
    return _STRIDES.pack(*tensor.stride()[:4])


def _contiguous_strides(tensor: Tensor) -> bytes:
    """Those of :func:`new_like`, whose shape has four dimensions."""
    _, second, third, last = tensor.shape
    return _STRIDES.pack(second * third * last, third * last, last, 1)


def _layouts(*tensors: Tensor) -> list[int | bytes]:
    """Address and strides of each."""
    return [value for tensor in tensors for value in (tensor.data_ptr(), _strides(tensor))]


def _media_sizes(q: Tensor, k: Tensor, scale: float) -> bytes:
    batch, tokens, heads, head_dim = q.shape
    _, media, latents, kv_heads, _ = k.shape
    sizes = (batch, tokens, media, latents, heads, kv_heads, head_dim)
    return _MEDIA_SIZES.pack(*sizes, scale, *library.dtype_and_set(q.dtype))


def bind_media_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Callable[..., Tensor]:
    """``flamingo_media_attention_forward`` for tensors that lie like these.

    Returns
    -------
    callable
        Of (q, k, v, first, last, gate): out [B, T, H, D], contiguous. The ranges are contiguous,
        the gate is in the dtype of accumulation or None.
    """
    function = library.function("flamingo_media_attention_forward")
    pack = _MEDIA_FORWARD_PARAMS.pack
    q_strides, k_strides, v_strides = _strides(q), _strides(k), _strides(v)
    out_strides, sizes = _contiguous_strides(q), _media_sizes(q, k, scale)

    def launch(
        q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, gate: Tensor | None
    ) -> Tensor:
        out = new_like(q)
        params = pack(
            q.data_ptr(),
            q_strides,
            k.data_ptr(),
            k_strides,
            v.data_ptr(),
            v_strides,
            out.data_ptr(),
            out_strides,
            b"",
            first.data_ptr(),
            last.data_ptr(),
            address(gate),
            0,
            sizes,
            torch.get_num_threads(),
        )
        function(params)
        return out

    return launch


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
    d_gate = q.new_empty(0) if gate is None else torch.zeros_like(gate)
    params = _MEDIA_PARAMS.pack(
        *_layouts(q, k, v),
        *(0, b""),
        *_layouts(d_out, d_q, d_k, d_v),
        first.data_ptr(),
        last.data_ptr(),
        address(gate),
        address(None if gate is None else d_gate),
        _media_sizes(q, k, scale),
        torch.get_num_threads(),
    )
    library.function("flamingo_media_attention_backward")(params)
    return d_q, d_k, d_v, d_gate


def _latent_sizes(q: Tensor, k_media: Tensor, scale: float) -> bytes:
    items, latents, heads, head_dim = q.shape
    sizes = (items, latents, k_media.shape[1], heads, head_dim)
    return _LATENT_SIZES.pack(*sizes, scale, *library.dtype_and_set(q.dtype))


def _latent_lengths(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.to(torch.int64).contiguous()


def bind_latent_attention_forward(
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    scale: float,
) -> Callable[..., Tensor]:
    """``flamingo_latent_attention_forward`` for tensors that lie like these.

    Returns
    -------
    callable
        Of (q, k_media, v_media, k_latents, v_latents, lengths, lse): out [N, L, H, D], contiguous.
        Lengths may be None. lse [N, H, L], contiguous in the dtype of accumulation, is written, and
        may be left out.
    """
    function = library.function("flamingo_latent_attention_forward")
    pack = _LATENT_FORWARD_PARAMS.pack
    strides = [_strides(tensor) for tensor in (q, k_media, v_media, k_latents, v_latents)]
    q_strides, km_strides, vm_strides, kl_strides, vl_strides = strides
    out_strides, sizes = _contiguous_strides(q), _latent_sizes(q, k_media, scale)

    def launch(
        q: Tensor,
        k_media: Tensor,
        v_media: Tensor,
        k_latents: Tensor,
        v_latents: Tensor,
        lengths: Tensor | None,
        lse: Tensor | None = None,
    ) -> Tensor:
        out, lengths = new_like(q), _latent_lengths(lengths)
        params = pack(
            q.data_ptr(),
            q_strides,
            k_media.data_ptr(),
            km_strides,
            v_media.data_ptr(),
            vm_strides,
            k_latents.data_ptr(),
            kl_strides,
            v_latents.data_ptr(),
            vl_strides,
            out.data_ptr(),
            out_strides,
            b"",
            address(lengths),
            address(lse),
            sizes,
            torch.get_num_threads(),
        )
        function(params)
        return out

    return launch


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
    lengths = _latent_lengths(lengths)
    params = _LATENT_PARAMS.pack(
        *_layouts(*inputs, out, d_out, *gradients),
        address(lengths),
        lse.data_ptr(),
        _latent_sizes(q, k_media, scale),
        torch.get_num_threads(),
    )
    library.function("flamingo_latent_attention_backward")(params)
    return gradients


def new_lse(q: Tensor) -> Tensor:
    """[N, H, L], not filled."""
    items, latents, heads, _ = q.shape
    return q.new_empty((items, heads, latents), dtype=accumulator(q.dtype))
