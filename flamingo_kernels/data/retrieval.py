"""RICES: retrieve the examples whose images are most similar (Yang et al. 2022; appendix A.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pool_features(features: Tensor) -> Tensor:
    """Return the mean over positions of features [N, S, D], as unit vectors fp32 [N, D]."""
    if features.ndim != 3 or features.shape[1] == 0:
        raise ValueError(f"features must be [N, S, D], got shape {tuple(features.shape)}")
    return F.normalize(features.float().mean(1), dim=-1)


def retrieve(support: Tensor, queries: Tensor, shots: int) -> Tensor:
    """Return which support images to show for each query, by cosine similarity.

    Parameters
    ----------
    support, queries : Tensor
        [N, D] and [Q, D]; see :func:`pool_features`.
    shots : int
        Images per query, at most N.

    Returns
    -------
    Tensor
        int64 [Q, shots]. The most similar image is last, next to the query. If two are equally
        similar, the earlier one counts as more similar.

    Raises
    ------
    ValueError
        Widths differ, there are fewer than ``shots`` support images, or a vector is not finite.
    """
    if support.ndim != 2 or queries.ndim != 2 or support.shape[1] != queries.shape[1]:
        raise ValueError(
            "support and queries must be [N, D] and [Q, D], got "
            f"{tuple(support.shape)} and {tuple(queries.shape)}"
        )
    if not 0 <= shots <= len(support):
        raise ValueError(f"shots must be in 0..{len(support)}, got {shots}")
    for name, vectors in (("support", support), ("queries", queries)):
        wrong = (~vectors.isfinite()).any(1).nonzero()
        if len(wrong):
            raise ValueError(f"{name} has NaN or infinity in row {int(wrong[0])}")
    similarity = F.normalize(queries.float(), dim=-1) @ F.normalize(support.float(), dim=-1).T
    order = similarity.argsort(dim=-1, descending=True, stable=True)
    return order[:, :shots].flip(-1)


def random_orders(count: int, orders: int, generator: torch.Generator | None = None) -> Tensor:
    """Return random orders of the examples, int64 [orders, count], for ensembles over them."""
    if count < 0 or orders < 1:
        raise ValueError(f"orders must be at least 1 and count 0, got {orders} and {count}")
    return torch.stack([torch.randperm(count, generator=generator) for _ in range(orders)])
