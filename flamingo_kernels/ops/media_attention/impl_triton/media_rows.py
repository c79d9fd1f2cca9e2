"""What the media kernels and their launchers share.

A row is a (token, query head) pair of one key/value head, the G query heads of a group side by
side: K and V of a group are read once, and a decoding step fills more of its tile.

The keys of all items are one list: key s is latent ``s % R`` of item ``s // R``, and a flat list of
keys is one of items of one key each. A tile of rows loops over blocks of keys, from the lowest to
the highest that a row sees: its own ranges say which, there is no mask object. A key that no row of
the tile sees is not read, so it may hold NaN: 0 * NaN would be NaN.

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
    q, k, v, first, last, gate, scale, single_item = arguments
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
        "BLOCK_R": min(padded(latents), config.keys) if single_item else config.keys,
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
def key_ranges(first, last, i_b, i_t, mask, ITEMS, R: tl.constexpr):
    """Load the first key that each row sees and one past the last, with items end to end.

    Clipped to the keys there are. An empty range ends at 0.
    """
    b_first, b_last = clipped_ranges(first, last, i_b, i_t, mask, ITEMS)
    m_sees = b_first <= b_last
    return tl.where(m_sees, b_first, 0) * R, tl.where(m_sees, b_last + 1, 0) * R


@triton.jit
def _next_keys(b_start, b_stop, key, stop):
    """Return the next keys from ``key`` on, before ``stop``, that rows see without a gap.

    Two looks forward reach the end where all ranges overlap, or follow one another. Otherwise what
    is left comes next. The end is not past the first key where no row sees any more.
    """
    first = tl.min(tl.where(b_stop > key, tl.maximum(b_start, key), stop))
    end = first
    for _ in tl.static_range(2):
        end = tl.maximum(end, tl.max(tl.where(b_start <= end, b_stop, 0)))
    return first, tl.minimum(end, stop)


@triton.jit
def first_block(b_start, b_stop, key, stop, R: tl.constexpr, STEP: tl.constexpr):
    """Return the first block of the keys ``key..stop-1`` that rows see, its end, and their number.

    Blocks that lie in one item each are named by their number, others by their first key. The end
    is that of the keys without a gap: what no row sees is stepped over, so it may hold NaN.
    """
    first, end = _next_keys(b_start, b_stop, key, stop)
    if R % STEP == 0:
        return first // STEP, stop, tl.cdiv(stop - first, STEP)
    blocks = 0
    from_key = first
    to_key = end
    while from_key < to_key:
        blocks += tl.cdiv(to_key - from_key, STEP)
        from_key, to_key = _next_keys(b_start, b_stop, to_key, stop)
    return first, end, blocks


@triton.jit
def next_block(b_start, b_stop, block, end, stop, R: tl.constexpr, STEP: tl.constexpr):
    """Return the block after ``block``, and its end, as ``first_block`` does."""
    if R % STEP == 0:
        return block + 1, end
    block += STEP
    if block >= end:
        block, end = _next_keys(b_start, b_stop, end, stop)
    return block, end


@triton.jit
def pointers(x, i_b, i_t, i_qh):
    """Return where the values of each row start in a tensor [B, T, H, D]."""
    return (x.ptr + i_b * x.stride_b + i_t * x.stride_t + i_qh * x.stride_h)[:, None]


@triton.jit
def key_pointers(x, i_b, i_h, block, i_k, R: tl.constexpr, STEP: tl.constexpr):
    """Return where the values of each key of a block start in a tensor [B, I, R, Hkv, D]."""
    p_x = x.ptr + i_b * x.stride_b + i_h * x.stride_h
    if R % STEP == 0:
        zero = i_h * 0  # int64; the counter of an interpreted loop is no tensor
        p_x += (zero + block // (R // STEP)) * x.stride_i
        p_x += (zero + block % (R // STEP) * STEP) * x.stride_r
        p_x += i_k.to(tl.int64) * x.stride_r
    else:
        keys = block + i_k
        p_x += (keys // R).to(tl.int64) * x.stride_i + (keys % R).to(tl.int64) * x.stride_r
    return p_x[:, None]


@triton.jit
def sees(start, stop, key):
    """Return whether ``start <= key < stop``, where ``start <= stop``.

    It is one comparison: differences below zero wrap around. A mask of two spills on gfx942.
    """
    return (key - start).to(tl.uint32) < (stop - start).to(tl.uint32)


@triton.jit
def keys_of_block(
    k,
    v,
    i_b,
    i_h,
    block,
    end,
    b_start,
    b_stop,
    R: tl.constexpr,
    D: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Load the keys and values of a block, and say which rows see them.

    Returns two tiles [BLOCK_R, BLOCK_D] and one [BLOCK_T, BLOCK_R].
    """
    i_k = tl.arange(0, BLOCK_R)
    if R % STEP == 0:  # rows see all of the block, or nothing; if no row does, it is not read
        m_row = (b_start <= block * STEP) & (block * STEP < b_stop)
        m_s = m_row[:, None] & (i_k < STEP)[None, :]
        # Spread, then compared: Triton's interpreter takes no comparison of scalars as a mask.
        m_k = (i_k < STEP) & (tl.broadcast_to(tl.max(m_row.to(tl.int32)), [BLOCK_R]) > 0)
    else:
        m_k = i_k < end - block
        b_stop = tl.maximum(tl.minimum(b_stop, end), b_start)
        m_s = sees(b_start[:, None], b_stop[:, None], (block + i_k)[None, :])
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_kv = m_k[:, None] & (o_d < D)
    b_k = tl.load(key_pointers(k, i_b, i_h, block, i_k, R, STEP) + o_d, mask=m_kv, other=0.0)
    b_v = tl.load(key_pointers(v, i_b, i_h, block, i_k, R, STEP) + o_d, mask=m_kv, other=0.0)
    return b_k, b_v, m_s


@triton.jit
def tanh_of_gate(gate, ACC: tl.constexpr):
    """Return tanh(gate), or 1 without a gate."""
    b_tanh = tl.zeros([], ACC) + 1.0
    if gate is not None:
        b_tanh = tanh(tl.load(gate).to(ACC))
    return b_tanh
