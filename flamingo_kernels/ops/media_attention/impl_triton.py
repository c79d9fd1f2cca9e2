"""Media attention through Triton: launchers. The kernels are in ``flamingo_kernels._triton``.

Shape letters: B rows of the batch, T tokens, I media slots, R latents, H query heads, Hkv key/value
heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flamingo_kernels._triton import configs
from flamingo_kernels._triton.configs import LaunchConfig
from flamingo_kernels._triton.launch import (
    TARGET_PROGRAMS,
    architecture,
    dot_precision,
    gate_gradient,
    launch,
    padded,
    padded_head_dim,
    reduce_partials,
    strides,
    triton_accumulator,
    unit_last_stride,
)
from flamingo_kernels._triton.media_backward import media_backward_kernel
from flamingo_kernels._triton.media_backward_general import (
    media_keys_backward_kernel,
    media_rows_backward_kernel,
)
from flamingo_kernels._triton.media_forward import media_forward_kernel
from flamingo_kernels._triton.plan import media_chunks_kernel, media_segments_kernel
from flamingo_kernels._triton.reduce import sum_media_partials_kernel
from flamingo_kernels.ops.media_attention import contract
from flamingo_kernels.precision import accumulator

# Tokens of a chunk. A chunk's partial dK and dV cost 16 * R * D bytes, its rows 6 * tokens * D in
# 16 bits: 17 % more at 1024 tokens. Shorter ones pay only where they make more programs.
LONGEST_CHUNK = 1024
# Latents of an item that one tile may hold.
MOST_KEYS = 128


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    last: Tensor,
    gate: Tensor | None,
    scale: float,
    single_item: bool,
) -> Tensor:
    """See ``api.media_cross_attention``; ``gate`` is already in the accumulation dtype."""
    q, k, v = (unit_last_stride(tensor) for tensor in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    latents = k.shape[2]
    in_one_tile = _config("media_forward", q, latents) if latents <= MOST_KEYS else None
    config = in_one_tile or _config("media_forward", q)
    arguments = _arguments(config, q, k, v, first, last, gate, scale)
    tiles = -(-q.shape[1] * arguments["G"] // arguments["BLOCK_T"])
    launch(
        media_forward_kernel,
        (q.shape[0] * tiles * arguments["KV_HEADS"],),
        config,
        **arguments,
        out=out,
        **strides("o", out, "bth"),
        ONE_TILE=single_item and latents <= arguments["BLOCK_R"],
    )
    return out


def backward(
    d_out: Tensor,
    plan_table: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    last: Tensor,
    gate: Tensor | None,
    scale: float,
    single_item: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and gate; that of the gate has no element where there is no gate."""
    d_out, q, k, v = (unit_last_stride(tensor) for tensor in (d_out, q, k, v))
    in_one_tile = single_item and k.shape[2] <= MOST_KEYS
    one_pass = in_one_tile and _config("media_backward", q, k.shape[2]) is not None
    if plan_table is None:
        plan_table = plan(first, last, k.shape[1], k.shape[3], single_item)
    inputs = (plan_table, d_out, q, k, v, first, last, gate, scale)
    d_q, d_k, d_v, d_tanh = (_backward_one_pass if one_pass else _backward_general)(*inputs)
    if gate is None:
        return d_q, d_k, d_v, q.new_empty(0)
    return d_q, d_k, d_v, gate_gradient(d_tanh.reshape(-1, 1), gate)


def _backward_one_pass(
    plan_table: Tensor,
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    last: Tensor,
    gate: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    config = _config("media_backward", q, k.shape[2])
    arguments = _arguments(config, q, k, v, first, last, gate, scale)
    batch, tokens, media = q.shape[0], q.shape[1], k.shape[1]
    latents, kv_heads, head_dim = k.shape[2:]
    _, slots, places = chunking(batch, tokens, media, kv_heads)
    sums = {"dtype": accumulator(q.dtype), "device": q.device}
    partials = torch.empty((2, batch, places, kv_heads, latents, head_dim), **sums)
    d_q, d_k, d_v = _gradients(q, k, v)
    d_tanh = None if gate is None else torch.empty((batch, slots, kv_heads), **sums)
    launch(
        media_backward_kernel,
        (batch * slots * kv_heads,),
        config,
        **arguments,
        d_out=d_out,
        **strides("g", d_out, "bth"),
        plan=plan_table,
        d_q=d_q,
        d_k=d_k,
        d_v=d_v,
        partials=partials,
        d_tanh=d_tanh,
        ENTRIES=plan_table.shape[1],
        SLOTS=slots,
        PARTIALS=places,
        stride_partial=partials.stride(0),
    )
    if places:
        block = 1024
        launch(
            sum_media_partials_kernel,
            (batch * media * kv_heads, -(-latents * head_dim // block)),
            configs.POINTWISE,
            plan=plan_table,
            partials=partials,
            d_k=d_k,
            d_v=d_v,
            ITEMS=media,
            ENTRIES=plan_table.shape[1],
            PARTIALS=places,
            KV_HEADS=kv_heads,
            stride_partial=partials.stride(0),
            R=latents,
            D=head_dim,
            BLOCK=block,
        )
    return d_q, d_k, d_v, d_tanh


def _backward_general(
    plan_table: Tensor,
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    last: Tensor,
    gate: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    batch, tokens, media = q.shape[0], q.shape[1], k.shape[1]
    latents, kv_heads = k.shape[2:4]
    rows = tokens * (q.shape[2] // kv_heads)
    sums = {"dtype": accumulator(q.dtype), "device": q.device}
    d_q, d_k, d_v = _gradients(q, k, v)
    log2_sum, delta = torch.empty((2, batch, kv_heads, rows), **sums)
    of_output = {"d_out": d_out, **strides("g", d_out, "bth")}

    config = _config("media_rows_backward", q)
    arguments = _arguments(config, q, k, v, first, last, gate, scale)
    tiles = -(-rows // arguments["BLOCK_T"])
    d_tanh = None if gate is None else torch.empty((batch, tiles, kv_heads), **sums)
    launch(
        media_rows_backward_kernel,
        (batch * tiles * kv_heads,),
        config,
        **arguments,
        **of_output,
        d_q=d_q,
        log2_sum=log2_sum,
        delta=delta,
        d_tanh=d_tanh,
    )

    config = _config("media_keys_backward", q)
    arguments = _arguments(config, q, k, v, first, last, gate, scale)
    programs = batch * media * kv_heads * -(-latents // arguments["BLOCK_R"])
    longest_split = 4 * arguments["BLOCK_T"]
    splits = max(1, min(TARGET_PROGRAMS // max(programs, 1), -(-rows // longest_split)))
    final = splits == 1
    into_k, into_v = (d_k, d_v) if final else torch.empty((2, splits, *d_k.shape), **sums)
    launch(
        media_keys_backward_kernel,
        (programs * splits,),
        config,
        **arguments,
        **of_output,
        plan=plan_table,
        log2_sum=log2_sum,
        delta=delta,
        d_k=into_k,
        d_v=into_v,
        ENTRIES=plan_table.shape[1],
        SPLITS=splits,
        stride_split=d_k.numel(),
    )
    if not final:
        reduce_partials(into_k, d_k)
        reduce_partials(into_v, d_v)
    return d_q, d_k, d_v, d_tanh


def plan(first: Tensor, last: Tensor, media: int, kv_heads: int, single_item: bool) -> Tensor:
    """Segments, and for ranges of single items chunks: the table of ``_triton/plan.py``."""
    batch, tokens = first.shape
    entries = contract.plan_entries(media, tokens, single_item)
    table = first.new_empty((batch, entries, 4))
    config = configs.PLAN
    shared = {
        "plan": table,
        "T": tokens,
        "ITEMS": media,
        "ENTRIES": entries,
        "BLOCK_I": config.keys,
    }
    launch(
        media_segments_kernel,
        (batch * -(-(media + 1) // config.keys),),
        config,
        first=first,
        last=last,
        **shared,
        **strides("f", first, "bt"),
        **strides("l", last, "bt"),
        BLOCK_T=config.rows,
    )
    if single_item:
        chunk, slots, places = chunking(batch, tokens, media, kv_heads)
        launch(
            media_chunks_kernel,
            (batch,),
            config,
            **shared,
            CHUNK=chunk,
            SLOTS=slots,
            PARTIALS=places,
        )
    return table


def chunking(batch: int, tokens: int, media: int, kv_heads: int) -> tuple[int, int, int]:
    """Tokens of a chunk, and how many chunks and partial sums a row of the batch has at most.

    Few partial sums in large batches, many programs in small ones; from shapes alone.
    """
    wanted = max(1, batch * kv_heads * tokens // TARGET_PROGRAMS)
    power = 1 << (wanted.bit_length() - 1)
    chunk = min(max(power, contract.SHORTEST_CHUNK), LONGEST_CHUNK)
    # Only segments of several chunks, so longer than one, have partial sums.
    places = 0 if tokens <= chunk else min(2 * tokens // chunk, -(-tokens // chunk) + media)
    return chunk, contract.chunk_slots(media, tokens, chunk), places


def _gradients(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]


def _config(kernel: str, q: Tensor, latents: int = 64) -> LaunchConfig | None:
    return configs.lookup(
        kernel, padded_head_dim(q), q.element_size(), architecture(q), padded(latents)
    )


def _arguments(
    config: LaunchConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    last: Tensor,
    gate: Tensor | None,
    scale: float,
) -> dict[str, Any]:
    """The arguments that all kernels of this op share."""
    tokens, heads, head_dim = q.shape[1:]
    media, latents, kv_heads = k.shape[1:4]
    group = heads // kv_heads
    return {
        "q": q,
        "k": k,
        "v": v,
        "first": first,
        "last": last,
        "gate": gate,
        "T": tokens,
        "ITEMS": media,
        "KV_HEADS": kv_heads,
        **strides("q", q, "bth"),
        **strides("k", k, "birh"),
        **strides("v", v, "birh"),
        **strides("f", first, "bt"),
        **strides("l", last, "bt"),
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
