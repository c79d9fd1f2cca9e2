"""Hugging Face vision models, and modules with the same kind of output, as vision encoders."""

from __future__ import annotations

import dataclasses
import math
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flamingo_kernels.fields import is_integer
from flamingo_kernels.transformers_models import (
    build_model,
    check_declared_sizes,
    plain_options,
    read_folder,
)
from flamingo_kernels.vision.config import (
    HuggingFaceVisionConfig,
    ModuleVisionConfig,
    VisionConfig,
)
from flamingo_kernels.vision.pixel_statistics import (
    PixelStatistics,
    checked_channels,
    read_preprocessing,
    statistics_of,
)
from flamingo_kernels.vision.protocol import Channels, VisionEncoder, check_images

# Last parts of the names that class tokens have.
_CLASS_TOKENS = {"class_embedding", "class_token", "cls_token"}


class HuggingFaceVisionEncoder(nn.Module):
    """A ``VisionEncoder`` over a module that turns images into [N, S, D] tokens.

    The module may return the tensor itself, an object with ``last_hidden_state``, as the vision
    models of transformers do, or (pooled [N, E], tokens [N, S, D]), as the towers of open_clip with
    ``output_tokens`` do. For CLIP of transformers that is the output of the last layer without the
    post-LayerNorm, which it applies to the pooled token only. Without the class token these are the
    patch tokens that OpenFlamingo was trained with.

    Parameters
    ----------
    module : nn.Module
        The vision model; it becomes the submodule ``module``.
    drop_class_token : bool, optional
        Leave out the first token. None: decide it from each output of a module that has a class
        token (a parameter ``class_embedding``, ``cls_token`` or ``class_token``). If there are as
        many tokens as the picture has patches, all are kept. If there is one more, besides
        registers and a distillation token, the first is left out.
    image_mean, image_std : three floats, optional
        Per-channel constants that normalise pixels in [0, 1]. None: those of the module
        (``image_mean``), or those of the published weights of its architecture; the attributes stay
        None where neither is known.
    output_dim, image_size : int, optional
        Sizes that the module lacks: ``config.hidden_size`` or the width of a class token, and
        ``config.image_size`` or ``image_size``.

    Raises
    ------
    ValueError
        A size is neither given nor known of the module. From ``forward``: the images are not
        [N, 3, H, W], the output is not [N, S, output_dim], or ``drop_class_token`` is None and the
        number of tokens does not tell whether a class token is among them.
    TypeError
        From ``forward``: the images are not floating, or the module returns something else.
    """

    def __init__(
        self,
        module: nn.Module,
        drop_class_token: bool | None = None,
        output_dim: int | None = None,
        image_size: int | None = None,
        *,
        image_mean: Channels | None = None,
        image_std: Channels | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        class_tokens = _parameters_named(module, _CLASS_TOKENS)
        self.drop_class_token = drop_class_token
        if not class_tokens and drop_class_token is None:
            self.drop_class_token = False
        if (image_mean is None) != (image_std is None):
            raise ValueError(
                f"give both image_mean and image_std, or neither: got {image_mean} and {image_std}"
            )
        given = _own_statistics(module)
        if image_mean is not None:
            given = PixelStatistics(
                checked_channels("image_mean", image_mean),
                checked_channels("image_std", image_std, positive=True),
            )
        self._given: dict[str, Any] = {
            "drop_class_token": drop_class_token,
            "image_mean": given and given.mean,
            "image_std": given and given.std,
        }
        config = getattr(module, "config", None)
        self.output_dim = _given_or_known(
            "output_dim",
            output_dim,
            module,
            "hidden_size",
            class_tokens[0].shape[-1] if class_tokens else None,
        )
        self.image_size = _given_or_known(
            "image_size", image_size, module, "image_size", _square(module)
        )
        statistics = given or statistics_of(getattr(config, "model_type", None))
        self.image_mean: Channels | None = statistics and statistics.mean
        self.image_std: Channels | None = statistics and statistics.std

    @classmethod
    def from_config(cls, config: HuggingFaceVisionConfig) -> HuggingFaceVisionEncoder:
        """Build the model that ``config`` describes, with random weights (or on the meta device).

        Raises
        ------
        ImportError
            transformers is not installed.
        ValueError
            The model's sizes are not the ones that ``config`` declares.
        """
        model = build_model("AutoModel", "vision encoder", config)
        encoder = cls(
            model,
            config.drop_class_token,
            image_mean=config.image_mean,
            image_std=config.image_std,
        )
        check_declared_sizes(config, output_dim=encoder.output_dim, image_size=encoder.image_size)
        return encoder

    @property
    def config(self) -> HuggingFaceVisionConfig | ModuleVisionConfig:
        """What builds an encoder like this one; a ``ModuleVisionConfig`` if nothing can."""
        sizes = _sizes(self)
        config = getattr(self.module, "config", None)
        settings: dict[str, Any] = {name: getattr(self, name) for name in self._given}
        if getattr(config, "model_type", "") == "" or not hasattr(config, "to_diff_dict"):
            return ModuleVisionConfig(**sizes, **settings)
        return HuggingFaceVisionConfig(
            model_type=config.model_type,
            options=plain_options(config.to_diff_dict()),
            **sizes,
            **settings,
        )

    def recorded_in(self, config: VisionConfig) -> VisionConfig:
        """Return ``config``, if it is of this kind of encoder, with the settings that were given.

        Settings that it has already stay.
        """
        if not self._is_described_by(config):
            return config
        given = {
            n: v for n, v in self._given.items() if v is not None and getattr(config, n) is None
        }
        return dataclasses.replace(config, **given) if given else config

    def _is_described_by(self, config: VisionConfig) -> bool:
        own = self.config
        return type(config) is type(own) and _model_type(config) == _model_type(own)

    def with_settings_of(self, recorded: VisionConfig) -> HuggingFaceVisionEncoder:
        """Return this encoder with what a model of the same kind of encoder was trained with.

        Raises
        ------
        ValueError
            A setting was given to this encoder, and another one is recorded.
        """
        if not self._is_described_by(recorded):
            return self
        settings = {name: getattr(recorded, name) for name in self._given}
        for name, given in self._given.items():
            if None not in (given, settings[name]) and given != settings[name]:
                raise ValueError(
                    f"the vision encoder has {name}={given}, but the config says "
                    f"{name}={settings[name]}, which the model was trained with"
                )
        if all(value in (None, getattr(self, name)) for name, value in settings.items()):
            return self
        settings = {n: self._given[n] if value is None else value for n, value in settings.items()}
        return type(self)(self.module, **settings, **_sizes(self))

    def forward(self, images: Tensor) -> Tensor:
        check_images(images)
        output = self.module(images)
        features = getattr(output, "last_hidden_state", output)
        if _is_pooled_and_tokens(features):
            features = features[1]
        if not isinstance(features, Tensor):
            raise TypeError(
                f"{type(self.module).__name__} must return a tensor, an object with a tensor "
                "`last_hidden_state`, or (pooled [N, E], tokens [N, S, D]), got "
                f"{type(output).__name__}"
            )
        if features.ndim != 3 or features.shape[2] != self.output_dim:
            raise ValueError(
                f"{type(self.module).__name__} must return [N, S, {self.output_dim}], "
                f"got shape {tuple(features.shape)}"
                + (": set its output_tokens to True" if _is_open_clip(self.module) else "")
            )
        drop = self.drop_class_token
        if drop is None:
            drop = _class_token_is_in(features, images, self.module)
        return features[:, 1:] if drop else features


def wrap_vision_encoder(
    module: nn.Module,
    output_dim: int | None = None,
    image_size: int | None = None,
    drop_class_token: bool | None = None,
    *,
    image_mean: Channels | None = None,
    image_std: Channels | None = None,
) -> nn.Module:
    """Wrap ``module``, without changing it, as a ``VisionEncoder``.

    Parameters
    ----------
    module : nn.Module
        A transformers vision model, a tower of open_clip with ``output_tokens``, a model of two
        towers such as CLIP, whose vision model is taken, or any module [N, 3, H, W] -> [N, S, D].
    output_dim, image_size : int, optional
        Sizes that the module lacks; see :class:`HuggingFaceVisionEncoder`.
    drop_class_token : bool, optional
        Leave out the first token. None: where the output has a class token; see
        :class:`HuggingFaceVisionEncoder`.
    image_mean, image_std : three floats, optional
        How pixels in [0, 1] are normalised for the module. None: as is known of its architecture;
        :func:`read_vision_encoder` reads what a folder says.

    Returns
    -------
    nn.Module
        The wrapper, or ``module`` itself if it is a ``VisionEncoder``.

    Raises
    ------
    ValueError
        A size is neither given nor known of the module, or a setting is given for a
        ``VisionEncoder``.
    """
    if _is_vision_encoder(module):
        settings = {
            "drop_class_token": drop_class_token,
            "image_mean": image_mean,
            "image_std": image_std,
        }
        given = [name for name, value in settings.items() if value is not None]
        if given:
            raise ValueError(
                f"{' and '.join(given)} given, but {type(module).__name__} is a VisionEncoder "
                "already"
            )
        return module
    return HuggingFaceVisionEncoder(
        _vision_tower(module),
        drop_class_token,
        output_dim,
        image_size,
        image_mean=image_mean,
        image_std=image_std,
    )


def read_vision_encoder(folder: str | PathLike) -> nn.Module:
    """Read a vision model of transformers, and how its pictures are prepared.

    Parameters
    ----------
    folder : str or PathLike
        With ``config.json`` and weights as safetensors. ``preprocessor_config.json``, if there is
        one, says how pixels are normalised, and how large pictures are if the model does not.

    Returns
    -------
    nn.Module
        The model, with the attributes ``image_mean``, ``image_std`` and ``image_size`` that the
        folder tells. :func:`wrap_vision_encoder` and ``FlamingoModel`` take it.

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        As :func:`flamingo_kernels.transformers_models.read_folder`, or a damaged
        ``preprocessor_config.json``, or one whose values cannot be right.
    """
    module = read_folder("AutoModel", Path(folder))
    statistics, image_size = read_preprocessing(Path(folder))
    inner = _vision_tower(module)
    if statistics is not None:
        inner.image_mean, inner.image_std = statistics
    if image_size is not None and getattr(inner.config, "image_size", None) is None:
        inner.image_size = image_size
    return module


def _vision_tower(module: nn.Module) -> Any:
    """Return the vision model of a model of two towers, of transformers or open_clip."""
    visual = getattr(module, "visual", None)
    if isinstance(visual, nn.Module) and _is_open_clip(visual):
        return visual
    if hasattr(getattr(module, "config", None), "vision_config"):
        return module.get_submodule("vision_model")
    return module


def _own_statistics(module: nn.Module) -> PixelStatistics | None:
    """Return the statistics that a tower has as attributes, such as those of open_clip."""
    mean, std = getattr(module, "image_mean", None), getattr(module, "image_std", None)
    if not isinstance(mean, (list, tuple)) or not isinstance(std, (list, tuple)):
        return None
    return PixelStatistics(
        checked_channels("image_mean", mean), checked_channels("image_std", std, positive=True)
    )


def _is_vision_encoder(module: nn.Module) -> bool:
    # The towers of open_clip have the attributes by name, with another meaning.
    return isinstance(module, VisionEncoder) and not _is_open_clip(module)


def _is_open_clip(module: nn.Module) -> bool:
    return hasattr(module, "output_tokens")


def _parameters_named(module: nn.Module, names: set[str]) -> list[nn.Parameter]:
    return [p for name, p in module.named_parameters() if name.rsplit(".", 1)[-1] in names]


def _is_pooled_and_tokens(output: Any) -> bool:
    return isinstance(output, tuple) and [
        part.ndim if isinstance(part, Tensor) else None for part in output
    ] == [2, 3]


def _class_token_is_in(features: Tensor, images: Tensor, module: nn.Module) -> bool:
    """Whether the first of the tokens [N, S, D] is a class token; ValueError if that is unclear."""
    tokens, patches = features.shape[1], _patches(images, module)
    others = getattr(getattr(module, "config", None), "num_register_tokens", None) or 0
    others += len(_parameters_named(module, {"distillation_token"}))
    if tokens == patches:
        return False
    if patches is not None and tokens - patches in (1, 1 + others):
        return True
    count = "an unknown number of" if patches is None else str(patches)
    raise ValueError(
        f"{type(module).__name__} has a class token and gives {tokens} tokens for pictures of "
        f"{count} patches, which does not tell whether the first token is the class token: call "
        "flamingo_kernels.vision.wrap_vision_encoder(module, drop_class_token=True or False, ...) "
        "and pass on what it returns"
    )


def _patches(images: Tensor, module: nn.Module) -> int | None:
    """Return how many patches the first convolution of ``module`` makes of an image, or None."""
    sides = images.shape[2:]
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == images.shape[1]:
            if isinstance(layer.padding, str):
                return None
            rule = zip(
                sides, layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True
            )
            return math.prod((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in rule)
    size = getattr(getattr(module, "config", None), "patch_size", None)
    if size is None:
        return None
    size = size if isinstance(size, (list, tuple)) else (size, size)
    return math.prod(n // s for n, s in zip(sides, size, strict=True))


def _sizes(encoder: HuggingFaceVisionEncoder) -> dict[str, int]:
    return {"output_dim": encoder.output_dim, "image_size": encoder.image_size}


def _model_type(config: VisionConfig) -> str | None:
    return getattr(config, "model_type", None)


def _square(module: nn.Module) -> int | None:
    """Return the side of the pictures that a tower of open_clip states, or None."""
    size = getattr(module, "image_size", None)
    if isinstance(size, (tuple, list)) and len(set(size)) == 1:
        size = size[0]
    return size if is_integer(size) else None


def _given_or_known(
    name: str, given: int | None, module: nn.Module, attribute: str, otherwise: int | None
) -> int:
    value = given
    if value is None:
        value = getattr(getattr(module, "config", None), attribute, None)
    if value is None:
        value = otherwise
    if value is None:
        raise ValueError(
            f"{name} must be given: {type(module).__name__} has no config.{attribute}; call "
            "flamingo_kernels.vision.wrap_vision_encoder(module, output_dim=..., image_size=...) "
            "and pass on what it returns"
        )
    return value
