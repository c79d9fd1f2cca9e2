"""Training documents: pictures with names bound within a document, and pictures with captions.

An interleaved document is ``<BOS><image>dax<EOC><image>wug<EOC>...``. A pair is
``<BOS><image>kib<EOC>``: one of nine fixed names says in which part of the picture most ink is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.fast_binding.text import TOKENS, TRAINING_NAMES, bound_chunks
from examples.fast_binding.vision import features_of
from flamingo_kernels.vision import NFNet

IMAGES_PER_DOCUMENT = 5
_SHARE_OF_DIGITS = 0.25
_GRID = 3
_CELL_NAMES = np.random.default_rng(3).choice(TRAINING_NAMES, _GRID**2, replace=False)


@dataclass(frozen=True)
class Gallery:
    """Pictures of one kind, by class.

    Attributes
    ----------
    features : Tensor
        [classes, drawings, S, D], the features that the frozen vision encoder computes.
    inkiest : Tensor
        int64 [classes, drawings], the brightest cell of a 3 x 3 grid.
    """

    features: Tensor
    inkiest: Tensor

    @classmethod
    def of(cls, encoder: NFNet, pictures: Tensor) -> Gallery:
        """Encode pictures [classes, drawings, H, W] in 0..1."""
        ink = F.adaptive_avg_pool2d(pictures, _GRID)
        return cls(features_of(encoder, pictures), ink.flatten(2).argmax(2))

    def draw_classes(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Return the numbers [count] of different classes."""
        return generator.choice(len(self.features), count, replace=False)

    def draw(self, generator: np.random.Generator, classes: np.ndarray) -> Tensor:
        """Return features [N, 1, S, D] of pictures of the ``classes`` [N], without repetition."""
        chosen = np.empty_like(classes)
        for number in np.unique(classes):
            places = classes == number
            chosen[places] = generator.choice(self.features.shape[1], places.sum(), replace=False)
        return self.features[classes, chosen][:, None]


def interleaved(
    galleries: Sequence[Gallery], rows: int, generator: np.random.Generator
) -> dict[str, Tensor]:
    """Draw documents of five pictures of two or three classes.

    ``galleries`` are those of the glyphs and of the digits.
    """
    ways = int(generator.integers(2, 4))
    names, features = [], []
    for kind in _kinds(generator, rows):
        classes = galleries[kind].draw_classes(generator, ways)
        which = generator.integers(ways, size=IMAGES_PER_DOCUMENT)
        features.append(galleries[kind].draw(generator, classes[which]))
        names.append(generator.choice(TRAINING_NAMES, ways, replace=False)[which])
    return _batch(np.stack(names), torch.stack(features))


def pairs(
    galleries: Sequence[Gallery], rows: int, generator: np.random.Generator
) -> dict[str, Tensor]:
    """Draw pictures with captions; ``galleries`` as for :func:`interleaved`."""
    cells, features = [], []
    for kind in _kinds(generator, rows):
        gallery = galleries[kind]
        place = tuple(int(generator.integers(size)) for size in gallery.inkiest.shape)
        cells.append(gallery.inkiest[place])
        features.append(gallery.features[place])
    return _batch(_CELL_NAMES[torch.stack(cells)][:, None], torch.stack(features)[:, None, None])


def _kinds(generator: np.random.Generator, rows: int) -> np.ndarray:
    return (generator.random(rows) < _SHARE_OF_DIGITS).astype(int)


def _batch(names: np.ndarray, features: Tensor) -> dict[str, Tensor]:
    """Return arguments of ``FlamingoModel.forward``: ``<image>name<EOC>`` of names [B, N, 3]."""
    ids = bound_chunks(np.full(names.shape[:2], TOKENS.image_token_id), names)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
        "num_images": torch.full((len(ids),), names.shape[1]),
        "pixel_values": features,
    }


class DrawnBatches:
    """Batches that are drawn when asked for; ``Trainer`` takes them in place of a ``BatchLoader``.

    Batch n depends on the seed and n alone, so the position is n.
    """

    def __init__(self, draw: Callable[[np.random.Generator], dict[str, Tensor]], seed: int) -> None:
        self.draw, self.seed, self.position = draw, seed, 0
        self.skipped: Counter[str] = Counter()

    @property
    def keys(self) -> list[str]:
        """Name of the last batch, for error messages."""
        return [f"batch {self.position - 1} of seed {self.seed}"]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def __next__(self) -> dict[str, Tensor]:
        generator = np.random.default_rng([self.seed, self.position])
        self.position += 1
        return self.draw(generator)
