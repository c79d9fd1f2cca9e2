"""Cached decoding: media are encoded once, a step runs one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flamingo_kernels.fields import is_integer, is_number
from flamingo_kernels.model.inputs import check_text

if TYPE_CHECKING:
    from flamingo_kernels.model.flamingo import FlamingoModel

# Logits over anything smaller may overflow float32.
LEAST_TEMPERATURE = 1e-4


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
        Shape the sampled distribution; used with ``do_sample`` only. The temperature is at least
        1e-4.
    stop_token_ids : sequence of int, optional
        A row ends after one of these; default: end of chunk and end of text. It is then filled
        with the padding token, or with that stop token where the config has no padding token.
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
    TypeError, ValueError
        Options out of range, right-padded prompts, or what ``forward`` raises.
    """
    config = self.config
    check_text(input_ids, attention_mask, None, config.language.vocab_size)
    _check_options(max_new_tokens, temperature, top_k, top_p)
    _check_stops(stop_token_ids, config.language.vocab_size)
    if attention_mask is not None and bool((attention_mask[:, -1] == 0).any()):
        row = int((attention_mask[:, -1] == 0).nonzero()[0])
        raise ValueError(f"row {row} ends in padding; pad prompts on the left to generate")
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
        token = token.to(sequence.dtype)
        if config.pad_token_id is None:  # a finished row ends in its stop token
            token = torch.where(finished, sequence[:, -1], token)
        else:
            token = token.masked_fill(finished, config.pad_token_id)
        sequence = torch.cat((sequence, token[:, None]), 1)
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
    for name, value in (("max_new_tokens", max_new_tokens), ("top_k", top_k)):
        if value is None and name == "top_k":
            continue
        if not is_integer(value):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if not (is_number(value) or (value is None and name == "top_p")):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not LEAST_TEMPERATURE <= temperature < float("inf"):
        raise ValueError(
            f"temperature must be finite and at least {LEAST_TEMPERATURE}, got {temperature}"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def _check_stops(stop_token_ids: Sequence[int] | None, vocab_size: int) -> None:
    if stop_token_ids is None:
        return
    if not isinstance(stop_token_ids, Sequence) or not all(map(is_integer, stop_token_ids)):
        raise TypeError(f"stop_token_ids must be a sequence of ints, got {stop_token_ids!r}")
    for token in stop_token_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"stop_token_ids holds {token}, outside the vocabulary 0..{vocab_size - 1}"
            )
