"""Device functions that the kernels of several ops share."""

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
def online_softmax(b_s, b_max, b_sum):
    """Take a block of scores to base 2, -inf where masked, into a softmax over blocks of columns.

    Returns the weights of the block, relative to the new maximum; the new maximum and sum of each
    row; and the factor by which the earlier weights shrink.
    """
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # no column of the row so far
    b_decay = tl.exp2(b_max - b_shift)
    b_p = tl.exp2(b_s - b_shift[:, None])
    return b_p, b_new, b_sum * b_decay + tl.sum(b_p, 1), b_decay
