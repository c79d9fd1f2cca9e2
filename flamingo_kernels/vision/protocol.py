"""The interface of vision encoders."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

Channels = tuple[float, float, float]


@runtime_checkable
class VisionEncoder(Protocol):
    """Turns images into spatial features.

    Attributes
    ----------
    output_dim : int
        Channels of the features.
    image_size : int
        Side, in pixels, of the images that it expects.
    image_mean, image_std : tuple of float, or None
        Per-channel constants that normalise pixels in [0, 1] for its input; None if unknown.
    """

    output_dim: int
    image_size: int
    image_mean: Channels | None
    image_std: Channels | None

    def __call__(self, images: Tensor) -> Tensor:
        """Turn normalised images [N, C, H, W], floating, into features [N, S, output_dim]."""
        ...


def check_images(images: Tensor) -> None:
    """Raise TypeError or ValueError unless ``images`` is a floating [N, 3, H, W] tensor."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [N, 3, H, W], got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be normalised floating-point values, got {images.dtype}")
