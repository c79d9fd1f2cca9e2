"""Cache checks and the choice of a kernel by tensor metadata: equal calls pay for them once.

The metadata are shape, strides, dtype, device and ``requires_grad``. Values are never part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import is_grad_enabled, strided

from flamingo_kernels.ops.spans import MediaSpans
from flamingo_kernels.ops.transforms import is_batched_gradient, is_watched

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_MOST_SIGNATURES = 4096
_OPTIONS = (str, int, float, bool, type(None))
_caches: list[dict] = []

Function = TypeVar("Function", bound=Callable[..., Any])


def is_eager(tensor: object) -> bool:
    """Whether a kernel may read the tensor's memory: no subclass, and torch does not look on."""
    return type(tensor) in _PLAIN and not is_watched() and not is_batched_gradient(tensor)


def remembered(function: Function) -> Function:
    """Call ``function`` once per signature of its arguments, which are positional, and cache it.

    The signature holds the metadata of tensors, that of :class:`MediaSpans`, options as they are,
    and whether gradients are enabled. Exceptions are not cached. While torch looks on (compiling,
    tracing, transforms), and for tensor subclasses, the function is called every time.
    """
    known: dict[tuple, Any] = {}
    _caches.append(known)

    @wraps(function)
    def remembering(*arguments: Any) -> Any:
        if is_watched():
            return function(*arguments)
        grad_enabled = is_grad_enabled()
        signature: list[Any] = [grad_enabled]
        for value in arguments:
            if type(value) in _PLAIN and value.layout is strided:
                # "Contiguous" stands for the strides, and "on the CPU" for the device.
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
        key = tuple(signature)
        result = known.get(key)
        if result is None:
            result = function(*arguments)
            if len(known) >= _MOST_SIGNATURES:
                known.clear()
            known[key] = result
        return result

    return cast(Function, remembering)


def forget() -> None:
    """Clear every cache, for when what kernels can do has changed."""
    for known in _caches:
        known.clear()
