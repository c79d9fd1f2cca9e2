"""The gradient of a projection whose input the backward computes again."""

from __future__ import annotations

from torch import Tensor


def projection_gradient(d_out: Tensor, x: Tensor) -> Tensor:
    """Return the gradient [C', C] of the weight of ``F.linear(x, weight)``.

    Autocast may have run the product in another dtype than that of ``x``.
    """
    return d_out.reshape(-1, d_out.shape[-1]).t() @ x.reshape(-1, x.shape[-1]).to(d_out.dtype)
