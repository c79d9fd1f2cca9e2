"""What the rest of the package asks of a vision encoder."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

Channels = tuple[float, float, float]


@runtime_checkable
class VisionEncoder(Protocol):
    """Turns images into spatial features.

    Attributes
    ----------
    output_dim : channels of the features.
    image_size : pixels on a side of the images it is meant for.
    image_mean, image_std : per-channel constants its inputs are normalised with, for pixels in
        [0, 1]; None where they are not known.
    """

    output_dim: int
    image_size: int
    image_mean: Channels | None
    image_std: Channels | None

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images [N, C, H, W], floating -> features [N, S, output_dim]."""
        ...


def check_images(images: Tensor) -> None:
    """Raise unless `images` is a floating [N, 3, H, W] tensor."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [N, 3, H, W], got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be normalised floating-point values, got {images.dtype}")
