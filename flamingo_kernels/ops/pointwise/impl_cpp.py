"""Pointwise ops on the CPU through the native library; see ``contract``.

Inputs may have any two strides for their leading dimensions and a unit last one. Parameters of C
values are laid out anew in the dtype of accumulation where they are not in it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flamingo_kernels._cpp import pointwise
from flamingo_kernels.precision import accumulated


def bind_gated_residual_forward(x: Tensor, y: Tensor, gate: Tensor) -> Callable[..., Tensor]:
    launch = pointwise.bind_gated_residual_forward(x, y, gate)
    if _laid_out(gate, x) is gate:
        return launch
    return lambda x, y, gate: launch(x, y, _laid_out(gate, x))


def gated_residual_forward(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return bind_gated_residual_forward(x, y, gate)(x, y, gate)


def gated_residual_backward(d_out: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return pointwise.gated_residual_backward(_with_rows(d_out), y, gate.contiguous())


def bind_gated_activation_forward(
    x: Tensor, gate: Tensor | None, activation: str
) -> Callable[..., Tensor]:
    launch = pointwise.bind_gated_activation_forward(x, activation)
    if accumulated(gate, x) is gate:
        return launch
    return lambda x, gate: launch(x, accumulated(gate, x))


def gated_activation_forward(x: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    return bind_gated_activation_forward(x, gate, activation)(x, gate)


def gated_activation_backward(
    d_out: Tensor, x: Tensor, gate: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    d_x, d_gate = pointwise.gated_activation_backward(_with_rows(d_out), x, gate, activation)
    return d_x, x.new_empty(0) if d_gate is None else d_gate


def bind_layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Callable[..., Tensor]:
    launch = pointwise.bind_layer_norm_forward(x, eps)
    if all(_laid_out(parameter, x) is parameter for parameter in (weight, bias)):
        return launch
    return lambda x, weight, bias, *statistics: launch(
        x, _laid_out(weight, x), _laid_out(bias, x), *statistics
    )


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = pointwise.new_statistics(x)
    launch = bind_layer_norm_forward(x, weight, bias, eps)
    return launch(x, weight, bias, *statistics), *statistics


def layer_norm_backward(
    d_out: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_x, d_weight, d_bias = pointwise.layer_norm_backward(
        _with_rows(d_out), x, _laid_out(weight, x), mean, rstd, has_bias
    )
    dtype = x.dtype if weight is None else weight.dtype
    nothing = x.new_empty(0, dtype=dtype)
    return (
        d_x,
        nothing if d_weight is None else d_weight.to(dtype),
        nothing.clone() if d_bias is None else d_bias.to(dtype),
    )


def _with_rows(d_out: Tensor) -> Tensor:
    """Autograd may hand in an expanded gradient, as of a sum: the only copy made here."""
    return d_out if pointwise.row_strides(d_out) is not None else d_out.contiguous()


def _laid_out(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else accumulated(parameter, x).contiguous()
