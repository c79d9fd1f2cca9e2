"""The vision encoder of a model that is given features in place of images."""

from __future__ import annotations

from torch import Tensor, nn

from flamingo_kernels.vision.config import FeaturesConfig


class PrecomputedFeatures(nn.Module):
    """Encodes nothing: the model takes features [B, I, F, S, output_dim] in place of pixels.

    Parameters
    ----------
    config : FeaturesConfig or int
        Configuration, or the number of channels.

    Raises
    ------
    ValueError
        From ``forward``, always.
    """

    image_size = None
    image_mean = None
    image_std = None

    def __init__(self, config: FeaturesConfig | int) -> None:
        super().__init__()
        if not isinstance(config, FeaturesConfig):
            config = FeaturesConfig(output_dim=config)
        self.config = config
        self.output_dim = config.output_dim

    def forward(self, images: Tensor) -> Tensor:
        raise ValueError(
            f"this model has no vision encoder: give features [B, I, F, S, {self.output_dim}] in "
            f"place of pixel values, got images of shape {tuple(images.shape)}"
        )
