"""Blocks against the reference, in fp64, and what they refuse."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import reference
from flamingo_kernels.nn import GatedCrossAttentionBlock, PerceiverResampler
from flamingo_kernels.ops import KeyRanges, MediaSpans
from flamingo_kernels.ops.gated_activation import ACTIVATIONS
from testing.budgets import assert_close_to_reference, assert_gradients_close
from testing.cases import IMAGE

DIM, MEDIA_DIM, HEADS, HEAD_DIM = 12, 10, 2, 4


def randomise(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.data.normal_()
    return module.double()


def block_pair(**options) -> tuple[nn.Module, nn.Module]:
    """(ours, the reference's) with the same random weights, in fp64."""
    ours = randomise(
        GatedCrossAttentionBlock(DIM, MEDIA_DIM, HEAD_DIM, HEADS, ff_mult=2, **options)
    )
    defaults = {
        "heads": HEADS,
        "kv_heads": None,
        "head_dim": HEAD_DIM,
        "ff_mult": 2,
        "activation": "gelu",
        "media_norm": False,
        "gate": "scalar",
        "feed_forward_without_media": True,
    }
    config = SimpleNamespace(**{**defaults, **options})
    theirs = reference.GatedCrossAttentionBlock(config, DIM, MEDIA_DIM).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


IDS = torch.tensor([[1, IMAGE, 1, IMAGE, IMAGE, 1], [1, 1, 1, IMAGE, 1, 1]])


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("media_norm", [False, True])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("attend", ["last", "last_group", "previous"])
def test_block_equals_reference(
    gate: str, media_norm: bool, everywhere: bool, activation: str, attend: str
) -> None:
    """Gates, feed-forward and norms, with NaN in unseen slots (semantics, points 8 to 10)."""
    ours, theirs = block_pair(
        gate=gate,
        media_norm=media_norm,
        activation=activation,
        feed_forward_without_media=everywhere,
    )
    spans = MediaSpans.from_tokens(IDS, IMAGE, attend)
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    media = torch.randn(2, 3, 5, MEDIA_DIM, dtype=torch.float64)
    poisoned = media.clone()
    poisoned[1, 1:] = float("nan")
    media[1, 1:] = 0
    seed = torch.randn_like(x)
    mine = [x.clone().requires_grad_(), poisoned.requires_grad_()]
    other = [x.clone().requires_grad_(), media.requires_grad_()]
    out = ours(*mine, spans=spans)
    expected = theirs(*other, spans.first, spans.last)
    out.backward(seed)
    expected.backward(seed)
    assert_close_to_reference(out, expected, torch.float64)
    gradients, truth = (
        {"x": leaves[0].grad, "media": leaves[1].grad}
        | {name: p.grad for name, p in block.named_parameters()}
        for block, leaves in ((ours, mine), (theirs, other))
    )
    assert_gradients_close(gradients, truth, torch.float64)


def test_more_markers_than_images_see_nothing() -> None:
    """Text without media adds nothing to the residual (semantics, points 3 and 9)."""
    ours, theirs = block_pair(feed_forward_without_media=False)
    spans = MediaSpans.from_tokens(torch.tensor([[IMAGE, 1, IMAGE, 1]]), IMAGE)
    x = torch.randn(1, 4, DIM, dtype=torch.float64)
    media = torch.randn(1, 1, 5, MEDIA_DIM, dtype=torch.float64)
    out = ours(x, media, spans=spans)
    assert torch.equal(out[:, 2:], x[:, 2:])
    assert_close_to_reference(out, theirs(x, media, spans.first, spans.last), torch.float64)


@pytest.mark.parametrize("frames", [1, 2, 3, 7])
@pytest.mark.parametrize("input_dim", [None, 6])
@pytest.mark.parametrize("final_norm", [False, True])
def test_resampler_equals_reference(frames: int, input_dim: int | None, final_norm: bool) -> None:
    """The trained three frames, fewer, more, and one image (semantics, points 10 and 12)."""
    options = {"num_latents": 3, "ff_mult": 2, "input_dim": input_dim, "final_norm": final_norm}
    ours = randomise(
        PerceiverResampler(
            8, depth=2, dim_head=4, heads=2, max_num_frames=3, activation="squared_relu", **options
        )
    )
    config = SimpleNamespace(
        dim=8,
        depth=2,
        heads=2,
        head_dim=4,
        max_num_frames=3,
        activation="squared_relu",
        **options,
    )
    theirs = reference.PerceiverResampler(config).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(1, 2, frames, 5, input_dim or 8, dtype=torch.float64)
    out = ours(x)
    assert out.shape == (1, 2, 3, 8)
    expected = theirs(x[0])
    assert_close_to_reference(out[0], expected, torch.float64)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_block_gradcheck(gate: str) -> None:
    ours, _ = block_pair(gate=gate, media_norm=True, activation="squared_relu")
    spans = MediaSpans.from_tokens(IDS[:, :4], IMAGE)
    x = torch.randn(2, 4, DIM, dtype=torch.float64, requires_grad=True)
    media = torch.randn(2, 2, 2, MEDIA_DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, media, *_: ours(x, media, spans=spans),
        (x, media, ours.attn_gate, ours.ff_gate),
    )


def test_resampler_gradcheck_with_ragged_clips() -> None:
    ours = randomise(PerceiverResampler(4, 1, 2, 2, num_latents=2, max_num_frames=2, ff_mult=1))
    x = torch.randn(1, 2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    frames = torch.tensor([[3, 1]])
    assert torch.autograd.gradcheck(
        lambda x, latents, table: ours(x, frames), (x, ours.latents, ours.frame_embs)
    )


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("kernel", ["torch", "cpp"])
def test_key_ranges_of_flat_media_equal_items(kernel: str, everywhere: bool) -> None:
    """Also with grouped queries; media that no token sees hold NaN."""
    options = {"kv_heads": 1, "feed_forward_without_media": everywhere, "kernel": kernel}
    ours, theirs = block_pair(**options)
    spans = MediaSpans.from_tokens(IDS, IMAGE)
    ranges = KeyRanges.from_items(spans, torch.full((2, 3), 5))
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    media = torch.randn(2, 3, 5, MEDIA_DIM, dtype=torch.float64)
    expected = theirs(x, media, spans.first, spans.last)
    media_kv = ours.project_media(media.flatten(1, 2))
    assert media_kv.key.shape == (2, 15, 1, HEAD_DIM)
    assert_close_to_reference(ours(x, media_kv=media_kv, spans=ranges), expected, torch.float64)
    media[1, 1:] = float("nan")
    out = ours(x, media.flatten(1, 2), spans=ranges)
    assert_close_to_reference(out, expected, torch.float64)


def test_media_projected_once_gives_the_same_bits() -> None:
    ours, _ = block_pair()
    spans = MediaSpans.from_tokens(IDS, IMAGE)
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    media = torch.randn(2, 3, 5, MEDIA_DIM, dtype=torch.float64)
    assert torch.equal(
        ours(x, media, spans=spans), ours(x, media_kv=ours.project_media(media), spans=spans)
    )
    assert torch.equal(ours(x, media, spans=spans), ours(x, media, IDS == IMAGE))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of media and media_kv"),
        ({"media": torch.zeros(2, 5, 10)}, r"= \[2, I, R, 10\], got \(2, 5, 10\)"),
        ({"media": torch.zeros(1, 3, 5, 10)}, r"= \[2, I, R, 10\], got \(1, 3, 5, 10\)"),
        ({"media": torch.zeros(2, 3, 5, 9)}, r"= \[2, I, R, 10\], got \(2, 3, 5, 9\)"),
        (
            {
                "media": torch.zeros(2, 3, 5, 10),
                "spans": KeyRanges.everything(2, 6, 15, torch.device("cpu")),
            },
            r"= \[2, S, 10\], got \(2, 3, 5, 10\)",
        ),
        ({"media": torch.zeros(2, 3, 5, 10, device="meta")}, "media is on meta, x on cpu"),
        (
            {
                "media": torch.zeros(2, 3, 5, 10),
                "media_locations": torch.zeros(2, 0).bool(),
                "use_cached_media": True,
            },
            r"media_locations has shape \(2, 0\)",
        ),
        (
            {"media": torch.zeros(2, 3, 5, 10), "media_locations": torch.zeros(2, 7).bool()},
            "media_locations has 7 tokens, x has 6",
        ),
        (
            {
                "media": torch.zeros(2, 3, 5, 10),
                "media_locations": torch.zeros(2, 6).bool(),
                "spans": MediaSpans.from_tokens(IDS, IMAGE),
            },
            "at most one of spans and media_locations",
        ),
    ],
)
def test_block_errors(arguments: dict, message: str) -> None:
    block = GatedCrossAttentionBlock(DIM, MEDIA_DIM, HEAD_DIM, HEADS)
    with pytest.raises(ValueError, match=message):
        block(torch.zeros(2, 6, DIM), **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "matrix"}, "unknown gate 'matrix'; known: scalar, vector"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"kv_heads": 3}, "kv_heads must divide heads=8, got 3"),
        ({"kernel": "fast"}, "unknown kernel 'fast'"),
        ({"attend": "all"}, "unknown attend mode 'all'"),
        ({"activation": "tanh"}, "unknown activation 'tanh'"),
    ],
)
def test_block_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedCrossAttentionBlock(DIM, MEDIA_DIM, **options)
