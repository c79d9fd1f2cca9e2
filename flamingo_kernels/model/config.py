"""Model configurations: dataclasses, JSON, and the named models of the papers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flamingo_kernels.fields import check_positive, check_types
from flamingo_kernels.language.byte_tokenizer import ByteTokenizer
from flamingo_kernels.language.config import (
    DecoderConfig,
    HuggingFaceLanguageConfig,
    LanguageConfig,
)
from flamingo_kernels.nn.cross_attention import GATES
from flamingo_kernels.nn.layers import FEED_FORWARDS
from flamingo_kernels.ops.spans import ATTEND_MODES
from flamingo_kernels.vision.config import (
    NFNET_VARIANTS,
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
    """Perceiver Resampler; see :class:`flamingo_kernels.nn.PerceiverResampler`."""

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
        _require_known(self, "activation", FEED_FORWARDS)


@dataclass(frozen=True, kw_only=True)
class CrossAttentionConfig:
    """Gated cross-attention; inserted before LM block i when ``i % every == offset``."""

    every: int
    offset: int = 0
    heads: int
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
        check_positive(self, "every", "heads", "head_dim", "ff_mult")
        check_positive(self, "ff_dim", "rms_norm_eps")
        _require_known(self, "activation", FEED_FORWARDS)
        _require_known(self, "gate", GATES)
        _require_known(self, "attend", ATTEND_MODES)
        if not 0 <= self.offset < self.every:
            raise ValueError(
                f"cross_attention.offset must be in 0..every-1 = 0..{self.every - 1}, "
                f"got {self.offset}"
            )


@dataclass(frozen=True, kw_only=True)
class FlamingoConfig:
    """Everything that fixes the shape of a :class:`FlamingoModel`.

    Without a ``pad_token_id`` padding is told by the attention mask alone, and every label counts.
    """

    name: str
    vision: VisionConfig
    language: LanguageConfig
    resampler: ResamplerConfig
    cross_attention: CrossAttentionConfig
    image_token_id: int
    end_of_chunk_token_id: int
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
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

    @property
    def cross_attention_blocks(self) -> tuple[int, ...]:
        """Indices of the LM blocks that have a cross-attention block before them."""
        placement = self.cross_attention
        return tuple(range(placement.offset, self.language.depth, placement.every))

    @classmethod
    def from_name(cls, name: str) -> FlamingoConfig:
        """A named configuration; ValueError listing the known names otherwise."""
        if name not in _NAMED:
            raise ValueError(f"unknown config {name!r}; known: {', '.join(_NAMED)}")
        return _NAMED[name](name)

    @staticmethod
    def names() -> tuple[str, ...]:
        """The names that :meth:`from_name` knows."""
        return tuple(_NAMED)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable nested dict; inverse of :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FlamingoConfig:
        """Inverse of :meth:`to_dict`; ValueError names unknown, missing or wrong fields."""
        values = dict(values)
        for part, known in (("vision", VISION_CONFIGS), ("language", LANGUAGE_CONFIGS)):
            fields = dict(_section(values, part))
            kind = fields.pop("kind", None)
            if kind not in known:
                raise ValueError(f"unknown {part} kind {kind!r}; known: {', '.join(known)}")
            values[part] = _build(known[kind], fields, part)
        for part, section_class in (
            ("resampler", ResamplerConfig),
            ("cross_attention", CrossAttentionConfig),
        ):
            values[part] = _build(section_class, _section(values, part), part)
        return _build(cls, values, "config")


def _section(values: dict[str, Any], part: str) -> dict[str, Any]:
    section = values.get(part)
    if not isinstance(section, dict):
        raise ValueError(f"config has no section {part!r}")
    return section


def _build(config_class: type, fields: dict[str, Any], part: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(config_class) if f.init}
    unknown = sorted(set(fields) - set(known))
    missing = sorted(
        name
        for name, f in known.items()
        if name not in fields
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    )
    if unknown or missing:
        raise ValueError(f"{part}: unknown fields {unknown}, missing fields {missing}")
    # JSON has no tuples.
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        return config_class(**values)
    except TypeError as error:
        raise ValueError(str(error).replace(f"{config_class.__name__}.", f"{part}.", 1)) from None


def _require_known(config: Any, name: str, known: tuple[str, ...]) -> None:
    if getattr(config, name) not in known:
        raise ValueError(
            f"{type(config).__name__}.{name}: unknown {getattr(config, name)!r}; "
            f"known: {', '.join(known)}"
        )


def _tiny(name: str) -> FlamingoConfig:
    vision = NFNetConfig(
        image_size=32, widths=(32, 64), depths=(1, 1), stem_width=16, group_width=16
    )
    tokens = ByteTokenizer()
    return FlamingoConfig(
        name=name,
        vision=vision,
        language=DecoderConfig(vocab_size=tokens.vocab_size, dim=64, depth=4, heads=4, head_dim=16),
        resampler=ResamplerConfig(
            dim=64, depth=2, heads=4, head_dim=16, num_latents=16, input_dim=vision.output_dim
        ),
        cross_attention=CrossAttentionConfig(every=2, heads=4, head_dim=16),
        image_token_id=tokens.image_token_id,
        end_of_chunk_token_id=tokens.end_of_chunk_token_id,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


def _flamingo(dim: int, depth: int, heads: int, every: int) -> Callable[[str], FlamingoConfig]:
    """The paper's models (tables 4 and 5, B.1.1); the 9B has the 32 layers its counts fit."""
    text_vocab = 32_000

    def build(name: str) -> FlamingoConfig:
        widths, depths = NFNET_VARIANTS["F6"].widths, NFNET_VARIANTS["F6"].depths
        vision = NFNetConfig(image_size=320, widths=widths, depths=depths)
        return FlamingoConfig(
            name=name,
            vision=vision,
            # <image> and <EOC> take the last two rows of a vocabulary rounded up to 64.
            language=DecoderConfig(
                vocab_size=text_vocab + 64, dim=dim, depth=depth, heads=heads, head_dim=128
            ),
            resampler=ResamplerConfig(
                dim=1536, heads=16, head_dim=128, input_dim=vision.output_dim
            ),
            cross_attention=CrossAttentionConfig(every=every, heads=heads, head_dim=128),
            image_token_id=text_vocab,
            end_of_chunk_token_id=text_vocab + 1,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )

    return build


def _open_flamingo(
    language: HuggingFaceLanguageConfig, every: int, image_token_id: int
) -> Callable[[str], FlamingoConfig]:
    """OpenFlamingo v2: CLIP ViT-L/14, 8 x 64 heads, insertion at the end of each group."""
    clip = HuggingFaceVisionConfig(
        model_type="clip_vision_model",
        options={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 224,
            "projection_dim": 768,
        },
        image_size=224,
        output_dim=1024,
        drop_class_token=True,
    )

    def build(name: str) -> FlamingoConfig:
        return FlamingoConfig(
            name=name,
            vision=clip,
            language=language,
            resampler=ResamplerConfig(
                dim=1024,
                heads=8,
                head_dim=64,
                activation="gelu",
                max_num_frames=None,
                final_norm=True,
            ),
            cross_attention=CrossAttentionConfig(
                every=every,
                offset=every - 1,
                heads=8,
                head_dim=64,
                activation="gelu",
                media_norm=False,
            ),
            image_token_id=image_token_id,
            end_of_chunk_token_id=image_token_id - 1,
            eos_token_id=0,
            pad_token_id=image_token_id + 1,
        )

    return build


def _mpt(dim: int, depth: int, heads: int) -> HuggingFaceLanguageConfig:
    vocab_size = 50_280
    return HuggingFaceLanguageConfig(
        model_type="mpt",
        options={
            "d_model": dim,
            "n_layers": depth,
            "n_heads": heads,
            "vocab_size": vocab_size,
            "max_seq_len": 2048,
        },
        dim=dim,
        depth=depth,
        vocab_size=vocab_size,
    )


def _gpt_neox_3b() -> HuggingFaceLanguageConfig:
    """RedPajama-INCITE 3B."""
    dim, depth, vocab_size = 2560, 32, 50_280
    return HuggingFaceLanguageConfig(
        model_type="gpt_neox",
        options={
            "hidden_size": dim,
            "num_hidden_layers": depth,
            "num_attention_heads": 32,
            "intermediate_size": 4 * dim,
            "vocab_size": vocab_size,
            "rotary_pct": 1.0,
            "use_parallel_residual": False,
        },
        dim=dim,
        depth=depth,
        vocab_size=vocab_size,
    )


_NAMED: dict[str, Callable[[str], FlamingoConfig]] = {
    "tiny": _tiny,
    "flamingo-3b": _flamingo(2048, 24, 16, 1),
    "flamingo-9b": _flamingo(4096, 32, 32, 4),
    "flamingo-80b": _flamingo(8192, 80, 64, 7),
    "open-flamingo-3b": _open_flamingo(_mpt(2048, 24, 16), 1, 50_278),
    "open-flamingo-4b": _open_flamingo(_gpt_neox_3b(), 2, 50_278),
    "open-flamingo-9b": _open_flamingo(_mpt(4096, 32, 32), 4, 50_278),
}
