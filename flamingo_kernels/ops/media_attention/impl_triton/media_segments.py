"""The segment table: where each media item's tokens are, and their chunks, found on the device.

The *segment* of item i runs from the first to the last token that sees i. In every attend mode each
token in between sees it too; other ranges may leave gaps, so kernels still test each token. A
*chunk* is the piece of a segment that one program computes. A *partial* is a chunk's sum of dK and
dV, which is added to those of the other chunks later.

The table is int32 [B, ENTRIES, 4]; row b holds

* I + 1 items: first token, one past the last, place of the first partial sum, how many there are.
  Item I stands for "sees nothing". Many items of any ranges, as are single keys, share entries: an
  entry has the first and the last token that sees any of them.
* for ranges of single items, chunks, at most SLOTS of them used: item, first token, one past the
  last, place of its partial sum or -1. An unused entry is all -1.

Two kernels: the second reads segments of other threads of the first, and a barrier inside one
kernel orders writes to global memory on NVIDIA only.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._triton.configs import LaunchConfig
from flamingo_kernels._triton.launch import TARGET_PROGRAMS, launch, strided
from flamingo_kernels.ops.media_attention import segment_sizes
from flamingo_kernels.ops.media_attention.impl_triton.media_rows import Bound, clipped_ranges

CONFIG = LaunchConfig(64, 32, 4, 1, "64 tokens by 32 media slots: more masks spill on gfx942")
# Tokens of a chunk. A chunk's partial dK and dV cost 16 * R * D bytes, its rows 6 * tokens * D in
# 16 bits: 17 % more at 1024 tokens. Shorter ones pay only where they make more programs.
LONGEST_CHUNK = 1024


def segments(first: Tensor, last: Tensor, media: int, kv_heads: int, single_item: bool) -> Tensor:
    """Return the table: segments, and for ranges of single items chunks."""
    batch, tokens = first.shape
    entries = segment_sizes.table_entries(media, tokens, single_item)
    table = first.new_empty((batch, entries, 4))
    shared = {
        "segments": table,
        "T": tokens,
        "ITEMS": media,
        "ENTRIES": entries,
        "BLOCK_I": CONFIG.keys,
    }
    launch(
        media_segments_kernel,
        (batch * -(-segment_sizes.item_entries(media, single_item) // CONFIG.keys),),
        CONFIG,
        first=strided(Bound, first),
        last=strided(Bound, last),
        **shared,
        SHARED=segment_sizes.items_of_entry(media, single_item),
        BLOCK_T=CONFIG.rows,
    )
    if single_item:
        chunk, slots, places = chunking(batch, tokens, media, kv_heads)
        launch(
            media_chunks_kernel,
            (batch,),
            CONFIG,
            **shared,
            CHUNK=chunk,
            SLOTS=slots,
            PARTIALS=places,
        )
    return table


def chunking(batch: int, tokens: int, media: int, kv_heads: int) -> tuple[int, int, int]:
    """Return the tokens of a chunk, and the most chunks and partial sums of a row of the batch.

    There are few partial sums in large batches and many programs in small ones. The numbers come
    from shapes alone.
    """
    wanted = max(1, batch * kv_heads * tokens // TARGET_PROGRAMS)
    power = 1 << (wanted.bit_length() - 1)
    chunk = min(max(power, segment_sizes.SHORTEST_CHUNK), LONGEST_CHUNK)
    # Only segments of several chunks, so longer than one, have partial sums.
    places = 0 if tokens <= chunk else min(2 * tokens // chunk, -(-tokens // chunk) + media)
    return chunk, segment_sizes.chunk_slots(media, tokens, chunk), places


@triton.jit
def media_segments_kernel(
    first,  # Bound
    last,  # Bound
    segments,  # int32 [B, ENTRIES, 4]
    T,
    ITEMS,
    ENTRIES,
    SHARED,  # items of an entry
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """One program per row of the batch and block of entries."""
    nothing = tl.cdiv(ITEMS, SHARED)
    blocks = tl.cdiv(nothing + 1, BLOCK_I)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    i_i = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    b_start = tl.zeros([BLOCK_I], tl.int32) + T
    b_end = tl.zeros([BLOCK_I], tl.int32)
    for t_0 in tl.range(0, T, BLOCK_T):
        i_t = t_0 + tl.arange(0, BLOCK_T)
        m_t = i_t < T
        b_first, b_last = clipped_ranges(first, last, i_b, i_t, m_t, ITEMS)
        b_empty = b_first > b_last
        b_first = tl.where(b_empty, nothing, b_first // SHARED)
        b_last = tl.where(b_empty, nothing, b_last // SHARED)
        m_sees = (b_first[:, None] <= i_i[None, :]) & (i_i[None, :] <= b_last[:, None])
        m_sees = m_sees & m_t[:, None]  # [BLOCK_T, BLOCK_I]
        b_start = tl.minimum(b_start, tl.min(tl.where(m_sees, i_t[:, None], T), 0))
        b_end = tl.maximum(b_end, tl.max(tl.where(m_sees, i_t[:, None] + 1, 0), 0))
    p_item = segments + (i_b * ENTRIES + i_i) * 4
    tl.store(p_item, b_start, mask=i_i <= nothing)
    tl.store(p_item + 1, b_end, mask=i_i <= nothing)
    tl.store(p_item + 2, i_i * 0, mask=i_i <= nothing)
    tl.store(p_item + 3, i_i * 0, mask=i_i <= nothing)


@triton.jit
def media_chunks_kernel(
    segments,  # int32 [B, ENTRIES, 4], of which the items are filled in
    T,
    ITEMS,
    ENTRIES,
    CHUNK,  # tokens
    SLOTS,
    PARTIALS,
    BLOCK_I: tl.constexpr,
):
    """One program per row of the batch.

    The segments of increasing ranges are disjoint, and their chunks fit the SLOTS and PARTIALS that
    the host reserves from shapes alone. Where they do not fit, a segment becomes one chunk: slower,
    still right.
    """
    p_items = segments + tl.program_id(0).to(tl.int64) * ENTRIES * 4
    p_chunks = p_items + (ITEMS + 1) * 4
    used = 0
    used_partials = 0
    for i_0 in tl.range(0, ITEMS + 1, BLOCK_I):
        _, b_count, b_shared = _chunks_of_items(p_items, i_0, CHUNK, ITEMS, BLOCK_I)
        used += tl.sum(b_count)
        used_partials += tl.sum(b_shared)
    chunk = CHUNK
    if (used > SLOTS) | (used_partials > PARTIALS):
        chunk = T
    slot = 0
    place = 0
    for i_0 in tl.range(0, ITEMS + 1, BLOCK_I):
        i_i = i_0 + tl.arange(0, BLOCK_I)
        b_start, b_count, b_shared = _chunks_of_items(p_items, i_0, chunk, ITEMS, BLOCK_I)
        b_end = tl.load(p_items + i_i * 4 + 1, mask=i_i <= ITEMS, other=0)
        b_slot = slot + tl.cumsum(b_count, 0) - b_count
        b_place = place + tl.cumsum(b_shared, 0) - b_shared
        tl.store(p_items + i_i * 4 + 2, b_place, mask=i_i <= ITEMS)
        tl.store(p_items + i_i * 4 + 3, b_shared, mask=i_i <= ITEMS)
        for i_c in tl.range(0, tl.max(b_count)):
            m_c = i_c < b_count
            p_slot = p_chunks + (b_slot + i_c) * 4
            b_begin = b_start + i_c * chunk
            tl.store(p_slot, i_i, mask=m_c)
            tl.store(p_slot + 1, b_begin, mask=m_c)
            tl.store(p_slot + 2, tl.minimum(b_begin + chunk, b_end), mask=m_c)
            tl.store(p_slot + 3, tl.where(b_shared > 0, b_place + i_c, -1), mask=m_c)
        slot += tl.sum(b_count)
        place += tl.sum(b_shared)
    entries = ENTRIES - ITEMS - 1
    for s_0 in tl.range(0, entries, BLOCK_I):
        i_s = s_0 + tl.arange(0, BLOCK_I)
        m_unused = (i_s >= slot) & (i_s < entries)
        for field in tl.static_range(4):
            tl.store(p_chunks + i_s * 4 + field, -1, mask=m_unused)


@triton.jit
def _chunks_of_items(p_items, i_0, chunk, ITEMS, BLOCK_I: tl.constexpr):
    """Return the first token of a block of items, their chunks, and those with partial sums.

    At least one chunk per item, whose gradient is written as zeros if nothing sees it.
    """
    i_i = i_0 + tl.arange(0, BLOCK_I)
    b_start = tl.load(p_items + i_i * 4, mask=i_i <= ITEMS, other=0)
    b_end = tl.load(p_items + i_i * 4 + 1, mask=i_i <= ITEMS, other=0)
    b_count = tl.cdiv(tl.maximum(b_end - b_start, 0), chunk)
    b_count = tl.maximum(b_count, tl.where(i_i < ITEMS, 1, 0))
    return b_start, b_count, tl.where((b_count > 1) & (i_i < ITEMS), b_count, 0)
