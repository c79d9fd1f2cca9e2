"""Sizes of the segment table, from shapes alone, for kernels and for tracing."""

from __future__ import annotations

# Tokens of the shortest chunk that a backward is divided into: it bounds the size of the table.
SHORTEST_CHUNK = 128
# Items with an entry each; of more, as of a flat list of keys, several share one.
MOST_ITEMS_ALONE = 1024


def chunk_slots(media: int, tokens: int, chunk: int) -> int:
    """Return how many chunks increasing ranges of single items need at most.

    Their segments are disjoint: one chunk per item and per chunk length, and as many again for
    tokens that see nothing.
    """
    return media + 2 * ((tokens + chunk - 1) // chunk) + 1


def items_of_entry(media: int, single_item: bool) -> int:
    """Return how many items share an entry; chunks need one for each."""
    return 1 if single_item else 1 + media // MOST_ITEMS_ALONE


def item_entries(media: int, single_item: bool) -> int:
    """Return the entries of items, the one of "sees nothing" included."""
    return -(-media // items_of_entry(media, single_item)) + 1


def table_entries(media: int, tokens: int, single_item: bool) -> int:
    """Return the entries of a row of the segment table, whatever the length of its chunks."""
    chunks = chunk_slots(media, tokens, SHORTEST_CHUNK) if single_item else 0
    return item_entries(media, single_item) + chunks
