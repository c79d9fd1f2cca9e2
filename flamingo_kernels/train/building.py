"""The model of a training run, and its tokenizer, from the model section of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from flamingo_kernels.language.media_tokens import add_media_tokens, has_media_tokens
from flamingo_kernels.model import FlamingoConfig, FlamingoModel
from flamingo_kernels.train.config import ModelSection
from flamingo_kernels.transformers_models import read_folder
from flamingo_kernels.vision import read_vision_encoder


class Built(NamedTuple):
    """A model, and the tokenizer of transformers that the section names, or None."""

    model: FlamingoModel
    tokenizer: Any | None


def build(section: ModelSection) -> Built:
    """Build the model of ``section``, with new weights (from torch's generator) where it has none.

    A language model that lacks media tokens gets them, and so does its tokenizer.

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        The section names no whole model, or a folder that cannot be read.
    """
    vision = language = None
    if section.vision_encoder is not None:
        vision = read_vision_encoder(section.vision_encoder)
    if section.language_model is not None:
        language = read_folder("AutoModelForCausalLM", Path(section.language_model))
    config = None if section.config is None else FlamingoConfig.from_name_or_file(section.config)
    if section.pretrained is not None:
        model = FlamingoModel.from_pretrained(
            section.pretrained, section.kernel, vision_encoder=vision, language_model=language
        )
        return Built(model, _tokenizer(section, model.config))
    if (vision is None) != (language is None) or (language is None and config is None):
        raise ValueError("model: give both language_model and vision_encoder, or neither")
    if language is None:
        model = FlamingoModel(config, section.kernel)
        return Built(model, _tokenizer(section, config))
    tokenizer = None
    if config is None and not has_media_tokens(language):
        tokenizer = read_folder("AutoTokenizer", section.tokenizer_folder)
        add_media_tokens(tokenizer, language)
    model = FlamingoModel.from_backbones(vision, language, config, section.kernel)
    return Built(model, tokenizer or _tokenizer(section, model.config))


def _tokenizer(section: ModelSection, config: FlamingoConfig) -> Any | None:
    """Return the tokenizer that the section names; None if there is none, or text is bytes."""
    folder = section.tokenizer_folder
    if config.uses_byte_tokenizer or folder is None:
        return None
    return read_folder("AutoTokenizer", folder)
