"""The model of a training run, and its tokenizer, from the model section of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from flamingo_kernels.language.media_tokens import add_media_tokens, has_media_tokens
from flamingo_kernels.model import FlamingoConfig, FlamingoModel
from flamingo_kernels.train.config import ModelSection
from flamingo_kernels.transformers_models import read_folder


class Built(NamedTuple):
    """A model, and the tokenizer of transformers that belongs to it (None: its text is bytes)."""

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
    vision = _read("AutoModel", section.vision_encoder)
    language = _read("AutoModelForCausalLM", section.language_model)
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


def _read(auto_class: str, folder: str | None) -> nn.Module | None:
    return None if folder is None else read_folder(auto_class, Path(folder))


def _tokenizer(section: ModelSection, config: FlamingoConfig) -> Any | None:
    """Return the tokenizer that the section names, checked against ``config``."""
    if config.uses_byte_tokenizer:
        return None
    if section.tokenizer_folder is None:
        raise ValueError("model.tokenizer is missing: this language model needs one")
    return read_folder("AutoTokenizer", section.tokenizer_folder)
