"""The arguments of one call, as the operators and the implementations take them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """Checked arguments of ``latent_attention``.

    Attributes
    ----------
    q : Tensor
        [N, L, H, D].
    k_media, v_media : Tensor
        [N, M, Hkv, D].
    k_latents, v_latents : Tensor
        [N, L, Hkv, D].
    lengths : Tensor or None
        Integer [N].
    scale : float
        Score multiplier.
    """

    q: Tensor
    k_media: Tensor
    v_media: Tensor
    k_latents: Tensor
    v_latents: Tensor
    lengths: Tensor | None
    scale: float
