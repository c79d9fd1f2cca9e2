"""The public pointwise ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flamingo_kernels._cpp.pointwise import row_strides
from flamingo_kernels.ops import checks, dispatch
from flamingo_kernels.ops.memo import once_per_signature
from flamingo_kernels.ops.pointwise import contract, impl_cpp, impl_torch
from flamingo_kernels.precision import accumulated

ACTIVATIONS = tuple(impl_torch.ACTIVATIONS)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, kernel: str = "auto") -> Tensor:
    """``x + tanh(gate) * y`` (Flamingo, figure 4).

    Parameters
    ----------
    x, y : Tensor
        Floating point [..., C], one shape and device.
    gate : Tensor
        1 or C values.
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
    chosen, needs_grad, launch = _choose_residual(x, y, gate, kernel)
    if launch is not None:
        return launch(x, y, gate)
    if chosen == "torch":
        return impl_torch.gated_residual(x, y, gate)
    inputs = (x, y.to(x.dtype), accumulated(gate, x))
    if not needs_grad:
        return contract.gated_residual_forward(*inputs, chosen)
    return _GatedResidual.apply(*inputs, chosen)


def _bind_residual(
    choice: dispatch.Choice, x: Tensor, y: Tensor, gate: Tensor, kernel: str
) -> dispatch.Choice:
    if y.dtype != x.dtype:
        return choice
    return choice.bound(impl_cpp.bind_gated_residual_forward, x, y, gate)


@once_per_signature(_bind_residual)
def _choose_residual(x: Tensor, y: Tensor, gate: Tensor, kernel: str) -> dispatch.Choice:
    op = "gated_residual"
    _require_channels(op, x)
    checks.require_floating(op, "y", y)
    if x.shape != y.shape:
        raise ValueError(f"{op}: x and y differ in shape: {tuple(x.shape)}, {tuple(y.shape)}")
    if x.device != y.device:
        raise ValueError(f"{op}: x is on {x.device}, y on {y.device}")
    checks.require_gate(op, gate, x, (1, x.shape[-1]))
    return dispatch.choose_for(op, kernel, x, y, gate, plain=_has_simple_rows)


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
    op = "gated_activation"
    chosen, needs_grad, launch = _choose_activation(op, x, gate, activation, kernel)
    if launch is not None:
        return launch(x, gate)
    if chosen == "torch":
        return impl_torch.gated_activation(x, gate, activation)
    gate = accumulated(gate, x)
    if not needs_grad:
        return contract.gated_activation_forward(x, gate, activation, chosen)
    return _GatedActivation.apply(x, gate, activation, chosen)


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
    op = "gated_activation_linear"
    chosen, needs_grad, launch = _choose_activation(op, x, gate, activation, kernel)
    _require_projection(op, projection, x)
    if chosen == "torch":
        return F.linear(impl_torch.gated_activation(x, gate, activation), projection)
    needs_grad = needs_grad or dispatch.needs_grad(projection)
    if launch is not None and not needs_grad:
        return F.linear(launch(x, gate), projection)
    gate = accumulated(gate, x)
    if not needs_grad:
        return F.linear(contract.gated_activation_forward(x, gate, activation, chosen), projection)
    return _GatedActivationLinear.apply(x, gate, projection, activation, chosen)


def _bind_activation(choice: dispatch.Choice, *arguments) -> dispatch.Choice:
    _op, x, gate, activation, _kernel = arguments
    return choice.bound(impl_cpp.bind_gated_activation_forward, x, gate, activation)


@once_per_signature(_bind_activation)
def _choose_activation(
    op: str, x: Tensor, gate: Tensor | None, activation: str, kernel: str
) -> dispatch.Choice:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    _require_channels(op, x)
    if gate is not None:
        checks.require_gate(op, gate, x, (1,))
    return dispatch.choose_for("gated_activation", kernel, x, gate, plain=_has_simple_rows)


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
    eps = float(eps)
    chosen, needs_grad, launch = _choose_layer_norm("layer_norm", x, weight, bias, eps, kernel)
    if launch is not None:
        return launch(x, weight, bias)
    if chosen == "torch":
        return impl_torch.layer_norm(x, weight, bias, eps)
    if not needs_grad:
        return contract.layer_norm_forward(x, weight, bias, eps, chosen)[0]
    return _LayerNorm.apply(x, weight, bias, eps, chosen)


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
    op, eps = "layer_norm_linear", float(eps)
    chosen, needs_grad, launch = _choose_layer_norm(op, x, weight, bias, eps, kernel)
    _require_projection(op, projection, x)
    if chosen == "torch":
        return F.linear(impl_torch.layer_norm(x, weight, bias, eps), projection)
    needs_grad = needs_grad or dispatch.needs_grad(projection)
    if launch is not None and not needs_grad:
        return F.linear(launch(x, weight, bias), projection)
    if not needs_grad:
        return F.linear(contract.layer_norm_forward(x, weight, bias, eps, chosen)[0], projection)
    return _LayerNormLinear.apply(x, weight, bias, projection, eps, chosen)


def _bind_layer_norm(choice: dispatch.Choice, *arguments) -> dispatch.Choice:
    _op, x, weight, bias, eps, _kernel = arguments
    return choice.bound(impl_cpp.bind_layer_norm_forward, x, weight, bias, eps)


@once_per_signature(_bind_layer_norm)
def _choose_layer_norm(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kernel: str
) -> dispatch.Choice:
    _require_channels(op, x)
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
        "layer_norm", kernel, x, weight, bias, channels=x.shape[-1], plain=_has_simple_rows
    )


def _require_projection(op: str, projection: Tensor, x: Tensor) -> None:
    checks.require_parameter(op, "projection", projection, x)
    if projection.ndim != 2 or projection.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: projection has shape {tuple(projection.shape)}, x has {x.shape[-1]} channels"
        )


def _require_channels(op: str, x: Tensor) -> None:
    checks.require_floating(op, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{op}: x must have at least one dimension")


def _has_simple_rows(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or row_strides(tensor) is not None


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, gate: Tensor, kernel: str) -> Tensor:
        ctx.save_for_backward(y, gate)
        ctx.kernel = kernel
        return contract.gated_residual_forward(x, y, gate, kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        d_y, d_gate = contract.gated_residual_backward(d_out, *ctx.saved_tensors, ctx.kernel)
        return d_out, d_y, d_gate, None


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor | None, activation: str, kernel: str) -> Tensor:
        ctx.save_for_backward(x, gate)
        ctx.options = (activation, kernel)
        return contract.gated_activation_forward(x, gate, activation, kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gate = ctx.saved_tensors
        d_x, d_gate = contract.gated_activation_backward(d_out, x, gate, *ctx.options)
        return d_x, None if gate is None else d_gate, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kernel: str
    ) -> Tensor:
        out, mean, rstd = contract.layer_norm_forward(x, weight, bias, eps, kernel)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.options = (bias is not None, kernel)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        has_bias, kernel = ctx.options
        has_bias = has_bias and ctx.needs_input_grad[2]
        d_x, d_weight, d_bias = contract.layer_norm_backward(
            d_out, x, weight, mean, rstd, has_bias, kernel
        )
        return (
            d_x,
            None if weight is None else d_weight,
            d_bias if has_bias else None,
            None,
            None,
        )


class _GatedActivationLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, gate: Tensor | None, projection: Tensor, activation: str, kernel: str
    ) -> Tensor:
        ctx.save_for_backward(x, gate, projection)
        ctx.options = (activation, kernel)
        activated = contract.gated_activation_forward(x, gate, activation, kernel)
        return F.linear(activated, projection)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, projection = ctx.saved_tensors
        d_x = d_gate = d_projection = None
        if ctx.needs_input_grad[2]:
            activated = contract.gated_activation_forward(x, gate, *ctx.options)
            d_projection = _projection_gradient(d_out, activated)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            d_activated = (d_out @ projection.to(d_out.dtype)).to(x.dtype)
            d_x, d_gate = contract.gated_activation_backward(d_activated, x, gate, *ctx.options)
        return d_x, None if gate is None else d_gate, d_projection, None, None


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
        return F.linear(contract.layer_norm_forward(x, weight, bias, eps, kernel)[0], projection)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, projection = ctx.saved_tensors
        eps, kernel = ctx.options
        normed, mean, rstd = contract.layer_norm_forward(x, weight, bias, eps, kernel)
        d_x = d_weight = d_bias = d_projection = None
        if ctx.needs_input_grad[3]:
            d_projection = _projection_gradient(d_out, normed)
        if any(ctx.needs_input_grad[:3]):
            d_normed = (d_out @ projection.to(d_out.dtype)).to(x.dtype)
            has_bias = bias is not None and ctx.needs_input_grad[2]
            d_x, d_weight, d_bias = contract.layer_norm_backward(
                d_normed, x, weight, mean, rstd, has_bias, kernel
            )
            d_weight = None if weight is None else d_weight
            d_bias = d_bias if has_bias else None
        return d_x, d_weight, d_bias, d_projection, None, None


def _projection_gradient(d_out: Tensor, x: Tensor) -> Tensor:
    """Of ``F.linear(x, projection)``; autocast may have run it in another dtype than that of x."""
    return d_out.reshape(-1, d_out.shape[-1]).t() @ x.reshape(-1, x.shape[-1]).to(d_out.dtype)
