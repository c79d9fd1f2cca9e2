"""Hooks on a Hugging Face language model, and the call in progress that they serve.

Each hook looks up its work in a context variable that holds the running call. No module stores
anything about a call, so calls in other threads, or of models inside one another, stay separate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from flamingo_kernels.language.huggingface.cache import (
    cache_name,
    cached_tokens,
    given_cache,
    returned_cache,
)
from flamingo_kernels.language.huggingface.states import StateChecks, check_beams
from flamingo_kernels.language.new_tokens import NewTokenRows
from flamingo_kernels.language.protocol import BlockHook

# (first new token, one past the last, rows of the batch) -> the hook for these tokens.
BlockHookFactory = Callable[[int, int, int], BlockHook]


class Call:
    """One forward in progress, or one generation, which is a sequence of forwards.

    Parameters
    ----------
    owner : object
        Identity of the wrapper that started the call; hooks of other wrappers ignore it.
    block_hook : BlockHook or None
        What runs before each block of a forward.
    block_hook_factory : BlockHookFactory, optional
        Makes ``block_hook`` for each forward of a generation.
    without_logits : bool
        Give the output product no tokens, and keep its input in ``hidden``.
    new_tokens : NewTokenRows, optional
        Rows in place of those of the embeddings and of the output product.
    with_beams : bool
        Whether a generation reorders the rows of its cache.
    """

    def __init__(
        self,
        owner: object,
        block_hook: BlockHook | None,
        block_hook_factory: BlockHookFactory | None = None,
        without_logits: bool = False,
        new_tokens: NewTokenRows | None = None,
        with_beams: bool = False,
    ) -> None:
        self.owner = owner
        self.new_tokens = new_tokens
        self.embedded = False  # whether the input embeddings have run
        self.block_hook = block_hook
        self.block_hook_factory = block_hook_factory
        self.blocks_run = 0
        self.shape: tuple[int, ...] = ()  # [B, T] of the tokens of a forward
        self.with_beams = with_beams
        self.cache_is_checked = False
        self.tokens_read = 0
        self.forwards_counted = 0
        self.without_logits = without_logits
        self.hidden: Tensor | None = None
        self.empty_logits: Tensor | None = None  # result of the product for no tokens
        self.version = 0

    def nothing_follows_the_product(self, logits: Tensor) -> bool:
        """Whether the model's ``logits`` are the very tensor of the product, not written to since.

        Then the model neither scales nor caps its logits.
        """
        return logits is self.empty_logits and logits._version == self.version

    @contextmanager
    def running(self) -> Iterator[None]:
        """Make this the call in progress of the current context."""
        token = _in_progress.set(self)
        try:
            yield
        finally:
            _in_progress.reset(token)


_in_progress: ContextVar[Call | None] = ContextVar("flamingo_kernels_running_call", default=None)


def _call_of(owner: object) -> Call | None:
    call = _in_progress.get()
    return call if call is not None and call.owner is owner else None


class BlockPreHook:
    """Pre-hook of block ``index``; a class, so that copies of the model carry working hooks."""

    def __init__(self, owner: object, index: int) -> None:
        self.owner = owner
        self.index = index

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = _call_of(self.owner)
        if call is None or call.block_hook is None:
            return None
        if self.index != call.blocks_run:
            raise RuntimeError(
                f"block {self.index} ran where block {call.blocks_run} was due: the blocks of "
                "this model do not run once each in order"
            )
        call.blocks_run += 1
        if args:
            return (self._hooked(block, call, args[0]), *args[1:]), kwargs
        if "hidden_states" not in kwargs:
            raise RuntimeError(
                f"{type(block).__name__} takes its input neither as the first argument nor as "
                f"`hidden_states`, but as {sorted(kwargs)}"
            )
        hidden = self._hooked(block, call, kwargs["hidden_states"])
        return args, {**kwargs, "hidden_states": hidden}

    def _hooked(self, block: nn.Module, call: Call, hidden: Tensor) -> Tensor:
        if hidden.ndim != 3 or hidden.shape[:2] != call.shape:
            raise RuntimeError(
                f"{type(block).__name__} takes hidden states of shape {tuple(hidden.shape)}, but "
                f"[B, T, dim] with B, T = {tuple(call.shape)} is needed: a model with several "
                "residual streams, or with tokens of its own, cannot run `before_block`"
            )
        assert call.block_hook is not None
        return call.block_hook(self.index, hidden)


class ModelHooks:
    """Hooks of the whole model: in a generation, they make the block hook for the next tokens."""

    def __init__(self, owner: object, check_states: StateChecks) -> None:
        self.owner = owner
        self.check_states = check_states

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = _call_of(self.owner)
        if call is None or call.block_hook_factory is None:
            return
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise RuntimeError(
                f"generate ran {type(model).__name__} without input_ids, on {sorted(kwargs)}: "
                "which tokens the blocks are to see cannot be told; leave out the option that asks "
                "for it"
            )
        cache = given_cache(kwargs)
        start = 0 if cache is None else cached_tokens(cache)
        rows, tokens = ids.shape
        mask = kwargs.get("attention_mask")
        if not (isinstance(mask, Tensor) and mask.ndim == 2):
            mask = None
        if mask is not None and mask.shape[1] != start + tokens:
            raise RuntimeError(
                f"the cache of {type(model).__name__}, a {type(cache).__name__}, says that it "
                f"holds {start} tokens, but {tokens} new ones make {mask.shape[1]}: decode with "
                "use_cache=False"
            )
        if start and not (call.cache_is_checked and tokens == 1):
            if call.with_beams:
                check_beams(model, cache)
            with Call(self.owner, None).running():
                self.check_states(model, cache, cache_name(model) or "", ids, mask)
            call.cache_is_checked = True
        call.block_hook = call.block_hook_factory(start, start + tokens, rows)
        call.blocks_run, call.shape = 0, ids.shape
        call.tokens_read = start + tokens

    def after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Raise RuntimeError if the cache does not count what the first two forwards have read.

        Tokens of later forwards would be taken for others. Between forwards a cache may shrink.
        """
        call = _call_of(self.owner)
        if call is None or call.block_hook_factory is None or call.forwards_counted == 2:
            return
        returned = returned_cache(output)
        cache = given_cache(kwargs) if returned is None else returned
        if cache is not None and cached_tokens(cache) != call.tokens_read:
            raise RuntimeError(
                f"the cache of {type(model).__name__}, a {type(cache).__name__}, says that it "
                f"holds {cached_tokens(cache)} tokens after {call.tokens_read}: decode with "
                "use_cache=False"
            )
        call.forwards_counted += 1


class NewTokenHooks:
    """Hooks after the input embeddings and after the output product, for rows of new tokens."""

    def __init__(self, owner: object) -> None:
        self.owner = owner

    def after_embedding(
        self, embedding: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor | None:
        call = _call_of(self.owner)
        if call is None or call.new_tokens is None:
            return None
        call.embedded = True
        return call.new_tokens.embed(embedding, args[0], output)

    def after_head(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        call = _call_of(self.owner)
        if call is None or call.new_tokens is None or call.without_logits:
            return None
        return call.new_tokens.correct(head, args[0], output)


class HeadHooks:
    """Hooks before and after the output product of a call ``without_logits``."""

    def __init__(self, owner: object) -> None:
        self.owner = owner

    def before(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        call = self._call()
        if call is None:
            return None
        (call.hidden,) = args
        return (call.hidden[:, :0],)

    def after(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        call = self._call()
        if call is not None:
            call.empty_logits, call.version = output, output._version

    def _call(self) -> Call | None:
        call = _call_of(self.owner)
        return call if call is not None and call.without_logits else None
