"""What a problem is: tensors, the exact result, what plain PyTorch gives, and the cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, MediaShape, RangeShape
from flamingo_kernels.ops import KeyRanges, MediaSpans

Leaves = dict[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """The least bytes to move and floating-point operations to compute."""

    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    forward_flops: float = 0.0
    backward_flops: float = 0.0

    def of(self, phase: str) -> tuple[float, float]:
        """Return (bytes, operations) of ``forward``, ``backward`` or ``forward_backward``."""
        forward = (self.forward_bytes, self.forward_flops)
        backward = (self.backward_bytes, self.backward_flops)
        both = (forward[0] + backward[0], forward[1] + backward[1])
        return {"forward": forward, "backward": backward, "forward_backward": both}[phase]


@dataclass
class Problem:
    """Everything that a peer and the gate need.

    Attributes
    ----------
    leaves : dict
        Tensors that require grad: inputs, and the parameters of modules by state-dict name.
    fixed : dict
        What gets no gradient: spans, locations, options, weights to copy.
    seed : Tensor
        Gradient of the output.
    exact, plain : callable
        Leaves -> output: the reference (with fp64 leaves), and plain PyTorch in the case's dtype.
    terms : dict
        Largest terms summed in ``out`` and in the gradient of each leaf, see ``testing.budgets``.
    strict : bool
        Whether this library's kernels must keep the test suite's budget. Modules chain many ops
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


def media_locations(shape: MediaShape) -> Tensor:
    """Return bool [B, T], True at <image> tokens; for ``decode``, [B, I] of the history."""
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
    """Return the ranges of a shape; for ``decode``, that of the newest token alone."""
    spans = MediaSpans.from_media_locations(locations, shape.attend)
    return spans.newest(1) if shape.layout == "decode" else spans


def seen_items(shape: RangeShape) -> MediaSpans:
    """Return the images that each token sees, without a window."""
    index = torch.arange(shape.tokens)[None] * len(shape.lengths) // shape.tokens
    attend = {"own": "last", "prefix": "previous"}[shape.sees]
    return MediaSpans.from_media_index(index, attend)


def key_ranges(shape: RangeShape) -> KeyRanges:
    """Return the keys that each token sees."""
    if shape.sees == "window":
        boundary = torch.full((1, shape.tokens), shape.keys)
        return KeyRanges.from_boundary(boundary, shape.window)
    return KeyRanges.from_items(seen_items(shape), torch.tensor([shape.lengths]))


def item_spans(problem: Problem) -> MediaSpans:
    """Return the spans of a problem; of key ranges, those over items of one key each."""
    spans = problem.fixed["spans"]
    return spans.spans if isinstance(spans, KeyRanges) else spans


def visible_keys(problem: Problem) -> Tensor:
    """Return bool [B, T, S]: whether token t sees key s."""
    k = problem.leaves["k"]
    visible = item_spans(problem).visible(k.shape[1])
    return visible if k.ndim == 4 else visible.repeat_interleave(k.shape[2], -1)


def flat_keys(keys: Tensor) -> Tensor:
    """Return [B, S, Hkv, D], given that or [B, I, R, Hkv, D]."""
    return keys.flatten(1, keys.ndim - 3)


def seen_pairs(spans: MediaSpans, images: int) -> int:
    """Count the (token, image) pairs for which attention is computed."""
    return int(spans.visible(images).sum())
