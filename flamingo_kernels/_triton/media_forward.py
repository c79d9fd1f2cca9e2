"""Media attention forward.

A program owns a tile of rows of one key/value head. A row is a (token, query head) pair, the G
query heads of a group side by side: K and V of a group are read once, and a decoding step fills
more of its tile. The tile's own ranges say which media items it loops over: no mask object, no list
of segments. An item that no row of the tile sees is not read, so it may hold NaN.

Shape letters: B rows of the batch, T tokens, I media slots (ITEMS), R latents, H = G * Hkv heads,
D head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flamingo_kernels._triton.device import LOG2E, clipped_ranges, tanh


@triton.jit
def media_forward_kernel(
    q,  # [B, T, H, D]
    k,  # [B, I, R, Hkv, D]
    v,  # [B, I, R, Hkv, D]
    first,  # int32 [B, T]
    last,  # int32 [B, T]
    gate,  # [1] or None
    out,  # [B, T, H, D]
    T,
    ITEMS,
    KV_HEADS,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ki,
    stride_kr,
    stride_kh,
    stride_vb,
    stride_vi,
    stride_vr,
    stride_vh,
    stride_fb,
    stride_ft,
    stride_lb,
    stride_lt,
    stride_ob,
    stride_ot,
    stride_oh,
    SCALE: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_TILE: tl.constexpr,  # a row's keys are one media item, and one tile holds it
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_h = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    i_tile = tl.program_id(0) // KV_HEADS % tl.cdiv(T * G, BLOCK_T)
    i_b = (tl.program_id(0) // KV_HEADS // tl.cdiv(T * G, BLOCK_T)).to(tl.int64)

    rows = i_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    i_t = (rows // G).to(tl.int64)
    i_qh = i_h * G + rows % G
    m_t = rows < T * G
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D

    b_first, b_last = clipped_ranges(
        first,
        last,
        i_b * stride_fb + i_t * stride_ft,
        i_b * stride_lb + i_t * stride_lt,
        m_t,
        ITEMS,
    )
    m_sees = b_first <= b_last
    lowest = tl.min(tl.where(m_sees, b_first, ITEMS))
    highest = tl.max(tl.where(m_sees, b_last, -1))

    p_q = q + i_b * stride_qb + i_t * stride_qt + i_qh * stride_qh
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0)
    p_k = k + i_b * stride_kb + i_h * stride_kh
    p_v = v + i_b * stride_vb + i_h * stride_vh

    b_max = tl.full([BLOCK_T], float("-inf"), ACC)
    b_sum = tl.zeros([BLOCK_T], ACC)
    b_out = tl.zeros([BLOCK_T, BLOCK_D], ACC)
    tiles_of_item: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    for step in tl.range(0, (highest - lowest + 1) * tiles_of_item):
        item = lowest + step // tiles_of_item
        i_r = step % tiles_of_item * BLOCK_R + tl.arange(0, BLOCK_R)
        m_row = (b_first <= item) & (item <= b_last)
        m_r = i_r < R
        # No row of the tile sees the item: nothing of it is read, 0 * NaN would be NaN.
        m_kv = (m_r & (tl.max(m_row.to(tl.int32)) > 0))[:, None] & m_d[None, :]
        o_item = item.to(tl.int64)
        o_r = i_r.to(tl.int64)[:, None]
        b_k = tl.load(
            p_k + o_item * stride_ki + o_r * stride_kr + o_d[None, :], mask=m_kv, other=0.0
        )  # [BLOCK_R, BLOCK_D]
        b_v = tl.load(
            p_v + o_item * stride_vi + o_r * stride_vr + o_d[None, :], mask=m_kv, other=0.0
        )
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
        b_s = tl.where(m_row[:, None] & m_r[None, :], b_s * (SCALE * LOG2E), float("-inf"))
        if ONE_TILE:
            b_shift = tl.where(m_row, tl.max(b_s, 1), 0.0)
        else:
            b_new = tl.maximum(b_max, tl.max(b_s, 1))
            b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_decay = tl.exp2(b_max - b_shift)
            b_sum *= b_decay
            b_out *= b_decay[:, None]
            b_max = b_new
        b_p = tl.exp2(b_s - b_shift[:, None])  # [BLOCK_T, BLOCK_R]
        b_sum += tl.sum(b_p, 1)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision=PRECISION, out_dtype=ACC)

    b_factor = 1.0 / tl.where(m_sees, b_sum, 1.0)
    if gate is not None:
        b_factor *= tanh(tl.load(gate).to(ACC))
    b_out *= b_factor[:, None]
    p_out = out + i_b * stride_ob + i_t * stride_ot + i_qh * stride_oh
    tl.store(
        p_out[:, None] + o_d[None, :],
        b_out.to(out.dtype.element_ty),
        mask=m_t[:, None] & m_d[None, :],
    )
