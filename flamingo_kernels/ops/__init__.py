"""Public ops: one function each, ``kernel=`` selects the implementation."""

from flamingo_kernels.ops.dispatch import KernelUnavailableError
from flamingo_kernels.ops.gated_activation import gated_activation, gated_activation_linear
from flamingo_kernels.ops.gated_residual import gated_residual
from flamingo_kernels.ops.key_ranges import KeyRanges
from flamingo_kernels.ops.latent_attention import key_lengths, latent_attention
from flamingo_kernels.ops.layer_norm import layer_norm, layer_norm_linear
from flamingo_kernels.ops.media_attention import media_cross_attention, plan_media_attention
from flamingo_kernels.ops.spans import MediaSpans

__all__ = [
    "KernelUnavailableError",
    "KeyRanges",
    "MediaSpans",
    "gated_activation",
    "gated_activation_linear",
    "gated_residual",
    "key_lengths",
    "latent_attention",
    "layer_norm",
    "layer_norm_linear",
    "media_cross_attention",
    "plan_media_attention",
]
