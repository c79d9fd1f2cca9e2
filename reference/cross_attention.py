"""GATED XATTN-DENSE block (Flamingo 2.2 and Fig. 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .attention import media_cross_attention
from .layers import LayerNorm, feed_forward, split_heads
from .pointwise import gated_residual
from .spans import clip_ranges


class MediaCrossAttention(nn.Module):
    """Multi-head attention of the text on the media, with its norms."""

    def __init__(self, config: Any, dim: int, media_dim: int) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.kv_heads = config.kv_heads or config.heads
        self.norm = LayerNorm(dim)
        self.norm_media = LayerNorm(media_dim) if config.media_norm else None
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(media_dim, 2 * self.kv_heads * config.head_dim, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, media: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """x ``[B, T, dim]``, media ``[B, I, R, media_dim]`` -> ``[B, T, dim]``."""
        if self.norm_media is not None:
            media = self.norm_media(media)
        q = split_heads(self.to_q(self.norm(x)), self.heads)
        k, v = split_heads(self.to_kv(media), 2 * self.kv_heads).chunk(2, dim=-2)
        return self.to_out(media_cross_attention(q, k, v, first, last).flatten(-2))


class GatedCrossAttentionBlock(nn.Module):
    """Gated cross-attention and gated feed-forward, each added to the residual stream.

    Parameters
    ----------
    config : object
        heads, kv_heads, head_dim, ff_mult, activation, media_norm, gate and
        feed_forward_without_media.
    dim, media_dim : int
        Widths of the text and of the media.

    Raises
    ------
    ValueError
        If ``config.gate`` is neither ``scalar`` nor ``vector``.
    """

    def __init__(self, config: Any, dim: int, media_dim: int) -> None:
        super().__init__()
        if config.gate not in ("scalar", "vector"):
            raise ValueError(f"gate is {config.gate!r}, not scalar or vector")
        gate_dim = 1 if config.gate == "scalar" else dim
        self.feed_forward_without_media = config.feed_forward_without_media
        self.attn = MediaCrossAttention(config, dim, media_dim)
        self.attn_gate = nn.Parameter(torch.zeros(gate_dim))
        self.ff = feed_forward(dim, config.ff_mult, config.activation)
        self.ff_gate = nn.Parameter(torch.zeros(gate_dim))

    def forward(self, x: Tensor, media: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """Add what the media say, then the feed-forward.

        Parameters
        ----------
        x : Tensor
            ``[B, T, dim]``.
        media : Tensor
            ``[B, I, R, media_dim]``; items in no token's range are never read.
        first, last : Tensor
            Integers ``[B, T]``, the inclusive range of items each token sees.

        Returns
        -------
        Tensor
            ``[B, T, dim]``.
        """
        items = media.shape[1]
        first, last = clip_ranges(first, last, items)
        item = torch.arange(items, device=media.device)
        seen = (first[..., None] <= item) & (item <= last[..., None])  # [B, T, I]
        # An unseen item must not reach the projections: its zero gradient times NaN would be NaN.
        media = torch.where(seen.any(1)[..., None, None], media, 0.0)
        x = gated_residual(x, self.attn(x, media, first, last), self.attn_gate)
        dense = self.ff(x)
        if not self.feed_forward_without_media:
            dense = torch.where(seen.any(-1, keepdim=True), dense, 0.0)
        return gated_residual(x, dense, self.ff_gate)
