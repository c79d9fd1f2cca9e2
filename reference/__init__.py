"""Slow, plain PyTorch Flamingo: the meaning of every kernel and of the model, in code.

Imports torch and the standard library only; flamingo_kernels never imports it. See README.md.
"""

from .attention import key_range_attention, latent_attention, media_cross_attention
from .cross_attention import GatedCrossAttentionBlock
from .decoder import Decoder
from .flamingo import Flamingo, FlamingoOutput
from .nfnet import NFNet
from .pointwise import gated_activation, gated_residual, layer_norm, rms_norm
from .resampler import PerceiverResampler
from .spans import media_spans

__all__ = [
    "Decoder",
    "Flamingo",
    "FlamingoOutput",
    "GatedCrossAttentionBlock",
    "NFNet",
    "PerceiverResampler",
    "gated_activation",
    "gated_residual",
    "key_range_attention",
    "latent_attention",
    "layer_norm",
    "media_cross_attention",
    "media_spans",
    "rms_norm",
]
