"""Modules built on the ops, with OpenFlamingo's constructor arguments and state-dict names."""

from flamingo_kernels.nn.cross_attention import GatedCrossAttentionBlock, MediaKeyValue
from flamingo_kernels.nn.layers import FeedForward, LayerNorm
from flamingo_kernels.nn.resampler import PerceiverResampler

__all__ = [
    "FeedForward",
    "GatedCrossAttentionBlock",
    "LayerNorm",
    "MediaKeyValue",
    "PerceiverResampler",
]
