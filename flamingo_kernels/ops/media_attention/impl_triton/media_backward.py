"""Media attention backward: the gradients of an op call, and the kernel that does it in one pass.

One pass is for ranges of one item that fits a tile. A program owns a chunk of the tokens that see
one media item, for one key/value head. K and V stay resident, the softmax is recomputed,
``delta = rowsum(P * dP)`` needs neither the output nor its log-sum-exp, dQ is final, and dK and dV
accumulate in registers. They are final too if the item's tokens are one chunk; otherwise
``sum_media_partials_kernel`` adds the chunks in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._triton.configs import POINTWISE, LaunchConfig
from flamingo_kernels._triton.device import LOG2E
from flamingo_kernels._triton.launch import gate_gradient, launch
from flamingo_kernels.ops.media_attention.arguments import Arguments
from flamingo_kernels.ops.media_attention.impl_triton import media_segments
from flamingo_kernels.ops.media_attention.impl_triton.media_backward_two_pass import (
    backward_two_pass,
)
from flamingo_kernels.ops.media_attention.impl_triton.media_rows import (
    clipped_ranges,
    config_of_item,
    pointers,
    shared_arguments,
    tanh_of_gate,
    token_and_head,
    tokens_of,
)
from flamingo_kernels.precision import accumulator


def backward(
    d_out: Tensor, segments: Tensor | None, arguments: Arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``operators.backward``."""
    q, k, _v, first, last, gate, _scale, single_item = arguments
    if segments is None:
        segments = media_segments.segments(first, last, k.shape[1], k.shape[3], single_item)
    config = config_of_item("media_backward", q, k.shape[2]) if single_item else None
    if config is not None:
        d_q, d_k, d_v, d_tanh = backward_one_pass(config, segments, d_out, arguments)
    else:
        d_q, d_k, d_v, d_tanh = backward_two_pass(segments, d_out, arguments)
    if gate is None or d_tanh is None:
        return d_q, d_k, d_v, q.new_empty(0)
    return d_q, d_k, d_v, gate_gradient(d_tanh.reshape(-1, 1), gate)


def backward_one_pass(
    config: LaunchConfig, segments: Tensor, d_out: Tensor, arguments: Arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k and v, and partial sums of that of tanh(gate)."""
    q, k, v = arguments[:3]
    shared = shared_arguments(config, arguments)
    batch, tokens, media = q.shape[0], q.shape[1], k.shape[1]
    latents, kv_heads, head_dim = k.shape[2:]
    _, slots, places = media_segments.chunking(batch, tokens, media, kv_heads)
    sums: dict[str, Any] = {"dtype": accumulator(q.dtype), "device": q.device}
    partials = torch.empty((2, batch, places, kv_heads, latents, head_dim), **sums)
    d_q, d_k, d_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    d_tanh = None if arguments.gate is None else torch.empty((batch, slots, kv_heads), **sums)
    launch(
        media_backward_kernel,
        (batch * slots * kv_heads,),
        config,
        **shared,
        d_out=tokens_of(d_out),
        segments=segments,
        d_q=tokens_of(d_q),
        d_k=d_k,
        d_v=d_v,
        partials=partials,
        d_tanh=d_tanh,
        ENTRIES=segments.shape[1],
        SLOTS=slots,
        PARTIALS=places,
        stride_partial=partials.stride(0),
    )
    if places:
        block = 1024
        launch(
            sum_media_partials_kernel,
            (batch * media * kv_heads, -(-latents * head_dim // block)),
            POINTWISE,
            segments=segments,
            partials=partials,
            d_k=d_k,
            d_v=d_v,
            ITEMS=media,
            ENTRIES=segments.shape[1],
            PARTIALS=places,
            KV_HEADS=kv_heads,
            stride_partial=partials.stride(0),
            R=latents,
            D=head_dim,
            BLOCK=block,
        )
    return d_q, d_k, d_v, d_tanh


@triton.jit
def media_backward_kernel(
    q,  # Tokens
    k,  # Media
    v,  # Media
    d_out,  # Tokens
    first,  # Bound
    last,  # Bound
    gate,  # [1] or None
    segments,  # int32 [B, ENTRIES, 4], see media_segments.py
    d_q,  # Tokens
    d_k,  # [B, I, R, Hkv, D], contiguous
    d_v,  # [B, I, R, Hkv, D], contiguous
    partials,  # [2, B, PARTIALS, Hkv, R, D]
    d_tanh,  # [B, SLOTS, Hkv], the gradient of tanh(gate) by program; None without a gate
    T,
    ITEMS,
    ENTRIES,
    SLOTS,
    PARTIALS,
    KV_HEADS,
    stride_partial,  # from the partial sums of dK to those of dV
    SCALE: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_h = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    i_b = (tl.program_id(0) // KV_HEADS // SLOTS).to(tl.int64)
    slot = tl.program_id(0) // KV_HEADS % SLOTS
    p_chunk = segments + (i_b * ENTRIES + ITEMS + 1 + slot) * 4
    item = tl.load(p_chunk)
    begin = tl.load(p_chunk + 1, mask=item >= 0, other=0)
    end = tl.load(p_chunk + 2, mask=item >= 0, other=0)
    place = tl.load(p_chunk + 3, mask=item >= 0, other=-1)

    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < D
    i_r = tl.arange(0, BLOCK_R)
    m_r = i_r < R
    o_r = i_r.to(tl.int64)[:, None]
    o_item = tl.maximum(item, 0).to(tl.int64)
    b_tanh = tanh_of_gate(gate, ACC)
    b_d_tanh = tl.zeros([BLOCK_T], ACC)

    if item == ITEMS:  # tokens that see nothing
        for row_0 in tl.range(begin * G, end * G, BLOCK_T):
            rows = row_0 + tl.arange(0, BLOCK_T)
            i_t, i_qh, m_row = _rows_of_item(first, last, rows, i_b, i_h, item, end, ITEMS, G)
            tl.store(
                pointers(d_q, i_b, i_t, i_qh) + o_d,
                tl.zeros([BLOCK_T, BLOCK_D], d_q.ptr.dtype.element_ty),
                mask=m_row[:, None] & m_d,
            )
    elif item >= 0:
        rows_read = tl.where((item < ITEMS) & (begin < end), R, 0)
        m_kv = (i_r < rows_read)[:, None] & m_d
        p_k = k.ptr + i_b * k.stride_b + i_h * k.stride_h + o_item * k.stride_i
        p_v = v.ptr + i_b * v.stride_b + i_h * v.stride_h + o_item * v.stride_i
        b_k = tl.load(p_k + o_r * k.stride_r + o_d, mask=m_kv, other=0.0)
        b_v = tl.load(p_v + o_r * v.stride_r + o_d, mask=m_kv, other=0.0)
        b_dk = tl.zeros([BLOCK_R, BLOCK_D], ACC)
        b_dv = tl.zeros([BLOCK_R, BLOCK_D], ACC)
        for row_0 in tl.range(begin * G, end * G, BLOCK_T):
            rows = row_0 + tl.arange(0, BLOCK_T)
            i_t, i_qh, m_row = _rows_of_item(first, last, rows, i_b, i_h, item, end, ITEMS, G)
            # Rows of other items are zeros, so their P needs no mask: dP, dS and dO are zeros.
            m_q = m_row[:, None] & m_d
            b_q = tl.load(pointers(q, i_b, i_t, i_qh) + o_d, mask=m_q, other=0.0)
            b_do = tl.load(pointers(d_out, i_b, i_t, i_qh) + o_d, mask=m_q, other=0.0)

            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
            b_s *= SCALE * LOG2E
            if R < BLOCK_R:
                b_s = tl.where(m_r[None, :], b_s, float("-inf"))
            b_p = tl.exp2(b_s - tl.max(b_s, 1)[:, None])  # [BLOCK_T, BLOCK_R]
            b_p *= (1.0 / tl.sum(b_p, 1))[:, None]
            b_dv = tl.dot(
                tl.trans(b_p.to(b_do.dtype)), b_do, b_dv, input_precision=PRECISION, out_dtype=ACC
            )
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION, out_dtype=ACC)
            b_delta = tl.sum(b_p * b_dp, 1)
            b_d_tanh += b_delta
            b_ds = (b_p * (b_dp - b_delta[:, None]) * (b_tanh * SCALE)).to(b_q.dtype)
            b_dk = tl.dot(tl.trans(b_ds), b_q, b_dk, input_precision=PRECISION, out_dtype=ACC)
            b_dq = tl.dot(b_ds, b_k, input_precision=PRECISION, out_dtype=ACC)
            p_dq = pointers(d_q, i_b, i_t, i_qh) + o_d
            tl.store(p_dq, b_dq.to(d_q.ptr.dtype.element_ty), mask=m_q)

        b_dv *= b_tanh
        m_out = m_r[:, None] & m_d
        if place >= 0:
            o_partial = ((i_b * PARTIALS + place) * KV_HEADS + i_h) * (R * D)
            p_partial = partials + o_partial + o_r * D + o_d
            tl.store(p_partial, b_dk, mask=m_out)
            tl.store(p_partial + stride_partial, b_dv, mask=m_out)
        else:
            o_out = (((i_b * ITEMS + o_item) * R + o_r) * KV_HEADS + i_h) * D + o_d
            tl.store(d_k + o_out, b_dk.to(d_k.dtype.element_ty), mask=m_out)
            tl.store(d_v + o_out, b_dv.to(d_v.dtype.element_ty), mask=m_out)

    if gate is not None:
        tl.store(d_tanh + tl.program_id(0), tl.sum(b_d_tanh))


@triton.jit
def _rows_of_item(first, last, rows, i_b, i_h, item, end, ITEMS, G: tl.constexpr):
    """Return token and query head of each row, and whether it is before ``end`` and sees ``item``.

    Item I stands for "sees nothing".
    """
    i_t, i_qh = token_and_head(rows, i_h, G)
    b_first, b_last = clipped_ranges(first, last, i_b, i_t, i_t < end, ITEMS)
    b_item = tl.where(b_first <= b_last, b_last, ITEMS)
    return i_t, i_qh, (i_t < end) & (b_item == item)


@triton.jit
def sum_media_partials_kernel(
    segments,  # int32 [B, ENTRIES, 4], see media_segments.py
    partials,  # [2, B, PARTIALS, Hkv, R * D]: of dK, then of dV
    d_k,  # [B, I, R, Hkv, D]
    d_v,  # [B, I, R, Hkv, D]
    ITEMS,
    ENTRIES,
    PARTIALS,
    KV_HEADS,
    stride_partial,  # from the partial sums of dK to those of dV
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Items whose tokens are in several chunks; the others are final already."""
    i_h = tl.program_id(0) % KV_HEADS
    i_bi = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    i_b = i_bi // ITEMS
    p_item = segments + (i_b * ENTRIES + i_bi % ITEMS) * 4
    place = tl.load(p_item + 2)
    count = tl.load(p_item + 3)
    o_x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < R * D
    o_out = (i_bi * R + o_x // D) * (KV_HEADS * D) + i_h * D + o_x % D
    if count > 0:
        size_of_one = KV_HEADS * (R * D)
        o_partial = (i_b * PARTIALS + place) * size_of_one + i_h * (R * D) + o_x
        b_k = tl.zeros([BLOCK], partials.dtype.element_ty)
        b_v = tl.zeros([BLOCK], partials.dtype.element_ty)
        for _ in tl.range(0, count):
            b_k += tl.load(partials + o_partial, mask=m_x, other=0.0)
            b_v += tl.load(partials + stride_partial + o_partial, mask=m_x, other=0.0)
            o_partial += size_of_one
        tl.store(d_k + o_out, b_k.to(d_k.dtype.element_ty), mask=m_x)
        tl.store(d_v + o_out, b_v.to(d_v.dtype.element_ty), mask=m_x)
