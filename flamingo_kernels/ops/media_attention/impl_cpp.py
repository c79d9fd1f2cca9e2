"""Media attention on the CPU through the native library; see ``contract``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flamingo_kernels._cpp import attention
from flamingo_kernels.precision import accumulated


def bind_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    last: Tensor,
    gate: Tensor | None,
    scale: float,
) -> Callable[..., Tensor]:
    launch = attention.bind_media_attention_forward(q, k, v, scale)
    if first.is_contiguous() and last.is_contiguous() and accumulated(gate, q) is gate:
        return launch
    # The ranges are small: a strided view of them is laid out anew.
    return lambda q, k, v, first, last, gate: launch(
        q, k, v, first.contiguous(), last.contiguous(), accumulated(gate, q)
    )


def forward(*arguments) -> Tensor:
    *inputs, scale, _single_item = arguments  # the library sees the ranges themselves
    return bind_forward(*inputs, scale)(*inputs)


def backward(d_out: Tensor, _plan: None, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, first, last, gate, scale, _single_item = arguments
    ranges = first.contiguous(), last.contiguous()
    return attention.media_attention_backward(_unit_stride(d_out), q, k, v, *ranges, gate, scale)


def _unit_stride(d_out: Tensor) -> Tensor:
    """Autograd may hand in an expanded gradient, as of a sum: the only copy made here."""
    return d_out if d_out.stride(-1) == 1 or d_out.shape[-1] == 1 else d_out.contiguous()
