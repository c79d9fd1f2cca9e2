"""Activation checkpointing of decoder blocks: keep their inputs, recompute the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from flamingo_kernels.fields import is_integer
from flamingo_kernels.language.decoder import DecoderCache

_REENTRANT_OPTIONS = ("use_reentrant", "preserve_rng_state")  # all that the re-entrant mode takes
_OPTIONS = (*_REENTRANT_OPTIONS, "context_fn", "determinism_check", "debug", "early_stop")
_FLAGS = ("use_reentrant", "preserve_rng_state", "debug", "early_stop")


@dataclass(frozen=True)
class Recompute:
    """What is recomputed in the backward, and how.

    Attributes
    ----------
    options : mapping
        Keywords of ``torch.utils.checkpoint.checkpoint``; ``use_reentrant`` is False by default.
    every_n_layers : int
        Layers 0, n, 2n, ... are recomputed.
    offload : bool
        The inputs that are kept are held in the memory of the host.

    Raises
    ------
    TypeError, ValueError
        An option that this version of torch or this mode does not take, or a value of it.
    """

    options: Mapping[str, Any]
    every_n_layers: int = 1
    offload: bool = False

    def __post_init__(self) -> None:
        options = {"use_reentrant": False, **self.options}
        object.__setattr__(self, "options", options)
        if not is_integer(self.every_n_layers) or self.every_n_layers < 1:
            raise ValueError(
                f"every_n_layers must be an integer of at least 1, got {self.every_n_layers!r}"
            )
        for name, value in {"offload": self.offload, **options}.items():
            if name in (*_FLAGS, "offload") and not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        known = _known_options(options["use_reentrant"])
        unknown = sorted(set(options) - set(known))
        if unknown:
            mode = f"use_reentrant={options['use_reentrant']}"
            raise ValueError(
                f"unknown checkpointing options {unknown}; with {mode}: {', '.join(known)}"
            )

    def covers(self, layer: int) -> bool:
        """Whether a layer is recomputed."""
        return layer % self.every_n_layers == 0

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Return ``function(*inputs)`` and keep the inputs only; the first one is a tensor."""
        holds = save_on_cpu(pin_memory=inputs[0].is_cuda) if self.offload else nullcontext()
        with holds:
            return checkpoint(function, *inputs, **self.options)


def _known_options(use_reentrant: bool) -> list[str]:
    given = {"preserve_rng_state", *signature(checkpoint).parameters}
    return [name for name in (_REENTRANT_OPTIONS if use_reentrant else _OPTIONS) if name in given]


class _CheckpointedForward:
    """Replaces the ``forward`` of one block; holds nothing about a call."""

    def __init__(self, block: nn.Module, recompute: Recompute) -> None:
        self.own = block.__dict__.get("forward")
        self.forward = block.forward
        self.recompute = recompute

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        needs_grad = isinstance(hidden, Tensor) and hidden.requires_grad
        if not (needs_grad and torch.is_grad_enabled()) or _extends_cache(args, kwargs):
            return self.forward(*args, **kwargs)

        def run(x: Tensor) -> Any:
            if args:
                return self.forward(x, *args[1:], **kwargs)
            return self.forward(**{**kwargs, "hidden_states": x})

        return self.recompute.run(run, hidden)


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
    recompute_blocks(
        blocks, None if use_reentrant is None else Recompute({"use_reentrant": use_reentrant})
    )


def recompute_blocks(blocks: Iterable[nn.Module], recompute: Recompute | None) -> None:
    """Do what :func:`checkpoint_blocks` does in the way of ``recompute``."""
    for layer, block in enumerate(blocks):
        held = block.__dict__.get("forward")
        if isinstance(held, _CheckpointedForward):
            del block.forward
            if held.own is not None:
                block.forward = held.own
        if recompute is not None and recompute.covers(layer):
            block.forward = _CheckpointedForward(block, recompute)


def _extends_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a block was given a cache, which a recomputation would extend twice.

    transformers hands its own caches to its blocks, under a name that depends on the architecture;
    ``get_seq_length`` is common to all of them.
    """
    return any(
        isinstance(value, DecoderCache) or hasattr(value, "get_seq_length")
        for value in (*args, *kwargs.values())
    )
