"""Inputs of ``media_cross_attention`` with a flat list of keys: ranges of every kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from flamingo_kernels.ops import KeyRanges, MediaSpans
from testing.cases import IMAGE, MediaCase, random_tokens, unseen_as_nan


def _cuts(total: int, parts: int) -> Tensor:
    """Return offsets int64 [parts + 1] at random places of 0..total."""
    return torch.randint(0, total + 1, (parts + 1,)).sort().values


def _in_any_order(batch: int, tokens: int, keys: int) -> KeyRanges:
    """Return ranges that rise and fall, are empty, and lie outside the keys."""
    return KeyRanges(*torch.randint(-3, keys + 4, (2, batch, tokens), dtype=torch.int32))


def _with_gaps(batch: int, tokens: int, keys: int) -> KeyRanges:
    """Return ranges of one to three keys here and there."""
    start = torch.randint(0, keys + 1, (batch, tokens), dtype=torch.int32)
    return KeyRanges(start, start + torch.randint(1, 4, start.shape, dtype=torch.int32))


def _prefix(batch: int, tokens: int, keys: int, window: int | None = None) -> KeyRanges:
    boundary = torch.randint(0, keys + 1, (batch, tokens)).sort(1).values
    return KeyRanges.from_boundary(boundary, window)


def _items(batch: int, tokens: int, keys: int) -> KeyRanges:
    """Return groups of images of random lengths, 0 among them; keys past the last are unused."""
    spans = MediaSpans.from_tokens(random_tokens(batch, tokens, 5), IMAGE, "last_group")
    return KeyRanges.from_items(spans, torch.stack([_cuts(keys, 5).diff() for _ in range(batch)]))


def _equal_items(batch: int, tokens: int, keys: int) -> KeyRanges:
    spans = MediaSpans.from_tokens(random_tokens(batch, tokens, 4), IMAGE)
    return KeyRanges.from_items(spans, torch.full((batch, 4), keys // 4))


def _packed(batch: int, tokens: int, keys: int) -> KeyRanges:
    """Return four documents in a row, the same in every row of the batch, without a copy."""
    row = KeyRanges.from_cu_seqlens(_cuts(tokens, 4), _cuts(keys, 4), tokens)
    return KeyRanges(*(bound.expand(batch, -1) for bound in (row.start, row.stop)))


RANGES: dict[str, Callable[[int, int, int], KeyRanges]] = {
    "any order": _in_any_order,
    "gaps": _with_gaps,
    "prefix": _prefix,
    "window": lambda batch, tokens, keys: _prefix(batch, tokens, keys, window=1 + keys // 4),
    "items": _items,
    "equal items": _equal_items,
    "packed": _packed,
}


def range_case(
    dtype: torch.dtype = torch.float64,
    *,
    ranges: str = "any order",
    batch: int = 2,
    tokens: int = 11,
    keys: int = 23,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    gated: bool = True,
    nan: bool = True,
    seed: int = 0,
) -> MediaCase:
    """Draw a random case, as ``cases.media_case`` does; ``k`` and ``v`` are [B, S, Hkv, D]."""
    torch.manual_seed(seed)
    drawn = RANGES[ranges](batch, tokens, keys)
    q = torch.randn(batch, tokens, heads, head_dim)
    k, v = torch.randn(2, batch, keys, kv_heads, head_dim)
    gate = torch.randn(1) if gated else None
    case = MediaCase(q, k, v, drawn, gate)
    return (unseen_as_nan(case) if nan else case).to(dtype)


range_shapes = st.fixed_dictionaries(
    {
        "ranges": st.sampled_from(list(RANGES)),
        "batch": st.integers(1, 3),
        "tokens": st.integers(1, 40),
        "keys": st.sampled_from([0, 1, 7, 63, 64, 65, 130, 300]),
        "heads": st.sampled_from([2, 4]),
        "kv_heads": st.sampled_from([1, 2]),
        "head_dim": st.sampled_from([1, 8, 24, 40, 80, 96]),
        "gated": st.booleans(),
        "seed": st.integers(0, 99),
    }
)
