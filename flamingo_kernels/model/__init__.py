"""The Flamingo model: configuration, forward, cached generation, saving and loading."""

from flamingo_kernels.model.config import CrossAttentionConfig, FlamingoConfig, ResamplerConfig
from flamingo_kernels.model.flamingo import FlamingoModel
from flamingo_kernels.model.network import FlamingoOutput

__all__ = [
    "CrossAttentionConfig",
    "FlamingoConfig",
    "FlamingoModel",
    "FlamingoOutput",
    "ResamplerConfig",
]
