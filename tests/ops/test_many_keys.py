"""Ranges of thousands of keys: what is computed in parts agrees with the fp64 reference."""

from __future__ import annotations

import pytest
import torch

from flamingo_kernels.ops import KeyRanges, media_cross_attention
from reference.attention import key_range_attention
from testing.budgets import assert_close_to_reference, attention_terms
from testing.cases import kernels_for
from testing.media_attention import NAMES

KEYS = 9000
BOUNDS = {
    "step": ([0], [KEYS]),  # a decoding step, whose keys are split
    "window": ([4000, 4100, 4200], [8900, 8950, 9000]),
    "prefix": ([0] * 40, [225 * (t + 1) for t in range(40)]),
    "empty": ([5000, 0], [5000, 7000]),
}


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize(
    ("kernel", "dtype"), [k for k in kernels_for("media_cross_attention") if k[1].itemsize >= 4]
)
def test_many_keys(kernel: str, dtype: torch.dtype, bounds: str) -> None:
    """Keys that nobody sees hold NaN (semantics, points 3, 17 and 19)."""
    torch.manual_seed(0)
    start, stop = (torch.tensor([bound], dtype=torch.int32) for bound in BOUNDS[bounds])
    ranges = KeyRanges(start, stop)
    q = torch.randn(1, start.shape[1], 4, 24)
    k, v = torch.randn(2, 1, KEYS, 2, 24)
    unseen = ~ranges.visible(KEYS).any(1)
    k[unseen] = v[unseen] = float("nan")
    gate, seed = torch.tensor([0.5]), torch.randn(q.shape)

    def results(dtype: torch.dtype, kernel: str | None) -> list[torch.Tensor]:
        tensors = [x.to(dtype).requires_grad_() for x in (q, k, v, gate)]
        if kernel is None:
            out = key_range_attention(*tensors[:3], start, stop, tensors[3][0])
        else:
            out = media_cross_attention(*tensors[:3], ranges, tensors[3], kernel=kernel)
        return [out, *torch.autograd.grad(out, tensors, seed.to(dtype))]

    terms = attention_terms(q, k, v, q.shape[-1] ** -0.5, seed)
    both = zip(results(dtype, kernel), results(torch.float64, None), strict=True)
    for name, (ours, true) in zip(("out", *NAMES), both, strict=True):
        assert_close_to_reference(ours, true, dtype, name, terms=terms[name])
