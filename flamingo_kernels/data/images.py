"""Pictures to normalised pixel values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

# Statistics of ImageNet, with which the published NFNets were trained.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def to_pixel_values(image: Image, size: int) -> Tensor:
    """A Pillow image of any mode and size -> fp32 [3, size, size], mean 0 and variance 1.

    The aspect ratio is kept and the rest padded with the mean (Flamingo, appendix B.1.2), which is
    0 after normalisation.
    """
    shrink = size / max(image.size)
    width, height = (max(1, round(side * shrink)) for side in image.size)
    resized = np.asarray(image.convert("RGB").resize((width, height)), dtype=np.float32) / 255
    normalised = (resized - np.float32(IMAGE_MEAN)) / np.float32(IMAGE_STD)
    top, left = (size - height) // 2, (size - width) // 2
    canvas = np.zeros((3, size, size), dtype=np.float32)
    canvas[:, top : top + height, left : left + width] = normalised.transpose(2, 0, 1)
    return torch.from_numpy(canvas)
