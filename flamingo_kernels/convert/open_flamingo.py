"""OpenFlamingo v2: read its checkpoints, released or of training runs, and write them.

Layout: open_flamingo 2.0.1, ``src/flamingo.py``, ``src/flamingo_lm.py``, ``train/train_utils.py``.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping
from os import PathLike

import torch
from torch import Tensor, nn

from flamingo_kernels.bounds import bounded_building, check_counts
from flamingo_kernels.convert.files import read_tensors
from flamingo_kernels.convert.table import Conversion, Rule, check_fit, convert, load_into
from flamingo_kernels.language import HuggingFaceLanguageModel
from flamingo_kernels.language.media_tokens import resize_embeddings
from flamingo_kernels.model import (
    CrossAttentionConfig,
    FlamingoConfig,
    FlamingoModel,
    ResamplerConfig,
)
from flamingo_kernels.model.backbones import as_language_model, as_vision_encoder, default_config
from flamingo_kernels.model.network import NEW_TOKENS
from flamingo_kernels.model.restore_on_error import restore_on_error
from flamingo_kernels.model.saving import write

WHAT = "an OpenFlamingo v2 checkpoint"
LANGUAGE = "frozen language model, taken from the one given"
# Output embeddings that transformers has renamed since.
_RENAMED = {"embed_out": "lm_head"}
# Constants of its helpers.py, for every size.
HEADS, HEAD_DIM = 8, 64
# More than any backbone has; the file does not say how many.
_MOST_TENSORS = 10_000

_LAYER = re.compile(r"lang_encoder\.(.+)\.(\d+)\.gated_cross_attn_layer\..+")
_log = logging.getLogger(__name__)


def load_open_flamingo(
    checkpoint: str | PathLike | Mapping[str, Tensor],
    vision_encoder: nn.Module,
    language_model: nn.Module,
    *,
    image_token_id: int | None = None,
    end_of_chunk_token_id: int | None = None,
    kernel: str = "auto",
) -> FlamingoModel:
    """Build a model with the weights of an OpenFlamingo v2 checkpoint.

    Its logits are those of the original.

    Parameters
    ----------
    checkpoint : str, PathLike or mapping
        A released ``checkpoint.pt``, one of a training run, or the ``state_dict()`` of a live
        model; see ``read_tensors``.
    vision_encoder, language_model : nn.Module
        The backbones that it was trained with, as ``FlamingoModel.from_backbones`` takes them. The
        embeddings of the language model are resized to those of the checkpoint and overwritten.
    image_token_id, end_of_chunk_token_id : int, optional
        Default: the ids that ``add_media_tokens`` has stored in the language model's configuration.
    kernel : str
        As in ``FlamingoModel``.

    Raises
    ------
    FileNotFoundError, ValueError
        As ``read_tensors``; keys of another layout; backbones of other sizes. The backbones are
        left unmodified.
    """
    tensors = read_tensors(checkpoint)
    ids = {"image_token_id": image_token_id, "end_of_chunk_token_id": end_of_chunk_token_id}
    with restore_on_error(vision_encoder, language_model):
        model = _load(tensors, vision_encoder, language_model, ids, kernel)
    model.loan.given.update(vision_encoder=vision_encoder, language_model=language_model)
    return model.eval()


def _load(
    tensors: Mapping[str, Tensor],
    vision_encoder: nn.Module,
    language_model: nn.Module,
    ids: Mapping[str, int | None],
    kernel: str,
) -> FlamingoModel:
    language_model = as_language_model(language_model)
    vision_encoder = as_vision_encoder(vision_encoder)
    if not isinstance(language_model, HuggingFaceLanguageModel):
        raise ValueError("OpenFlamingo checkpoints need a Hugging Face language model")
    inner = language_model.model
    for name, value in ids.items():
        if value is not None:
            setattr(inner.config, name, value)
    _check_sizes(tensors, vision_encoder, language_model)
    rows = language_model.vocab_size
    embeddings = [f"lang_encoder.{n}" for n in _names_of_embeddings(_embedding_names(inner))]
    sizes = [_shape(tensors, name, None)[0] for name in embeddings if name in tensors]
    # Published models have spare rows; OpenFlamingo cuts them to the tokenizer's size.
    resize_embeddings(inner, sizes[0] if sizes else rows)
    config = _config(tensors, default_config(vision_encoder, language_model))
    model = FlamingoModel(
        config, kernel, vision_encoder=vision_encoder, language_model=language_model
    )
    converted = convert_open_flamingo(tensors, config, inner)
    trainable = set(model.trainable_parameters())
    needed = {name for name in trainable if not name.startswith(NEW_TOKENS)}
    load_into(model, converted.tensors, needed, f"{WHAT} (every={config.cross_attention.every})")
    model.saved_frozen = converted.tensors.keys() - trainable
    _log.info("%s", converted.report)
    return model


def convert_open_flamingo_file(
    checkpoint: str | PathLike | Mapping[str, Tensor],
    output: str | PathLike,
    config: FlamingoConfig | None = None,
) -> Conversion:
    """Convert an OpenFlamingo file to a checkpoint of this package, without its backbones.

    Parameters
    ----------
    checkpoint : str, PathLike or mapping
        As in ``read_tensors``.
    output : str or PathLike
        Folder for ``model.safetensors``, which appears in one step or not at all.
    config : FlamingoConfig, optional
        Default: the named configuration, such as ``"open-flamingo-3b"``, with the sizes of the
        checkpoint.

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        As ``load_open_flamingo``.
    """
    tensors = read_tensors(checkpoint)
    config = config or _released_config(tensors)
    check_counts(config.to_dict(), _MOST_TENSORS, str(config.name))
    with bounded_building(_MOST_TENSORS, None, str(config.name)), torch.device("meta"):
        model = FlamingoModel(config)
    _check_sizes(tensors, model.vision_encoder, model.language_model)
    converted = convert_open_flamingo(tensors, config, model.language_model.model)
    needed = set(model.trainable_parameters())
    if f"{NEW_TOKENS}embedding" not in converted.tensors:  # the checkpoint has no embeddings
        config = dataclasses.replace(config, new_token_ids=())
        needed = {name for name in needed if not name.startswith(NEW_TOKENS)}
    check_fit(model, converted.tensors, needed, WHAT)
    write(converted.tensors, config, output)
    return converted


def convert_open_flamingo(
    checkpoint: str | PathLike | Mapping[str, Tensor],
    config: FlamingoConfig,
    language_model: nn.Module,
) -> Conversion:
    """Rename the tensors of a checkpoint to the names in ``FlamingoModel``.

    Parameters
    ----------
    checkpoint : str, PathLike or mapping
        As in ``read_tensors``.
    config : FlamingoConfig
        Configuration of the model; states which blocks have a cross-attention layer, and for which
        tokens the rows of the embeddings are trained.
    language_model : nn.Module
        The transformers model, for its names; it may be on the meta device.

    Raises
    ------
    FileNotFoundError, ValueError
        As ``read_tensors``; keys of another layout, or layers at other blocks than in ``config``.
    """
    tensors = read_tensors(checkpoint)
    blocks = config.cross_attention_blocks
    name, found = _layers(tensors)
    if found != list(blocks):
        raise ValueError(
            f"{WHAT} has cross-attention before blocks {found}, the config before {list(blocks)}"
        )
    inside = f"{re.escape(name)}\\."
    embeddings = _embedding_names(language_model)
    others = map(re.escape, language_model.state_dict().keys() - set(embeddings))
    table = (
        Rule(r"perceiver\.(.+)", r"perceiver.\1"),
        Rule(
            rf"lang_encoder\.{inside}(\d+)\.gated_cross_attn_layer\.(.+)",
            lambda m: f"gated_cross_attn_layers.{blocks.index(int(m[1]))}.{m[2]}",
        ),
        Rule(
            r"lang_encoder\.(gated_cross_attn_layers|old_decoder_blocks)\..+",
            reason="second name of another tensor",
        ),
        *(
            Rule(rf"lang_encoder\.({re.escape(theirs)})", f"language_model.model.{ours}")
            for theirs, ours in _names_of_embeddings(embeddings).items()
        ),
        Rule(rf"lang_encoder\.{inside}(\d+)\.decoder_layer\..+", reason=LANGUAGE),
        Rule(rf"lang_encoder\.({'|'.join(others)})", reason=LANGUAGE),
        Rule(r"vision_encoder\..+", reason="frozen vision encoder, taken from the one given"),
    )
    converted = convert(tensors, table, WHAT)
    rows = list(config.new_token_ids)
    for name, own in _embedding_names(language_model).items() if rows else ():
        source = converted.tensors.get(f"language_model.model.{name}")
        if source is not None:
            converted.tensors[f"{NEW_TOKENS}{own}"] = source[rows].clone()
    return converted


def to_open_flamingo(model: FlamingoModel) -> dict[str, Tensor]:
    """Return the model's state dict as OpenFlamingo releases it.

    It holds resampler, cross-attention and embeddings. Write it with ``torch.save``; the
    ``Flamingo`` of ``open_flamingo`` over the same backbones loads it with
    ``load_state_dict(..., strict=False)``. Names in the language model are those of the installed
    transformers.

    Raises
    ------
    ValueError
        OpenFlamingo does not have this architecture; the message names the fields.
    """
    config = model.config
    wanted = _architecture(config.resampler.dim, config.cross_attention.every)
    free = {"resampler": ("depth", "num_latents", "max_num_frames"), "cross_attention": ()}
    differing = [
        f"{part}.{field.name}={getattr(getattr(config, part), field.name)!r} (it has {theirs!r})"
        for part, section in wanted.items()
        for field in dataclasses.fields(section)
        if field.name not in free[part]
        and getattr(getattr(config, part), field.name) != (theirs := getattr(section, field.name))
    ]
    if not isinstance(model.language_model, HuggingFaceLanguageModel):
        differing.append("a language model that is not Hugging Face's")
    if differing:
        raise ValueError(f"OpenFlamingo has no {', '.join(differing)}")
    blocks, name = config.cross_attention_blocks, model.language_model.blocks_name
    state = {f"perceiver.{k}": v for k, v in model.perceiver.state_dict().items()}
    for block, layer in zip(blocks, model.gated_cross_attn_layers, strict=True):
        prefix = f"lang_encoder.{name}.{block}.gated_cross_attn_layer"
        state |= {f"{prefix}.{k}": v for k, v in layer.state_dict().items()}
    inner = model.language_model.model
    tensors = inner.state_dict()
    names = _embedding_names(inner)
    state |= {f"lang_encoder.{k}": tensors[k] for k in names}
    state = {k: v.detach().clone() for k, v in state.items()}
    rows = model.new_tokens
    for key, own in names.items() if rows is not None else ():
        embeddings = state[f"lang_encoder.{key}"]
        embeddings[rows.token_ids] = getattr(rows, own).detach().to(embeddings.dtype)
    return state


def _architecture(
    dim: int, every: int, **resampler: int | None
) -> dict[str, ResamplerConfig | CrossAttentionConfig]:
    return {
        "resampler": ResamplerConfig(
            dim=dim,
            heads=HEADS,
            head_dim=HEAD_DIM,
            activation="gelu",
            final_norm=True,
            **{"max_num_frames": None, **resampler},
        ),
        "cross_attention": CrossAttentionConfig(
            every=every,
            offset=every - 1,
            heads=HEADS,
            head_dim=HEAD_DIM,
            activation="gelu",
            media_norm=False,
        ),
    }


def _config(tensors: Mapping[str, Tensor], base: FlamingoConfig) -> FlamingoConfig:
    """Return ``base`` with the architecture that keys and shapes of the checkpoint show."""
    _, blocks = _layers(tensors)
    num_latents, dim = _shape(tensors, "perceiver.latents", 2)
    frames = "perceiver.frame_embs"
    depth = len({k.split(".")[2] for k in tensors if k.startswith("perceiver.layers.")})
    parts = _architecture(
        dim,
        blocks[0] + 1,
        depth=depth,
        num_latents=num_latents,
        max_num_frames=_shape(tensors, frames, 2)[0] if frames in tensors else None,
    )
    return dataclasses.replace(base, name="open-flamingo", **parts)


def _released_config(tensors: Mapping[str, Tensor]) -> FlamingoConfig:
    """Find the named configuration of a released model by its blocks and widths."""
    name, blocks = _layers(tensors)
    gate = f"lang_encoder.{name}.{blocks[0]}.gated_cross_attn_layer.attn.norm.weight"
    width = _shape(tensors, gate, 1)[0] if gate in tensors else 0
    names = [known for known in FlamingoConfig.names() if known.startswith("open-flamingo")]
    for config in map(FlamingoConfig.from_name, names):
        if config.language.dim == width and list(config.cross_attention_blocks) == blocks:
            return config
    raise ValueError(
        f"the checkpoint (width {width}, cross-attention before blocks {blocks}) is none of "
        f"{', '.join(names)}: a config is needed"
    )


def _check_sizes(
    tensors: Mapping[str, Tensor], vision_encoder: nn.Module, language_model: nn.Module
) -> None:
    name, blocks = _layers(tensors)
    if "perceiver.latents" not in tensors:
        raise ValueError(f"not {WHAT}: it has no perceiver.latents")
    prefix = f"lang_encoder.{name}.{blocks[0]}.gated_cross_attn_layer."
    norm = f"{prefix}attn.norm.weight"
    faults = []
    if norm in tensors and (width := _shape(tensors, norm, 1)[0]) != language_model.dim:
        faults.append(f"the language model is {language_model.dim} wide, not {width}")
    if blocks[-1] >= language_model.num_blocks:
        faults.append(
            f"the language model has {language_model.num_blocks} blocks, not more than {blocks[-1]}"
        )
    if name != language_model.blocks_name:
        faults.append(f"its blocks are {language_model.blocks_name!r}, not {name!r}")
    vision = _shape(tensors, "perceiver.latents", 2)[1]
    if vision_encoder.output_dim != vision:
        faults.append(
            f"the vision encoder gives {vision_encoder.output_dim} channels, not {vision}"
        )
    if faults:
        raise ValueError("the checkpoint was trained with other backbones: " + "; ".join(faults))


def _shape(tensors: Mapping[str, Tensor], name: str, rank: int | None) -> tuple[int, ...]:
    """Return the shape of a tensor that must have ``rank`` dimensions; None: at least one."""
    shape = tuple(tensors[name].shape)
    if not shape or len(shape) != (rank or len(shape)):
        raise ValueError(
            f"{WHAT}: {name} has shape {shape}, {rank or 'some'} dimension(s) expected"
        )
    return shape


def _layers(tensors: Mapping[str, Tensor]) -> tuple[str, list[int]]:
    """Return the name of the list of blocks, and the blocks with a cross-attention layer."""
    matches = [m for m in map(_LAYER.fullmatch, tensors) if m]
    names = {m[1] for m in matches}
    if len(names) != 1:
        raise ValueError(
            f"not {WHAT}: "
            + (f"blocks in several places, {sorted(names)}" if names else "no cross-attention keys")
        )
    return names.pop(), sorted({int(m[2]) for m in matches})


def _names_of_embeddings(embeddings: Iterable[str]) -> dict[str, str]:
    """Map names of embeddings in a checkpoint, old or new, to their names now."""
    old = {}
    for before, after in _RENAMED.items():
        for name in embeddings:
            if name.startswith(f"{after}."):
                old[name.replace(after, before, 1)] = name
    return old | {name: name for name in embeddings}


def _embedding_names(inner: nn.Module) -> dict[str, str]:
    """Map names of the embeddings in the state dict of a language model to ``NewTokenRows``'s."""
    layers = {"embedding": inner.get_input_embeddings(), "head": inner.get_output_embeddings()}
    if layers["head"] is None or layers["head"].weight is layers["embedding"].weight:
        del layers["head"]
    names = {module: name for name, module in inner.named_modules()}
    return {
        f"{names[layer]}.{key}": own if key == "weight" else f"{own}_{key}"
        for own, layer in layers.items()
        for key in layer.state_dict()
    }
