"""Loaders of a configuration: what they refuse before training starts."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from flamingo_kernels import FlamingoConfig, FlamingoModel
from flamingo_kernels.data.images import load_image
from flamingo_kernels.train import TrainConfig
from flamingo_kernels.train.datasets import build_loaders, text_encoding
from flamingo_kernels.vision.config import FeaturesConfig

TINY = FlamingoConfig.from_name("tiny")


def test_a_model_without_pictures_is_refused(values) -> None:
    vision = FeaturesConfig(output_dim=TINY.vision.output_dim)
    model = FlamingoModel(replace(TINY, vision=vision))
    message = r"datasets\.pages holds pictures, but this model takes features"
    with pytest.raises(ValueError, match=message):
        build_loaders(TrainConfig.from_dict(values), model)


@pytest.mark.parametrize(("kind", "least"), [("pairs", 3), ("video", 3), ("interleaved", 2)])
def test_max_tokens_must_leave_text(kind: str, least: int, values) -> None:
    section = values["datasets"][0]
    section["kind"] = kind
    for tokens in range(1, least):
        section["max_tokens"] = tokens
        message = (
            rf"datasets\.pages\.max_tokens is {tokens}, which leaves 0 of {tokens} labels to train "
            rf"on: .*; give at least {least}"
        )
        with pytest.raises(ValueError, match=message):
            build_loaders(TrainConfig.from_dict(values), FlamingoModel(TINY))
    section["max_tokens"] = least
    assert build_loaders(TrainConfig.from_dict(values), FlamingoModel(TINY))


@pytest.mark.parametrize("workers", [0, 2])
def test_without_pillow_training_does_not_start(workers: int, values, monkeypatch) -> None:
    """It would count every picture as broken, or fail in a worker."""
    values["datasets"][0]["workers"] = workers
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    message = r'reading pictures needs Pillow: pip install "flamingo_kernels\[hf\]"'
    with pytest.raises(ImportError, match=message):
        build_loaders(TrainConfig.from_dict(values), FlamingoModel(TINY))
    with pytest.raises(ImportError, match=message):
        load_image("a.png")


def test_another_vocabulary_needs_a_tokenizer(tmp_path) -> None:
    other = replace(TINY, image_token_id=TINY.image_token_id - 9)
    assert TINY.uses_byte_tokenizer and not other.uses_byte_tokenizer
    with pytest.raises(ValueError, match=r"model\.tokenizer is missing"):
        text_encoding(None, other)
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match="no folder"):
        text_encoding(tmp_path / "none", other)
    with pytest.raises(ValueError, match="cannot load a tokenizer from"):
        text_encoding(tmp_path, other)
