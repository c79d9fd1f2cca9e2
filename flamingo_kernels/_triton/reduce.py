"""Sums of partial results in a fixed order: the same bits on every run, no atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from flamingo_kernels._triton.device import tanh


@triton.jit
def sum_partials_kernel(
    partials,  # [COUNT, SIZE], the dtype of accumulation
    gate,  # [SIZE] or None
    out,  # [SIZE]
    COUNT,
    SIZE,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over COUNT; with a gate, of the gradient of its tanh: ``(1 - tanh(gate)^2) * sum``."""
    i_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_x = i_x < SIZE
    b_sum = tl.zeros([BLOCK_ROWS, BLOCK], partials.dtype.element_ty)
    for i_0 in tl.range(0, COUNT, BLOCK_ROWS):
        i_row = i_0 + tl.arange(0, BLOCK_ROWS)
        m_row = i_row < COUNT
        b_sum += tl.load(
            partials + i_row.to(tl.int64)[:, None] * SIZE + i_x[None, :],
            mask=m_row[:, None] & m_x[None, :],
            other=0.0,
        )
    b_out = tl.sum(b_sum, 0)
    if gate is not None:
        b_tanh = tanh(tl.load(gate + i_x, mask=m_x, other=0.0).to(partials.dtype.element_ty))
        b_out *= 1.0 - b_tanh * b_tanh
    tl.store(out + i_x, b_out.to(out.dtype.element_ty), mask=m_x)


@triton.jit
def sum_media_partials_kernel(
    plan,  # int32 [B, ENTRIES, 4], see plan.py
    partials,  # [2, B, PARTIALS, Hkv, R * D]: of dK, then of dV
    d_k,  # [B, I, R, Hkv, D]
    d_v,  # [B, I, R, Hkv, D]
    ITEMS,
    ENTRIES,
    PARTIALS,
    KV_HEADS,
    stride_partial,  # from the partial sums of dK to those of dV
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Items whose tokens are in several chunks; the others are final already."""
    i_h = tl.program_id(0) % KV_HEADS
    i_bi = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    i_b = i_bi // ITEMS
    p_item = plan + (i_b * ENTRIES + i_bi % ITEMS) * 4
    place = tl.load(p_item + 2)
    count = tl.load(p_item + 3)
    o_x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < R * D
    o_out = (i_bi * R + o_x // D) * (KV_HEADS * D) + i_h * D + o_x % D
    if count > 0:
        size_of_one = KV_HEADS * (R * D)
        o_partial = (i_b * PARTIALS + place) * size_of_one + i_h * (R * D) + o_x
        b_k = tl.zeros([BLOCK], partials.dtype.element_ty)
        b_v = tl.zeros([BLOCK], partials.dtype.element_ty)
        for _ in tl.range(0, count):
            b_k += tl.load(partials + o_partial, mask=m_x, other=0.0)
            b_v += tl.load(partials + stride_partial + o_partial, mask=m_x, other=0.0)
            o_partial += size_of_one
        tl.store(d_k + o_out, b_k.to(d_k.dtype.element_ty), mask=m_x)
        tl.store(d_v + o_out, b_v.to(d_v.dtype.element_ty), mask=m_x)
