"""Chinchilla-style decoder: RMSNorm, rotary positions, GELU, tied embedding, no biases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .attention import softmax
from .layers import Activation, RMSNorm, split_heads
from .pointwise import working_dtype


def rotary(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotate pairs ``(i, i + D/2)`` of x ``[B, T, H, D]`` by ``position * theta ** (-2 i / D)``.

    positions is integer ``[B, T]``.
    """
    dtype = working_dtype(x)
    half = x.shape[-1] // 2
    pair = torch.arange(half, dtype=dtype, device=x.device)
    angles = positions[..., None].to(dtype) * theta ** (-pair / half)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    lower, upper = x[..., :half].to(dtype), x[..., half:].to(dtype)
    return torch.cat([lower * cos - upper * sin, upper * cos + lower * sin], -1).to(x.dtype)


def token_positions(attention_mask: Tensor) -> Tensor:
    """Position of each token, counted over the tokens that are not padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


class SelfAttention(nn.Module):
    """Causal self-attention that never looks at padding."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.theta = config.rope_theta
        self.to_q = nn.Linear(config.dim, inner, bias=False)
        self.to_k = nn.Linear(config.dim, inner, bias=False)
        self.to_v = nn.Linear(config.dim, inner, bias=False)
        self.to_out = nn.Linear(inner, config.dim, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        dtype = working_dtype(x)
        positions = token_positions(attention_mask)
        q = rotary(split_heads(self.to_q(x), self.heads), positions, self.theta).to(dtype)
        k = rotary(split_heads(self.to_k(x), self.heads), positions, self.theta).to(dtype)
        v = split_heads(self.to_v(x), self.heads).to(dtype)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        order = torch.arange(x.shape[1], device=x.device)
        causal = order[:, None] >= order[None, :]
        visible = causal & attention_mask.bool()[:, None, None, :]
        out = torch.einsum("bhqk,bkhd->bqhd", softmax(scores, visible), v)
        return self.to_out(out.flatten(-2).to(x.dtype))


class DecoderBlock(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden = config.ff_mult * config.dim
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = SelfAttention(config)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.dim, hidden, bias=False),
            Activation("gelu"),
            nn.Linear(hidden, config.dim, bias=False),
        )

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), attention_mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nn.Module):
    """The language model.

    Parameters
    ----------
    config : object
        vocab_size, dim, depth, heads, head_dim, ff_mult, rope_theta and norm_eps.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.final_norm = RMSNorm(config.dim, config.norm_eps)

    def to_logits(self, x: Tensor) -> Tensor:
        """``[B, T, dim]`` -> ``[B, T, vocab_size]`` through the tied embedding."""
        return self.final_norm(x) @ self.token_embedding.weight.T

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``[B, T, vocab_size]`` of input_ids ``[B, T]``; the mask is 0 at padding."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        x = self.token_embedding(input_ids)
        for block in self.blocks:
            x = block(x, attention_mask)
        return self.to_logits(x)
