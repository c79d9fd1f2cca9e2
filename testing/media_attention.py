"""``media_cross_attention`` of a case: in stock PyTorch, and by the reference."""

from __future__ import annotations

import torch

from flamingo_kernels.ops import KeyRanges
from reference import key_range_attention, media_cross_attention
from testing.cases import MediaCase

NAMES = ("dq", "dk", "dv", "dgate")


def plain_pytorch(case: MediaCase) -> torch.Tensor:
    """Compute the textbook formula in the dtype of the case, on finite inputs."""
    repeats = case.q.shape[2] // case.k.shape[-2]
    k, v = (t.nan_to_num().flatten(1, -3).repeat_interleave(repeats, 2) for t in (case.k, case.v))
    keys_of_a_slot = case.k.shape[2] if case.k.ndim == 5 else 1
    visible = case.visible.repeat_interleave(keys_of_a_slot, -1)[:, None]
    scores = torch.einsum("bthd,bkhd->bhtk", case.q, k) * case.q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num()
    out = torch.einsum("bhtk,bkhd->bthd", weights, v)
    return out if case.gate is None else out * torch.tanh(case.gate)


def exact(case: MediaCase) -> torch.Tensor:
    """Compute the reference in the dtype of the case."""
    gate = None if case.gate is None else case.gate[0]
    inputs = (case.q, case.k, case.v)
    if isinstance(case.spans, KeyRanges):
        return key_range_attention(*inputs, case.spans.start, case.spans.stop, gate)
    return media_cross_attention(*inputs, case.spans.first, case.spans.last, gate)


def gradients(out: torch.Tensor, case: MediaCase, seed: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients of the case's tensors, as named in ``NAMES``."""
    return list(torch.autograd.grad(out, case.tensors(), seed.to(out.dtype)))
