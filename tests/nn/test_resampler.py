"""What the resampler and its layers refuse, and the frame counts they take."""

from __future__ import annotations

import pytest
import torch

from flamingo_kernels.nn import PerceiverResampler
from flamingo_kernels.nn.layers import FeedForward, LayerNorm

FEATURES = torch.zeros(1, 2, 3, 4, 8)


def small(**options) -> PerceiverResampler:
    return PerceiverResampler(8, **{"depth": 1, "dim_head": 4, "heads": 2, **options})


@pytest.mark.parametrize(
    ("features", "num_frames", "error", "message"),
    [
        ([1.0], None, TypeError, "features must be a floating point tensor, got list"),
        (FEATURES[0], None, ValueError, r"\[B, I, F, S, D\], got shape \(2, 3, 4, 8\)"),
        (FEATURES[:, :, :0], None, ValueError, r"no frames: shape \(1, 2, 0, 4, 8\)"),
        (FEATURES, [[3, 3]], TypeError, "num_frames must be an integer tensor, got list"),
        (FEATURES, torch.ones(1, 2), TypeError, "integer tensor, got torch.float32"),
        (FEATURES, torch.ones(1, 2).bool(), TypeError, "integer tensor, got torch.bool"),
        (FEATURES, torch.ones(2).long(), ValueError, r"must have shape \(1, 2\), got \(2,\)"),
        (FEATURES, torch.tensor([[3, 0]]), ValueError, r"num_frames holds 0, outside 1\.\.3"),
        (FEATURES, torch.tensor([[4, 3]]), ValueError, r"num_frames holds 4, outside 1\.\.3"),
        (FEATURES, torch.ones(1, 2, device="meta").int(), ValueError, "on meta, the input on cpu"),
    ],
)
def test_bad_arguments(features, num_frames, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small()(features, num_frames)


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True])
@pytest.mark.parametrize(
    "name",
    "depth dim_head heads num_latents ff_mult max_num_media max_num_frames input_dim".split(),
)
def test_sizes(name: str, value: object) -> None:
    shown = name.removeprefix("ff_")
    with pytest.raises(
        ValueError, match=f"{shown} must be an integer of at least 1, got {value!r}"
    ):
        small(**{name: value})


@pytest.mark.parametrize(
    "build",
    [
        lambda: LayerNorm(8, "cuda"),
        lambda: FeedForward(8, kernel="cuda"),
        lambda: small(kernel="cuda"),
    ],
)
def test_unknown_kernel(build) -> None:
    with pytest.raises(ValueError, match="unknown kernel 'cuda'; known: auto, triton"):
        build()


def test_counts_of_one_byte_do_not_overflow() -> None:
    """3 frames of 100 positions are 300 keys."""
    resampler = small(max_num_frames=3)
    x = torch.randn(1, 2, 3, 100, 8)
    counts = torch.tensor([[3, 1]])
    assert torch.equal(resampler(x, counts.byte()), resampler(x, counts))
