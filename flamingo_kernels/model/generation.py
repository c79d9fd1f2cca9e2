"""Cached decoding: media are encoded once, a step runs one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flamingo_kernels.model.flamingo import FlamingoModel


@torch.no_grad()
def generate(
    self: FlamingoModel,
    input_ids: Tensor,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 20,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_images: Tensor | None = None,
    num_frames: Tensor | None = None,
    stop_token_ids: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue each prompt, greedily or by sampling.

    ``<image>`` is never generated, as no image would come with it.

    Parameters
    ----------
    input_ids, pixel_values, attention_mask, num_images, num_frames
        As in :meth:`FlamingoModel.forward`; prompts of different lengths are padded on the left.
    max_new_tokens : int
        Upper bound on new tokens, at least 1.
    do_sample : bool
        Sample from the distribution instead of taking the most likely token.
    temperature, top_k, top_p
        Shape the sampled distribution; used with ``do_sample`` only.
    stop_token_ids : sequence of int, optional
        A row ends after one of these; default: end of chunk and end of text. It is then filled
        with the padding token.
    generator : torch.Generator, optional
        Source of randomness of ``do_sample``.
    use_cache : bool
        False recomputes the whole sequence at every step; same result, for checking.

    Returns
    -------
    Tensor
        int64 [B, T + new tokens], the prompts included.

    Raises
    ------
    ValueError
        Options out of range, right-padded prompts, or what ``forward`` raises.
    """
    _check_options(max_new_tokens, temperature, top_k, top_p)
    if attention_mask is not None and bool((attention_mask[:, -1] == 0).any()):
        row = int((attention_mask[:, -1] == 0).nonzero()[0])
        raise ValueError(f"row {row} ends in padding; pad prompts on the left to generate")
    config = self.config
    if stop_token_ids is None:
        stop_token_ids = [
            i for i in (config.end_of_chunk_token_id, config.eos_token_id) if i is not None
        ]
    stops = torch.tensor(list(stop_token_ids), dtype=torch.int64, device=input_ids.device)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    media = {"num_images": num_images, "num_frames": num_frames}
    sequence, cache = input_ids, None
    finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    for step in range(max_new_tokens):
        if step == 0 or not use_cache:
            out = self(sequence, pixel_values, mask, use_cache=use_cache, **media)
        else:
            out = self(sequence[:, -1:], None, mask, cache=cache, use_cache=True)
        cache = out.cache
        logits = out.logits[:, -1].float()
        logits[:, config.image_token_id] = float("-inf")
        if do_sample:
            logits = _shape_distribution(logits, temperature, top_k, top_p)
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        else:
            token = logits.argmax(-1)
        token = token.masked_fill(finished, config.pad_token_id)
        sequence = torch.cat((sequence, token[:, None].to(sequence.dtype)), 1)
        mask = torch.cat((mask, (~finished)[:, None].to(mask.dtype)), 1)
        finished |= torch.isin(token, stops)
        if bool(finished.all()):
            break
    return sequence


def _shape_distribution(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """Logits [B, V] divided by the temperature, -inf outside the top k and the nucleus."""
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        outside = probability.cumsum(-1) - probability >= top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return logits


def _check_options(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
