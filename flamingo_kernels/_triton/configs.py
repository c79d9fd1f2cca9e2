"""Launch configurations: their form, and those of kernels without a matrix product."""

from __future__ import annotations

from dataclasses import dataclass

INTERPRETER = "interpreter"  # the architecture of CPU tensors


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and compiler options of one kernel."""

    rows: int  # query rows of a tile
    keys: int  # keys of a tile
    num_warps: int
    num_stages: int
    reason: str


SUM_ONE = LaunchConfig(1024, 1, 4, 1, "a single sum: one program")
SUM_TALL = LaunchConfig(32, 64, 4, 1, "many terms: 32 at a time, columns of 256 bytes of fp32")
SUM_WIDE = LaunchConfig(1, 1024, 4, 1, "few terms: 8 values a thread")
POINTWISE = LaunchConfig(1, 1024, 4, 1, "8 values a thread fill 16-byte loads of 16-bit values")
