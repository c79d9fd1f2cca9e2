"""Media attention backward in one pass, for ranges of one item that fits a tile.

A program owns a chunk of the tokens that see one media item, for one key/value head. K and V stay
resident, the softmax is recomputed, ``delta = rowsum(P * dP)`` needs neither the output nor its
log-sum-exp, dQ is final, and dK and dV accumulate in registers. They are final too where the item's
tokens are one chunk; otherwise ``sum_media_partials_kernel`` adds the chunks in order. A row is a
(token, query head) pair as in the forward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flamingo_kernels._triton.device import LOG2E, clipped_ranges, tanh


@triton.jit
def media_backward_kernel(
    q,  # [B, T, H, D]
    k,  # [B, I, R, Hkv, D]
    v,  # [B, I, R, Hkv, D]
    d_out,  # [B, T, H, D]
    first,  # int32 [B, T]
    last,  # int32 [B, T]
    gate,  # [1] or None
    plan,  # int32 [B, ENTRIES, 4], see plan.py
    d_q,  # [B, T, H, D], contiguous
    d_k,  # [B, I, R, Hkv, D], contiguous
    d_v,  # [B, I, R, Hkv, D], contiguous
    partials,  # [2, B, PARTIALS, Hkv, R, D]
    d_tanh,  # [B, SLOTS, Hkv], the gradient of tanh(gate) by program; None without a gate
    T,
    ITEMS,
    ENTRIES,
    SLOTS,
    PARTIALS,
    KV_HEADS,
    stride_partial,  # from the partial sums of dK to those of dV
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
    stride_gb,
    stride_gt,
    stride_gh,
    stride_fb,
    stride_ft,
    stride_lb,
    stride_lt,
    SCALE: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_h = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    i_b = (tl.program_id(0) // KV_HEADS // SLOTS).to(tl.int64)
    slot = tl.program_id(0) // KV_HEADS % SLOTS
    p_chunk = plan + (i_b * ENTRIES + ITEMS + 1 + slot) * 4
    item = tl.load(p_chunk)
    begin = tl.load(p_chunk + 1, mask=item >= 0, other=0)
    end = tl.load(p_chunk + 2, mask=item >= 0, other=0)
    place = tl.load(p_chunk + 3, mask=item >= 0, other=-1)

    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < R
    m_kv = (m_r & (item < ITEMS) & (begin < end))[:, None] & m_d[None, :]
    o_item = tl.maximum(item, 0).to(tl.int64)
    o_rl = o_r.to(tl.int64)[:, None]
    p_k = k + i_b * stride_kb + i_h * stride_kh + o_item * stride_ki
    p_v = v + i_b * stride_vb + i_h * stride_vh + o_item * stride_vi

    b_tanh = tl.zeros([], ACC) + 1.0
    if gate is not None:
        b_tanh = tanh(tl.load(gate).to(ACC))
    b_d_tanh = tl.zeros([BLOCK_T], ACC)

    if item == ITEMS:  # tokens that see nothing
        for row_0 in tl.range(begin * G, end * G, BLOCK_T):
            rows = row_0 + tl.arange(0, BLOCK_T)
            i_t, o_head, m_row = _rows_of_item(
                first, last, rows, i_b, i_h, item, end, T, ITEMS, G,
                stride_fb, stride_ft, stride_lb, stride_lt,
            )  # fmt: skip
            p_dq = d_q + ((i_b * T + i_t) * (KV_HEADS * G) + o_head) * D
            tl.store(
                p_dq[:, None] + o_d[None, :],
                tl.zeros([BLOCK_T, BLOCK_D], d_q.dtype.element_ty),
                mask=m_row[:, None] & m_d[None, :],
            )
    elif item >= 0:
        b_k = tl.load(p_k + o_rl * stride_kr + o_d[None, :], mask=m_kv, other=0.0)
        b_v = tl.load(p_v + o_rl * stride_vr + o_d[None, :], mask=m_kv, other=0.0)
        b_dk = tl.zeros([BLOCK_R, BLOCK_D], ACC)
        b_dv = tl.zeros([BLOCK_R, BLOCK_D], ACC)
        for row_0 in tl.range(begin * G, end * G, BLOCK_T):
            rows = row_0 + tl.arange(0, BLOCK_T)
            i_t, o_head, m_row = _rows_of_item(
                first, last, rows, i_b, i_h, item, end, T, ITEMS, G,
                stride_fb, stride_ft, stride_lb, stride_lt,
            )  # fmt: skip
            # Rows of other items are zeros, so their P needs no mask: dP, dS and dO are zeros.
            m_q = m_row[:, None] & m_d[None, :]
            p_q = q + i_b * stride_qb + i_t * stride_qt + o_head * stride_qh
            p_do = d_out + i_b * stride_gb + i_t * stride_gt + o_head * stride_gh
            b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q, other=0.0)
            b_do = tl.load(p_do[:, None] + o_d[None, :], mask=m_q, other=0.0)

            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
            b_s *= SCALE * LOG2E
            if R < BLOCK_R:
                b_s = tl.where(m_r[None, :], b_s, float("-inf"))
            b_p = tl.exp2(b_s - tl.max(b_s, 1)[:, None])  # [BLOCK_T, BLOCK_R]
            b_p *= (1.0 / tl.sum(b_p, 1))[:, None]
            b_dv = tl.dot(
                tl.trans(b_p.to(b_do.dtype)), b_do, b_dv, input_precision=PRECISION, out_dtype=ACC
            )
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION, out_dtype=ACC)
            b_delta = tl.sum(b_p * b_dp, 1)
            b_d_tanh += b_delta
            b_ds = (b_p * (b_dp - b_delta[:, None]) * (b_tanh * SCALE)).to(b_q.dtype)
            b_dk = tl.dot(tl.trans(b_ds), b_q, b_dk, input_precision=PRECISION, out_dtype=ACC)
            b_dq = tl.dot(b_ds, b_k, input_precision=PRECISION, out_dtype=ACC)
            p_dq = d_q + ((i_b * T + i_t) * (KV_HEADS * G) + o_head) * D
            tl.store(p_dq[:, None] + o_d[None, :], b_dq.to(d_q.dtype.element_ty), mask=m_q)

        b_dv *= b_tanh
        m_out = m_r[:, None] & m_d[None, :]
        if place >= 0:
            o_partial = ((i_b * PARTIALS + place) * KV_HEADS + i_h) * (R * D)
            p_partial = partials + o_partial + o_rl * D + o_d[None, :]
            tl.store(p_partial, b_dk, mask=m_out)
            tl.store(p_partial + stride_partial, b_dv, mask=m_out)
        else:
            o_out = (((i_b * ITEMS + o_item) * R + o_rl) * KV_HEADS + i_h) * D + o_d[None, :]
            tl.store(d_k + o_out, b_dk.to(d_k.dtype.element_ty), mask=m_out)
            tl.store(d_v + o_out, b_dv.to(d_v.dtype.element_ty), mask=m_out)

    if gate is not None:
        tl.store(d_tanh + tl.program_id(0), tl.sum(b_d_tanh))


@triton.jit
def _rows_of_item(
    first,
    last,
    rows,
    i_b,
    i_h,
    item,
    end,
    T,
    ITEMS,
    G: tl.constexpr,
    stride_fb,
    stride_ft,
    stride_lb,
    stride_lt,
):
    """Token and query head of each row, and whether the token is before ``end`` and sees ``item``.

    Item I stands for "sees nothing".
    """
    i_t = (rows // G).to(tl.int64)
    b_first, b_last = clipped_ranges(
        first,
        last,
        i_b * stride_fb + i_t * stride_ft,
        i_b * stride_lb + i_t * stride_lt,
        i_t < end,
        ITEMS,
    )
    b_item = tl.where(b_first <= b_last, b_last, ITEMS)
    return i_t, i_h * G + rows % G, (i_t < end) & (b_item == item)
