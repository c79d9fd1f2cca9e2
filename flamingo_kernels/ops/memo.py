"""Work that depends on what tensors are like, not on their values: done once for calls alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from flamingo_kernels.ops.spans import MediaSpans

PLAIN = (torch.Tensor, torch.nn.Parameter)
_MOST_SIGNATURES = 4096
_OPTIONS = (str, int, float, bool, type(None))
_memos: list[dict] = []

P = ParamSpec("P")
Result = TypeVar("Result")


def once_per_signature(function: Callable[P, Result]) -> Callable[P, Result]:
    """Remember results by shape, strides, dtype, device and ``requires_grad`` of the arguments.

    ``function`` takes tensors, spans and options, by position. Errors are not remembered. While
    torch compiles, and for tensor subclasses, it is called each time.
    """
    known: dict[tuple, Result] = {}
    _memos.append(known)

    @wraps(function)
    def remembered(*arguments: P.args) -> Result:
        if torch.compiler.is_compiling():
            return function(*arguments)
        signature = [torch.is_grad_enabled()]
        for value in arguments:
            if type(value) in PLAIN and value.layout is torch.strided:
                signature += (
                    value.shape,
                    value.stride(),
                    value.dtype,
                    value.device,
                    value.requires_grad,
                )
            elif type(value) is MediaSpans:
                signature.append(value.signature)
            elif type(value) in _OPTIONS:
                signature.append(value)
            else:
                return function(*arguments)
        signature = tuple(signature)
        result = known.get(signature)
        if result is None:
            result = function(*arguments)
            if len(known) == _MOST_SIGNATURES:
                known.clear()
            known[signature] = result
        return result

    return remembered


def forget() -> None:
    """Ask again everywhere, for when what kernels can do has changed."""
    for known in _memos:
        known.clear()
