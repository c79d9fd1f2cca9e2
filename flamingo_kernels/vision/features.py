"""The place of a vision encoder in a model that is given features."""

from __future__ import annotations

from torch import Tensor, nn

from flamingo_kernels.vision.config import FeaturesConfig


class PrecomputedFeatures(nn.Module):
    """Refuses pixels; the model takes features [B, I, F, S, output_dim] in their place.

    Parameters
    ----------
    config : FeaturesConfig, or the number of channels.
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
