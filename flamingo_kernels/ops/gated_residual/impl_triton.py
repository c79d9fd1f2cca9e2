"""The gated residual through Triton: launchers and kernels, one pass over memory each way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._triton.configs import POINTWISE
from flamingo_kernels._triton.gated_pass import store_gate_partial, tanh_of_gate, walk
from flamingo_kernels._triton.launch import gate_gradient, launch
from flamingo_kernels.precision import accumulator


def forward(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """See ``operators.forward``."""
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x)
    grid, shared = walk(x, gate)
    launch(gated_residual_kernel, grid, POINTWISE, x=x, y=y, out=out, **shared)
    return out


def backward(d_out: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """See ``operators.backward``."""
    d_out, y = d_out.contiguous(), y.contiguous()
    d_y = torch.empty_like(y)
    grid, shared = walk(y, gate)
    d_tanh = torch.empty((grid[0], gate.numel()), dtype=accumulator(y.dtype), device=y.device)
    launch(
        gated_residual_backward_kernel,
        grid,
        POINTWISE,
        d_out=d_out,
        y=y,
        d_y=d_y,
        d_tanh=d_tanh,
        **shared,
    )
    return d_y, gate_gradient(d_tanh, gate)


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
    b_tanh = tanh_of_gate(gate, i_c, C, VECTOR, ACC)
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
    b_tanh = tanh_of_gate(gate, i_c, C, VECTOR, ACC)
    b_sum = tl.zeros([BLOCK], ACC)
    stride = tl.zeros([], tl.int64) + C
    for row in tl.range(tl.program_id(0), tl.cdiv(N, C), GROUPS):
        o_x = row * stride + i_c
        m_x = (i_c < C) & (o_x < N)
        b_do = tl.load(d_out + o_x, mask=m_x, other=0.0).to(ACC)
        b_y = tl.load(y + o_x, mask=m_x, other=0.0).to(ACC)
        tl.store(d_y + o_x, (b_tanh * b_do).to(d_y.dtype.element_ty), mask=m_x)
        b_sum += b_do * b_y
    store_gate_partial(d_tanh, b_sum, i_c, C, VECTOR)
