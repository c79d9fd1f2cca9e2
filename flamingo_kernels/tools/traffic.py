"""Count the bytes that the Triton kernels move, from what their launchers launch, beside the floor.

The launchers run on meta tensors. Every tensor argument of every launch counts once in full: a
kernel passes once over its arguments, and what several programs read again comes from the cache.
Partial sums count twice, where they are written and where they are read. Those of media attention
are counted for images at equal distances, because their buffer has room for any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flamingo_kernels._triton.launch import recording, tensors_of
from flamingo_kernels.ops.gated_activation import impl_triton as gated_activation
from flamingo_kernels.ops.gated_residual import impl_triton as gated_residual
from flamingo_kernels.ops.latent_attention import impl_triton as latent_attention
from flamingo_kernels.ops.latent_attention.arguments import Arguments as LatentArguments
from flamingo_kernels.ops.layer_norm import impl_triton as layer_norm
from flamingo_kernels.ops.media_attention import impl_triton as media_attention
from flamingo_kernels.ops.media_attention.arguments import Arguments as MediaArguments
from flamingo_kernels.ops.media_attention.impl_triton import media_segments
from flamingo_kernels.ops.media_attention.impl_triton.media_backward import (
    media_backward_kernel,
    sum_media_partials_kernel,
)

EXPLANATION = """\
Counted from the launches for bf16 on sm_90: each tensor that a kernel is given counts once, in
full, partial sums of split work where written and where read. The floor reads every input and
writes every result of the operation once. In bytes per value of the query (media, latent attention)
or of the input (the rest)."""
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Traffic:
    """Bytes of one direction of one operation, per value of its first input."""

    case: str
    direction: str
    floor: float
    moved: float


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _moved(function: Any, *arguments: Any) -> tuple[int, Any]:
    """Bytes moved by ``function``, less the partial sums of media, and what it returned."""
    with recording("sm_90") as recorder:
        result = function(*arguments)
    total = 0
    for launch in recorder.launches:
        if launch.kernel is media_backward_kernel:
            total -= _size(launch.arguments["partials"])
        if launch.kernel is not sum_media_partials_kernel:
            total += _size(*launch.arguments.values())
    return total, result


def _size(*values: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(values))


# Batch, heads, head dim, tokens, images: shapes of published models, and few-shot prompts.
MEDIA = {
    "OpenFlamingo, one sample": (1, 8, 64, 2048, 8),
    "OpenFlamingo, training": (32, 8, 64, 256, 5),
    "IDEFICS-9B": (8, 32, 128, 2048, 8),
    "Flamingo-80B": (4, 64, 128, 2048, 16),
}
# Items, latents, heads, head dim, features.
LATENT = {
    "OpenFlamingo, 1 image": (1, 64, 8, 64, 256),
    "OpenFlamingo, 160 images": (160, 64, 8, 64, 256),
    "IDEFICS, 64 images": (64, 64, 16, 96, 257),
    "4 clips of 2048 features": (4, 64, 16, 96, 2048),
    "4 clips of 8192 features": (4, 64, 16, 96, 8192),
}


def media(name: str, single_item: bool) -> Iterator[Traffic]:
    """Forward and backward of media attention, with a segment table that all layers share."""
    batch, heads, head_dim, tokens, images = MEDIA[name]
    q, d_out = (meta(batch, tokens, heads, head_dim, dtype=BF16) for _ in range(2))
    k, v = (meta(batch, images, 64, heads, head_dim, dtype=BF16) for _ in range(2))
    first, last = (meta(batch, tokens, dtype=torch.int32) for _ in range(2))
    gate = meta(1, dtype=torch.float32)
    _, segments = _moved(media_attention.segments, first, last, images, heads, single_item)
    arguments = MediaArguments(q, k, v, first, last, gate, head_dim**-0.5, single_item)
    case = f"media attention, {name}" + ("" if single_item else ", all previous images")
    yield Traffic(
        case,
        "forward",
        _size(q, k, v, q) / q.numel(),
        _moved(media_attention.forward, arguments)[0] / q.numel(),
    )
    moved, _ = _moved(media_attention.backward, d_out, segments, arguments)
    if single_item:
        chunk, _, _ = media_segments.chunking(batch, tokens, images, heads)
        chunks = -(-tokens // images // chunk)
        partial_sums = images * chunks if chunks > 1 else 0
        moved += 2 * 2 * 4 * batch * heads * 64 * head_dim * partial_sums  # dK and dV, fp32
    yield Traffic(case, "backward", _size(q, k, v, d_out, q, k, v) / q.numel(), moved / q.numel())


def latent(name: str) -> Iterator[Traffic]:
    """Forward and backward of latent attention."""
    items, latents, heads, head_dim, features = LATENT[name]
    q, k_latents, v_latents, d_out = (
        meta(items, latents, heads, head_dim, dtype=BF16) for _ in range(4)
    )
    k, v = (meta(items, features, heads, head_dim, dtype=BF16) for _ in range(2))
    inputs = (q, k, v, k_latents, v_latents)
    arguments = LatentArguments(*inputs, None, head_dim**-0.5)
    moved, (out, lse) = _moved(latent_attention.forward, arguments)
    case = f"latent attention, {name}"
    yield Traffic(case, "forward", _size(*inputs, out) / q.numel(), moved / q.numel())
    moved, _ = _moved(latent_attention.backward, d_out, arguments, out, lse)
    yield Traffic(case, "backward", _size(*inputs, *inputs, d_out) / q.numel(), moved / q.numel())


def pointwise() -> Iterator[Traffic]:
    """Forward and backward of every pointwise operation on 8192 rows of 4096 channels."""
    x, y = (meta(8192, 4096, dtype=BF16) for _ in range(2))
    weight, gate = meta(4096, dtype=BF16), meta(1, dtype=torch.float32)
    mean = meta(8192, dtype=torch.float32)
    calls: dict[str, tuple[tuple[Any, ...], ...]] = {
        "gated residual": (
            (3, gated_residual.forward, x, y, gate),
            (3, gated_residual.backward, x, y, gate),
        ),
        "gated GELU": (
            (2, gated_activation.forward, x, gate, "gelu"),
            (3, gated_activation.backward, y, x, gate, "gelu"),
        ),
        "LayerNorm": (
            (2, layer_norm.forward, x, weight, weight, 1e-5),
            (3, layer_norm.backward, y, x, weight, mean, mean, True),
        ),
    }
    for case, directions in calls.items():
        for direction, (passes, *call) in zip(("forward", "backward"), directions, strict=True):
            yield Traffic(
                case, direction, passes * _size(x) / x.numel(), _moved(*call)[0] / x.numel()
            )


def table() -> list[str]:
    """The Markdown table."""
    lines = [
        "| operation | direction | floor | moved | moved over floor |",
        "|---|---|---|---|---|",
    ]
    counted = [one for name in MEDIA for one in media(name, single_item=True)]
    counted += media("IDEFICS-9B", single_item=False)
    counted += [one for name in LATENT for one in latent(name)]
    counted += pointwise()
    return lines + [
        f"| {t.case} | {t.direction} | {t.floor:.2f} | {t.moved:.2f} | {t.moved / t.floor:.2f} |"
        for t in counted
    ]
