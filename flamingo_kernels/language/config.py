"""Configurations of the language models: plain values that serialise as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flamingo_kernels.fields import check_positive, check_types


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Configuration of the Chinchilla-style ``Decoder``.

    Attributes
    ----------
    vocab_size, dim, depth, heads, head_dim : int
        Sizes; ``head_dim`` is even (rotary positions).
    ff_mult : int
        Feed-forward width over ``dim``.
    rope_theta : float
        Base of the rotary frequencies.
    norm_eps : float
        Added to the mean square in RMSNorm.
    """

    kind: str = field(default="decoder", init=False)
    vocab_size: int
    dim: int
    depth: int
    heads: int
    head_dim: int
    ff_mult: int = 4
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "vocab_size", "dim", "depth", "heads", "head_dim", "ff_mult")
        check_positive(self, "rope_theta", "norm_eps")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")


@dataclass(frozen=True, kw_only=True)
class HuggingFaceLanguageConfig:
    """Configuration of a causal language model that transformers builds.

    Attributes
    ----------
    model_type : str
        Name of the architecture in transformers, such as ``"gpt_neox"``.
    options : dict
        Arguments of its configuration class.
    dim, depth, vocab_size : int
        Sizes of the model, stated here so that they are known without building it.
    """

    kind: str = field(default="huggingface", init=False)
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    dim: int
    depth: int
    vocab_size: int

    def __post_init__(self) -> None:
        if not self.model_type:
            raise ValueError(f"model_type must name an architecture, got {self.model_type!r}")
        check_types(self)
        check_positive(self, "dim", "depth", "vocab_size")


LanguageConfig = DecoderConfig | HuggingFaceLanguageConfig
