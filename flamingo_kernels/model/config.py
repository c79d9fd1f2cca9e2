"""Configuration of a Flamingo model: the dataclasses, and how they are read from JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flamingo_kernels.fields import (
    build,
    check_known,
    check_positive,
    check_types,
    unknown_and_missing,
)
from flamingo_kernels.language.byte_tokenizer import ByteTokenizer
from flamingo_kernels.language.config import (
    DecoderConfig,
    HuggingFaceLanguageConfig,
    LanguageConfig,
)
from flamingo_kernels.model.named_configs import NAMED_CONFIGS
from flamingo_kernels.nn.cross_attention import GATES
from flamingo_kernels.nn.layers import FEED_FORWARDS
from flamingo_kernels.ops.spans import ATTEND_MODES
from flamingo_kernels.vision.config import (
    FeaturesConfig,
    HuggingFaceVisionConfig,
    ModuleVisionConfig,
    NFNetConfig,
    VisionConfig,
)

VISION_CONFIGS = {
    c.kind: c for c in (NFNetConfig, HuggingFaceVisionConfig, ModuleVisionConfig, FeaturesConfig)
}
LANGUAGE_CONFIGS = {c.kind: c for c in (DecoderConfig, HuggingFaceLanguageConfig)}


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig:
    """A Perceiver Resampler; see :class:`flamingo_kernels.nn.PerceiverResampler`."""

    dim: int
    depth: int = 6
    heads: int
    head_dim: int
    num_latents: int = 64
    ff_mult: int = 4
    activation: str = "squared_relu"
    max_num_frames: int | None = 8
    final_norm: bool = False
    qk_norm: bool = False
    input_dim: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "dim", "depth", "heads", "head_dim", "num_latents", "ff_mult")
        check_positive(self, "max_num_frames", "input_dim")
        check_known(self, "activation", FEED_FORWARDS)


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """A linear projection of the vision features to ``dim``, in place of a resampler.

    Each feature of each frame of an image is then one key (Llama-3.2-Vision, whose frames are
    tiles). Images may have different numbers of frames, and so of keys.
    """

    dim: int
    bias: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "dim")


@dataclass(frozen=True, kw_only=True)
class CrossAttentionConfig:
    """Gated cross-attention, inserted before language model block i if ``i % every == offset``.

    ``kv_heads`` key/value heads are shared by groups of the query heads (default: one for each).
    See :class:`flamingo_kernels.nn.GatedCrossAttentionBlock` for the other options.
    """

    every: int
    offset: int = 0
    heads: int
    kv_heads: int | None = None
    head_dim: int
    ff_mult: int = 4
    activation: str = "squared_relu"
    ff_dim: int | None = None
    media_norm: bool = True
    rms_norm_eps: float | None = None
    qk_norm: bool = False
    gate: str = "scalar"
    attend: str = "last"
    feed_forward_without_media: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "every", "heads", "kv_heads", "head_dim", "ff_mult")
        check_positive(self, "ff_dim", "rms_norm_eps")
        if self.heads % (self.kv_heads or 1):
            raise ValueError(
                f"cross_attention.heads must be a multiple of kv_heads, got {self.heads} and "
                f"{self.kv_heads}"
            )
        check_known(self, "activation", FEED_FORWARDS)
        check_known(self, "gate", GATES)
        check_known(self, "attend", ATTEND_MODES)
        if not 0 <= self.offset < self.every:
            raise ValueError(
                f"cross_attention.offset must be in 0..every-1 = 0..{self.every - 1}, "
                f"got {self.offset}"
            )


@dataclass(frozen=True, kw_only=True)
class FlamingoConfig:
    """Everything that determines the architecture of a :class:`FlamingoModel`.

    Features become media by a ``resampler`` or by a ``projector``: a configuration has one of them.
    ``pad_token_id`` marks padding where no attention mask does; see ``FlamingoModel.forward``. The
    rows of ``new_token_ids`` in the embeddings of the frozen language model are trained; see
    :class:`flamingo_kernels.language.NewTokenRows`.
    """

    name: str
    vision: VisionConfig
    language: LanguageConfig
    resampler: ResamplerConfig | None = None
    projector: ProjectorConfig | None = None
    cross_attention: CrossAttentionConfig
    image_token_id: int
    end_of_chunk_token_id: int
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    new_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        if (self.resampler is None) == (self.projector is None):
            raise ValueError("a config needs exactly one of the sections resampler and projector")
        if self.resampler is not None:
            expected = self.resampler.input_dim or self.resampler.dim
            if self.vision.output_dim != expected:
                raise ValueError(
                    f"the vision encoder gives {self.vision.output_dim} channels, the resampler "
                    f"expects {expected}"
                )
        for name in ("image", "end_of_chunk", "bos", "eos", "pad"):
            value = getattr(self, f"{name}_token_id")
            if value is not None and not 0 <= value < self.language.vocab_size:
                raise ValueError(
                    f"{name}_token_id {value} is outside the vocabulary "
                    f"0..{self.language.vocab_size - 1}"
                )
            if name != "image" and value == self.image_token_id:
                raise ValueError(
                    f"image_token_id and {name}_token_id are both {value}; every {name} token "
                    "would count as an image"
                )
        new, vocab_size = self.new_token_ids, self.language.vocab_size
        if len(set(new)) < len(new) or not all(0 <= i < vocab_size for i in new):
            raise ValueError(
                f"new_token_ids must be distinct ids of the vocabulary 0..{vocab_size - 1}, got "
                f"{list(new)}"
            )

    @property
    def media_dim(self) -> int:
        """Width of the media that keys and values are projected from."""
        connector = self.resampler or self.projector
        assert connector is not None
        return connector.dim

    @property
    def cross_attention_blocks(self) -> tuple[int, ...]:
        """Indices of the language model blocks that have a cross-attention block before them."""
        placement = self.cross_attention
        return tuple(range(placement.offset, self.language.depth, placement.every))

    @property
    def uses_byte_tokenizer(self) -> bool:
        """Whether the model's text is bytes, as :class:`ByteTokenizer` encodes them."""
        is_own = self.language.kind == "decoder"
        return is_own and self.image_token_id == ByteTokenizer().image_token_id

    @property
    def use_cache(self) -> bool:
        """False: a forward makes a cache where it is asked for one.

        transformers' Trainer sets it to False, which is allowed.
        """
        return False

    def get_text_config(self) -> SimpleNamespace:
        """Return a copy of the fields, which hold the ids of the special tokens.

        transformers' Trainer asks for it, and writes the ids of its tokenizer to it where they
        differ. The model keeps its own.
        """
        return SimpleNamespace(**vars(self))

    @classmethod
    def from_name(cls, name: str) -> FlamingoConfig:
        """Return a named configuration; ValueError lists the known names for another one."""
        if name not in NAMED_CONFIGS:
            raise ValueError(f"unknown config {name!r}; known: {', '.join(NAMED_CONFIGS)}")
        return cls.from_dict({"name": name, **NAMED_CONFIGS[name]})

    @classmethod
    def from_name_or_file(cls, name: str) -> FlamingoConfig:
        """Return the configuration in a file if ``name`` ends in ``.json``, else the named one.

        Raises
        ------
        FileNotFoundError
            No such file.
        ValueError
            The file holds no configuration, or the name is unknown.
        """
        if not name.endswith(".json"):
            return cls.from_name(name)
        try:
            return cls.from_dict(json.loads(Path(name).read_bytes()))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"the config in {name} is not one of flamingo_kernels: {error}"
            ) from error

    @staticmethod
    def names() -> tuple[str, ...]:
        """Return the names that :meth:`from_name` knows."""
        return tuple(NAMED_CONFIGS)

    def to_dict(self) -> dict[str, Any]:
        """Return a nested dict of JSON types (and tuples); inverse of :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FlamingoConfig:
        """Return the configuration of :meth:`to_dict`'s values.

        Raises
        ------
        ValueError
            A field is unknown, missing or wrong; the message names it.
        """
        values = dict(values)
        for part, known in (("vision", VISION_CONFIGS), ("language", LANGUAGE_CONFIGS)):
            fields = dict(_section(values, part))
            kind = fields.pop("kind", None)
            if kind not in known:
                raise ValueError(f"unknown {part} kind {kind!r}; known: {', '.join(known)}")
            values[part] = _build(known[kind], fields, part)
        for part, section_class in (
            ("resampler", ResamplerConfig),
            ("projector", ProjectorConfig),
            ("cross_attention", CrossAttentionConfig),
        ):
            if part == "cross_attention" or values.get(part) is not None:
                values[part] = _build(section_class, _section(values, part), part)
        return _build(cls, values, "config")


def _set_attribute(config: FlamingoConfig, name: str, value: object) -> None:
    if name == "use_cache" and value is False:
        return
    given = f"cannot assign {value!r} to {name!r} of a FlamingoConfig"
    if name == "use_cache":
        raise dataclasses.FrozenInstanceError(f"{given}; give use_cache to forward")
    raise dataclasses.FrozenInstanceError(f"{given}; dataclasses.replace makes another one")


FlamingoConfig.__setattr__ = _set_attribute  # type: ignore[method-assign, assignment]


def _section(values: dict[str, Any], part: str) -> dict[str, Any]:
    section = values.get(part)
    if not isinstance(section, dict):
        raise ValueError(f"config has no section {part!r}")
    return section


def _build(config_class: type, fields: dict[str, Any], part: str) -> Any:
    unknown, missing = map(sorted, unknown_and_missing(config_class, fields))
    if unknown or missing:
        raise ValueError(f"{part}: unknown fields {unknown}, missing fields {missing}")
    return build(config_class, fields, f"{part}.")
