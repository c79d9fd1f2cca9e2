"""The structs that Python packs have the sizes of the library's."""

from __future__ import annotations

import struct

import pytest

from flamingo_kernels._cpp import layouts, library
from flamingo_kernels.ops.gated_activation import impl_cpp as gated_activation
from flamingo_kernels.ops.gated_residual import impl_cpp as gated_residual
from flamingo_kernels.ops.latent_attention import impl_cpp as latent_attention
from flamingo_kernels.ops.layer_norm import impl_cpp as layer_norm
from flamingo_kernels.ops.media_attention import impl_cpp as media_attention

PACKED = {
    "flamingo_tensor": [struct.Struct(layouts.TENSOR)],
    "flamingo_rows": [struct.Struct(layouts.ROWS)],
    "flamingo_execution": [struct.Struct(library.EXECUTION)],
    "flamingo_media_attention_params": [media_attention.PARAMS, media_attention.FORWARD_PARAMS],
    "flamingo_latent_attention_params": [latent_attention.PARAMS, latent_attention.FORWARD_PARAMS],
    "flamingo_gated_residual_params": [gated_residual.PARAMS],
    "flamingo_gated_activation_params": [gated_activation.PARAMS],
    "flamingo_layer_norm_params": [layer_norm.PARAMS],
}


@pytest.mark.parametrize("name", PACKED)
def test_sizes_are_the_librarys(name: str) -> None:
    size = library.struct_size(name)
    assert size > 0 and [packed.size for packed in PACKED[name]] == [size] * len(PACKED[name])
