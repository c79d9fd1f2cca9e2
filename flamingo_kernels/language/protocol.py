"""The interfaces of language models and of their caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flamingo_kernels.language.new_tokens import NewTokenRows

# (block index, hidden [B, T, dim]) -> hidden, run just before the block.
BlockHook = Callable[[int, Tensor], Tensor]
# (hidden [B, T, dim], weight [V, dim], bias [V] or None) -> a result in place of logits: a loss.
Head = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@runtime_checkable
class LanguageModelCache(Protocol):
    """What a language model keeps of the tokens that it has read."""

    @property
    def length(self) -> int:
        """Tokens held per row, padding included."""
        ...

    @property
    def masked(self) -> bool:
        """Whether an attention mask came with them. Later calls must then pass one too."""
        ...

    def index_select(self, rows: Tensor) -> LanguageModelCache:
        """Return a separate cache whose row i is row ``rows[i]`` of this one.

        Parameters
        ----------
        rows : Tensor
            Integer vector; it may repeat and leave out rows (beam search).
        """
        ...


class LanguageModelOutput(NamedTuple):
    """Logits [B, T, V], or the result of ``head`` in their place, and the cache if there is one."""

    logits: Tensor | None
    cache: LanguageModelCache | None
    head_output: Tensor | None = None


@runtime_checkable
class LanguageModel(Protocol):
    """A causal language model that runs a function before each of its blocks.

    Attributes
    ----------
    dim : int
        Width of the residual stream.
    num_blocks : int
        Number of decoder blocks.
    vocab_size : int
        Size of the vocabulary, the last dimension of the logits.
    blocks : nn.ModuleList
        The decoder blocks, in order.

    A method ``new_token_rows(token_ids) -> NewTokenRows`` is optional: rows that can be trained
    while the language model is frozen.
    """

    dim: int
    num_blocks: int
    vocab_size: int
    blocks: nn.ModuleList

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: LanguageModelCache | None = None,
        before_block: BlockHook | None = None,
        use_cache: bool = False,
        head: Head | None = None,
        new_tokens: NewTokenRows | None = None,
    ) -> LanguageModelOutput:
        """Compute the logits of new tokens.

        Parameters
        ----------
        input_ids : Tensor
            Integer [B, T], the tokens that ``cache`` does not hold yet.
        attention_mask : Tensor, optional
            [B, cached + T], nonzero at real tokens; padding may be on either side. Positions count
            real tokens. None: neither the cached nor the new tokens are padding.
        cache : LanguageModelCache, optional
            Cache of an earlier call; it is extended in place and returned.
        before_block : callable, optional
            ``before_block(i, hidden [B, T, dim]) -> hidden``, called just before block i. None and
            the identity function give the same bits.
        use_cache : bool
            Start a cache if none is given.
        head : callable, optional
            Called with the last hidden states and the weight and bias of the output product, in
            place of that product. A model whose logits need more than the product returns logits
            instead, such as one whose output product is hooked, wrapped, offloaded or quantised. A
            language model may leave out this argument.
        new_tokens : NewTokenRows, optional
            Rows in place of those of the embeddings and of the output product; ``head`` gets the
            frozen weight. A language model without a method ``new_token_rows`` may leave out this
            argument.

        Raises
        ------
        ValueError
            Shapes do not fit each other, or the cache was filled under a mask and none is given.
        TypeError
            ``input_ids`` is not an integer tensor.
        """
        ...


def check_inputs(
    input_ids: Tensor, attention_mask: Tensor | None, cache: LanguageModelCache | None
) -> None:
    """Raise what ``LanguageModel`` promises for arguments that do not fit."""
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, T], got shape {tuple(input_ids.shape)}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    cached = 0 if cache is None else cache.length
    if attention_mask is None:
        if cached and cache.masked:
            raise ValueError(
                f"the cache holds {cached} tokens read under an attention_mask: pass one that "
                f"covers them and the {input_ids.shape[1]} new ones"
            )
        return
    expected = (input_ids.shape[0], cached + input_ids.shape[1])
    if tuple(attention_mask.shape) != expected:
        raise ValueError(
            f"attention_mask must be [B, cached + new tokens] = {expected}, "
            f"got shape {tuple(attention_mask.shape)}"
        )


def positions(attention_mask: Tensor, count: int) -> Tensor:
    """Return [B, count], the number of real tokens before each of the last ``count`` tokens."""
    return ((attention_mask != 0).cumsum(1) - 1).clamp(min=0)[:, attention_mask.shape[1] - count :]
