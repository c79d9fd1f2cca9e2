"""Hugging Face vision models, and modules with the same kind of output, as vision encoders."""

from __future__ import annotations

from torch import Tensor, nn

from flamingo_kernels.transformers_models import build_model, check_declared_sizes, plain_options
from flamingo_kernels.vision.config import HuggingFaceVisionConfig, ModuleVisionConfig
from flamingo_kernels.vision.protocol import Channels, VisionEncoder, check_images

# Normalisation constants by model type: transformers has them in its processors, not its models.
_NORMALISATION: dict[str, tuple[Channels, Channels]] = {
    "clip_vision_model": (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class HuggingFaceVisionEncoder(nn.Module):
    """A ``VisionEncoder`` over a module that turns images into [N, S, D] tokens.

    The module may return the tensor itself or an object with ``last_hidden_state``, as the vision
    models of transformers do. For CLIP that is the output of the last layer without the
    post-LayerNorm, which transformers applies to the pooled token only. Without the class token
    these are the patch tokens that OpenFlamingo reads.

    Parameters
    ----------
    module : nn.Module
        The vision model; it becomes the submodule ``module``.
    drop_class_token : bool
        Leave out the first token.
    output_dim, image_size : int, optional
        Sizes that ``module.config`` lacks (``hidden_size``, ``image_size``).

    Raises
    ------
    ValueError
        A size is neither given nor in ``module.config``. From ``forward``: the images are not
        [N, 3, H, W], or the output is not [N, S, output_dim].
    TypeError
        From ``forward``: the images are not floating, or the module returns something else.
    """

    def __init__(
        self,
        module: nn.Module,
        drop_class_token: bool,
        output_dim: int | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.drop_class_token = drop_class_token
        config = getattr(module, "config", None)
        self.output_dim = _given_or_from_config("output_dim", output_dim, module, "hidden_size")
        self.image_size = _given_or_from_config("image_size", image_size, module, "image_size")
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
        sizes = {"output_dim": self.output_dim, "image_size": self.image_size}
        config = getattr(self.module, "config", None)
        if getattr(config, "model_type", "") == "" or not hasattr(config, "to_diff_dict"):
            return ModuleVisionConfig(**sizes)
        return HuggingFaceVisionConfig(
            model_type=config.model_type,
            options=plain_options(config.to_diff_dict()),
            drop_class_token=self.drop_class_token,
            **sizes,
        )

    def forward(self, images: Tensor) -> Tensor:
        check_images(images)
        output = self.module(images)
        features = getattr(output, "last_hidden_state", output)
        if not isinstance(features, Tensor):
            raise TypeError(
                f"{type(self.module).__name__} must return a tensor or an object with a tensor "
                f"`last_hidden_state`, got {type(output).__name__}"
            )
        if features.ndim != 3 or features.shape[2] != self.output_dim:
            raise ValueError(
                f"{type(self.module).__name__} must return [N, S, {self.output_dim}], "
                f"got shape {tuple(features.shape)}"
            )
        return features[:, 1:] if self.drop_class_token else features


def wrap_vision_encoder(
    module: nn.Module, output_dim: int | None = None, image_size: int | None = None
) -> nn.Module:
    """Wrap ``module``, without changing it, as a ``VisionEncoder``.

    Parameters
    ----------
    module : nn.Module
        A transformers vision model; a two-tower model such as CLIP, whose vision model is taken;
        or any module [N, 3, H, W] -> [N, S, D]. The first token is left out if the module has a
        parameter for it (``class_embedding`` or ``cls_token``).
    output_dim, image_size : int, optional
        Sizes that ``module.config`` lacks (``hidden_size``, ``image_size``).

    Returns
    -------
    nn.Module
        The wrapper, or ``module`` itself if it is a ``VisionEncoder``.

    Raises
    ------
    ValueError
        A size is neither given nor in the module's config.
    """
    if isinstance(module, VisionEncoder):
        return module
    if hasattr(getattr(module, "config", None), "vision_config"):
        module = module.get_submodule("vision_model")
    names = {name.rsplit(".", 1)[-1] for name, _ in module.named_parameters()}
    return HuggingFaceVisionEncoder(
        module,
        drop_class_token=bool(names & {"class_embedding", "cls_token"}),
        output_dim=output_dim,
        image_size=image_size,
    )


def _given_or_from_config(name: str, given: int | None, module: nn.Module, attribute: str) -> int:
    value = given
    if value is None:
        value = getattr(getattr(module, "config", None), attribute, None)
    if value is None:
        raise ValueError(
            f"{name} must be given: {type(module).__name__} has no config.{attribute}; call "
            "flamingo_kernels.vision.wrap_vision_encoder(module, output_dim=..., image_size=...) "
            "and pass on what it returns"
        )
    return value
