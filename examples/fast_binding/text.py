"""Text alone: made-up names bound to things within a document, and the language model of it.

A thing is a capital letter, and a document says again and again what it is called:
``Bdax<EOC>Fwug<EOC>Bdax<EOC>...``. Now and then the thing is wrong. Names mean nothing outside
their document, so all that a model can learn is to bind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from examples.fast_binding.progress import Progress
from flamingo_kernels.language import ByteTokenizer
from flamingo_kernels.language.config import DecoderConfig
from flamingo_kernels.language.decoder import Decoder
from flamingo_kernels.model.loss import next_token_loss

TOKENS = ByteTokenizer()
LETTERS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXY", np.uint8).astype(np.int64)
_CHARACTERS = np.array([*LETTERS, *b"abcdefghijklmnopqrstuvwxyz"])
_CONSONANTS, _VOWELS = b"bdfgklmnprstvwxz", b"aeiou"
_ALL_NAMES = np.array([[a, b, c] for a in _CONSONANTS for b in _VOWELS for c in _CONSONANTS])
CHUNK_TOKENS = 5  # a thing, the letters of its name, <EOC>
# Every tenth name is kept for evaluation.
_HELD_OUT = np.arange(len(_ALL_NAMES)) % 10 == 0
TRAINING_NAMES, HELD_OUT_NAMES = _ALL_NAMES[~_HELD_OUT], _ALL_NAMES[_HELD_OUT]
_LEXICON = [
    bytes(draw.choice(np.arange(ord("a"), ord("z") + 1), draw.integers(2, 6)).tolist())
    for draw in (np.random.default_rng([5, word]) for word in range(200))
]


def bound_chunks(things: np.ndarray, names: np.ndarray) -> Tensor:
    """Ids of ``<BOS>`` and chunks ``thing name<EOC>``: things [B, N], names [B, N, 3]."""
    end = np.full_like(things, TOKENS.end_of_chunk_token_id)
    ids = np.concatenate((things[..., None], names, end[..., None]), 2).reshape(len(things), -1)
    start = np.full((len(things), 1), TOKENS.bos_token_id)
    return torch.from_numpy(np.concatenate((start, ids), 1))


@dataclass(frozen=True)
class Documents:
    """What the documents of a batch are like.

    Attributes
    ----------
    most_things : a document is about two things to so many.
    tokens : of a document, at most.
    rows : documents of a batch.
    wrong : probability that a thing is taken for another one, or for none of the document.
    """

    most_things: int
    tokens: int
    rows: int
    wrong: float = 0.0

    def draw(self, generator: np.random.Generator) -> Tensor:
        """Ids [rows, T] of a batch."""
        rows, most = self.rows, self.most_things
        chunks = (self.tokens - 1) // CHUNK_TOKENS
        things = LETTERS[generator.random((rows, len(LETTERS))).argsort(-1)[:, :most]]
        names = generator.choice(TRAINING_NAMES, (rows, most))
        count = generator.integers(2, most + 1, (rows, 1))
        which = (generator.random((rows, chunks)) * count).astype(int)
        told = np.take_along_axis(things, which, 1)
        swapped = generator.random(told.shape) < self.wrong
        told = np.where(swapped, generator.choice(LETTERS, told.shape), told)
        return bound_chunks(told, np.take_along_axis(names, which[..., None], 1))


def prose(generator: np.random.Generator, rows: int, tokens: int) -> Tensor:
    """Ids [rows, tokens] of words of a fixed made-up lexicon, in random order."""
    drawn = generator.integers(len(_LEXICON), size=(rows, tokens))
    text = (b" ".join(_LEXICON[word] for word in row)[: tokens - 1] for row in drawn)
    return torch.tensor([[TOKENS.bos_token_id, *row] for row in text])


def repetition(generator: np.random.Generator, rows: int, tokens: int) -> Tensor:
    """Ids [rows, tokens], a random string again and again: what teaches to copy soonest."""
    ids = np.full((rows, tokens), TOKENS.bos_token_id)
    for row in ids:
        some = generator.permutation(_CHARACTERS)[: generator.integers(3, len(_CHARACTERS) + 1)]
        once = generator.choice(some, generator.integers(4, tokens // 3))
        row[1:] = np.resize(once, tokens - 1)
    return torch.from_numpy(ids)


@dataclass(frozen=True)
class Lesson:
    """What a batch holds: documents that bind, and rows of other text beside them."""

    bound: Documents
    prose: int = 0
    repetition: int = 0

    def draw(self, generator: np.random.Generator) -> Tensor:
        """Ids [rows, T]."""
        ids = self.bound.draw(generator)
        tokens = ids.shape[1]
        others = (
            make(generator, rows, tokens)
            for make, rows in ((prose, self.prose), (repetition, self.repetition))
            if rows
        )
        return torch.cat((ids, *others))


CONFIG = DecoderConfig(vocab_size=TOKENS.vocab_size, dim=64, depth=2, heads=4, head_dim=32)
# Each from this share of the updates on: short text until the model copies, at the end documents as
# long as five classes of 32 examples make.
_COURSE = (
    (0.0, Lesson(Documents(4, tokens=81, rows=8), prose=2, repetition=4)),
    (0.4, Lesson(Documents(6, tokens=161, rows=6, wrong=0.1), repetition=2)),
    (0.8, Lesson(Documents(6, tokens=806, rows=2, wrong=0.1))),
)
# The decoder's initial deviation of 0.02 is for wide models.
_INITIAL_SCALE = 3.0
_LEARNING_RATE, _WARM_UP, _DECAY_FROM = 6e-3, 100, 0.6
_BETAS, _WEIGHT_DECAY, _CLIP = (0.9, 0.98), 0.01, 1.0


def train_language_model(updates: int, seed: int) -> Decoder:
    """A decoder trained to predict all of the text."""
    torch.manual_seed(seed)
    model = Decoder(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(_INITIAL_SCALE)
        # What all tokens have in common lets attention go by position alone from the start.
        tokens = model.token_embedding.weight
        tokens += tokens.std() * torch.randn(CONFIG.dim)
    optimizer = torch.optim.AdamW(model.parameters(), betas=_BETAS, weight_decay=_WEIGHT_DECAY)
    progress = Progress("language model", updates)
    for step in progress:
        done = step / updates
        lesson = [lesson for start, lesson in _COURSE if start < done][-1]
        ids = lesson.draw(np.random.default_rng([seed, step]))
        loss = next_token_loss(model(ids).logits, ids)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        decay = min(1.0, max(0.05, (1 - done) / (1 - _DECAY_FROM)))
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * min(1, step / _WARM_UP) * decay
        optimizer.step()
        progress.note = f"loss {loss.item():.3f}"
    return model
