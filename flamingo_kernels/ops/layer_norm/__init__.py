"""LayerNorm, alone and before a projection."""

from flamingo_kernels.ops.layer_norm.api import layer_norm, layer_norm_linear

__all__ = ["layer_norm", "layer_norm_linear"]
