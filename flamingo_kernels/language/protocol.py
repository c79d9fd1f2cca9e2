"""What the rest of the package asks of a language model and of its cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

BeforeBlock = Callable[[int, Tensor], Tensor]
# (hidden [B, T, dim], weight [V, dim], bias [V] or None) -> what is wanted of them, such as a loss.
Head = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@runtime_checkable
class LanguageModelCache(Protocol):
    """What a language model keeps of the tokens it has read.

    Attributes
    ----------
    length : tokens held per row, padding included.
    masked : an attention mask came with them, so that later calls must pass one too.
    """

    length: int
    masked: bool

    def index_select(self, rows: Tensor) -> LanguageModelCache:
        """A cache of its own whose row i is row `rows[i]` of this one, which stays as it is.

        `rows` is an integer vector; it may repeat and leave out rows (beam search).
        """
        ...


class LanguageModelOutput(NamedTuple):
    """Logits [B, T, V], and the cache where one was asked for or given.

    Or what `head` returned, in place of the logits.
    """

    logits: Tensor | None
    cache: LanguageModelCache | None
    head_output: Tensor | None = None


@runtime_checkable
class LanguageModel(Protocol):
    """A causal language model whose blocks can be preceded by something else.

    Attributes
    ----------
    dim : width of the residual stream.
    num_blocks : decoder blocks.
    vocab_size : rows of the logits.
    blocks : the decoder blocks, in order.
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
        before_block: BeforeBlock | None = None,
        use_cache: bool = False,
        head: Head | None = None,
    ) -> LanguageModelOutput:
        """Logits of the tokens given.

        Parameters
        ----------
        input_ids : integer [B, T], the tokens that `cache` does not hold yet.
        attention_mask : [B, cached + T], nonzero where the token is real; padding may be on
            either side. Positions count real tokens. None: no padding, cached tokens included.
        cache : from an earlier call; extended in place and returned.
        before_block : ``before_block(i, hidden [B, T, dim]) -> hidden``, called just before block
            i. None and a function that returns its argument give the same bits.
        use_cache : start a cache if none is given.
        head : called with the last hidden states, weight and bias in place of the product that
            gives the logits; only if that product is all that gives them, otherwise the output
            holds logits all the same. A language model may do without this argument.

        Raises
        ------
        ValueError
            If shapes do not fit each other, or the cache was filled under a mask and none is
            given.
        TypeError
            If `input_ids` is not integer.
        """
        ...


def check_inputs(
    input_ids: Tensor, attention_mask: Tensor | None, cache: LanguageModelCache | None
) -> None:
    """Raise what `LanguageModel` promises for ill-fitting arguments."""
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
    """Positions [B, count] of the last `count` tokens: the real tokens before each, at least 0."""
    return ((attention_mask != 0).cumsum(1) - 1).clamp(min=0)[:, attention_mask.shape[1] - count :]
