"""Device helpers that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """tanh to full relative precision, at 0 too, where gates start.

    ``2 * sigmoid(2x) - 1`` cancels near 0, so below 1 this is Lambert's continued fraction
    ``x / (1 + x^2 / (3 + x^2 / (5 + ...)))``. libdevice is out: it fails in the interpreter.
    """
    squared = tl.minimum(x * x, 1.0)
    fraction = squared * 0.0 + 19.0
    for i in tl.static_range(9):
        fraction = (17.0 - 2.0 * i) + squared / fraction
    decay = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 1.0, x / fraction, tl.where(x < 0, -large, large))


@triton.jit
def clipped_ranges(first, last, o_first, o_last, mask, ITEMS):
    """Ranges of a block of tokens, cut to the slots there are; empty ones have first > last."""
    b_first = tl.maximum(tl.load(first + o_first, mask=mask, other=0), 0)
    b_last = tl.minimum(tl.load(last + o_last, mask=mask, other=-1), ITEMS - 1)
    return b_first, b_last
