"""The Flamingo model: configuration, forward, cached generation, checkpoints."""

from flamingo_kernels.model.config import CrossAttentionConfig, FlamingoConfig, ResamplerConfig
from flamingo_kernels.model.flamingo import FlamingoModel, FlamingoOutput

__all__ = [
    "CrossAttentionConfig",
    "FlamingoConfig",
    "FlamingoModel",
    "FlamingoOutput",
    "ResamplerConfig",
]
