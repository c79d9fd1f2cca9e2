"""What the media kernels and their launchers share.

A row is a (token, query head) pair of one key/value head, the G query heads of a group side by
side: K and V of a group are read once, and a decoding step fills more of its tile.

Shape letters: B rows of the batch, T tokens, I media slots (ITEMS), R latents, H = G * Hkv query
heads, Hkv key/value heads (KV_HEADS), D head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._triton.configs import LaunchConfig
from flamingo_kernels._triton.device import tanh
from flamingo_kernels._triton.launch import (
    architecture,
    dot_precision,
    padded,
    padded_head_dim,
    strided,
    triton_accumulator,
)
from flamingo_kernels.ops import tiles
from flamingo_kernels.ops.media_attention.arguments import Arguments
from flamingo_kernels.ops.rows import unit_stride

# Latents of an item that one tile may hold.
MOST_KEYS = 128


class Tokens(NamedTuple):
    """A tensor [B, T, H, D]."""

    ptr: Tensor
    stride_b: int
    stride_t: int
    stride_h: int


class Media(NamedTuple):
    """A tensor [B, I, R, Hkv, D]."""

    ptr: Tensor
    stride_b: int
    stride_i: int
    stride_r: int
    stride_h: int


class Bound(NamedTuple):
    """The first or the last items that tokens see, int32 [B, T]."""

    ptr: Tensor
    stride_b: int
    stride_t: int


def tokens_of(tensor: Tensor) -> Tokens:
    """Return queries, outputs or their gradients as an argument of a kernel."""
    return strided(Tokens, unit_stride(tensor))


def config_of(kernel: str, q: Tensor) -> LaunchConfig:
    """Return the config of a kernel that loops over the keys of an item."""
    config = tiles.lookup(kernel, padded_head_dim(q), q.element_size(), architecture(q))
    assert config is not None  # a test holds that there is one for every head dim and dtype
    return config


def config_of_item(kernel: str, q: Tensor, latents: int) -> LaunchConfig | None:
    """Return the config of a kernel whose tile holds an item, or None if none does."""
    if latents > MOST_KEYS:
        return None
    sizes = (q.element_size(), architecture(q), padded(latents))
    return tiles.lookup(kernel, padded_head_dim(q), *sizes)


def shared_arguments(config: LaunchConfig, arguments: Arguments) -> dict[str, Any]:
    """Return the arguments that all kernels of this op take."""
    q, k, v, first, last, gate, scale, _single_item = arguments
    tokens, heads, head_dim = q.shape[1:]
    media, latents, kv_heads = k.shape[1:4]
    group = heads // kv_heads
    return {
        "q": tokens_of(q),
        "k": strided(Media, unit_stride(k)),
        "v": strided(Media, unit_stride(v)),
        "first": strided(Bound, first),
        "last": strided(Bound, last),
        "gate": gate,
        "T": tokens,
        "ITEMS": media,
        "KV_HEADS": kv_heads,
        "SCALE": scale,
        "G": group,
        "R": latents,
        "D": head_dim,
        "BLOCK_T": min(padded(tokens * group), config.rows),
        "BLOCK_R": min(padded(latents), config.keys),
        "BLOCK_D": padded_head_dim(q),
        "ACC": triton_accumulator(q.dtype),
        "PRECISION": dot_precision(q),
    }


@triton.jit
def clipped_ranges(first, last, i_b, i_t, mask, ITEMS):
    """Load the ranges of a block of tokens, cut to the slots there are; empty: first > last."""
    o_t = i_t.to(tl.int64)
    p_first = first.ptr + i_b * first.stride_b + o_t * first.stride_t
    p_last = last.ptr + i_b * last.stride_b + o_t * last.stride_t
    b_first = tl.maximum(tl.load(p_first, mask=mask, other=0), 0)
    b_last = tl.minimum(tl.load(p_last, mask=mask, other=-1), ITEMS - 1)
    return b_first, b_last


@triton.jit
def row_tile(T, KV_HEADS, G: tl.constexpr, BLOCK_T: tl.constexpr):
    """Return batch row, key/value head and rows of the tile that this program owns."""
    tiles = tl.cdiv(T * G, BLOCK_T)
    i_h = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    i_tile = tl.program_id(0) // KV_HEADS % tiles
    i_b = (tl.program_id(0) // KV_HEADS // tiles).to(tl.int64)
    return i_b, i_h, i_tile * BLOCK_T + tl.arange(0, BLOCK_T)


@triton.jit
def token_and_head(rows, i_h, G: tl.constexpr):
    """Return the token and the query head of each row, int64."""
    return (rows // G).to(tl.int64), i_h * G + rows % G


@triton.jit
def items_of_tile(b_first, b_last, ITEMS):
    """Return which rows see anything, and the lowest and the highest item that any row sees."""
    m_sees = b_first <= b_last
    lowest = tl.min(tl.where(m_sees, b_first, ITEMS))
    highest = tl.max(tl.where(m_sees, b_last, -1))
    return m_sees, lowest, highest


@triton.jit
def pointers(x, i_b, i_t, i_qh):
    """Return where the values of each row start in a tensor [B, T, H, D]."""
    return (x.ptr + i_b * x.stride_b + i_t * x.stride_t + i_qh * x.stride_h)[:, None]


@triton.jit
def keys_of_step(
    k,
    v,
    i_b,
    i_h,
    step,
    lowest,
    b_first,
    b_last,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Load the keys and values of one step of a row tile's loop.

    Returns them, [BLOCK_R, BLOCK_D], which rows see their item, and which keys are within it.
    """
    tiles_of_item: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    item = lowest + step // tiles_of_item
    i_r = step % tiles_of_item * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_row = (b_first <= item) & (item <= b_last)
    m_r = i_r < R
    # No row of the tile sees the item: nothing of it is read, 0 * NaN would be NaN.
    # Spread, then compared: the interpreter of Triton 3.9 takes no comparison of scalars as a mask.
    m_seen = tl.broadcast_to(tl.max(m_row.to(tl.int32)), [BLOCK_R]) > 0
    m_kv = (m_r & m_seen)[:, None] & (o_d < D)
    o_item = item.to(tl.int64)
    o_r = i_r.to(tl.int64)[:, None]
    p_k = k.ptr + i_b * k.stride_b + i_h * k.stride_h + o_item * k.stride_i + o_r * k.stride_r
    p_v = v.ptr + i_b * v.stride_b + i_h * v.stride_h + o_item * v.stride_i + o_r * v.stride_r
    b_k = tl.load(p_k + o_d, mask=m_kv, other=0.0)
    b_v = tl.load(p_v + o_d, mask=m_kv, other=0.0)
    return b_k, b_v, m_row, m_r


@triton.jit
def tanh_of_gate(gate, ACC: tl.constexpr):
    """Return tanh(gate), or 1 without a gate."""
    b_tanh = tl.zeros([], ACC) + 1.0
    if gate is not None:
        b_tanh = tanh(tl.load(gate).to(ACC))
    return b_tanh
