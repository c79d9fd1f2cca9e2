from __future__ import annotations

import doctest

import pytest
import torch

from flamingo_kernels.data import prompts, retrieval
from flamingo_kernels.data.prompts import CAPTION, OPEN_FLAMINGO_VQA, VQA, build_prompt


def test_the_papers_prompts() -> None:
    """Figure 8 of the first version, and the zero-shot form of appendix A.2."""
    tokens = {"end_of_chunk_token": "<EOC>", "bos_token": "<BOS>"}
    shots = [{"answer": "A cat."}, {"answer": "Three dogs."}]
    few = build_prompt(CAPTION, shots, {}, **tokens)
    assert few == "<BOS><image>Output: A cat.<EOC><image>Output: Three dogs.<EOC><image>Output:"
    zero = build_prompt(CAPTION, shots, {}, examples_have_images=False, **tokens)
    assert zero == "<BOS>Output: A cat.<EOC>Output: Three dogs.<EOC><image>Output:"
    ours = build_prompt(OPEN_FLAMINGO_VQA, [{"question": "a?", "answer": "b"}], {"question": "c?"})
    assert ours == (
        "<image>Question:a? Short answer:b<|endofchunk|><image>Question:c? Short answer:"
    )
    memes = build_prompt(prompts.HATEFUL_MEMES, [], {"text": 'so "funny" {0}'})
    assert memes == (
        '<image>is an image with written: "so "funny" {0}" on it. Is it hateful? Answer:'
    )
    assert doctest.testmod(prompts).failed == 0


def test_prompt_errors() -> None:
    with pytest.raises(ValueError, match="an example lacks answer; it has question"):
        build_prompt(VQA, [{"question": "?"}], {"question": "?"})
    with pytest.raises(ValueError, match="the query lacks question; it has nothing"):
        build_prompt(VQA, [], {})
    with pytest.raises(ValueError, match="question of the query holds '<image>', which would"):
        build_prompt(VQA, [], {"question": "<image>?"})
    with pytest.raises(ValueError, match=r"answer of example 0 holds '<\|endofchunk\|>'"):
        build_prompt(CAPTION, [{"answer": "<|endofchunk|>"}], {})


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
