"""Inputs of ``latent_attention``, and its formula in stock PyTorch."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from testing.budgets import attention_terms

NAMES = ("dq", "dk_media", "dv_media", "dk_latents", "dv_latents")

shapes = st.fixed_dictionaries(
    {
        "items": st.integers(1, 3),
        "latents": st.sampled_from([1, 4, 17, 64]),
        "features": st.sampled_from([0, 1, 5, 70, 150]),
        "kv_heads": st.integers(1, 3),
        "group": st.sampled_from([1, 2, 3]),
        "head_dim": st.sampled_from([2, 5, 8, 24]),
        "ragged": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


def latent_case(
    dtype: torch.dtype,
    *,
    items: int = 2,
    latents: int = 4,
    features: int = 6,
    kv_heads: int = 2,
    group: int = 1,
    head_dim: int = 8,
    ragged: bool = True,
    nan: bool = True,
    seed: int = 0,
) -> tuple[list[Tensor], Tensor | None]:
    """Draw q, k_media, v_media, k_latents, v_latents in ``dtype``, and lengths int64 [N] or None.

    ``group`` query heads read each key/value head. The last of several lengths is 0. With ``nan``,
    features past the lengths hold NaN.
    """
    torch.manual_seed(seed)
    q = torch.randn(items, latents, kv_heads * group, head_dim)
    k_latents, v_latents = torch.randn(2, items, latents, kv_heads, head_dim)
    k_media, v_media = torch.randn(2, items, features, kv_heads, head_dim)
    lengths = torch.randint(0, features + 1, (items,)) if ragged else None
    if ragged and items > 1:
        lengths[-1] = 0
    if ragged and nan:
        padding = torch.arange(features) >= lengths[:, None]
        k_media[padding] = v_media[padding] = float("nan")
    return [t.to(dtype) for t in (q, k_media, v_media, k_latents, v_latents)], lengths


def plain_pytorch(tensors: list[Tensor], lengths: Tensor | None) -> Tensor:
    """Compute the textbook formula in the dtype of the tensors, on finite inputs."""
    q, k_media, v_media, k_latents, v_latents = (t.nan_to_num() for t in tensors)
    group = q.shape[2] // k_media.shape[2]
    k, v = (
        torch.cat(parts, 1).repeat_interleave(group, 2)
        for parts in ((k_media, k_latents), (v_media, v_latents))
    )
    scores = torch.einsum("nlhd,nkhd->nhlk", q, k) * q.shape[-1] ** -0.5
    if lengths is not None:
        key = torch.arange(k.shape[1])
        hidden = (key >= lengths[:, None]) & (key < k_media.shape[1])
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    return torch.einsum("nhlk,nkhd->nlhd", scores.softmax(-1), v)


def case_terms(tensors: list[Tensor], seed: Tensor | None = None) -> dict[str, float]:
    """Return the largest summed terms, see :func:`testing.budgets.attention_terms`."""
    q, k_media, v_media, k_latents, v_latents = tensors
    k, v = torch.cat((k_media, k_latents), 1), torch.cat((v_media, v_latents), 1)
    return attention_terms(q, k, v, q.shape[-1] ** -0.5, seed)


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors as fp64 leaves."""
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
