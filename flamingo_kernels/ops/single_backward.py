"""Backwards that cannot be differentiated again, and say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from flamingo_kernels.ops.dispatch import KernelUnavailableError

Gradients = tuple[Tensor | None, ...]
Backward = Callable[[Any, Tensor], Gradients]


def single_backward(op: str) -> Callable[[Backward], Backward]:
    """Decorate the backward of an autograd function of ``op``, to raise if differentiated.

    torch's ``once_differentiable`` raises only where autograd reaches its node by way of ``d_out``.
    The term that comes by way of the saved tensors would be missing from a sum, in silence.
    """

    def decorate(backward: Backward) -> Backward:
        @wraps(backward)
        def run(ctx: Any, d_out: Tensor) -> Gradients:
            if is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, d_out)
            with torch.no_grad():
                gradients = backward(ctx, d_out)
            return refuse_derivative(op, gradients, (d_out, *ctx.saved_tensors))

        return run

    return decorate


def refuse_derivative(
    op: str, outputs: Gradients, depends_on: Sequence[Tensor | None]
) -> Gradients:
    """Return ``outputs`` as functions of the tensors ``depends_on`` whose derivative raises."""
    tensors = [tensor for tensor in depends_on if tensor is not None]
    return tuple(x if x is None else _Refuse.apply(op, x, *tensors) for x in outputs)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op: str, output: Tensor, *depends_on: Tensor) -> Tensor:
        ctx.op = op
        return output.view_as(output)

    @staticmethod
    def backward(ctx, d_output: Tensor) -> Gradients:
        raise KernelUnavailableError(
            f"{ctx.op}: a compiled kernel has no second derivative. Use kernel='torch' where a "
            "gradient is differentiated again (create_graph=True)"
        )
