"""Gated residual and gated activation: each one pass over memory, forward and backward.

Tensors are seen as N values in rows of C: the channels where the gate is a vector, any length where
it is one value. A program keeps a block of C and walks over every GROUPS-th row, so that tanh(gate)
is computed, and the gate's gradient is stored, once per program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flamingo_kernels._triton.device import tanh


@triton.jit
def gated_residual_kernel(
    x,  # [N]
    y,  # [N]
    gate,  # [C] or [1]
    out,  # [N]
    N,
    C,
    GROUPS,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    i_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_tanh = _tanh_of_gate(gate, i_c, C, VECTOR, ACC)
    stride = tl.zeros([], tl.int64) + C
    for row in tl.range(tl.program_id(0), tl.cdiv(N, C), GROUPS):
        o_x = row * stride + i_c
        m_x = (i_c < C) & (o_x < N)
        b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(ACC)
        b_y = tl.load(y + o_x, mask=m_x, other=0.0).to(ACC)
        tl.store(out + o_x, (b_x + b_tanh * b_y).to(out.dtype.element_ty), mask=m_x)


@triton.jit
def gated_residual_backward_kernel(
    d_out,  # [N]
    y,  # [N]
    gate,  # [C] or [1]
    d_y,  # [N]
    d_tanh,  # [GROUPS, C], or [GROUPS] of a single gate
    N,
    C,
    GROUPS,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    i_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_tanh = _tanh_of_gate(gate, i_c, C, VECTOR, ACC)
    b_sum = tl.zeros([BLOCK], ACC)
    stride = tl.zeros([], tl.int64) + C
    for row in tl.range(tl.program_id(0), tl.cdiv(N, C), GROUPS):
        o_x = row * stride + i_c
        m_x = (i_c < C) & (o_x < N)
        b_do = tl.load(d_out + o_x, mask=m_x, other=0.0).to(ACC)
        b_y = tl.load(y + o_x, mask=m_x, other=0.0).to(ACC)
        tl.store(d_y + o_x, (b_tanh * b_do).to(d_y.dtype.element_ty), mask=m_x)
        b_sum += b_do * b_y
    _store_gate_partial(d_tanh, b_sum, i_c, C, VECTOR)


@triton.jit
def gated_activation_kernel(
    x,  # [N]
    gate,  # [1] or None
    out,  # [N]
    N,
    C,
    GROUPS,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    i_c = tl.arange(0, BLOCK)
    stride = tl.zeros([], tl.int64) + C
    for row in tl.range(tl.program_id(0), tl.cdiv(N, C), GROUPS):
        o_x = row * stride + i_c
        m_x = (i_c < C) & (o_x < N)
        b_out = _activate(tl.load(x + o_x, mask=m_x, other=0.0).to(ACC), ACTIVATION)
        if gate is not None:
            b_out *= _tanh_of_gate(gate, i_c, C, False, ACC)
        tl.store(out + o_x, b_out.to(out.dtype.element_ty), mask=m_x)


@triton.jit
def gated_activation_backward_kernel(
    d_out,  # [N]
    x,  # [N]
    gate,  # [1] or None
    d_x,  # [N]
    d_tanh,  # [GROUPS] or None
    N,
    C,
    GROUPS,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    i_c = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], ACC)
    stride = tl.zeros([], tl.int64) + C
    for row in tl.range(tl.program_id(0), tl.cdiv(N, C), GROUPS):
        o_x = row * stride + i_c
        m_x = (i_c < C) & (o_x < N)
        b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(ACC)
        b_do = tl.load(d_out + o_x, mask=m_x, other=0.0).to(ACC)
        b_dx = b_do * _slope(b_x, ACTIVATION)
        if gate is not None:
            b_sum += b_do * _activate(b_x, ACTIVATION)
            b_dx *= _tanh_of_gate(gate, i_c, C, False, ACC)
        tl.store(d_x + o_x, b_dx.to(d_x.dtype.element_ty), mask=m_x)
    if gate is not None:
        _store_gate_partial(d_tanh, b_sum, i_c, C, False)


@triton.jit
def _tanh_of_gate(gate, i_c, C, VECTOR: tl.constexpr, ACC: tl.constexpr):
    if VECTOR:
        b_gate = tl.load(gate + i_c, mask=i_c < C, other=0.0)
    else:
        b_gate = tl.load(gate)
    return tanh(b_gate.to(ACC))


@triton.jit
def _store_gate_partial(d_tanh, b_sum, i_c, C, VECTOR: tl.constexpr):
    if VECTOR:
        tl.store(d_tanh + tl.program_id(0).to(tl.int64) * C + i_c, b_sum, mask=i_c < C)
    else:
        tl.store(d_tanh + tl.program_id(0), tl.sum(b_sum))


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    b_relu = tl.where(x < 0.0, 0.0, x)
    if ACTIVATION == "squared_relu":
        return b_relu * b_relu
    return b_relu


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    if ACTIVATION == "squared_relu":
        return 2.0 * tl.where(x < 0.0, 0.0, x)
    return tl.where(x > 0.0, 1.0, 0.0)
