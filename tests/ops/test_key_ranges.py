"""KeyRanges: constructors against masks written by hand, and errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flamingo_kernels.ops import KeyRanges, MediaSpans
from flamingo_kernels.ops.spans import SegmentTable

BEYOND = 2**31  # no int32
LISTS = st.lists(st.integers(-2, 9), min_size=4, max_size=4)


def pairs(ranges: KeyRanges) -> list[list[tuple[int, int] | None]]:
    """Return start and stop of each token; None where it sees nothing."""
    assert ranges.start.dtype == ranges.stop.dtype == torch.int32
    return [
        [(a, b) if a < b else None for a, b in zip(starts, stops, strict=True)]
        for starts, stops in zip(ranges.start.tolist(), ranges.stop.tolist(), strict=True)
    ]


def row(*bounds: tuple[int, int]) -> KeyRanges:
    start, stop = torch.tensor(bounds, dtype=torch.int32).T[:, None]
    return KeyRanges(start, stop)


@given(LISTS, LISTS)
def test_masks_become_the_ranges_they_came_from(start: list[int], stop: list[int]) -> None:
    ranges = row(*zip(start, stop, strict=True))
    mask = ranges.visible(7)
    for token, (a, b) in enumerate(zip(start, stop, strict=True)):
        assert mask[0, token].tolist() == [a <= key < b for key in range(7)]
    again = KeyRanges.from_mask(mask)
    again.check(7)
    assert torch.equal(again.visible(7), mask)


@given(LISTS, LISTS, st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_items_of_any_lengths(first: list[int], last: list[int], lengths: list[int]) -> None:
    """Also where ranges go beyond the items, and where items have no keys."""
    spans = MediaSpans(*(torch.tensor([x], dtype=torch.int32) for x in (first, last)))
    ranges = KeyRanges.from_items(spans, torch.tensor([lengths], dtype=torch.uint8))
    ranges.check(sum(lengths))
    expected = spans.visible(3)[0].repeat_interleave(torch.tensor(lengths), 1)
    assert torch.equal(ranges.visible(sum(lengths))[0], expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8])
def test_boundaries_and_windows(dtype: torch.dtype) -> None:
    boundary = torch.tensor([[0, 2, 2, 5, 127]], dtype=dtype)
    prefix, window = KeyRanges.from_boundary(boundary), KeyRanges.from_boundary(boundary, 3)
    assert pairs(prefix) == [[None, (0, 2), (0, 2), (0, 5), (0, 127)]]
    assert pairs(window) == [[None, (0, 2), (0, 2), (2, 5), (124, 127)]]
    assert pairs(KeyRanges.from_boundary(boundary, 300)) == pairs(prefix)
    assert pairs(prefix.newest(2)) == [[(0, 5), (0, 127)]]


def test_packed_documents() -> None:
    """Tokens before, after and between documents; one without tokens, one without keys."""
    tokens = torch.tensor([1, 3, 3, 4, 6], dtype=torch.int32)
    keys = torch.tensor([2, 6, 7, 7, 9], dtype=torch.uint8)
    ranges = KeyRanges.from_cu_seqlens(tokens, keys, 8)
    assert pairs(ranges) == [[None, (2, 6), (2, 6), None, (7, 9), (7, 9), None, None]]
    assert pairs(KeyRanges.from_cu_seqlens(tokens[:1], keys[:1], 2)) == [[None, None]]

    documents = [row((0, 2), (-3, 9)), row((1, 0)), row((1, 2))]
    assert pairs(KeyRanges.packed(documents, [4, 0, 2])) == [[(0, 2), (0, 4), None, (5, 6)]]


def test_everything() -> None:
    ranges = KeyRanges.everything(2, 3, 4, torch.device("cpu"))
    assert ranges.shape == (2, 3) and ranges.visible(4).all()


@pytest.mark.parametrize(("batch", "tokens", "slots"), [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_sizes_of_zero(batch: int, tokens: int, slots: int) -> None:
    spans = MediaSpans.everything(batch, tokens, slots, torch.device("cpu"))
    made = [
        KeyRanges.from_items(spans, torch.ones(batch, slots, dtype=torch.int64)),
        KeyRanges.from_boundary(torch.full((batch, tokens), slots), window=2),
        KeyRanges.from_mask(torch.ones(batch, tokens, slots, dtype=torch.bool)),
        KeyRanges.everything(batch, tokens, slots, torch.device("cpu")),
    ]
    for ranges in [*made, KeyRanges.packed(made[:1], [slots]), made[0].newest(tokens)]:
        ranges.check(slots)
        assert ranges.visible(slots).all() and ranges.shape == (batch, tokens)
    offsets = torch.tensor([0, tokens]), torch.tensor([0, slots])
    assert KeyRanges.from_cu_seqlens(*offsets, tokens).visible(slots).all()


def test_numbers_beyond_int32_do_not_wrap_around() -> None:
    least, most = -BEYOND, BEYOND - 1
    extreme = row((least, most), (most, least), (least, least), (most, most), (0, most))
    seen = torch.tensor([True, False, False, False, True])
    assert torch.equal(extreme.visible(3), seen[None, :, None].expand(1, 5, 3))
    assert torch.equal(
        KeyRanges.packed([row((0, 1)), extreme], [1, 3]).visible(4)[0, 1:, 1:],
        extreme.visible(3)[0],
    )
    spans = MediaSpans.everything(1, 1, 3, torch.device("cpu"))
    for lengths in ([3, BEYOND - 1, BEYOND - 1], [3, 2**62, 2**62]):
        ranges = KeyRanges.from_items(spans, torch.tensor([lengths]))
        assert pairs(ranges) == [[(0, most)]]
        with pytest.raises(ValueError, match="<= 9, the number of keys"):
            ranges.check(9)
    boundary = torch.tensor([[BEYOND, 2**63 - 1]])
    assert not KeyRanges.from_boundary(boundary, 2).visible(9).any()
    assert KeyRanges.from_boundary(boundary).visible(9).all()
    row((0, most)).check(BEYOND)


def test_constructors_read_nothing_on_other_devices() -> None:
    numbers = torch.ones(2, 3, dtype=torch.int64, device="meta")
    spans = MediaSpans.everything(2, 5, 3, numbers.device)
    for ranges in (
        KeyRanges.from_items(spans, numbers),
        KeyRanges.from_boundary(numbers, 2),
        KeyRanges.from_cu_seqlens(numbers[0], numbers[0], 4),
        KeyRanges.packed([KeyRanges.everything(2, 5, 3, numbers.device)], [3]).newest(1),
    ):
        assert ranges.start.is_meta and ranges.spans.last.is_meta


def test_a_program_takes_other_numbers_of_documents() -> None:
    """Recorded with two documents, run with four, and packed with other numbers of tokens."""

    def bounds(ranges: KeyRanges) -> tuple[torch.Tensor, torch.Tensor]:
        return ranges.start, ranges.stop

    def offsets(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return bounds(KeyRanges.from_cu_seqlens(q, k, 8))

    def packed(start: torch.Tensor, stop: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        document = KeyRanges(start, stop)
        return bounds(KeyRanges.packed([document, document], [5, 5]))

    many = torch.tensor([0, 2, 3, 6, 8])
    program = torch.jit.trace(offsets, (many[:3], many[:3]))
    for found, expected in zip(program(many, many), offsets(many, many), strict=True):
        assert torch.equal(found, expected)
    start, stop = torch.tensor([[[0, 1, 2]], [[2, 5, 5]]], dtype=torch.int32)
    program = torch.jit.trace(packed, (start[:, :2], stop[:, :2]))
    for found, expected in zip(program(start, stop), packed(start, stop), strict=True):
        assert torch.equal(found, expected)


def test_a_changed_copy_has_other_ranges_and_no_plan() -> None:
    planned = row((0, 2)).with_segments(SegmentTable(torch.zeros(1), 3, 1))
    assert planned.spans.segments is not None
    for copy in (replace(planned, stop=planned.stop + 1), planned.newest(1)):
        assert copy.spans.segments is None
    assert replace(planned, stop=planned.stop + 1).visible(3).all()


def mask_with(*holes: tuple[int, int, int]) -> torch.Tensor:
    mask = torch.ones(2, 3, 6, dtype=torch.bool)
    for hole in holes:
        mask[hole] = False
    return mask


INTS = torch.zeros(1, 2, dtype=torch.int32)
SPANS = MediaSpans(INTS, INTS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KeyRanges(INTS, INTS[:, :1]), r"one shape \[B, T\], got \(1, 2\) and \(1, 1\)"),
        (lambda: KeyRanges(INTS[0], INTS[0]), r"one shape \[B, T\], got \(2,\)"),
        (lambda: KeyRanges.from_items(SPANS, INTS[0]), r"lengths must be \[B, I\], got .*\(2,\)"),
        (lambda: KeyRanges.from_items(SPANS, INTS.expand(3, 2)), r"\(3, 2\) and spans \(1, 2\)"),
        (lambda: KeyRanges.from_items(SPANS, INTS - INTS.new_tensor([0, 7])), r"\[0, 1\] is -7"),
        (lambda: KeyRanges.from_boundary(INTS[0]), r"boundary must be \[B, T\], got .*\(2,\)"),
        (lambda: KeyRanges.from_boundary(INTS, True), "window must be .* 1, got True"),
        (lambda: KeyRanges.everything(1, 2, -3, INTS.device), "keys must be .* 0, got -3"),
        (lambda: KeyRanges.everything(1, 2, 3, INTS.device).check(float("nan")), "keys .* nan"),
        (lambda: KeyRanges.from_boundary(INTS, 0), "window must be .* at least 1, got 0"),
        (lambda: KeyRanges.from_boundary(INTS, float("nan")), "window must be .* 1, got nan"),
        (lambda: KeyRanges.from_cu_seqlens(INTS, INTS, 1), r"cu_seqlens_q must be \[N \+ 1\]"),
        (lambda: KeyRanges.from_cu_seqlens(INTS[0], INTS[0, :1], 1), "one length .* 2 and 1"),
        (lambda: KeyRanges.from_cu_seqlens(INTS[0, :0], INTS[0, :0], 1), "got 0 and 0"),
        (
            lambda: KeyRanges.from_cu_seqlens(INTS[0], INTS.new_tensor([5, 4]).byte(), 1),
            r"cu_seqlens_k must not fall: \[0\] is 5, \[1\] is 4",
        ),
        (lambda: KeyRanges.packed([], []), "got 0 documents and 0"),
        (lambda: KeyRanges.packed([row((0, 1))], [1, 2]), "got 1 documents and 2"),
        (lambda: KeyRanges.packed([row((0, 1))], [-1]), r"keys\[0\] must be .* at least 0, got -1"),
        (lambda: KeyRanges.packed([row((0, 1))], [float("nan")]), r"keys\[0\] must be .* got nan"),
        (lambda: KeyRanges.from_cu_seqlens(INTS[0], INTS[0] - 7, 1), r"cu_seqlens_k\[0\] is -7"),
        (lambda: KeyRanges.from_cu_seqlens(INTS[0], INTS[0], -1), "tokens must be .* got -1"),
        (
            lambda: KeyRanges.packed([row((0, 1)), KeyRanges(*INTS.expand(2, 2, 2))], [1, 1]),
            r"rows B, got \[B, T\] of \(1, 1\), \(2, 2\)",
        ),
        (
            lambda: KeyRanges.from_mask(mask_with((1, 1, 0), (1, 1, 3), (1, 2, 2))),
            "row 1, token 1 are not contiguous: it sees 1 and 5 but not 3",
        ),
        (lambda: row((0, 1)).newest(2), "1 tokens have no newest 2"),
        (lambda: row((0, 4), (-1, 2)).check(4), r"row 0, token 1 sees keys -1\.\.1 \(start -1"),
        (lambda: row((0, 4), (2, 5)).check(4), r"token 1 .* stop 5\).* <= 4, the number of keys"),
        (lambda: row((0, 4), (3, 2)).check(4), r"token 1 .*start 3, stop 2"),
    ],
)  # fmt: skip
def test_value_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: KeyRanges(x, INTS), "KeyRanges.start must be an int32 tensor"),
        (lambda x: KeyRanges(INTS, x), "KeyRanges.stop must be an int32 tensor"),
        (lambda x: KeyRanges.from_items(SPANS, x), r"lengths must be an integer tensor \[B, I\]"),
        (lambda x: KeyRanges.from_items(x, INTS), "spans must be MediaSpans"),
        (lambda x: KeyRanges.packed([x], [1]), r"documents\[0\] must be KeyRanges"),
        (KeyRanges.from_boundary, r"boundary must be an integer tensor \[B, T\]"),
        (
            lambda x: KeyRanges.from_cu_seqlens(INTS[0], x, 1),
            r"cu_seqlens_k must be .*tensor \[N \+ 1\]",
        ),
        (KeyRanges.from_mask, r"mask must be a bool tensor \[B, T, S\]"),
    ],
)
def test_type_errors(call, message: str) -> None:
    for value, got in (
        (torch.full((1, 2), float("nan")), r"(torch\.float32|Tensor)"),
        ([[1]], "list"),
        (None, "NoneType"),
    ):
        with pytest.raises(TypeError, match=f"{message}, got {got}"):
            call(value)
