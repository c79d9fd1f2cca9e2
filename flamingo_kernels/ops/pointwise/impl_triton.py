"""Pointwise ops through Triton: launchers. The kernels are in ``flamingo_kernels._triton``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flamingo_kernels._triton import configs
from flamingo_kernels._triton.launch import (
    gate_gradient,
    launch,
    padded,
    reduce_partials,
    triton_accumulator,
)
from flamingo_kernels._triton.layer_norm import layer_norm_backward_kernel, layer_norm_kernel
from flamingo_kernels._triton.pointwise import (
    gated_activation_backward_kernel,
    gated_activation_kernel,
    gated_residual_backward_kernel,
    gated_residual_kernel,
)
from flamingo_kernels.precision import accumulator

# Programs of a pass over memory: 16 of four warps on each of 132 multiprocessors fill them.
POINTWISE_PROGRAMS = 2048
# Row blocks per program of LayerNorm's backward, so that its partial sums, 8 bytes a channel and
# program, stay small beside the 6 bytes a value in 16 bits; and the most programs it starts.
LAYER_NORM_BLOCKS = 8
LAYER_NORM_PROGRAMS = 264


def gated_residual_forward(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """See ``api.gated_residual``; ``gate`` is already in the accumulation dtype."""
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x)
    grid, shared = _walk(x, gate)
    launch(gated_residual_kernel, grid, configs.POINTWISE, x=x, y=y, out=out, **shared)
    return out


def gated_residual_backward(d_out: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and gate."""
    d_out, y = d_out.contiguous(), y.contiguous()
    d_y = torch.empty_like(y)
    grid, shared = _walk(y, gate)
    d_tanh = torch.empty((grid[0], gate.numel()), dtype=accumulator(y.dtype), device=y.device)
    launch(
        gated_residual_backward_kernel,
        grid,
        configs.POINTWISE,
        d_out=d_out,
        y=y,
        d_y=d_y,
        d_tanh=d_tanh,
        **shared,
    )
    return d_y, gate_gradient(d_tanh, gate)


def gated_activation_forward(x: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """See ``api.gated_activation``; ``gate`` is already in the accumulation dtype."""
    x = x.contiguous()
    out = torch.empty_like(x)
    grid, shared = _walk(x, gate)
    del shared["VECTOR"]
    launch(
        gated_activation_kernel,
        grid[:1],
        configs.POINTWISE,
        x=x,
        out=out,
        ACTIVATION=activation,
        **shared,
    )
    return out


def gated_activation_backward(
    d_out: Tensor, x: Tensor, gate: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """Gradients of x and gate; the latter has no element where there is no gate."""
    d_out, x = d_out.contiguous(), x.contiguous()
    d_x = torch.empty_like(x)
    grid, shared = _walk(x, gate)
    del shared["VECTOR"]
    d_tanh = None
    if gate is not None:
        d_tanh = torch.empty((grid[0], 1), dtype=accumulator(x.dtype), device=x.device)
    launch(
        gated_activation_backward_kernel,
        grid[:1],
        configs.POINTWISE,
        d_out=d_out,
        x=x,
        d_x=d_x,
        d_tanh=d_tanh,
        ACTIVATION=activation,
        **shared,
    )
    return d_x, x.new_empty(0) if gate is None else gate_gradient(d_tanh, gate)


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, and mean and 1 / deviation of each row in the accumulation dtype."""
    channels = x.shape[-1]
    x = x.contiguous()
    rows = x.numel() // max(channels, 1)
    out = torch.empty_like(x)
    mean = torch.empty(rows, dtype=accumulator(x.dtype), device=x.device)
    rstd = torch.empty_like(mean)  # results of an op may not share storage
    config = configs.layer_norm(padded(channels))
    launch(
        layer_norm_kernel,
        (-(-rows // config.rows),),
        config,
        x=x,
        weight=_dense(weight),
        bias=_dense(bias),
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


def layer_norm_backward(
    d_out: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; no element where there is no weight or no bias."""
    channels = x.shape[-1]
    d_out, x = d_out.contiguous(), x.contiguous()
    config = configs.layer_norm(padded(channels))
    blocks = -(-mean.numel() // config.rows)
    groups = min(max(blocks // LAYER_NORM_BLOCKS, 1), LAYER_NORM_PROGRAMS)
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
        weight=_dense(weight),
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


def _walk(x: Tensor, gate: Tensor | None) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and shared arguments of the gated kernels: see ``_triton/pointwise.py``."""
    block = configs.POINTWISE.keys
    vector = gate is not None and gate.numel() > 1
    length = gate.numel() if vector else block
    columns = -(-length // block)
    groups = min(-(-x.numel() // length), max(POINTWISE_PROGRAMS // columns, 1))
    return (groups, columns), {
        "gate": _dense(gate),
        "N": x.numel(),
        "C": length,
        "GROUPS": groups,
        "VECTOR": vector,
        "BLOCK": block,
        "ACC": triton_accumulator(x.dtype),
    }


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()
