"""Named configurations, parameter counts beside the paper's, and JSON."""

from __future__ import annotations

import json
from dataclasses import fields, replace

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
    with pytest.raises(ValueError, match=r"CrossAttentionConfig\.heads must be positive, got 0"):
        CrossAttentionConfig(every=4, heads=0, head_dim=1)
    with pytest.raises(ValueError, match="unknown 'swish'; known: gelu, squared_relu, relu"):
        ResamplerConfig(dim=8, heads=1, head_dim=8, activation="swish")
    with pytest.raises(ValueError, match=r"image_token_id 264 is outside the vocabulary 0\.\.263"):
        replace(tiny, image_token_id=264)
    for name in ("pad", "eos", "bos", "end_of_chunk"):
        with pytest.raises(ValueError, match=f"image_token_id and {name}_token_id are both 9"):
            replace(tiny, image_token_id=9, **{f"{name}_token_id": 9})
    with pytest.raises(ValueError, match="gives 128 channels, the resampler expects 64"):
        replace(tiny, resampler=replace(tiny.resampler, input_dim=None))


def sections(config: FlamingoConfig) -> list:
    return [config, config.vision, config.language, config.resampler, config.cross_attention]


@pytest.mark.parametrize("name", ["tiny", "open-flamingo-3b"])
@pytest.mark.parametrize("value", [4.0, "4", True])
def test_integer_fields_hold_integers(name: str, value: object) -> None:
    for section in sections(FlamingoConfig.from_name(name)):
        names = [f.name for f in fields(section) if f.type in ("int", "int | None")]
        assert names
        for field in names:
            message = rf"{type(section).__name__}\.{field} must be int.*, got {value!r}"
            with pytest.raises(TypeError, match=message):
                replace(section, **{field: value})


def test_other_fields_hold_what_they_declare() -> None:
    tiny = FlamingoConfig.from_name("tiny")
    with pytest.raises(TypeError, match=r"ResamplerConfig\.final_norm must be bool, got 'no'"):
        replace(tiny.resampler, final_norm="no")
    with pytest.raises(TypeError, match=r"DecoderConfig\.rope_theta must be float, got '1'"):
        replace(tiny.language, rope_theta="1")
    with pytest.raises(TypeError, match=r"widths must be tuple\[int, ...\], got \(32.0, 64\)"):
        replace(tiny.vision, widths=(32.0, 64))
    with pytest.raises(TypeError, match=r"depths must be tuple\[int, ...\], got 1"):
        replace(tiny.vision, depths=1)
    for name in ("max_num_frames", "input_dim"):
        with pytest.raises(ValueError, match=f"ResamplerConfig.{name} must be positive, got 0"):
            replace(tiny.resampler, **{name: 0})


def test_no_padding_token_is_the_default() -> None:
    values = FlamingoConfig.from_name("tiny").to_dict()
    del values["pad_token_id"]
    assert FlamingoConfig.from_dict(values).pad_token_id is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("vision"), "no section 'vision'"),
        (lambda v: v["vision"].update(kind="resnet"), "unknown vision kind 'resnet'; known: nfnet"),
        (lambda v: v["resampler"].update(width=3), r"resampler: unknown fields \['width'\]"),
        (lambda v: v["language"].pop("dim"), r"language: .*missing fields \['dim'\]"),
        (lambda v: v["resampler"].update(heads=4.0), r"resampler\.heads must be int, got 4\.0"),
        (
            lambda v: v["vision"].update(image_size="32"),
            r"vision\.image_size must be int, got '32'",
        ),
        (lambda v: v["language"].update(depth=True), r"language\.depth must be int, got True"),
        (lambda v: v.update(eos_token_id=2.0), r"config\.eos_token_id must be int \| None, got 2"),
        (lambda v: v.update(colour="pink"), r"config: unknown fields \['colour'\]"),
    ],
)
def test_foreign_json(change, message: str) -> None:
    values = FlamingoConfig.from_name("tiny").to_dict()
    change(values)
    with pytest.raises(ValueError, match=message):
        FlamingoConfig.from_dict(values)
