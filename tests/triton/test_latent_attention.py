"""Triton's latent attention against the fp64 reference, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flamingo_kernels.ops.latent_attention.api import _LatentAttention
from reference.attention import latent_attention as oracle
from testing.budgets import assert_within_budget
from testing.latent_attention import NAMES, case_terms, doubled, latent_case, plain_pytorch
from testing.targets import HAS_GPU, ONE_TARGET, TARGETS, float64_products, gpu

SHAPES = [
    {"latents": 4, "features": 5, "head_dim": 16},
    {"latents": 64, "features": 70, "head_dim": 40, "kv_heads": 1},
    {"latents": 100, "features": 0, "head_dim": 24, "kv_heads": 1},
    {"latents": 1, "features": 140, "head_dim": 96},
    {"latents": 65, "features": 30, "head_dim": 128, "kv_heads": 1, "items": 1},
    {"latents": 5, "features": 140, "head_dim": 24, "group": 3},
    {"latents": 64, "features": 30, "head_dim": 16, "kv_heads": 1, "group": 4},
]


@pytest.fixture
def implementation(monkeypatch: pytest.MonkeyPatch):
    """The launchers, with forward splits so short that small shapes need them."""
    from flamingo_kernels.ops.latent_attention.impl_triton import latent_forward

    monkeypatch.setattr(latent_forward, "SPLIT_KEYS", 64)
    return latent_forward


def run(tensors: list[Tensor], lengths: Tensor | None) -> Tensor:
    """The op past its dispatch, which knows nothing of the interpreter of this process."""
    return _LatentAttention.apply(*tensors, lengths, tensors[0].shape[-1] ** -0.5, "triton")


def check(tensors: list[Tensor], lengths: Tensor | None, dtype: torch.dtype) -> None:
    tensors = [t.requires_grad_() for t in tensors]
    device = tensors[0].device
    seed = torch.randn(tensors[0].shape).to(device, dtype)
    out = run(tensors, lengths)
    ours = torch.autograd.grad(out, tensors, seed)
    copies = [t.detach().cpu().requires_grad_() for t in tensors]
    held = None if lengths is None else lengths.cpu()
    plain_out = plain_pytorch(copies, held)
    plain = torch.autograd.grad(plain_out, copies, seed.cpu())
    exact_inputs = doubled(copies)
    exact_out = oracle(*exact_inputs, held)
    true = torch.autograd.grad(exact_out, exact_inputs, seed.cpu().double())

    terms = case_terms(copies, seed.cpu())
    assert_within_budget(out, plain_out, exact_out, dtype, terms=terms["out"])
    for name, *triple in zip(NAMES, ours, plain, true, strict=True):
        bound = terms[name.split("_")[0]]
        assert_within_budget(*triple, dtype, gradient=True, terms=bound, what=name)
    if held is not None:
        padding = torch.arange(tensors[1].shape[1]) >= held[:, None]
        assert not ours[1][padding].any() and not ours[2][padding].any()


def on(device: str, tensors: list[Tensor], lengths: Tensor | None):
    return [t.to(device) for t in tensors], None if lengths is None else lengths.to(device)


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda s: f"L{s['latents']}-M{s['features']}-G{s.get('group', 1)}"
)
@pytest.mark.usefixtures("nan_filled_memory")
def test_within_budget(implementation, shape: dict, ragged: bool, device: str, dtype: torch.dtype):
    """Keys past the lengths and fresh memory hold NaN (semantics, points 12 and 17)."""
    check(*on(device, *latent_case(dtype, ragged=ragged, **shape)), dtype)


@pytest.mark.parametrize(("device", "dtype"), ONE_TARGET)
def test_without_splits(
    implementation, monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype
) -> None:
    """One program per item and head, as in large batches."""
    from flamingo_kernels.ops.latent_attention.impl_triton import latent_backward

    monkeypatch.setattr(implementation, "SPLIT_KEYS", 1024)
    monkeypatch.setattr(latent_backward, "TARGET_PROGRAMS", 1)
    check(*on(device, *latent_case(dtype, latents=16, features=100)), dtype)


@pytest.mark.parametrize(("device", "dtype"), ONE_TARGET)
def test_item_bits_do_not_depend_on_the_batch(
    implementation, device: str, dtype: torch.dtype
) -> None:
    tensors, _ = on(device, *latent_case(dtype, items=3, features=150, group=2, ragged=False))
    together = run(tensors, None)
    for item in range(3):
        alone = run([t[item : item + 1] for t in tensors], None)
        assert torch.equal(alone, together[item : item + 1])


@pytest.mark.parametrize(("device", "dtype"), ONE_TARGET)
def test_strides(implementation, device: str, dtype: torch.dtype) -> None:
    """Views of fused key/value projections give the same bits as copies."""
    tensors, lengths = on(device, *latent_case(dtype, nan=False))
    q, k_media, v_media, k_latents, v_latents = tensors
    media, latents = torch.stack((k_media, v_media), 2), torch.stack((k_latents, v_latents), 2)
    views = [q.transpose(1, 2).contiguous().transpose(1, 2), *media.unbind(2), *latents.unbind(2)]
    seed = torch.randn(q.shape).to(device)
    results = []
    for inputs in (tensors, views):
        inputs = [t.requires_grad_() for t in inputs]
        out = run(inputs, lengths)
        results.append([out, *torch.autograd.grad(out, inputs, seed)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("device", "dtype"), ONE_TARGET)
def test_no_items(device: str, dtype: torch.dtype) -> None:
    tensors, lengths = on(device, *latent_case(dtype, items=0))
    tensors = [t.requires_grad_() for t in tensors]
    out = run(tensors, lengths)
    assert out.shape == tensors[0].shape
    assert all(g.numel() == 0 for g in torch.autograd.grad(out.sum(), tensors))


@pytest.mark.skipif(HAS_GPU, reason="fp64 is for the interpreter")
@float64_products
def test_gradcheck() -> None:
    tensors, lengths = latent_case(torch.float64, latents=3, features=4, head_dim=2, nan=False)
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *x: run(list(x), lengths), tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=gpu)])
@pytest.mark.parametrize("features", [256, 4096])
def test_graph_capture(features: int, dtype: torch.dtype) -> None:
    tensors, lengths = on("cuda", *latent_case(dtype, latents=64, features=features, head_dim=64))
    tensors = [t.requires_grad_() for t in tensors]
    seed = torch.randn(tensors[0].shape, device="cuda", dtype=dtype)

    def both() -> list[Tensor]:
        out = run(tensors, lengths)
        return [out, *torch.autograd.grad(out, tensors, seed)]

    expected = both()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
