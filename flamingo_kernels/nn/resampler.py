"""The Perceiver Resampler (Flamingo, section 2.1 and figure 5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_kernels.bare_modules import is_plain_product
from flamingo_kernels.nn.layers import (
    LAYER_NORM_EPS,
    FeedForward,
    LayerNorm,
    require_sizes,
)
from flamingo_kernels.ops import checks, latent_attention, layer_norm
from flamingo_kernels.ops.dispatch import check_kernel_name
from flamingo_kernels.precision import accumulator


class PerceiverAttention(nn.Module):
    """Latents [N, L, dim] attend to features [N, M, dim] and to themselves.

    Every layer normalises the same features and applies its own scale and bias. The resampler
    therefore normalises once, and ``forward`` takes the result too. The submodule ``norm_media``
    holds only this layer's scale and bias, under OpenFlamingo's name. It is called where calling it
    does more: where it is hooked, adapted or replaced.
    """

    def __init__(
        self,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        *,
        qk_norm: bool = False,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        inner = dim_head * heads
        self.heads = heads
        self.kernel = kernel
        self.norm_media = LayerNorm(dim, kernel)
        self.norm_latents = LayerNorm(dim, kernel)
        self.norm_q = LayerNorm(dim_head, kernel) if qk_norm else nn.Identity()
        self.norm_k = LayerNorm(dim_head, kernel) if qk_norm else nn.Identity()
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(
        self, features: Tensor, normed: Tensor, latents: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        latents = self.norm_latents(latents)
        q = self.norm_q(self.to_q(latents).unflatten(-1, (self.heads, -1)))
        k_media, v_media = self._key_value(self._project_features(features, normed))
        k_latents, v_latents = self._key_value(self.to_kv(latents))
        out = latent_attention(
            q, k_media, v_media, k_latents, v_latents, lengths, kernel=self.kernel
        )
        return self.to_out(out.flatten(-2))

    def _project_features(self, features: Tensor, normed: Tensor) -> Tensor:
        """Return ``to_kv(normed * weight + bias)``, with the scale applied to ``to_kv`` instead."""
        norm, linear = self.norm_media, self.to_kv
        if not (isinstance(norm, LayerNorm) and norm.is_plain()):
            return linear(norm(features))
        if not is_plain_product(linear):
            return linear(normed * norm.weight + norm.bias)
        shift = F.linear(norm.bias, linear.weight)
        return F.linear(normed, linear.weight * norm.weight, shift)

    def _key_value(self, projected: Tensor) -> tuple[Tensor, ...]:
        key, value = projected.unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return self.norm_k(key), value


class PerceiverResampler(nn.Module):
    """Turns the features of each image or clip into a fixed number of latents.

    Constructor arguments before ``*`` and state-dict names are those of OpenFlamingo's module of
    this name.

    The features are normalised once, with the epsilon ``eps`` of the resampler, because all layers
    share that step; the ``norm_media`` of each layer supplies its scale and bias only.

    Parameters
    ----------
    dim : int
        Width of features and latents.
    depth, dim_head, heads, num_latents, ff_mult : int
        Layers, head width, heads, latents per media item, hidden over model width.
    max_num_media : int, optional
        Size of a learned embedding of the media slot. None: no such embedding.
    max_num_frames : int, optional
        Size n of the learned temporal embedding. Frame f of F gets the linearly interpolated
        position ``f (n-1) / (F-1)`` (appendix B.1.2): position f for F = n, and position 0 for an
        image, F = 1. None: no temporal embedding.
    input_dim : int, optional
        Width of the features if it is not ``dim``; adds a projection to ``dim``.
    activation : {"gelu", "squared_relu", "relu"}
        Feed-forward activation.
    qk_norm : bool
        LayerNorm on each head's queries and keys (IDEFICS).
    final_norm : bool
        LayerNorm after the last layer. OpenFlamingo has it, the paper's pseudo-code does not.
    kernel : {"auto", "triton", "cpp", "torch"}
        Kernel of every op inside.

    Attributes
    ----------
    eps : float
        Added to the variance of the features.
    """

    def __init__(
        self,
        dim: int,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 8,
        num_latents: int = 64,
        max_num_media: int | None = None,
        max_num_frames: int | None = None,
        ff_mult: int = 4,
        *,
        input_dim: int | None = None,
        activation: str = "gelu",
        qk_norm: bool = False,
        final_norm: bool = True,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        check_kernel_name(kernel)
        self.kernel = kernel
        self.eps = LAYER_NORM_EPS
        optional = {
            "max_num_media": max_num_media,
            "max_num_frames": max_num_frames,
            "input_dim": input_dim,
        }
        require_sizes(
            dim=dim,
            depth=depth,
            dim_head=dim_head,
            heads=heads,
            num_latents=num_latents,
            **{name: size for name, size in optional.items() if size is not None},
        )
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frame_embs = nn.Parameter(torch.randn(max_num_frames, dim)) if max_num_frames else None
        self.media_time_embs = (
            nn.Parameter(torch.randn(max_num_media, 1, dim)) if max_num_media else None
        )
        self.input_projection = nn.Linear(input_dim, dim, bias=False) if input_dim else None
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(dim, dim_head, heads, qk_norm=qk_norm, kernel=kernel),
                    FeedForward(dim, ff_mult, activation, kernel),
                ]
            )
            for _ in range(depth)
        )
        self.norm = LayerNorm(dim, kernel) if final_norm else None

    def forward(self, x: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Resample features to latents.

        Parameters
        ----------
        x : Tensor
            Features [B, I, F, S, D_in]: S spatial positions of each of F frames of I media items.
        num_frames : Tensor, optional
            Integer [B, I], the real frames of each item, 1..F. The others are never read and may
            hold NaN. The values are checked on the CPU only, because elsewhere the check would
            wait for the device.

        Returns
        -------
        Tensor
            Latents [B, I, R, dim].

        Raises
        ------
        TypeError, ValueError
            Wrong type, rank or shape, no frames, frame counts outside 1..F, or more media items
            than ``max_num_media``.
        """
        op = "PerceiverResampler"
        checks.require_rank(op, "features", x, "[B, I, F, S, D]")
        batch, media, frames, positions, _ = x.shape
        if frames == 0:
            raise ValueError(f"{op}: features have no frames: shape {tuple(x.shape)}")
        lengths = None
        if num_frames is not None:
            checks.require_counts(op, "num_frames", num_frames, (batch, media), x)
            checks.require_within(op, "num_frames", num_frames, 1, frames)
            real = torch.arange(frames, device=x.device) < num_frames[..., None]
            x = x.masked_fill(~real[..., None, None], 0)
            lengths = (num_frames.long() * positions).flatten()
        if self.input_projection is not None:
            x = self.input_projection(x)
        if self.frame_embs is not None:
            x = x + _temporal_embedding(self.frame_embs, frames, num_frames).to(x.dtype)
        x = x.flatten(2, 3)  # [B, I, F*S, dim]
        if self.media_time_embs is not None:
            if media > len(self.media_time_embs):
                raise ValueError(
                    f"{media} media items, but max_num_media is {len(self.media_time_embs)}"
                )
            x = x + self.media_time_embs[:media].to(x.dtype)
        x = x.flatten(0, 1)  # [N, F*S, dim]
        normed = layer_norm(x, None, None, self.eps, kernel=self.kernel)
        latents = self.latents.expand(x.shape[0], -1, -1)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            attention, feed_forward = layer
            latents = latents + attention(x, normed, latents, lengths)
            latents = latents + feed_forward(latents)
        if self.norm is not None:
            latents = self.norm(latents)
        return latents.unflatten(0, (batch, media))


def _temporal_embedding(table: Tensor, frames: int, num_frames: Tensor | None) -> Tensor:
    """Return [F, 1, dim], or [B, I, F, 1, dim] if items differ in length."""
    last = table.shape[0] - 1
    precision = accumulator(table.dtype)
    frame = torch.arange(frames, device=table.device, dtype=precision)
    intervals: int | Tensor = max(frames - 1, 1)
    if num_frames is not None:
        intervals = (num_frames[..., None] - 1).clamp(min=1)
    # Frames past the end of an item are masked; the clamp keeps their index valid.
    position = (frame * last / intervals).clamp(max=last)
    below = position.floor()
    fraction = (position - below).to(table.dtype)[..., None]
    below = below.long()
    above = (below + 1).clamp(max=last)
    return torch.lerp(table[below], table[above], fraction)[..., None, :]
