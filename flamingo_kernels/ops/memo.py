"""Work that depends on what tensors are like, not on their values: done once for calls alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import is_grad_enabled, strided
from torch.compiler import is_compiling

from flamingo_kernels.ops.spans import MediaSpans

PLAIN = (torch.Tensor, torch.nn.Parameter)
_MOST_SIGNATURES = 4096
_OPTIONS = (str, int, float, bool, type(None))
_memos: list[dict] = []

P = ParamSpec("P")
Result = TypeVar("Result")


def once_per_signature(
    finish: Callable[..., Result] = lambda result, *_: result,
) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Remember a function's results by what its arguments are like.

    That is shape, strides, dtype, device and ``requires_grad`` of tensors, all but the values of
    spans, and options. The function takes these by position. Errors are not remembered. While torch
    compiles, and for tensor subclasses, it is called each time.

    Parameters
    ----------
    finish : callable
        Takes a result that is to be remembered, and the arguments; what it returns is remembered.
    """

    def decorate(function: Callable[P, Result]) -> Callable[P, Result]:
        known: dict[tuple, Result] = {}
        _memos.append(known)

        @wraps(function)
        def remembered(*arguments: P.args) -> Result:
            if is_compiling():
                return function(*arguments)
            grad_enabled = is_grad_enabled()
            signature = [grad_enabled]
            for value in arguments:
                if type(value) in PLAIN and value.layout is strided:
                    # Strides that matter are known of a contiguous tensor; of True, that it is.
                    signature += (
                        value.shape,
                        value.is_contiguous() or value.stride(),
                        value.dtype,
                        value.is_cpu or value.device,
                        grad_enabled and value.requires_grad,
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
                result = finish(function(*arguments), *arguments)
                if len(known) >= _MOST_SIGNATURES:
                    known.clear()
                known[signature] = result
            return result

        return remembered

    return decorate


def forget() -> None:
    """Ask again everywhere, for when what kernels can do has changed."""
    for known in _memos:
        known.clear()
