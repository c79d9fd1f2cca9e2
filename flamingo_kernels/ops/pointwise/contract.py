"""Schemas, shape functions and lazy dispatch of the pointwise kernels; torch only.

A kernel is a module ``impl_NAME`` with a function per schema, of its arguments less the last. Gates
and their gradients are in the dtype of accumulation; results without a gate, weight or bias have no
element in the place of its gradient.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

NAMESPACE = "flamingo_kernels"

_SCHEMAS = {
    "gated_residual_forward": "(Tensor x, Tensor y, Tensor gate, str kernel) -> Tensor",
    # Of y and gate; the gradient of x is d_out itself.
    "gated_residual_backward": (
        "(Tensor d_out, Tensor y, Tensor gate, str kernel) -> (Tensor, Tensor)"
    ),
    "gated_activation_forward": ("(Tensor x, Tensor? gate, str activation, str kernel) -> Tensor"),
    "gated_activation_backward": (
        "(Tensor d_out, Tensor x, Tensor? gate, str activation, str kernel) -> (Tensor, Tensor)"
    ),
    # The second and third results are mean and 1 / deviation of each row, [...] flattened.
    "layer_norm_forward": (
        "(Tensor x, Tensor? weight, Tensor? bias, float eps, str kernel) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    # Of x, weight and bias; has_bias tells whether the last is wanted.
    "layer_norm_backward": (
        "(Tensor d_out, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool has_bias, "
        "str kernel) -> (Tensor, Tensor, Tensor)"
    ),
}


def _define(name: str, schema: str):
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)

    def run(*arguments):
        *inputs, kernel = arguments
        module = import_module(f"flamingo_kernels.ops.pointwise.impl_{kernel}")
        return getattr(module, name)(*inputs)

    torch.library.impl(qualified, "default")(run)
    return getattr(torch.ops.flamingo_kernels, name).default


OPS = {name: _define(name, schema) for name, schema in _SCHEMAS.items()}


def _like(tensor: Tensor | None, owner: Tensor) -> Tensor:
    return owner.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)


@torch.library.register_fake(f"{NAMESPACE}::gated_residual_forward")
def _(x: Tensor, y: Tensor, gate: Tensor, kernel: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake(f"{NAMESPACE}::gated_residual_backward")
def _(d_out: Tensor, y: Tensor, gate: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), _like(gate, y)


@torch.library.register_fake(f"{NAMESPACE}::gated_activation_forward")
def _(x: Tensor, gate: Tensor | None, activation: str, kernel: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake(f"{NAMESPACE}::gated_activation_backward")
def _(
    d_out: Tensor, x: Tensor, gate: Tensor | None, activation: str, kernel: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _like(gate, x)


@torch.library.register_fake(f"{NAMESPACE}::layer_norm_forward")
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    accumulation = torch.promote_types(x.dtype, torch.float32)
    rows = x.numel() // x.shape[-1]
    mean = x.new_empty(rows, dtype=accumulation)
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


@torch.library.register_fake(f"{NAMESPACE}::layer_norm_backward")
def _(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    d_weight = _like(weight, x)
    d_bias = d_out.new_empty(
        x.shape[-1] if has_bias else 0, dtype=(x if weight is None else weight).dtype
    )
    return x.new_empty(x.shape), d_weight, d_bias
