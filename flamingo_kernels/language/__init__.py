"""Language models: tokens -> logits, with something run before each block."""

from __future__ import annotations

from torch import nn

from flamingo_kernels.language.byte_tokenizer import ByteTokenizer
from flamingo_kernels.language.checkpointing import checkpoint_blocks
from flamingo_kernels.language.config import (
    DecoderConfig,
    HuggingFaceLanguageConfig,
    LanguageConfig,
)
from flamingo_kernels.language.decoder import Decoder, DecoderCache
from flamingo_kernels.language.huggingface import HuggingFaceCache, HuggingFaceLanguageModel
from flamingo_kernels.language.media_tokens import MediaTokens, add_media_tokens
from flamingo_kernels.language.protocol import (
    BeforeBlock,
    LanguageModel,
    LanguageModelCache,
    LanguageModelOutput,
)

__all__ = [
    "BeforeBlock",
    "ByteTokenizer",
    "Decoder",
    "DecoderCache",
    "DecoderConfig",
    "HuggingFaceCache",
    "HuggingFaceLanguageConfig",
    "HuggingFaceLanguageModel",
    "LanguageConfig",
    "LanguageModel",
    "LanguageModelCache",
    "LanguageModelOutput",
    "MediaTokens",
    "add_media_tokens",
    "build_language_model",
    "checkpoint_blocks",
]

_BUILDERS = {"decoder": Decoder, "huggingface": HuggingFaceLanguageModel.from_config}


def build_language_model(config: LanguageConfig) -> nn.Module:
    """The language model that `config` describes, with fresh weights; a `LanguageModel`.

    Raises
    ------
    ValueError
        If `config.kind` is unknown.
    ImportError
        If the kind needs a package that is not installed.
    """
    kind = getattr(config, "kind", None)
    if kind not in _BUILDERS:
        raise ValueError(f"unknown language kind {kind!r}; known: {', '.join(_BUILDERS)}")
    return _BUILDERS[kind](config)
