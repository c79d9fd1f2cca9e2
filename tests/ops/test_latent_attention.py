"""latent_attention: every kernel against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor

from flamingo_kernels.ops import key_lengths, latent_attention
from reference.attention import latent_attention as oracle
from testing.budgets import assert_within_budget
from testing.cases import kernels_for
from testing.latent_attention import (
    NAMES,
    case_terms,
    doubled,
    latent_case,
    plain_pytorch,
    shapes,
)

OP = "latent_attention"


@pytest.mark.parametrize(("kernel", "dtype"), kernels_for(OP))
@pytest.mark.usefixtures("nan_filled_memory")
def test_forward_within_budget(kernel: str, dtype: torch.dtype) -> None:
    """Features past a clip's length, NaN here, are never read (semantics, points 12 and 17)."""

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
        terms = case_terms(tensors, seed)
        for name, *triple in zip(NAMES, ours, plain, true, strict=True):
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
    tensors, lengths = latent_case(
        torch.float64, latents=3, features=4, head_dim=2, group=2, nan=False
    )
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(
        lambda *x: latent_attention(*x, lengths, kernel=kernel), tensors
    )


@pytest.mark.parametrize(("kernel", "dtype"), kernels_for(OP))
def test_lengths_of_zero_leave_the_latents(kernel: str, dtype: torch.dtype) -> None:
    tensors, _ = latent_case(dtype, group=2)
    alone = latent_attention(tensors[0], *(t[:, :0] for t in tensors[1:3]), *tensors[3:])
    tensors[1].fill_(float("inf"))
    lengths = torch.zeros(2, dtype=torch.int64)
    out = latent_attention(*tensors, lengths, kernel=kernel)
    assert_within_budget(out, alone, oracle(*doubled(tensors), lengths), dtype)


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


def test_lengths_of_a_mask() -> None:
    mask = torch.arange(4) < torch.tensor([4, 0, 2])[:, None]
    assert key_lengths(mask).tolist() == [4, 0, 2]
    assert key_lengths(mask[:, :0]).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([[True, False], [False, True]], ValueError, "item 1 has the valid key 1 after padding"),
        ([[1, 0]], TypeError, r"bool tensor \[N, M\], got torch.int64"),
        ([True, False], ValueError, r"mask must be \[N, M\], got shape \(2,\)"),
    ],
)
def test_bad_masks(mask: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        key_lengths(torch.tensor(mask))


@pytest.mark.parametrize(
    ("position", "change", "error", "message"),
    [
        (0, lambda t: t[0], ValueError, r"q must be \[N, L, H, D\], got shape \(4, 2, 8\)"),
        (1, lambda t: t[..., :4], ValueError, r"k_media has shape \(2, 6, 2, 4\), expected"),
        (1, lambda t: t[:, :, :0], ValueError, "multiple of key/value heads, got H=2, Hkv=0"),
        (0, lambda t: t[:, :, :1], ValueError, "multiple of key/value heads, got H=1, Hkv=2"),
        (0, lambda t: t[:, :, :0], ValueError, "query heads H must be at least 1, got 0"),
        (2, lambda t: t[:, :3], ValueError, r"v_media has shape \(2, 3, 2, 8\), expected"),
        (3, lambda t: t[:, :3], ValueError, r"k_latents has shape \(2, 3, 2, 8\), expected"),
        (4, lambda t: t[:, :, :1], ValueError, r"expected \(2, 4, 2, 8\) to match q and k_media"),
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
