"""Peers on segments, which are runs of tokens that see one range of images."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import RANGES, MediaShape
from benchmarks.peers import Implementation, UnavailableError, peer, require
from benchmarks.peers.attention import MEDIA, grouped, sdpa_choice
from benchmarks.problems import Problem
from benchmarks.problems.base import flat_keys, item_spans


class Segment(NamedTuple):
    """Tokens ``start..stop-1`` of a row, which see images ``first..last`` or none."""

    row: int
    start: int
    stop: int
    first: int
    last: int


def segments(problem: Problem) -> list[Segment]:
    """Return the runs of equal ranges, row by row; this reads the device once."""
    spans = item_spans(problem)
    found = []
    table = torch.stack((spans.first, spans.last), -1).tolist()
    for row, ranges in enumerate(table):
        start = 0
        for stop in range(1, len(ranges) + 1):
            if stop == len(ranges) or ranges[stop] != ranges[start]:
                found.append(Segment(row, start, stop, *ranges[start]))
                start = stop
    return found


def _equal(problem: Problem, found: list[Segment]) -> bool:
    """Say whether equally many tokens see each image, in order: then a reshape makes a batch."""
    shape = problem.case.shape
    if not isinstance(shape, MediaShape):
        return False
    each = [(s.row, s.first, s.last, s.stop - s.start) for s in found]
    length = shape.tokens // shape.images
    wanted = [(b, i, i, length) for b in range(shape.batch) for i in range(shape.images)]
    return length * shape.images == shape.tokens and each == wanted


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def _per_segment(problem: Problem, attention: Attention, backend: str) -> Implementation:
    """Run ``attention`` on [N, T, H, D], [N, K, H, D]: as one batch if possible, or in a loop."""
    found = segments(problem)
    leaves, shape = problem.leaves, problem.case.shape

    def batched() -> Tensor:
        q, k, v = leaves.values()
        q = q.unflatten(1, (shape.images, -1)).flatten(0, 1)
        return attention(q, k.flatten(0, 1), v.flatten(0, 1)).reshape(leaves["q"].shape)

    def looped() -> Tensor:
        q, k, v = leaves.values()
        parts = []
        for row, start, stop, first, last in found:
            queries = q[row : row + 1, start:stop]
            if first > last:
                parts.append(torch.zeros_like(queries))
                continue
            keys, values = (flat_keys(t[row : row + 1, first : last + 1]) for t in (k, v))
            parts.append(attention(queries, keys, values))
        return torch.cat([p.flatten(0, 1) for p in parts]).view(q.shape)

    equal = _equal(problem, found)
    return Implementation(
        batched if equal else looped,
        leaves,
        f"{backend}, {'one batch' if equal else f'{len(found)} calls'}",
        prepare=lambda: segments(problem),
    )


@peer(
    "segments-sdpa",
    "One `scaled_dot_product_attention` for each run of tokens that see the same images; one "
    "batched call where all runs are of one length.",
    MEDIA,
    RANGES,
)
def _segments_sdpa(problem: Problem) -> Implementation:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, **grouped(q, k)).transpose(1, 2)

    q, k, v = (flat_keys(t).transpose(1, 2) for t in problem.leaves.values())
    return _per_segment(problem, attention, f"sdpa {sdpa_choice(q, k, v)}")


@peer(
    "segments-bmm",
    "`segments-sdpa` with `torch.bmm`, softmax, `torch.bmm` in place of SDPA.",
    MEDIA,
)
def _segments_bmm(problem: Problem) -> Implementation:
    scale = problem.case.shape.head_dim**-0.5

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        weights = torch.bmm(q * scale, k.transpose(1, 2)).softmax(-1)
        return torch.bmm(weights, v).unflatten(0, (-1, problem.case.shape.heads)).transpose(1, 2)

    return _per_segment(problem, attention, "bmm")


class Packed(NamedTuple):
    """Cumulative lengths int32 [S + 1] and the longest of S sequences."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


def packed(problem: Problem) -> Packed:
    """Pack one sequence per image in slot order, and text before the first without keys."""
    shape = problem.case.shape
    if shape.attend != "last" or shape.layout == "decode":
        raise UnavailableError("packed sequences need disjoint segments: attend mode last, T > 1")
    q_lengths, k_lengths = [], []
    found = segments(problem)
    for row in range(shape.batch):
        of_row = {s.first if s.first <= s.last else -1: s for s in found if s.row == row}
        for image in range(-1, shape.images):
            segment = of_row.get(image)
            if image < 0 and segment is None:
                continue
            q_lengths.append(segment.stop - segment.start if segment else 0)
            k_lengths.append(shape.latents if image >= 0 else 0)
    cumulative = [
        F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32).to(problem.device)
        for lengths in (q_lengths, k_lengths)
    ]
    return Packed(*cumulative, max(q_lengths), shape.latents)


def _varlen(problem: Problem, call: Callable, backend: str) -> Implementation:
    plan = packed(problem)
    leaves = problem.leaves

    def forward() -> Tensor:
        q, k, v = leaves.values()
        out = call(q.flatten(0, 1), k.flatten(0, 2), v.flatten(0, 2), plan)
        return out.view(q.shape)

    return Implementation(forward, leaves, backend, prepare=lambda: packed(problem))


@peer(
    "torch-varlen",
    "`torch.nn.attention.varlen.varlen_attn` with one packed sequence per image; it has no CPU "
    "path.",
    MEDIA,
)
def _torch_varlen(problem: Problem) -> Implementation:
    module = require("torch.nn.attention.varlen")
    if problem.device.type != "cuda":
        raise UnavailableError("torch.nn.attention.varlen has no CPU path")
    known = inspect.signature(module.varlen_attn).parameters
    names = ("cu_seq_q", "cu_seq_k", "max_q", "max_k")
    missing = [name for name in names if name not in known]
    if missing:
        raise UnavailableError(f"varlen_attn of this torch has no {', '.join(missing)}")

    def call(q: Tensor, k: Tensor, v: Tensor, plan: Packed) -> Tensor:
        return module.varlen_attn(q, k, v, **dict(zip(names, plan, strict=True)))

    return _varlen(problem, call, "torch varlen")


@peer(
    "flash-attn",
    "`flash_attn_varlen_func` of flash-attn with one packed sequence per image.",
    MEDIA,
    devices=("cuda",),
)
def _flash_attn(problem: Problem) -> Implementation:
    module = require("flash_attn", "flash-attn")

    def call(q: Tensor, k: Tensor, v: Tensor, plan: Packed) -> Tensor:
        return module.flash_attn_varlen_func(q, k, v, *plan)

    return _varlen(problem, call, f"flash-attn {module.__version__}")
