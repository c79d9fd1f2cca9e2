"""Hugging Face vision models, and modules with the same kind of output, as vision encoders."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from flamingo_kernels.fields import is_integer
from flamingo_kernels.transformers_models import build_model, check_declared_sizes, plain_options
from flamingo_kernels.vision.config import (
    HuggingFaceVisionConfig,
    ModuleVisionConfig,
    VisionConfig,
)
from flamingo_kernels.vision.protocol import Channels, VisionEncoder, check_images

# Normalisation constants by model type: transformers has them in its processors, not its models.
_NORMALISATION: dict[str, tuple[Channels, Channels]] = {
    "clip_vision_model": (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
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
    ) -> None:
        super().__init__()
        self.module = module
        class_tokens = _parameters_named(module, _CLASS_TOKENS)
        self.drop_class_token = drop_class_token
        if not class_tokens and drop_class_token is None:
            self.drop_class_token = False
        self._given = {"drop_class_token": drop_class_token}
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
        model_type = getattr(config, "model_type", None)
        self.image_mean: Channels | None
        self.image_std: Channels | None
        self.image_mean, self.image_std = _NORMALISATION.get(model_type, (None, None))

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
        encoder = cls(model, config.drop_class_token)
        check_declared_sizes(config, output_dim=encoder.output_dim, image_size=encoder.image_size)
        return encoder

    @property
    def config(self) -> HuggingFaceVisionConfig | ModuleVisionConfig:
        """What builds an encoder like this one; a ``ModuleVisionConfig`` if nothing can."""
        sizes = _sizes(self)
        config = getattr(self.module, "config", None)
        settings = {"drop_class_token": self.drop_class_token}
        if getattr(config, "model_type", "") == "" or not hasattr(config, "to_diff_dict"):
            return ModuleVisionConfig(**sizes, **settings)
        return HuggingFaceVisionConfig(
            model_type=config.model_type,
            options=plain_options(config.to_diff_dict()),
            **sizes,
            **settings,
        )

    def with_settings_of(self, recorded: VisionConfig) -> HuggingFaceVisionEncoder:
        """Return this encoder with what a model of the same kind of encoder was trained with.

        Raises
        ------
        ValueError
            A setting was given to this encoder, and another one is recorded.
        """
        own = self.config
        if type(recorded) is not type(own) or _model_type(recorded) != _model_type(own):
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

    Returns
    -------
    nn.Module
        The wrapper, or ``module`` itself if it is a ``VisionEncoder``.

    Raises
    ------
    ValueError
        A size is neither given nor known of the module, or ``drop_class_token`` is given for a
        ``VisionEncoder``.
    """
    if _is_vision_encoder(module):
        if drop_class_token is not None:
            raise ValueError(
                f"drop_class_token is given, but {type(module).__name__} is a VisionEncoder already"
            )
        return module
    visual = getattr(module, "visual", None)
    if isinstance(visual, nn.Module) and _is_open_clip(visual):
        module = visual
    if hasattr(getattr(module, "config", None), "vision_config"):
        module = module.get_submodule("vision_model")
    return HuggingFaceVisionEncoder(module, drop_class_token, output_dim, image_size)


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
