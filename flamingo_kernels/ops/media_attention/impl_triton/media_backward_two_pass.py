"""Media attention backward in two passes, for ranges of several items or items over a tile.

Each pass is final in what it writes: by rows, the softmax statistics and dQ; by keys, dK and dV.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._triton.device import LOG2E, online_softmax
from flamingo_kernels._triton.launch import TARGET_PROGRAMS, launch, reduce_partials
from flamingo_kernels.ops.media_attention.arguments import Arguments
from flamingo_kernels.ops.media_attention.impl_triton.media_rows import (
    config_of,
    first_block,
    key_pointers,
    key_ranges,
    keys_of_block,
    next_block,
    pointers,
    row_tile,
    sees,
    shared_arguments,
    tanh_of_gate,
    token_and_head,
    tokens_of,
)
from flamingo_kernels.ops.media_attention.segment_sizes import items_of_entry
from flamingo_kernels.precision import accumulator


def backward_two_pass(
    segments: Tensor, d_out: Tensor, arguments: Arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k and v, and partial sums of that of tanh(gate)."""
    q, k, v = arguments[:3]
    batch, tokens, media = q.shape[0], q.shape[1], k.shape[1]
    latents, kv_heads = k.shape[2:4]
    rows = tokens * (q.shape[2] // kv_heads)
    sums: dict[str, Any] = {"dtype": accumulator(q.dtype), "device": q.device}
    d_q, d_k, d_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    log2_sum, delta = torch.empty((2, batch, kv_heads, rows), **sums)

    config = config_of("media_rows_backward", q)
    shared = shared_arguments(config, arguments)
    tiles = -(-rows // shared["BLOCK_T"])
    d_tanh = None if arguments.gate is None else torch.empty((batch, tiles, kv_heads), **sums)
    launch(
        media_rows_backward_kernel,
        (batch * tiles * kv_heads,),
        config,
        **shared,
        d_out=tokens_of(d_out),
        d_q=tokens_of(d_q),
        log2_sum=log2_sum,
        delta=delta,
        d_tanh=d_tanh,
    )

    config = config_of("media_keys_backward", q)
    shared = shared_arguments(config, arguments)
    blocks = -(-media * latents // shared["BLOCK_R"])
    programs = batch * blocks * kv_heads
    longest_split = 4 * shared["BLOCK_T"]
    splits = max(1, min(TARGET_PROGRAMS // max(programs, 1), -(-rows // longest_split)))
    final = splits == 1
    into_k, into_v = (d_k, d_v) if final else torch.empty((2, splits, *d_k.shape), **sums)
    launch(
        media_keys_backward_kernel,
        (programs * splits,),
        config,
        **shared,
        d_out=tokens_of(d_out),
        segments=segments,
        log2_sum=log2_sum,
        delta=delta,
        d_k=into_k,
        d_v=into_v,
        ENTRIES=segments.shape[1],
        SHARED=items_of_entry(media, arguments.single_item),
        BLOCKS=blocks,
        SPLITS=splits,
        stride_split=d_k.numel(),
    )
    if not final:
        reduce_partials(into_k, d_k)
        reduce_partials(into_v, d_v)
    return d_q, d_k, d_v, d_tanh


@triton.jit
def media_rows_backward_kernel(
    q,  # Tokens
    k,  # Media
    v,  # Media
    d_out,  # Tokens
    first,  # Bound
    last,  # Bound
    gate,  # [1] or None
    d_q,  # Tokens
    log2_sum,  # [B, Hkv, T * G]: log2 of the sum of exp2(scores * log2(e))
    delta,  # [B, Hkv, T * G]: rowsum(P * dP), before the gate
    d_tanh,  # [B, tiles, Hkv], the gradient of tanh(gate) by program; None without a gate
    T,
    ITEMS,
    KV_HEADS,
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
    i_b, i_h, rows = row_tile(T, KV_HEADS, G, BLOCK_T)
    i_t, i_qh = token_and_head(rows, i_h, G)
    m_t = rows < T * G
    b_start, b_stop = key_ranges(first, last, i_b, i_t, m_t, ITEMS, R)
    stop = tl.max(b_stop)

    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_q = m_t[:, None] & (o_d < D)
    b_q = tl.load(pointers(q, i_b, i_t, i_qh) + o_d, mask=m_q, other=0.0)
    b_do = tl.load(pointers(d_out, i_b, i_t, i_qh) + o_d, mask=m_q, other=0.0)
    b_max = tl.full([BLOCK_T], float("-inf"), ACC)
    b_sum = tl.zeros([BLOCK_T], ACC)
    b_delta = tl.zeros([BLOCK_T], ACC)
    block, end, blocks = first_block(b_start, b_stop, 0, stop, R, BLOCK_R)
    for _ in tl.range(0, blocks):
        b_k, b_v, m_s = keys_of_block(
            k, v, i_b, i_h, block, end, b_start, b_stop, R, D, BLOCK_R, BLOCK_R, BLOCK_D
        )
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
        b_s = tl.where(m_s, b_s * (SCALE * LOG2E), float("-inf"))
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION, out_dtype=ACC)
        b_p, b_max, b_sum, b_decay = online_softmax(b_s, b_max, b_sum)
        b_delta = b_delta * b_decay + tl.sum(b_p * b_dp, 1)
        block, end = next_block(b_start, b_stop, block, end, stop, R, BLOCK_R)
    m_sees = b_stop > 0
    b_delta = b_delta / tl.where(m_sees, b_sum, 1.0)
    b_log2_sum = tl.where(m_sees, b_max + tl.log2(tl.where(m_sees, b_sum, 1.0)), 0.0)
    o_stat = (i_b * KV_HEADS + i_h) * (T * G) + rows
    tl.store(log2_sum + o_stat, b_log2_sum, mask=m_t)
    tl.store(delta + o_stat, b_delta, mask=m_t)
    b_tanh = tanh_of_gate(gate, ACC)
    if gate is not None:
        tl.store(d_tanh + tl.program_id(0), tl.sum(tl.where(m_t, b_delta, 0.0)))

    b_dq = tl.zeros([BLOCK_T, BLOCK_D], ACC)
    block, end, blocks = first_block(b_start, b_stop, 0, stop, R, BLOCK_R)
    for _ in tl.range(0, blocks):
        b_k, b_v, m_s = keys_of_block(
            k, v, i_b, i_h, block, end, b_start, b_stop, R, D, BLOCK_R, BLOCK_R, BLOCK_D
        )
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
        b_s = tl.where(m_s, b_s * (SCALE * LOG2E), float("-inf"))
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION, out_dtype=ACC)
        b_p = tl.exp2(b_s - b_log2_sum[:, None])
        b_ds = (b_p * (b_dp - b_delta[:, None]) * (b_tanh * SCALE)).to(b_q.dtype)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION, out_dtype=ACC)
        block, end = next_block(b_start, b_stop, block, end, stop, R, BLOCK_R)
    p_dq = pointers(d_q, i_b, i_t, i_qh) + o_d
    tl.store(p_dq, b_dq.to(d_q.ptr.dtype.element_ty), mask=m_q)


@triton.jit
def media_keys_backward_kernel(
    q,  # Tokens
    k,  # Media
    v,  # Media
    d_out,  # Tokens
    first,  # Bound
    last,  # Bound
    gate,  # [1] or None
    segments,  # int32 [B, ENTRIES, 4], see media_segments.py
    log2_sum,  # [B, Hkv, T * G]
    delta,  # [B, Hkv, T * G]
    d_k,  # [SPLITS, B, I, R, Hkv, D]: final where SPLITS is 1, else partial sums
    d_v,  # like d_k
    T,
    ITEMS,
    ENTRIES,
    BLOCKS,
    KV_HEADS,
    SPLITS,
    SHARED,  # items of an entry of the table
    stride_split,
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
    """One program per block of keys and share of the rows of the segments that it touches."""
    pid = tl.program_id(0)
    i_h = (pid % KV_HEADS).to(tl.int64)
    i_block = pid // KV_HEADS % BLOCKS
    i_split = (pid // (KV_HEADS * BLOCKS) % SPLITS).to(tl.int64)
    i_b = (pid // (KV_HEADS * BLOCKS) // SPLITS).to(tl.int64)
    key = i_block * BLOCK_R
    block = i_block if R % BLOCK_R == 0 else key
    key_end = tl.minimum(key + BLOCK_R, ITEMS * R)
    i_k = tl.arange(0, BLOCK_R)
    keys = key + i_k

    i_e = key // R // SHARED + i_k
    m_e = i_e <= (key_end - 1) // R // SHARED
    p_entry = segments + (i_b * ENTRIES + i_e) * 4
    start = tl.min(tl.load(p_entry, mask=m_e, other=T)) * G
    end = tl.max(tl.load(p_entry + 1, mask=m_e, other=0)) * G
    share = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), SPLITS), BLOCK_T) * BLOCK_T
    start += (i_split * share).to(tl.int32)
    stop = tl.minimum(start + share, end)

    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < D
    m_kv = (keys < tl.where(start < stop, key_end, 0))[:, None] & m_d
    b_k = tl.load(key_pointers(k, i_b, i_h, block, i_k, R, BLOCK_R) + o_d, mask=m_kv, other=0.0)
    b_v = tl.load(key_pointers(v, i_b, i_h, block, i_k, R, BLOCK_R) + o_d, mask=m_kv, other=0.0)
    b_tanh = tanh_of_gate(gate, ACC)

    b_dk = tl.zeros([BLOCK_R, BLOCK_D], ACC)
    b_dv = tl.zeros([BLOCK_R, BLOCK_D], ACC)
    for row_0 in tl.range(start, stop, BLOCK_T):
        rows = row_0 + tl.arange(0, BLOCK_T)
        i_t, i_qh = token_and_head(rows, i_h, G)
        b_start, b_stop = key_ranges(first, last, i_b, i_t, rows < stop, ITEMS, R)
        m_row = tl.maximum(b_start, key) < tl.minimum(b_stop, key_end)
        m_q = m_row[:, None] & m_d
        b_q = tl.load(pointers(q, i_b, i_t, i_qh) + o_d, mask=m_q, other=0.0)
        b_do = tl.load(pointers(d_out, i_b, i_t, i_qh) + o_d, mask=m_q, other=0.0)
        o_stat = (i_b * KV_HEADS + i_h) * (T * G) + rows
        b_log2_sum = tl.load(log2_sum + o_stat, mask=m_row, other=0.0)
        b_delta = tl.load(delta + o_stat, mask=m_row, other=0.0)

        # Transposed, so that P and dS feed their products from registers. Rows that see nothing of
        # the block are zeros in dO, and in dS. A key that no row sees may hold NaN.
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION, out_dtype=ACC)
        b_s = b_s * (SCALE * LOG2E) - b_log2_sum[None, :]  # [BLOCK_R, BLOCK_T]
        if R % BLOCK_R != 0:  # rows may see a part of the block
            m_s = sees(b_start[None, :], b_stop[None, :], keys[:, None])
            b_s = tl.where(m_s, b_s, float("-inf"))
        b_p = tl.exp2(b_s)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION, out_dtype=ACC)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION, out_dtype=ACC)
        b_ds = b_p * (b_dp - b_delta[None, :]) * (b_tanh * SCALE)
        if R % BLOCK_R != 0:
            b_ds = tl.where(m_s, b_ds, 0.0)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION, out_dtype=ACC)

    b_dv *= b_tanh
    o_out = ((i_b * ITEMS * R + keys.to(tl.int64)[:, None]) * KV_HEADS + i_h) * D + o_d
    o_out += i_split * stride_split
    m_out = (keys < key_end)[:, None] & m_d
    tl.store(d_k + o_out, b_dk.to(d_k.dtype.element_ty), mask=m_out)
    tl.store(d_v + o_out, b_dv.to(d_v.dtype.element_ty), mask=m_out)
