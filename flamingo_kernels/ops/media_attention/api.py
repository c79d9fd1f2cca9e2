"""The public media cross-attention op."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from flamingo_kernels.ops import checks, dispatch
from flamingo_kernels.ops.key_ranges import KeyRanges
from flamingo_kernels.ops.media_attention import impl_cpp, impl_torch, operators
from flamingo_kernels.ops.media_attention.arguments import Arguments
from flamingo_kernels.ops.signature import is_eager, remembered
from flamingo_kernels.ops.spans import MediaSpans, SegmentTable
from flamingo_kernels.precision import accumulated

_OP = "media_cross_attention"
Ranges = TypeVar("Ranges", MediaSpans, KeyRanges)


def media_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: MediaSpans | KeyRanges,
    gate: Tensor | None = None,
    scale: float | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Masked cross-attention of text tokens to media latents (Flamingo, section 2.4, A.1.3).

    Equivalent to, with ``mask[b, t, s] = ranges.start[b, t] <= s < ranges.stop[b, t]``::

        scores = einsum("bthd,bshd->bhts", q, k) * scale            # keys masked out: -inf
        out = einsum("bhts,bshd->bthd", softmax(scores over s), v) * tanh(gate)

    with exact zeros, and exactly zero gradients, for tokens whose range is empty. Keys that no
    token of a row sees are never read into a result: they may hold NaN.

    The keys are a flat list with :class:`KeyRanges`, or media items of R keys each with
    :class:`MediaSpans`, which say ``first`` and ``last`` item.

    Parameters
    ----------
    q : Tensor
        Floating point [B, T, H, D].
    k, v : Tensor
        [B, S, Hkv, D], or [B, I, R, Hkv, D] of I media slots; dtype and device of ``q``; ``H`` a
        multiple of ``Hkv`` (grouped queries). Any strides; S and I may be 0.
    spans : KeyRanges or MediaSpans
        Ranges [B, T] of the keys, or of the items, that each token sees.
    gate : Tensor, optional
        One floating point value, any dtype; the output is multiplied by ``tanh(gate)``.
    scale : float, optional
        Score multiplier, default ``D ** -0.5``.
    kernel : {"auto", "triton", "cpp", "torch"}
        ``"auto"`` takes the best available; an explicit kernel never falls back.

    Returns
    -------
    Tensor
        [B, T, H, D], dtype of ``q``. Softmax and sums are in fp32 (fp64 for fp64 inputs).

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit together; the message names the values.
    KernelUnavailableError
        The kernel asked for cannot run this call; the message lists the reasons.
    """
    items = spans
    if isinstance(spans, KeyRanges):
        k, v, items = _items_of_one_key("k", k), _items_of_one_key("v", v), spans.spans
    scale = None if scale is None else float(scale)
    run = _runner(q, k, v, items, gate, scale, kernel, items is not spans)
    return run(q, k, v, items, gate)


def _items_of_one_key(name: str, keys: Tensor) -> Tensor:
    """Return keys or values [B, S, Hkv, D] as the kernels take them, [B, S, 1, Hkv, D]."""
    checks.require_rank(_OP, name, keys, "[B, S, Hkv, D]")
    return keys.unsqueeze(2)


@remembered
def _runner(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: MediaSpans,
    gate: Tensor | None,
    scale: float | None,
    kernel: str,
    flat: bool,
) -> Callable[[Tensor, Tensor, Tensor, MediaSpans, Tensor | None], Tensor]:
    """Check the arguments and return what runs calls of this signature."""
    checks.media_cross_attention(q, k, v, spans, gate, flat)
    chosen, saves = dispatch.choose_for(_OP, kernel, q, k, v, gate, head_dim=q.shape[-1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if chosen == "torch":
        return partial(impl_torch.forward, scale=scale)
    if saves:
        return partial(_attend_with_gradients, scale=scale, kernel=chosen)
    if not is_eager(q):
        return lambda *inputs: operators.forward(*_arguments(inputs, scale), chosen)
    if chosen == "cpp":
        return impl_cpp.bind_forward(q, k, v, spans, gate, scale)
    from flamingo_kernels.ops.media_attention import impl_triton

    return lambda *inputs: impl_triton.forward(_arguments(inputs, scale))


def _arguments(inputs: tuple[Any, ...], scale: float) -> Arguments:
    q, k, v, spans, gate = inputs
    gate = accumulated(gate, q)
    return Arguments(q, k, v, spans.first, spans.last, gate, scale, spans.single_item)


def _attend_with_gradients(*inputs: Any, scale: float, kernel: str) -> Tensor:
    spans = inputs[3]
    uses_segments = dispatch.CAPABILITIES[_OP, kernel].needs_segments
    table = spans.segments.table if uses_segments and spans.segments is not None else None
    return _MediaCrossAttention.apply(table, *_arguments(inputs, scale), kernel)


class _MediaCrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, segments: Tensor | None, *arguments: Any) -> Tensor:
        out = operators.forward(*arguments)
        operators.save(ctx, arguments, out, segments)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return None, *operators.gradients(ctx, d_out)


def plan_media_attention(spans: Ranges, k: Tensor, kernel: str = "auto") -> Ranges:
    """Attach to ``spans`` the segment table that the backward of every layer needs.

    Call it once per forward, with the keys of any one layer, and pass the result to all layers.
    It changes no result. It returns ``spans`` itself if gradients are disabled or if the kernel
    needs no table.

    Parameters
    ----------
    spans : MediaSpans or KeyRanges
        Ranges [B, T].
    k : Tensor
        [B, I, R, Hkv, D] or [B, S, Hkv, D], as in :func:`media_cross_attention`.
    kernel : {"auto", "triton", "cpp", "torch"}
        Kernel of the calls that follow.

    Raises
    ------
    TypeError, ValueError
        ``k`` is not such a tensor, or not on the device of ``spans``.
    KernelUnavailableError
        The kernel asked for cannot run such calls; the message lists the reasons.
    """
    if isinstance(spans, KeyRanges):
        planned = plan_media_attention(spans.spans, _items_of_one_key("k", k), kernel)
        return spans if planned.segments is None else spans.with_segments(planned.segments)
    op = "plan_media_attention"
    checks.require_rank(op, "k", k, "[B, I, R, Hkv, D]")
    checks.require_spans(op, spans, k.shape[0], None, "k", k)
    if not torch.is_grad_enabled():
        return spans
    chosen, _ = dispatch.choose_for(_OP, kernel, k, head_dim=k.shape[-1])
    if not dispatch.CAPABILITIES[_OP, chosen].needs_segments:
        return spans
    media, kv_heads = k.shape[1], k.shape[3]
    table = operators.segments(spans.first, spans.last, media, kv_heads, spans.single_item, chosen)
    return spans.with_segments(SegmentTable(table, media, kv_heads))
