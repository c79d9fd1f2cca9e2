"""Attention in stock PyTorch, with derivatives of every order and kind."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo_kernels.ops.dispatch import needs_grad
from flamingo_kernels.ops.transforms import is_watched, transform_of
from flamingo_kernels.precision import accumulator


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Return ``F.scaled_dot_product_attention``, which can be differentiated any number of times.

    torch's fused attention has a backward, and nothing else. Where more is asked for, products of
    matrices and a softmax answer, which keep all scores in memory.

    Parameters
    ----------
    q : Tensor
        Floating point [B, H, T, D].
    k, v : Tensor
        [B, Hkv, S, D], ``H`` a multiple of ``Hkv``.
    mask : Tensor, optional
        bool, broadcast to [B, H, T, S]: True where a query sees a key. Every query must see one.
    scale : float, optional
        Score multiplier, default ``D ** -0.5``.
    is_causal : bool
        Query t sees keys 0..t, in place of a mask.

    Returns
    -------
    Tensor
        [B, H, T, D].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if transform_of(q, k, v) is not None:
        return _attend_by_products(q, k, v, mask, scale, is_causal)
    grouped = bool(k.shape[1] != q.shape[1])  # jit.trace makes tensors of sizes
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
    if is_watched() or not needs_grad(q, k, v):
        return out
    return _SecondDerivative.apply(out, q, k, v, mask, scale, is_causal)


def _attend_by_products(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool
) -> Tensor:
    """Compute the same in the dtype of accumulation."""
    wide, dtype = accumulator(q.dtype), q.dtype
    q = q.to(wide).unflatten(1, (k.shape[1], -1))  # [B, Hkv, group, T, D]
    k, v = k.to(wide)[:, :, None], v.to(wide)[:, :, None]
    scores = (q @ k.transpose(-2, -1) * scale).flatten(1, 2)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1).unflatten(1, q.shape[1:3]) @ v).flatten(1, 2).to(dtype)


class _SecondDerivative(torch.autograd.Function):
    """Pass ``out`` on; where the gradient must have a gradient, take it from the products.

    Otherwise the gradient of ``out`` goes to the fused attention that computed it.
    """

    @staticmethod
    def forward(ctx, out: Tensor, *arguments: Any) -> Tensor:
        *tensors, scale, is_causal = arguments
        ctx.options = (scale, is_causal)
        ctx.save_for_backward(*tensors)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return d_out, *[None] * 6
        q, k, v, mask = ctx.saved_tensors
        q, k, v = inputs = [x.view_as(x) for x in (q, k, v)]  # one may have been given twice
        scale, is_causal = ctx.options
        out = _attend_by_products(q, k, v, mask, scale, is_causal)
        wanted = [x for x in inputs if x.requires_grad]
        gradients = iter(torch.autograd.grad(out, wanted, d_out, create_graph=True))
        return None, *(next(gradients) if x.requires_grad else None for x in inputs), *[None] * 3
