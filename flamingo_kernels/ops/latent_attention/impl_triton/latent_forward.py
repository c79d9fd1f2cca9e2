"""Latent attention forward: a tile of latents against the features of an item, then the latents.

Keys and values come from two sources that are never concatenated. Key blocks are counted through
both: first those of the media, then those of the latents. Long items are split: a program takes
STEPS blocks, and ``latent_combine_kernel`` adds the splits in order. The number of splits depends
on the shape of one item alone, so an item's bits do not depend on the batch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._triton.configs import LaunchConfig
from flamingo_kernels._triton.device import LN2, LOG2E, online_softmax
from flamingo_kernels._triton.launch import launch, padded
from flamingo_kernels.ops.latent_attention.arguments import Arguments
from flamingo_kernels.ops.latent_attention.impl_triton.latent_rows import (
    blocks_of,
    config_of,
    keys_of_block,
    latent_and_head,
    pointers,
    row_tile,
    shared_arguments,
    valid_keys,
)
from flamingo_kernels.precision import accumulator

COMBINE = LaunchConfig(16, 1, 4, 1, "16 latents by the head dim: at most 16 values a thread")
# Keys of a forward split: its partial output adds 8 bytes a latent and channel, written and read
# back, to 4 bytes a key and channel in 16 bits: 12 % for 64 latents. Images are never split.
SPLIT_KEYS = 1024


def forward(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """See ``operators.forward``."""
    q = arguments.q
    config = config_of("latent_forward", q)
    shared = shared_arguments(config, arguments)
    items, latents, heads, head_dim = q.shape
    sums: dict[str, Any] = {"dtype": accumulator(q.dtype), "device": q.device}
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((items, heads, latents), **sums)
    steps = -(-SPLIT_KEYS // config.keys)
    splits = max(1, -(-blocks_of(shared) // steps))
    into, into_lse = out, lse
    if splits > 1:
        into = torch.empty((splits, *out.shape), **sums)
        into_lse = torch.empty((splits, *lse.shape), **sums)
    tiles = -(-latents * shared["G"] // shared["BLOCK_L"])
    launch(
        latent_forward_kernel,
        (items * splits * tiles * shared["KV_HEADS"],),
        config,
        **shared,
        out=into,
        lse=into_lse,
        SPLITS=splits,
        STEPS=steps,
        IS_SPLIT=splits > 1,
    )
    if splits > 1:
        block_l = min(padded(latents), COMBINE.rows)
        launch(
            latent_combine_kernel,
            (items * -(-latents // block_l) * heads,),
            COMBINE,
            partial_out=into,
            partial_lse=into_lse,
            out=out,
            lse=lse,
            N=items,
            L=latents,
            H=heads,
            SPLITS=splits,
            D=head_dim,
            BLOCK_L=block_l,
            BLOCK_D=shared["BLOCK_D"],
            ACC=shared["ACC"],
        )
    return out, lse


@triton.jit
def latent_forward_kernel(
    q,  # Rows
    k_media,  # Rows
    v_media,  # Rows
    k_latents,  # Rows
    v_latents,  # Rows
    lengths,  # integer [N], valid media keys, or None
    out,  # [N, L, H, D]; with IS_SPLIT [S, N, L, H, D], the dtype of accumulation
    lse,  # [N, H, L]; with IS_SPLIT [S, N, H, L], to base 2
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
    IS_SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_n, i_h, i_split, _i_tile, rows = row_tile(L, KV_HEADS, SPLITS, G, BLOCK_L)
    o_l, i_qh = latent_and_head(rows, i_h, G)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_l = rows < L * G
    m_q = m_l[:, None] & (o_d < D)
    b_q = tl.load(pointers(q, i_n, i_qh, o_l) + o_d, mask=m_q, other=0.0)
    length = valid_keys(lengths, i_n, M)

    b_max = tl.full([BLOCK_L], float("-inf"), ACC)
    b_sum = tl.zeros([BLOCK_L], ACC)
    b_out = tl.zeros([BLOCK_L, BLOCK_D], ACC)
    media_blocks = tl.cdiv(M, BLOCK_K)
    begin = i_split * STEPS
    end = begin + STEPS
    for block in tl.range(begin, tl.minimum(end, tl.cdiv(length, BLOCK_K))):
        b_k, b_v, _i_k, m_k = keys_of_block(
            k_media, v_media, i_n, i_h, block, length, D, BLOCK_K, BLOCK_D
        )
        b_max, b_sum, b_out = _attend(
            b_q, b_k, b_v, m_k, b_max, b_sum, b_out, SCALE, ACC, PRECISION
        )
    latent_end = tl.minimum(end - media_blocks, tl.cdiv(L, BLOCK_K))
    for block in tl.range(tl.maximum(begin - media_blocks, 0), latent_end):
        b_k, b_v, _i_k, m_k = keys_of_block(
            k_latents, v_latents, i_n, i_h, block, L, D, BLOCK_K, BLOCK_D
        )
        b_max, b_sum, b_out = _attend(
            b_q, b_k, b_v, m_k, b_max, b_sum, b_out, SCALE, ACC, PRECISION
        )

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
    heads = KV_HEADS * G
    o_out = ((o_item * L + o_l) * heads + i_qh)[:, None] * D + o_d
    tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=m_q)
    tl.store(lse + (o_item * heads + i_qh) * L + o_l, b_lse, mask=m_l)


@triton.jit
def _attend(
    b_q,
    b_k,
    b_v,
    m_k,
    b_max,
    b_sum,
    b_out,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take one block of keys into the softmax."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
    b_s = tl.where(m_k[None, :], b_s * (SCALE * LOG2E), float("-inf"))
    b_p, b_max, b_sum, b_decay = online_softmax(b_s, b_max, b_sum)
    b_out *= b_decay[:, None]
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision=PRECISION, out_dtype=ACC)
    return b_max, b_sum, b_out


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
