"""Schemas, shape functions and lazy dispatch of the latent attention kernels; torch only.

A kernel is a module ``impl_NAME`` with ``forward`` and ``backward`` of these arguments less the
last.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

NAMESPACE = "flamingo_kernels"
_INPUTS = (
    "Tensor q, Tensor k_media, Tensor v_media, Tensor k_latents, Tensor v_latents, Tensor? lengths"
)

# The second result is log(sum(exp(scores))) per query, [N, H, L] in the dtype of accumulation.
torch.library.define(
    f"{NAMESPACE}::latent_attention_forward",
    f"({_INPUTS}, float scale, str kernel) -> (Tensor, Tensor)",
)
torch.library.define(
    f"{NAMESPACE}::latent_attention_backward",
    f"(Tensor d_out, {_INPUTS}, Tensor out, Tensor lse, float scale, str kernel) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)

forward = torch.ops.flamingo_kernels.latent_attention_forward.default
backward = torch.ops.flamingo_kernels.latent_attention_backward.default


def _implementation(kernel: str) -> ModuleType:
    return import_module(f"flamingo_kernels.ops.latent_attention.impl_{kernel}")


@torch.library.impl(f"{NAMESPACE}::latent_attention_forward", "default")
def _forward(*arguments) -> tuple[Tensor, Tensor]:
    *inputs, kernel = arguments
    return _implementation(kernel).forward(*inputs)


@torch.library.impl(f"{NAMESPACE}::latent_attention_backward", "default")
def _backward(*arguments) -> tuple[Tensor, ...]:
    *inputs, kernel = arguments
    return _implementation(kernel).backward(*inputs)


@torch.library.register_fake(f"{NAMESPACE}::latent_attention_forward")
def _forward_fake(q: Tensor, *_) -> tuple[Tensor, Tensor]:
    items, latents, heads, _ = q.shape
    accumulation = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((items, heads, latents), dtype=accumulation)


@torch.library.register_fake(f"{NAMESPACE}::latent_attention_backward")
def _backward_fake(d_out: Tensor, *arguments) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in arguments[:5])
