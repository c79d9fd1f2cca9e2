"""Latent attention through Triton: launchers, and beside them the kernels."""

from flamingo_kernels.ops.latent_attention.impl_triton.latent_backward import backward
from flamingo_kernels.ops.latent_attention.impl_triton.latent_forward import forward

__all__ = ["backward", "forward"]
