"""The public media cross-attention op."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flamingo_kernels.ops import checks, dispatch
from flamingo_kernels.ops.media_attention import contract, impl_cpp, impl_torch
from flamingo_kernels.ops.memo import once_per_signature
from flamingo_kernels.ops.spans import MediaPlan, MediaSpans
from flamingo_kernels.precision import accumulated, score_scale

# Kernels whose backward works from a plan.
_PLANNING = ("triton",)


def media_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: MediaSpans,
    gate: Tensor | None = None,
    scale: float | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Masked cross-attention of text tokens to media latents (Flamingo, section 2.4, A.1.3).

    Equivalent to, with ``mask[b, t, i] = spans.first[b, t] <= i <= spans.last[b, t]``::

        scores = einsum("bthd,birhd->bhtir", q, k) * scale          # media slots masked out: -inf
        out = einsum("bhtir,birhd->bthd", softmax(scores over i, r), v) * tanh(gate)

    with exact zeros, and exactly zero gradients, for tokens whose range is empty. Media slots that
    no token of a row sees are never read into a result: they may hold NaN.

    Parameters
    ----------
    q : Tensor
        Floating point [B, T, H, D].
    k, v : Tensor
        [B, I, R, Hkv, D], dtype and device of ``q``; ``H`` a multiple of ``Hkv`` (grouped queries).
        Any strides; I, the number of media slots, may be 0.
    spans : MediaSpans
        Ranges [B, T] of the items that each token sees.
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
    if scale is not None:
        scale = float(scale)
    chosen, needs_grad, launch = _choose(q, k, v, spans, gate, scale, kernel)
    if launch is not None:
        return launch(q, k, v, spans.first, spans.last, gate)
    gate, scale = accumulated(gate, q), score_scale(q, scale)
    if chosen == "torch":
        return impl_torch.forward(q, k, v, spans, gate, scale)
    arguments = (q, k, v, spans.first, spans.last, gate, scale, spans.single_item, chosen)
    if not needs_grad:
        return contract.forward(*arguments)
    plan = spans.plan.table if spans.plan is not None and chosen in _PLANNING else None
    return _MediaCrossAttention.apply(plan, *arguments)


def _bind(choice: dispatch.Choice, *arguments) -> dispatch.Choice:
    q, k, v, spans, gate, scale, _kernel = arguments
    inputs = (q, k, v, spans.first, spans.last, gate, score_scale(q, scale))
    return choice.bound(impl_cpp.bind_forward, *inputs)


@once_per_signature(_bind)
def _choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: MediaSpans,
    gate: Tensor | None,
    scale: float | None,
    kernel: str,
) -> dispatch.Choice:
    checks.media_cross_attention(q, k, v, spans, gate)
    return dispatch.choose_for("media_cross_attention", kernel, q, k, v, gate, head_dim=q.shape[-1])


def plan_media_attention(spans: MediaSpans, k: Tensor, kernel: str = "auto") -> MediaSpans:
    """``spans`` with what the backward of every layer would else derive from them once more.

    Call it once per forward, with the keys of any one layer, and give the result to all of them.
    It changes no result, and is ``spans`` itself where gradients are disabled or the kernel needs
    no plan.

    Parameters
    ----------
    spans : MediaSpans
        Ranges [B, T].
    k : Tensor
        [B, I, R, Hkv, D], as in :func:`media_cross_attention`.
    kernel : {"auto", "triton", "cpp", "torch"}
        Kernel of the calls to come.

    Raises
    ------
    TypeError, ValueError
        ``k`` is not such a tensor, or not on the device of ``spans``.
    KernelUnavailableError
        The kernel asked for cannot run such calls; the message lists the reasons.
    """
    op = "plan_media_attention"
    checks.require_rank(op, "k", k, "[B, I, R, Hkv, D]")
    checks.require_spans(op, spans, k.shape[0], None, "k", k)
    if not torch.is_grad_enabled():
        return spans
    chosen = dispatch.choose_for("media_cross_attention", kernel, k, head_dim=k.shape[-1]).kernel
    if chosen not in _PLANNING:
        return spans
    media, kv_heads = k.shape[1], k.shape[3]
    table = contract.plan(spans.first, spans.last, media, kv_heads, spans.single_item, chosen)
    return spans.planned(MediaPlan(table, media, kv_heads))


class _MediaCrossAttention(torch.autograd.Function):
    """Saves its inputs only, the plan among them: the backward recomputes the softmax."""

    @staticmethod
    def forward(
        ctx,
        plan: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first: Tensor,
        last: Tensor,
        gate: Tensor | None,
        scale: float,
        single_item: bool,
        kernel: str,
    ) -> Tensor:
        ctx.save_for_backward(plan, q, k, v, first, last, gate)
        ctx.options = (scale, single_item, kernel)
        return contract.forward(q, k, v, first, last, gate, scale, single_item, kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        d_q, d_k, d_v, d_gate = contract.backward(d_out, *saved, *ctx.options)
        d_gate = None if saved[-1] is None else d_gate
        return None, d_q, d_k, d_v, None, None, d_gate, None, None, None
