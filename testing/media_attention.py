"""``media_cross_attention`` of a case: in stock PyTorch, and by the reference."""

from __future__ import annotations

import torch

from reference.attention import media_cross_attention as oracle
from testing.cases import MediaCase

NAMES = ("dq", "dk", "dv", "dgate")


def plain_pytorch(case: MediaCase) -> torch.Tensor:
    """Compute the textbook formula in the dtype of the case, on finite inputs."""
    repeats = case.q.shape[2] // case.k.shape[3]
    k, v = (t.nan_to_num().flatten(1, 2).repeat_interleave(repeats, 2) for t in (case.k, case.v))
    visible = case.spans.visible(case.k.shape[1]).repeat_interleave(case.k.shape[2], -1)[:, None]
    scores = torch.einsum("bthd,bkhd->bhtk", case.q, k) * case.q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num()
    out = torch.einsum("bhtk,bkhd->bthd", weights, v)
    return out if case.gate is None else out * torch.tanh(case.gate)


def exact(case: MediaCase) -> torch.Tensor:
    """Compute the reference in the dtype of the case."""
    gate = None if case.gate is None else case.gate[0]
    return oracle(case.q, case.k, case.v, case.spans.first, case.spans.last, gate)


def gradients(out: torch.Tensor, case: MediaCase, seed: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients of the case's tensors, as named in ``NAMES``."""
    return list(torch.autograd.grad(out, case.tensors(), seed.to(out.dtype)))
