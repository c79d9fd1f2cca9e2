"""Activation checkpointing of decoder blocks: keep their inputs, compute the rest again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class _CheckpointedForward:
    """Stands in for the `forward` of one block; holds nothing about a call."""

    def __init__(self, block: nn.Module, use_reentrant: bool) -> None:
        self.own = block.__dict__.get("forward")
        self.forward = block.forward
        self.use_reentrant = use_reentrant

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        # Running again would extend a cache twice.
        caches = any(_is_cache(value) for value in (*args, *kwargs.values()))
        if caches or not (torch.is_grad_enabled() and isinstance(hidden, Tensor)):
            return self.forward(*args, **kwargs)
        if not hidden.requires_grad:
            return self.forward(*args, **kwargs)

        def run(x: Tensor) -> Any:
            if args:
                return self.forward(x, *args[1:], **kwargs)
            return self.forward(**{**kwargs, "hidden_states": x})

        return checkpoint(run, hidden, use_reentrant=self.use_reentrant)


def checkpoint_blocks(blocks: Iterable[nn.Module], use_reentrant: bool | None) -> None:
    """Start to checkpoint `blocks` in that mode; None: stop, and leave no trace.

    It works in evaluation mode too, in which a frozen model stays while others train around it.
    What runs before a block, a pre-hook say, is not computed again.
    """
    for block in blocks:
        held = block.__dict__.get("forward")
        if isinstance(held, _CheckpointedForward):
            del block.forward
            if held.own is not None:
                block.forward = held.own
        if use_reentrant is not None:
            block.forward = _CheckpointedForward(block, use_reentrant)


def _is_cache(value: object) -> bool:
    return hasattr(value, "get_seq_length")
