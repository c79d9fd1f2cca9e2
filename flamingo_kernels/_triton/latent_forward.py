"""Latent attention forward: a tile of latents against the features of an item, then the latents.

Keys and values come from two sources that are never concatenated. Key blocks are counted through
both: first those of the media, then those of the latents. Long items are split: a program takes
STEPS blocks and ``latent_combine_kernel`` adds the splits in order. How many there are depends on
the shape of one item alone, so its bits do not depend on the batch.

Shape letters: N items, L latents, M media keys, H heads, D head dim, S splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flamingo_kernels._triton.device import LN2, LOG2E


@triton.jit
def latent_forward_kernel(
    q,  # [N, L, H, D]
    k_media,  # [N, M, H, D]
    v_media,  # [N, M, H, D]
    k_latents,  # [N, L, H, D]
    v_latents,  # [N, L, H, D]
    lengths,  # integer [N], valid media keys, or None
    out,  # [N, L, H, D]; with IS_SPLIT [S, N, L, H, D], the dtype of accumulation
    lse,  # [N, H, L]; with IS_SPLIT [S, N, H, L], to base 2
    N,
    L,
    M,
    H,
    SPLITS,
    STEPS,
    stride_qn,
    stride_ql,
    stride_qh,
    stride_kn,
    stride_km,
    stride_kh,
    stride_vn,
    stride_vm,
    stride_vh,
    stride_kln,
    stride_kll,
    stride_klh,
    stride_vln,
    stride_vll,
    stride_vlh,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_h = (tl.program_id(0) % H).to(tl.int64)
    i_tile = tl.program_id(0) // H % tl.cdiv(L, BLOCK_L)
    i_ns = tl.program_id(0) // H // tl.cdiv(L, BLOCK_L)
    i_split = i_ns % SPLITS
    i_n = (i_ns // SPLITS).to(tl.int64)

    i_l = i_tile * BLOCK_L + tl.arange(0, BLOCK_L)
    o_l = i_l.to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_q = (i_l < L)[:, None] & (o_d < D)[None, :]
    p_q = q + i_n * stride_qn + i_h * stride_qh + o_l[:, None] * stride_ql
    b_q = tl.load(p_q + o_d[None, :], mask=m_q, other=0.0)
    length = valid_keys(lengths, i_n, M)

    b_max = tl.full([BLOCK_L], float("-inf"), ACC)
    b_sum = tl.zeros([BLOCK_L], ACC)
    b_out = tl.zeros([BLOCK_L, BLOCK_D], ACC)
    media_blocks = tl.cdiv(M, BLOCK_K)
    begin = i_split * STEPS
    end = begin + STEPS
    p_k = k_media + i_n * stride_kn + i_h * stride_kh
    p_v = v_media + i_n * stride_vn + i_h * stride_vh
    for block in tl.range(begin, tl.minimum(end, tl.cdiv(length, BLOCK_K))):
        b_max, b_sum, b_out = _attend(
            b_q, p_k, p_v, block, stride_km, stride_vm, length, b_max, b_sum, b_out,
            SCALE, D, BLOCK_K, BLOCK_D, ACC, PRECISION,
        )  # fmt: skip
    p_k = k_latents + i_n * stride_kln + i_h * stride_klh
    p_v = v_latents + i_n * stride_vln + i_h * stride_vlh
    latent_end = tl.minimum(end - media_blocks, tl.cdiv(L, BLOCK_K))
    for block in tl.range(tl.maximum(begin - media_blocks, 0), latent_end):
        b_max, b_sum, b_out = _attend(
            b_q, p_k, p_v, block, stride_kll, stride_vll, L, b_max, b_sum, b_out,
            SCALE, D, BLOCK_K, BLOCK_D, ACC, PRECISION,
        )  # fmt: skip

    # A split may hold no key: its weight, 2 to the power of its log-sum-exp, is 0.
    b_filled = b_sum > 0.0
    b_sum = tl.where(b_filled, b_sum, 1.0)
    b_out *= (1.0 / b_sum)[:, None]
    b_lse = tl.where(b_filled, b_max + tl.log2(b_sum), float("-inf"))
    o_item = i_n
    if IS_SPLIT:
        o_item += i_split.to(tl.int64) * N
    else:
        b_lse *= LN2
    o_out = ((o_item * L + o_l[:, None]) * H + i_h) * D + o_d[None, :]
    tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=m_q)
    tl.store(lse + (o_item * H + i_h) * L + o_l, b_lse, mask=i_l < L)


@triton.jit
def latent_combine_kernel(
    partial_out,  # [S, N, L, H, D]
    partial_lse,  # [S, N, H, L], to base 2
    out,  # [N, L, H, D]
    lse,  # [N, H, L]
    N,
    L,
    H,
    SPLITS,
    D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    i_h = (tl.program_id(0) % H).to(tl.int64)
    i_tile = tl.program_id(0) // H % tl.cdiv(L, BLOCK_L)
    i_n = (tl.program_id(0) // H // tl.cdiv(L, BLOCK_L)).to(tl.int64)
    i_l = i_tile * BLOCK_L + tl.arange(0, BLOCK_L)
    o_l = i_l.to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_l = i_l < L
    m_q = m_l[:, None] & (o_d < D)[None, :]
    o_out = ((i_n * L + o_l[:, None]) * H + i_h) * D + o_d[None, :]
    o_lse = (i_n * H + i_h) * L + o_l
    next_lse = (i_n * 0 + N) * L * H
    b_max = tl.full([BLOCK_L], float("-inf"), ACC)
    p_lse = partial_lse + o_lse
    for _ in tl.range(0, SPLITS):
        b_max = tl.maximum(b_max, tl.load(p_lse, mask=m_l, other=0.0))
        p_lse += next_lse
    b_sum = tl.zeros([BLOCK_L], ACC)
    b_out = tl.zeros([BLOCK_L, BLOCK_D], ACC)
    p_lse = partial_lse + o_lse
    p_out = partial_out + o_out
    for _ in tl.range(0, SPLITS):
        b_weight = tl.exp2(tl.load(p_lse, mask=m_l, other=0.0) - b_max)
        b_sum += b_weight
        b_out += b_weight[:, None] * tl.load(p_out, mask=m_q, other=0.0)
        p_lse += next_lse
        p_out += next_lse * D
    b_out *= (1.0 / b_sum)[:, None]
    tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=m_q)
    tl.store(lse + o_lse, (b_max + tl.log2(b_sum)) * LN2, mask=m_l)


@triton.jit
def valid_keys(lengths, i_n, M):
    """Valid media keys of an item, all M without ``lengths``."""
    length = i_n.to(tl.int32) * 0 + M
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + i_n).to(tl.int32), 0), length)
    return length


@triton.jit
def _attend(
    b_q,
    p_k,
    p_v,
    block,
    stride_k,
    stride_v,
    limit,
    b_max,
    b_sum,
    b_out,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take one block of keys, of which at least one is before ``limit``, into the softmax."""
    i_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    o_k = i_k.to(tl.int64)[:, None]
    o_d = tl.arange(0, BLOCK_D)
    m_k = i_k < limit
    m_kv = m_k[:, None] & (o_d < D)[None, :]
    b_k = tl.load(p_k + o_k * stride_k + o_d[None, :], mask=m_kv, other=0.0)
    b_v = tl.load(p_v + o_k * stride_v + o_d[None, :], mask=m_kv, other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
    b_s = tl.where(m_k[None, :], b_s * (SCALE * LOG2E), float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_decay = tl.exp2(b_max - b_new)
    b_p = tl.exp2(b_s - b_new[:, None])  # [BLOCK_L, BLOCK_K]
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_out *= b_decay[:, None]
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision=PRECISION, out_dtype=ACC)
    return b_new, b_sum, b_out
