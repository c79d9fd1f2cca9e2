"""The activation of a gated feed-forward, alone and before its projection."""

from flamingo_kernels.ops.gated_activation.api import (
    ACTIVATIONS,
    gated_activation,
    gated_activation_linear,
)

__all__ = ["ACTIVATIONS", "gated_activation", "gated_activation_linear"]
