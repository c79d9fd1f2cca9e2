"""The two attention ops, one visible set of keys at a time.

B rows, T text tokens, S keys, I media slots, R latents per item, H heads, Hkv key/value heads,
D head dim, N flattened media items, L latent queries, M media keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pointwise import working_dtype
from .spans import clip_ranges


def softmax(scores: Tensor, visible: Tensor | None = None) -> Tensor:
    """Softmax over the last dimension; a row in which nothing is visible gives exact zeros.

    Parameters
    ----------
    scores : Tensor
        ``[..., K]``, fp32 or fp64.
    visible : Tensor, optional
        Boolean, broadcastable to ``scores``; False removes the key.
    """
    if visible is not None:
        scores = torch.where(visible, scores, -torch.inf)
    highest = scores.detach().amax(-1, keepdim=True)
    # A row without visible keys has a maximum of -inf, and -inf - -inf would be NaN.
    highest = torch.where(torch.isfinite(highest), highest, 0.0)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Plain attention of q ``[Q, H, D]`` on k, v ``[K, Hkv, D]``, in the working dtype."""
    dtype = working_dtype(q)
    group = q.shape[1] // k.shape[1]  # query heads that share one key/value head
    k = k.to(dtype).repeat_interleave(group, dim=1)
    v = v.to(dtype).repeat_interleave(group, dim=1)
    scores = scale * torch.einsum("qhd,khd->hqk", q.to(dtype), k)
    return torch.einsum("hqk,khd->qhd", softmax(scores), v)


def _require_groups(heads: int, kv_heads: int) -> None:
    if heads % kv_heads:
        raise ValueError(f"{kv_heads} key/value heads do not divide {heads} query heads")


def _zeros(shape: tuple[int, ...], *inputs: Tensor | None) -> Tensor:
    """Exact zeros that depend on every input, so that backward gives zeros, never a missing grad.

    The dependence is the sum of an empty slice: it reads no element of any input.
    """
    present = [tensor for tensor in inputs if tensor is not None]
    nothing = sum(tensor.reshape(-1)[:0].to(working_dtype(present[0])).sum() for tensor in present)
    return nothing.expand(shape).clone()


def key_range_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    stop: Tensor,
    gate: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of each token on a range of a flat list of keys.

    Parameters
    ----------
    q : Tensor
        ``[B, T, H, D]``.
    k, v : Tensor
        ``[B, S, Hkv, D]``; Hkv divides H, query head h reads head ``h // (H // Hkv)``.
    start, stop : Tensor
        Integers ``[B, T]``: a token sees keys ``start..stop-1``, clipped to ``[0, S)``; none where
        ``start >= stop``.
    gate : Tensor, optional
        One value; the output is multiplied by ``tanh(gate)``.
    scale : float, optional
        Default ``D ** -0.5``.

    Returns
    -------
    Tensor
        ``[B, T, H, D]`` in the dtype of q; exact zeros, with exactly zero gradients, where the
        range is empty. Keys in no token's range are never read.

    Raises
    ------
    ValueError
        If Hkv does not divide H.
    """
    heads, head_dim = q.shape[2:]
    keys, kv_heads = k.shape[1:3]
    _require_groups(heads, kv_heads)
    scale = head_dim**-0.5 if scale is None else scale

    out = _zeros(tuple(q.shape), q, k, v, gate)
    start, stop = start.clamp(min=0), stop.clamp(max=keys)
    for b in range(q.shape[0]):
        ranges = list(zip(start[b].tolist(), stop[b].tolist(), strict=True))
        for begin, end in sorted(set(ranges)):
            if begin >= end:
                continue
            tokens = [t for t, seen in enumerate(ranges) if seen == (begin, end)]
            attended = _attend(q[b, tokens], k[b, begin:end], v[b, begin:end], scale)
            if gate is not None:
                attended = torch.tanh(gate.to(attended.dtype)) * attended
            out[b, tokens] = attended
    return out.to(q.dtype)


def media_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    last: Tensor,
    gate: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of text tokens on the media items of their range (Flamingo 2.2 and A.1.3).

    Parameters
    ----------
    q : Tensor
        ``[B, T, H, D]``.
    k, v : Tensor
        ``[B, I, R, Hkv, D]``.
    first, last : Tensor
        Integers ``[B, T]``: the inclusive range of items a token sees, clipped to ``[0, I)``;
        empty where ``first > last``.
    gate, scale
        See :func:`key_range_attention`.

    Returns
    -------
    Tensor
        As :func:`key_range_attention` of the items' keys end to end.

    Raises
    ------
    ValueError
        If Hkv does not divide H.
    """
    items, latents = k.shape[1:3]
    first, last = clip_ranges(first, last, items)
    start, stop = first * latents, (last + 1) * latents
    return key_range_attention(q, k.flatten(1, 2), v.flatten(1, 2), start, stop, gate, scale)


def latent_attention(
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of the latents on [media; latents] (Flamingo Fig. 5), one item at a time.

    Parameters
    ----------
    q : Tensor
        ``[N, L, H, D]``.
    k_media, v_media : Tensor
        ``[N, M, Hkv, D]``; Hkv divides H, query head h reads head ``h // (H // Hkv)``.
    k_latents, v_latents : Tensor
        ``[N, L, Hkv, D]``.
    lengths : Tensor, optional
        Integers ``[N]``, the valid media keys of each item (default M); later keys are never read.
    scale : float, optional
        Default ``D ** -0.5``.

    Returns
    -------
    Tensor
        ``[N, L, H, D]`` in the dtype of q.

    Raises
    ------
    ValueError
        If a length is outside ``[0, M]``, or Hkv does not divide H.
    """
    count, media_keys, kv_heads = k_media.shape[:3]
    _require_groups(q.shape[2], kv_heads)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    valid = [media_keys] * count if lengths is None else lengths.tolist()

    out = _zeros(tuple(q.shape), q, k_media, v_media, k_latents, v_latents)
    for n, length in enumerate(valid):
        if not 0 <= length <= media_keys:
            raise ValueError(f"lengths[{n}] is {length}, outside [0, {media_keys}]")
        keys = torch.cat([k_media[n, :length], k_latents[n]])
        values = torch.cat([v_media[n, :length], v_latents[n]])
        out[n] = _attend(q[n], keys, values, scale)
    return out.to(q.dtype)
