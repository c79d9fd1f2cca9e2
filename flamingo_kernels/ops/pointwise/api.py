"""The public pointwise ops."""

from __future__ import annotations

from torch import Tensor

from flamingo_kernels.ops import checks, dispatch
from flamingo_kernels.ops.pointwise import impl_torch

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
    op = "gated_residual"
    if x.shape != y.shape:
        raise ValueError(f"{op}: x and y differ in shape: {tuple(x.shape)}, {tuple(y.shape)}")
    if x.device != y.device:
        raise ValueError(f"{op}: x is on {x.device}, y on {y.device}")
    _require_floating(op, x)
    checks.require_gate(op, gate, x, (1, x.shape[-1]))
    dispatch.choose_for(op, kernel, x, y, gate)
    return impl_torch.gated_residual(x, y, gate)


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
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    _require_floating(op, x)
    checks.require_gate(op, gate, x, (1,))
    dispatch.choose_for(op, kernel, x, gate)
    return impl_torch.gated_activation(x, gate, activation)


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
    op = "layer_norm"
    _require_floating(op, x)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: {name} has shape {tuple(parameter.shape)}, x has {x.shape[-1]} channels"
            )
    dispatch.choose_for(op, kernel, x, weight, bias)
    return impl_torch.layer_norm(x, weight, bias, eps)


def _require_floating(op: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be floating point, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError(f"{op}: x must have at least one dimension")
