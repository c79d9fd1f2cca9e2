"""Language models: tokens to logits, with an optional function before each block."""

from __future__ import annotations

from torch import nn

from flamingo_kernels.language.byte_tokenizer import ByteTokenizer
from flamingo_kernels.language.config import (
    DecoderConfig,
    HuggingFaceLanguageConfig,
    LanguageConfig,
)
from flamingo_kernels.language.decoder import Decoder, DecoderCache
from flamingo_kernels.language.huggingface import HuggingFaceCache, HuggingFaceLanguageModel
from flamingo_kernels.language.media_tokens import MediaTokens, add_media_tokens
from flamingo_kernels.language.new_tokens import NewTokenRows
from flamingo_kernels.language.protocol import (
    BlockHook,
    LanguageModel,
    LanguageModelCache,
    LanguageModelOutput,
)
from flamingo_kernels.language.recompute import checkpoint_blocks
from flamingo_kernels.language.text_encoding import PlainTextEncoder, encode_prompt, prompt_start

__all__ = [
    "BlockHook",
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
    "NewTokenRows",
    "PlainTextEncoder",
    "add_media_tokens",
    "build_language_model",
    "checkpoint_blocks",
    "encode_prompt",
    "prompt_start",
]

_BUILDERS = {"decoder": Decoder, "huggingface": HuggingFaceLanguageModel.from_config}


def build_language_model(config: LanguageConfig) -> nn.Module:
    """Build the language model that ``config`` describes, with random weights.

    Returns
    -------
    nn.Module
        A ``LanguageModel``.

    Raises
    ------
    ValueError
        ``config.kind`` is unknown.
    ImportError
        The kind needs a package that is not installed.
    """
    kind = getattr(config, "kind", None)
    if kind not in _BUILDERS:
        raise ValueError(f"unknown language kind {kind!r}; known: {', '.join(_BUILDERS)}")
    return _BUILDERS[kind](config)
