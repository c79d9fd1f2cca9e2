"""Checks and the choice of a kernel run once per signature, and again for a new one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from flamingo_kernels import MediaSpans
from flamingo_kernels.ops import latent_attention, layer_norm, media_cross_attention
from flamingo_kernels.ops.signature import remembered
from testing.budgets import assert_close_to_reference


def spans_of(*index: int) -> MediaSpans:
    return MediaSpans.from_media_index(torch.tensor([index]))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:1],
        lambda x: x.t(),
        lambda x: x.double(),
        lambda x: x.to("meta"),
        lambda x: x.clone().requires_grad_(),
    ],
    ids=["shape", "strides", "dtype", "device", "requires_grad"],
)
def test_what_a_call_depends_on(change) -> None:
    calls: list[Tensor] = []
    ask = remembered(lambda x: calls.append(x) or len(calls))
    x = torch.randn(2, 2)
    assert [ask(x), ask(x + 1), ask(change(x)), ask(x)] == [1, 1, 2, 1]


def test_grad_mode_options_and_spans_are_part_of_a_signature() -> None:
    count = iter(range(100))
    ask = remembered(lambda *_: next(count))
    x = torch.randn(2)
    first = ask(x, "auto", spans_of(0, 0))
    assert ask(x, "auto", spans_of(1, 1)) == first
    with torch.no_grad():
        assert ask(x, "auto", spans_of(0, 0)) != first
    assert ask(x, "cpp", spans_of(0, 0)) != first
    assert ask(x, "auto", spans_of(0, 0, 0)) != first


def test_subclasses_of_tensors_are_asked_for_each_time() -> None:
    class Subclass(torch.Tensor):
        pass

    count = iter(range(100))
    ask = remembered(lambda x: next(count))
    x = torch.randn(2).as_subclass(Subclass)
    assert [ask(x), ask(x)] == [0, 1]


def test_a_bound_kernel_takes_the_tensors_of_each_call() -> None:
    """Calls alike but for values and addresses, and calls that look alike and are not."""
    spans, one = spans_of(0, 0), torch.tensor([0.7])
    wide = torch.randn(2, 2, 4, 16)
    queries = [
        torch.randn(1, 2, 4, 8),
        torch.randn(1, 2, 4, 8),
        wide[1:, ..., 3:11],
        torch.randn(1, 4, 2, 8).transpose(1, 2),
        torch.randn(64).as_strided((1, 2, 4, 8), (7, 32, 8, 1)),
    ]
    k, v = torch.randn(2, 1, 1, 3, 4, 8)
    with torch.no_grad():
        for gate in (one, one.half(), None):
            for q in queries:
                for scale in (None, 0.5):
                    out = media_cross_attention(q, k, v, spans, gate, scale)
                    expected = media_cross_attention(q, k, v, spans, gate, scale, kernel="torch")
                    assert_close_to_reference(out, expected, q.dtype, f"{q.stride()}")
        weight = torch.rand(3, 8).t()[:, 0]
        for x in (wide, wide[:, 0], wide[:, 0].contiguous()):
            x = x[..., :8]
            for bias in (weight, weight.bfloat16()):
                expected = layer_norm(x, weight, bias.float(), kernel="torch")
                assert_close_to_reference(layer_norm(x, weight, bias), expected, x.dtype, "norm")


@torch.no_grad()
def test_numbers_given_as_tensors_are_looked_at_in_every_call() -> None:
    q, kv, spans = torch.randn(1, 2, 2, 8), torch.randn(1, 1, 4, 2, 8), spans_of(0, 0)
    weight = torch.ones(8)
    for number in (0.1, 5.0):
        for given in (torch.tensor(number), np.float64(number)):
            out = media_cross_attention(q, kv, kv, spans, scale=given)
            assert torch.equal(out, media_cross_attention(q, kv, kv, spans, scale=number))
            out = latent_attention(q, q, q, q, q, scale=given)
            assert torch.equal(out, latent_attention(q, q, q, q, q, scale=number))
            norm = layer_norm(q, weight, weight, given)
            assert torch.equal(norm, layer_norm(q, weight, weight, number))
    with pytest.raises(ValueError, match="eps must be at least 0"):
        layer_norm(q, weight, weight, torch.tensor(-1.0))


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flamingo_kernels.ops.signature._MOST_SIGNATURES", 2)
    count = iter(range(100))
    ask = remembered(lambda option: next(count))
    assert [ask(1), ask(2), ask(1), ask(3), ask(1)] == [0, 1, 0, 2, 3]


def test_a_call_that_fails_after_one_that_did_not() -> None:
    q, kv = torch.randn(1, 2, 2, 8), torch.randn(1, 1, 4, 2, 8)
    media_cross_attention(q, kv, kv, spans_of(0, 0))
    for _ in range(2):
        with pytest.raises(ValueError, match="expected"):
            media_cross_attention(q, kv, kv, spans_of(0, 0, 0))
        with pytest.raises(TypeError, match="spans must be MediaSpans"):
            media_cross_attention(q, kv, kv, None)
