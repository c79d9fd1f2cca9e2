"""LayerNorm on the CPU through the native library.

x may have any two strides for its leading dimensions and a unit last one. Parameters are converted
to the dtype of accumulation.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from flamingo_kernels._cpp import layouts, library
from flamingo_kernels._cpp.layouts import ROWS, address, new_like
from flamingo_kernels.ops.rows import packed_row_strides, packed_rows, simple_rows
from flamingo_kernels.precision import accumulated, accumulator

_SIZES = struct.Struct("@2qd2i")  # up to the threads
PARAMS = struct.Struct("@" + 2 * ROWS + f"8q{_SIZES.size}si4x")


def _sizes(x: Tensor, eps: float) -> bytes:
    return _SIZES.pack(*layouts.rows_and_channels(x), eps, *library.dtype_and_set(x.dtype))


def bind_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Callable[..., Tensor]:
    """Return the forward for calls of this signature, with all parameters but addresses packed.

    It takes (x, weight, bias, mean, rstd) and returns out [..., C], contiguous. Weight and bias may
    be None. Mean and 1 / deviation of each row, [rows] in the dtype of accumulation, are written if
    they are given.
    """
    function = library.function("flamingo_layer_norm_forward")
    pack = PARAMS.pack
    x_strides, sizes = packed_row_strides("x", x), _sizes(x, eps)

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

    if all(_dense(parameter, x) is parameter for parameter in (weight, bias)):
        return launch
    return lambda x, weight, bias, *statistics: launch(
        x, _dense(weight, x), _dense(bias, x), *statistics
    )


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, _ = layouts.rows_and_channels(x)
    mean = x.new_empty(rows, dtype=accumulator(x.dtype))
    rstd = torch.empty_like(mean)
    launch = bind_forward(x, weight, bias, eps)
    return launch(x, weight, bias, mean, rstd), mean, rstd


def backward(
    d_out: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x [..., C], of weight and of bias, empty without such a parameter."""
    d_out, d_x, channels = simple_rows(d_out), new_like(x), x.shape[-1]
    dense = _dense(weight, x)
    d_weight = None if weight is None else mean.new_empty(channels)
    d_bias = mean.new_empty(channels) if has_bias else None
    params = PARAMS.pack(
        *packed_rows("x", x),
        *packed_rows("d_out", d_out),
        0,
        d_x.data_ptr(),
        address(dense),
        0,
        mean.data_ptr(),
        rstd.data_ptr(),
        address(d_weight),
        address(d_bias),
        _sizes(x, 0.0),
        torch.get_num_threads(),
    )
    library.function("flamingo_layer_norm_backward")(params)
    dtype = x.dtype if weight is None else weight.dtype
    d_parameters = [
        x.new_empty(0, dtype=dtype) if gradient is None else gradient.to(dtype)
        for gradient in (d_weight, d_bias)
    ]
    return d_x, d_parameters[0], d_parameters[1]


def _dense(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else accumulated(parameter, x).contiguous()
