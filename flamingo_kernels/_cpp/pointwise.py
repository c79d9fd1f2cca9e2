"""The pointwise kernels of the native library, on CPU tensors.

Gates, weights and biases come contiguous in the dtype of accumulation, and their gradients leave in
it. Raises ValueError for rows that :func:`row_strides` cannot describe.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from flamingo_kernels._cpp import library
from flamingo_kernels._cpp.library import address, new_like
from flamingo_kernels.precision import accumulator

ACTIVATION_CODES = {"gelu": 0, "squared_relu": 1, "relu": 2}


_ROWS = "4q"  # flamingo_rows: an address and three int64
_GATED_RESIDUAL_PARAMS = struct.Struct("@" + 3 * _ROWS + "4q" + "2q" + "i" + library.EXECUTION)
_GATED_ACTIVATION_PARAMS = struct.Struct("@" + 2 * _ROWS + "4q" + "2q" + "i" + library.EXECUTION)
_LAYER_NORM_PARAMS = struct.Struct("@" + 2 * _ROWS + "8q" + "2q" + "d" + library.EXECUTION + "4x")
_ABSENT = (0, 0, 0, 0)


def row_strides(tensor: Tensor) -> tuple[int, int, int] | None:
    """How rows of the last dimension lie: (inner_rows, outer_stride, inner_stride).

    None where they need more than two strides, or where a row's values do not adjoin.
    """
    channels = tensor.shape[-1]
    if tensor.is_contiguous():
        return 0, 0, channels
    if tensor.stride(-1) != 1 and channels > 1:
        return None
    levels: list[tuple[int, int]] = []  # (size, stride), outermost last
    leading = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    for size, stride in reversed(list(leading)):
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return None
    inner_rows, inner_stride = levels[0] if levels else (0, 0)
    return (inner_rows, levels[1][1], inner_stride) if len(levels) == 2 else (0, 0, inner_stride)


def _rows(name: str, tensor: Tensor) -> tuple[int, int, int, int]:
    strides = row_strides(tensor)
    if strides is None:
        raise ValueError(
            "the cpp kernel reads a last stride of 1 and up to two strides of rows; "
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}"
        )
    return tensor.data_ptr(), *strides


def _shape(tensor: Tensor) -> tuple[int, int]:
    """Rows and channels."""
    channels = tensor.shape[-1]
    return tensor.numel() // channels if channels else tensor.shape[:-1].numel(), channels


def gated_residual_forward(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """``flamingo_gated_residual_forward``: out [..., C], contiguous; gate has 1 or C values."""
    out = new_like(x)
    params = _GATED_RESIDUAL_PARAMS.pack(
        *_rows("x", x),
        *_rows("y", y),
        *_ABSENT,
        out.data_ptr(),
        0,
        gate.data_ptr(),
        0,
        *_shape(x),
        gate.numel() != 1,
        *library.execution(x.dtype),
    )
    library.call("flamingo_gated_residual_forward", params)
    return out


def gated_residual_backward(d_out: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """``flamingo_gated_residual_backward``: gradients of y [..., C] and of gate."""
    d_y = new_like(y)
    d_gate = new_like(gate)
    params = _GATED_RESIDUAL_PARAMS.pack(
        *_ABSENT,
        *_rows("y", y),
        *_rows("d_out", d_out),
        0,
        d_y.data_ptr(),
        gate.data_ptr(),
        d_gate.data_ptr(),
        *_shape(y),
        gate.numel() != 1,
        *library.execution(y.dtype),
    )
    library.call("flamingo_gated_residual_backward", params)
    return d_y, d_gate


def gated_activation_forward(x: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """``flamingo_gated_activation_forward``: out [..., C], contiguous; gate has one value."""
    out = new_like(x)
    params = _GATED_ACTIVATION_PARAMS.pack(
        *_rows("x", x),
        *_ABSENT,
        out.data_ptr(),
        0,
        address(gate),
        0,
        *_shape(x),
        ACTIVATION_CODES[activation],
        *library.execution(x.dtype),
    )
    library.call("flamingo_gated_activation_forward", params)
    return out


def gated_activation_backward(
    d_out: Tensor, x: Tensor, gate: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    """``flamingo_gated_activation_backward``: gradients of x [..., C] and of gate, if any."""
    d_x = new_like(x)
    d_gate = None if gate is None else new_like(gate)
    params = _GATED_ACTIVATION_PARAMS.pack(
        *_rows("x", x),
        *_rows("d_out", d_out),
        0,
        d_x.data_ptr(),
        address(gate),
        address(d_gate),
        *_shape(x),
        ACTIVATION_CODES[activation],
        *library.execution(x.dtype),
    )
    library.call("flamingo_gated_activation_backward", params)
    return d_x, d_gate


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``flamingo_layer_norm_forward``: out [..., C] contiguous, mean and 1 / deviation [rows]."""
    out = new_like(x)
    rows, channels = _shape(x)
    mean = torch.empty(rows, dtype=accumulator(x.dtype))
    rstd = torch.empty_like(mean)
    params = _LAYER_NORM_PARAMS.pack(
        *_rows("x", x),
        *_ABSENT,
        out.data_ptr(),
        0,
        address(weight),
        address(bias),
        mean.data_ptr(),
        rstd.data_ptr(),
        0,
        0,
        rows,
        channels,
        eps,
        *library.execution(x.dtype),
    )
    library.call("flamingo_layer_norm_forward", params)
    return out, mean, rstd


def layer_norm_backward(
    d_out: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``flamingo_layer_norm_backward``: gradients of x [..., C], of weight and of bias, if any."""
    d_x = new_like(x)
    rows, channels = _shape(x)
    d_weight = None if weight is None else torch.empty(channels, dtype=mean.dtype)
    d_bias = torch.empty(channels, dtype=mean.dtype) if has_bias else None
    params = _LAYER_NORM_PARAMS.pack(
        *_rows("x", x),
        *_rows("d_out", d_out),
        0,
        d_x.data_ptr(),
        address(weight),
        0,
        mean.data_ptr(),
        rstd.data_ptr(),
        address(d_weight),
        address(d_bias),
        rows,
        channels,
        0.0,
        *library.execution(x.dtype),
    )
    library.call("flamingo_layer_norm_backward", params)
    return d_x, d_weight, d_bias
