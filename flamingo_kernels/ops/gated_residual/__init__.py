"""The gated residual connection of a block."""

from flamingo_kernels.ops.gated_residual.api import gated_residual

__all__ = ["gated_residual"]
