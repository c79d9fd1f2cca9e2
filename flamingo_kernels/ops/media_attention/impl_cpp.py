"""Media attention on the CPU through the native library.

Shape letters as in ``csrc/include/flamingo_cpu.h``. Gates come in the dtype of accumulation.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from flamingo_kernels._cpp import layouts, library
from flamingo_kernels._cpp.layouts import TENSOR, address, new_like
from flamingo_kernels.ops.media_attention.arguments import Arguments
from flamingo_kernels.ops.rows import unit_stride
from flamingo_kernels.ops.spans import MediaSpans
from flamingo_kernels.precision import accumulated

_SIZES = struct.Struct("@7qd2i")  # up to the threads
_END = f"4q{_SIZES.size}si4x"
PARAMS = struct.Struct("@" + 8 * TENSOR + _END)
FORWARD_PARAMS = struct.Struct("@" + 4 * TENSOR + layouts.no_tensors(4) + _END)


def _sizes(q: Tensor, k: Tensor, scale: float) -> bytes:
    batch, tokens, heads, head_dim = q.shape
    _, media, latents, kv_heads, _ = k.shape
    sizes = (batch, tokens, media, latents, heads, kv_heads, head_dim)
    return _SIZES.pack(*sizes, scale, *library.dtype_and_set(q.dtype))


def bind_forward(
    q: Tensor, k: Tensor, v: Tensor, spans: MediaSpans, gate: Tensor | None, scale: float
) -> Callable[[Tensor, Tensor, Tensor, MediaSpans, Tensor | None], Tensor]:
    """Return the forward for calls of this signature, with all parameters but addresses packed.

    It takes (q, k, v, spans, gate) and returns out [B, T, H, D], contiguous.
    """
    function = library.function("flamingo_media_attention_forward")
    pack = FORWARD_PARAMS.pack
    q_strides, k_strides, v_strides = layouts.strides(q), layouts.strides(k), layouts.strides(v)
    out_strides, sizes = layouts.contiguous_strides(q), _sizes(q, k, scale)

    def launch(q: Tensor, k: Tensor, v: Tensor, spans: MediaSpans, gate: Tensor | None) -> Tensor:
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
            spans.first.data_ptr(),
            spans.last.data_ptr(),
            address(gate),
            0,
            sizes,
            torch.get_num_threads(),
        )
        function(params)
        return out

    if spans.first.is_contiguous() and spans.last.is_contiguous() and accumulated(gate, q) is gate:
        return launch
    return lambda q, k, v, spans, gate: launch(q, k, v, _dense(spans), accumulated(gate, q))


def forward(arguments: Arguments) -> Tensor:
    q, k, v, first, last, gate, scale, _single_item = arguments
    spans = MediaSpans(first, last)
    return bind_forward(q, k, v, spans, gate, scale)(q, k, v, spans, gate)


def backward(d_out: Tensor, arguments: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return contiguous gradients of q, k and v, and that of the gate, empty without a gate."""
    q, k, v, first, last, gate, scale, _single_item = arguments
    d_out, first, last = unit_stride(d_out), first.contiguous(), last.contiguous()
    d_q, d_k, d_v = (new_like(t) for t in (q, k, v))
    d_gate = q.new_empty(0) if gate is None else torch.zeros_like(gate)
    params = PARAMS.pack(
        *layouts.tensors(q, k, v),
        *layouts.ABSENT,
        *layouts.tensors(d_out, d_q, d_k, d_v),
        first.data_ptr(),
        last.data_ptr(),
        address(gate),
        address(None if gate is None else d_gate),
        _sizes(q, k, scale),
        torch.get_num_threads(),
    )
    library.function("flamingo_media_attention_backward")(params)
    return d_q, d_k, d_v, d_gate


def _dense(spans: MediaSpans) -> MediaSpans:
    return MediaSpans(spans.first.contiguous(), spans.last.contiguous())
