"""Media attention on the CPU through the native library."""

from __future__ import annotations

from torch import Tensor

from flamingo_kernels import _cpp


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    last: Tensor,
    gate: Tensor | None,
    scale: float,
) -> Tensor:
    """See ``api.media_cross_attention``; ``gate`` is already in the accumulation dtype."""
    return _cpp.media_attention_forward(q, k, v, first, last, gate, scale)
