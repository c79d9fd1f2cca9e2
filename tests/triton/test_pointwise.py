"""Triton's pointwise ops against the fp64 reference, in the interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flamingo_kernels.ops.gated_activation import impl_torch as torch_activation
from flamingo_kernels.ops.gated_activation.api import _GatedActivation
from flamingo_kernels.ops.gated_residual import impl_torch as torch_residual
from flamingo_kernels.ops.gated_residual.api import _GatedResidual
from flamingo_kernels.ops.layer_norm import impl_torch as torch_norm
from flamingo_kernels.ops.layer_norm.api import _LayerNorm
from reference import pointwise as oracle
from testing.budgets import assert_within_budget
from testing.targets import HAS_GPU, ONE_TARGET, TARGETS

SHAPES = [(3, 7, 40), (2, 1500), (130, 8), (0, 8)]
GATES = [1e-3, 0.7, -3.0]


def accumulated(gate: Tensor | None, x: Tensor) -> Tensor | None:
    return None if gate is None else gate.to(torch.promote_types(x.dtype, torch.float32))


def check(
    dtype: torch.dtype,
    device: str,
    inputs: list[Tensor | None],
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    exact: Callable[..., Tensor],
) -> None:
    """Output and gradients within budget; ``inputs`` are the same numbers for all three."""
    seed = torch.randn(inputs[0].shape).to(dtype)
    results = []
    for function, place, precision in (
        (ours, device, dtype),
        (plain, "cpu", dtype),
        (exact, "cpu", torch.float64),
    ):
        given = [
            None if t is None else t.detach().to(place, precision).requires_grad_() for t in inputs
        ]
        out = function(*given)
        wanted = [t for t in given if t is not None]
        gradients = torch.autograd.grad(out, wanted, seed.to(out.device, out.dtype))
        results.append([out, *gradients])
    # Parameter gradients sum over all rows, with cancellation.
    terms = float(seed.double().norm())
    for i, triple in enumerate(zip(*results, strict=True)):
        assert_within_budget(*triple, dtype, gradient=i > 0, terms=terms, what=f"result {i}")


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
@pytest.mark.parametrize("gate", [*GATES, None])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("nan_filled_memory")
def test_gated_residual(shape: tuple, gate: float | None, device: str, dtype: torch.dtype) -> None:
    """Scalar gates, near 0 too, and, for None, a gate per channel."""
    x, y = torch.randn(2, *shape).to(dtype)
    value = torch.randn(shape[-1]) if gate is None else torch.tensor([gate])
    check(
        dtype,
        device,
        [x, y, value.to(dtype)],
        lambda x, y, g: _GatedResidual.apply(x, y, accumulated(g, x), "triton"),
        torch_residual.forward,
        oracle.gated_residual,
    )


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
@pytest.mark.parametrize("gate", [0.3, None])
@pytest.mark.parametrize("activation", ["gelu", "squared_relu", "relu"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("nan_filled_memory")
def test_gated_activation(
    shape: tuple, activation: str, gate: float | None, device: str, dtype: torch.dtype
) -> None:
    check(
        dtype,
        device,
        [torch.randn(shape).to(dtype), None if gate is None else torch.tensor([gate], dtype=dtype)],
        lambda x, g: _GatedActivation.apply(x, accumulated(g, x), activation, "triton"),
        lambda x, g: torch_activation.forward(x, g, activation),
        lambda x, g: oracle.gated_activation(x, g, activation),
    )


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "neither"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("nan_filled_memory")
def test_layer_norm(shape: tuple, affine: str, device: str, dtype: torch.dtype) -> None:
    channels = shape[-1]
    weight = torch.randn(channels).to(dtype) if "weight" in affine else None
    bias = torch.randn(channels).to(dtype) if "bias" in affine else None

    def exact(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        one, zero = torch.ones(channels).double(), torch.zeros(channels).double()
        return oracle.layer_norm(x, one if w is None else w, zero if b is None else b)

    check(
        dtype,
        device,
        [torch.randn(shape).to(dtype) * 3 + 1, weight, bias],
        lambda x, w, b: _LayerNorm.apply(x, w, b, 1e-5, "triton"),
        lambda x, w, b: torch_norm.forward(x, w, b, 1e-5),
        exact,
    )


@pytest.mark.parametrize(("device", "dtype"), ONE_TARGET)
def test_views(device: str, dtype: torch.dtype) -> None:
    """Inputs and gradients that are not contiguous."""
    x = torch.randn(6, 5, dtype=dtype, device=device)
    seed = torch.randn(5, 6, dtype=dtype, device=device)
    for function in (
        lambda t: _GatedActivation.apply(t, None, "gelu", "triton"),
        lambda t: _LayerNorm.apply(t, None, None, 1e-5, "triton"),
        lambda t: _GatedResidual.apply(t, t, torch.ones(1, device=device), "triton"),
    ):
        view, copy = x.t().requires_grad_(), x.t().contiguous().requires_grad_()
        one, other = function(view), function(copy)
        assert torch.equal(one, other)
        a, b = torch.autograd.grad(one, view, seed), torch.autograd.grad(other, copy, seed)
        assert torch.equal(a[0], b[0])


@pytest.mark.skipif(HAS_GPU, reason="fp64 is for the interpreter")
def test_gradcheck() -> None:
    x, y = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gate = torch.randn(5, dtype=torch.float64, requires_grad=True)
    one = torch.randn(1, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda *a: _GatedResidual.apply(*a, "triton"), (x, y, gate), fast_mode=True)
    assert check(lambda *a: _GatedActivation.apply(*a, "gelu", "triton"), (x, one), fast_mode=True)
    assert check(
        lambda *a: _LayerNorm.apply(*a, 1e-5, "triton"), (x, gate, y[0].detach().requires_grad_()),
        fast_mode=True,
    )  # fmt: skip
