"""Perceiver resampler (Flamingo 2.1 and Fig. 5): any number of features to R latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .attention import latent_attention
from .layers import LayerNorm, feed_forward, split_heads


def frame_embedding(table: Tensor, frame: int, frames: int) -> Tensor:
    """Temporal embedding ``[dim]`` of one frame of a clip, interpolated from ``[n, dim]``.

    Frame f of F sits at position ``f * (n - 1) / (F - 1)``: first and last frame take the first
    and last trained embedding (Flamingo B.1.2 interpolates linearly; the endpoints are our choice).
    """
    if frames == 1:
        return table[0]
    # Integers keep the trained positions exact: F = n reads the table unchanged.
    below, remainder = divmod(frame * (table.shape[0] - 1), frames - 1)
    if remainder == 0:
        return table[below]
    fraction = remainder / (frames - 1)
    return (1.0 - fraction) * table[below] + fraction * table[below + 1]


class LatentAttention(nn.Module):
    """Multi-head attention of the latents on [features; latents], with its norms."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_media = LayerNorm(dim)
        self.norm_latents = LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """features ``[N, M, dim]``, latents ``[N, R, dim]`` -> ``[N, R, dim]``."""
        features = self.norm_media(features)
        latents = self.norm_latents(latents)
        q = split_heads(self.to_q(latents), self.heads)
        k_media, v_media = split_heads(self.to_kv(features), 2 * self.heads).chunk(2, dim=-2)
        k_latents, v_latents = split_heads(self.to_kv(latents), 2 * self.heads).chunk(2, dim=-2)
        out = latent_attention(q, k_media, v_media, k_latents, v_latents)
        return self.to_out(out.flatten(-2))


class PerceiverResampler(nn.Module):
    """The resampler, clip by clip.

    Parameters
    ----------
    config : object
        dim, depth, heads, head_dim, num_latents, ff_mult, activation, max_num_frames, final_norm
        and input_dim.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim = config.dim
        self.latents = nn.Parameter(torch.randn(config.num_latents, dim))
        self.frame_embs = None
        if config.max_num_frames:
            self.frame_embs = nn.Parameter(torch.randn(config.max_num_frames, dim))
        self.input_projection = None
        if config.input_dim:
            self.input_projection = nn.Linear(config.input_dim, dim, bias=False)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    LatentAttention(dim, config.heads, config.head_dim),
                    feed_forward(dim, config.ff_mult, config.activation),
                ]
            )
            for _ in range(config.depth)
        )
        self.norm = LayerNorm(dim) if config.final_norm else None

    def forward(self, features: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Resample N clips.

        Parameters
        ----------
        features : Tensor
            ``[N, F, S, input_dim]`` (``dim`` without an input projection).
        num_frames : Tensor, optional
            Integers ``[N]``, the frames that count (default F); the others are never read.

        Returns
        -------
        Tensor
            ``[N, R, dim]``.

        Raises
        ------
        ValueError
            If a frame count is outside ``[1, F]``.
        """
        count, frames = features.shape[:2]
        lengths = [frames] * count if num_frames is None else num_frames.tolist()
        out = [self.latents.new_zeros((0, *self.latents.shape))]
        for n, length in enumerate(lengths):
            if not 1 <= length <= frames:
                raise ValueError(f"num_frames[{n}] is {length}, outside [1, {frames}]")
            out.append(self._resample_clip(features[n, :length])[None])
        return torch.cat(out)

    def _resample_clip(self, features: Tensor) -> Tensor:
        """``[F, S, input_dim]`` -> ``[R, dim]``."""
        frames = features.shape[0]
        if self.input_projection is not None:
            features = self.input_projection(features)
        if self.frame_embs is not None:
            times = [frame_embedding(self.frame_embs, f, frames) for f in range(frames)]
            features = features + torch.stack(times)[:, None]
        features = features.flatten(0, 1)[None]
        latents = self.latents[None]
        for attention, ff in self.layers:
            latents = latents + attention(features, latents)
            latents = latents + ff(latents)
        if self.norm is not None:
            latents = self.norm(latents)
        return latents[0]
