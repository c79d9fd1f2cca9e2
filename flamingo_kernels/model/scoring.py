"""Closed answers: how likely the model finds each (Flamingo, appendix A.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flamingo_kernels.fields import is_integer
from flamingo_kernels.model.cache import FlamingoCache

if TYPE_CHECKING:
    from flamingo_kernels.model.flamingo import FlamingoModel, FlamingoOutput

ANSWERS_AT_ONCE = 64


@torch.no_grad()
def score_answers(
    self: FlamingoModel,
    input_ids: Tensor,
    answers: Sequence[Sequence[int]],
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    num_images: Tensor | None = None,
    num_frames: Tensor | None = None,
    cache: FlamingoCache | None = None,
    normalise: bool = False,
    answers_at_once: int = ANSWERS_AT_ONCE,
) -> Tensor:
    """Log-likelihood of each answer after each prompt, which is read once for all answers.

    Parameters
    ----------
    input_ids, pixel_values, attention_mask, num_images, num_frames
        As in :meth:`FlamingoModel.forward`; prompts are padded on the left.
    answers : sequences of int
        Token ids of each answer, without ``<image>``; the same for every prompt.
    cache : FlamingoCache, optional
        Of what precedes the prompts, such as a support set; it is not changed.
    normalise : bool
        Mean over an answer's tokens in place of the sum.
    answers_at_once : int
        Answers read in one batch, each with a copy of every prompt's cache: bounds the memory.

    Returns
    -------
    Tensor
        fp32 [B, answers].

    Raises
    ------
    TypeError, ValueError
        An answer without tokens or with an ``<image>``, right-padded prompts, or what ``forward``
        raises.
    """
    if not is_integer(answers_at_once) or answers_at_once < 1:
        raise ValueError(f"answers_at_once must be an int of at least 1, got {answers_at_once!r}")
    for number, answer in enumerate(answers):
        if not len(answer) or self.config.image_token_id in answer:
            what = "an <image> token" if len(answer) else "no tokens"
            raise ValueError(f"answer {number} has {what}")
    if not answers:
        raise ValueError("there are no answers to score")
    rows, device = input_ids.shape[0], input_ids.device
    if cache is not None:
        cache = cache.select_rows(torch.arange(rows, device=device))
    prompt = self(
        input_ids,
        pixel_values,
        attention_mask,
        num_images=num_images,
        num_frames=num_frames,
        cache=cache,
        use_cache=True,
    )
    held = prompt.cache.attention_mask
    if held is not None and bool((held[:, -1] == 0).any()):
        row = int((held[:, -1] == 0).nonzero()[0])
        raise ValueError(f"row {row} ends in padding; pad prompts on the left to score answers")
    parts = [
        _score(self, answers[start : start + answers_at_once], prompt, normalise)
        for start in range(0, len(answers), answers_at_once)
    ]
    return torch.cat(parts, 1)


def _score(
    model: FlamingoModel, answers: Sequence[Sequence[int]], prompt: FlamingoOutput, normalise: bool
) -> Tensor:
    """fp32 [B, answers] after prompts that were read; their cache is copied."""
    ids = prompt.cache.input_ids
    rows, device = ids.shape[0], ids.device
    length, count = max(map(len, answers)), len(answers)
    padded = torch.zeros(count, length, dtype=ids.dtype, device=device)
    real = torch.zeros(count, length, dtype=torch.int64, device=device)
    for number, answer in enumerate(answers):
        padded[number, : len(answer)] = torch.as_tensor(answer, device=device)
        real[number, : len(answer)] = 1
    padded, real = padded.repeat(rows, 1), real.repeat(rows, 1)  # [B * answers, longest]
    each = torch.arange(rows, device=device).repeat_interleave(count)
    fork = prompt.cache.select_rows(each)
    before = fork.attention_mask
    if before is None:
        before = torch.ones_like(fork.input_ids)
    mask = torch.cat((before, real), 1)
    after = model(padded, None, mask, cache=fork).logits[:, :-1]
    logits = torch.cat((prompt.logits[each, -1:], after), 1).float()
    chosen = logits.log_softmax(-1).gather(-1, padded[..., None].long())[..., 0]
    total = chosen.masked_fill(real == 0, 0).sum(1)
    return (total / real.sum(1) if normalise else total).unflatten(0, (rows, count))


def score_over_orders(score: Callable[[Sequence[int]], Tensor], orders: Tensor) -> Tensor:
    """Mean of the scores over several orders of the examples (the paper takes 6).

    Parameters
    ----------
    score : callable
        Order of the examples -> scores, say ``score_answers`` of the prompt built in that order.
    orders : Tensor
        int64 [orders, examples], such as ``data.retrieval.random_orders``.
    """
    return torch.stack([score(order.tolist()) for order in orders]).mean(0)
