"""From pictures to pixel values, with the paper's augmentation: flips and colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flamingo_kernels.data.images import (
    IMAGE_MEAN,
    IMAGE_STD,
    Channels,
    check_statistics,
    to_pixel_values,
)

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImagePreparation:
    """How pictures become pixel values.

    The paper flips pictures and changes their colours without giving figures (appendix B.1.2).

    Attributes
    ----------
    size : int
        Pixels on a side; the encoder's ``image_size``.
    mean, std : three floats
        The encoder's ``image_mean`` and ``image_std``. Default: those of ImageNet. None, which an
        encoder has where they are not known, is a ValueError.
    fit : {"pad", "crop"}
        See :func:`flamingo_kernels.data.images.to_pixel_values`.
    flip : float
        Probability of a left-right flip.
    colour : float
        Brightness, contrast and saturation are scaled by factors in [1 - colour, 1 + colour].
    """

    size: int
    mean: Channels | None = IMAGE_MEAN
    std: Channels | None = IMAGE_STD
    fit: str = "pad"
    flip: float = 0.0
    colour: float = 0.0

    def __post_init__(self) -> None:
        check_statistics(self.mean, self.std)

    def __call__(self, frames: Sequence[Image], generator: np.random.Generator) -> Tensor:
        """Return the pixel values of one clip, fp32 [F, 3, size, size].

        All frames are flipped and coloured in the same way.
        """
        from PIL import ImageEnhance, ImageOps

        # Drawn whether used or not, so that one option does not move the draws of another.
        flipped = generator.random() < self.flip
        factors = 1 + self.colour * (2 * generator.random(3) - 1)
        values = []
        for frame in frames:
            if flipped:
                frame = ImageOps.mirror(frame)
            if self.colour:
                enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
                for enhancer, factor in zip(enhancers, factors, strict=True):
                    frame = enhancer(frame).enhance(float(factor))
            values.append(
                to_pixel_values(frame, self.size, mean=self.mean, std=self.std, fit=self.fit)
            )
        return torch.stack(values)
