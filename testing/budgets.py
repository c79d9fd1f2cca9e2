"""The one tolerance rule: every approximate comparison takes its bound from here.

Two situations, two functions:

* a fast path is compared with the fp64 reference *and* with plain PyTorch in the same dtype
  (semantics, point 17): :func:`assert_within_budget`;
* two computations of the same quantity that may differ by rounding only:
  :func:`assert_close_to_reference`.

Both compare in the maximum norm, relative to the largest expected magnitude. A softmax output or a
gradient sums terms of that magnitude, so that is the scale of its rounding error.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
# Rounding errors of a few reductions in a row grow with the square root of their length.
# 64 = sqrt(4096) covers the longest sums of the tests and stays under 1e-5 in fp32.
ROUNDING_UNITS = 64.0
# A converted model against its original's own code. Both are whole models in fp32 with other orders
# of summation and other formulas for the same function.
PARITY = 1e-4


def unit(dtype: torch.dtype) -> float:
    """Return the distance from 1 to the next representable number of ``dtype``."""
    return torch.finfo(dtype).eps


def _error(actual: Tensor, exact: Tensor, what: str) -> float:
    if actual.shape != exact.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    if exact.numel() == 0:
        return 0.0
    difference = (actual.detach().double().cpu() - exact.detach().double().cpu()).abs().max().item()
    if difference != difference:
        raise AssertionError(f"{what}: NaN in the result or in the reference")
    return difference


def _magnitude(exact: Tensor) -> float:
    return exact.detach().double().abs().max().item() if exact.numel() else 0.0


def assert_close_to_reference(
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    what: str = "result",
    *,
    terms: float = 0.0,
) -> None:
    """Assert that two ways to compute a tensor agree to 64 rounding units of its largest value.

    ``terms`` is the largest of the terms that were summed, for sums that cancel.
    """
    error = _error(actual, expected, what)
    bound = ROUNDING_UNITS * unit(dtype) * max(_magnitude(expected), terms)
    if error > bound:
        raise AssertionError(f"{what}: error {error:.3e} exceeds {bound:.3e} ({dtype})")


def assert_parity(actual: Tensor, expected: Tensor, what: str = "logits") -> None:
    """Assert that two fp32 results differ by at most 1e-4 of the largest value, or of 1."""
    error = _error(actual, expected, what)
    bound = PARITY * max(1.0, _magnitude(expected))
    if error > bound:
        raise AssertionError(f"{what}: error {error:.3e} exceeds {bound:.3e}")


def assert_gradients_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Assert that all gradients of one backward agree, by :func:`assert_close_to_reference`.

    The gradient of a single value, a gate, sums over all tokens and channels and may cancel, so its
    scale is that of the others. In fp64 that holds for all gradients, because those of biases
    behind a norm cancel too; each is still checked to about 13 digits of the largest.
    """
    assert actual.keys() == expected.keys()
    largest = max(_magnitude(gradient) for gradient in expected.values())
    for name, gradient in expected.items():
        terms = largest if gradient.numel() == 1 or dtype == torch.float64 else 0.0
        assert_close_to_reference(actual[name], gradient, dtype, name, terms=terms)


def assert_within_budget(
    actual: Tensor,
    plain: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    *,
    gradient: bool = False,
    terms: float = 0.0,
    what: str = "result",
) -> None:
    """Assert that the error of ``actual`` is at most 2x (gradients 3x) that of ``plain`` + a unit.

    ``exact`` is the fp64 reference on the same (already rounded) inputs; ``plain`` is stock PyTorch
    in ``dtype``. One unit is the rounding of the largest value to ``dtype``, plus that of the
    largest of the summed ``terms`` to the dtype of accumulation (semantics, point 17: at least
    fp32). A single value, such as a gate's gradient, is one draw of the rounding error, and plain
    PyTorch's may be zero by luck, so its terms are rounded to ``dtype``. In fp64 the reference is
    no more exact than the rest, so only rounding counts.
    """
    factor = GRADIENT_FACTOR if gradient else FORWARD_FACTOR
    error = _error(actual, exact, what)
    if dtype == torch.float64:
        bound = ROUNDING_UNITS * unit(dtype) * max(_magnitude(exact), terms)
    else:
        summed_in = dtype if exact.numel() == 1 else torch.float32
        bound = (
            factor * _error(plain, exact, f"{what} (plain PyTorch)")
            + unit(dtype) * _magnitude(exact)
            + unit(summed_in) * terms
        )
    if error > bound:
        raise AssertionError(f"{what}: error {error:.3e} exceeds the budget {bound:.3e} ({dtype})")


def attention_terms(
    q: Tensor, k: Tensor, v: Tensor, scale: float, seed: Tensor | None = None
) -> dict[str, float]:
    """Bound the terms (Cauchy-Schwarz) summed in the output and the gradients of an attention.

    A score s that is off by one rounding changes its weight by |s| roundings. The score gradient is
    a difference ``P * (dP - delta)`` of values up to ``|dO| |V|``, which cancels where a row sees
    one key. ``seed`` is dO.
    """
    query, key, value, d_out = (_largest_norm(t) for t in (q, k, v, seed))
    score_gradient = d_out * value
    return {
        "out": query * key * scale * value,
        "dq": score_gradient * key * scale,
        "dk": score_gradient * query * scale,
        "dv": d_out,
        "dgate": score_gradient,
    }


def _largest_norm(vectors: Tensor | None) -> float:
    if vectors is None or vectors.numel() == 0:
        return 0.0
    return float(vectors.detach().double().nan_to_num().norm(dim=-1).max())
