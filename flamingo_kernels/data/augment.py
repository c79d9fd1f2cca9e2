"""Pictures to pixel values, with the paper's augmentation: flips and colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flamingo_kernels.data.images import Channels, to_pixel_values

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImagePreparation:
    """How pictures become pixel values; ``size``, ``mean`` and ``std`` are the encoder's.

    ``flip``: probability of a left-right flip. ``colour``: brightness, contrast and saturation are
    scaled by factors in [1 - colour, 1 + colour]. The paper has both without figures (appendix
    B.1.2).
    """

    size: int
    mean: Channels | None = None
    std: Channels | None = None
    fit: str = "pad"
    flip: float = 0.0
    colour: float = 0.0

    def __call__(self, frames: Sequence[Image], generator: np.random.Generator) -> Tensor:
        """Frames of one clip, all changed alike -> fp32 [F, 3, size, size]."""
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
