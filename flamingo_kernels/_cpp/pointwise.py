"""The pointwise kernels of the native library, on CPU tensors.

Gates, weights and biases come contiguous in the dtype of accumulation, and their gradients leave in
it. Raises ValueError for rows that :func:`row_strides` cannot describe. A forward is bound once to
tensors that lie alike, which packs all but addresses; what is bound is then called with such
tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from flamingo_kernels._cpp import library
from flamingo_kernels._cpp.library import address, new_like
from flamingo_kernels.precision import accumulator

ACTIVATION_CODES = {"gelu": 0, "squared_relu": 1, "relu": 2}


_ROW_STRIDES = struct.Struct("3q")
_ROWS = f"q{_ROW_STRIDES.size}s"  # flamingo_rows: an address and three int64
_OPTION_SIZES = struct.Struct("@2q3i")  # up to the threads
_LAYER_NORM_SIZES = struct.Struct("@2qd2i")
_GATED_RESIDUAL_PARAMS = struct.Struct("@" + 3 * _ROWS + f"4q{_OPTION_SIZES.size}si")
_GATED_ACTIVATION_PARAMS = struct.Struct("@" + 2 * _ROWS + f"4q{_OPTION_SIZES.size}si")
_LAYER_NORM_PARAMS = struct.Struct("@" + 2 * _ROWS + f"8q{_LAYER_NORM_SIZES.size}si4x")
_ABSENT = (0, b"")


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


def _strides(name: str, tensor: Tensor) -> bytes:
    strides = row_strides(tensor)
    if strides is None:
        raise ValueError(
            "the cpp kernel reads a last stride of 1 and up to two strides of rows; "
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}"
        )
    return _ROW_STRIDES.pack(*strides)


def _rows(name: str, tensor: Tensor) -> tuple[int, bytes]:
    return tensor.data_ptr(), _strides(name, tensor)


def _shape(tensor: Tensor) -> tuple[int, int]:
    """Rows and channels."""
    channels = tensor.shape[-1]
    return tensor.numel() // channels if channels else tensor.shape[:-1].numel(), channels


def _option_sizes(x: Tensor, option: int) -> bytes:
    return _OPTION_SIZES.pack(*_shape(x), option, *library.dtype_and_set(x.dtype))


def _layer_norm_sizes(x: Tensor, eps: float) -> bytes:
    return _LAYER_NORM_SIZES.pack(*_shape(x), eps, *library.dtype_and_set(x.dtype))


def bind_gated_residual_forward(x: Tensor, y: Tensor, gate: Tensor) -> Callable[..., Tensor]:
    """``flamingo_gated_residual_forward`` for tensors that lie like these; gate has 1 or C values.

    Returns
    -------
    callable
        Of (x, y, gate): out [..., C], contiguous.
    """
    function = library.function("flamingo_gated_residual_forward")
    pack = _GATED_RESIDUAL_PARAMS.pack
    x_strides, y_strides = _strides("x", x), _strides("y", y)
    sizes = _option_sizes(x, gate.numel() != 1)

    def launch(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        out = new_like(x)
        params = pack(
            x.data_ptr(),
            x_strides,
            y.data_ptr(),
            y_strides,
            0,
            b"",
            out.data_ptr(),
            0,
            gate.data_ptr(),
            0,
            sizes,
            torch.get_num_threads(),
        )
        function(params)
        return out

    return launch


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
        _option_sizes(y, gate.numel() != 1),
        torch.get_num_threads(),
    )
    library.function("flamingo_gated_residual_backward")(params)
    return d_y, d_gate


def bind_gated_activation_forward(x: Tensor, activation: str) -> Callable[..., Tensor]:
    """``flamingo_gated_activation_forward`` for tensors that lie like ``x``.

    Returns
    -------
    callable
        Of (x, gate), the gate of one value or None: out [..., C], contiguous.
    """
    function = library.function("flamingo_gated_activation_forward")
    pack = _GATED_ACTIVATION_PARAMS.pack
    x_strides, sizes = _strides("x", x), _option_sizes(x, ACTIVATION_CODES[activation])

    def launch(x: Tensor, gate: Tensor | None) -> Tensor:
        out = new_like(x)
        params = pack(
            x.data_ptr(),
            x_strides,
            0,
            b"",
            out.data_ptr(),
            0,
            address(gate),
            0,
            sizes,
            torch.get_num_threads(),
        )
        function(params)
        return out

    return launch


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
        _option_sizes(x, ACTIVATION_CODES[activation]),
        torch.get_num_threads(),
    )
    library.function("flamingo_gated_activation_backward")(params)
    return d_x, d_gate


def bind_layer_norm_forward(x: Tensor, eps: float) -> Callable[..., Tensor]:
    """``flamingo_layer_norm_forward`` for tensors that lie like ``x``.

    Returns
    -------
    callable
        Of (x, weight, bias, mean, rstd): out [..., C], contiguous. Weight and bias may be None.
        Mean and 1 / deviation of each row, [rows] in the dtype of accumulation, are written and may
        be left out.
    """
    function = library.function("flamingo_layer_norm_forward")
    pack = _LAYER_NORM_PARAMS.pack
    x_strides, sizes = _strides("x", x), _layer_norm_sizes(x, eps)

    def launch(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None = None,
        rstd: Tensor | None = None,
    ) -> Tensor:
        out = new_like(x)
        params = pack(
            x.data_ptr(),
            x_strides,
            0,
            b"",
            out.data_ptr(),
            0,
            address(weight),
            address(bias),
            address(mean),
            address(rstd),
            0,
            0,
            sizes,
            torch.get_num_threads(),
        )
        function(params)
        return out

    return launch


def new_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """For mean and 1 / deviation: [rows], not filled."""
    mean = x.new_empty(_shape(x)[0], dtype=accumulator(x.dtype))
    return mean, torch.empty_like(mean)


def layer_norm_backward(
    d_out: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``flamingo_layer_norm_backward``: gradients of x [..., C], of weight and of bias, if any."""
    d_x = new_like(x)
    channels = x.shape[-1]
    d_weight = None if weight is None else mean.new_empty(channels)
    d_bias = mean.new_empty(channels) if has_bias else None
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
        _layer_norm_sizes(x, 0.0),
        torch.get_num_threads(),
    )
    library.function("flamingo_layer_norm_backward")(params)
    return d_x, d_weight, d_bias
