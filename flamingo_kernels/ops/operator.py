"""Register a function as a torch operator, with its gradient."""

from __future__ import annotations

import typing
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from flamingo_kernels.ops.dispatch import KernelUnavailableError, needs_grad
from flamingo_kernels.ops.signature import is_eager
from flamingo_kernels.ops.single_backward import refuse_derivative
from flamingo_kernels.ops.transforms import has_tangent

NAMESPACE = "flamingo_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

Function = TypeVar("Function", bound=Callable[..., Any])


class Gradient(NamedTuple):
    """The gradient of an operator.

    Attributes
    ----------
    save : callable
        Takes (ctx, arguments, output) of a forward and keeps what ``gradients`` needs.
    gradients : callable
        Takes (ctx, gradient of the first output) and returns one gradient or None per argument.
    """

    save: Callable[..., None]
    gradients: Callable[..., tuple[Tensor | None, ...]]


def operator(
    name: str,
    fake: Callable[..., Any],
    gradient: Gradient | None = None,
) -> Callable[[Function], Function]:
    """Register the decorated function as ``torch.ops.flamingo_kernels.<name>``.

    The schema comes from the annotations; an ``int`` becomes a ``SymInt``. The decorated function
    is called directly for ordinary tensors in eager mode, which halves the overhead of a call.
    Compilation and tensor subclasses go through torch's dispatcher.

    Parameters
    ----------
    name : str
        Name of the operator.
    fake : callable
        Takes the same arguments and returns empty results of the right shapes and dtypes.
    gradient : Gradient, optional
        Of its first output. Default: a derivative is refused.
    """
    qualified = f"{NAMESPACE}::{name}"

    def register(function: Function) -> Function:
        function.__annotations__ = typing.get_type_hints(function)
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(qualified, schema)
        torch.library.impl(qualified, "default")(function)
        torch.library.register_fake(qualified)(fake)
        registered = getattr(torch.ops.flamingo_kernels, name).default
        _LIBRARY.impl(name, _differentiated(name, registered, gradient), "Autograd")

        @wraps(function)
        def call(*arguments: Any) -> Any:
            return (function if is_eager(arguments[0]) else registered)(*arguments)

        return cast(Function, call)

    return register


def _differentiated(
    name: str,
    registered: Callable[..., Any],
    gradient: Gradient | None,
) -> Callable[..., Any]:
    """Return what autograd runs for an operator, in the programs that torch records.

    torch's own choice drops tangents, and gradients too where none are registered.
    """

    def compute(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return registered(*arguments)

    function = None if gradient is None else _function(compute, gradient)

    def run(*arguments: Any) -> Any:
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        if has_tangent(*tensors):
            raise KernelUnavailableError(
                f"{NAMESPACE}::{name} has no forward-mode derivative; use kernel='torch'"
            )
        if not needs_grad(*tensors):
            return compute(*arguments)
        if function is not None:
            return function.apply(*arguments)
        with torch.no_grad():
            outputs = compute(*arguments)
        return refuse_derivative(name, outputs, tensors)

    return run


def _function(compute: Callable[..., Any], gradient: Gradient) -> type[torch.autograd.Function]:
    class Recorded(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return compute(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            gradient.save(ctx, inputs, output)
            if isinstance(output, tuple):
                ctx.mark_non_differentiable(*output[1:])

        @staticmethod
        def backward(ctx, d_out: Tensor, *_: object) -> tuple[Tensor | None, ...]:
            return gradient.gradients(ctx, d_out)

    return Recorded
