"""Latent queries against the features of one media item and the latents themselves."""

from flamingo_kernels.ops.latent_attention.api import latent_attention

__all__ = ["latent_attention"]
