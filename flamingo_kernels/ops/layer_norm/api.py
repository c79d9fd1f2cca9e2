"""The public LayerNorm, alone and before a projection."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo_kernels.ops import checks, dispatch
from flamingo_kernels.ops.layer_norm import impl_cpp, impl_torch, operators
from flamingo_kernels.ops.projection import projection_gradient
from flamingo_kernels.ops.rows import has_simple_rows
from flamingo_kernels.ops.signature import is_eager, remembered
from flamingo_kernels.ops.single_backward import single_backward

Runner = Callable[..., Tensor]


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    kernel: str = "auto",
) -> Tensor:
    """LayerNorm over the last dimension, statistics in fp32 (fp64 for fp64 inputs).

    Parameters
    ----------
    x : Tensor
        Floating point [..., C].
    weight, bias : Tensor, optional
        [C].
    eps : float
        Added to the variance.
    kernel : {"auto", "triton", "cpp", "torch"}
        ``"auto"`` takes the best available; an explicit kernel never falls back.

    Returns
    -------
    Tensor
        [..., C], dtype of ``x``.

    Raises
    ------
    TypeError, ValueError, KernelUnavailableError
        The message names the offending values.
    """
    return _runner(x, weight, bias, float(eps), kernel)(x, weight, bias)


@remembered
def _runner(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kernel: str
) -> Runner:
    """Check the arguments and return what runs calls of this signature, of (x, weight, bias)."""
    chosen, saves = _choice("layer_norm", x, weight, bias, eps, kernel)
    if saves and chosen != "torch":
        return lambda x, weight, bias: _LayerNorm.apply(x, weight, bias, eps, chosen)
    return _forward(x, weight, bias, eps, chosen)


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kernel: str
) -> Runner:
    """Return the forward of ``kernel``, of (x, weight, bias); torch's alone has gradients."""
    if kernel == "torch":
        return partial(impl_torch.forward, eps=eps)
    if kernel == "cpp" and is_eager(x):
        return impl_cpp.bind_forward(x, weight, bias, eps)
    return lambda x, weight, bias: operators.forward(x, weight, bias, eps, kernel)[0]


def _choice(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kernel: str
) -> dispatch.Choice:
    checks.require_channels(op, x)
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        checks.require_parameter(op, name, parameter, x)
        if parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: {name} has shape {tuple(parameter.shape)}, x has {x.shape[-1]} channels"
            )
    return dispatch.choose_for(
        "layer_norm", kernel, x, weight, bias, channels=x.shape[-1], plain=has_simple_rows
    )


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments: Any) -> Tensor:
        output = operators.forward(*arguments)
        operators.save(ctx, arguments, output)
        return output[0]

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return operators.gradients(ctx, d_out)


def layer_norm_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    projection: Tensor,
    eps: float = 1e-5,
    kernel: str = "auto",
) -> Tensor:
    """``F.linear(layer_norm(x, weight, bias, eps), projection)``, keeping less.

    Between forward and backward it holds ``x`` but not the normalised values, which the backward
    computes again; with ``kernel="torch"`` it holds both.

    Parameters
    ----------
    x, weight, bias, eps, kernel
        As for :func:`layer_norm`.
    projection : Tensor
        Floating point [C', C].

    Returns
    -------
    Tensor
        [..., C'].

    Raises
    ------
    TypeError, ValueError, KernelUnavailableError
        The message names the offending values.
    """
    run = _linear_runner(x, weight, bias, projection, float(eps), kernel)
    return run(x, weight, bias, projection)


@remembered
def _linear_runner(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    projection: Tensor,
    eps: float,
    kernel: str,
) -> Runner:
    """Check the arguments and return what runs such calls, of (x, weight, bias, projection)."""
    op = "layer_norm_linear"
    chosen, saves = _choice(op, x, weight, bias, eps, kernel)
    checks.require_projection(op, projection, x)
    if chosen != "torch" and (saves or dispatch.saves_for_backward(projection)):
        return lambda *inputs: _LayerNormLinear.apply(*inputs, eps, chosen)
    normalise = _forward(x, weight, bias, eps, chosen)
    return lambda x, weight, bias, projection: F.linear(normalise(x, weight, bias), projection)


class _LayerNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        projection: Tensor,
        eps: float,
        kernel: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, projection)
        ctx.options = (eps, kernel)
        return F.linear(operators.forward(x, weight, bias, eps, kernel)[0], projection)

    @staticmethod
    @single_backward("layer_norm_linear")
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, projection = ctx.saved_tensors
        eps, kernel = ctx.options
        normed, mean, rstd = operators.forward(x, weight, bias, eps, kernel)
        d_x = d_weight = d_bias = d_projection = None
        if ctx.needs_input_grad[3]:
            d_projection = projection_gradient(d_out, normed)
        if any(ctx.needs_input_grad[:3]):
            d_normed = (d_out @ projection.to(d_out.dtype)).to(x.dtype)
            has_bias = bias is not None and ctx.needs_input_grad[2]
            d_x, d_weight, d_bias = operators.backward(
                d_normed, x, weight, mean, rstd, has_bias, kernel
            )
            d_weight = None if weight is None else d_weight
            d_bias = d_bias if has_bias else None
        return d_x, d_weight, d_bias, d_projection, None, None
