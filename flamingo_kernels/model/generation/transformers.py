"""Decoding by the ``generate`` of transformers."""

from __future__ import annotations

from typing import Any

import torch

from flamingo_kernels.language import BlockHook, HuggingFaceCache
from flamingo_kernels.language.huggingface.cache import returned_cache
from flamingo_kernels.model.context import MediaContext
from flamingo_kernels.model.generation.decoded import Decoded
from flamingo_kernels.model.generation.options import GenerationOptions, check_own_defaults
from flamingo_kernels.model.network import FlamingoNetwork


def decode(
    network: FlamingoNetwork,
    context: MediaContext,
    language: HuggingFaceCache | None,
    options: GenerationOptions,
) -> Decoded:
    """Continue the prompts with the language model's own ``generate``."""
    inner = network.language_model.model
    check_own_defaults(getattr(inner, "generation_config", None), options)
    rows, device = context.input_ids.shape[0], context.input_ids.device
    arguments = _arguments(network, context, options)
    if language is not None:
        copies = max(options.num_beams, options.num_return_sequences)
        if copies > 1:
            each = torch.arange(rows, device=device).repeat_interleave(copies)
            language = language.index_select(each)
        arguments[str(network.language_model.cache_name)] = language.past_key_values
    repeated: dict[int, MediaContext] = {}

    def before_blocks_of(start: int, end: int, now: int) -> BlockHook:
        times = now // rows
        if times not in repeated:
            repeated[times] = context.repeat(times)
        return network.block_hook(repeated[times], start, end)

    generator = options.generator
    # transformers draws from the global generator.
    devices = [device] if context.input_ids.is_cuda else []
    with torch.random.fork_rng(devices, enabled=generator is not None):
        if generator is not None:
            seed = torch.randint(2**62, (), generator=generator, device=generator.device)
            torch.manual_seed(int(seed))
        out = network.language_model.generate(
            context.input_ids, before_blocks_of, **network.language_options, **arguments
        )
    if options.return_cache:
        masked = context.attention_mask is not None
        return Decoded(out.sequences, HuggingFaceCache(returned_cache(out), masked))
    if isinstance(out, torch.Tensor):
        return Decoded(out, None)
    return Decoded(out.sequences, None, out)


def _arguments(
    network: FlamingoNetwork, context: MediaContext, options: GenerationOptions
) -> dict[str, Any]:
    """Return ``options`` by the names and in the terms of transformers."""
    config, mask, more = network.config, context.attention_mask, options.transformers
    stops = list(options.stop_token_ids)
    arguments: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens,
        "num_return_sequences": options.num_return_sequences,
        "use_cache": options.use_cache,
        "prefill_chunk_size": options.prefill_chunk_size,
        "streamer": options.streamer,
        "num_beams": options.num_beams,
        **more,
        "suppress_tokens": [*(more.get("suppress_tokens") or ()), config.image_token_id],
        # Said always: the language model's own default would change what is returned.
        "return_dict_in_generate": options.return_cache
        or bool(more.get("return_dict_in_generate")),
        "attention_mask": torch.ones_like(context.input_ids) if mask is None else mask,
    }
    sampling = options.sampling
    if sampling is not None:  # 0 and 1 mean "none" in transformers
        arguments["temperature"] = sampling.temperature
        arguments["top_k"] = sampling.top_k or 0
        arguments["top_p"] = sampling.top_p or 1.0
    arguments = {name: value for name, value in arguments.items() if value is not None}
    pad = config.pad_token_id
    if pad is None:
        pad = stops[0] if stops else 0
    return {
        **arguments,
        "do_sample": sampling is not None,
        "eos_token_id": stops or None,
        "pad_token_id": pad,
    }
