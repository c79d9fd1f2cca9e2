"""Accuracy on classes, drawings and names that were never trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.fast_binding.documents import Gallery
from examples.fast_binding.text import CHUNK_TOKENS, HELD_OUT_NAMES, TOKENS, bound_chunks
from flamingo_kernels import FlamingoModel

SHOTS = (0, 1, 2, 4, 8, 16, 32)
# Episodes read at once share their names; this bounds the memory of the caches.
_TOKENS_AT_ONCE = 40_000
_MOST_EPISODES_AT_ONCE = 50
_Z = 1.96  # of a 95 % interval


@dataclass(frozen=True)
class Accuracy:
    """The share ``right`` of ``episodes``, with Wilson's 95 % interval."""

    right: int
    episodes: int

    @property
    def value(self) -> float:
        return self.right / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        n, z2 = self.episodes, _Z**2
        middle = (self.right + z2 / 2) / (n + z2)
        half = _Z / (n + z2) * math.sqrt(self.right * (n - self.right) / n + z2 / 4)
        return middle - half, middle + half

    def __add__(self, other: Accuracy) -> Accuracy:
        return Accuracy(self.right + other.right, self.episodes + other.episodes)


@dataclass(frozen=True)
class Episodes:
    """Questions that share their names: which of ``names`` belongs to the last picture?

    Attributes
    ----------
    names : ndarray
        int64 [ways, 3], the letters of each name.
    input_ids : Tensor
        [B, T], up to where the answer begins.
    features : Tensor
        [B, I, 1, S, D].
    answers : ndarray
        [B], the index of the right name.
    """

    names: np.ndarray
    input_ids: Tensor
    features: Tensor
    answers: np.ndarray


def draw_episodes(
    gallery: Gallery, ways: int, shots: int, rows: int, generator: np.random.Generator
) -> Episodes:
    """Draw ``shots`` pictures of each of ``ways`` classes, and one more that is asked for.

    Each round of ``ways`` pictures shows every class once, in random order.
    """
    names = generator.choice(HELD_OUT_NAMES, ways, replace=False)
    shown, features = [], []
    for _ in range(rows):
        classes = gallery.draw_classes(generator, ways)
        order = [generator.permutation(ways) for _ in range(shots)]
        which = np.concatenate((*order, generator.integers(ways, size=1)))
        features.append(gallery.draw(generator, classes[which]))
        shown.append(which)
    which = np.stack(shown)
    images = np.full_like(which, TOKENS.image_token_id)
    answer_and_end = CHUNK_TOKENS - 1
    ids = bound_chunks(images, names[which])[:, :-answer_and_end]
    return Episodes(names, ids, torch.stack(features), which[:, -1])


@torch.no_grad()
def accuracy(
    model: FlamingoModel, gallery: Gallery, ways: int, shots: int, episodes: int, seed: int
) -> Accuracy:
    """Measure how often the right one of the names in the prompt is the likeliest answer.

    ``shots`` counts examples per class: the prompt holds ``ways * shots`` of them.
    """
    device = model.perceiver.latents.device
    tokens = ways * CHUNK_TOKENS * (ways * shots + 1)
    rows = max(1, min(_MOST_EPISODES_AT_ONCE, _TOKENS_AT_ONCE // tokens))
    right = done = 0
    while done < episodes:
        generator = np.random.default_rng([seed, ways, shots, done])
        batch = draw_episodes(gallery, ways, shots, min(rows, episodes - done), generator)
        inputs = (batch.input_ids.to(device), batch.names.tolist(), batch.features.to(device))
        right += int((model.score_answers(*inputs).argmax(1).cpu().numpy() == batch.answers).sum())
        done += len(batch.answers)
    return Accuracy(right, episodes)


def class_means(gallery: Gallery, ways: int, shots: int, episodes: int, seed: int) -> Accuracy:
    """Measure a rule without a language model: take the class whose mean feature is nearest.

    Features are averaged over positions and compared by cosine.
    """
    pooled = gallery.features.mean(2)
    pooled = F.normalize(pooled - pooled.mean((0, 1)), dim=-1)
    generator = np.random.default_rng([seed, ways, shots])
    right = 0
    for _ in range(episodes):
        classes = generator.choice(len(pooled), ways, replace=False)
        asked = int(generator.integers(ways))
        places = np.stack(
            [generator.choice(pooled.shape[1], shots + 1, replace=False) for _ in classes]
        )
        means = pooled[classes[:, None], places[:, :-1]].mean(1)
        query = pooled[classes[asked], places[asked, -1]]
        right += int(F.cosine_similarity(means, query[None]).argmax()) == asked
    return Accuracy(right, episodes)
