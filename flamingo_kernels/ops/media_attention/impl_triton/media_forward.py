"""Media attention forward: a program owns a tile of rows of one key/value head.

A decoding step has few rows and perhaps many keys, which are divided over programs: each takes a
share of the keys, and ``media_combine_kernel`` adds the shares in order. Their number comes from
the shapes of one row of the batch alone, so a row's bits do not depend on the batch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._triton.configs import LaunchConfig
from flamingo_kernels._triton.device import LOG2E, online_softmax, tanh
from flamingo_kernels._triton.launch import TARGET_PROGRAMS, launch
from flamingo_kernels.ops.media_attention.arguments import Arguments
from flamingo_kernels.ops.media_attention.impl_triton.media_rows import (
    config_of,
    config_of_item,
    first_block,
    key_ranges,
    keys_of_block,
    next_block,
    pointers,
    row_tile,
    shared_arguments,
    token_and_head,
    tokens_of,
)
from flamingo_kernels.precision import accumulator

# Keys for each program that shares a tile: the fp32 output of 16 rows, written and read back, adds
# 12 % to the bytes of 256 keys in 16 bits.
LEAST_KEYS_OF_SPLIT = 256
MOST_ROWS_OF_SPLIT = 128  # 16 tokens of eight query heads; more rows make more tiles
COMBINE = LaunchConfig(1, 16, 4, 1, "a row's shares, 16 at a time: at most 16 values a thread")


def forward(arguments: Arguments) -> Tensor:
    """See ``operators.forward``."""
    q, latents = arguments.q, arguments.k.shape[2]
    batch, tokens, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    config = config_of_item("media_forward", q, latents) or config_of("media_forward", q)
    shared = shared_arguments(config, arguments)
    one_tile = arguments.single_item and latents <= shared["BLOCK_R"]
    tiles = -(-tokens * shared["G"] // shared["BLOCK_T"])
    splits = _splits(arguments, tiles)
    into, maxima, sums = out, None, None
    if splits > 1:
        partial: dict[str, Any] = {"dtype": accumulator(q.dtype), "device": q.device}
        into = torch.empty((batch * splits, tokens, heads, head_dim), **partial)
        maxima, sums = torch.empty((2, batch * splits, tokens, heads), **partial)
    launch(
        media_forward_kernel,
        (batch * tiles * shared["KV_HEADS"], splits),
        config,
        **shared,
        out=tokens_of(into),
        maxima=maxima,
        sums=sums,
        SPLITS=splits,
        STEP=latents if one_tile else shared["BLOCK_R"],
        ONE_TILE=one_tile,
    )
    if splits > 1:
        launch(
            media_combine_kernel,
            (q.numel() // head_dim,),
            COMBINE,
            partial_out=into,
            maxima=maxima,
            sums=sums,
            gate=arguments.gate,
            out=out,
            ROWS=tokens * heads,
            SPLITS=splits,
            D=head_dim,
            BLOCK_S=COMBINE.keys,
            BLOCK_D=shared["BLOCK_D"],
            ACC=shared["ACC"],
        )
    return out


def _splits(arguments: Arguments, tiles: int) -> int:
    """Return the number of programs among which the keys of a tile of rows are divided."""
    tokens, heads = arguments.q.shape[1:3]
    media, latents, kv_heads = arguments.k.shape[1:4]
    if tokens * (heads // kv_heads) > MOST_ROWS_OF_SPLIT:
        return 1
    keys = latents if arguments.single_item else media * latents
    programs = max(tiles * kv_heads, 1)
    return max(1, min(TARGET_PROGRAMS // programs, keys // LEAST_KEYS_OF_SPLIT))


@triton.jit
def media_forward_kernel(
    q,  # Tokens
    k,  # Media
    v,  # Media
    first,  # Bound
    last,  # Bound
    gate,  # [1] or None
    out,  # Tokens; of the dtype of accumulation, SPLITS for each row of the batch, if there are any
    maxima,  # [B, SPLITS, T, H], of the scores to base 2; None if SPLITS is 1
    sums,  # [B, SPLITS, T, H], of exp2(scores - maximum); None if SPLITS is 1
    T,
    ITEMS,
    KV_HEADS,
    SPLITS,
    SCALE: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,  # keys from one block to the next
    ONE_TILE: tl.constexpr,  # a row's keys are one media item, and one tile holds it
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_b, i_h, rows = row_tile(T, KV_HEADS, G, BLOCK_T)
    i_t, i_qh = token_and_head(rows, i_h, G)
    m_t = rows < T * G
    b_start, b_stop = key_ranges(first, last, i_b, i_t, m_t, ITEMS, R)
    begin = 0
    stop = tl.max(b_stop)
    if maxima is not None:
        begin = tl.min(tl.where(b_stop > 0, b_start, stop))
        share = tl.cdiv(tl.cdiv(stop - begin, SPLITS), BLOCK_R) * BLOCK_R
        begin += tl.program_id(1) * share
        stop = tl.minimum(stop, begin + share)

    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_q = m_t[:, None] & (o_d < D)
    b_q = tl.load(pointers(q, i_b, i_t, i_qh) + o_d, mask=m_q, other=0.0)
    b_max = tl.full([BLOCK_T], float("-inf"), ACC)
    b_sum = tl.zeros([BLOCK_T], ACC)
    b_out = tl.zeros([BLOCK_T, BLOCK_D], ACC)
    block, end, blocks = first_block(b_start, b_stop, begin, stop, R, STEP)
    for _ in tl.range(0, blocks):
        b_k, b_v, m_s = keys_of_block(
            k, v, i_b, i_h, block, end, b_start, b_stop, R, D, STEP, BLOCK_R, BLOCK_D
        )
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
        b_s = tl.where(m_s, b_s * (SCALE * LOG2E), float("-inf"))
        if ONE_TILE:
            m_row = (b_start <= block * STEP) & (block * STEP < b_stop)
            b_p = tl.exp2(b_s - tl.where(m_row, tl.max(b_s, 1), 0.0)[:, None])
            b_sum += tl.sum(b_p, 1)
        else:
            b_p, b_max, b_sum, b_decay = online_softmax(b_s, b_max, b_sum)
            b_out *= b_decay[:, None]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision=PRECISION, out_dtype=ACC)
        block, end = next_block(b_start, b_stop, block, end, stop, R, STEP)
    if maxima is None:
        b_factor = 1.0 / tl.where(b_stop > 0, b_sum, 1.0)
        if gate is not None:
            b_factor *= tanh(tl.load(gate).to(ACC))
        b_out *= b_factor[:, None]
    else:
        i_b = i_b * SPLITS + tl.program_id(1)
        o_row = (i_b * T + i_t) * (KV_HEADS * G) + i_qh
        tl.store(maxima + o_row, b_max, mask=m_t)
        tl.store(sums + o_row, b_sum, mask=m_t)
        m_q = m_q & (b_sum != 0.0)[:, None]  # a share of which a row sees nothing is not read
    p_out = pointers(out, i_b, i_t, i_qh) + o_d
    tl.store(p_out, b_out.to(out.ptr.dtype.element_ty), mask=m_q)


@triton.jit
def media_combine_kernel(
    partial_out,  # [B, SPLITS, T, H, D], relative to the sums
    maxima,  # [B, SPLITS, T, H]
    sums,  # [B, SPLITS, T, H]
    gate,  # [1] or None
    out,  # [B, T, H, D], contiguous
    ROWS,  # T * H
    SPLITS,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program per token and query head."""
    i_row = tl.program_id(0).to(tl.int64)
    o_first = i_row // ROWS * SPLITS * ROWS + i_row % ROWS
    o_d = tl.arange(0, BLOCK_D)
    highest = tl.zeros([], ACC) + float("-inf")
    for s_0 in tl.range(0, SPLITS, BLOCK_S):
        i_s = s_0 + tl.arange(0, BLOCK_S)
        p_max = maxima + o_first + i_s.to(tl.int64) * ROWS
        b_max = tl.load(p_max, mask=i_s < SPLITS, other=float("-inf"))
        highest = tl.maximum(highest, tl.max(b_max))
    highest = tl.where(highest == float("-inf"), 0.0, highest)  # the row sees nothing
    total = tl.zeros([], ACC)
    b_out = tl.zeros([BLOCK_D], ACC)
    for s_0 in tl.range(0, SPLITS, BLOCK_S):
        i_s = s_0 + tl.arange(0, BLOCK_S)
        o_s = o_first + i_s.to(tl.int64) * ROWS
        b_sum = tl.load(sums + o_s, mask=i_s < SPLITS, other=0.0)
        m_s = b_sum != 0.0
        b_max = tl.load(maxima + o_s, mask=m_s, other=float("-inf"))
        b_weight = tl.exp2(b_max - highest)
        p_out = partial_out + o_s[:, None] * D + o_d[None, :]
        b_share = tl.load(p_out, mask=m_s[:, None] & (o_d < D)[None, :], other=0.0)
        total += tl.sum(b_sum * b_weight)
        b_out += tl.sum(b_share * b_weight[:, None], 0)
    b_out *= 1.0 / tl.where(total == 0.0, 1.0, total)
    if gate is not None:
        b_out *= tanh(tl.load(gate).to(ACC))
    tl.store(out + i_row * D + o_d, b_out.to(out.dtype.element_ty), mask=o_d < D)
