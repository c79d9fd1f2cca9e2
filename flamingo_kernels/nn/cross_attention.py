"""The gated cross-attention dense block (Flamingo, section 2.2 and figure 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from flamingo_kernels.nn.layers import FeedForward, LayerNorm, RMSNorm, build_norm, project_normed
from flamingo_kernels.ops import KeyRanges, MediaSpans, gated_residual, media_cross_attention
from flamingo_kernels.ops.dispatch import check_kernel_name
from flamingo_kernels.ops.spans import ATTEND_MODES

GATES = ("scalar", "vector")
RMS_NORM_EPS = 1e-6


class MediaKeyValue(NamedTuple):
    """Keys and values for one layer: of media slots, [B, I, R, Hkv, D], or flat, [B, S, Hkv, D]."""

    key: Tensor
    value: Tensor


class MaskedCrossAttention(nn.Module):
    """Pre-norm cross-attention of text [B, T, dim] to media latents, before gate and residual."""

    def __init__(
        self,
        dim: int,
        dim_visual: int,
        dim_head: int = 64,
        heads: int = 8,
        *,
        kv_heads: int | None = None,
        media_norm: bool = False,
        rms_norm_eps: float | None = None,
        qk_norm: bool = False,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        inner = dim_head * heads
        self.heads = heads
        self.kv_heads = kv_heads or heads
        self.kernel = kernel
        self.norm = build_norm(dim, kernel, rms_norm_eps)
        self.norm_q = RMSNorm(dim_head, rms_norm_eps or RMS_NORM_EPS) if qk_norm else None
        self.norm_k = RMSNorm(dim_head, rms_norm_eps or RMS_NORM_EPS) if qk_norm else None
        self.norm_media = LayerNorm(dim_visual, kernel) if media_norm else None
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim_visual, 2 * dim_head * self.kv_heads, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def project_media(self, media: Tensor) -> MediaKeyValue:
        """Project media latents [..., dim_visual] to keys and values, views of one product."""
        if self.norm_media is not None:
            media = self.norm_media(media)
        key_value = self.to_kv(media).unflatten(-1, (2, self.kv_heads, -1))
        key, value = key_value.unbind(-3)
        return MediaKeyValue(key if self.norm_k is None else self.norm_k(key), value)

    def forward(
        self, x: Tensor, media_kv: MediaKeyValue, spans: MediaSpans, gate: Tensor | None = None
    ) -> Tensor:
        q = project_normed(self.norm, self.to_q, x).unflatten(-1, (self.heads, -1))
        if self.norm_q is not None:
            q = self.norm_q(q)
        out = media_cross_attention(
            q, media_kv.key, media_kv.value, spans, gate, kernel=self.kernel
        )
        return self.to_out(out.flatten(-2))


class GatedCrossAttentionBlock(nn.Module):
    """Gated cross-attention and gated feed-forward, to be run before a frozen LM block.

    Computes ``x + tanh(attn_gate) * attn(x, media)``, then ``x + tanh(ff_gate) * ff(x)``. Both
    gates start at 0, where the output equals ``x`` bit for bit. Arguments before ``*`` and
    state-dict names are those of OpenFlamingo's module of this name.

    Parameters
    ----------
    dim, dim_visual : int
        Widths of the text and of the media latents.
    dim_head, heads, ff_mult : int
        Head width, number of heads, and hidden over model width of the feed-forward.
    only_attend_immediate_media : bool
        True is attend mode ``"last"``, False ``"previous"``; only ``media_locations`` uses it.
        Unlike in OpenFlamingo, tokens before the first image see nothing in either mode.
    attend : {"last", "last_group", "previous"}, optional
        Overrides ``only_attend_immediate_media``.
    kv_heads : int, optional
        Number of key/value heads, which divides ``heads``; each is that of as many query heads.
        Default: ``heads``.
    media_norm : bool
        LayerNorm on the media before keys and values (paper v1, section 3.1.2).
    gate : {"scalar", "vector"}
        One gate value per layer, or one per channel.
    activation : {"gelu", "squared_relu", "relu", "swiglu", "geglu", "reglu"}
        Feed-forward activation.
    ff_dim : int, optional
        Hidden width of the feed-forward, in place of ``ff_mult``.
    rms_norm_eps : float, optional
        RMSNorm with this eps in place of LayerNorm on text and feed-forward input (IDEFICS).
    qk_norm : bool
        RMSNorm on each head's queries and keys (IDEFICS).
    feed_forward_without_media : bool
        Run the gated feed-forward also on tokens that see no media (paper, OpenFlamingo, IDEFICS).
        False leaves such tokens unchanged (Llama-3.2-Vision).
    kernel : {"auto", "triton", "cpp", "torch"}
        Kernel of every op inside.
    """

    def __init__(
        self,
        dim: int,
        dim_visual: int,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        only_attend_immediate_media: bool = True,
        *,
        kv_heads: int | None = None,
        attend: str | None = None,
        media_norm: bool = False,
        gate: str = "scalar",
        activation: str = "gelu",
        ff_dim: int | None = None,
        rms_norm_eps: float | None = None,
        qk_norm: bool = False,
        feed_forward_without_media: bool = True,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        check_kernel_name(kernel)
        for name, size in (("dim_head", dim_head), ("heads", heads), ("ff_mult", ff_mult)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
            raise ValueError(f"kv_heads must divide heads={heads}, got {kv_heads}")
        if gate not in GATES:
            raise ValueError(f"unknown gate {gate!r}; known: {', '.join(GATES)}")
        self.attend = attend or ("last" if only_attend_immediate_media else "previous")
        if self.attend not in ATTEND_MODES:
            raise ValueError(f"unknown attend mode {attend!r}; known: {', '.join(ATTEND_MODES)}")
        self.feed_forward_without_media = feed_forward_without_media
        self.scalar_gate = gate == "scalar"
        self.kernel = kernel
        gate_size = 1 if self.scalar_gate else dim
        self.attn = MaskedCrossAttention(
            dim,
            dim_visual,
            dim_head,
            heads,
            kv_heads=kv_heads,
            media_norm=media_norm,
            rms_norm_eps=rms_norm_eps,
            qk_norm=qk_norm,
            kernel=kernel,
        )
        self.attn_gate = nn.Parameter(torch.zeros(gate_size))
        self.ff = FeedForward(
            dim, ff_mult, activation, kernel, hidden=ff_dim, rms_norm_eps=rms_norm_eps
        )
        self.ff_gate = nn.Parameter(torch.zeros(gate_size))

    def project_media(self, media: Tensor) -> MediaKeyValue:
        """Project media latents to keys and values for many decoding steps.

        Latents are [B, I, R, dim_visual], or [B, S, dim_visual] for ``KeyRanges``. Padded slots
        must hold finite values here, because they enter the weight gradient.
        """
        return self.attn.project_media(media)

    def forward(
        self,
        x: Tensor,
        media: Tensor | None = None,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
        *,
        spans: MediaSpans | KeyRanges | None = None,
        media_kv: MediaKeyValue | None = None,
    ) -> Tensor:
        """Attend to the media and run the feed-forward.

        Media are given as ``media_kv`` or, as in OpenFlamingo, as ``media``. What each token sees
        is given as ``spans`` or, as in OpenFlamingo, as ``media_locations``.

        Parameters
        ----------
        x : Tensor
            Text hidden states [B, T, dim].
        media : Tensor, optional
            Media latents [B, I, R, dim_visual], or with ``KeyRanges`` [B, S, dim_visual]. What no
            token sees may hold NaN.
        media_locations : Tensor, optional
            bool [B, T], True at ``<image>`` tokens. Without it and without ``spans`` every token
            sees all media, as in OpenFlamingo.
        use_cached_media : bool
            Every token of ``x`` sees what the last position of ``media_locations`` sees, whatever
            the number of its tokens (OpenFlamingo's decoding).
        spans : MediaSpans or KeyRanges, optional
            The media slots, or the latents, that each token sees, in place of ``media_locations``.
        media_kv : MediaKeyValue, optional
            ``project_media(media)``, in place of ``media``.

        Returns
        -------
        Tensor
            [B, T, dim].

        Raises
        ------
        ValueError
            Both or neither of ``media`` and ``media_kv``, both of ``spans`` and
            ``media_locations``, or shapes that do not fit.
        TypeError
            ``spans`` are neither ``MediaSpans`` nor ``KeyRanges``.
        """
        if (media is None) == (media_kv is None):
            raise ValueError("give exactly one of media and media_kv")
        if media is not None:
            self._check_media(x, media, "S" if isinstance(spans, KeyRanges) else "I, R")
        if isinstance(spans, KeyRanges):  # a slot for each latent
            if media is not None:
                media = media.unsqueeze(2)
            if media_kv is not None:
                media_kv = MediaKeyValue(*(each.unsqueeze(2) for each in media_kv))
            spans = spans.spans
        if spans is None:
            slots = (media_kv.key if media is None else media).shape[1]
            spans = self._open_flamingo_spans(x, slots, media_locations, use_cached_media)
        elif not isinstance(spans, MediaSpans):
            raise TypeError(f"spans must be MediaSpans or KeyRanges, got {type(spans).__name__}")
        elif media_locations is not None:
            raise ValueError("give at most one of spans and media_locations")
        if media_kv is None:
            seen = spans.seen(media.shape[1])
            media_kv = self.project_media(media.masked_fill(~seen[:, :, None, None], 0))
        return self._attend_and_feed_forward(x, media_kv, spans)

    def _attend_and_feed_forward(
        self, x: Tensor, media_kv: MediaKeyValue, spans: MediaSpans
    ) -> Tensor:
        if self.scalar_gate:
            x = x + self.attn(x, media_kv, spans, gate=self.attn_gate)
            update = self.ff(x, gate=self.ff_gate)
        else:
            attended = self.attn(x, media_kv, spans)
            x = gated_residual(x, attended, self.attn_gate, kernel=self.kernel)
            update = self.ff(x)
        if not self.feed_forward_without_media:
            sees_any = spans.sees_any(media_kv.key.shape[1])
            update = update.masked_fill(~sees_any[..., None], 0)
        if self.scalar_gate:
            return x + update
        return gated_residual(x, update, self.ff_gate, kernel=self.kernel)

    def _check_media(self, x: Tensor, media: Tensor, slots: str) -> None:
        width, ndim = self.attn.to_kv.in_features, 3 + slots.count(",")
        if media.ndim != ndim or media.shape[0] != x.shape[0] or media.shape[-1] != width:
            raise ValueError(
                f"media must be [B, {slots}, dim_visual] = [{x.shape[0]}, {slots}, {width}], got "
                f"{tuple(media.shape)}"
            )
        if media.device != x.device:
            raise ValueError(f"media is on {media.device}, x on {x.device}")

    def _open_flamingo_spans(
        self, x: Tensor, slots: int, media_locations: Tensor | None, use_cached_media: bool
    ) -> MediaSpans:
        """Return the spans that OpenFlamingo's arguments of :meth:`forward` describe."""
        tokens = x.shape[1]
        if media_locations is None:
            return MediaSpans.everything(x.shape[0], tokens, slots, x.device)
        spans = MediaSpans.from_media_locations(media_locations, self.attend)
        if media_locations.shape[0] != x.shape[0] or (use_cached_media and spans.shape[1] == 0):
            raise ValueError(
                f"media_locations has shape {tuple(media_locations.shape)}, x has {x.shape[0]} rows"
            )
        if use_cached_media:
            last = spans.newest(1)
            return MediaSpans(
                last.first.expand(-1, tokens), last.last.expand(-1, tokens), last.single_item
            )
        if media_locations.shape[1] != tokens:
            raise ValueError(
                f"media_locations has {media_locations.shape[1]} tokens, x has {tokens}; for a "
                "decoding step pass use_cached_media=True"
            )
        return spans
