"""The modules against OpenFlamingo's own code with transplanted weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flamingo_kernels.nn import GatedCrossAttentionBlock, PerceiverResampler
from testing.budgets import assert_close_to_reference, assert_gradients_close
from testing.peers import open_flamingo_helpers

BLOCK = {"dim": 32, "dim_visual": 24, "dim_head": 8, "heads": 4}
RESAMPLER = {"dim": 32, "depth": 2, "dim_head": 8, "heads": 4, "num_latents": 5}


def transplant(ours: nn.Module, theirs: nn.Module) -> None:
    for name, parameter in theirs.named_parameters():
        parameter.data.normal_(std=0.5 if name.endswith("gate") else parameter.shape[-1] ** -0.5)
    ours.load_state_dict(theirs.state_dict(), strict=True)


def compare(ours: nn.Module, theirs: nn.Module, inputs: list[Tensor], call, dtype) -> None:
    """Output and every gradient, of inputs and of parameters."""
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    results = []
    for module in (ours, theirs):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        out = call(module, *leaves)
        torch.manual_seed(1)
        out.backward(torch.randn_like(out))
        gradients = {f"input {i}": leaf.grad for i, leaf in enumerate(leaves)}
        gradients |= {name: p.grad for name, p in module.named_parameters()}
        results.append((out, gradients))
    (out, gradients), (expected, expected_gradients) = results
    assert_close_to_reference(out, expected, dtype, "output")
    assert_gradients_close(gradients, expected_gradients, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("immediate", [True, False])
def test_block(dtype: torch.dtype, immediate: bool) -> None:
    helpers = open_flamingo_helpers()
    theirs = helpers.GatedCrossAttentionBlock(**BLOCK, only_attend_immediate_media=immediate)
    ours = GatedCrossAttentionBlock(**BLOCK, only_attend_immediate_media=immediate)
    transplant(ours, theirs)
    x, media = torch.randn(2, 9, 32), torch.randn(2, 3, 5, 24)
    locations = torch.zeros(2, 9, dtype=torch.bool)
    locations[0, [0, 3, 4]] = True
    # Where theirs attends to all media (see below) ours sees nothing: keep such tokens out.
    locations[1, [0, 5] if not immediate else [2, 5]] = True
    compare(ours, theirs, [x, media], lambda m, x, media: m(x, media, locations), dtype)


@pytest.mark.parametrize("tokens", [1, 4])
def test_block_with_cached_media(tokens: int) -> None:
    helpers = open_flamingo_helpers()
    theirs, ours = helpers.GatedCrossAttentionBlock(**BLOCK), GatedCrossAttentionBlock(**BLOCK)
    transplant(ours, theirs)
    x, media = torch.randn(2, tokens, 32), torch.randn(2, 3, 5, 24)
    locations = torch.zeros(2, 9, dtype=torch.bool)
    locations[0, [1, 3, 4]] = True
    locations[1, 6] = True
    compare(
        ours,
        theirs,
        [x, media],
        lambda m, x, media: m(x, media, locations, use_cached_media=True),
        torch.float32,
    )


def test_pre_image_text_in_previous_mode_is_where_we_differ() -> None:
    """OpenFlamingo spreads such tokens over all images; ours see nothing (semantics, point 3)."""
    helpers = open_flamingo_helpers()
    theirs = helpers.GatedCrossAttentionBlock(**BLOCK, only_attend_immediate_media=False)
    ours = GatedCrossAttentionBlock(**BLOCK, only_attend_immediate_media=False)
    transplant(ours, theirs)
    x, media = torch.randn(1, 4, 32), torch.randn(1, 2, 5, 24)
    locations = torch.tensor([[False, True, False, True]])
    mine, other = (
        m.attn_gate.tanh() * torch.ones(1) * (m(x, media, locations) - m(x, 0 * media, locations))
        for m in (ours, theirs)
    )
    assert not mine[:, 0].any()
    assert other[:, 0].abs().max() > other[:, 1].abs().max() / 10
    assert_close_to_reference(
        ours(x, media, locations)[:, 1:], theirs(x, media, locations)[:, 1:], torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("frames", [1, 3])
def test_resampler(dtype: torch.dtype, frames: int) -> None:
    helpers = open_flamingo_helpers()
    options = {**RESAMPLER, "max_num_media": 3, "max_num_frames": frames}
    theirs, ours = helpers.PerceiverResampler(**options), PerceiverResampler(**options)
    transplant(ours, theirs)
    x = torch.randn(2, 3, frames, 7, 32)
    compare(ours, theirs, [x], lambda module, x: module(x), dtype)


def test_initial_state_dict_has_the_same_names_and_shapes() -> None:
    helpers = open_flamingo_helpers()
    for name, options in (("GatedCrossAttentionBlock", BLOCK), ("PerceiverResampler", RESAMPLER)):
        theirs = getattr(helpers, name)(**options).state_dict()
        ours = {
            "GatedCrossAttentionBlock": GatedCrossAttentionBlock,
            "PerceiverResampler": PerceiverResampler,
        }[name](**options).state_dict()
        assert [(k, v.shape) for k, v in ours.items()] == [(k, v.shape) for k, v in theirs.items()]
