"""Latent attention on the CPU through the native library.

Shape letters as in ``csrc/include/flamingo_cpu.h``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from flamingo_kernels._cpp import layouts, library
from flamingo_kernels._cpp.layouts import TENSOR, address, new_like
from flamingo_kernels.ops.latent_attention.arguments import Arguments
from flamingo_kernels.ops.rows import unit_stride
from flamingo_kernels.precision import accumulator

_SIZES = struct.Struct("@6qd2i")  # up to the threads
_END = f"2q{_SIZES.size}si4x"
PARAMS = struct.Struct("@" + 12 * TENSOR + _END)
FORWARD_PARAMS = struct.Struct("@" + 6 * TENSOR + layouts.no_tensors(6) + _END)


def _sizes(q: Tensor, k_media: Tensor, scale: float) -> bytes:
    items, latents, heads, head_dim = q.shape
    sizes = (items, latents, k_media.shape[1], heads, k_media.shape[2], head_dim)
    return _SIZES.pack(*sizes, scale, *library.dtype_and_set(q.dtype))


def _int64(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.to(torch.int64).contiguous()


def bind_forward(tensors: tuple[Tensor, ...], scale: float) -> Callable[..., Tensor]:
    """Return the forward for calls of this signature, with all parameters but addresses packed.

    It takes (q, k_media, v_media, k_latents, v_latents, lengths, lse) and returns out [N, L, H, D],
    contiguous. Lengths may be None. lse [N, H, L], contiguous in the dtype of accumulation, is
    written if it is given.
    """
    function = library.function("flamingo_latent_attention_forward")
    pack = FORWARD_PARAMS.pack
    q, k_media, *_ = tensors
    q_strides, km_strides, vm_strides, kl_strides, vl_strides = map(layouts.strides, tensors)
    out_strides, sizes = layouts.contiguous_strides(q), _sizes(q, k_media, scale)

    def launch(q, k_media, v_media, k_latents, v_latents, lengths, lse=None):
        out, lengths = new_like(q), _int64(lengths)
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


def forward(arguments: Arguments) -> tuple[Tensor, Tensor]:
    q, tensors = arguments.q, arguments[:5]
    items, latents, heads, _ = q.shape
    lse = q.new_empty((items, heads, latents), dtype=accumulator(q.dtype))
    return bind_forward(tensors, arguments.scale)(*tensors, arguments.lengths, lse), lse


def backward(
    d_out: Tensor, arguments: Arguments, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return contiguous gradients of the five inputs."""
    *inputs, lengths, scale = arguments
    d_out, lengths = unit_stride(d_out), _int64(lengths)
    d_q, d_k_media, d_v_media, d_k_latents, d_v_latents = gradients = tuple(map(new_like, inputs))
    params = PARAMS.pack(
        *layouts.tensors(*inputs, out, d_out, *gradients),
        address(lengths),
        lse.data_ptr(),
        _sizes(arguments.q, arguments.k_media, scale),
        torch.get_num_threads(),
    )
    library.function("flamingo_latent_attention_backward")(params)
    return d_q, d_k_media, d_v_media, d_k_latents, d_v_latents
