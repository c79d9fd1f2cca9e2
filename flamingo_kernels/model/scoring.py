"""Closed answers: how likely the model finds each (Flamingo, appendix A.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flamingo_kernels.fields import is_integer
from flamingo_kernels.model.network import FlamingoNetwork, FlamingoOutput

ANSWERS_AT_ONCE = 64


def check_answers(
    answers: Sequence[Sequence[int]], answers_at_once: int, image_token_id: int
) -> None:
    """Raise ValueError unless there are answers, all with tokens and without ``<image>``."""
    if not is_integer(answers_at_once) or answers_at_once < 1:
        raise ValueError(f"answers_at_once must be an int of at least 1, got {answers_at_once!r}")
    for number, answer in enumerate(answers):
        if not len(answer) or image_token_id in answer:
            what = "an <image> token" if len(answer) else "no tokens"
            raise ValueError(f"answer {number} has {what}")
    if not answers:
        raise ValueError("there are no answers to score")


def score(
    network: FlamingoNetwork,
    prompt: FlamingoOutput,
    answers: Sequence[Sequence[int]],
    normalise: bool,
    answers_at_once: int,
) -> Tensor:
    """Return fp32 [B, answers], the log-likelihoods after prompts that were read with a cache."""
    parts = [
        _score_at_once(network, prompt, answers[start : start + answers_at_once], normalise)
        for start in range(0, len(answers), answers_at_once)
    ]
    return torch.cat(parts, 1)


def _score_at_once(
    network: FlamingoNetwork,
    prompt: FlamingoOutput,
    answers: Sequence[Sequence[int]],
    normalise: bool,
) -> Tensor:
    """As :func:`score`, in one batch, with a copy of the prompts' cache for each answer."""
    assert prompt.cache is not None and prompt.logits is not None
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
    copies = prompt.cache.select_rows(each)
    before = copies.attention_mask
    if before is None:
        before = torch.ones_like(copies.input_ids)
    mask = torch.cat((before, real), 1)
    after = network(padded, None, mask, cache=copies).logits[:, :-1]
    logits = torch.cat((prompt.logits[each, -1:], after), 1).float()
    chosen = logits.log_softmax(-1).gather(-1, padded[..., None].long())[..., 0]
    total = chosen.masked_fill(real == 0, 0).sum(1)
    return (total / real.sum(1) if normalise else total).unflatten(0, (rows, count))


def score_over_orders(score: Callable[[Sequence[int]], Tensor], orders: Tensor) -> Tensor:
    """Return the mean of the scores over several orders of the examples (the paper takes 6).

    Parameters
    ----------
    score : callable
        Order of the examples -> scores, such as ``score_answers`` of the prompt in that order.
    orders : Tensor
        int64 [orders, examples], such as ``data.retrieval.random_orders``.
    """
    return torch.stack([score(order.tolist()) for order in orders]).mean(0)
