"""Backbones that exist already, wrapped as parts of a model, and a configuration for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flamingo_kernels.fields import is_integer
from flamingo_kernels.language import HuggingFaceLanguageModel, LanguageModel
from flamingo_kernels.language.media_tokens import NEW_TOKEN_IDS
from flamingo_kernels.model.config import CrossAttentionConfig, FlamingoConfig, ResamplerConfig
from flamingo_kernels.vision import (
    HuggingFaceVisionEncoder,
    PrecomputedFeatures,
    wrap_vision_encoder,
)

# Width of all heads in the paper (table 4, appendix A.1.4).
HEAD_DIM = 128


def as_vision_encoder(module: nn.Module | int, config: FlamingoConfig | None = None) -> nn.Module:
    """Return a ``VisionEncoder`` over a module, or the stand-in for features of that many channels.

    Sizes that the module's own configuration lacks are taken from ``config``, and so are the
    settings that ``config`` records of this kind of encoder.
    """
    if is_integer(module):
        return PrecomputedFeatures(module)
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"vision_encoder must be a module, or an int for features, got {type(module).__name__}"
        )
    if config is None:
        return wrap_vision_encoder(module)
    own = getattr(module, "config", None)
    own = getattr(own, "vision_config", own)
    attributes = {"output_dim": "hidden_size", "image_size": "image_size"}
    missing = [
        name for name, attribute in attributes.items() if getattr(own, attribute, None) is None
    ]
    sizes = {name: getattr(config.vision, name, None) for name in missing}
    encoder = wrap_vision_encoder(module, **sizes)
    if isinstance(encoder, HuggingFaceVisionEncoder):
        return encoder.with_settings_of(config.vision)
    return encoder


def as_language_model(module: nn.Module) -> nn.Module:
    """Return a ``LanguageModel`` over a transformers causal language model, or one as it is."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"language_model must be a module, got {type(module).__name__}")
    return module if isinstance(module, LanguageModel) else HuggingFaceLanguageModel(module)


def execution_device(module: nn.Module) -> torch.device:
    """Return the device on which ``module`` computes first.

    It is that of its first parameter. If accelerate has offloaded that one, it lies on the meta
    device, and is brought to the execution device for the time of a call.
    """
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            hook = getattr(part, "_hf_hook", None)
            for align in (hook, *getattr(hook, "hooks", ())):  # one hook, or a sequence
                target = getattr(align, "execution_device", None)
                if parameter.is_meta and target is not None:
                    return torch.device(target)
            return parameter.device
    return torch.get_default_device()


def default_config(vision_encoder: nn.Module, language_model: nn.Module) -> FlamingoConfig:
    """Return the paper's architecture over wrapped parts.

    There is one cross-attention layer before every block. Token ids are those in the language
    model's own configuration.

    Raises
    ------
    ValueError
        That configuration has no ``image_token_id`` or no ``end_of_chunk_token_id``.
    """
    inner = getattr(getattr(language_model, "model", None), "config", None)
    ids: dict[str, Any] = {}
    for name in ("image", "end_of_chunk", "bos", "eos", "pad"):
        value = getattr(inner, f"{name}_token_id", None)
        ids[f"{name}_token_id"] = value[0] if isinstance(value, list) else value
    missing = [name for name in ("image_token_id", "end_of_chunk_token_id") if ids[name] is None]
    if missing:
        raise ValueError(
            f"the language model's config has no {' and no '.join(missing)}: call "
            "flamingo_kernels.language.add_media_tokens(tokenizer, language_model) first, or pass "
            "config="
        )
    for name in ("bos", "eos", "pad"):
        value = ids[f"{name}_token_id"]
        if value is not None and not 0 <= value < language_model.vocab_size:
            ids[f"{name}_token_id"] = None  # ids of a tokenizer for another model
    dim = vision_encoder.output_dim
    return FlamingoConfig(
        name=f"{type(getattr(language_model, 'model', language_model)).__name__}-flamingo",
        vision=vision_encoder.config,
        language=language_model.config,
        resampler=ResamplerConfig(dim=dim, **_heads(dim)),
        cross_attention=CrossAttentionConfig(every=1, **_heads(language_model.dim)),
        new_token_ids=_new_token_ids(inner, ids, language_model),
        **ids,
    )


def _new_token_ids(
    inner: Any, ids: Mapping[str, int | None], language_model: nn.Module
) -> tuple[int, ...]:
    """Return the tokens whose rows are trained.

    ``add_media_tokens`` lists them. Where the ids were set by hand, they are the media tokens that
    are no other token of the model.
    """
    listed = getattr(inner, NEW_TOKEN_IDS, None)
    if listed is not None:
        return tuple(listed)
    if not hasattr(language_model, "new_token_rows"):
        return ()
    others = {
        ids["bos_token_id"],
        ids["pad_token_id"],
        *getattr(language_model, "eos_token_ids", ()),
    }
    media = {ids["end_of_chunk_token_id"], ids["image_token_id"]}
    return tuple(sorted(media - others))


def _heads(dim: int) -> dict[str, int]:
    return {"heads": max(1, dim // HEAD_DIM), "head_dim": min(dim, HEAD_DIM)}
