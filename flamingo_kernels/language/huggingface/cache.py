"""transformers' caches as caches of a ``LanguageModel``."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
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
        """Return a separate cache whose row i is row ``rows[i]`` of this one.

        RuntimeError if the cache of transformers selects only some of its tensors.
        """
        return HuggingFaceCache(selected_rows(self.past_key_values, rows), self.masked)


def selected_rows(cache: Any, rows: Tensor) -> Any:
    """Return a separate transformers cache of these rows, as ``index_select`` does."""
    reasons = []
    for method in ("reorder_cache", "batch_select_indices"):
        selected = separate(cache)
        try:
            getattr(selected, method)(rows)
        except (AttributeError, NotImplementedError) as error:
            reasons.append(f"{method}: {error}")
            continue
        left = _shared_tensors(selected, cache)
        if not left:
            return selected
        reasons.append(f"{method} leaves out {left}")
    raise RuntimeError(
        f"a cache of type {type(cache).__name__} cannot select rows ({'; '.join(reasons)}): decode "
        "each row by itself"
    )


def check_reorders(cache: Any) -> None:
    """Raise RuntimeError unless ``cache.reorder_cache`` (beam search) moves all of its tensors."""
    selected = separate(cache)
    selected.reorder_cache(torch.empty(0, dtype=torch.int64))
    if left := _shared_tensors(selected, cache):
        raise RuntimeError(
            f"a cache of type {type(cache).__name__} cannot follow beams: its reorder_cache leaves "
            f"out {left}; decode with num_beams=1 or use_cache=False"
        )


def separate(value: Any) -> Any:
    """Copy caches, their layers and containers, but no tensors, save counters of one number."""
    if isinstance(value, Tensor):
        return value.clone() if value.ndim == 0 else value
    if isinstance(value, (list, tuple)):
        return type(value)(separate(entry) for entry in value)
    if type(value) is dict:
        return {key: separate(entry) for key, entry in value.items()}
    if not _is_cache(value):
        return value
    twin = copy.copy(value)
    vars(twin).update({name: separate(entry) for name, entry in vars(value).items()})
    return twin


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a cache with the attribute that each lies in."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from named_tensors(entry, name)
    elif type(value) is dict:
        for entry in value.values():
            yield from named_tensors(entry, name)
    elif _is_cache(value):
        # Quantised layers reorder when they are read next.
        if getattr(value, "_pending_beam_idx", None) is None:
            for attribute, entry in vars(value).items():
                yield from named_tensors(entry, attribute)


def _is_cache(value: Any) -> bool:
    """Whether ``value`` is a cache or a layer of one."""
    return hasattr(value, "reorder_cache") and not isinstance(value, type)


def _shared_tensors(one: Any, other: Any) -> list[str]:
    """Return the attributes of cache ``one`` that hold tensors of ``other`` with numbers."""
    known = {id(tensor) for _, tensor in named_tensors(other)}
    return sorted({n for n, t in named_tensors(one) if id(t) in known and t.numel()})


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
