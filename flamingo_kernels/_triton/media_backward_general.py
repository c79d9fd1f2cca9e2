"""Media attention backward for ranges of several items, or items larger than a tile.

Two passes, each final in what it writes: by rows, the softmax statistics and dQ; by keys, dK and
dV. A row is a (token, query head) pair as in the forward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flamingo_kernels._triton.device import LOG2E, clipped_ranges, tanh


@triton.jit
def media_rows_backward_kernel(
    q,  # [B, T, H, D]
    k,  # [B, I, R, Hkv, D]
    v,  # [B, I, R, Hkv, D]
    d_out,  # [B, T, H, D]
    first,  # int32 [B, T]
    last,  # int32 [B, T]
    gate,  # [1] or None
    d_q,  # [B, T, H, D], contiguous
    log2_sum,  # [B, Hkv, T * G]: log2 of the sum of exp2(scores * log2(e))
    delta,  # [B, Hkv, T * G]: rowsum(P * dP), before the gate
    d_tanh,  # [B, tiles, Hkv], the gradient of tanh(gate) by program; None without a gate
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
    """One program per tile of rows: a loop over keys for the statistics, a second one for dQ."""
    i_h = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    i_tile = tl.program_id(0) // KV_HEADS % tl.cdiv(T * G, BLOCK_T)
    i_b = (tl.program_id(0) // KV_HEADS // tl.cdiv(T * G, BLOCK_T)).to(tl.int64)

    rows = i_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    i_t = (rows // G).to(tl.int64)
    i_qh = i_h * G + rows % G
    m_t = rows < T * G
    o_d = tl.arange(0, BLOCK_D)
    m_q = m_t[:, None] & (o_d < D)[None, :]

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
    p_do = d_out + i_b * stride_gb + i_t * stride_gt + i_qh * stride_gh
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q, other=0.0)
    b_do = tl.load(p_do[:, None] + o_d[None, :], mask=m_q, other=0.0)
    p_k = k + i_b * stride_kb + i_h * stride_kh
    p_v = v + i_b * stride_vb + i_h * stride_vh

    b_max = tl.full([BLOCK_T], float("-inf"), ACC)
    b_sum = tl.zeros([BLOCK_T], ACC)
    b_delta = tl.zeros([BLOCK_T], ACC)
    tiles_of_item: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    steps = (highest - lowest + 1) * tiles_of_item
    for step in tl.range(0, steps):
        b_k, b_v, m_s = _keys(
            p_k, p_v, step, lowest, b_first, b_last,
            stride_ki, stride_kr, stride_vi, stride_vr, R, D, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
        b_s = tl.where(m_s, b_s * (SCALE * LOG2E), float("-inf"))
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION, out_dtype=ACC)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_decay = tl.exp2(b_max - b_shift)
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_delta = b_delta * b_decay + tl.sum(b_p * b_dp, 1)
        b_max = b_new
    b_delta = b_delta / tl.where(m_sees, b_sum, 1.0)
    b_log2_sum = tl.where(m_sees, b_max + tl.log2(tl.where(m_sees, b_sum, 1.0)), 0.0)
    o_stat = (i_b * KV_HEADS + i_h) * (T * G) + rows
    tl.store(log2_sum + o_stat, b_log2_sum, mask=m_t)
    tl.store(delta + o_stat, b_delta, mask=m_t)

    b_tanh = tl.zeros([], ACC) + 1.0
    if gate is not None:
        b_tanh = tanh(tl.load(gate).to(ACC))
        tl.store(d_tanh + tl.program_id(0), tl.sum(tl.where(m_t, b_delta, 0.0)))

    b_dq = tl.zeros([BLOCK_T, BLOCK_D], ACC)
    for step in tl.range(0, steps):
        b_k, b_v, m_s = _keys(
            p_k, p_v, step, lowest, b_first, b_last,
            stride_ki, stride_kr, stride_vi, stride_vr, R, D, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
        b_s = tl.where(m_s, b_s * (SCALE * LOG2E), float("-inf"))
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION, out_dtype=ACC)
        b_p = tl.exp2(b_s - b_log2_sum[:, None])
        b_ds = (b_p * (b_dp - b_delta[:, None]) * (b_tanh * SCALE)).to(b_q.dtype)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION, out_dtype=ACC)
    p_dq = d_q + ((i_b * T + i_t) * (KV_HEADS * G) + i_qh) * D
    tl.store(p_dq[:, None] + o_d[None, :], b_dq.to(d_q.dtype.element_ty), mask=m_q)


@triton.jit
def _keys(
    p_k,
    p_v,
    step,
    lowest,
    b_first,
    b_last,
    stride_ki,
    stride_kr,
    stride_vi,
    stride_vr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys and values of one step of a row tile's loop, and which of them each row sees."""
    tiles_of_item: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    item = lowest + step // tiles_of_item
    i_r = step % tiles_of_item * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_row = (b_first <= item) & (item <= b_last)
    m_r = i_r < R
    # No row of the tile sees the item: nothing of it is read, 0 * NaN would be NaN.
    m_kv = (m_r & (tl.max(m_row.to(tl.int32)) > 0))[:, None] & (o_d < D)[None, :]
    o_item = item.to(tl.int64)
    o_r = i_r.to(tl.int64)[:, None]
    b_k = tl.load(p_k + o_item * stride_ki + o_r * stride_kr + o_d[None, :], mask=m_kv, other=0.0)
    b_v = tl.load(p_v + o_item * stride_vi + o_r * stride_vr + o_d[None, :], mask=m_kv, other=0.0)
    return b_k, b_v, m_row[:, None] & m_r[None, :]


@triton.jit
def media_keys_backward_kernel(
    q,  # [B, T, H, D]
    k,  # [B, I, R, Hkv, D]
    v,  # [B, I, R, Hkv, D]
    d_out,  # [B, T, H, D]
    first,  # int32 [B, T]
    last,  # int32 [B, T]
    gate,  # [1] or None
    plan,  # int32 [B, ENTRIES, 4], see plan.py
    log2_sum,  # [B, Hkv, T * G]
    delta,  # [B, Hkv, T * G]
    d_k,  # [SPLITS, B, I, R, Hkv, D]: final where SPLITS is 1, else partial sums
    d_v,  # like d_k
    T,
    ITEMS,
    ENTRIES,
    KV_HEADS,
    SPLITS,
    stride_split,
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
    """One program per block of keys and share of the rows of its media item's segment."""
    tiles_of_item: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    pid = tl.program_id(0)
    i_h = (pid % KV_HEADS).to(tl.int64)
    i_tile = pid // KV_HEADS % tiles_of_item
    i_split = (pid // (KV_HEADS * tiles_of_item) % SPLITS).to(tl.int64)
    i_bi = (pid // (KV_HEADS * tiles_of_item) // SPLITS).to(tl.int64)
    i_b = i_bi // ITEMS
    o_item = i_bi % ITEMS
    item = o_item.to(tl.int32)

    p_item = plan + (i_b * ENTRIES + o_item) * 4
    start = tl.load(p_item) * G
    end = tl.load(p_item + 1) * G
    share = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), SPLITS), BLOCK_T) * BLOCK_T
    start += (i_split * share).to(tl.int32)
    stop = tl.minimum(start + share, end)

    i_r = i_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = i_r < R
    o_r = i_r.to(tl.int64)[:, None]
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_kv = (m_r & (start < stop))[:, None] & m_d[None, :]
    p_k = k + i_b * stride_kb + o_item * stride_ki + i_h * stride_kh
    p_v = v + i_b * stride_vb + o_item * stride_vi + i_h * stride_vh
    b_k = tl.load(p_k + o_r * stride_kr + o_d[None, :], mask=m_kv, other=0.0)
    b_v = tl.load(p_v + o_r * stride_vr + o_d[None, :], mask=m_kv, other=0.0)
    b_tanh = tl.zeros([], ACC) + 1.0
    if gate is not None:
        b_tanh = tanh(tl.load(gate).to(ACC))

    b_dk = tl.zeros([BLOCK_R, BLOCK_D], ACC)
    b_dv = tl.zeros([BLOCK_R, BLOCK_D], ACC)
    for row_0 in tl.range(start, stop, BLOCK_T):
        rows = row_0 + tl.arange(0, BLOCK_T)
        i_t = (rows // G).to(tl.int64)
        i_qh = i_h * G + rows % G
        b_first, b_last = clipped_ranges(
            first,
            last,
            i_b * stride_fb + i_t * stride_ft,
            i_b * stride_lb + i_t * stride_lt,
            rows < stop,
            ITEMS,
        )
        m_row = (b_first <= item) & (item <= b_last)
        m_q = m_row[:, None] & m_d[None, :]
        p_q = q + i_b * stride_qb + i_t * stride_qt + i_qh * stride_qh
        p_do = d_out + i_b * stride_gb + i_t * stride_gt + i_qh * stride_gh
        b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q, other=0.0)
        b_do = tl.load(p_do[:, None] + o_d[None, :], mask=m_q, other=0.0)
        o_stat = (i_b * KV_HEADS + i_h) * (T * G) + rows
        b_log2_sum = tl.load(log2_sum + o_stat, mask=m_row, other=0.0)
        b_delta = tl.load(delta + o_stat, mask=m_row, other=0.0)

        # Transposed, so that P and dS feed their products from registers. Keys past R are zeros and
        # so are their gradients; rows that do not see the item are zeros in dO, and in dS.
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION, out_dtype=ACC)
        b_p = tl.exp2(b_s * (SCALE * LOG2E) - b_log2_sum[None, :])  # [BLOCK_R, BLOCK_T]
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION, out_dtype=ACC)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION, out_dtype=ACC)
        b_ds = (b_p * (b_dp - b_delta[None, :]) * (b_tanh * SCALE)).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION, out_dtype=ACC)

    b_dv *= b_tanh
    o_out = (((i_b * ITEMS + o_item) * R + o_r) * KV_HEADS + i_h) * D + o_d[None, :]
    o_out += i_split * stride_split
    m_out = m_r[:, None] & m_d[None, :]
    tl.store(d_k + o_out, b_dk.to(d_k.dtype.element_ty), mask=m_out)
    tl.store(d_v + o_out, b_dv.to(d_v.dtype.element_ty), mask=m_out)
