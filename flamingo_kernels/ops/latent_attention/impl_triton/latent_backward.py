"""Latent attention backward: the rows of a tile stay resident, a loop runs over the key blocks.

dK and dV of a block are final, dQ accumulates. Where there are few items and heads, keys are split
over programs and the splits of dQ are summed in order; where the latents of all query heads of a
group do not fit one tile, so are the tiles' shares of dK and dV. Key blocks are counted as in the
forward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._triton.device import LOG2E
from flamingo_kernels._triton.launch import TARGET_PROGRAMS, launch, reduce_partials
from flamingo_kernels.ops.latent_attention.arguments import Arguments
from flamingo_kernels.ops.latent_attention.impl_triton.latent_rows import (
    blocks_of,
    config_of,
    keys_of_block,
    latent_and_head,
    pointers,
    row_tile,
    rows_of,
    shared_arguments,
    valid_keys,
)
from flamingo_kernels.precision import accumulator

ONE_TILE = 64  # rows: all latents of a published resampler. The fp32 shares of more take registers.


def backward(
    d_out: Tensor, arguments: Arguments, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``operators.backward``."""
    q = arguments.q
    items, latents, heads, _ = q.shape
    kv_heads = arguments.k_media.shape[2]
    rows = latents * heads // max(kv_heads, 1)
    config = config_of("latent_backward" if rows <= ONE_TILE else "latent_shares_backward", q)
    shared = shared_arguments(config, arguments)
    tiles = -(-rows // shared["BLOCK_L"])
    blocks = blocks_of(shared)
    splits = max(1, min(TARGET_PROGRAMS // max(items * kv_heads * tiles, 1), blocks))
    steps = -(-blocks // splits)
    splits = -(-blocks // steps)

    gradients = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in arguments[:5]]
    shares = [splits, tiles, tiles, tiles, tiles]
    into = [
        gradient
        if count == 1
        else torch.empty(
            (count, *gradient.shape), dtype=accumulator(q.dtype), device=gradient.device
        )
        for gradient, count in zip(gradients, shares, strict=True)
    ]
    names = ("d_q", "d_k_media", "d_v_media", "d_k_latents", "d_v_latents")
    launch(
        latent_backward_kernel,
        (items * splits * tiles * kv_heads,),
        config,
        **shared,
        **dict(zip(names, into, strict=True)),
        out=rows_of(out),
        d_out=rows_of(d_out),
        lse=lse.contiguous(),
        SPLITS=splits,
        STEPS=steps,
    )
    for partials, gradient, count in zip(into, gradients, shares, strict=True):
        if count > 1:
            reduce_partials(partials, gradient)
    d_q, d_k_media, d_v_media, d_k_latents, d_v_latents = gradients
    return d_q, d_k_media, d_v_media, d_k_latents, d_v_latents


@triton.jit
def latent_backward_kernel(
    q,  # Rows
    k_media,  # Rows
    v_media,  # Rows
    k_latents,  # Rows
    v_latents,  # Rows
    lengths,  # integer [N] or None
    out,  # Rows
    d_out,  # Rows
    lse,  # [N, H, L], contiguous
    d_q,  # [SPLITS, N, L, H, D], final where SPLITS is 1
    d_k_media,  # [TILES, N, M, Hkv, D], final where the rows fit one tile
    d_v_media,  # like d_k_media
    d_k_latents,  # [TILES, N, L, Hkv, D], final where the rows fit one tile
    d_v_latents,  # like d_k_latents
    N,
    L,
    M,
    KV_HEADS,
    SPLITS,
    STEPS,
    SCALE: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_n, i_h, i_split, i_tile, rows = row_tile(L, KV_HEADS, SPLITS, G, BLOCK_L)
    o_l, i_qh = latent_and_head(rows, i_h, G)
    heads = KV_HEADS * G
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_l = rows < L * G
    m_q = m_l[:, None] & (o_d < D)
    b_q = tl.load(pointers(q, i_n, i_qh, o_l) + o_d, mask=m_q, other=0.0)
    b_do = tl.load(pointers(d_out, i_n, i_qh, o_l) + o_d, mask=m_q, other=0.0)
    b_out = tl.load(pointers(out, i_n, i_qh, o_l) + o_d, mask=m_q, other=0.0)
    b_delta = tl.sum(b_do.to(ACC) * b_out.to(ACC), 1)
    b_lse = tl.load(lse + (i_n * heads + i_qh) * L + o_l, mask=m_l, other=0.0) * LOG2E
    length = valid_keys(lengths, i_n, M)

    b_dq = tl.zeros([BLOCK_L, BLOCK_D], ACC)
    media_blocks = tl.cdiv(M, BLOCK_K)
    begin = i_split * STEPS
    end = begin + STEPS
    media_end = tl.minimum(end, tl.cdiv(length, BLOCK_K))
    o_share = i_tile.to(tl.int64) * N + i_n
    o_dk = (o_share * M * KV_HEADS + i_h) * D
    for block in tl.range(begin, media_end):
        b_k, b_v, i_k, m_k = keys_of_block(
            k_media, v_media, i_n, i_h, block, length, D, BLOCK_K, BLOCK_D
        )
        b_dk, b_dv, b_dq = _gradients(
            b_q, b_k, b_v, m_k, b_do, b_delta, b_lse, b_dq, SCALE, ACC, PRECISION
        )
        _store_block(d_k_media + o_dk, b_dk, i_k, M, KV_HEADS, D)
        _store_block(d_v_media + o_dk, b_dv, i_k, M, KV_HEADS, D)
    for block in tl.range(tl.maximum(media_end, begin), tl.minimum(end, media_blocks)):
        i_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        b_zero = tl.zeros([BLOCK_K, BLOCK_D], ACC)
        _store_block(d_k_media + o_dk, b_zero, i_k, M, KV_HEADS, D)
        _store_block(d_v_media + o_dk, b_zero, i_k, M, KV_HEADS, D)
    o_dk = (o_share * L * KV_HEADS + i_h) * D
    latent_end = tl.minimum(end - media_blocks, tl.cdiv(L, BLOCK_K))
    for block in tl.range(tl.maximum(begin - media_blocks, 0), latent_end):
        b_k, b_v, i_k, m_k = keys_of_block(
            k_latents, v_latents, i_n, i_h, block, L, D, BLOCK_K, BLOCK_D
        )
        b_dk, b_dv, b_dq = _gradients(
            b_q, b_k, b_v, m_k, b_do, b_delta, b_lse, b_dq, SCALE, ACC, PRECISION
        )
        _store_block(d_k_latents + o_dk, b_dk, i_k, L, KV_HEADS, D)
        _store_block(d_v_latents + o_dk, b_dv, i_k, L, KV_HEADS, D)

    o_q = i_split.to(tl.int64) * N + i_n
    o_q = ((o_q * L + o_l) * heads + i_qh)[:, None] * D + o_d
    tl.store(d_q + o_q, b_dq.to(d_q.dtype.element_ty), mask=m_q)


@triton.jit
def _gradients(
    b_q,
    b_k,
    b_v,
    m_k,
    b_do,
    b_delta,
    b_lse,
    b_dq,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return dK and dV of one block of keys, and dQ with its share added."""
    # Transposed, so that P and dS feed the products for dV and dK from registers.
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION, out_dtype=ACC)
    b_p = tl.exp2(b_s * (SCALE * LOG2E) - b_lse[None, :])
    b_p = tl.where(m_k[:, None], b_p, 0.0)  # [BLOCK_K, BLOCK_L]
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, input_precision=PRECISION, out_dtype=ACC)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION, out_dtype=ACC)
    b_ds = (b_p * (b_dp - b_delta[None, :]) * SCALE).to(b_q.dtype)
    b_dk = tl.dot(b_ds, b_q, input_precision=PRECISION, out_dtype=ACC)
    b_dq = tl.dot(tl.trans(b_ds), b_k, b_dq, input_precision=PRECISION, out_dtype=ACC)
    return b_dk, b_dv, b_dq


@triton.jit
def _store_block(p_x, b_x, i_k, size, H, D: tl.constexpr):
    """Store a block [BLOCK_K, BLOCK_D] of the rows before ``size`` of one head of [size, H, D]."""
    o_d = tl.arange(0, b_x.shape[1])[None, :]
    o_x = i_k.to(tl.int64)[:, None] * (H * D) + o_d
    tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty), mask=(i_k < size)[:, None] & (o_d < D))
