"""The gated residual on the CPU through the native library.

x and y may have any two strides for their leading dimensions and a unit last one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from flamingo_kernels._cpp import layouts, library
from flamingo_kernels._cpp.layouts import ABSENT, ROWS, new_like
from flamingo_kernels.ops.rows import packed_row_strides, packed_rows, simple_rows
from flamingo_kernels.precision import accumulated

_SIZES = struct.Struct("@2q3i")  # up to the threads
PARAMS = struct.Struct("@" + 3 * ROWS + f"4q{_SIZES.size}si")


def _sizes(x: Tensor, gate: Tensor) -> bytes:
    is_vector = gate.numel() != 1
    return _SIZES.pack(*layouts.rows_and_channels(x), is_vector, *library.dtype_and_set(x.dtype))


def bind_forward(x: Tensor, y: Tensor, gate: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the forward for calls of this signature, with all parameters but addresses packed.

    It takes (x, y, gate), the gate of 1 or C values, and returns out [..., C], contiguous.
    """
    function = library.function("flamingo_gated_residual_forward")
    pack = PARAMS.pack
    x_strides, y_strides = packed_row_strides("x", x), packed_row_strides("y", y)
    sizes = _sizes(x, gate)

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

    if accumulated(gate, x) is gate and gate.is_contiguous():
        return launch
    return lambda x, y, gate: launch(x, y, accumulated(gate, x).contiguous())


def forward(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return bind_forward(x, y, gate)(x, y, gate)


def backward(d_out: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of y [..., C] and of gate."""
    d_out, gate = simple_rows(d_out), gate.contiguous()
    d_y, d_gate = new_like(y), new_like(gate)
    params = PARAMS.pack(
        *ABSENT,
        *packed_rows("y", y),
        *packed_rows("d_out", d_out),
        0,
        d_y.data_ptr(),
        gate.data_ptr(),
        d_gate.data_ptr(),
        _sizes(y, gate),
        torch.get_num_threads(),
    )
    library.function("flamingo_gated_residual_backward")(params)
    return d_y, d_gate
