"""RICES: examples whose images are most like the query's (Yang et al. 2022; appendix A.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pool_features(features: Tensor) -> Tensor:
    """Features [N, S, D] of images -> unit vectors fp32 [N, D], the mean over positions."""
    if features.ndim != 3 or features.shape[1] == 0:
        raise ValueError(f"features must be [N, S, D], got shape {tuple(features.shape)}")
    return F.normalize(features.float().mean(1), dim=-1)


def retrieve(support: Tensor, queries: Tensor, shots: int) -> Tensor:
    """Which support images to show for each query, the most similar one last, next to the query.

    Parameters
    ----------
    support, queries : Tensor
        [N, D] and [Q, D]; see :func:`pool_features`. Similarity is their cosine.
    shots : int
        At most N.

    Returns
    -------
    Tensor
        int64 [Q, shots]; of equally similar images the earlier one counts as more similar.

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
    """int64 [orders, count]: random orders of the examples, for ensembles over permutations."""
    if count < 0 or orders < 1:
        raise ValueError(f"orders must be at least 1 and count 0, got {orders} and {count}")
    return torch.stack([torch.randperm(count, generator=generator) for _ in range(orders)])
