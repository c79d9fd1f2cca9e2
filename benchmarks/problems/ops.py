"""Problems of single ops: media attention, latent attention, the pointwise ops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import reference.attention
import reference.pointwise
from benchmarks.cases import RANGES, Case, LatentShape, MediaShape, PointwiseShape, RangeShape
from benchmarks.problems.base import (
    Cost,
    Leaves,
    Problem,
    flat_keys,
    key_ranges,
    media_locations,
    media_spans,
    seen_pairs,
)
from flamingo_kernels.ops import KeyRanges
from testing.budgets import attention_terms


def textbook_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Attend with q [B,T,H,D], k, v [B,K,Hkv,D], visible bool [B,T,K], all in the given dtype."""
    if k.shape[2] != q.shape[2]:
        k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bthd,bkhd->bhtk", q, k) * q.shape[-1] ** -0.5
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None], float("-inf"))
    return torch.einsum("bhtk,bkhd->bthd", scores.softmax(-1).nan_to_num(), v)


def _randn(*shape: int, like: tuple[torch.dtype, torch.device]) -> Tensor:
    dtype, device = like
    return torch.randn(*shape).to(dtype).to(device)


def _media(case: Case, device: torch.device) -> Problem:
    shape: MediaShape = case.shape
    dtype = getattr(torch, case.dtype)
    rows = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
    # Views of one projection's output, as in the model.
    fused = _randn(shape.batch, shape.images, shape.latents, 2, *rows[2:], like=(dtype, device))
    leaves = {"q": _randn(*rows, like=(dtype, device)), "k": fused[..., 0, :, :].detach()}
    leaves["v"] = fused[..., 1, :, :].detach()
    seed = _randn(*rows, like=(dtype, device))
    locations = media_locations(shape).to(device)
    spans = media_spans(shape, locations)

    def exact(leaves: Leaves) -> Tensor:
        return reference.attention.media_cross_attention(
            *(leaves[name] for name in "qkv"), spans.first, spans.last
        )

    def plain(leaves: Leaves) -> Tensor:
        visible = spans.visible(shape.images).repeat_interleave(shape.latents, -1)
        return textbook_attention(
            leaves["q"], flat_keys(leaves["k"]), flat_keys(leaves["v"]), visible
        )

    size = dtype.itemsize
    text = leaves["q"].numel() * size
    media = 2 * leaves["k"].numel() * size
    if shape.layout == "decode" and shape.attend == "last":
        media //= shape.images
    # One matrix product of all visible scores: the forward has 2, the backward 5 (it recomputes).
    product = 2.0 * seen_pairs(spans, shape.images) * shape.latents * rows[2] * rows[3]
    cost = Cost(2 * text + media, 3 * text + 2 * media, 2 * product, 5 * product)
    terms = attention_terms(leaves["q"], leaves["k"], leaves["v"], shape.head_dim**-0.5, seed)
    return Problem(
        case,
        device,
        dtype,
        leaves,
        seed,
        exact,
        plain,
        cost,
        {"spans": spans, "locations": locations, "fused": fused},
        {"out": terms["out"], **{name: terms[f"d{name}"] for name in "qkv"}},
    )


def _ranges(case: Case, device: torch.device) -> Problem:
    shape: RangeShape = case.shape
    dtype = getattr(torch, case.dtype)
    rows = (1, shape.tokens, shape.heads, shape.head_dim)
    fused = _randn(1, shape.keys, 2, shape.kv_heads, shape.head_dim, like=(dtype, device))
    k, v = fused.unbind(2)  # views of one projection's output, as in training
    if not case.training:  # as in a cache
        k, v = k.contiguous(), v.contiguous()
    leaves = {"q": _randn(*rows, like=(dtype, device)), "k": k.detach(), "v": v.detach()}
    seed = _randn(*rows, like=(dtype, device))
    ranges = key_ranges(shape)
    bounds = torch.stack((ranges.start, ranges.stop), -1)[0]
    runs = [
        (*bound.tolist(), int(count))
        for bound, count in zip(
            *torch.unique_consecutive(bounds, dim=0, return_counts=True), strict=True
        )
    ]
    ranges = KeyRanges(ranges.start.to(device), ranges.stop.to(device))

    def run_by_run(attend: Callable[..., Tensor], leaves: Leaves) -> Tensor:
        """Attend without what no token sees; all scores at once would not fit into memory."""
        parts = []
        queries = leaves["q"].split([count for *_, count in runs], 1)
        for q, (start, stop, _) in zip(queries, runs, strict=True):
            keys = (leaves[name][:, start:stop] for name in "kv")
            parts.append(checkpoint(attend, q, *keys, use_reentrant=False))
        return torch.cat(parts, 1)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        every = KeyRanges.everything(1, q.shape[1], k.shape[1], device)
        return reference.attention.key_range_attention(q, k, v, every.start, every.stop)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return textbook_attention(q, k, v, None)

    size = dtype.itemsize
    text = leaves["q"].numel() * size
    seen = int(ranges.spans.seen(shape.keys).sum())
    media = 2 * seen * shape.kv_heads * shape.head_dim * size
    pairs = sum((stop - start) * count for start, stop, count in runs)
    product = 2.0 * pairs * shape.heads * shape.head_dim
    cost = Cost(2 * text + media, 3 * text + 2 * media, 2 * product, 5 * product)
    terms = attention_terms(leaves["q"], k, v, shape.head_dim**-0.5, seed)
    return Problem(
        case,
        device,
        dtype,
        leaves,
        seed,
        partial(run_by_run, exact),
        partial(run_by_run, plain),
        cost,
        {"spans": ranges},
        {"out": terms["out"], **{name: terms[f"d{name}"] for name in "qkv"}},
    )


def _latent(case: Case, device: torch.device) -> Problem:
    shape: LatentShape = case.shape
    dtype = getattr(torch, case.dtype)
    heads = (shape.heads, shape.head_dim)
    q = _randn(shape.items, shape.latents, *heads, like=(dtype, device))
    media = _randn(shape.items, shape.features, 2, *heads, like=(dtype, device))
    latents = _randn(shape.items, shape.latents, 2, *heads, like=(dtype, device))
    leaves = {
        "q": q,
        "k_media": media[:, :, 0].detach(),
        "v_media": media[:, :, 1].detach(),
        "k_latents": latents[:, :, 0].detach(),
        "v_latents": latents[:, :, 1].detach(),
    }
    seed = _randn(*q.shape, like=(dtype, device))

    def exact(leaves: Leaves) -> Tensor:
        return reference.attention.latent_attention(*leaves.values())

    def plain(leaves: Leaves) -> Tensor:
        return textbook_attention(leaves["q"], *concatenated(leaves), None)

    size = dtype.itemsize
    queries, keys = q.numel() * size, (media.numel() + latents.numel()) * size
    product = 2.0 * q.numel() * (shape.features + shape.latents)
    # The floor of docs/performance.md.
    cost = Cost(2 * queries + keys, 6 * queries + 2 * keys, 2 * product, 5 * product)
    k, v = concatenated(leaves)
    found = attention_terms(q, k, v, shape.head_dim**-0.5, seed)
    terms = {"out": found["out"], **{name: found[f"d{name[0]}"] for name in leaves}}
    return Problem(case, device, dtype, leaves, seed, exact, plain, cost, terms=terms)


def concatenated(leaves: Leaves) -> tuple[Tensor, Tensor]:
    """Return keys and values [N, M + L, H, D] of [features; latents]."""
    k = torch.cat((leaves["k_media"], leaves["k_latents"]), 1)
    return k, torch.cat((leaves["v_media"], leaves["v_latents"]), 1)


def _pointwise(case: Case, device: torch.device) -> Problem:
    shape: PointwiseShape = case.shape
    dtype = getattr(torch, case.dtype)
    like = (dtype, device)
    x = _randn(shape.rows, shape.channels, like=like)
    values = x.numel() * dtype.itemsize
    leaves: Leaves = {"x": x}
    if case.op == "layer_norm":
        leaves |= {name: _randn(shape.channels, like=like) for name in ("weight", "bias")}
        exact = reference.pointwise.layer_norm
        cost = Cost(2 * values, 3 * values, 8.0 * x.numel(), 12.0 * x.numel())
    elif case.op == "gated_residual":
        leaves |= {"y": _randn(shape.rows, shape.channels, like=like), "gate": _gate(like)}
        exact = reference.pointwise.gated_residual
        cost = Cost(3 * values, 3 * values, 2.0 * x.numel(), 3.0 * x.numel())
    else:
        leaves["gate"] = _gate(like)
        cost = Cost(2 * values, 3 * values, 10.0 * x.numel(), 15.0 * x.numel())

        def exact(x: Tensor, gate: Tensor) -> Tensor:
            return reference.pointwise.gated_activation(x, gate, shape.activation)

    seed = _randn(*x.shape, like=like)
    # A channel's gradient sums over rows, a gate's over everything.
    terms = {name: float(shape.rows**0.5) for name in ("weight", "bias")}
    terms["gate"] = float(x.numel() ** 0.5)
    return Problem(
        case,
        device,
        dtype,
        leaves,
        seed,
        lambda leaves: exact(*leaves.values()),
        lambda leaves: textbook_pointwise(case, leaves),
        cost,
        terms=terms,
    )


def textbook_pointwise(case: Case, leaves: Leaves) -> Tensor:
    """Compute the op by its formula in PyTorch, in the dtype of the leaves."""
    functional = torch.nn.functional
    if case.op == "layer_norm":
        x, weight, bias = leaves.values()
        return functional.layer_norm(x, x.shape[-1:], weight, bias)
    if case.op == "gated_residual":
        x, y, gate = leaves.values()
        return x + torch.tanh(gate) * y
    x, gate = leaves.values()
    activated = {
        "gelu": functional.gelu,
        "relu": torch.relu,
        "squared_relu": lambda x: torch.relu(x).square(),
    }[case.shape.activation](x)
    return torch.tanh(gate) * activated


def _gate(like: tuple[torch.dtype, torch.device]) -> Tensor:
    return torch.full((1,), 0.5).to(like[0]).to(like[1])


BUILDERS = {
    "media_cross_attention": _media,
    RANGES: _ranges,
    "latent_attention": _latent,
    "gated_residual": _pointwise,
    "gated_activation": _pointwise,
    "layer_norm": _pointwise,
}
