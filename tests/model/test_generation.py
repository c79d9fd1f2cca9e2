"""Cached decoding equals recomputation (semantics, point 15)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from flamingo_kernels.ops.spans import ATTEND_MODES
from testing.budgets import assert_close_to_reference
from testing.tiny_model import TINY, make_model, ragged_batch

IMAGE = TINY.image_token_id
NO_STOP = {"stop_token_ids": []}


@pytest.mark.parametrize("attend", ATTEND_MODES)
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.8, "top_k": 50}])
def test_cached_equals_uncached_on_a_ragged_batch(attend: str, options: dict) -> None:
    model = make_model(attend=attend)
    batch = ragged_batch("left")
    results = [
        model.generate(
            **batch.arguments(),
            **options,
            **NO_STOP,
            max_new_tokens=12,
            generator=torch.Generator().manual_seed(7),
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*results)
    assert results[0].shape == (3, batch.input_ids.shape[1] + 12)
    assert not (results[0][:, batch.input_ids.shape[1] :] == IMAGE).any()


@pytest.mark.parametrize("stops", [[], list(range(40, 80))])
def test_beams_cached_equal_uncached_and_alone(stops: list[int]) -> None:
    model, batch = make_model(), ragged_batch("left")
    options = {
        "num_beams": 3,
        "num_return_sequences": 2,
        "stop_token_ids": stops,
        "max_new_tokens": 6,
    }
    together = model.generate(**batch.arguments(), **options)
    assert torch.equal(together, model.generate(**batch.arguments(), **options, use_cache=False))
    chunked = model.generate(**batch.arguments(), **options, prefill_chunk_size=4)
    assert torch.equal(together, chunked)
    prompt = batch.input_ids.shape[1]
    for row in range(3):
        alone = model.generate(**batch.alone(row), **options)
        new = alone[:, batch.alone(row)["input_ids"].shape[1] :]
        assert torch.equal(together[2 * row : 2 * row + 2, prompt : prompt + new.shape[1]], new)


def test_a_row_generates_what_it_generates_alone() -> None:
    model = make_model()
    batch = ragged_batch("left")
    together = model.generate(**batch.arguments(), **NO_STOP, max_new_tokens=8)
    for row in range(3):
        arguments = batch.alone(row)
        alone = model.generate(**arguments, **NO_STOP, max_new_tokens=8)
        assert torch.equal(together[row, -8:], alone[0, -8:])


@pytest.mark.parametrize("attend", ATTEND_MODES)
@pytest.mark.parametrize("cuts", [[5], [1, 2, 3], [4, 9, 15], list(range(1, 23))])
def test_chunked_prefill(attend: str, cuts: list[int]) -> None:
    """Any split of a prompt, images arriving with their tokens, gives the logits of one pass."""
    model = make_model(attend=attend)
    batch = ragged_batch(counts=(0, 1, 5))
    arguments = batch.alone(2)
    ids, pixels = arguments["input_ids"], arguments["pixel_values"]
    whole = model(ids, pixels).logits
    cache, used, pieces = None, 0, []
    for chunk in ids.tensor_split(cuts, dim=1):
        images = int((chunk == IMAGE).sum())
        out = model(chunk, pixels[:, used : used + images], cache=cache, use_cache=True)
        used, cache = used + images, out.cache
        pieces.append(out.logits)
    assert_close_to_reference(torch.cat(pieces, 1), whole, torch.float32)


def test_images_appended_in_a_later_turn_of_a_ragged_batch() -> None:
    """Each row keeps its own media index; rows add 2, 0 and 1 images to 1, 2 and 0 earlier ones."""
    model = make_model()
    ids = torch.randint(0, 256, (3, 16))
    ids[0, [1, 9, 12]] = IMAGE
    ids[1, [2, 4]] = IMAGE
    ids[2, [10]] = IMAGE
    images = [3, 2, 1]
    pixels = torch.full((3, 3, 1, 3, 32, 32), float("nan"))
    for row, count in enumerate(images):
        pixels[row, :count] = torch.randn(count, 1, 3, 32, 32)
    whole = model(ids, pixels, num_images=torch.tensor(images)).logits

    early = torch.tensor([1, 2, 0])
    late = torch.tensor(images) - early
    new = torch.full_like(pixels, float("nan"))
    for row in range(3):
        new[row, : late[row]] = pixels[row, early[row] : images[row]]
    first = model(ids[:, :8], pixels[:, :2], num_images=early, use_cache=True)
    second = model(ids[:, 8:], new, num_images=late, cache=first.cache, use_cache=True)
    assert_close_to_reference(torch.cat((first.logits, second.logits), 1), whole, torch.float32)
    assert second.cache.num_images.tolist() == images


def turn(seed: int) -> dict[str, torch.Tensor]:
    """Three tokens for each of two rows; an image for the second, for the first in every other."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (2, 3), generator=generator)
    counts = torch.tensor([seed % 2, 1])
    ids[:, 0] = torch.where(counts > 0, IMAGE, ids[:, 0])
    pixels = torch.randn(2, 1, 1, 3, 32, 32, generator=generator)
    pixels[counts == 0] = float("nan")
    return {"input_ids": ids, "pixel_values": pixels, "num_images": counts}


def all_at_once(model, turns: list[int]) -> torch.Tensor:
    """Logits of the last turn, everything in one call."""
    parts = [turn(seed) for seed in turns]
    counts = sum(part["num_images"] for part in parts)
    slots = torch.full((2, int(counts.max()), 1, 3, 32, 32), float("nan"))
    for row in range(2):
        kept = [part["pixel_values"][row] for part in parts if part["num_images"][row]]
        if kept:
            slots[row, : len(kept)] = torch.cat(kept)
    ids = torch.cat([part["input_ids"] for part in parts], 1)
    return model(ids, slots, num_images=counts).logits[:, -3:]


@torch.no_grad()
def test_a_turn_copies_its_own_image_only() -> None:
    """Media of earlier turns stay where they are, but for now and then; logits are exact."""
    model = make_model(attend="previous")
    cache, places, turns = None, [], list(range(12))
    for seed in turns:
        out = model(**turn(seed), cache=cache, use_cache=True)
        cache = out.cache
        places.append([tensor.data_ptr() for kv in cache.media for tensor in kv])
        assert_close_to_reference(out.logits, all_at_once(model, turns[: seed + 1]), torch.float32)
    assert cache.num_images.tolist() == [6, 12]
    moved = sum(before != after for before, after in itertools.pairwise(places))
    assert moved <= 2


@torch.no_grad()
@pytest.mark.parametrize("rows", [[0, 1], [1, 0]])
def test_copies_of_a_cache_grow_apart(rows: list[int]) -> None:
    """Each has media of its own, whichever goes on first; a cache that went on is refused."""
    model = make_model(attend="previous")
    start = model(**turn(1), use_cache=True).cache
    copy = start.select_rows(torch.tensor(rows))
    held = [tensor.clone() for kv in copy.media for tensor in kv]
    first = model(**turn(3), cache=start)
    assert_close_to_reference(first.logits, all_at_once(model, [1, 3]), torch.float32)
    assert all(map(torch.equal, held, [tensor for kv in copy.media for tensor in kv]))
    with pytest.raises(ValueError, match="another call has extended it in place"):
        model(**turn(4), cache=start)
    other = {name: tensor[rows] for name, tensor in turn(5).items()}
    second = model(**other, cache=copy).logits
    assert_close_to_reference(second, all_at_once(model, [1, 5])[rows], torch.float32)
    # What the other wrote is not in the first one's.
    third = model(**turn(6), cache=first.cache).logits
    assert_close_to_reference(third, all_at_once(model, [1, 3, 6]), torch.float32)


def test_a_turn_without_gradients_spares_what_a_backward_needs() -> None:
    """Keys and values that a graph holds are not written to."""
    model = make_model(attend="previous")
    first = model(**turn(1), use_cache=True)
    expected = torch.autograd.grad(first.logits.sum(), model.perceiver.latents, retain_graph=True)[
        0
    ]
    with torch.no_grad():
        second = model(**turn(3), cache=first.cache)
        model(**turn(5), cache=second.cache)
    found = torch.autograd.grad(first.logits.sum(), model.perceiver.latents)[0]
    assert torch.equal(found, expected) and found.any()


def test_a_cache_of_inference_mode_goes_on_outside() -> None:
    model = make_model(attend="previous")
    with torch.inference_mode():
        cache = model(**turn(1), use_cache=True).cache
    with torch.no_grad():
        out = model(**turn(3), cache=cache)
        assert_close_to_reference(out.logits, all_at_once(model, [1, 3]), torch.float32)


def test_a_cache_that_another_call_has_extended_is_refused() -> None:
    model = make_model()
    batch = ragged_batch("left")
    token = torch.tensor([[3], [4], [5]])
    start = model(**batch.arguments(), use_cache=True).cache
    copy = start.select_rows(torch.arange(3))
    first = model(token, cache=start).logits
    with pytest.raises(ValueError, match=r"made after 23 tokens, .* extended it in place to 24"):
        model(token, cache=start)
    assert_close_to_reference(model(token, cache=copy).logits, first, torch.float32)
    with pytest.raises(TypeError, match="cache must be a FlamingoCache, got dict"):
        model(token, cache={})


def test_select_rows_repeats_and_reorders() -> None:
    model = make_model()
    batch = ragged_batch("left")
    out = model(**batch.arguments(), use_cache=True)
    rows = torch.tensor([2, 0, 2])
    picked = out.cache.select_rows(rows)
    tokens = torch.tensor([[3], [4], [5]])
    plain = model(tokens[[1, 0, 0]], cache=out.cache, use_cache=True).logits
    selected = model(tokens, cache=picked, use_cache=True).logits
    assert_close_to_reference(selected[1], plain[0], torch.float32)
    assert_close_to_reference(selected[0], plain[2], torch.float32)


def test_stops_and_pads() -> None:
    model = make_model()
    batch = ragged_batch("left")
    free = model.generate(**batch.arguments(), **NO_STOP, max_new_tokens=6)
    stop = int(free[0, -6])
    stopped = model.generate(**batch.arguments(), stop_token_ids=[stop], max_new_tokens=6)
    new = stopped[0, batch.input_ids.shape[1] :]
    assert new[0] == stop and (new[1:] == TINY.pad_token_id).all()
    others = [row for row in (1, 2) if stop not in free[row, -6:].tolist()]
    for row in others:
        assert torch.equal(stopped[row], free[row])


def test_media_is_encoded_once() -> None:
    model = make_model()
    calls = []
    model.vision_encoder.register_forward_hook(lambda *_: calls.append("vision"))
    model.perceiver.register_forward_hook(lambda *_: calls.append("resampler"))
    for layer in model.gated_cross_attn_layers:
        layer.attn.to_kv.register_forward_hook(lambda m, i, o: calls.append(tuple(i[0].shape)))
    batch = ragged_batch("left", counts=(2, 2))
    model.generate(**batch.arguments(), **NO_STOP, max_new_tokens=5)
    assert calls.count("vision") == calls.count("resampler") == 1
    assert [c for c in calls if c not in ("vision", "resampler")] == [(2, 2, 16, 64)] * 2


def test_top_p_of_nearly_nothing_is_greedy() -> None:
    model = make_model()
    batch = ragged_batch("left")
    greedy = model.generate(**batch.arguments(), **NO_STOP, max_new_tokens=5)
    nucleus = model.generate(
        **batch.arguments(), **NO_STOP, max_new_tokens=5, do_sample=True, top_p=1e-6
    )
    assert torch.equal(greedy, nucleus)


def test_a_finished_row_repeats_its_stop_token_where_there_is_no_padding_token() -> None:
    model = make_model()
    batch = ragged_batch("left")
    free = model.generate(**batch.arguments(), **NO_STOP, max_new_tokens=6)
    stops = [int(free[0, -5]), int(free[1, -6])]
    padded = model.generate(**batch.arguments(), stop_token_ids=stops, max_new_tokens=6)
    model.config = replace(TINY, pad_token_id=None)
    repeated = model.generate(**batch.arguments(), stop_token_ids=stops, max_new_tokens=6)
    for with_pad, row in zip(padded[:, -6:].tolist(), repeated[:, -6:].tolist(), strict=True):
        ends = [i for i, token in enumerate(with_pad) if token in stops]
        length = ends[0] + 1 if ends else 6
        assert row == with_pad[:length] + [with_pad[length - 1]] * (6 - length)


TEMPERATURE = "temperature must be finite and at least 0.0001, got"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids must be an int64 .* got list"),
        ({"input_ids": torch.tensor([1, 2])}, ValueError, r"\[B, T\], got shape \(2,\)"),
        (
            {"input_ids": torch.zeros(1, 0).long(), "attention_mask": torch.ones(1, 0)},
            ValueError,
            r"shape \(1, 0\): a batch needs at least one row and one token",
        ),
        ({"attention_mask": [[1, 1]]}, TypeError, "attention_mask must be a tensor, got list"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": "3"}, TypeError, "max_new_tokens must be an int, got '3'"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens must be an int, got 2.5"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens must be an int, got True"),
        ({"max_new_tokens": None}, TypeError, "max_new_tokens must be an int, got None"),
        ({"temperature": 0.0}, ValueError, f"{TEMPERATURE} 0.0"),
        ({"temperature": 1e-40}, ValueError, f"{TEMPERATURE} 1e-40"),
        ({"temperature": float("nan")}, ValueError, f"{TEMPERATURE} nan"),
        ({"temperature": float("inf")}, ValueError, f"{TEMPERATURE} inf"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 1.5}, TypeError, "top_k must be an int, got 1.5"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\], got 1.5"),
        ({"top_p": "0.9"}, TypeError, "top_p must be a number, got '0.9'"),
        ({"stop_token_ids": 5}, TypeError, "stop_token_ids must be a sequence of ints, got 5"),
        ({"stop_token_ids": [1, "2"]}, TypeError, r"a sequence of ints, got \[1, '2'\]"),
        (
            {"stop_token_ids": [3, 99999]},
            ValueError,
            r"stop_token_ids holds 99999, outside the vocabulary 0\.\.263",
        ),
    ],
)
def test_bad_arguments(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_model().generate(**{"input_ids": torch.tensor([[1, 2]]), **options})


def test_the_lowest_temperature_gives_finite_probabilities() -> None:
    ids = torch.tensor([[1, 2]])
    out = make_model().generate(ids, do_sample=True, temperature=1e-4, max_new_tokens=3, **NO_STOP)
    assert out.shape == (1, 5)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_prefill_in_chunks(chunk: int) -> None:
    model = make_model(attend="last_group")
    batch = ragged_batch("left")
    options = {**batch.arguments(), **NO_STOP, "max_new_tokens": 5}
    assert torch.equal(
        model.generate(**options, prefill_chunk_size=chunk), model.generate(**options)
    )


def test_several_samples_of_each_row() -> None:
    """Side by side, and each what the row repeated would give."""
    model = make_model()
    batch = ragged_batch("left")
    rows = torch.arange(3).repeat_interleave(2)
    options = {**NO_STOP, "max_new_tokens": 5, "do_sample": True}
    several = model.generate(
        **batch.arguments(),
        **options,
        num_return_sequences=2,
        generator=torch.Generator().manual_seed(1),
    )
    repeated = model.generate(
        **{name: tensor[rows] for name, tensor in batch.arguments().items()},
        **options,
        generator=torch.Generator().manual_seed(1),
    )
    assert torch.equal(several, repeated)
    assert not torch.equal(several[4], several[5])


def test_a_turn_continues_from_the_cache_of_the_last() -> None:
    """With an image more for one row, and a row that had stopped early."""
    model = make_model()
    batch = ragged_batch("left")
    free = model.generate(**batch.arguments(), **NO_STOP, max_new_tokens=5)
    stop = int(free[0, -4])
    first, cache = model.generate(
        **batch.arguments(), stop_token_ids=[stop], max_new_tokens=5, return_cache=True
    )
    assert cache.input_ids.shape == first.shape and cache.language.length == first.shape[1]
    assert (cache.attention_mask[0, -3:] == 0).all()
    new = torch.randint(0, 256, (3, 4))
    new[1, 1] = IMAGE
    pixels = torch.randn(3, 1, 1, 3, 32, 32)
    turn = {"input_ids": new, "num_images": torch.tensor([0, 1, 0]), "max_new_tokens": 4}
    second = model.generate(pixel_values=pixels, cache=cache, **turn, **NO_STOP)
    assert torch.equal(second[:, :4], new)
    slots = torch.cat((batch.pixel_values, torch.full_like(pixels, float("nan"))), 1)
    slots[1, 1] = pixels[1, 0]
    whole = model.generate(
        torch.cat((first, new), 1),
        slots,
        torch.cat((cache.attention_mask, torch.ones_like(new)), 1),
        num_images=torch.tensor([0, 2, 5]),
        max_new_tokens=4,
        use_cache=False,
        **NO_STOP,
    )
    assert torch.equal(second, whole[:, first.shape[1] :])


class Recorder:
    """A streamer."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.ended = False

    def put(self, tokens: torch.Tensor) -> None:
        self.seen.append(tokens.clone())

    def end(self) -> None:
        self.ended = True


def test_streaming() -> None:
    model, streamer = make_model(), Recorder()
    ids = torch.tensor([[1, 2, 3]])
    out = model.generate(ids, max_new_tokens=4, streamer=streamer, **NO_STOP)
    assert streamer.ended and torch.equal(streamer.seen[0], ids)
    assert torch.equal(torch.stack(streamer.seen[1:], 1), out[:, 3:])


def test_options_of_other_language_models_are_named() -> None:
    model, ids = make_model(), torch.tensor([[1, 2]])
    with pytest.raises(
        ValueError, match=r"num_beam_groups, penalty_alpha: only with a Hugging Face .* a D"
    ):
        model.generate(ids, num_beam_groups=2, penalty_alpha=0.5)
    with pytest.raises(ValueError, match="does not take eos_token_id: say stop_token_ids="):
        model.generate(ids, eos_token_id=3)
    with pytest.raises(ValueError, match="num_beams > 1 with do_sample or a streamer: only with"):
        model.generate(ids, num_beams=2, do_sample=True)
    with pytest.raises(ValueError, match="num_return_sequences=3 is more than num_beams=2"):
        model.generate(ids, num_beams=2, num_return_sequences=3)
    with pytest.raises(ValueError, match="return_cache needs num_beams=1 and use_cache=True"):
        model.generate(ids, return_cache=True, use_cache=False)
    with pytest.raises(ValueError, match="num_return_sequences=2 needs do_sample=True"):
        model.generate(ids, num_return_sequences=2)
    cache = model(ids, use_cache=True).cache
    with pytest.raises(ValueError, match="cache was given together with use_cache=False"):
        model.generate(ids, cache=cache, use_cache=False)


def test_right_padding_is_refused() -> None:
    batch = ragged_batch("right")
    with pytest.raises(ValueError, match="row 0 ends in padding; pad prompts on the left"):
        make_model().generate(**batch.arguments())
