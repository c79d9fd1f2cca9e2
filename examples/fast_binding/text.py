"""Text alone: made-up names bound to things within a document, and the language model of it.

A thing is told by a few capital letters, and a document says again and again what it is called:
``BQTdax<EOC>CFWwug<EOC>BQTdax<EOC>...``. Now and then a letter is wrong. Names mean nothing
outside their document, so all that a model can learn is to bind them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from examples.fast_binding.progress import Progress
from flamingo_kernels.language import ByteTokenizer
from flamingo_kernels.language.config import DecoderConfig
from flamingo_kernels.language.decoder import Decoder
from flamingo_kernels.model.loss import next_token_loss

TOKENS = ByteTokenizer()
LETTERS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXY", np.uint8).astype(np.int64)
MOST_LETTERS = 3
_CONSONANTS, _VOWELS = b"bdfgklmnprstvz", b"aeiou"
_ALL_NAMES = np.array([[a, b, c] for a in _CONSONANTS for b in _VOWELS for c in _CONSONANTS])
# Every tenth name is kept for evaluation.
_HELD_OUT = np.arange(len(_ALL_NAMES)) % 10 == 0
TRAINING_NAMES, HELD_OUT_NAMES = _ALL_NAMES[~_HELD_OUT], _ALL_NAMES[_HELD_OUT]


def bound_chunks(things: np.ndarray, names: np.ndarray) -> Tensor:
    """Ids of ``<BOS>`` and chunks ``thing=name<EOC>``: things [B, N, L], names [B, N, 3]."""
    rows, chunks, _ = things.shape
    end = np.full((rows, chunks, 1), TOKENS.end_of_chunk_token_id)
    ids = np.concatenate((things, names, end), 2).reshape(rows, -1)
    start = np.full((rows, 1), TOKENS.bos_token_id)
    return torch.from_numpy(np.concatenate((start, ids), 1))


def text_documents(
    generator: np.random.Generator, rows: int, chunks: int, letters: int, wrong: float
) -> Tensor:
    """Ids [rows, T] of documents about two to six things each.

    Parameters
    ----------
    chunks : times that a document says what something is called.
    letters : that tell a thing.
    wrong : probability that a letter is another one.
    """
    most = 6
    # Things of a document differ in their first letter, so that none is told as another.
    first = generator.random((rows, len(LETTERS))).argsort(-1)[:, :most, None]
    others = generator.integers(len(LETTERS), size=(rows, most, letters - 1))
    things = np.concatenate((first, others), 2)
    which = (generator.random((rows, chunks)) * generator.integers(2, most + 1, (rows, 1))).astype(
        int
    )
    names = generator.choice(TRAINING_NAMES, (rows, most))
    told = np.take_along_axis(things, which[..., None], 1)
    swapped = generator.random(told.shape) < wrong
    told = np.where(swapped, generator.integers(len(LETTERS), size=told.shape), told)
    return bound_chunks(LETTERS[np.sort(told)], np.take_along_axis(names, which[..., None], 1))


CONFIG = DecoderConfig(vocab_size=TOKENS.vocab_size, dim=128, depth=4, heads=4, head_dim=32)
# The decoder's initial deviation of 0.02 is for wide models: 0.06 learns to bind several times
# sooner at width 128.
_INITIAL_SCALE = 3.0
_LEARNING_RATE, _WARM_UP = 2e-3, 100
# Chunks and rows of a batch from each part of the training on: short documents first, at the end as
# long ones as 5 classes of 32 examples make.
_LENGTHS = ((0.0, 14, 16), (0.75, 28, 8), (0.9, 110, 2))
_CLEAN_UNTIL, WRONG = 0.3, 0.15
_DECAY_FROM = 0.6


def train_language_model(updates: int, seed: int) -> Decoder:
    """A decoder trained on :func:`text_documents`, frozen."""
    torch.manual_seed(seed)
    model = Decoder(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(_INITIAL_SCALE)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    progress = Progress("language model", updates)
    for step in progress:
        done = step / updates
        generator = np.random.default_rng([seed, step])
        _, chunks, rows = max(part for part in _LENGTHS if part[0] <= done)
        letters = int(generator.integers(1, MOST_LETTERS + 1))
        wrong = WRONG if letters > 1 and done > _CLEAN_UNTIL else 0.0
        ids = text_documents(generator, rows, chunks, letters, wrong)
        loss = next_token_loss(model(ids).logits, ids)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        decay = min(1.0, max(0.05, (1 - done) / (1 - _DECAY_FROM)))
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * min(1, step / _WARM_UP) * decay
        optimizer.step()
        progress.note = f"loss {loss.item():.3f}"
    return model.eval().requires_grad_(False)
