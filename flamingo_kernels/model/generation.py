"""Decoding: media are encoded once, a step runs one token.

Hugging Face language models decode by transformers' own ``generate``; the package's decoder by the
loop here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flamingo_kernels.language import HuggingFaceCache, HuggingFaceLanguageModel
from flamingo_kernels.language.protocol import BlockHook as BeforeBlock
from flamingo_kernels.model.beams import Beams
from flamingo_kernels.model.cache import FlamingoCache
from flamingo_kernels.model.context import Context
from flamingo_kernels.model.generation_options import (
    check_foreign,
    check_options,
    check_stops,
    default_stops,
)

if TYPE_CHECKING:
    from flamingo_kernels.model.flamingo import FlamingoModel


class FlamingoGeneration(NamedTuple):
    """``sequences`` as ``generate`` returns them, and the ``cache`` that holds them for a turn."""

    sequences: Tensor
    cache: FlamingoCache


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
    num_beams: int = 1,
    num_return_sequences: int = 1,
    num_images: Tensor | None = None,
    num_frames: Tensor | None = None,
    stop_token_ids: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    cache: FlamingoCache | None = None,
    return_cache: bool = False,
    prefill_chunk_size: int | None = None,
    streamer: Any = None,
    **options: Any,
) -> Tensor | FlamingoGeneration:
    """Continue each prompt: greedily, by sampling or by beam search.

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
    num_beams : int
        Beams kept per prompt; the paper evaluates with 3.
    num_return_sequences : int
        Sequences per prompt, side by side: samples, or the best beams.
    stop_token_ids : sequence of int, optional
        A row ends after one of these; default: end of chunk and end of text, all ids of it that
        the language model's own configuration has. The row is then filled with the padding token,
        or with a stop token where the config has no padding token.
    generator : torch.Generator, optional
        Source of randomness of ``do_sample``.
    use_cache : bool
        False recomputes the whole sequence at every step; same result, for checking.
    cache : FlamingoCache, optional
        Of an earlier turn, with the conversation so far; ``input_ids`` and ``pixel_values`` then
        hold what is new. Earlier images are not encoded again. It is extended in place;
        ``cache.select_rows`` copies, for several queries to one support set too.
    return_cache : bool
        Return the cache for the next turn too; not with beams, nor with what ends rows otherwise.
    prefill_chunk_size : int, optional
        Read the prompt in pieces of so many tokens, to bound the memory of long ones.
    streamer : object, optional
        Its ``put`` gets the prompt and then each step's tokens, its ``end`` is called at the end;
        such as transformers' ``TextStreamer``.
    options
        Anything else that the ``generate`` of a Hugging Face language model takes; what has another
        name here, and guidance by a second prompt, is refused.

    Returns
    -------
    Tensor or FlamingoGeneration
        int64 [B * num_return_sequences, T + new tokens], ``input_ids`` included; with
        ``return_dict_in_generate`` among the options, what transformers returns, whose
        ``sequences`` are these.

    Raises
    ------
    TypeError, ValueError
        Options out of range, right-padded prompts, or what ``forward`` raises.
    """
    config = self.config
    check_options(
        temperature,
        top_p,
        max_new_tokens=max_new_tokens,
        top_k=top_k,
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        prefill_chunk_size=prefill_chunk_size,
    )
    check_foreign(options, return_cache)
    check_stops(stop_token_ids, config.language.vocab_size)
    if return_cache and (num_beams > 1 or not use_cache):
        raise ValueError("return_cache needs num_beams=1 and use_cache=True")
    if cache is not None and not use_cache:
        raise ValueError("a cache was given together with use_cache=False")
    context = self.read(
        input_ids,
        pixel_values,
        attention_mask,
        num_images=num_images,
        num_frames=num_frames,
        cache=cache,
    )
    mask = context.attention_mask
    if mask is not None and bool((mask[:, -1] == 0).any()):
        row = int((mask[:, -1] == 0).nonzero()[0])
        raise ValueError(f"row {row} ends in padding; pad prompts on the left to generate")
    if stop_token_ids is None:
        stop_token_ids = default_stops(config, self.language_model)
    stops = torch.tensor(list(stop_token_ids), dtype=torch.int64, device=input_ids.device)
    given = context.input_ids.shape[1] - input_ids.shape[1]
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    common = {
        "max_new_tokens": max_new_tokens,
        "num_return_sequences": num_return_sequences,
        "use_cache": use_cache,
        "prefill_chunk_size": prefill_chunk_size,
        "streamer": streamer,
    }
    if isinstance(self.language_model, HuggingFaceLanguageModel):
        sequences, language = _generate_by_transformers(
            self,
            context,
            None if cache is None else cache.language,
            stops,
            generator,
            {**common, "num_beams": num_beams, "return_cache": return_cache, **options},
            sampling if do_sample else None,
        )
        if not isinstance(sequences, Tensor):
            sequences.sequences = sequences.sequences[:, given:]
            return sequences
    else:
        if options:
            raise ValueError(
                f"{', '.join(sorted(options))}: only with a Hugging Face language model, whose "
                f"generate takes it; this one is a {type(self.language_model).__name__}"
            )
        shape = None
        if do_sample:
            shape = lambda logits: _shape_distribution(logits, **sampling)  # noqa: E731
        language = None if cache is None else cache.language
        if num_beams > 1:
            if do_sample or streamer is not None:
                raise ValueError(
                    "num_beams > 1 with do_sample or a streamer: only with a Hugging Face language "
                    f"model; this one is a {type(self.language_model).__name__}"
                )
            del common["streamer"]
            sequences = _decode_beams(self, context, language, stops, num_beams, **common)
        else:
            sequences, language = _decode(
                self, context, language, stops, shape, generator, **common
            )
    if not return_cache:
        return sequences[:, given:]
    context = context.repeat(num_return_sequences)
    return FlamingoGeneration(
        sequences[:, given:], _completed(self, context, sequences, language, stops)
    )


def _generate_by_transformers(
    model: FlamingoModel,
    context: Context,
    language: HuggingFaceCache | None,
    stops: Tensor,
    generator: torch.Generator | None,
    options: dict[str, Any],
    sampling: dict[str, Any] | None,
) -> tuple[Any, HuggingFaceCache | None]:
    """Sequences [B * n, all tokens] and the cache, by the language model's own ``generate``."""
    config, rows = model.config, context.input_ids.shape[0]
    mask = context.attention_mask
    return_cache = options.pop("return_cache")
    wants_dict = options.get("return_dict_in_generate", False)
    options["suppress_tokens"] = [*(options.get("suppress_tokens") or ()), config.image_token_id]
    options["attention_mask"] = torch.ones_like(context.input_ids) if mask is None else mask
    if return_cache:
        options["return_dict_in_generate"] = True
    options = {name: value for name, value in options.items() if value is not None}
    stop_ids = stops.tolist()
    pad = config.pad_token_id
    if pad is None:
        pad = stop_ids[0] if stop_ids else 0
    if sampling is not None:  # transformers' "none" are 0 and 1
        options |= {**sampling, "top_k": sampling["top_k"] or 0, "top_p": sampling["top_p"] or 1.0}
    copies = max(options["num_beams"], options["num_return_sequences"])
    if language is not None:
        if copies > 1:
            index = torch.arange(rows, device=context.input_ids.device)
            language = language.index_select(index.repeat_interleave(copies))
        options["past_key_values"] = language.past_key_values
    repeated: dict[int, Context] = {}

    def before_blocks_of(start: int, end: int, now: int) -> BeforeBlock:
        times = now // rows
        if times not in repeated:
            repeated[times] = context.repeat(times)
        return model.cross_attention(repeated[times], start, end)

    # transformers draws from the global generator.
    devices = [context.input_ids.device] if context.input_ids.is_cuda else []
    with torch.random.fork_rng(devices, enabled=generator is not None):
        if generator is not None:
            seed = torch.randint(2**62, (), generator=generator, device=generator.device)
            torch.manual_seed(int(seed))
        out = model.language_model.generate(
            context.input_ids,
            before_blocks_of,
            do_sample=sampling is not None,
            eos_token_id=stop_ids or None,
            pad_token_id=pad,
            **options,
        )
    if not return_cache or wants_dict:
        return out, None
    return out.sequences, HuggingFaceCache(out.past_key_values, mask is not None)


def _decode(
    model: FlamingoModel,
    context: Context,
    language: Any,
    stops: Tensor,
    shape: Callable[[Tensor], Tensor] | None,
    generator: torch.Generator | None,
    *,
    max_new_tokens: int,
    num_return_sequences: int,
    use_cache: bool,
    prefill_chunk_size: int | None,
    streamer: Any,
) -> tuple[Tensor, Any]:
    """Sequences [B * n, all tokens] and the language model's cache, greedy or sampled."""
    config, copies = model.config, num_return_sequences
    if shape is None and copies > 1:
        raise ValueError(
            f"num_return_sequences={copies} needs do_sample=True: greedy sequences are all equal"
        )
    sequence, mask = context.input_ids, context.attention_mask
    if streamer is not None:
        streamer.put(sequence.cpu())
    if use_cache:
        logits, language = _prefill(model, context, language, prefill_chunk_size)
    context = context.repeat(copies)
    sequence, mask = context.input_ids, context.attention_mask
    if copies > 1 and use_cache:
        rows = torch.arange(logits.shape[0], device=sequence.device).repeat_interleave(copies)
        logits, language = logits[rows], language.index_select(rows)
    finished = torch.zeros(sequence.shape[0], dtype=torch.bool, device=sequence.device)
    if mask is None:
        mask = torch.ones_like(sequence)
    for step in range(max_new_tokens):
        if step or not use_cache:
            logits, language = _next(model, context, sequence, mask, language, use_cache)
        latest = _without_image(logits, config.image_token_id)
        if shape is None:
            token = latest.argmax(-1)
        else:
            token = torch.multinomial(shape(latest).softmax(-1), 1, generator=generator)[:, 0]
        token = token.to(sequence.dtype)
        if config.pad_token_id is None:  # a finished row ends in its stop token
            token = torch.where(finished, sequence[:, -1], token)
        else:
            token = token.masked_fill(finished, config.pad_token_id)
        sequence = torch.cat((sequence, token[:, None]), 1)
        mask = torch.cat((mask, (~finished)[:, None].to(mask.dtype)), 1)
        finished |= torch.isin(token, stops)
        if streamer is not None:
            streamer.put(token.cpu())
        if bool(finished.all()):
            break
    if streamer is not None:
        streamer.end()
    return sequence, language


def _decode_beams(
    model: FlamingoModel,
    context: Context,
    language: Any,
    stops: Tensor,
    num_beams: int,
    *,
    max_new_tokens: int,
    num_return_sequences: int,
    use_cache: bool,
    prefill_chunk_size: int | None,
) -> Tensor:
    """Sequences [B * n, all tokens] by beam search."""
    config, rows = model.config, context.input_ids.shape[0]
    if num_return_sequences > num_beams:
        raise ValueError(
            f"num_return_sequences={num_return_sequences} is more than num_beams={num_beams}"
        )
    pad = config.pad_token_id
    if pad is None:
        pad = int(stops[0]) if len(stops) else 0
    prompt = context.input_ids
    each = torch.arange(rows, device=prompt.device).repeat_interleave(num_beams)
    if use_cache:
        logits, language = _prefill(model, context, language, prefill_chunk_size)
        logits, language = logits[each], language.index_select(each)
    context = context.repeat(num_beams)
    mask = context.attention_mask
    if mask is None:
        mask = torch.ones_like(context.input_ids)
    beams = Beams(rows, num_beams, stops, pad)
    for step in range(max_new_tokens):
        if step or not use_cache:
            sequence = torch.cat((context.input_ids, beams.tokens.flatten(0, 1)), 1)
            logits, language = _next(model, context, sequence, mask, language, use_cache)
        latest = _without_image(logits, config.image_token_id).log_softmax(-1)
        parents = beams.extend(latest.unflatten(0, (rows, num_beams)))
        if beams.done:
            break
        if use_cache:
            first = num_beams * torch.arange(rows, device=prompt.device)
            language = language.index_select((first[:, None] + parents).flatten())
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    found = beams.best(num_return_sequences)
    return torch.cat((prompt.repeat_interleave(num_return_sequences, 0), found), 1)


def _prefill(
    model: FlamingoModel, context: Context, language: Any, chunk_size: int | None
) -> tuple[Tensor, Any]:
    """Read what the language model's cache does not hold yet; logits of the last piece."""
    sequence, mask = context.input_ids, context.attention_mask
    start = 0 if language is None else language.length
    piece = chunk_size or sequence.shape[1]
    while start < sequence.shape[1]:
        end = min(start + piece, sequence.shape[1])
        out = model.language_model(
            sequence[:, start:end],
            None if mask is None else mask[:, :end],
            language,
            model.cross_attention(context, start, end),
            use_cache=True,
        )
        start, language = end, out.cache
    return out.logits, language


def _next(
    model: FlamingoModel,
    context: Context,
    sequence: Tensor,
    mask: Tensor,
    language: Any,
    use_cache: bool,
) -> tuple[Tensor, Any]:
    """Logits and cache after the last token of the sequence, or after all of it without a cache."""
    end = sequence.shape[1]
    begin = end - 1 if use_cache else 0
    out = model.language_model(
        sequence[:, begin:],
        mask,
        language,
        model.cross_attention(context, begin, end),
        use_cache=use_cache,
    )
    return out.logits, out.cache


def _without_image(logits: Tensor, image_token_id: int) -> Tensor:
    """fp32 logits [B, V] of the last place, with no chance for ``<image>``."""
    latest = logits[:, -1].float()
    latest[:, image_token_id] = float("-inf")
    return latest


def _completed(
    model: FlamingoModel, context: Context, sequences: Tensor, language: Any, stops: Tensor
) -> FlamingoCache:
    """The cache of a decoding, after its last tokens have been read too."""
    prompt, held = context.input_ids.shape[1], language.length
    new = sequences[:, prompt:]
    stopped = torch.isin(new, stops).cumsum(1)
    real = torch.nn.functional.pad(stopped, (1, 0))[:, :-1] == 0  # up to the first stop token
    mask = context.attention_mask
    if mask is None:
        mask = torch.ones_like(context.input_ids)
    mask = torch.cat((mask, real.to(mask.dtype)), 1)
    before = FlamingoCache(
        language,
        context.media,
        context.num_images,
        sequences[:, :held],
        mask[:, :held],
        context.owned,
    )
    return model(sequences[:, held:], None, mask, cache=before).cache


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
