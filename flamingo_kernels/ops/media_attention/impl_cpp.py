"""Media attention on the CPU through the native library; see ``contract``."""

from __future__ import annotations

from torch import Tensor

from flamingo_kernels._cpp import attention

bind_forward = attention.bind_media_attention_forward


# The library sees the ranges themselves, and needs no word on single items.
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    last: Tensor,
    gate: Tensor | None,
    scale: float,
    single_item: bool,
) -> Tensor:
    return bind_forward(q, k, v, scale)(q, k, v, first, last, gate)


def backward(d_out: Tensor, _plan: None, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, _single_item = arguments
    return attention.media_attention_backward(_unit_stride(d_out), *inputs)


def _unit_stride(d_out: Tensor) -> Tensor:
    """Autograd may hand in an expanded gradient, as of a sum: the only copy made here."""
    return d_out if d_out.stride(-1) == 1 or d_out.shape[-1] == 1 else d_out.contiguous()
