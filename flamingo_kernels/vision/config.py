"""Configurations of the vision encoders: plain values that serialise as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flamingo_kernels.fields import check_positive, check_types
from flamingo_kernels.vision.pixel_statistics import checked_channels

# 1 / std(activation(z)) for z ~ N(0, 1), as the released NFNet weights were trained with.
ACTIVATION_GAINS = {
    "gelu": 1.7015043497085571,
    "relu": 1.7139588594436646,
    "silu": 1.7881293296813965,
}


class NFNetVariant(NamedTuple):
    """Sizes in which the NFNet-F models differ (Brock et al. 2021, table 1).

    Attributes
    ----------
    depths : tuple of int
        Blocks in each stage.
    train_size, test_size : int
        Side, in pixels, of the images of training and evaluation.
    widths : tuple of int
        Channels of each stage.
    """

    depths: tuple[int, ...]
    train_size: int
    test_size: int
    widths: tuple[int, ...] = (256, 512, 1536, 1536)


NFNET_VARIANTS = {
    "F0": NFNetVariant((1, 2, 6, 3), 192, 256),
    "F1": NFNetVariant((2, 4, 12, 6), 224, 320),
    "F2": NFNetVariant((3, 6, 18, 9), 256, 352),
    "F3": NFNetVariant((4, 8, 24, 12), 320, 416),
    "F4": NFNetVariant((5, 10, 30, 15), 384, 512),
    "F5": NFNetVariant((6, 12, 36, 18), 416, 544),
    "F6": NFNetVariant((7, 14, 42, 21), 448, 576),
}


@dataclass(frozen=True, kw_only=True)
class NFNetConfig:
    """A normaliser-free ResNet (Brock et al. 2021); the defaults are those of the F family.

    Attributes
    ----------
    image_size : int
        Side, in pixels, of the images that the encoder expects; it accepts any size.
    widths, depths : tuple of int
        Channels and blocks of each stage, one to four stages.
    stem_width : int
        Output channels of the four-convolution stem, a multiple of 8.
    group_width : int
        Channels of a group in the 3x3 convolutions.
    bottleneck_ratio : float
        Inner channels of a block over its width.
    se_ratio : float
        Squeeze-excite channels over the width.
    alpha : float
        Scale of each residual branch.
    feature_multiplier : float
        Output channels over the last width.
    stochastic_depth : float
        Drop rate of the last block, in [0, 1). The rates of earlier blocks grow linearly up to it.
    activation : {"gelu", "relu", "silu"}
        Activation function.
    """

    kind: str = field(default="nfnet", init=False)
    image_size: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    stem_width: int = 128
    group_width: int = 128
    bottleneck_ratio: float = 0.5
    se_ratio: float = 0.5
    alpha: float = 0.2
    feature_multiplier: float = 2.0
    stochastic_depth: float = 0.0
    activation: str = "gelu"

    def __post_init__(self) -> None:
        # JSON has no tuples: a list read back must give an equal config.
        for name in ("widths", "depths"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_types(self)
        if not 1 <= len(self.widths) == len(self.depths) <= 4:
            raise ValueError(
                "widths and depths must both name one to four stages, "
                f"got widths={self.widths} and depths={self.depths}"
            )
        check_positive(self, "widths", "depths", "image_size", "stem_width", "group_width")
        check_positive(self, "bottleneck_ratio", "se_ratio", "alpha", "feature_multiplier")
        if self.stem_width % 8:
            raise ValueError(f"stem_width must be a multiple of 8, got {self.stem_width}")
        for width in self.widths:
            inner = int(width * self.bottleneck_ratio)
            if inner == 0 or inner % self.group_width:
                raise ValueError(
                    f"width {width} * bottleneck_ratio {self.bottleneck_ratio} = {inner} inner "
                    f"channels must be a positive multiple of group_width {self.group_width}"
                )
        if not 0.0 <= self.stochastic_depth < 1.0:
            raise ValueError(f"stochastic_depth must be in [0, 1), got {self.stochastic_depth}")
        if self.activation not in ACTIVATION_GAINS:
            raise ValueError(
                f"unknown activation {self.activation!r}; known: {', '.join(ACTIVATION_GAINS)}"
            )

    @property
    def output_dim(self) -> int:
        """Channels of the features."""
        return int(self.widths[-1] * self.feature_multiplier)

    @classmethod
    def from_variant(cls, variant: str, **changes: Any) -> NFNetConfig:
        """Return the configuration of NFNet-F0 to F6, by default at its training resolution.

        Parameters
        ----------
        variant : str
            ``"F0"`` to ``"F6"``.
        changes
            Attributes to replace, such as ``image_size=320``.

        Raises
        ------
        ValueError
            The variant is unknown.
        """
        if variant not in NFNET_VARIANTS:
            raise ValueError(
                f"unknown NFNet variant {variant!r}; known: {', '.join(NFNET_VARIANTS)}"
            )
        row = NFNET_VARIANTS[variant]
        values = {"image_size": row.train_size, "widths": row.widths, "depths": row.depths}
        return cls(**{**values, **changes})


@dataclass(frozen=True, kw_only=True)
class HuggingFaceVisionConfig:
    """Configuration of a vision model that transformers builds.

    Attributes
    ----------
    model_type : str
        Name of the architecture in transformers, such as ``"clip_vision_model"``.
    options : dict
        Arguments of its configuration class.
    image_size, output_dim : int
        Sizes of the model, stated here so that they are known without building it.
    drop_class_token : bool or None
        Leave out the first token of the output (CLIP's class token). None: decide it from each
        output, see :class:`HuggingFaceVisionEncoder`.
    image_mean, image_std : tuple of float, or None
        How pixels in [0, 1] are normalised. None: as is known of the architecture.
    """

    kind: str = field(default="huggingface", init=False)
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    image_size: int
    output_dim: int
    drop_class_token: bool | None
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.model_type:
            raise ValueError(f"model_type must name an architecture, got {self.model_type!r}")
        _settle_statistics(self)
        check_types(self)
        check_positive(self, "image_size", "output_dim")


@dataclass(frozen=True, kw_only=True)
class ModuleVisionConfig:
    """Sizes of an encoder that this package cannot build; the user passes the encoder.

    Attributes
    ----------
    output_dim : int
        Channels of the features.
    image_size : int
        Side, in pixels, of the images that it expects.
    drop_class_token, image_mean, image_std
        As in :class:`HuggingFaceVisionConfig`.
    """

    kind: str = field(default="module", init=False)
    output_dim: int
    image_size: int
    drop_class_token: bool | None = None
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _settle_statistics(self)
        check_types(self)
        check_positive(self, "output_dim", "image_size")


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """No encoder: the model is given features [B, I, F, S, output_dim] in place of pixels.

    Attributes
    ----------
    output_dim : int
        Channels of the features.
    """

    kind: str = field(default="features", init=False)
    output_dim: int

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "output_dim")


VisionConfig = NFNetConfig | HuggingFaceVisionConfig | ModuleVisionConfig | FeaturesConfig


def _settle_statistics(config: HuggingFaceVisionConfig | ModuleVisionConfig) -> None:
    """Check the statistics; as tuples, since JSON has lists."""
    if (config.image_mean is None) != (config.image_std is None):
        raise ValueError(
            "image_mean and image_std must both be given, or neither: got "
            f"{config.image_mean} and {config.image_std}"
        )
    for name, positive in (("image_mean", False), ("image_std", True)):
        value = getattr(config, name)
        if value is not None:
            object.__setattr__(config, name, checked_channels(name, value, positive=positive))
