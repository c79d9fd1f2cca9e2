"""latent_attention: every kernel against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flamingo_kernels.ops import latent_attention
from reference.attention import latent_attention as oracle
from testing.budgets import assert_within_budget, attention_terms
from testing.cases import kernels_for

OP = "latent_attention"

shapes = st.fixed_dictionaries(
    {
        "items": st.integers(1, 3),
        "latents": st.sampled_from([1, 4, 64]),
        "features": st.sampled_from([0, 1, 5, 70]),
        "heads": st.integers(1, 3),
        "head_dim": st.sampled_from([2, 8, 24]),
        "ragged": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


def latent_case(
    dtype: torch.dtype,
    *,
    items: int = 2,
    latents: int = 4,
    features: int = 6,
    heads: int = 2,
    head_dim: int = 8,
    ragged: bool = True,
    nan: bool = True,
    seed: int = 0,
) -> tuple[list[Tensor], Tensor | None]:
    torch.manual_seed(seed)
    q, k_latents, v_latents = torch.randn(3, items, latents, heads, head_dim)
    k_media, v_media = torch.randn(2, items, features, heads, head_dim)
    lengths = torch.randint(0, features + 1, (items,)) if ragged else None
    if ragged and nan:
        padding = torch.arange(features) >= lengths[:, None]
        k_media[padding] = v_media[padding] = float("nan")
    return [t.to(dtype) for t in (q, k_media, v_media, k_latents, v_latents)], lengths


def plain_pytorch(tensors: list[Tensor], lengths: Tensor | None) -> Tensor:
    q, k_media, v_media, k_latents, v_latents = (t.nan_to_num() for t in tensors)
    k, v = torch.cat((k_media, k_latents), 1), torch.cat((v_media, v_latents), 1)
    scores = torch.einsum("nlhd,nkhd->nhlk", q, k) * q.shape[-1] ** -0.5
    if lengths is not None:
        key = torch.arange(k.shape[1])
        hidden = (key >= lengths[:, None]) & (key < k_media.shape[1])
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    return torch.einsum("nhlk,nkhd->nlhd", scores.softmax(-1), v)


def case_terms(tensors: list[Tensor], seed: Tensor | None = None) -> dict[str, float]:
    q, k_media, v_media, k_latents, v_latents = tensors
    k, v = torch.cat((k_media, k_latents), 1), torch.cat((v_media, v_latents), 1)
    return attention_terms(q, k, v, q.shape[-1] ** -0.5, seed)


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


@pytest.mark.parametrize(("kernel", "dtype"), kernels_for(OP))
@pytest.mark.usefixtures("nan_filled_memory")
def test_forward_within_budget(kernel: str, dtype: torch.dtype) -> None:
    """SEMANTICS 12 and 17: ragged lengths, NaN past them never read."""

    @given(shapes)
    def check(shape: dict) -> None:
        tensors, lengths = latent_case(dtype, **shape)
        out = latent_attention(*tensors, lengths, kernel=kernel)
        assert out.dtype == dtype
        exact = oracle(*doubled(tensors), lengths)
        terms = case_terms(tensors)["out"]
        assert_within_budget(out, plain_pytorch(tensors, lengths), exact, dtype, terms=terms)

    check()


@pytest.mark.parametrize(("kernel", "dtype"), kernels_for(OP, needs_grad=True))
@pytest.mark.usefixtures("nan_filled_memory")
def test_gradients_within_budget(kernel: str, dtype: torch.dtype) -> None:
    @given(shapes)
    def check(shape: dict) -> None:
        tensors, lengths = latent_case(dtype, **shape)
        tensors = [t.requires_grad_() for t in tensors]
        seed = torch.randn(tensors[0].shape)

        def gradients(function, inputs: list[Tensor]) -> tuple[Tensor, ...]:
            out = function(inputs)
            return torch.autograd.grad(out, inputs, seed.to(out.dtype))

        ours = gradients(lambda x: latent_attention(*x, lengths, kernel=kernel), tensors)
        plain = gradients(lambda x: plain_pytorch(x, lengths), tensors)
        true = gradients(lambda x: oracle(*x, lengths), doubled(tensors))
        names = ("dq", "dk_media", "dv_media", "dk_latents", "dv_latents")
        terms = case_terms(tensors, seed)
        for name, *triple in zip(names, ours, plain, true, strict=True):
            bound = terms[name.split("_")[0]]
            assert_within_budget(*triple, dtype, gradient=True, terms=bound, what=name)
        if lengths is not None:
            padding = torch.arange(tensors[1].shape[1]) >= lengths[:, None]
            assert not ours[1][padding].any() and not ours[2][padding].any()

    check()


@pytest.mark.parametrize(
    "kernel", [k for k, dtype in kernels_for(OP, needs_grad=True) if dtype == torch.float64]
)
def test_gradcheck(kernel: str) -> None:
    tensors, lengths = latent_case(torch.float64, latents=3, features=4, head_dim=2, nan=False)
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(
        lambda *x: latent_attention(*x, lengths, kernel=kernel), tensors
    )


@pytest.mark.parametrize(("kernel", "dtype"), kernels_for(OP))
def test_a_clip_equals_itself_padded(kernel: str, dtype: torch.dtype) -> None:
    tensors, _ = latent_case(dtype, ragged=False)
    alone = latent_attention(*tensors, kernel=kernel)
    padded = list(tensors)
    for i in (1, 2):
        garbage = torch.full_like(tensors[i], float("nan"))
        padded[i] = torch.cat((tensors[i], garbage), 1)
    lengths = torch.full((2,), tensors[1].shape[1])
    together = latent_attention(*padded, lengths, kernel=kernel)
    exact = oracle(*doubled(tensors))
    assert_within_budget(together, alone, exact, dtype)


@pytest.mark.parametrize(
    ("position", "change", "error", "message"),
    [
        (0, lambda t: t[0], ValueError, r"q must be \[N, L, H, D\], got shape \(4, 2, 8\)"),
        (1, lambda t: t[..., :4], ValueError, r"k_media has shape \(2, 6, 2, 4\), expected"),
        (2, lambda t: t[:, :3], ValueError, r"v_media has shape \(2, 3, 2, 8\), expected"),
        (3, lambda t: t[:, :3], ValueError, r"k_latents has shape \(2, 3, 2, 8\), expected"),
        (4, lambda t: t.double(), TypeError, "one dtype"),
        (5, lambda t: t[:1], ValueError, r"lengths must have shape \(2,\), got \(1,\)"),
        (5, lambda t: t.to("meta"), ValueError, "lengths is on meta, the input on cpu"),
        (5, lambda t: t.float(), TypeError, "lengths must be an integer tensor, got torch.float32"),
        (5, lambda t: t.bool(), TypeError, "lengths must be an integer tensor, got torch.bool"),
        (5, lambda t: t.tolist(), TypeError, "lengths must be an integer tensor, got list"),
        (5, lambda t: t * 0 - 1, ValueError, r"lengths holds -1, outside 0\.\.6"),
        (5, lambda t: t * 0 + 7, ValueError, r"lengths holds 7, outside 0\.\.6"),
    ],
)
def test_bad_arguments(position: int, change, error: type[Exception], message: str) -> None:
    tensors, lengths = latent_case(torch.float32)
    arguments = [*tensors, lengths]
    arguments[position] = change(arguments[position])
    with pytest.raises(error, match=message):
        latent_attention(*arguments)
