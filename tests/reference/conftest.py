"""A Flamingo small enough for fp64 on two cores, with every parameter random, gates included."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from reference import Flamingo

IMAGE, END_OF_CHUNK, BOS, EOS, PAD = 60, 61, 1, 2, 0


def tiny_config(**cross_attention: object) -> SimpleNamespace:
    """Configuration of the tiny model, with changes to its cross_attention part."""
    cross = dict(
        every=1,
        offset=0,
        heads=2,
        kv_heads=None,
        head_dim=8,
        ff_mult=2,
        activation="squared_relu",
        media_norm=True,
        gate="scalar",
        attend="last",
        feed_forward_without_media=True,
    )
    return SimpleNamespace(
        vision=SimpleNamespace(
            kind="nfnet",
            image_size=32,
            widths=(32, 64),
            depths=(1, 1),
            stem_width=16,
            group_width=16,
            bottleneck_ratio=0.5,
            se_ratio=0.5,
            alpha=0.2,
            feature_multiplier=2.0,
            stochastic_depth=0.0,
            activation="gelu",
            output_dim=128,
        ),
        language=SimpleNamespace(
            kind="decoder",
            vocab_size=64,
            dim=32,
            depth=2,
            heads=2,
            head_dim=16,
            ff_mult=4,
            rope_theta=10000.0,
            norm_eps=1e-6,
        ),
        resampler=SimpleNamespace(
            dim=32,
            depth=2,
            heads=2,
            head_dim=16,
            num_latents=4,
            ff_mult=2,
            activation="squared_relu",
            max_num_frames=3,
            final_norm=False,
            input_dim=128,
        ),
        projector=None,
        media_dim=32,
        cross_attention=SimpleNamespace(**(cross | cross_attention)),
        image_token_id=IMAGE,
        end_of_chunk_token_id=END_OF_CHUNK,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def scramble(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in fp64 with every parameter random, gates and norms included."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.copy_(noise / fan_in**0.5)
    return module


@pytest.fixture
def make_config() -> Callable[..., SimpleNamespace]:
    return tiny_config


@pytest.fixture
def scrambled() -> Callable[..., nn.Module]:
    return scramble


@pytest.fixture
def make_model() -> Callable[..., Flamingo]:
    def make(**cross_attention: object) -> Flamingo:
        return scramble(Flamingo(tiny_config(**cross_attention)))

    return make


@pytest.fixture
def random64() -> Callable[..., torch.Tensor]:
    """Standard normal fp64 tensors from one seeded stream."""
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
