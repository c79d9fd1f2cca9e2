"""One pass over memory with a gate: how it is divided over programs, and its device functions.

Tensors are seen as N values in rows of C: the channels if the gate is a vector, any length if it is
one value. A program keeps a block of C and walks over every GROUPS-th row, so that tanh(gate) is
computed, and the gate's gradient is stored, once per program.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._triton.configs import POINTWISE
from flamingo_kernels._triton.device import tanh
from flamingo_kernels._triton.launch import dense, triton_accumulator

# Programs of a pass over memory: 16 of four warps on each of 132 multiprocessors fill them.
PROGRAMS = 2048


def walk(x: Tensor, gate: Tensor | None) -> tuple[tuple[int, int], dict[str, Any]]:
    """Return the grid and the arguments that the kernels of a gated pass share."""
    block = POINTWISE.keys
    gates = 1 if gate is None else gate.numel()
    length = gates if gates > 1 else block
    columns = -(-length // block)
    groups = min(-(-x.numel() // length), max(PROGRAMS // columns, 1))
    return (groups, columns), {
        "gate": dense(gate),
        "N": x.numel(),
        "C": length,
        "GROUPS": groups,
        "VECTOR": gates > 1,
        "BLOCK": block,
        "ACC": triton_accumulator(x.dtype),
    }


@triton.jit
def tanh_of_gate(gate, i_c, C, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """Return tanh(gate), of a block of channels or of the single gate."""
    if VECTOR:
        b_gate = tl.load(gate + i_c, mask=i_c < C, other=0.0)
    else:
        b_gate = tl.load(gate)
    return tanh(b_gate.to(ACC))


@triton.jit
def store_gate_partial(d_tanh, b_sum, i_c, C, VECTOR: tl.constexpr):
    """Store a program's share of the gradient of tanh(gate)."""
    if VECTOR:
        tl.store(d_tanh + tl.program_id(0).to(tl.int64) * C + i_c, b_sum, mask=i_c < C)
    else:
        tl.store(d_tanh + tl.program_id(0), tl.sum(b_sum))
