"""Media attention through Triton: launchers, and beside them the kernels."""

from flamingo_kernels.ops.media_attention.impl_triton.media_backward import backward
from flamingo_kernels.ops.media_attention.impl_triton.media_forward import forward
from flamingo_kernels.ops.media_attention.impl_triton.media_segments import segments

__all__ = ["backward", "forward", "segments"]
