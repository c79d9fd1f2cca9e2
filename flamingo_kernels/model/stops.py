"""The tokens that end a text: where decoding stops, and what the loss must therefore teach."""

from __future__ import annotations

from torch import nn

from flamingo_kernels.model.config import FlamingoConfig


def default_stops(config: FlamingoConfig, language_model: nn.Module) -> tuple[int, ...]:
    """Return end of chunk, and every id that the model's configurations end a text with."""
    ends = (config.end_of_chunk_token_id, config.eos_token_id)
    ends += tuple(getattr(language_model, "eos_token_ids", ()))
    vocabulary = range(config.language.vocab_size)
    return tuple(t for t in dict.fromkeys(ends) if t is not None and t in vocabulary)
