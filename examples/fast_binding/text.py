"""Text alone: made-up names bound to things within a document, and the language model of it.

A thing is one token. A document repeats the names of a few things:
``(17)dax<EOC>(402)wug<EOC>(17)dax<EOC>...``. Sometimes the thing is a wrong one. A name means
nothing outside its document, so a model can only learn to bind names to things.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from examples.fast_binding.progress import Progress
from flamingo_kernels.data.samples import IGNORED_LABEL
from flamingo_kernels.language import ByteTokenizer
from flamingo_kernels.language.config import DecoderConfig
from flamingo_kernels.language.decoder import Decoder
from flamingo_kernels.model.loss import next_token_loss

TOKENS = ByteTokenizer()
# Tokens of things come after those of the tokenizer. They are so numerous that the model must learn
# to compare them as vectors, which works for pictures too.
_THINGS = 512
_CONSONANTS, _VOWELS = b"bdfgklmnprstvwxz", b"aeiou"
_ALL_NAMES = np.array([[a, b, c] for a in _CONSONANTS for b in _VOWELS for c in _CONSONANTS])
CHUNK_TOKENS = 5  # a thing, the letters of its name, <EOC>
# Every tenth name is kept for evaluation.
_HELD_OUT = np.arange(len(_ALL_NAMES)) % 10 == 0
TRAINING_NAMES, HELD_OUT_NAMES = _ALL_NAMES[~_HELD_OUT], _ALL_NAMES[_HELD_OUT]


def bound_chunks(things: np.ndarray, names: np.ndarray) -> Tensor:
    """Return ids of ``<BOS>`` and chunks ``thing name<EOC>``: things [B, N], names [B, N, 3]."""
    end = np.full_like(things, TOKENS.end_of_chunk_token_id)
    ids = np.concatenate((things[..., None], names, end[..., None]), 2).reshape(len(things), -1)
    start = np.full((len(things), 1), TOKENS.bos_token_id)
    return torch.from_numpy(np.concatenate((start, ids), 1))


@dataclass(frozen=True)
class Documents:
    """Sizes of the documents of a batch.

    Attributes
    ----------
    most_things : int
        A document has from two up to this many things.
    tokens : int
        The longest document, in tokens.
    rows : int
        Documents in a batch.
    wrong : float
        Probability that a thing is replaced by any other one.
    """

    most_things: int
    tokens: int
    rows: int
    wrong: float = 0.0

    def draw(self, generator: np.random.Generator) -> Tensor:
        """Return the ids [rows, T] of a batch."""
        rows, most = self.rows, self.most_things
        chunks = (self.tokens - 1) // CHUNK_TOKENS
        things = generator.integers(_THINGS, size=(rows, most))
        names = generator.choice(TRAINING_NAMES, (rows, most))
        count = generator.integers(2, most + 1, (rows, 1))
        which = (generator.random((rows, chunks)) * count).astype(int)
        told = np.take_along_axis(things, which, 1)
        swapped = generator.random(told.shape) < self.wrong
        told = np.where(swapped, generator.integers(_THINGS, size=told.shape), told)
        first = TOKENS.vocab_size
        return bound_chunks(first + told, np.take_along_axis(names, which[..., None], 1))


CONFIG = DecoderConfig(
    vocab_size=TOKENS.vocab_size + _THINGS, dim=64, depth=2, heads=4, head_dim=32
)
# Share of the updates at which each begins: short text until the model copies, and at the end
# documents as long as five classes of 32 examples.
_COURSE = (
    (0.0, Documents(4, tokens=31, rows=96)),
    (0.3, Documents(6, tokens=161, rows=18, wrong=0.1)),
    (0.8, Documents(6, tokens=806, rows=4, wrong=0.1)),
)
# The decoder's initial standard deviation of 0.02 suits wide models.
_INITIAL_SCALE = 3.0
_MATRIX_LEARNING_RATE, _LEARNING_RATE, _WARM_UP, _DECAY_FROM = 2e-2, 3e-3, 100, 0.6
_NOISE = 1.0
_BETAS, _WEIGHT_DECAY, _CLIP = (0.9, 0.98), 0.01, 1.0


def _things(embeddings: Tensor) -> Tensor:
    return embeddings.detach()[TOKENS.vocab_size :]


def _with_noise(module: nn.Embedding, ids: tuple[Tensor], embedded: Tensor) -> Tensor:
    """Add noise to all embeddings (as NEFTune, arXiv 2310.05914), scaled by how things differ.

    The model then takes a vector near a thing for that thing, and recognises tokens to which
    something was added.
    """
    things = _things(module.weight)
    return embedded + _NOISE * (things - things.mean(0)).std() * torch.randn_like(embedded)


def train_language_model(updates: int, seed: int, device: str) -> Decoder:
    """Train a decoder to predict all of the text but the things, which are unpredictable.

    Its matrices are trained by Muon, under which it learns to copy much sooner than under AdamW.
    """
    torch.manual_seed(seed)
    model = Decoder(CONFIG)
    embeddings = model.token_embedding.weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(_INITIAL_SCALE)
        # A part that all tokens share lets attention go by position alone from the start.
        embeddings += embeddings.std() * torch.randn(CONFIG.dim)
    model.to(device)
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embeddings]
    others = [embeddings, *(p for p in model.parameters() if p.ndim < 2)]
    optimizers = (
        torch.optim.Muon(matrices, lr=_MATRIX_LEARNING_RATE, weight_decay=_WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=_LEARNING_RATE, betas=_BETAS, weight_decay=_WEIGHT_DECAY),
    )

    def share(step: int) -> float:
        decayed = (1 - step / updates) / (1 - _DECAY_FROM)
        return min(1, (step + 1) / _WARM_UP, max(0.05, decayed))

    schedules = [torch.optim.lr_scheduler.LambdaLR(each, share) for each in optimizers]
    noise = model.token_embedding.register_forward_hook(_with_noise)
    progress = Progress("language model", updates)
    for step in progress:
        documents = [documents for start, documents in _COURSE if start < step / updates][-1]
        ids = documents.draw(np.random.default_rng([seed, step])).to(device)
        labels = ids.where(ids < TOKENS.vocab_size, IGNORED_LABEL)
        loss = next_token_loss(model(ids).logits, labels)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        for each in (*optimizers, *schedules):
            each.step()
        progress.note = f"loss {loss.item():.3f}"
    noise.remove()
    with torch.no_grad():  # no text has images; they will take the place of things
        embeddings[TOKENS.image_token_id] = _things(embeddings).mean(0)
    return model.cpu()
