"""Recurrent and convolution states in caches: what a language model must do with them.

A state sums up all tokens of a row. Unlike keys, it cannot be masked afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flamingo_kernels.language.huggingface.cache import check_reorders, named_tensors, selected_rows

# Attributes of the caches of transformers.
_STATES = ("conv_states", "recurrent_states", "ssm_states", "linear_cache")
# Those into which a model of transformers puts padding too, once they hold tokens.
_FILLED_BY_PADDING = _STATES[:3]


class StateChecks:
    """Whether a model can go on from a cache of given tokens; what was found once is remembered."""

    def __init__(self) -> None:
        self._has_states: bool | None = None  # None: no cache with tokens has been seen
        self._continues = False

    def __call__(
        self, model: nn.Module, cache: Any, name: str, input_ids: Tensor, mask: Tensor | None
    ) -> None:
        """Raise RuntimeError, with the reason, if the states of a row would go wrong.

        No hook of a call in progress may change ``model``.

        Parameters
        ----------
        model : nn.Module
            The language model.
        cache : transformers.Cache
            What it goes on from; it is not changed.
        name : str
            Name under which ``model`` takes it.
        input_ids : Tensor
            Integer [B, T], the new tokens.
        mask : Tensor or None
            [B, held + T], nonzero at real tokens.
        """
        if self._has_states is False:
            return
        states = {attribute for attribute, _ in named_tensors(cache) if attribute in _STATES}
        self._has_states = bool(states)
        if mask is not None and states.intersection(_FILLED_BY_PADDING):
            _check_padding(model, mask, input_ids.shape[1])
        if states and input_ids.shape[1] > 1 and not self._continues:
            _check_reads_states(model, cache, name, input_ids)
            self._continues = True


def check_beams(model: nn.Module, cache: Any) -> None:
    """Raise RuntimeError unless everything that ``model`` keeps of the tokens can follow beams."""
    held = {name for module in model.modules() for name in _STATES if _holds(module, name)}
    if held:
        raise RuntimeError(
            f"{type(model).__name__} keeps its {', '.join(sorted(held))} in itself and not in its "
            "cache, so they cannot follow beams: decode with num_beams=1 or use_cache=False"
        )
    check_reorders(cache)


def _holds(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), Tensor)


def _check_padding(model: nn.Module, mask: Tensor, count: int) -> None:
    """Raise RuntimeError if padding goes into the states of a row before a real new token."""
    real = mask != 0
    new = torch.arange(mask.shape[1], device=mask.device) >= mask.shape[1] - count
    begun = real.cumsum(1) > 0
    goes_on = (real & new).flip(1).cumsum(1).flip(1) > 0
    wrong = (~real & ((begun & goes_on) | (~begun & new))).any(1)
    if wrong.any():
        raise RuntimeError(
            f"rows {wrong.nonzero()[:, 0].tolist()} of a cache go on after padding, but the "
            f"recurrent states of {type(model).__name__} take in padding like text: continue rows "
            "of one length together, each other row by itself, or read all of the text at once"
        )


@torch.no_grad()
def _check_reads_states(model: nn.Module, cache: Any, name: str, input_ids: Tensor) -> None:
    """Raise RuntimeError if ``model`` forgets its states when it reads several tokens at once.

    It reads two tokens after the first row, with the states and with zeros in their place. A state
    that changes what is read token by token, but not what is read at once, is forgotten.
    """

    def logits(zeroed: str | None, step: int) -> Tensor:
        first = selected_rows(cache, torch.zeros(1, dtype=torch.int64, device=input_ids.device))
        for attribute, state in named_tensors(first):
            if attribute == zeroed:
                state.zero_()
        steps = [
            model(input_ids=input_ids[:1, at : at + step], use_cache=True, **{name: first}).logits
            for at in range(0, 2, step)
        ]
        return torch.cat(steps, 1)

    plain = {step: logits(None, step) for step in (1, 2)}
    states = sorted({attribute for attribute, _ in named_tensors(cache) if attribute in _STATES})
    forgotten = [
        state
        for state in states
        if torch.equal(logits(state, 2), plain[2]) and not torch.equal(logits(state, 1), plain[1])
    ]
    if forgotten:
        raise RuntimeError(
            f"{type(model).__name__} forgets its {', '.join(forgotten)} when it reads several "
            "tokens after a cache: read all of the text at once, without a cache of earlier turns "
            "and without prefill_chunk_size"
        )
