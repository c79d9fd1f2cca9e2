"""What the latent kernels and their launchers share.

A row is a (latent, query head) pair of one key/value head, the G query heads of a group side by
side, so K and V of a group are read once for a tile.

Shape letters: N items, L latents, M media keys, H = G * Hkv query heads, Hkv key/value heads
(KV_HEADS), D head dim, S splits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._triton.configs import LaunchConfig
from flamingo_kernels._triton.launch import (
    architecture,
    dot_precision,
    padded,
    padded_head_dim,
    strided,
    triton_accumulator,
)
from flamingo_kernels.ops import tiles
from flamingo_kernels.ops.latent_attention.arguments import Arguments
from flamingo_kernels.ops.rows import unit_stride


class Rows(NamedTuple):
    """A tensor [N, L or M, H or Hkv, D]."""

    ptr: Tensor
    stride_n: int
    stride_l: int
    stride_h: int


def rows_of(tensor: Tensor) -> Rows:
    """Return a tensor as an argument of a kernel."""
    return strided(Rows, unit_stride(tensor))


def blocks_of(shared: dict[str, Any]) -> int:
    """Return the number of key blocks of an item, those of the media and of the latents."""
    return sum(-(-shared[size] // shared["BLOCK_K"]) for size in ("M", "L"))


def config_of(kernel: str, q: Tensor) -> LaunchConfig:
    config = tiles.lookup(kernel, padded_head_dim(q), q.element_size(), architecture(q))
    assert config is not None  # the shipped tiles hold one for every head dim and dtype
    return config


def shared_arguments(config: LaunchConfig, arguments: Arguments) -> dict[str, Any]:
    """Return the arguments that forward and backward take."""
    q, k_media, v_media, k_latents, v_latents, lengths, scale = arguments
    items, latents, heads, head_dim = q.shape
    _, features, kv_heads, _ = k_media.shape
    group = heads // max(kv_heads, 1)
    return {
        "q": rows_of(q),
        "k_media": rows_of(k_media),
        "v_media": rows_of(v_media),
        "k_latents": rows_of(k_latents),
        "v_latents": rows_of(v_latents),
        "lengths": None if lengths is None else lengths.contiguous(),
        "N": items,
        "L": latents,
        "M": features,
        "KV_HEADS": kv_heads,
        "SCALE": scale,
        "G": group,
        "D": head_dim,
        "BLOCK_L": min(padded(latents * group), config.rows),
        "BLOCK_K": config.keys,
        "BLOCK_D": padded_head_dim(q),
        "ACC": triton_accumulator(q.dtype),
        "PRECISION": dot_precision(q),
    }


@triton.jit
def row_tile(L, KV_HEADS, SPLITS, G: tl.constexpr, BLOCK_L: tl.constexpr):
    """Return item, key/value head, split, tile and rows of this program."""
    tiles = tl.cdiv(L * G, BLOCK_L)
    i_h = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    i_tile = tl.program_id(0) // KV_HEADS % tiles
    i_ns = tl.program_id(0) // KV_HEADS // tiles
    rows = i_tile * BLOCK_L + tl.arange(0, BLOCK_L)
    return (i_ns // SPLITS).to(tl.int64), i_h, i_ns % SPLITS, i_tile, rows


@triton.jit
def latent_and_head(rows, i_h, G: tl.constexpr):
    """Return the latent and the query head of each row, int64."""
    return (rows // G).to(tl.int64), i_h * G + rows % G


@triton.jit
def pointers(x, i_n, i_h, o_l):
    """Return where the values of each row start in a tensor [N, L, H, D]."""
    return (x.ptr + i_n * x.stride_n + i_h * x.stride_h + o_l * x.stride_l)[:, None]


@triton.jit
def valid_keys(lengths, i_n, M):
    """Return the number of valid media keys of an item, all M without ``lengths``."""
    length = i_n.to(tl.int32) * 0 + M
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + i_n).to(tl.int32), 0), length)
    return length


@triton.jit
def keys_of_block(
    k,
    v,
    i_n,
    i_h,
    block,
    limit,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Load a block of keys and values, [BLOCK_K, BLOCK_D]; those before ``limit`` are valid.

    Returns them, the index of each key, and which of them are valid.
    """
    i_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_k = i_k < limit
    m_kv = m_k[:, None] & (o_d < D)
    o_k = i_k.to(tl.int64)
    b_k = tl.load(pointers(k, i_n, i_h, o_k) + o_d, mask=m_kv, other=0.0)
    b_v = tl.load(pointers(v, i_n, i_h, o_k) + o_d, mask=m_kv, other=0.0)
    return b_k, b_v, i_k, m_k
