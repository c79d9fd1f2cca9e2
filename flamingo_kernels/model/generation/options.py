"""Options of a generation: what is allowed, and what would be ignored or fail silently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flamingo_kernels.fields import is_integer
from flamingo_kernels.model.config import FlamingoConfig
from flamingo_kernels.model.generation.sampling import Sampling, check_count
from flamingo_kernels.model.stops import default_stops

# Options of transformers' generate that would be overwritten here or break a promise.
_REFUSED = {
    "eos_token_id": "say stop_token_ids= instead",
    "pad_token_id": "the model's config has it; what ends a row is stop_token_ids=",
    "generation_config": "give its options one by one; what ends a row is stop_token_ids=",
    "max_length": "say max_new_tokens= instead",
    "past_key_values": "say cache= instead, which holds the media too",
    "inputs_embeds": "images are counted in input_ids",
    **dict.fromkeys(
        ("guidance_scale", "negative_prompt_ids", "negative_prompt_attention_mask"),
        "the second prompt that it runs has no images and no cache here",
    ),
}
# These end rows at places that the tokens alone do not show.
_ENDS = ("stopping_criteria", "stop_strings", "max_time")


class Streamer(Protocol):
    """Receives tokens while they are generated; ``TextStreamer`` of transformers is one."""

    def put(self, value: Tensor) -> None:
        """Receive the prompt [B, T], and then the tokens [B] of each step, on the CPU."""

    def end(self) -> None:
        """Learn that the generation has ended."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to continue prompts; checked on construction.

    Attributes
    ----------
    max_new_tokens : int
        Upper bound on new tokens.
    sampling : Sampling or None
        Draw tokens from this distribution. None: take the most likely ones.
    generator : torch.Generator, optional
        Source of randomness.
    num_beams : int
        Beams kept per prompt; 1: no beam search.
    num_return_sequences : int
        Sequences per prompt.
    stop_token_ids : tuple of int
        Each of them ends a row.
    use_cache : bool
        False recomputes the whole sequence at every step.
    return_cache : bool
        Whether the cache is wanted for another turn.
    prefill_chunk_size : int, optional
        Read the prompt in pieces of this many tokens.
    streamer : Streamer, optional
        Gets the tokens step by step.
    transformers : dict
        Further options of the ``generate`` of transformers.

    Raises
    ------
    TypeError, ValueError
        An option of another type or out of range, or options that exclude each other.
    """

    max_new_tokens: int = 20
    sampling: Sampling | None = None
    generator: torch.Generator | None = None
    num_beams: int = 1
    num_return_sequences: int = 1
    stop_token_ids: tuple[int, ...] = ()
    use_cache: bool = True
    return_cache: bool = False
    prefill_chunk_size: int | None = None
    streamer: Streamer | None = None
    transformers: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
            check_count(name, getattr(self, name))
        if self.prefill_chunk_size is not None:
            check_count("prefill_chunk_size", self.prefill_chunk_size)
        check_transformers_options(self.transformers, self.return_cache)
        if self.return_cache and (self.num_beams > 1 or not self.use_cache):
            raise ValueError("return_cache needs num_beams=1 and use_cache=True")

    def stops(self, device: torch.device) -> Tensor:
        """Return the stop tokens, int64."""
        return torch.tensor(self.stop_token_ids, dtype=torch.int64, device=device)


def choose_stops(
    stop_token_ids: Sequence[int] | None, config: FlamingoConfig, language_model: nn.Module
) -> tuple[int, ...]:
    """Return the stop tokens that were given, or :func:`default_stops`.

    Raises
    ------
    TypeError, ValueError
        They are not ids of the vocabulary.
    """
    vocab_size = config.language.vocab_size
    if stop_token_ids is None:
        return default_stops(config, language_model)
    if not isinstance(stop_token_ids, Sequence) or not all(map(is_integer, stop_token_ids)):
        raise TypeError(f"stop_token_ids must be a sequence of ints, got {stop_token_ids!r}")
    for token in stop_token_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"stop_token_ids holds {token}, outside the vocabulary 0..{vocab_size - 1}"
            )
    return tuple(stop_token_ids)


def check_transformers_options(options: Mapping[str, Any], return_cache: bool) -> None:
    """Raise ValueError, naming it, for an option of transformers that cannot be honoured."""
    given = {name for name, value in options.items() if value is not None}
    for name, why in _REFUSED.items():
        if name in given:
            raise ValueError(f"generate does not take {name}: {why}")
    if not return_cache:
        return
    for name in _ENDS:
        if name in given:
            raise ValueError(
                f"return_cache does not go with {name}={options[name]!r}: which tokens are padding "
                "would not be known"
            )
    kind = options.get("cache_implementation")
    if kind not in (None, "dynamic"):
        raise ValueError(
            f"return_cache does not go with cache_implementation={kind!r}: the cache of a turn has "
            "to grow"
        )
    if options.get("return_dict_in_generate"):
        raise ValueError(
            "return_cache and return_dict_in_generate both change what is returned: choose one"
        )


def check_own_defaults(generation_config: Any, options: GenerationOptions) -> None:
    """Raise ValueError for a default of the language model that cannot be honoured.

    Parameters
    ----------
    generation_config : transformers.GenerationConfig or None
        The language model's own, which ``generate`` of transformers reads.
    options : GenerationOptions
        What was asked for; its values come before the defaults.
    """
    names = ("guidance_scale", "cache_implementation", *_ENDS)
    own = {name: getattr(generation_config, name, None) for name in names}
    if own["guidance_scale"] == 1:  # no guidance
        own["guidance_scale"] = None
    if own["cache_implementation"] == "hybrid":  # transformers takes a dynamic one
        own["cache_implementation"] = None
    own = {name: value for name, value in own.items() if name not in options.transformers}
    try:
        check_transformers_options(own, options.return_cache)
    except ValueError as error:
        raise ValueError(
            f"{error}; it is in the language model's own generation_config: set it to None there"
        ) from None
