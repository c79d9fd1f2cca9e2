"""Bytes that one gated cross-attention block keeps between forward and backward.

Counted with saved-tensor hooks on fake tensors, which have shapes and no memory, so that the widths
are those of real models; that real tensors give the same count is checked at a small width.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flamingo_kernels.nn import GatedCrossAttentionBlock
from flamingo_kernels.ops import MediaSpans, dispatch, plan_media_attention
from flamingo_kernels.saved_tensors import saved_bytes
from testing.peers import open_flamingo_helpers

IMAGES, LATENTS, MEDIA_DIM = 8, 64, 1024
CPP = dispatch.unsupported_reasons(
    "media_cross_attention", "cpp", dispatch.Call("cpu", torch.float32, True)
)
SMALL = {"dim": 32, "tokens": 96, "dtype": torch.float32}


def kept_bytes(block: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that ``run()`` saves, the parameters of ``block`` left out."""

    def trained() -> Tensor:
        out = run()
        assert out.requires_grad
        return out

    return saved_bytes(trained, block.parameters())


def block_bytes(kind: type[nn.Module], dim: int, tokens: int, dtype: torch.dtype, **options) -> int:
    """Of a block of OpenFlamingo's shape with 8 images at equal distances."""
    torch.set_default_dtype(dtype)  # fake modules cannot be converted
    try:
        block = kind(dim=dim, dim_visual=MEDIA_DIM, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    x = torch.randn(1, tokens, dim, dtype=dtype, requires_grad=True)
    media = torch.randn(1, IMAGES, LATENTS, MEDIA_DIM, dtype=dtype, requires_grad=True)
    locations = (torch.arange(tokens) % (tokens // IMAGES) == 0)[None]
    if kind is not GatedCrossAttentionBlock:
        return kept_bytes(block, lambda: block(x, media, locations))
    spans = MediaSpans.from_media_locations(locations)

    def run() -> Tensor:
        media_kv = block.project_media(media)
        planned = plan_media_attention(spans, media_kv.key, block.kernel)
        return block(x, media_kv=media_kv, spans=planned)

    return kept_bytes(block, run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [256, 2048, 4096])
@pytest.mark.parametrize("kernel", ["triton", "cpp"])
@pytest.mark.usefixtures("any_kernel_may_run")
def test_at_most_half_of_the_eager_block(kernel: str, dim: int, dtype: torch.dtype) -> None:
    """OpenFlamingo's block with its materialised scores, at 2048 tokens and 8 images."""
    eager = open_flamingo_helpers().GatedCrossAttentionBlock
    with FakeTensorMode():
        theirs = block_bytes(eager, dim, 2048, dtype)
        ours = block_bytes(GatedCrossAttentionBlock, dim, 2048, dtype, kernel=kernel)
    print(f"{kernel} dim {dim} {dtype}: {ours / 2**20:.1f} of {theirs / 2**20:.1f} MiB")
    assert ours <= theirs / 2


@pytest.mark.skipif(bool(CPP), reason="; ".join(CPP))
def test_fake_and_real_tensors_give_the_same_count() -> None:
    eager = open_flamingo_helpers().GatedCrossAttentionBlock
    for kind, options in ((eager, {}), (GatedCrossAttentionBlock, {"kernel": "cpp"})):
        real = block_bytes(kind, **SMALL, **options)
        with FakeTensorMode():
            assert real == block_bytes(kind, **SMALL, **options)


@pytest.mark.usefixtures("any_kernel_may_run")
def test_what_the_block_keeps() -> None:
    """The inputs of both halves, q, the attention's output, the hidden layer; media, k, v, ranges.

    Nothing normalised, nothing activated, no softmax.
    """
    dim, tokens = SMALL["dim"], SMALL["tokens"]
    inner = 8 * 64
    text = tokens * (2 * dim + 2 * inner + 4 * dim)
    media = IMAGES * LATENTS * (MEDIA_DIM + 2 * inner)
    ranges = 2 * tokens
    plan = 4 * (IMAGES + 1 + IMAGES + 2 + 1)
    with FakeTensorMode():
        for kernel, planned in (("cpp", 0), ("triton", plan)):
            kept = block_bytes(GatedCrossAttentionBlock, **SMALL, kernel=kernel)
            assert kept == 4 * (text + media + ranges + planned)
