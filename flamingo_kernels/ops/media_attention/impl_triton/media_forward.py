"""Media attention forward.

A program owns a tile of rows of one key/value head. The tile's own ranges say which media items it
loops over: there is no mask object and no list of segments. An item that no row of the tile sees is
not read, so it may hold NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._triton.device import LOG2E, online_softmax, tanh
from flamingo_kernels._triton.launch import launch
from flamingo_kernels.ops.media_attention.arguments import Arguments
from flamingo_kernels.ops.media_attention.impl_triton.media_rows import (
    clipped_ranges,
    config_of,
    config_of_item,
    items_of_tile,
    keys_of_step,
    pointers,
    row_tile,
    shared_arguments,
    token_and_head,
    tokens_of,
)


def forward(arguments: Arguments) -> Tensor:
    """See ``operators.forward``."""
    q, latents = arguments.q, arguments.k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    config = config_of_item("media_forward", q, latents) or config_of("media_forward", q)
    shared = shared_arguments(config, arguments)
    tiles = -(-q.shape[1] * shared["G"] // shared["BLOCK_T"])
    launch(
        media_forward_kernel,
        (q.shape[0] * tiles * shared["KV_HEADS"],),
        config,
        **shared,
        out=tokens_of(out),
        ONE_TILE=arguments.single_item and latents <= shared["BLOCK_R"],
    )
    return out


@triton.jit
def media_forward_kernel(
    q,  # Tokens
    k,  # Media
    v,  # Media
    first,  # Bound
    last,  # Bound
    gate,  # [1] or None
    out,  # Tokens
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
    ONE_TILE: tl.constexpr,  # a row's keys are one media item, and one tile holds it
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_b, i_h, rows = row_tile(T, KV_HEADS, G, BLOCK_T)
    i_t, i_qh = token_and_head(rows, i_h, G)
    m_t = rows < T * G
    b_first, b_last = clipped_ranges(first, last, i_b, i_t, m_t, ITEMS)
    m_sees, lowest, highest = items_of_tile(b_first, b_last, ITEMS)

    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_q = m_t[:, None] & (o_d < D)
    b_q = tl.load(pointers(q, i_b, i_t, i_qh) + o_d, mask=m_q, other=0.0)
    b_max = tl.full([BLOCK_T], float("-inf"), ACC)
    b_sum = tl.zeros([BLOCK_T], ACC)
    b_out = tl.zeros([BLOCK_T, BLOCK_D], ACC)
    tiles_of_item: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    for step in tl.range(0, (highest - lowest + 1) * tiles_of_item):
        b_k, b_v, m_row, m_r = keys_of_step(
            k, v, i_b, i_h, step, lowest, b_first, b_last, R, D, BLOCK_R, BLOCK_D
        )
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
        b_s = tl.where(m_row[:, None] & m_r[None, :], b_s * (SCALE * LOG2E), float("-inf"))
        if ONE_TILE:
            b_p = tl.exp2(b_s - tl.where(m_row, tl.max(b_s, 1), 0.0)[:, None])
            b_sum += tl.sum(b_p, 1)
        else:
            b_p, b_max, b_sum, b_decay = online_softmax(b_s, b_max, b_sum)
            b_out *= b_decay[:, None]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision=PRECISION, out_dtype=ACC)

    b_factor = 1.0 / tl.where(m_sees, b_sum, 1.0)
    if gate is not None:
        b_factor *= tanh(tl.load(gate).to(ACC))
    b_out *= b_factor[:, None]
    p_out = pointers(out, i_b, i_t, i_qh) + o_d
    tl.store(p_out, b_out.to(out.ptr.dtype.element_ty), mask=m_q)
