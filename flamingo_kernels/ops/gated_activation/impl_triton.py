"""The gated activation through Triton: launchers and kernels, one pass over memory each way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._triton.configs import POINTWISE
from flamingo_kernels._triton.gated_pass import store_gate_partial, tanh_of_gate, walk
from flamingo_kernels._triton.launch import gate_gradient, launch
from flamingo_kernels.precision import accumulator


def forward(x: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """See ``operators.forward``."""
    x = x.contiguous()
    out = torch.empty_like(x)
    grid, shared = walk(x, gate)
    del shared["VECTOR"]
    launch(
        gated_activation_kernel,
        grid[:1],
        POINTWISE,
        x=x,
        out=out,
        ACTIVATION=activation,
        **shared,
    )
    return out


def backward(
    d_out: Tensor, x: Tensor, gate: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """See ``operators.backward``."""
    d_out, x = d_out.contiguous(), x.contiguous()
    d_x = torch.empty_like(x)
    grid, shared = walk(x, gate)
    del shared["VECTOR"]
    d_tanh = None
    if gate is not None:
        d_tanh = torch.empty((grid[0], 1), dtype=accumulator(x.dtype), device=x.device)
    launch(
        gated_activation_backward_kernel,
        grid[:1],
        POINTWISE,
        d_out=d_out,
        x=x,
        d_x=d_x,
        d_tanh=d_tanh,
        ACTIVATION=activation,
        **shared,
    )
    if gate is None or d_tanh is None:
        return d_x, x.new_empty(0)
    return d_x, gate_gradient(d_tanh, gate)


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
            b_out *= tanh_of_gate(gate, i_c, C, False, ACC)
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
            b_dx *= tanh_of_gate(gate, i_c, C, False, ACC)
        tl.store(d_x + o_x, b_dx.to(d_x.dtype.element_ty), mask=m_x)
    if gate is not None:
        store_gate_partial(d_tanh, b_sum, i_c, C, False)


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
