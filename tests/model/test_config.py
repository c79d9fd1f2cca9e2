"""Named configurations, parameter counts beside the paper's, and JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from flamingo_kernels import FlamingoConfig, info
from flamingo_kernels.model.config import CrossAttentionConfig, ResamplerConfig

NAMES = FlamingoConfig.names()


def test_the_names_of_the_design_are_there() -> None:
    assert set(NAMES) == {
        "tiny",
        *(f"flamingo-{size}" for size in ("3b", "9b", "80b")),
        *(f"open-flamingo-{size}" for size in ("3b", "4b", "9b")),
    }


@pytest.mark.parametrize("name", NAMES)
def test_json_round_trip(name: str) -> None:
    config = FlamingoConfig.from_name(name)
    assert FlamingoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# (language model, vision, cross-attention, resampler) in millions: worked out from the layer shapes
# (FLAMINGO.md sections 1b and 6), independently of the modules.
EXPECTED = {
    "flamingo-3b": (1273.7, 435.3, 1157.9, 193.6),
    "flamingo-9b": (6574.1, 435.3, 1443.0, 193.6),
    "flamingo-80b": (64688.5, 435.3, 8355.5, 193.6),
    "open-flamingo-3b": (1311.0, 303.2, 881.0, 63.0),
    "open-flamingo-4b": (2775.1, 303.2, None, 63.0),
    "open-flamingo-9b": (6648.7, 303.2, 1115.8, 63.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_counts(name: str) -> None:
    counts = info.parameter_counts(FlamingoConfig.from_name(name))
    for component, expected in zip(info.COMPONENTS, EXPECTED[name], strict=True):
        if expected is not None:
            assert f"{counts[component] / 1e6:.1f}" == f"{expected:.1f}", component


@pytest.mark.slow
@pytest.mark.parametrize("name", info.PAPER_COUNTS)
def test_every_difference_from_table_5_above_2_percent_is_explained(name: str) -> None:
    lines = list(info.config_lines(name))
    counts = info.parameter_counts(FlamingoConfig.from_name(name))
    for component, paper in zip(info.COMPONENTS, info.PAPER_COUNTS[name], strict=True):
        explained = any(line.startswith(f"{component}: ") for line in lines)
        far = abs(counts[component] / (paper * 1e6) - 1) > info.EXPLAIN_ABOVE
        assert explained == far, component


def test_insertion_points() -> None:
    expected = {
        "flamingo-3b": list(range(24)),
        "flamingo-9b": [0, 4, 8, 12, 16, 20, 24, 28],
        "flamingo-80b": list(range(0, 80, 7)),
        "open-flamingo-9b": [3, 7, 11, 15, 19, 23, 27, 31],
    }
    for name, blocks in expected.items():
        assert list(FlamingoConfig.from_name(name).cross_attention_blocks) == blocks


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown config 'flamingo-4b'; known: tiny, flamingo-3b"):
        FlamingoConfig.from_name("flamingo-4b")


def test_bad_values() -> None:
    tiny = FlamingoConfig.from_name("tiny")
    with pytest.raises(ValueError, match=r"offset must be in 0\.\.every-1 = 0\.\.3, got 4"):
        CrossAttentionConfig(every=4, offset=4, heads=1, head_dim=1)
    with pytest.raises(ValueError, match=r"heads must be at least 1, got 0"):
        CrossAttentionConfig(every=4, heads=0, head_dim=1)
    with pytest.raises(ValueError, match="unknown 'swish'; known: gelu, squared_relu, relu"):
        ResamplerConfig(dim=8, heads=1, head_dim=8, activation="swish")
    with pytest.raises(ValueError, match=r"image_token_id 264 is outside the vocabulary 0\.\.263"):
        replace(tiny, image_token_id=264)
    with pytest.raises(ValueError, match="gives 128 channels, the resampler expects 64"):
        replace(tiny, resampler=replace(tiny.resampler, input_dim=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("vision"), "no section 'vision'"),
        (lambda v: v["vision"].update(kind="resnet"), "unknown vision kind 'resnet'; known: nfnet"),
        (lambda v: v["resampler"].update(width=3), r"resampler: unknown fields \['width'\]"),
        (lambda v: v["language"].pop("dim"), r"language: .*missing fields \['dim'\]"),
        (lambda v: v.update(colour="pink"), r"config: unknown fields \['colour'\]"),
    ],
)
def test_foreign_json(change, message: str) -> None:
    values = FlamingoConfig.from_name("tiny").to_dict()
    change(values)
    with pytest.raises(ValueError, match=message):
        FlamingoConfig.from_dict(values)
