"""transformers' caches as caches of a ``LanguageModel``."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor


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


def cached_tokens(cache: Any) -> int:
    """Return the tokens per row in a transformers cache; RuntimeError if it does not say."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"a cache of type {type(cache).__name__} does not say how many tokens it holds "
            f"(get_seq_length: {error}): use this language model with use_cache=False only"
        ) from error
