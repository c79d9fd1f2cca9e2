"""Latent attention through Triton: launchers. The kernels are in ``flamingo_kernels._triton``.

Shape letters: N items, L latents, M media keys, H heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flamingo_kernels._triton import configs
from flamingo_kernels._triton.configs import LaunchConfig
from flamingo_kernels._triton.latent_backward import latent_backward_kernel
from flamingo_kernels._triton.latent_forward import latent_combine_kernel, latent_forward_kernel
from flamingo_kernels._triton.launch import (
    TARGET_PROGRAMS,
    architecture,
    dot_precision,
    launch,
    padded,
    padded_head_dim,
    reduce_partials,
    strides,
    triton_accumulator,
    unit_last_stride,
)
from flamingo_kernels.precision import accumulator

# Keys of a forward split: its partial output adds 8 bytes a latent and channel, written and read
# back, to 4 bytes a key and channel in 16 bits: 12 % for 64 latents. Images are never split.
SPLIT_KEYS = 1024


def forward(
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp per query, [N, H, L] in the accumulation dtype."""
    config = _config("latent_forward", q)
    arguments = _arguments(config, q, k_media, v_media, k_latents, v_latents, lengths, scale)
    items, latents, heads, head_dim = q.shape
    sums = {"dtype": accumulator(q.dtype), "device": q.device}
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((items, heads, latents), **sums)
    steps = -(-SPLIT_KEYS // config.keys)
    splits = max(1, -(-_blocks(arguments) // steps))
    into, into_lse = out, lse
    if splits > 1:
        into = torch.empty((splits, *out.shape), **sums)
        into_lse = torch.empty((splits, *lse.shape), **sums)
    tiles = -(-latents // arguments["BLOCK_L"])
    launch(
        latent_forward_kernel,
        (items * splits * tiles * heads,),
        config,
        **arguments,
        out=into,
        lse=into_lse,
        SPLITS=splits,
        STEPS=steps,
        IS_SPLIT=splits > 1,
    )
    if splits > 1:
        block_l = min(arguments["BLOCK_L"], configs.COMBINE.rows)
        launch(
            latent_combine_kernel,
            (items * -(-latents // block_l) * heads,),
            configs.COMBINE,
            partial_out=into,
            partial_lse=into_lse,
            out=out,
            lse=lse,
            N=items,
            L=latents,
            H=heads,
            SPLITS=splits,
            D=head_dim,
            BLOCK_L=block_l,
            BLOCK_D=arguments["BLOCK_D"],
            ACC=arguments["ACC"],
        )
    return out, lse


def backward(
    d_out: Tensor,
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k_media, v_media, k_latents and v_latents."""
    config = _config("latent_backward", q)
    arguments = _arguments(config, q, k_media, v_media, k_latents, v_latents, lengths, scale)
    d_out, out = unit_last_stride(d_out), unit_last_stride(out)
    items, latents, heads, _ = q.shape
    tiles = -(-latents // arguments["BLOCK_L"])
    blocks = _blocks(arguments)
    splits = max(1, min(TARGET_PROGRAMS // max(items * heads * tiles, 1), blocks))
    steps = -(-blocks // splits)
    splits = -(-blocks // steps)

    inputs = (q, k_media, v_media, k_latents, v_latents)
    gradients = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs]
    shares = [splits, tiles, tiles, tiles, tiles]
    into = [
        gradient
        if count == 1
        else torch.empty(
            (count, *gradient.shape), dtype=accumulator(q.dtype), device=gradient.device
        )
        for gradient, count in zip(gradients, shares, strict=True)
    ]
    names = ("d_q", "d_k_media", "d_v_media", "d_k_latents", "d_v_latents")
    launch(
        latent_backward_kernel,
        (items * splits * tiles * heads,),
        config,
        **arguments,
        **dict(zip(names, into, strict=True)),
        out=out,
        d_out=d_out,
        lse=lse.contiguous(),
        **strides("o", out, "nlh"),
        **strides("g", d_out, "nlh"),
        SPLITS=splits,
        STEPS=steps,
    )
    for partials, gradient, count in zip(into, gradients, shares, strict=True):
        if count > 1:
            reduce_partials(partials, gradient)
    return tuple(gradients)


def _blocks(arguments: dict[str, Any]) -> int:
    """Key blocks of an item, media and latents."""
    return sum(-(-arguments[size] // arguments["BLOCK_K"]) for size in ("M", "L"))


def _config(kernel: str, q: Tensor) -> LaunchConfig:
    return configs.lookup(kernel, padded_head_dim(q), q.element_size(), architecture(q))


def _arguments(
    config: LaunchConfig,
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    lengths: Tensor | None,
    scale: float,
) -> dict[str, Any]:
    """The arguments that forward and backward share."""
    q, k_media, v_media, k_latents, v_latents = (
        unit_last_stride(tensor) for tensor in (q, k_media, v_media, k_latents, v_latents)
    )
    _, latents, heads, head_dim = q.shape
    return {
        "q": q,
        "k_media": k_media,
        "v_media": v_media,
        "k_latents": k_latents,
        "v_latents": v_latents,
        "lengths": None if lengths is None else lengths.contiguous(),
        "N": q.shape[0],
        "L": latents,
        "M": k_media.shape[1],
        "H": heads,
        **strides("q", q, "nlh"),
        **strides("k", k_media, "nmh"),
        **strides("v", v_media, "nmh"),
        **strides("kl", k_latents, "nlh"),
        **strides("vl", v_latents, "nlh"),
        "SCALE": scale,
        "D": head_dim,
        "BLOCK_L": min(padded(latents), config.rows),
        "BLOCK_K": config.keys,
        "BLOCK_D": padded_head_dim(q),
        "ACC": triton_accumulator(q.dtype),
        "PRECISION": dot_precision(q),
    }
