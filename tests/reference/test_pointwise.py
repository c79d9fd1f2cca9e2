"""Elementwise ops against values worked by hand and against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from reference import gated_activation, gated_residual, layer_norm, rms_norm
from testing.budgets import assert_close_to_reference


def test_squared_relu_values():
    x = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0])
    expected = torch.tensor([0.0, 0.0, 0.0, 0.25, 9.0])
    assert torch.equal(gated_activation(x, activation="squared_relu"), expected)


def test_relu_values():
    x = torch.tensor([-3.0, 0.0, 3.0])
    assert torch.equal(gated_activation(x, activation="relu"), torch.tensor([0.0, 0.0, 3.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gelu_is_the_exact_one(random64, dtype):
    x = random64(100).to(dtype)
    assert_close_to_reference(gated_activation(x, activation="gelu"), F.gelu(x), dtype)


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation is 'swish', not squared_relu, gelu or relu"):
        gated_activation(torch.ones(1), activation="swish")


def test_gated_activation_gate():
    gate = torch.tensor(math.log(2.0), dtype=torch.float64)  # tanh(ln 2) = 3/5
    x = torch.tensor([2.0], dtype=torch.float64)
    expected = torch.tensor([4.0 * 3.0 / 5.0], dtype=torch.float64)
    assert_close_to_reference(gated_activation(x, gate, "squared_relu"), expected, torch.float64)


def test_gated_residual_values():
    gate = torch.tensor([math.log(2.0), 0.0], dtype=torch.float64)
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([[10.0, 10.0]], dtype=torch.float64)
    expected = torch.tensor([[7.0, 1.0]], dtype=torch.float64)
    assert_close_to_reference(gated_residual(x, y, gate), expected, torch.float64)
    assert_close_to_reference(gated_residual(x, y, gate[:1])[:, 1], expected[:, 0], torch.float64)


def test_zero_gate_returns_x_bit_for_bit(random64):
    x = random64(3, 4)
    assert torch.equal(gated_residual(x, random64(3, 4), torch.zeros(1)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_equal_torch(random64, dtype):
    x, weight, bias = random64(5, 8).to(dtype), random64(8).to(dtype), random64(8).to(dtype)
    assert_close_to_reference(
        layer_norm(x, weight, bias), F.layer_norm(x, (8,), weight, bias, 1e-5), dtype
    )
    assert_close_to_reference(rms_norm(x, weight), F.rms_norm(x, (8,), weight, 1e-6), dtype)


def test_half_precision_is_computed_in_fp32_and_rounded_once(random64):
    x, y, gate = random64(64).bfloat16(), random64(64).bfloat16(), random64(1).bfloat16()
    expected = gated_residual(x.float(), y.float(), gate.float()).bfloat16()
    assert torch.equal(gated_residual(x, y, gate), expected)


def test_gradients(random64):
    x, y, gate, weight, bias = (random64(n).requires_grad_() for n in (4, 4, 1, 4, 4))
    assert torch.autograd.gradcheck(gated_residual, (x, y, gate))
    assert torch.autograd.gradcheck(layer_norm, (x, weight, bias))
    assert torch.autograd.gradcheck(rms_norm, (x, weight))
    for activation in ("squared_relu", "gelu", "relu"):
        assert torch.autograd.gradcheck(
            lambda x, gate, name=activation: gated_activation(x, gate, name), (x, gate)
        )
