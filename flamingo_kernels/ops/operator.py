"""Register a function as a torch operator; depends on torch only."""

from __future__ import annotations

import typing
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from flamingo_kernels.ops.signature import is_eager

NAMESPACE = "flamingo_kernels"

Function = TypeVar("Function", bound=Callable[..., Any])


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Function], Function]:
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
    """
    qualified = f"{NAMESPACE}::{name}"

    def register(function: Function) -> Function:
        function.__annotations__ = typing.get_type_hints(function)
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(qualified, schema)
        torch.library.impl(qualified, "default")(function)
        torch.library.register_fake(qualified)(fake)
        registered = getattr(torch.ops.flamingo_kernels, name).default

        @wraps(function)
        def call(*arguments: Any) -> Any:
            return (function if is_eager(arguments[0]) else registered)(*arguments)

        return cast(Function, call)

    return register
