"""Attention of latent queries to the features of one media item and to the latents themselves."""

from flamingo_kernels.ops.latent_attention.api import latent_attention
from flamingo_kernels.ops.latent_attention.lengths import key_lengths

__all__ = ["key_lengths", "latent_attention"]
