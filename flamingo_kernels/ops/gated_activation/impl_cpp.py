"""The gated activation on the CPU through the native library.

x may have any two strides for its leading dimensions and a unit last one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from flamingo_kernels._cpp import layouts, library
from flamingo_kernels._cpp.layouts import ROWS, address, new_like
from flamingo_kernels.ops.rows import packed_row_strides, packed_rows, simple_rows
from flamingo_kernels.precision import accumulated

_CODES = {"gelu": 0, "squared_relu": 1, "relu": 2}
_SIZES = struct.Struct("@2q3i")  # up to the threads
PARAMS = struct.Struct("@" + 2 * ROWS + f"4q{_SIZES.size}si")


def _sizes(x: Tensor, activation: str) -> bytes:
    code = _CODES[activation]
    return _SIZES.pack(*layouts.rows_and_channels(x), code, *library.dtype_and_set(x.dtype))


def bind_forward(
    x: Tensor, gate: Tensor | None, activation: str
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return the forward for calls of this signature, with all parameters but addresses packed.

    It takes (x, gate), the gate of one value or None, and returns out [..., C], contiguous.
    """
    function = library.function("flamingo_gated_activation_forward")
    pack = PARAMS.pack
    x_strides, sizes = packed_row_strides("x", x), _sizes(x, activation)

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

    if accumulated(gate, x) is gate:
        return launch
    return lambda x, gate: launch(x, accumulated(gate, x))


def forward(x: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    return bind_forward(x, gate, activation)(x, gate)


def backward(
    d_out: Tensor, x: Tensor, gate: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x [..., C] and of gate, empty without a gate."""
    d_out, d_x = simple_rows(d_out), new_like(x)
    d_gate = None if gate is None else new_like(gate)
    params = PARAMS.pack(
        *packed_rows("x", x),
        *packed_rows("d_out", d_out),
        0,
        d_x.data_ptr(),
        address(gate),
        address(d_gate),
        _sizes(x, activation),
        torch.get_num_threads(),
    )
    library.function("flamingo_gated_activation_backward")(params)
    return d_x, x.new_empty(0) if d_gate is None else d_gate
