"""How the C structs that several ops share are packed; they mirror ``csrc/include``.

A kernel takes one struct of parameters. ``struct`` packs it into bytes: filling a ctypes structure
takes longer than a decoding step takes to compute.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

_STRIDES = struct.Struct("4q")
TENSOR = f"q{_STRIDES.size}s"  # flamingo_tensor: an address and four strides
_ROW_STRIDES = struct.Struct("3q")
ROWS = f"q{_ROW_STRIDES.size}s"  # flamingo_rows: an address, and row strides
ABSENT = (0, b"")  # no tensor, or no rows


def no_tensors(count: int) -> str:
    """Return the format of ``count`` tensors that are left out, packed from ``b""``."""
    return f"{count * struct.calcsize(TENSOR)}s"


def strides(tensor: Tensor) -> bytes:
    """Pack all strides but the last, which is 1, of a tensor of 4 or 5 dimensions."""
    return _STRIDES.pack(*tensor.stride()[:4])


def contiguous_strides(tensor: Tensor) -> bytes:
    """Pack the strides of :func:`new_like`, for a tensor of 4 dimensions."""
    _, second, third, last = tensor.shape
    return _STRIDES.pack(second * third * last, third * last, last, 1)


def tensors(*given: Tensor) -> list[int | bytes]:
    """Return the address and the packed strides of each tensor, for ``TENSOR``."""
    return [value for tensor in given for value in (tensor.data_ptr(), strides(tensor))]


def pack_row_strides(described: tuple[int, int, int]) -> bytes:
    """Pack (inner_rows, outer_stride, inner_stride)."""
    return _ROW_STRIDES.pack(*described)


def rows_and_channels(tensor: Tensor) -> tuple[int, int]:
    """Return the number of rows of the last dimension, and its length."""
    channels = tensor.shape[-1]
    return tensor.numel() // channels if channels else tensor.shape[:-1].numel(), channels


def address(tensor: Tensor | None) -> int:
    """Return where the values of a tensor start, or the null pointer for None."""
    return 0 if tensor is None else tensor.data_ptr()


def new_like(tensor: Tensor) -> Tensor:
    """Return an uninitialised contiguous tensor of the same shape and dtype."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
