"""Memory-bound ops around the attention: gated residual, gated activation, LayerNorm."""

from flamingo_kernels.ops.pointwise.api import (
    ACTIVATIONS,
    gated_activation,
    gated_activation_linear,
    gated_residual,
    layer_norm,
    layer_norm_linear,
)

__all__ = [
    "ACTIVATIONS",
    "gated_activation",
    "gated_activation_linear",
    "gated_residual",
    "layer_norm",
    "layer_norm_linear",
]
