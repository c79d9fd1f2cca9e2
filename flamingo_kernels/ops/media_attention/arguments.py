"""The arguments of one call, as the operators and the implementations take them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """Checked arguments of ``media_cross_attention``.

    Attributes
    ----------
    q : Tensor
        [B, T, H, D].
    k, v : Tensor
        [B, I, R, Hkv, D].
    first, last : Tensor
        int32 [B, T].
    gate : Tensor or None
        One value in the dtype of accumulation.
    scale : float
        Score multiplier.
    single_item : bool
        No range holds more than one item.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    first: Tensor
    last: Tensor
    gate: Tensor | None
    scale: float
    single_item: bool
