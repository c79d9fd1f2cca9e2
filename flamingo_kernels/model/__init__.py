"""The Flamingo model: configuration, forward, cached generation, checkpoints."""

from flamingo_kernels.model.config import FlamingoConfig
from flamingo_kernels.model.flamingo import FlamingoModel, FlamingoOutput

__all__ = ["FlamingoConfig", "FlamingoModel", "FlamingoOutput"]
