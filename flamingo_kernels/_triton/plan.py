"""Where each media item's tokens are, and their division into chunks, found on the device.

Segment of item i: the tokens from the first to the last one that sees i. In every attend mode each
token in between sees it too; other ranges may leave gaps, so kernels still test each token.

The plan is one table, int32 [B, ENTRIES, 4], of which row b holds

* I + 1 items: first token, one past the last, place of the first partial sum, how many there are.
  Item I stands for "sees nothing".
* chunks, at most SLOTS of them used: item, first token, one past the last, place of its partial sum
  or -1. All -1 where unused.

Two kernels: the second reads segments of other threads of the first, and a barrier inside one
kernel orders writes to global memory on NVIDIA only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flamingo_kernels._triton.device import clipped_ranges


@triton.jit
def media_segments_kernel(
    first,  # int32 [B, T]
    last,  # int32 [B, T]
    plan,  # int32 [B, ENTRIES, 4]
    T,
    ITEMS,
    ENTRIES,
    stride_fb,
    stride_ft,
    stride_lb,
    stride_lt,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """One program per row of the batch and block of items."""
    blocks = tl.cdiv(ITEMS + 1, BLOCK_I)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    i_i = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    b_start = tl.zeros([BLOCK_I], tl.int32) + T
    b_end = tl.zeros([BLOCK_I], tl.int32)
    for t_0 in tl.range(0, T, BLOCK_T):
        i_t = t_0 + tl.arange(0, BLOCK_T)
        o_t = i_t.to(tl.int64)
        m_t = i_t < T
        b_first, b_last = clipped_ranges(
            first,
            last,
            i_b * stride_fb + o_t * stride_ft,
            i_b * stride_lb + o_t * stride_lt,
            m_t,
            ITEMS,
        )
        b_empty = b_first > b_last
        b_first = tl.where(b_empty, ITEMS, b_first)
        b_last = tl.where(b_empty, ITEMS, b_last)
        m_sees = (b_first[:, None] <= i_i[None, :]) & (i_i[None, :] <= b_last[:, None])
        m_sees = m_sees & m_t[:, None]  # [BLOCK_T, BLOCK_I]
        b_start = tl.minimum(b_start, tl.min(tl.where(m_sees, i_t[:, None], T), 0))
        b_end = tl.maximum(b_end, tl.max(tl.where(m_sees, i_t[:, None] + 1, 0), 0))
    p_item = plan + (i_b * ENTRIES + i_i) * 4
    tl.store(p_item, b_start, mask=i_i <= ITEMS)
    tl.store(p_item + 1, b_end, mask=i_i <= ITEMS)
    tl.store(p_item + 2, i_i * 0, mask=i_i <= ITEMS)
    tl.store(p_item + 3, i_i * 0, mask=i_i <= ITEMS)


@triton.jit
def media_chunks_kernel(
    plan,  # int32 [B, ENTRIES, 4], segments filled in
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
    p_items = plan + tl.program_id(0).to(tl.int64) * ENTRIES * 4
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
    """First token of a block of items, their chunks, and how many of these have partial sums.

    At least one chunk per item, whose gradient is written as zeros if nothing sees it.
    """
    i_i = i_0 + tl.arange(0, BLOCK_I)
    b_start = tl.load(p_items + i_i * 4, mask=i_i <= ITEMS, other=0)
    b_end = tl.load(p_items + i_i * 4 + 1, mask=i_i <= ITEMS, other=0)
    b_count = tl.cdiv(tl.maximum(b_end - b_start, 0), chunk)
    b_count = tl.maximum(b_count, tl.where(i_i < ITEMS, 1, 0))
    return b_start, b_count, tl.where((b_count > 1) & (i_i < ITEMS), b_count, 0)
