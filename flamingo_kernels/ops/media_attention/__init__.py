"""Cross-attention of text tokens to the latents of the media items that each token sees."""

from flamingo_kernels.ops.media_attention.api import media_cross_attention, plan_media_attention

__all__ = ["media_cross_attention", "plan_media_attention"]
