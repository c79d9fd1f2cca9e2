"""Activation checkpointing of decoder blocks: keep their inputs, recompute the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flamingo_kernels.language.decoder import DecoderCache


class _CheckpointedForward:
    """Replaces the ``forward`` of one block; holds nothing about a call."""

    def __init__(self, block: nn.Module, use_reentrant: bool) -> None:
        self.own = block.__dict__.get("forward")
        self.forward = block.forward
        self.use_reentrant = use_reentrant

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        needs_grad = isinstance(hidden, Tensor) and hidden.requires_grad
        if not (needs_grad and torch.is_grad_enabled()) or _extends_cache(args, kwargs):
            return self.forward(*args, **kwargs)

        def run(x: Tensor) -> Any:
            if args:
                return self.forward(x, *args[1:], **kwargs)
            return self.forward(**{**kwargs, "hidden_states": x})

        return checkpoint(run, hidden, use_reentrant=self.use_reentrant)


def checkpoint_blocks(blocks: Iterable[nn.Module], use_reentrant: bool | None) -> None:
    """Checkpoint the activations of ``blocks`` from now on.

    It works in evaluation mode too, because a frozen model stays there while other parts train. A
    call that fills a cache is not checkpointed. What runs before a block, such as a pre-hook, is
    not recomputed.

    Parameters
    ----------
    blocks : iterable of nn.Module
        The blocks, whose first argument or ``hidden_states`` is their input.
    use_reentrant : bool or None
        Mode of ``torch.utils.checkpoint``. None restores the blocks as they were.
    """
    for block in blocks:
        held = block.__dict__.get("forward")
        if isinstance(held, _CheckpointedForward):
            del block.forward
            if held.own is not None:
                block.forward = held.own
        if use_reentrant is not None:
            block.forward = _CheckpointedForward(block, use_reentrant)


def _extends_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a block was given a cache, which a recomputation would extend twice.

    transformers hands its own caches to its blocks, under a name that depends on the architecture;
    ``get_seq_length`` is common to all of them.
    """
    return any(
        isinstance(value, DecoderCache) or hasattr(value, "get_seq_length")
        for value in (*args, *kwargs.values())
    )
