"""Options of ``generate``: what is allowed, and what would be ignored or go wrong unseen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from flamingo_kernels.fields import is_integer, is_number
from flamingo_kernels.model.config import FlamingoConfig

# Logits over anything smaller may overflow float32.
LEAST_TEMPERATURE = 1e-4
# Options of transformers' generate that would be overwritten here or break what is promised.
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
# These end rows at places that cannot be told from the tokens alone.
_ENDS = ("stopping_criteria", "stop_strings", "max_time")


def check_foreign(options: Mapping[str, Any], return_cache: bool) -> None:
    """Raise ValueError, naming it, for an option of transformers' that cannot be honoured."""
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


def default_stops(config: FlamingoConfig, language_model: nn.Module) -> list[int]:
    """End of chunk, and every id that the config and the language model's own end a text with."""
    found = (config.end_of_chunk_token_id, config.eos_token_id)
    found += tuple(getattr(language_model, "eos_token_ids", ()))
    known = range(config.language.vocab_size)
    return [token for token in dict.fromkeys(found) if token in known]


def check_options(temperature: float, top_p: float | None, **counts: int | None) -> None:
    """Raise TypeError or ValueError, naming the option, unless all are of their kind and range."""
    for name, value in counts.items():
        if value is None and name in ("top_k", "prefill_chunk_size"):
            continue
        if not is_integer(value):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if not (is_number(value) or (value is None and name == "top_p")):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not LEAST_TEMPERATURE <= temperature < float("inf"):
        raise ValueError(
            f"temperature must be finite and at least {LEAST_TEMPERATURE}, got {temperature}"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def check_stops(stop_token_ids: Sequence[int] | None, vocab_size: int) -> None:
    """Raise TypeError or ValueError unless they are ids of the vocabulary."""
    if stop_token_ids is None:
        return
    if not isinstance(stop_token_ids, Sequence) or not all(map(is_integer, stop_token_ids)):
        raise TypeError(f"stop_token_ids must be a sequence of ints, got {stop_token_ids!r}")
    for token in stop_token_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"stop_token_ids holds {token}, outside the vocabulary 0..{vocab_size - 1}"
            )
