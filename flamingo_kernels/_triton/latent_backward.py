"""Latent attention backward: the latents of a tile stay resident, a loop runs over the key blocks.

dK and dV of a block are final, dQ accumulates. Where there are few items and heads, keys are split
over programs and the splits of dQ are summed in order; where the latents do not fit one tile, so
are the tiles' shares of dK and dV. Key blocks are counted as in the forward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flamingo_kernels._triton.device import LOG2E
from flamingo_kernels._triton.latent_forward import valid_keys


@triton.jit
def latent_backward_kernel(
    q,  # [N, L, H, D]
    k_media,  # [N, M, H, D]
    v_media,  # [N, M, H, D]
    k_latents,  # [N, L, H, D]
    v_latents,  # [N, L, H, D]
    lengths,  # integer [N] or None
    out,  # [N, L, H, D]
    d_out,  # [N, L, H, D]
    lse,  # [N, H, L], contiguous
    d_q,  # [SPLITS, N, L, H, D], final where SPLITS is 1
    d_k_media,  # [TILES, N, M, H, D], final where the latents fit one tile
    d_v_media,  # like d_k_media
    d_k_latents,  # [TILES, N, L, H, D], final where the latents fit one tile
    d_v_latents,  # like d_k_latents
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
    stride_on,
    stride_ol,
    stride_oh,
    stride_gn,
    stride_gl,
    stride_gh,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
    m_l = i_l < L
    m_q = m_l[:, None] & (o_d < D)[None, :]
    p_q = q + i_n * stride_qn + i_h * stride_qh + o_l[:, None] * stride_ql
    p_out = out + i_n * stride_on + i_h * stride_oh + o_l[:, None] * stride_ol
    p_do = d_out + i_n * stride_gn + i_h * stride_gh + o_l[:, None] * stride_gl
    b_q = tl.load(p_q + o_d[None, :], mask=m_q, other=0.0)
    b_do = tl.load(p_do + o_d[None, :], mask=m_q, other=0.0)
    b_out = tl.load(p_out + o_d[None, :], mask=m_q, other=0.0)
    b_delta = tl.sum(b_do.to(ACC) * b_out.to(ACC), 1)
    b_lse = tl.load(lse + (i_n * H + i_h) * L + o_l, mask=m_l, other=0.0) * LOG2E
    length = valid_keys(lengths, i_n, M)

    b_dq = tl.zeros([BLOCK_L, BLOCK_D], ACC)
    media_blocks = tl.cdiv(M, BLOCK_K)
    begin = i_split * STEPS
    end = begin + STEPS
    media_end = tl.minimum(end, tl.cdiv(length, BLOCK_K))
    o_share = i_tile.to(tl.int64) * N + i_n
    p_k = k_media + i_n * stride_kn + i_h * stride_kh
    p_v = v_media + i_n * stride_vn + i_h * stride_vh
    o_dk = (o_share * M * H + i_h) * D
    for block in tl.range(begin, media_end):
        b_dq = _block(
            b_q, b_do, b_delta, b_lse, b_dq, p_k, p_v, d_k_media + o_dk, d_v_media + o_dk, block,
            stride_km, stride_vm, H, M, length,
            SCALE, D, BLOCK_K, BLOCK_D, ACC, PRECISION,
        )  # fmt: skip
    for block in tl.range(tl.maximum(media_end, begin), tl.minimum(end, media_blocks)):
        i_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        o_k = o_dk + i_k.to(tl.int64)[:, None] * (H * D) + o_d[None, :]
        m_k = (i_k < M)[:, None] & (o_d < D)[None, :]
        b_zero = tl.zeros([BLOCK_K, BLOCK_D], d_k_media.dtype.element_ty)
        tl.store(d_k_media + o_k, b_zero, mask=m_k)
        tl.store(d_v_media + o_k, b_zero, mask=m_k)
    p_k = k_latents + i_n * stride_kln + i_h * stride_klh
    p_v = v_latents + i_n * stride_vln + i_h * stride_vlh
    o_dk = (o_share * L * H + i_h) * D
    latent_end = tl.minimum(end - media_blocks, tl.cdiv(L, BLOCK_K))
    for block in tl.range(tl.maximum(begin - media_blocks, 0), latent_end):
        b_dq = _block(
            b_q, b_do, b_delta, b_lse, b_dq, p_k, p_v, d_k_latents + o_dk, d_v_latents + o_dk,
            block, stride_kll, stride_vll, H, L, L,
            SCALE, D, BLOCK_K, BLOCK_D, ACC, PRECISION,
        )  # fmt: skip

    o_q = i_split.to(tl.int64) * N + i_n
    o_q = ((o_q * L + o_l[:, None]) * H + i_h) * D + o_d[None, :]
    tl.store(d_q + o_q, b_dq.to(d_q.dtype.element_ty), mask=m_q)


@triton.jit
def _block(
    b_q,
    b_do,
    b_delta,
    b_lse,
    b_dq,
    p_k,
    p_v,
    p_dk,
    p_dv,
    block,
    stride_k,
    stride_v,
    H,
    size,  # keys of this source
    limit,  # valid ones
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one block of keys, stored, and its share of dQ, returned in ``b_dq``."""
    i_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    o_k = i_k.to(tl.int64)[:, None]
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    m_k = i_k < limit
    b_k = tl.load(p_k + o_k * stride_k + o_d[None, :], mask=m_k[:, None] & m_d, other=0.0)
    b_v = tl.load(p_v + o_k * stride_v + o_d[None, :], mask=m_k[:, None] & m_d, other=0.0)
    # Transposed, so that P and dS feed the products for dV and dK from registers.
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION, out_dtype=ACC)
    b_p = tl.exp2(b_s * (SCALE * LOG2E) - b_lse[None, :])
    b_p = tl.where(m_k[:, None], b_p, 0.0)  # [BLOCK_K, BLOCK_L]
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, input_precision=PRECISION, out_dtype=ACC)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION, out_dtype=ACC)
    b_ds = (b_p * (b_dp - b_delta[None, :]) * SCALE).to(b_q.dtype)
    b_dk = tl.dot(b_ds, b_q, input_precision=PRECISION, out_dtype=ACC)
    b_dq = tl.dot(tl.trans(b_ds), b_k, b_dq, input_precision=PRECISION, out_dtype=ACC)
    o_dk = o_k * (H * D) + o_d[None, :]
    m_out = (i_k < size)[:, None] & m_d
    tl.store(p_dk + o_dk, b_dk.to(p_dk.dtype.element_ty), mask=m_out)
    tl.store(p_dv + o_dk, b_dv.to(p_dv.dtype.element_ty), mask=m_out)
    return b_dq
