"""Ranges of hand-written token rows, in all modes."""

from __future__ import annotations

import pytest
import torch

from reference import media_spans

IMAGE = 9
# One character per token: a text token is ".", an image "I", no range "-".
# Ranges are "0" for one item and "0:2" for several.
CASES = [
    ("last", "previous", ". I . . I .", "- 0 0 0 1 1"),
    ("last", "previous", "I I . I .", "0 1 1 2 2"),
    ("last", "previous", ". . .", "- - -"),
    ("last", "next", ". I . . I .", "0 0 1 1 1 -"),
    ("last", "next", ". I I . I .", "0 0 1 2 2 -"),
    ("last", "next", ". . .", "- - -"),
    ("last_group", "previous", ". I . . I .", "- 0 0 0 1 1"),
    ("last_group", "previous", "I I . I I I .", "0 0:1 0:1 2 2:3 2:4 2:4"),
    ("last_group", "next", ". I I . I I .", "0:1 0 0:1 2:3 2 2:3 -"),
    ("previous", "previous", ". I . . I I .", "- 0 0 0 0:1 0:2 0:2"),
    ("previous", "next", ". I . I .", "0 0 0:1 0:1 -"),
]


def parse(ranges: str) -> tuple[list[int], list[int]]:
    pairs = []
    for entry in ranges.split():
        start, _, end = entry.partition(":")
        pairs.append((0, -1) if entry == "-" else (int(start), int(end or start)))
    first, last = zip(*pairs, strict=True)
    return list(first), list(last)


@pytest.mark.parametrize(("attend", "assign", "tokens", "ranges"), CASES)
def test_table(attend, assign, tokens, ranges):
    input_ids = torch.tensor([[IMAGE if token == "I" else 5 for token in tokens.split()]])
    first, last = media_spans(input_ids, IMAGE, attend, assign)
    assert (first[0].tolist(), last[0].tolist()) == parse(ranges)


@pytest.mark.parametrize("assign", ["previous", "next"])
@pytest.mark.parametrize("attend", ["last", "last_group", "previous"])
def test_left_and_right_padding_agree(attend, assign):
    row = [5, IMAGE, IMAGE, 5, IMAGE, 5]
    input_ids = torch.tensor([[0, 0, *row], [*row, 0, 0]])
    first, last = media_spans(input_ids, IMAGE, attend, assign)
    assert torch.equal(first[0, 2:], first[1, :-2])
    assert torch.equal(last[0, 2:], last[1, :-2])


def test_rows_are_independent_and_int32():
    input_ids = torch.tensor([[IMAGE, 5, IMAGE], [5, IMAGE, 5]])
    first, last = media_spans(input_ids, IMAGE)
    assert first.dtype == last.dtype == torch.int32
    assert first.tolist() == [[0, 0, 1], [0, 0, 0]]
    assert last.tolist() == [[0, 0, 1], [-1, 0, 0]]


def test_no_tokens():
    first, last = media_spans(torch.zeros(2, 0, dtype=torch.long), IMAGE)
    assert first.shape == last.shape == (2, 0)


def test_unknown_modes():
    with pytest.raises(ValueError, match="attend is 'all', not last, last_group or previous"):
        media_spans(torch.tensor([[1]]), IMAGE, "all")
    with pytest.raises(ValueError, match="assign is 'both', not previous or next"):
        media_spans(torch.tensor([[1]]), IMAGE, assign="both")
