"""MediaSpans against the reference's token-by-token loop, and its errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flamingo_kernels.ops import MediaSpans
from flamingo_kernels.ops.spans import ASSIGN_MODES, ATTEND_MODES
from reference.spans import media_spans
from testing.cases import IMAGE

rows = st.integers(1, 14).flatmap(
    lambda tokens: st.lists(
        st.lists(st.sampled_from([0, IMAGE]), min_size=tokens, max_size=tokens),
        min_size=1,
        max_size=3,
    )
)


def ranges(first: torch.Tensor, last: torch.Tensor) -> list[list[tuple[int, int] | None]]:
    return [
        [(f, t) if f <= t else None for f, t in zip(fs, ts, strict=True)]
        for fs, ts in zip(first.tolist(), last.tolist(), strict=True)
    ]


@given(rows, st.sampled_from(ATTEND_MODES), st.sampled_from(ASSIGN_MODES))
def test_equals_reference_loop(ids: list[list[int]], attend: str, assign: str) -> None:
    """Ranges of every attend mode and assignment (semantics, points 1, 2 and 13)."""
    tokens = torch.tensor(ids)
    spans = MediaSpans.from_tokens(tokens, IMAGE, attend, assign)
    assert spans.first.dtype == spans.last.dtype == torch.int32
    assert ranges(spans.first, spans.last) == ranges(*media_spans(tokens, IMAGE, attend, assign))


def test_hand_written_row() -> None:
    ids = torch.tensor([[5, IMAGE, 5, IMAGE, IMAGE, 5, 5]])
    expected = {
        "last": [None, (0, 0), (0, 0), (1, 1), (2, 2), (2, 2), (2, 2)],
        "last_group": [None, (0, 0), (0, 0), (1, 1), (1, 2), (1, 2), (1, 2)],
        "previous": [None, (0, 0), (0, 0), (0, 1), (0, 2), (0, 2), (0, 2)],
    }
    for attend, row in expected.items():
        spans = MediaSpans.from_tokens(ids, IMAGE, attend)
        assert ranges(spans.first, spans.last) == [row], attend


def test_newest_is_the_tail_and_media_index_agrees() -> None:
    ids = torch.tensor([[IMAGE, 1, IMAGE, 1, 1]])
    spans = MediaSpans.from_tokens(ids, IMAGE)
    assert torch.equal(spans.newest(2).last, spans.last[:, 3:])
    with pytest.raises(ValueError, match="5 tokens have no newest 6"):
        spans.newest(6)
    by_index = MediaSpans.from_media_index(torch.tensor([[0, 0, 1, 1, 1]]))
    assert torch.equal(by_index.first, spans.first) and torch.equal(by_index.last, spans.last)


def test_single_item_is_known_without_reading_values() -> None:
    ids = torch.tensor([[IMAGE, IMAGE, 1]])
    assert MediaSpans.from_tokens(ids, IMAGE, "last").single_item
    for attend in ("last_group", "previous"):
        assert not MediaSpans.from_tokens(ids, IMAGE, attend).single_item


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MediaSpans.from_tokens(torch.zeros(3), IMAGE), r"\[B, T\], got shape \(3,\)"),
        (lambda: MediaSpans.from_tokens(torch.zeros(1, 3), IMAGE, "all"), "unknown attend .*'all'"),
        (
            lambda: MediaSpans.from_tokens(torch.zeros(1, 3), IMAGE, "last", "both"),
            "unknown assign mode 'both'; known: previous, next",
        ),
        (
            lambda: MediaSpans.from_media_index(torch.zeros(1, 3).long(), "last_group"),
            "unknown attend mode 'last_group'; known: last, previous",
        ),
        (
            lambda: MediaSpans.from_media_locations(torch.zeros(1, 3)),
            "must be bool",
        ),
        (
            lambda: MediaSpans(torch.zeros(1, 2).int(), torch.zeros(1, 3).int()),
            r"\(1, 2\) and \(1, 3\)",
        ),
    ],
)
def test_value_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda rows: MediaSpans.from_tokens(rows, 1), "input_ids"),
        (MediaSpans.from_media_locations, "media locations"),
        (MediaSpans.from_media_index, "index"),
    ],
)
def test_lists_are_refused(call, name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name} must be a tensor \[B, T\], got list"):
        call([[1]])


def test_ranges_must_be_int32() -> None:
    with pytest.raises(TypeError, match=r"int32 tensor, got torch\.int64"):
        MediaSpans(torch.zeros(1, 2).long(), torch.zeros(1, 2).long())
