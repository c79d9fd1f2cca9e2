"""Sizes of the segment table, from shapes alone, for kernels and for tracing."""

from __future__ import annotations

# Tokens of the shortest chunk that a backward is divided into: it bounds the size of the table.
SHORTEST_CHUNK = 128


def chunk_slots(media: int, tokens: int, chunk: int) -> int:
    """Return how many chunks increasing ranges of single items need at most.

    Their segments are disjoint: one chunk per item and per chunk length, and as many again for
    tokens that see nothing.
    """
    return media + 2 * ((tokens + chunk - 1) // chunk) + 1


def table_entries(media: int, tokens: int, single_item: bool) -> int:
    """Return the entries of a row of the segment table, whatever the length of its chunks."""
    return media + 1 + (chunk_slots(media, tokens, SHORTEST_CHUNK) if single_item else 0)
