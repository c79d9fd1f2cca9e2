"""Schema, shape function and lazy dispatch of the compiled media attention kernels; torch only."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

torch.library.define(
    "flamingo_kernels::media_attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor first, Tensor last, Tensor? gate, float scale, "
    "str kernel) -> Tensor",
)

forward = torch.ops.flamingo_kernels.media_attention_forward


@torch.library.impl("flamingo_kernels::media_attention_forward", "default")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    last: Tensor,
    gate: Tensor | None,
    scale: float,
    kernel: str,
) -> Tensor:
    return _implementation(kernel).forward(q, k, v, first, last, gate, scale)


@torch.library.register_fake("flamingo_kernels::media_attention_forward")
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    last: Tensor,
    gate: Tensor | None,
    scale: float,
    kernel: str,
) -> Tensor:
    return q.new_empty(q.shape)


def _implementation(kernel: str):
    return import_module(f"flamingo_kernels.ops.media_attention.impl_{kernel}")
