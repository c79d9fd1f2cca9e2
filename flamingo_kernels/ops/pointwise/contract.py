"""The pointwise operators: what every ``impl_{kernel}.py`` here offers; torch only.

Gates and their gradients are in the dtype of accumulation; where there is no gate, weight or bias,
its gradient has no element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flamingo_kernels.ops.kernel_op import kernel_op
from flamingo_kernels.precision import accumulator


def _like(parameter: Tensor | None, owner: Tensor) -> Tensor:
    return owner.new_empty(0) if parameter is None else parameter.new_empty(parameter.shape)


def _shape_of_x(x: Tensor, *_) -> Tensor:
    return x.new_empty(x.shape)


def _input_and_gate(d_out: Tensor, x: Tensor, gate: Tensor | None, *_) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _like(gate, x)


def _layer_norm_shapes(x: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    rows = math.prod(x.shape[:-1])  # Size.numel() would fix symbolic sizes to their values
    mean = x.new_empty(rows, dtype=accumulator(x.dtype))
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


def _layer_norm_gradients(
    d_out: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool, *_
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = (x if weight is None else weight).dtype
    d_bias = x.new_empty(x.shape[-1] if has_bias else 0, dtype=dtype)
    return x.new_empty(x.shape), _like(weight, x), d_bias


def _op(name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    return kernel_op("pointwise", name, schema, fake, name=name)


gated_residual_forward = _op(
    "gated_residual_forward", "(Tensor x, Tensor y, Tensor gate, str kernel) -> Tensor", _shape_of_x
)
# Of y and gate; the gradient of x is d_out itself.
gated_residual_backward = _op(
    "gated_residual_backward",
    "(Tensor d_out, Tensor y, Tensor gate, str kernel) -> (Tensor, Tensor)",
    _input_and_gate,
)
gated_activation_forward = _op(
    "gated_activation_forward",
    "(Tensor x, Tensor? gate, str activation, str kernel) -> Tensor",
    _shape_of_x,
)
gated_activation_backward = _op(
    "gated_activation_backward",
    "(Tensor d_out, Tensor x, Tensor? gate, str activation, str kernel) -> (Tensor, Tensor)",
    _input_and_gate,
)
# The second and third results are mean and 1 / deviation of each row, leading dimensions flattened.
layer_norm_forward = _op(
    "layer_norm_forward",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, str kernel) -> (Tensor, Tensor, Tensor)",
    _layer_norm_shapes,
)
layer_norm_backward = _op(
    "layer_norm_backward",
    "(Tensor d_out, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool has_bias, str kernel) "
    "-> (Tensor, Tensor, Tensor)",
    _layer_norm_gradients,
)
