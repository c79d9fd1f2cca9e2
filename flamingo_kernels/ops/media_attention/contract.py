"""The media attention operators: what every ``impl_{kernel}.py`` here offers; torch only."""

from __future__ import annotations

from torch import Tensor

from flamingo_kernels.ops.kernel_op import kernel_op

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor first, Tensor last, Tensor? gate, float scale, "
    "bool single_item, str kernel"
)


def _forward_shapes(q: Tensor, *_) -> Tensor:
    return q.new_empty(q.shape)


def _backward_shapes(
    d_out: Tensor, plan, q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, gate, *_
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_gate = q.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_gate


# Tokens of the shortest chunk that a backward is divided into: it bounds the size of a plan.
SHORTEST_CHUNK = 128


def chunk_slots(media: int, tokens: int, chunk: int) -> int:
    """Chunks that increasing ranges of single items need at most; their segments are disjoint.

    One per item and per chunk length, and as many again for tokens that see nothing.
    """
    return media + 2 * ((tokens + chunk - 1) // chunk) + 1


def plan_entries(media: int, tokens: int, single_item: bool) -> int:
    """Entries of a row of the plan, for whatever length its chunks have."""
    return media + 1 + (chunk_slots(media, tokens, SHORTEST_CHUNK) if single_item else 0)


def _plan_shape(
    first: Tensor, last: Tensor, media: int, kv_heads: int, single_item: bool, *_
) -> Tensor:
    batch, tokens = first.shape
    return first.new_empty((batch, plan_entries(media, tokens, single_item), 4))


# int32 [B, entries, 4], of the kernels' own making; only Triton's backward needs one.
plan = kernel_op(
    "media_attention",
    "plan",
    "(Tensor first, Tensor last, SymInt media, SymInt kv_heads, bool single_item, str kernel) "
    "-> Tensor",
    _plan_shape,
)
forward = kernel_op("media_attention", "forward", f"({_INPUTS}) -> Tensor", _forward_shapes)
# The gradient of the gate has no element where there is no gate. A kernel that needs a plan and is
# given none makes its own.
backward = kernel_op(
    "media_attention",
    "backward",
    f"(Tensor d_out, Tensor? plan, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_shapes,
)
