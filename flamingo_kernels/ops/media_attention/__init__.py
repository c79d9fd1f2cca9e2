"""Text queries against the latents of the media items each token may see."""

from flamingo_kernels.ops.media_attention.api import media_cross_attention, plan_media_attention

__all__ = ["media_cross_attention", "plan_media_attention"]
