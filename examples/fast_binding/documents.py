"""Training documents: pictures with names bound within a document, and pictures with captions.

``<BOS><image>dax<EOC><image>wug<EOC>...`` and ``<BOS><image>TBQ<EOC>``, the letters of a caption
being some of the cells of a 5 x 5 grid that hold most ink.
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

from examples.fast_binding.text import LETTERS, TOKENS, TRAINING_NAMES, bound_chunks

IMAGES_PER_DOCUMENT = 5
_GRID = 5
_INKED_CELLS, _CAPTION_LETTERS = 6, 3
_SHARE_OF_DIGITS = 0.15


@dataclass(frozen=True)
class Gallery:
    """Pictures of one kind by class.

    Attributes
    ----------
    features : [classes, drawings, S, D], what the frozen vision encoder makes of them.
    letters : ids of the letters [classes, drawings, 6] of the cells with most ink.
    """

    features: Tensor
    letters: np.ndarray

    def draw(self, generator: np.random.Generator, which: np.ndarray) -> Tensor:
        """Features [N, 1, S, D] of pictures of the classes 0, 1, ... that ``which`` [N] names.

        Which classes these are is drawn, and no picture comes twice.
        """
        classes = generator.choice(len(self.features), which.max() + 1, replace=False)
        chosen = np.empty_like(which)
        for number in np.unique(which):
            places = which == number
            chosen[places] = generator.choice(self.features.shape[1], places.sum(), replace=False)
        return self.features[classes[which], chosen][:, None]


def letters_of(pictures: Tensor) -> np.ndarray:
    """Ids of the letters [..., 6] of the cells with most ink of ``pictures`` [..., H, W]."""
    ink = F.adaptive_avg_pool2d(pictures.flatten(0, -3)[:, None], _GRID).flatten(1)
    cells = ink.topk(_INKED_CELLS).indices.numpy()
    return LETTERS[cells].reshape(*pictures.shape[:-2], _INKED_CELLS)


def batch_of(ids: Tensor, features: Tensor) -> dict[str, Tensor]:
    """Arguments of ``FlamingoModel.forward`` for rows of one length, every token counted."""
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
        "pixel_values": features,
    }


def interleaved(
    galleries: Sequence[Gallery], rows: int, generator: np.random.Generator
) -> dict[str, Tensor]:
    """Documents of five pictures of two or three classes; ``galleries`` are glyphs and digits."""
    which = [
        generator.integers(generator.integers(2, 4), size=IMAGES_PER_DOCUMENT) for _ in range(rows)
    ]
    which = np.stack([np.unique(row, return_inverse=True)[1] for row in which])
    names = generator.choice(TRAINING_NAMES, (rows, which.max() + 1))
    kinds = (generator.random(rows) < _SHARE_OF_DIGITS).astype(int)
    features = [galleries[k].draw(generator, row) for k, row in zip(kinds, which, strict=True)]
    images = np.full_like(which, TOKENS.image_token_id)
    ids = bound_chunks(images, np.take_along_axis(names, which[..., None], 1))
    return batch_of(ids, torch.stack(features))


def pairs(
    galleries: Sequence[Gallery], rows: int, generator: np.random.Generator
) -> dict[str, Tensor]:
    """Pictures with captions."""
    ids, features = [], []
    for kind in (generator.random(rows) < _SHARE_OF_DIGITS).astype(int):
        gallery = galleries[kind]
        place = tuple(int(generator.integers(size)) for size in gallery.letters.shape[:2])
        letters = generator.permutation(gallery.letters[place])[:_CAPTION_LETTERS].tolist()
        ids.append(
            [TOKENS.bos_token_id, TOKENS.image_token_id, *letters, TOKENS.end_of_chunk_token_id]
        )
        features.append(gallery.features[place][None, None])
    return batch_of(torch.tensor(ids), torch.stack(features))


class DrawnBatches:
    """Batches made on the spot, what ``Trainer`` takes a ``BatchLoader`` for.

    Batch n is drawn from the seed and n, so that n is the whole position.
    """

    def __init__(self, draw: Callable[[np.random.Generator], dict[str, Tensor]], seed: int) -> None:
        self.draw, self.seed, self.position = draw, seed, 0
        self.skipped: Counter[str] = Counter()

    @property
    def keys(self) -> list[str]:
        """Name of the last batch."""
        return [f"batch {self.position - 1} of seed {self.seed}"]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def __next__(self) -> dict[str, Tensor]:
        generator = np.random.default_rng([self.seed, self.position])
        self.position += 1
        return self.draw(generator)
