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
