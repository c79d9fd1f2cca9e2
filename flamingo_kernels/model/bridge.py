"""The trainable modules between vision encoder and language model, built from a configuration."""

from __future__ import annotations

from torch import nn

from flamingo_kernels.model.config import FlamingoConfig, ResamplerConfig
from flamingo_kernels.nn import GatedCrossAttentionBlock, PerceiverResampler


def connector_name(config: FlamingoConfig) -> str:
    """Return the model's attribute that turns features into media, also its state-dict prefix."""
    return "projector" if config.resampler is None else "perceiver"


def build_connector(config: FlamingoConfig, kernel: str) -> PerceiverResampler | nn.Linear:
    """Build the resampler or projector that ``config`` describes, with random weights."""
    if config.resampler is not None:
        return _build_resampler(config.resampler, kernel)
    assert config.projector is not None
    return nn.Linear(config.vision.output_dim, config.projector.dim, config.projector.bias)


def _build_resampler(config: ResamplerConfig, kernel: str) -> PerceiverResampler:
    return PerceiverResampler(
        config.dim,
        depth=config.depth,
        dim_head=config.head_dim,
        heads=config.heads,
        num_latents=config.num_latents,
        max_num_frames=config.max_num_frames,
        ff_mult=config.ff_mult,
        input_dim=config.input_dim,
        activation=config.activation,
        qk_norm=config.qk_norm,
        final_norm=config.final_norm,
        kernel=kernel,
    )


def build_cross_attention(config: FlamingoConfig, kernel: str) -> GatedCrossAttentionBlock:
    """Build one cross-attention layer that ``config`` describes, with random weights."""
    cross = config.cross_attention
    return GatedCrossAttentionBlock(
        config.language.dim,
        config.media_dim,
        dim_head=cross.head_dim,
        heads=cross.heads,
        kv_heads=cross.kv_heads,
        ff_mult=cross.ff_mult,
        attend=cross.attend,
        ff_dim=cross.ff_dim,
        media_norm=cross.media_norm,
        rms_norm_eps=cross.rms_norm_eps,
        qk_norm=cross.qk_norm,
        gate=cross.gate,
        activation=cross.activation,
        feed_forward_without_media=cross.feed_forward_without_media,
        kernel=kernel,
    )
