"""Decoding loops for language models without a ``generate`` of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flamingo_kernels.language import LanguageModelCache
from flamingo_kernels.model.context import MediaContext
from flamingo_kernels.model.generation.beams import Beams
from flamingo_kernels.model.generation.decoded import Decoded
from flamingo_kernels.model.generation.options import GenerationOptions
from flamingo_kernels.model.network import FlamingoNetwork


def check_options(options: GenerationOptions, language_model: nn.Module) -> None:
    """Raise ValueError for options that only Hugging Face language models can honour."""
    kind = type(language_model).__name__
    if options.transformers:
        raise ValueError(
            f"{', '.join(sorted(options.transformers))}: only with a Hugging Face language model, "
            f"whose generate takes it; this one is a {kind}"
        )
    beams, copies = options.num_beams, options.num_return_sequences
    if beams > 1:
        if options.sampling is not None or options.streamer is not None:
            raise ValueError(
                "num_beams > 1 with do_sample or a streamer: only with a Hugging Face language "
                f"model; this one is a {kind}"
            )
        if copies > beams:
            raise ValueError(f"num_return_sequences={copies} is more than num_beams={beams}")
    elif options.sampling is None and copies > 1:
        raise ValueError(
            f"num_return_sequences={copies} needs do_sample=True: greedy sequences are all equal"
        )


def decode(
    network: FlamingoNetwork,
    context: MediaContext,
    language: LanguageModelCache | None,
    options: GenerationOptions,
) -> Decoded:
    """Take the most likely token at each step, or sample one."""
    config, streamer = network.config, options.streamer
    if streamer is not None:
        streamer.put(context.input_ids.cpu())
    steps = _Steps(network, context, language, options, copies=options.num_return_sequences)
    sequence = steps.context.input_ids
    stops = options.stops(sequence.device)
    finished = torch.zeros(sequence.shape[0], dtype=torch.bool, device=sequence.device)
    for _ in range(options.max_new_tokens):
        logits = steps.next_logits(sequence)
        if options.sampling is None:
            token = logits.argmax(-1)
        else:
            token = options.sampling.draw(logits, options.generator)
        token = token.to(sequence.dtype)
        if config.pad_token_id is None:  # a finished row ends in its stop token
            token = torch.where(finished, sequence[:, -1], token)
        else:
            token = token.masked_fill(finished, config.pad_token_id)
        sequence = torch.cat((sequence, token[:, None]), 1)
        steps.append_to_mask(~finished)
        finished |= torch.isin(token, stops)
        if streamer is not None:
            streamer.put(token.cpu())
        if bool(finished.all()):
            break
    if streamer is not None:
        streamer.end()
    return Decoded(sequence, steps.language)


def decode_beams(
    network: FlamingoNetwork,
    context: MediaContext,
    language: LanguageModelCache | None,
    options: GenerationOptions,
) -> Decoded:
    """Search with ``options.num_beams`` beams."""
    prompt, num_beams, wanted = context.input_ids, options.num_beams, options.num_return_sequences
    rows = prompt.shape[0]
    pad = network.config.pad_token_id
    if pad is None:
        pad = options.stop_token_ids[0] if options.stop_token_ids else 0
    steps = _Steps(network, context, language, options, copies=num_beams)
    beams = Beams(rows, num_beams, options.stops(prompt.device), pad)
    first = num_beams * torch.arange(rows, device=prompt.device)[:, None]
    for _ in range(options.max_new_tokens):
        sequence = torch.cat((steps.context.input_ids, beams.tokens.flatten(0, 1)), 1)
        latest = steps.next_logits(sequence).log_softmax(-1)
        parents = beams.extend(latest.unflatten(0, (rows, num_beams)))
        if beams.done:
            break
        steps.select_rows((first + parents).flatten())
        steps.append_to_mask(torch.ones_like(sequence[:, -1]))
    found = beams.best(wanted)
    return Decoded(torch.cat((prompt.repeat_interleave(wanted, 0), found), 1), None)


class _Steps:
    """The model in a decoding: reads the prompt once, then gives logits step by step.

    Parameters
    ----------
    network, context, language, options
        As in ``decode``.
    copies : int
        Sequences per prompt, side by side.

    Attributes
    ----------
    context : MediaContext
        With ``copies`` copies of each row.
    language : LanguageModelCache or None
        The language model's cache.
    """

    def __init__(
        self,
        network: FlamingoNetwork,
        context: MediaContext,
        language: LanguageModelCache | None,
        options: GenerationOptions,
        copies: int,
    ) -> None:
        self.network = network
        self.use_cache = options.use_cache
        self.language = language
        self.context = context
        self.mask = context.attention_mask
        # Logits of the prompt, for the first step.
        self.prompt_logits = self._prefill(options.prefill_chunk_size) if self.use_cache else None
        if copies > 1:
            self.context = context.repeat(copies)
            if self.prompt_logits is not None:
                rows = torch.arange(len(context.input_ids), device=context.input_ids.device)
                rows = rows.repeat_interleave(copies)
                self.prompt_logits = self.prompt_logits[rows]
                self.language = self.language.index_select(rows)
        self.mask = self.context.attention_mask
        if self.mask is None:
            self.mask = torch.ones_like(self.context.input_ids)

    def next_logits(self, sequence: Tensor) -> Tensor:
        """Return fp32 logits [rows, V] after ``sequence``, with no chance for ``<image>``."""
        logits, self.prompt_logits = self.prompt_logits, None
        if logits is None:
            end = sequence.shape[1]
            logits = self._read(sequence, self.mask, end - 1 if self.use_cache else 0, end)
        latest = logits[:, -1].float()
        latest[:, self.network.config.image_token_id] = float("-inf")
        return latest

    def append_to_mask(self, real: Tensor) -> None:
        """Note whether the token that was just added to each row is ``real`` [rows]."""
        self.mask = torch.cat((self.mask, real[:, None].to(self.mask.dtype)), 1)

    def select_rows(self, rows: Tensor) -> None:
        """Let each row continue the state of row ``rows[i]`` (beams)."""
        if self.use_cache:
            self.language = self.language.index_select(rows)

    def _prefill(self, chunk_size: int | None) -> Tensor:
        """Read what the cache does not hold yet; returns the logits of the last piece."""
        tokens, mask = self.context.input_ids, self.context.attention_mask
        start = 0 if self.language is None else self.language.length
        size = chunk_size or tokens.shape[1]
        while start < tokens.shape[1]:
            end = min(start + size, tokens.shape[1])
            logits = self._read(tokens, None if mask is None else mask[:, :end], start, end)
            start = end
        return logits

    def _read(self, tokens: Tensor, mask: Tensor | None, start: int, end: int) -> Tensor:
        out = self.network.language_model(
            tokens[:, start:end],
            mask,
            self.language,
            self.network.block_hook(self.context, start, end),
            use_cache=self.use_cache,
            **self.network.language_options,
        )
        self.language = out.cache
        return out.logits
