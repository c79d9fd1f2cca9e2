"""The public gated residual op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flamingo_kernels.ops import checks, dispatch
from flamingo_kernels.ops.gated_residual import impl_cpp, impl_torch, operators
from flamingo_kernels.ops.rows import has_simple_rows
from flamingo_kernels.ops.signature import is_eager, remembered
from flamingo_kernels.precision import accumulated

_OP = "gated_residual"


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
    return _runner(x, y, gate, kernel)(x, y, gate)


@remembered
def _runner(
    x: Tensor, y: Tensor, gate: Tensor, kernel: str
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Check the arguments and return what runs calls of this signature."""
    checks.require_channels(_OP, x)
    checks.require_floating(_OP, "y", y)
    if x.shape != y.shape:
        raise ValueError(f"{_OP}: x and y differ in shape: {tuple(x.shape)}, {tuple(y.shape)}")
    if x.device != y.device:
        raise ValueError(f"{_OP}: x is on {x.device}, y on {y.device}")
    checks.require_gate(_OP, gate, x, (1, x.shape[-1]))
    chosen, saves = dispatch.choose_for(_OP, kernel, x, y, gate, plain=has_simple_rows)
    if chosen == "torch":
        return impl_torch.forward
    if chosen == "cpp" and not saves and is_eager(x) and y.dtype == x.dtype:
        return impl_cpp.bind_forward(x, y, gate)
    run = _GatedResidual.apply if saves else operators.forward
    return lambda x, y, gate: run(x, y.to(x.dtype), accumulated(gate, x), chosen)


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments: Any) -> Tensor:
        out = operators.forward(*arguments)
        operators.save(ctx, arguments, out)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return operators.gradients(ctx, d_out)
