"""Schemas, shape functions and lazy dispatch of the media attention kernels; torch only.

A kernel is a module ``impl_NAME`` with ``forward`` and ``backward`` of these arguments less the
last.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

NAMESPACE = "flamingo_kernels"

torch.library.define(
    f"{NAMESPACE}::media_attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor first, Tensor last, Tensor? gate, float scale, "
    "bool single_item, str kernel) -> Tensor",
)
# d_gate has no element where there is no gate.
torch.library.define(
    f"{NAMESPACE}::media_attention_backward",
    "(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor first, Tensor last, Tensor? gate, "
    "float scale, bool single_item, str kernel) -> (Tensor, Tensor, Tensor, Tensor)",
)

forward = torch.ops.flamingo_kernels.media_attention_forward.default
backward = torch.ops.flamingo_kernels.media_attention_backward.default


def _implementation(kernel: str) -> ModuleType:
    return import_module(f"flamingo_kernels.ops.media_attention.impl_{kernel}")


@torch.library.impl(f"{NAMESPACE}::media_attention_forward", "default")
def _forward(*arguments) -> Tensor:
    *inputs, kernel = arguments
    return _implementation(kernel).forward(*inputs)


@torch.library.impl(f"{NAMESPACE}::media_attention_backward", "default")
def _backward(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, kernel = arguments
    return _implementation(kernel).backward(*inputs)


@torch.library.register_fake(f"{NAMESPACE}::media_attention_forward")
def _forward_fake(q: Tensor, *_) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake(f"{NAMESPACE}::media_attention_backward")
def _backward_fake(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    last: Tensor,
    gate: Tensor | None,
    *_,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_gate = q.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_gate
