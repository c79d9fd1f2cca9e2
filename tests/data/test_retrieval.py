"""Retrieval of similar examples: order, ties, and what is refused."""

from __future__ import annotations

import pytest
import torch

from flamingo_kernels.data import retrieval


def test_retrieval_puts_the_most_similar_last() -> None:
    support = torch.tensor([[1.0, 0.0], [0.0, 5.0], [1.0, 1.0], [-1.0, 0.0]])
    order = retrieval.retrieve(support, torch.tensor([[2.0, 0.1], [0.0, 1.0]]), 3)
    assert order.tolist() == [[1, 2, 0], [0, 2, 1]]
    assert retrieval.retrieve(support, support[:1], 0).shape == (1, 0)
    with pytest.raises(ValueError, match=r"shots must be in 0\.\.4, got 5"):
        retrieval.retrieve(support, support, 5)
    with pytest.raises(ValueError, match=r"got \(4, 2\) and \(1, 3\)"):
        retrieval.retrieve(support, torch.zeros(1, 3), 1)


def test_pooled_features_are_unit_vectors() -> None:
    pooled = retrieval.pool_features(torch.tensor([[[6.0, 0.0], [0.0, 8.0]]]))
    assert torch.allclose(pooled, torch.tensor([[0.6, 0.8]]))
    with pytest.raises(ValueError, match=r"must be \[N, S, D\], got shape \(2, 2\)"):
        retrieval.pool_features(torch.zeros(2, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_ranked(value: float) -> None:
    good, bad = torch.ones(2, 2), torch.tensor([[1.0, 1.0], [0.0, value]])
    with pytest.raises(ValueError, match="support has NaN or infinity in row 1"):
        retrieval.retrieve(bad, good, 1)
    with pytest.raises(ValueError, match="queries has NaN or infinity in row 1"):
        retrieval.retrieve(good, bad, 1)


def test_no_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="orders must be at least 1 and count 0, got 0 and 4"):
        retrieval.random_orders(4, 0)


def test_random_orders_are_permutations() -> None:
    orders = retrieval.random_orders(5, 6, torch.Generator().manual_seed(0))
    assert orders.shape == (6, 5)
    assert (orders.sort(-1).values == torch.arange(5)).all()
    assert len({tuple(order.tolist()) for order in orders}) > 1
