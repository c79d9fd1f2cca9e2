"""LayerNorm through Triton: launchers, and kernels that hold rows in the registers of a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._triton.configs import LaunchConfig
from flamingo_kernels._triton.launch import (
    dense,
    launch,
    padded,
    reduce_partials,
    triton_accumulator,
)
from flamingo_kernels.precision import accumulator

# Row blocks per program of the backward, so that its partial sums, 8 bytes a channel and program,
# stay small beside the 6 bytes a value in 16 bits; and the most programs it starts.
BLOCKS_PER_PROGRAM = 8
MOST_PROGRAMS = 264


def config_of(channels: int) -> LaunchConfig:
    """Return the config for rows of ``channels`` values, each row in one tile."""
    block_c = padded(channels)
    rows = max(1, 1024 // block_c)
    warps = min(max(block_c // 512, 4), 16)
    return LaunchConfig(rows, block_c, warps, 1, "16 values of a row in each thread up to 8192")


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``operators.forward``."""
    channels = x.shape[-1]
    x = x.contiguous()
    rows = x.numel() // max(channels, 1)
    out = torch.empty_like(x)
    mean = torch.empty(rows, dtype=accumulator(x.dtype), device=x.device)
    rstd = torch.empty_like(mean)  # results of an op may not share storage
    config = config_of(channels)
    launch(
        layer_norm_kernel,
        (-(-rows // config.rows),),
        config,
        x=x,
        weight=dense(weight),
        bias=dense(bias),
        out=out,
        mean=mean,
        rstd=rstd,
        ROWS=rows,
        C=channels,
        EPS=eps,
        BLOCK_ROWS=config.rows,
        BLOCK_C=config.keys,
        ACC=triton_accumulator(x.dtype),
    )
    return out, mean, rstd


def backward(
    d_out: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``operators.backward``."""
    channels = x.shape[-1]
    d_out, x = d_out.contiguous(), x.contiguous()
    config = config_of(channels)
    blocks = -(-mean.numel() // config.rows)
    groups = min(max(blocks // BLOCKS_PER_PROGRAM, 1), MOST_PROGRAMS)
    owner = x if weight is None else weight
    d_x = torch.empty_like(x)
    d_weight, d_bias = (
        torch.empty(channels if wanted else 0, dtype=owner.dtype, device=x.device)
        for wanted in (weight is not None, has_bias)
    )
    sums = [
        torch.empty((groups, channels), dtype=accumulator(x.dtype), device=x.device)
        if wanted
        else None
        for wanted in (weight is not None, has_bias)
    ]
    launch(
        layer_norm_backward_kernel,
        (groups,),
        config,
        d_out=d_out,
        x=x,
        weight=dense(weight),
        mean=mean,
        rstd=rstd,
        d_x=d_x,
        d_weight=sums[0],
        d_bias=sums[1],
        ROWS=mean.numel(),
        C=channels,
        GROUPS=groups,
        BLOCK_ROWS=config.rows,
        BLOCK_C=config.keys,
        ACC=triton_accumulator(x.dtype),
    )
    for partials, gradient in zip(sums, (d_weight, d_bias), strict=True):
        if partials is not None:
            reduce_partials(partials, gradient)
    return d_x, d_weight, d_bias


@triton.jit
def layer_norm_kernel(
    x,  # [ROWS, C]
    weight,  # [C] or None
    bias,  # [C] or None
    out,  # [ROWS, C]
    mean,  # [ROWS], the dtype of accumulation
    rstd,  # [ROWS], 1 / deviation
    ROWS,
    C,
    EPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    i_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_row = i_row < ROWS
    i_c = tl.arange(0, BLOCK_C)
    m_c = i_c < C
    m_x = m_row[:, None] & m_c[None, :]
    o_x = i_row.to(tl.int64)[:, None] * C + i_c[None, :]
    b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(ACC)  # [BLOCK_ROWS, BLOCK_C]
    b_mean = tl.sum(b_x, 1) / C
    b_centred = tl.where(m_x, b_x - b_mean[:, None], 0.0)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_centred * b_centred, 1) / C + EPS)
    tl.store(mean + i_row, b_mean, mask=m_row)
    tl.store(rstd + i_row, b_rstd, mask=m_row)
    b_out = b_centred * b_rstd[:, None]
    if weight is not None:
        b_out *= tl.load(weight + i_c, mask=m_c, other=0.0).to(ACC)[None, :]
    if bias is not None:
        b_out += tl.load(bias + i_c, mask=m_c, other=0.0).to(ACC)[None, :]
    tl.store(out + o_x, b_out.to(out.dtype.element_ty), mask=m_x)


@triton.jit
def layer_norm_backward_kernel(
    d_out,  # [ROWS, C]
    x,  # [ROWS, C]
    weight,  # [C] or None
    mean,  # [ROWS]
    rstd,  # [ROWS]
    d_x,  # [ROWS, C]
    d_weight,  # [GROUPS, C], the dtype of accumulation, or None
    d_bias,  # [GROUPS, C] or None
    ROWS,
    C,
    GROUPS,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program walks over every GROUPS-th block of rows and keeps its sums for weight and bias."""
    i_c = tl.arange(0, BLOCK_C)
    m_c = i_c < C
    b_weight = tl.zeros([BLOCK_C], ACC) + 1.0
    if weight is not None:
        b_weight = tl.load(weight + i_c, mask=m_c, other=0.0).to(ACC)
    b_dweight = tl.zeros([BLOCK_C], ACC)
    b_dbias = tl.zeros([BLOCK_C], ACC)
    for i_block in tl.range(tl.program_id(0), tl.cdiv(ROWS, BLOCK_ROWS), GROUPS):
        i_row = i_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        m_row = i_row < ROWS
        m_x = m_row[:, None] & m_c[None, :]
        o_x = i_row.to(tl.int64)[:, None] * C + i_c[None, :]
        b_mean = tl.load(mean + i_row, mask=m_row, other=0.0)[:, None]
        b_rstd = tl.load(rstd + i_row, mask=m_row, other=0.0)[:, None]
        b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(ACC)
        b_do = tl.load(d_out + o_x, mask=m_x, other=0.0).to(ACC)  # [BLOCK_ROWS, BLOCK_C]
        b_normed = tl.where(m_x, (b_x - b_mean) * b_rstd, 0.0)
        b_scaled = b_do * b_weight[None, :]
        b_along = tl.sum(b_scaled * b_normed, 1)[:, None] / C
        b_dx = (b_scaled - tl.sum(b_scaled, 1)[:, None] / C - b_normed * b_along) * b_rstd
        tl.store(d_x + o_x, b_dx.to(d_x.dtype.element_ty), mask=m_x)
        if d_weight is not None:
            b_dweight += tl.sum(b_do * b_normed, 0)
        if d_bias is not None:
            b_dbias += tl.sum(b_do, 0)
    o_partial = tl.program_id(0).to(tl.int64) * C + i_c
    if d_weight is not None:
        tl.store(d_weight + o_partial, b_dweight, mask=m_c)
    if d_bias is not None:
        tl.store(d_bias + o_partial, b_dbias, mask=m_c)
