"""How a compiled kernel becomes a torch operator; torch only."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch

from flamingo_kernels.ops.memo import PLAIN

NAMESPACE = "flamingo_kernels"


@cache
def _implementation(op: str, kernel: str, function: str) -> Callable[..., Any]:
    return getattr(import_module(f"flamingo_kernels.ops.{op}.impl_{kernel}"), function)


def kernel_op(
    op: str, function: str, schema: str, fake: Callable[..., Any], name: str | None = None
) -> Callable[..., Any]:
    """Register ``function`` of every ``ops/{op}/impl_{kernel}.py`` as one operator.

    Parameters
    ----------
    op : str
        Folder of the op; a kernel module is imported when first run.
    function : str
        Name in the module; it takes the operator's arguments less the last.
    schema : str
        Arguments and results; the last argument is ``str kernel``.
    fake : callable
        Shapes and dtypes of the results, for tracing.
    name : str, optional
        Of the operator, default ``{op}_{function}``.

    Returns
    -------
    callable
        Runs the kernel. Ordinary tensors in eager mode go to it directly, which saves half of the
        overhead of a call; everything else (compilation, tensor subclasses) goes through torch.
    """
    name = name or f"{op}_{function}"
    qualified = f"{NAMESPACE}::{name}"

    def run(*arguments: Any) -> Any:
        return _implementation(op, arguments[-1], function)(*arguments[:-1])

    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "default")(run)
    torch.library.register_fake(qualified)(fake)
    operator = getattr(torch.ops.flamingo_kernels, name).default

    def call(*arguments: Any) -> Any:
        if type(arguments[0]) in PLAIN and not torch.compiler.is_compiling():
            return run(*arguments)
        return operator(*arguments)

    return call
