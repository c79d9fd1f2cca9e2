"""Training documents: pictures with names bound within a document, and pictures with captions.

``<BOS><image>dax<EOC><image>wug<EOC>...``, in half of the batches after text that gives the name of
each thing by a letter, ``Bdax<EOC>Twug<EOC>``; and ``<BOS><image>TBQ<EOC>``. The letters are those
of the cells of a 5 x 5 grid: a caption names some of those with most ink, an introduction that
which tells the thing from the others of its document.
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
from examples.fast_binding.vision import features_of
from flamingo_kernels.vision import NFNet

IMAGES_PER_DOCUMENT = 5
_GRID = 5
_INKED_CELLS, _CAPTION_LETTERS = 6, 3
_SHARE_OF_DIGITS, _SHARE_INTRODUCED = 0.15, 0.5


@dataclass(frozen=True)
class Gallery:
    """Pictures of one kind by class.

    Attributes
    ----------
    features : [classes, drawings, S, D], what the frozen vision encoder makes of them.
    ink : [classes, drawings, 25], mean brightness of the cells of a grid.
    """

    features: Tensor
    ink: Tensor

    @classmethod
    def of(cls, encoder: NFNet, pictures: Tensor) -> Gallery:
        """Of pictures [classes, drawings, H, W] in 0..1."""
        ink = F.adaptive_avg_pool2d(pictures, _GRID).flatten(2)
        return cls(features_of(encoder, pictures), ink)

    def draw_classes(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Numbers [count] of different classes."""
        return generator.choice(len(self.features), count, replace=False)

    def draw(self, generator: np.random.Generator, classes: np.ndarray) -> Tensor:
        """Features [N, 1, S, D] of pictures of these ``classes`` [N], none of them twice."""
        chosen = np.empty_like(classes)
        for number in np.unique(classes):
            places = classes == number
            chosen[places] = generator.choice(self.features.shape[1], places.sum(), replace=False)
        return self.features[classes, chosen][:, None]

    def letters_of(self, classes: np.ndarray) -> np.ndarray:
        """Ids [N] of the letters that tell each of ``classes`` [N] from the others."""
        ink = self.ink[classes].mean(1)
        others = torch.eye(len(classes), dtype=torch.bool)[..., None]
        most_elsewhere = ink[None].masked_fill(others, 0).amax(1)
        return LETTERS[(ink - most_elsewhere).argmax(1).numpy()]


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
    ways = int(generator.integers(2, 4))
    introduced = ways if generator.random() < _SHARE_INTRODUCED else 0
    things, names, features = [], [], []
    for kind in (generator.random(rows) < _SHARE_OF_DIGITS).astype(int):
        gallery = galleries[kind]
        classes = gallery.draw_classes(generator, ways)
        which = generator.integers(ways, size=IMAGES_PER_DOCUMENT)
        features.append(gallery.draw(generator, classes[which]))
        order = generator.permutation(ways)[:introduced]
        images = np.full_like(which, TOKENS.image_token_id)
        things.append(np.concatenate((gallery.letters_of(classes)[order], images)))
        bound = generator.choice(TRAINING_NAMES, ways, replace=False)
        names.append(bound[np.concatenate((order, which))])
    return batch_of(bound_chunks(np.stack(things), np.stack(names)), torch.stack(features))


def pairs(
    galleries: Sequence[Gallery], rows: int, generator: np.random.Generator
) -> dict[str, Tensor]:
    """Pictures with captions."""
    ids, features = [], []
    for kind in (generator.random(rows) < _SHARE_OF_DIGITS).astype(int):
        gallery = galleries[kind]
        place = tuple(int(generator.integers(size)) for size in gallery.ink.shape[:2])
        inked = LETTERS[gallery.ink[place].topk(_INKED_CELLS).indices.numpy()]
        letters = generator.permutation(inked)[:_CAPTION_LETTERS].tolist()
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
