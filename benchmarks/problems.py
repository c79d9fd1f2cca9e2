"""A case made concrete: tensors, the exact result, what plain PyTorch gives, and the cost.

All random numbers are drawn on the CPU from a seed that depends on the case, so every peer, device
and revision gets the same values, rounded once to the dtype of the case.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import reference.attention
import reference.pointwise
from benchmarks.cases import Case, LatentShape, MediaShape, PointwiseShape
from flamingo_kernels.ops import MediaSpans
from testing.budgets import attention_terms

Leaves = dict[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """The least that has to be moved and computed, in bytes and in floating point operations."""

    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    forward_flops: float = 0.0
    backward_flops: float = 0.0

    def of(self, phase: str) -> tuple[float, float]:
        """(bytes, flops) of ``forward``, ``backward`` or ``forward_backward``."""
        forward = (self.forward_bytes, self.forward_flops)
        backward = (self.backward_bytes, self.backward_flops)
        both = (forward[0] + backward[0], forward[1] + backward[1])
        return {"forward": forward, "backward": backward, "forward_backward": both}[phase]


@dataclass
class Problem:
    """Everything a peer needs, and everything the gate needs.

    Attributes
    ----------
    leaves : dict
        Tensors that require grad; inputs, and for modules parameters by their state-dict names.
    fixed : dict
        What gets no gradient: spans, locations, modules to copy.
    seed : Tensor
        Gradient of the output.
    exact, plain : callable
        Leaves -> output: the reference (called with fp64 leaves), and PyTorch in the case's dtype.
    terms : dict
        Largest terms summed in ``out`` and in the gradient of each leaf, see ``testing.budgets``.
    strict : bool
        Whether the project's own budget holds for the library's kernels; modules chain many ops
        and get the looser bound of the peers.
    tokens : int
        Text tokens of one call, for tokens per second.
    """

    case: Case
    device: torch.device
    dtype: torch.dtype
    leaves: Leaves
    seed: Tensor | None
    exact: Callable[[Leaves], Tensor]
    plain: Callable[[Leaves], Tensor]
    cost: Cost | None = None
    fixed: dict[str, Any] = field(default_factory=dict)
    terms: dict[str, float] = field(default_factory=dict)
    strict: bool = True
    tokens: int = 0


def build(case: Case, device: str) -> Problem:
    """Allocate a case; deterministic."""
    torch.manual_seed(zlib.crc32(case.key.encode()))
    if case.op == "media_cross_attention":
        return _media(case, case.shape, torch.device(device))
    if case.op == "latent_attention":
        return _latent(case, case.shape, torch.device(device))
    if isinstance(case.shape, PointwiseShape):
        return _pointwise(case, case.shape, torch.device(device))
    from benchmarks import module_problems

    return module_problems.build(case, torch.device(device))


def media_locations(shape: MediaShape) -> Tensor:
    """bool [B, T], True at <image> tokens; for ``decode`` [B, I] of the history, all True."""
    batch, tokens, images = shape.batch, shape.tokens, shape.images
    if shape.layout == "decode":
        return torch.ones(batch, images, dtype=torch.bool)
    start = tokens // 2 if shape.layout == "late" else 0
    if shape.attend == "last_group":
        pairs = torch.arange((images + 1) // 2) * (tokens - start) // ((images + 1) // 2)
        places = torch.stack((pairs, pairs + 1), 1).flatten()[:images].expand(batch, -1)
    elif shape.layout == "uneven":
        rest = [1 + torch.randperm(tokens - 1)[: images - 1] for _ in range(batch)]
        places = torch.stack([torch.cat((torch.zeros(1, dtype=torch.long), r)) for r in rest])
    else:
        places = (start + torch.arange(images) * (tokens - start) // images).expand(batch, -1)
    return torch.zeros(batch, tokens, dtype=torch.bool).scatter_(1, places, True)


def media_spans(shape: MediaShape, locations: Tensor) -> MediaSpans:
    spans = MediaSpans.from_media_locations(locations, shape.attend)
    return spans.newest(1) if shape.layout == "decode" else spans


def textbook_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """q [B,T,H,D], k, v [B,K,H,D], visible bool [B,T,K] -> [B,T,H,D], everything in their dtype."""
    scores = torch.einsum("bthd,bkhd->bhtk", q, k) * q.shape[-1] ** -0.5
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None], float("-inf"))
    return torch.einsum("bhtk,bkhd->bthd", scores.softmax(-1).nan_to_num(), v)


def seen_pairs(spans: MediaSpans, images: int) -> int:
    """Number of (token, image) pairs that attention is computed for."""
    return int(spans.visible(images).sum())


def _randn(*shape: int, like: tuple[torch.dtype, torch.device]) -> Tensor:
    dtype, device = like
    return torch.randn(*shape).to(dtype).to(device)


def _media(case: Case, shape: MediaShape, device: torch.device) -> Problem:
    dtype = getattr(torch, case.dtype)
    rows = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
    # As in the model: views of one projection's output.
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
            leaves["q"], leaves["k"].flatten(1, 2), leaves["v"].flatten(1, 2), visible
        )

    size = dtype.itemsize
    text = leaves["q"].numel() * size
    media = 2 * leaves["k"].numel() * size
    if shape.layout == "decode" and shape.attend == "last":
        media //= shape.images
    # One matrix product of all visible scores; forward has 2, backward 5 (with recomputation).
    product = 2.0 * seen_pairs(spans, shape.images) * shape.latents * rows[2] * rows[3]
    cost = Cost(2 * text + media, 3 * text + 2 * media, 2 * product, 5 * product)
    terms = attention_terms(leaves["q"], leaves["k"], leaves["v"], shape.head_dim**-0.5, seed)
    return _ready(
        Problem(
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
    )


def _latent(case: Case, shape: LatentShape, device: torch.device) -> Problem:
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
    cost = Cost(
        2 * queries + keys, 6 * queries + 2 * keys, 2 * product, 5 * product
    )  # PERFORMANCE.md, section 1
    k, v = concatenated(leaves)
    found = attention_terms(q, k, v, shape.head_dim**-0.5, seed)
    terms = {"out": found["out"], **{name: found[f"d{name[0]}"] for name in leaves}}
    return _ready(Problem(case, device, dtype, leaves, seed, exact, plain, cost, terms=terms))


def concatenated(leaves: Leaves) -> tuple[Tensor, Tensor]:
    """Keys and values [N, M + L, H, D] of [features; latents]."""
    k = torch.cat((leaves["k_media"], leaves["k_latents"]), 1)
    return k, torch.cat((leaves["v_media"], leaves["v_latents"]), 1)


def _pointwise(case: Case, shape: PointwiseShape, device: torch.device) -> Problem:
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
    # A channel's or a gate's gradient sums over rows, or over everything.
    terms = {name: float(shape.rows**0.5) for name in ("weight", "bias")}
    terms["gate"] = float(x.numel() ** 0.5)
    return _ready(
        Problem(
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
    )


def textbook_pointwise(case: Case, leaves: Leaves) -> Tensor:
    """The op as one writes it in PyTorch, in the dtype of the leaves."""
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


def _ready(problem: Problem) -> Problem:
    if problem.case.training:
        for leaf in problem.leaves.values():
            leaf.requires_grad_()
    return problem
