"""The public gated activation, alone and before a projection."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo_kernels.ops import checks, dispatch
from flamingo_kernels.ops.gated_activation import impl_cpp, impl_torch, operators
from flamingo_kernels.ops.projection import projection_gradient
from flamingo_kernels.ops.rows import has_simple_rows
from flamingo_kernels.ops.signature import is_eager, remembered
from flamingo_kernels.ops.single_backward import single_backward
from flamingo_kernels.precision import accumulated

ACTIVATIONS = tuple(impl_torch.ACTIVATIONS)
Runner = Callable[..., Tensor]


def gated_activation(
    x: Tensor, gate: Tensor | None = None, activation: str = "gelu", kernel: str = "auto"
) -> Tensor:
    """``tanh(gate) * activation(x)``, or ``activation(x)`` without a gate.

    A scalar gate of a feed-forward commutes with its last projection, so applying it to the
    hidden activation leaves the residual addition as the only other pointwise pass.

    Parameters
    ----------
    x : Tensor
        Floating point [..., C].
    gate : Tensor, optional
        One value.
    activation : {"gelu", "squared_relu", "relu"}
        Exact (erf) GELU; squared ReLU is the paper's (appendix A.1.4).
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
    return _runner(x, gate, activation, kernel)(x, gate)


@remembered
def _runner(x: Tensor, gate: Tensor | None, activation: str, kernel: str) -> Runner:
    """Check the arguments and return what runs calls of this signature, of (x, gate)."""
    chosen, saves = _choice("gated_activation", x, gate, activation, kernel)
    if saves and chosen != "torch":
        return lambda x, gate: _GatedActivation.apply(x, accumulated(gate, x), activation, chosen)
    return _forward(x, gate, activation, chosen)


def _forward(x: Tensor, gate: Tensor | None, activation: str, kernel: str) -> Runner:
    """Return the forward of ``kernel``, of (x, gate); torch's alone has gradients."""
    if kernel == "torch":
        return partial(impl_torch.forward, activation=activation)
    if kernel == "cpp" and is_eager(x):
        return impl_cpp.bind_forward(x, gate, activation)
    return lambda x, gate: operators.forward(x, accumulated(gate, x), activation, kernel)


def _choice(
    op: str, x: Tensor, gate: Tensor | None, activation: str, kernel: str
) -> dispatch.Choice:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    checks.require_channels(op, x)
    if gate is not None:
        checks.require_gate(op, gate, x, (1,))
    return dispatch.choose_for("gated_activation", kernel, x, gate, plain=has_simple_rows)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments: Any) -> Tensor:
        out = operators.forward(*arguments)
        operators.save(ctx, arguments, out)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return operators.gradients(ctx, d_out)


def gated_activation_linear(
    x: Tensor,
    projection: Tensor,
    gate: Tensor | None = None,
    activation: str = "gelu",
    kernel: str = "auto",
) -> Tensor:
    """``F.linear(gated_activation(x, gate, activation), projection)``, keeping less.

    Between forward and backward it holds ``x`` but not the activated values, which the backward
    computes again; with ``kernel="torch"`` it holds both.

    Parameters
    ----------
    x, gate, activation, kernel
        As for :func:`gated_activation`.
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
    run = _linear_runner(x, projection, gate, activation, kernel)
    return run(x, projection, gate)


@remembered
def _linear_runner(
    x: Tensor, projection: Tensor, gate: Tensor | None, activation: str, kernel: str
) -> Runner:
    """Check the arguments and return what runs such calls, of (x, projection, gate)."""
    op = "gated_activation_linear"
    chosen, saves = _choice(op, x, gate, activation, kernel)
    checks.require_projection(op, projection, x)
    if chosen != "torch" and (saves or dispatch.saves_for_backward(projection)):
        return lambda x, projection, gate: _GatedActivationLinear.apply(
            x, accumulated(gate, x), projection, activation, chosen
        )
    activate = _forward(x, gate, activation, chosen)
    return lambda x, projection, gate: F.linear(activate(x, gate), projection)


class _GatedActivationLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, gate: Tensor | None, projection: Tensor, activation: str, kernel: str
    ) -> Tensor:
        ctx.save_for_backward(x, gate, projection)
        ctx.options = (activation, kernel)
        activated = operators.forward(x, gate, activation, kernel)
        return F.linear(activated, projection)

    @staticmethod
    @single_backward("gated_activation_linear")
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, projection = ctx.saved_tensors
        d_x = d_gate = d_projection = None
        if ctx.needs_input_grad[2]:
            activated = operators.forward(x, gate, *ctx.options)
            d_projection = projection_gradient(d_out, activated)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            d_activated = (d_out @ projection.to(d_out.dtype)).to(x.dtype)
            d_x, d_gate = operators.backward(d_activated, x, gate, *ctx.options)
        return d_x, None if gate is None else d_gate, d_projection, None, None
