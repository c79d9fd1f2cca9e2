from __future__ import annotations

import pytest
import torch

from flamingo_kernels.model.scoring import score_over_orders
from testing.budgets import assert_close_to_reference
from testing.tiny_model import TINY, make_model, ragged_batch

ANSWERS = [[7], [8, 9, 10], [11, 12]]


def by_hand(model, arguments, answer: list[int]) -> torch.Tensor:
    """log P(answer | prompt), the whole sequence in one forward."""
    ids = arguments["input_ids"]
    whole = torch.cat((ids, torch.tensor([answer])), 1)
    with torch.no_grad():
        logits = model(whole, arguments["pixel_values"]).logits[0]
    chances = logits.log_softmax(-1)
    first = ids.shape[1] - 1
    return sum(chances[first + i, token] for i, token in enumerate(answer))


@pytest.mark.parametrize("normalise", [False, True])
def test_scores_of_a_ragged_batch(normalise: bool) -> None:
    model, batch = make_model(), ragged_batch("left")
    scores = model.score_answers(answers=ANSWERS, normalise=normalise, **batch.arguments())
    assert scores.shape == (3, 3)
    for row in range(3):
        for number, answer in enumerate(ANSWERS):
            expected = by_hand(model, batch.alone(row), answer)
            expected = expected / len(answer) if normalise else expected
            assert_close_to_reference(scores[row, number], expected, torch.float32)


def test_a_support_set_read_once_is_left_as_it_is() -> None:
    model, batch = make_model(), ragged_batch("left")
    with torch.no_grad():
        cache = model(**batch.arguments(), use_cache=True).cache
    query = torch.randint(0, 256, (3, 4))
    query[:, 0] = TINY.image_token_id
    pixels = torch.randn(3, 1, 1, 3, 32, 32)
    first = model.score_answers(query, ANSWERS, pixels, cache=cache)
    assert torch.equal(model.score_answers(query, ANSWERS, pixels, cache=cache), first)
    alone = batch.alone(2)
    whole = {
        "input_ids": torch.cat((alone["input_ids"], query[2:]), 1),
        "pixel_values": torch.cat((alone["pixel_values"], pixels[2:]), 1),
    }
    for number, answer in enumerate(ANSWERS):
        expected = by_hand(model, whole, answer)
        assert_close_to_reference(first[2, number], expected, torch.float32)


@pytest.mark.parametrize("at_once", [1, 2])
def test_answers_in_parts(at_once: int) -> None:
    """No more copies of the prompts than asked for, and the same scores."""
    model, batch = make_model(), ragged_batch("left")
    expected = model.score_answers(answers=ANSWERS, **batch.arguments())
    rows = []
    model.language_model.blocks[0].register_forward_hook(lambda m, i, o: rows.append(len(i[0])))
    scores = model.score_answers(answers=ANSWERS, answers_at_once=at_once, **batch.arguments())
    assert_close_to_reference(scores, expected, torch.float32)
    assert max(rows) == 3 * at_once
    with pytest.raises(ValueError, match="answers_at_once must be an int of at least 1, got 0"):
        model.score_answers(torch.tensor([[1]]), ANSWERS, answers_at_once=0)


def test_ensembles_over_orders() -> None:
    orders = torch.tensor([[0, 1], [1, 0]])
    scores = {(0, 1): torch.tensor([1.0, 2.0]), (1, 0): torch.tensor([3.0, 6.0])}
    assert score_over_orders(lambda o: scores[tuple(o)], orders).tolist() == [2.0, 4.0]


def test_errors() -> None:
    model, ids = make_model(), torch.tensor([[1, 2]])
    for answers, message in (
        ([], "no answers to score"),
        ([[1], []], "answer 1 has no tokens"),
        ([[TINY.image_token_id]], "answer 0 has an <image> token"),
    ):
        with pytest.raises(ValueError, match=message):
            model.score_answers(ids, answers)
    with pytest.raises(ValueError, match="row 0 ends in padding; pad prompts on the left"):
        model.score_answers(answers=[[1]], **ragged_batch("right").arguments())
