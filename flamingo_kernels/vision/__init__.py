"""Vision encoders: images to features."""

from __future__ import annotations

from torch import nn

from flamingo_kernels.vision.config import (
    NFNET_VARIANTS,
    FeaturesConfig,
    HuggingFaceVisionConfig,
    ModuleVisionConfig,
    NFNetConfig,
    NFNetVariant,
    VisionConfig,
)
from flamingo_kernels.vision.features import PrecomputedFeatures
from flamingo_kernels.vision.huggingface import (
    HuggingFaceVisionEncoder,
    read_vision_encoder,
    wrap_vision_encoder,
)
from flamingo_kernels.vision.nfnet import NFNet
from flamingo_kernels.vision.protocol import VisionEncoder

__all__ = [
    "NFNET_VARIANTS",
    "FeaturesConfig",
    "HuggingFaceVisionConfig",
    "HuggingFaceVisionEncoder",
    "ModuleVisionConfig",
    "NFNet",
    "NFNetConfig",
    "NFNetVariant",
    "PrecomputedFeatures",
    "VisionConfig",
    "VisionEncoder",
    "build_vision_encoder",
    "read_vision_encoder",
    "wrap_vision_encoder",
]

_BUILDERS = {
    "nfnet": NFNet,
    "huggingface": HuggingFaceVisionEncoder.from_config,
    "features": PrecomputedFeatures,
}


def build_vision_encoder(config: VisionConfig) -> nn.Module:
    """Build the encoder that ``config`` describes, with random weights.

    Returns
    -------
    nn.Module
        A ``VisionEncoder``.

    Raises
    ------
    ValueError
        ``config.kind`` is unknown, or this package cannot build it.
    ImportError
        The kind needs a package that is not installed.
    """
    kind = getattr(config, "kind", None)
    if kind == "module":
        raise ValueError(
            "the vision encoder of this model is a module of its user's: pass vision_encoder="
        )
    if kind not in _BUILDERS:
        raise ValueError(f"unknown vision kind {kind!r}; known: {', '.join(_BUILDERS)}")
    return _BUILDERS[kind](config)
