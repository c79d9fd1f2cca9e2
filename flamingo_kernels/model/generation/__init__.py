"""Decoding: media are encoded once, and each step runs one token.

Hugging Face language models are decoded by the ``generate`` of transformers, the package's own
decoder by the loops in ``own``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flamingo_kernels.language import HuggingFaceLanguageModel, LanguageModelCache
from flamingo_kernels.model.cache import FlamingoCache
from flamingo_kernels.model.context import MediaContext
from flamingo_kernels.model.generation import own, transformers
from flamingo_kernels.model.generation.decoded import Decoded
from flamingo_kernels.model.generation.options import GenerationOptions, choose_stops
from flamingo_kernels.model.generation.sampling import Sampling
from flamingo_kernels.model.network import FlamingoNetwork

__all__ = [
    "FlamingoGeneration",
    "GenerationOptions",
    "Sampling",
    "choose_stops",
    "decode",
    "next_turn",
]


class FlamingoGeneration(NamedTuple):
    """Sequences as ``generate`` returns them, and the cache that holds them for the next turn."""

    sequences: Tensor
    cache: FlamingoCache


def decode(
    network: FlamingoNetwork,
    context: MediaContext,
    language: LanguageModelCache | None,
    options: GenerationOptions,
) -> Decoded:
    """Continue the prompts of ``context``.

    Parameters
    ----------
    network : FlamingoNetwork
        The model.
    context : MediaContext
        Prompts and their media.
    language : LanguageModelCache or None
        The language model's cache of an earlier turn, which is extended in place.
    options : GenerationOptions
        How to decode.

    Raises
    ------
    ValueError
        Options that the language model cannot honour.
    """
    if isinstance(network.language_model, HuggingFaceLanguageModel):
        return transformers.decode(network, context, language, options)
    own.check_options(options, network.language_model)
    decode_own = own.decode_beams if options.num_beams > 1 else own.decode
    return decode_own(network, context, language, options)


def next_turn(
    network: FlamingoNetwork, context: MediaContext, decoded: Decoded, options: GenerationOptions
) -> FlamingoCache:
    """Return the cache for the next turn, after reading the last tokens of this one."""
    context = context.repeat(options.num_return_sequences)
    prompt, held = context.input_ids.shape[1], decoded.language.length
    sequences = decoded.sequences
    stopped = torch.isin(sequences[:, prompt:], options.stops(sequences.device)).cumsum(1)
    real = torch.nn.functional.pad(stopped, (1, 0))[:, :-1] == 0  # up to the first stop token
    mask = context.attention_mask
    if mask is None:
        mask = torch.ones_like(context.input_ids)
    mask = torch.cat((mask, real.to(mask.dtype)), 1)
    before = FlamingoCache(
        decoded.language,
        context.media,
        context.num_images,
        sequences[:, :held],
        mask[:, :held],
        context.lengths,
        context.extendable,
    )
    return network(sequences[:, held:], None, mask, cache=before).cache
