"""IDEFICS of transformers: ``IdeficsForVisionText2Text`` with a resampler.

Layout: transformers 5.23, ``models/idefics``. Its language model is a Llama. Its vision model is a
CLIP tower that keeps the class token.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from flamingo_kernels.bounds import check_counts, read_json
from flamingo_kernels.convert.files import read_tensors
from flamingo_kernels.convert.table import Rule, convert, load_into
from flamingo_kernels.language import HuggingFaceLanguageConfig
from flamingo_kernels.model import (
    CrossAttentionConfig,
    FlamingoConfig,
    FlamingoModel,
    ResamplerConfig,
)
from flamingo_kernels.model.network import NEW_TOKENS
from flamingo_kernels.model.saving import check_buildable
from flamingo_kernels.vision import HuggingFaceVisionConfig
from flamingo_kernels.vision.pixel_statistics import PixelStatistics, read_preprocessing

WHAT = "an IDEFICS checkpoint"
_log = logging.getLogger(__name__)

_RESAMPLER, _OURS = r"model\.perceiver_resampler\.", "perceiver."
_ATTENTION, _OUR_ATTENTION = _RESAMPLER + r"blocks\.(\d+)\.0\.", rf"{_OURS}layers.\1.0."
_CROSS, _OUR_CROSS = r"model\.gated_cross_attn_layers\.(\d+)\.", r"gated_cross_attn_layers.\1."
_WEIGHT = r"\.(weight|bias)"
TABLE = (
    Rule(_RESAMPLER + r"latents", _OURS + "latents"),
    Rule(_RESAMPLER + rf"layer_norm{_WEIGHT}", _OURS + r"norm.\1"),
    Rule(_ATTENTION + rf"context_layer_norm{_WEIGHT}", _OUR_ATTENTION + r"norm_media.\2"),
    Rule(_ATTENTION + rf"latents_layer_norm{_WEIGHT}", _OUR_ATTENTION + r"norm_latents.\2"),
    Rule(_ATTENTION + rf"([qk])_layer_norm{_WEIGHT}", _OUR_ATTENTION + r"norm_\2.\3"),
    Rule(_ATTENTION + r"q_proj\.weight", _OUR_ATTENTION + "to_q.weight"),
    Rule(_ATTENTION + r"k_proj\.weight", _OUR_ATTENTION + "to_kv.weight", part=0),
    Rule(_ATTENTION + r"v_proj\.weight", _OUR_ATTENTION + "to_kv.weight", part=1),
    Rule(_ATTENTION + r"output_proj\.weight", _OUR_ATTENTION + "to_out.weight"),
    Rule(_RESAMPLER + rf"blocks\.(\d+)\.1\.ln{_WEIGHT}", _OURS + r"layers.\1.1.0.\2"),
    Rule(_RESAMPLER + r"blocks\.(\d+)\.1\.fc\.weight", _OURS + r"layers.\1.1.1.weight"),
    Rule(_RESAMPLER + r"blocks\.(\d+)\.1\.c_proj\.weight", _OURS + r"layers.\1.1.3.weight"),
    Rule(_CROSS + r"input_layernorm\.weight", _OUR_CROSS + "attn.norm.weight"),
    Rule(_CROSS + r"cross_attn\.q_proj\.weight", _OUR_CROSS + "attn.to_q.weight"),
    Rule(_CROSS + r"cross_attn\.k_proj\.weight", _OUR_CROSS + "attn.to_kv.weight", part=0),
    Rule(_CROSS + r"cross_attn\.v_proj\.weight", _OUR_CROSS + "attn.to_kv.weight", part=1),
    Rule(_CROSS + r"cross_attn\.o_proj\.weight", _OUR_CROSS + "attn.to_out.weight"),
    Rule(_CROSS + r"cross_attn\.([qk])_layer_norm\.weight", _OUR_CROSS + r"attn.norm_\2.weight"),
    Rule(_CROSS + r"alpha_cross_attn", _OUR_CROSS + "attn_gate", flatten=True),
    Rule(_CROSS + r"post_attention_layernorm\.weight", _OUR_CROSS + "ff.0.weight"),
    Rule(_CROSS + r"mlp\.gate_proj\.weight", _OUR_CROSS + "ff.1.weight", part=0),
    Rule(_CROSS + r"mlp\.up_proj\.weight", _OUR_CROSS + "ff.1.weight", part=1),
    Rule(_CROSS + r"mlp\.down_proj\.weight", _OUR_CROSS + "ff.3.weight"),
    Rule(_CROSS + r"alpha_dense", _OUR_CROSS + "ff_gate", flatten=True),
    Rule(r".+\.rotary_emb\.inv_freq", reason="computed from the config"),
    Rule(r"model\.vision_model\.embeddings\.position_ids", reason="computed from the config"),
    Rule(r"model\.vision_model\.(.+)", r"vision_encoder.module.\1"),
    Rule(r"model\.((?:layers\.\d+|norm)\..+)", r"language_model.model.model.\1"),
    *(
        Rule(rf"{theirs}{more}\.weight", f"language_model.model.{ours}.weight", part=part)
        for theirs, ours, names in (
            (r"model\.embed_tokens", "model.embed_tokens", ("", r"\.additional_embedding")),
            (r"lm_head", "lm_head", ("", r"\.additional_fc")),
        )
        for part, more in enumerate(names)
    ),
)

# By hidden_act and alpha_type of its configuration.
_FEED_FORWARDS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_python": "geglu",
    "relu": "reglu",
}
_GATES = {"float": "scalar", "vector": "vector"}
# What its code has where its configuration, in older transformers, has nothing.
_POSITIONS = 2048
_ROTATION = {"rope_type": "default", "rope_theta": 10000.0}


def load_idefics(
    checkpoint: str | PathLike | nn.Module,
    *,
    image_token_id: int | None = None,
    end_of_chunk_token_id: int | None = None,
    kernel: str = "auto",
) -> FlamingoModel:
    """Build a model with all weights of an IDEFICS checkpoint.

    Its logits are those of the original, with one exception: between an end-of-text token and the
    next image, the processor of IDEFICS hides the last image from the text. Here a token always
    sees the last image before it.

    Parameters
    ----------
    checkpoint : str, PathLike or nn.Module
        A directory with ``config.json`` and safetensors, or a live ``IdeficsForVisionText2Text``,
        which is copied.
    image_token_id, end_of_chunk_token_id : int, optional
        Default: the last two ids of the additional vocabulary, ``<image>`` last, as in the released
        models. End of chunk is ``<fake_token_around_image>``.
    kernel : str
        As in ``FlamingoModel``.

    Raises
    ------
    FileNotFoundError, ImportError
        Missing files, or transformers is not installed.
    ValueError
        Another architecture, IDEFICS without resampler, settings that change the logits and that
        this package does not have, or keys that do not fit.
    """
    if isinstance(checkpoint, nn.Module):
        where = type(checkpoint).__name__
        values = checkpoint.config.to_dict() if hasattr(checkpoint, "config") else {}
        tensors = checkpoint.state_dict()
    else:
        file = Path(checkpoint) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"no config.json in {checkpoint}")
        where, values, tensors = str(file), _with_defaults(file), None
    if values.get("model_type") != "idefics":
        raise ValueError(f"{where} is not {WHAT}: its model_type is {values.get('model_type')!r}")
    if not values["use_resampler"]:
        raise ValueError("IDEFICS without a resampler (use_resampler=False) is not supported")
    _refuse_settings(values, where)
    statistics = None if tensors is not None else read_preprocessing(Path(checkpoint)).statistics
    try:
        config = _config(values, image_token_id, end_of_chunk_token_id, statistics)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"the config of {where} is not one of IDEFICS: {error!r}") from error
    if tensors is None:
        tensors = read_tensors(checkpoint)
    if values["tie_word_embeddings"]:
        tensors = {k: v for k, v in tensors.items() if not k.startswith("lm_head.")}
    converted = convert(tensors, TABLE, WHAT)
    try:
        if not isinstance(checkpoint, nn.Module):
            check_counts(values, len(tensors), where)
            check_buildable(config, converted.tensors, Path(where), {})
        model = FlamingoModel(config, kernel)
    except (ArithmeticError, LookupError, TypeError) as error:
        raise ValueError(f"cannot build the model that {where} describes: {error!r}") from error
    names = {name for name, _ in model.named_parameters()}
    needed = {name for name in names if not name.startswith(NEW_TOKENS)}
    load_into(model, converted.tensors, needed, WHAT)
    if config.new_token_ids:
        model.new_tokens = model.language_model.new_token_rows(config.new_token_ids)
    _log.info("%s", converted.report)
    return model.eval()


def _refuse_settings(values: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for settings that change the logits and that a model here does not have."""
    for name, known in (("hidden_act", _FEED_FORWARDS), ("alpha_type", _GATES)):
        if values.get(name) not in known:
            raise ValueError(
                f"{where}: {name} {values.get(name)!r} is not supported; known: {', '.join(known)}"
            )
    head_dim, heads = values.get("head_dim"), values["num_attention_heads"]
    if head_dim is not None and head_dim * heads != values["hidden_size"]:
        raise ValueError(
            f"{where}: head_dim {head_dim} is not supported, only hidden_size / "
            f"num_attention_heads = {values['hidden_size']} / {heads}"
        )
    for part, name in (("", "dropout"), ("vision_config", "attention_dropout")):
        if (values[part] if part else values).get(name):
            _log.warning("%s: %s is not applied in training", where, f"{part}.{name}".strip("."))


def _with_defaults(file: Path) -> dict[str, Any]:
    """Return the values of the file over the defaults of the configuration in transformers."""
    values = read_json(file)
    if values.get("model_type") != "idefics":
        return values
    from transformers import IdeficsConfig

    try:
        return IdeficsConfig(**values).to_dict()
    except Exception as error:  # its type depends on the version of transformers
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is not a config of IDEFICS: {reason}") from error


def _config(
    values: dict[str, Any],
    image_token_id: int | None,
    end_of_chunk_token_id: int | None,
    statistics: PixelStatistics | None,
) -> FlamingoConfig:
    vision, resampler = values["vision_config"], values["perceiver_config"]
    dim, heads = values["hidden_size"], values["num_attention_heads"]
    vocab_size = values["vocab_size"] + values["additional_vocab_size"]
    if image_token_id is None:
        image_token_id = vocab_size - 1
    if end_of_chunk_token_id is None:
        end_of_chunk_token_id = vocab_size - 2
    shared = ("hidden_act", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return FlamingoConfig(
        name="idefics",
        vision=HuggingFaceVisionConfig(
            model_type="clip_vision_model",
            options={
                **{k: vision[k] for k in (*shared, "patch_size", "layer_norm_eps", "num_channels")},
                "hidden_size": vision["embed_dim"],
                "image_size": vision["image_size"],
            },
            image_size=vision["image_size"],
            output_dim=vision["embed_dim"],
            drop_class_token=False,
            image_mean=statistics and statistics.mean,
            image_std=statistics and statistics.std,
        ),
        language=HuggingFaceLanguageConfig(
            model_type="llama",
            options={
                **{k: values[k] for k in (*shared, "rms_norm_eps")},
                "max_position_embeddings": values.get("max_position_embeddings", _POSITIONS),
                "hidden_size": dim,
                "num_key_value_heads": heads,
                "vocab_size": vocab_size,
                "rope_parameters": values.get("rope_parameters") or _ROTATION,
                "tie_word_embeddings": values["tie_word_embeddings"],
                **{
                    f"{name}_token_id": values[f"{name}_token_id"] for name in ("bos", "eos", "pad")
                },
            },
            dim=dim,
            depth=values["num_hidden_layers"],
            vocab_size=vocab_size,
        ),
        resampler=ResamplerConfig(
            dim=vision["embed_dim"],
            depth=resampler["resampler_depth"],
            heads=resampler["resampler_n_heads"],
            head_dim=resampler["resampler_head_dim"],
            num_latents=resampler["resampler_n_latents"],
            activation="relu",
            max_num_frames=None,
            qk_norm=resampler["qk_layer_norms_perceiver"],
            final_norm=True,
        ),
        cross_attention=CrossAttentionConfig(
            every=values["cross_layer_interval"],
            heads=heads,
            head_dim=dim // heads,
            ff_dim=values["intermediate_size"],
            activation=_FEED_FORWARDS[values["hidden_act"]],
            media_norm=False,
            rms_norm_eps=values["rms_norm_eps"],
            qk_norm=values["qk_layer_norms"],
            gate=_GATES[values["alpha_type"]],
        ),
        image_token_id=image_token_id,
        end_of_chunk_token_id=end_of_chunk_token_id,
        new_token_ids=tuple(range(values["vocab_size"], vocab_size)),
        **{f"{name}_token_id": values[f"{name}_token_id"] for name in ("bos", "eos", "pad")},
    )
