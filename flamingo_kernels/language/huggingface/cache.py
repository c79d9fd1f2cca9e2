"""transformers' caches as caches of a ``LanguageModel``."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

# What a forward of transformers calls its cache: up to 5.23, and from 5.24 on.
CACHE_NAMES = ("past_key_values", "cache")


class HuggingFaceCache:
    """A transformers ``Cache`` as a ``LanguageModelCache``.

    Attributes
    ----------
    past_key_values : transformers.Cache
        The wrapped cache, for transformers' own functions.
    masked : bool
        Whether an attention mask came with the tokens that it holds.
    """

    def __init__(self, past_key_values: Any, masked: bool) -> None:
        self.past_key_values = past_key_values
        self.masked = masked

    @property
    def length(self) -> int:
        """Tokens held per row, padding included."""
        return cached_tokens(self.past_key_values)

    def index_select(self, rows: Tensor) -> HuggingFaceCache:
        """Return a separate cache whose row i is row ``rows[i]`` of this one."""
        selected = copy.copy(self.past_key_values)
        # Reordering puts new tensors into the layer objects, so those are copied first.
        selected.layers = [copy.copy(layer) for layer in selected.layers]
        selected.reorder_cache(rows)
        return HuggingFaceCache(selected, self.masked)


def cache_name(model: nn.Module) -> str | None:
    """Return the name under which the forward of ``model`` takes its cache; None if it has none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """Return the transformers cache among the keyword arguments of a forward, or None."""
    return _first_of(arguments.get(name) for name in CACHE_NAMES)


def returned_cache(output: Any) -> Any:
    """Return the transformers cache in what a forward or a generation gave, or None."""
    # The older name last: reading it where it is deprecated logs a warning.
    return _first_of(getattr(output, name, None) for name in reversed(CACHE_NAMES))


def _first_of(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def cached_tokens(cache: Any) -> int:
    """Return the tokens per row in a transformers cache; RuntimeError if it does not say."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"a cache of type {type(cache).__name__} does not say how many tokens it holds "
            f"(get_seq_length: {error}): use this language model with use_cache=False only"
        ) from error
