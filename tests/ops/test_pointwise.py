"""Pointwise ops: every kernel against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo_kernels.ops import (
    KernelUnavailableError,
    gated_activation,
    gated_activation_linear,
    gated_residual,
    layer_norm,
    layer_norm_linear,
)
from flamingo_kernels.ops.gated_activation import ACTIVATIONS
from reference import pointwise as oracle
from testing.budgets import assert_close_to_reference, assert_within_budget
from testing.cases import kernels_for

SHAPES = [(3, 5, 8), (2, 65), (1, 1, 1), (4, 300)]


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight + bias


def compare(ours, plain, exact, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Value and all gradients of one function in three ways."""
    inputs = [t.to(dtype) for t in inputs]
    seed = torch.randn(inputs[0].shape)
    results = []
    for function, precision in ((ours, dtype), (plain, dtype), (exact, torch.float64)):
        leaves = [t.detach().to(precision).requires_grad_() for t in inputs]
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, seed.to(out.dtype))))
    # Parameter gradients sum over all rows, with cancellation: partial sums reach this size.
    terms = float(seed.norm() * inputs[0].abs().max())
    for place, triple in enumerate(zip(*results, strict=True)):
        assert_within_budget(
            *triple, dtype, gradient=place > 0, terms=terms, what=f"result {place}"
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize(("kernel", "dtype"), kernels_for("gated_residual", needs_grad=True))
def test_gated_residual(kernel: str, dtype: torch.dtype, shape: tuple, vector: bool) -> None:
    gate = torch.randn(shape[-1] if vector else 1)
    compare(
        lambda x, y, g: gated_residual(x, y, g, kernel=kernel),
        lambda x, y, g: x + torch.tanh(g) * y,
        oracle.gated_residual,
        [torch.randn(shape), torch.randn(shape), gate],
        dtype,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("kernel", "dtype"), kernels_for("gated_activation", needs_grad=True))
def test_gated_activation(kernel: str, dtype: torch.dtype, shape: tuple, activation: str) -> None:
    plain = {
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        "squared_relu": lambda x: x.clamp(min=0) ** 2,
        "relu": lambda x: x.clamp(min=0),
    }[activation]
    compare(
        lambda x, g: gated_activation(x, g, activation, kernel=kernel),
        lambda x, g: torch.tanh(g) * plain(x),
        lambda x, g: oracle.gated_activation(x, g, activation),
        [torch.randn(shape), torch.randn(1)],
        dtype,
    )


@pytest.mark.parametrize("shape", SHAPES[:2] + SHAPES[3:])
@pytest.mark.parametrize(("kernel", "dtype"), kernels_for("layer_norm", needs_grad=True))
def test_layer_norm(kernel: str, dtype: torch.dtype, shape: tuple) -> None:
    compare(
        lambda x, w, b: layer_norm(x, w, b, kernel=kernel),
        plain_layer_norm,
        oracle.layer_norm,
        [torch.randn(shape) + 1, torch.randn(shape[-1]), torch.randn(shape[-1])],
        dtype,
    )


def joined_and_apart(kernel: str) -> list:
    """(the op and its projection as one, as two) of x, one value, [C], [C] and [C', C]."""
    return [
        (
            lambda x, g, w, b, p: gated_activation_linear(x, p, g, "squared_relu", kernel),
            lambda x, g, w, b, p: F.linear(gated_activation(x, g, "squared_relu", kernel), p),
        ),
        (
            lambda x, g, w, b, p: gated_activation_linear(x, p, kernel=kernel),
            lambda x, g, w, b, p: F.linear(gated_activation(x, kernel=kernel), p),
        ),
        (
            lambda x, g, w, b, p: layer_norm_linear(x, w, b, p, kernel=kernel),
            lambda x, g, w, b, p: F.linear(layer_norm(x, w, b, kernel=kernel), p),
        ),
        (
            lambda x, g, w, b, p: layer_norm_linear(x, None, None, p, kernel=kernel),
            lambda x, g, w, b, p: F.linear(layer_norm(x, None, None, kernel=kernel), p),
        ),
    ]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("frozen", [(), (0,), (4,), (0, 1, 2, 3)])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("kernel", "dtype"), [k for k in kernels_for("layer_norm", True) if k[1] != torch.float16]
)
def test_a_projection_joined_on_gives_the_same(
    kernel: str, dtype: torch.dtype, autocast: bool, frozen: tuple[int, ...], which: int
) -> None:
    """The same operations in the same order and dtypes; what is frozen gets no gradient."""
    inputs = [torch.randn(shape).to(dtype) for shape in ((2, 3, 8), (1,), (8,), (8,), (6, 8))]
    seed = torch.randn(2, 3, 6)
    results = []
    for function in joined_and_apart(kernel)[which]:
        leaves = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate(inputs)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = function(*leaves)
        if out.requires_grad:
            out.backward(seed.to(out.dtype))
        results.append([out, *(t.grad for t in leaves)])
    lowest = torch.bfloat16 if autocast else dtype
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            assert_close_to_reference(one, other, lowest)


@pytest.mark.parametrize("which", range(4))
def test_a_projection_joined_on_without_gradients(which: int) -> None:
    inputs = [torch.randn(shape) for shape in ((2, 3, 8), (1,), (8,), (8,), (6, 8))]
    one, other = (function(*inputs) for function in joined_and_apart("auto")[which])
    assert torch.equal(one, other)


@pytest.mark.parametrize("vector", [False, True])
def test_zero_gate_changes_no_bit(vector: bool) -> None:
    """A zero gate adds nothing, bit for bit (semantics, point 8)."""
    x, y = torch.randn(2, 4, 8)
    assert torch.equal(gated_residual(x, y, torch.zeros(8 if vector else 1)), x)
    assert not gated_activation(x, torch.zeros(1)).any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: gated_residual(x, x[:1], torch.zeros(1)),
            ValueError,
            r"differ in shape: \(2, 8\), \(1, 8\)",
        ),
        (lambda x: gated_residual(x, x, torch.zeros(3)), ValueError, "1 or 8 element"),
        (lambda x: gated_activation(x, activation="tanh"), ValueError, "unknown activation 'tanh'"),
        (lambda x: gated_activation(x.long()), TypeError, "x must be .* got torch.int64"),
        (lambda x: gated_activation([1.0]), TypeError, "x must be .* got list"),
        (lambda x: gated_activation(x.to_sparse()), TypeError, "x must be .* torch.sparse_coo"),
        (lambda x: gated_activation(x, 0.5), TypeError, "gate must be .* tensor, got float"),
        (lambda x: gated_residual(x, x, 0.5), TypeError, "gate must be .* tensor, got float"),
        (lambda x: gated_residual(x, x, None), TypeError, "gate must be .* got NoneType"),
        (lambda x: gated_residual(x, 1.0, torch.zeros(1)), TypeError, "y must be .* got float"),
        (
            lambda x: gated_residual(x, x, torch.zeros(1, device="meta")),
            ValueError,
            "gate is on meta, the input on cpu",
        ),
        (lambda x: layer_norm(x, torch.ones(3), None), ValueError, r"weight has shape \(3,\)"),
        (
            lambda x: layer_norm(x, torch.ones(8, device="meta"), None),
            ValueError,
            "weight is on meta, the input on cpu",
        ),
        (
            lambda x: layer_norm(x, None, torch.ones(8).long()),
            TypeError,
            "bias must be a floating point tensor, got torch.int64",
        ),
        (lambda x: layer_norm(x, None, None, -1e-5), ValueError, "eps must be at least 0, got -1e"),
        (lambda x: layer_norm(x, None, None, float("nan")), ValueError, "at least 0, got nan"),
        (lambda x: layer_norm(x.sum(), None, None), ValueError, "at least one dimension"),
        (
            lambda x: layer_norm_linear(x, None, None, torch.ones(3, 4)),
            ValueError,
            r"projection has shape \(3, 4\), x has 8 channels",
        ),
        (
            lambda x: gated_activation_linear(x, torch.ones(3, 8, device="meta")),
            ValueError,
            "projection is on meta, the input on cpu",
        ),
    ],
)
def test_bad_arguments(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(2, 8))


def test_strides_no_compiled_kernel_takes_go_to_torch() -> None:
    """With kernel="auto" any layout runs; an explicit kernel says why it does not."""
    x = torch.randn(2, 3, 4, 5, 8)[:, ::2, ::2, ::2]
    assert torch.equal(gated_activation(x), torch.nn.functional.gelu(x))
    with pytest.raises(KernelUnavailableError, match="at most two strides before it"):
        gated_activation(x, kernel="cpp")
