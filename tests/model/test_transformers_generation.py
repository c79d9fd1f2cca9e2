"""Generation by transformers' own `generate`: cached equals uncached for all of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flamingo_kernels import FlamingoModel
from testing.backbones import IMAGE, LANGUAGE_OPTIONS, clip, language_model, open_gates

transformers = pytest.importorskip("transformers")
NO_STOP = {"stop_token_ids": []}
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "best beams": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
    "beam samples": {"num_beams": 3, "do_sample": True, "top_k": 20},
    "options": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
}


def build(model_type: str = "llama") -> FlamingoModel:
    torch.manual_seed(4)
    lm = language_model(model_type)
    return open_gates(FlamingoModel.from_backbones(clip(), lm)).eval()


def prompt() -> dict[str, Tensor]:
    """Left-padded rows of 0, 1 and 3 images; unused slots hold NaN."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 90, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :4] = mask[0, :4] = 0
    ids[1, :2] = mask[1, :2] = 0
    ids[1, 5] = IMAGE
    ids[2, [1, 5, 6]] = IMAGE
    counts = torch.tensor([0, 1, 3])
    pixels = torch.randn(3, 3, 1, 3, 16, 16, generator=generator)
    for row, count in enumerate(counts.tolist()):
        pixels[row, count:] = float("nan")
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels,
        "num_images": counts,
    }


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_neox", "mpt", "opt"])
def test_cached_equals_uncached(model_type: str, way: str) -> None:
    model = build(model_type)
    results = [
        model.generate(
            **prompt(), **WAYS[way], **NO_STOP, max_new_tokens=8, generator=seeded(), **extra
        )
        for extra in ({}, {"use_cache": False}, {"prefill_chunk_size": 4})
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    new = results[0][:, 11:]
    assert len(new) == 3 * WAYS[way].get("num_return_sequences", 1) and not (new == IMAGE).any()


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_static_cache(model_type: str) -> None:
    model = build(model_type)
    options = {**prompt(), **NO_STOP, "max_new_tokens": 6}
    fixed = model.generate(**options, cache_implementation="static")
    assert torch.equal(fixed, model.generate(**options))


def test_assisted_decoding() -> None:
    """Several tokens a step, of which some are taken back."""
    model, batch = build(), prompt()
    one = {name: tensor[1:2] for name, tensor in batch.items()}
    options = {**one, **NO_STOP, "max_new_tokens": 10}
    guessed = model.generate(**options, prompt_lookup_num_tokens=3)
    assert torch.equal(guessed, model.generate(**options))


@pytest.mark.parametrize("model_type", list(LANGUAGE_OPTIONS))
def test_every_family_decodes_as_it_recomputes(model_type: str) -> None:
    """Greedy, by the model's own forward, without generate."""
    model = build(model_type)
    arguments = prompt()
    ours = model.generate(**arguments, **NO_STOP, max_new_tokens=6)
    ids, mask = arguments.pop("input_ids"), arguments.pop("attention_mask")
    with torch.no_grad():
        for _ in range(6):
            logits = model(ids, attention_mask=mask, **arguments).logits[:, -1]
            logits[:, IMAGE] = float("-inf")
            ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    assert torch.equal(ours, ids)


@pytest.mark.parametrize("way", ["greedy", "beams", "best beams"])
def test_a_row_generates_what_it_generates_alone(way: str) -> None:
    model = build()
    batch = prompt()
    together = model.generate(**batch, **WAYS[way], **NO_STOP, max_new_tokens=6)
    copies = WAYS[way].get("num_return_sequences", 1)
    for row in range(3):
        real, count = batch["attention_mask"][row].bool(), int(batch["num_images"][row])
        alone = model.generate(
            batch["input_ids"][row, real][None],
            batch["pixel_values"][row, :count][None],
            **WAYS[way],
            **NO_STOP,
            max_new_tokens=6,
        )
        assert torch.equal(together[row * copies : (row + 1) * copies, -6:], alone[:, -6:])


def test_stops_at_the_end_of_chunk() -> None:
    model = build()
    free = model.generate(**prompt(), **NO_STOP, max_new_tokens=12)[:, 11:]
    end = int(free[0, 3])
    model.config = replace(model.config, end_of_chunk_token_id=end)
    stopped = model.generate(**prompt(), max_new_tokens=12)[:, 11:]
    lengths = []
    for row, whole in zip(stopped.tolist(), free.tolist(), strict=True):
        length = next((i + 1 for i, token in enumerate(whole) if token in (end, 2)), 12)
        assert row[:length] == whole[:length]
        assert set(row[length:]) <= {0}
        lengths.append(length)
    assert min(lengths) < max(lengths)


@pytest.mark.parametrize("way", ["greedy", "sampling", "beams"])
def test_media_is_encoded_and_projected_once(way: str) -> None:
    model = build()
    calls = []
    model.vision_encoder.register_forward_hook(lambda *_: calls.append("vision"))
    model.perceiver.register_forward_hook(lambda *_: calls.append("resampler"))
    for layer in model.gated_cross_attn_layers:
        layer.attn.to_kv.register_forward_hook(lambda *_: calls.append("projection"))
    model.generate(**prompt(), **WAYS[way], **NO_STOP, max_new_tokens=5)
    assert sorted(calls) == ["projection"] * 3 + ["resampler", "vision"]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_neox"])
def test_conversation_with_an_image_appended(model_type: str, options: dict) -> None:
    """The second turn encodes its own image alone and equals recomputing everything."""
    model = build(model_type)
    batch = prompt()
    first, cache = model.generate(**batch, max_new_tokens=5, return_cache=True, **NO_STOP)
    assert cache.input_ids.shape == first.shape
    new = torch.randint(3, 90, (3, 4), generator=seeded())
    new[1, 0] = new[2, 2] = IMAGE
    pixels = torch.randn(3, 1, 1, 3, 16, 16, generator=seeded())
    encoded = []
    hook = model.vision_encoder.register_forward_hook(lambda m, i, o: encoded.append(len(i[0])))
    second = model.generate(
        new,
        pixels,
        num_images=torch.tensor([0, 1, 1]),
        cache=cache,
        max_new_tokens=5,
        **options,
        **NO_STOP,
    )
    hook.remove()
    assert encoded == [2]
    slots = torch.full((3, 4, 1, 3, 16, 16), float("nan"))
    slots[1, 0], slots[2, :3] = batch["pixel_values"][1, 0], batch["pixel_values"][2]
    slots[1, 1], slots[2, 3] = pixels[1, 0], pixels[2, 0]
    whole = model.generate(
        torch.cat((first, new), 1),
        slots,
        torch.cat((cache.attention_mask, torch.ones_like(new)), 1),
        num_images=torch.tensor([0, 2, 4]),
        max_new_tokens=5,
        use_cache=False,
        **options,
        **NO_STOP,
    )
    assert torch.equal(second, whole[:, first.shape[1] :])


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_one_support_set_serves_many_queries(model_type: str) -> None:
    """Read once; each query equals support and query in one prompt."""
    model = build(model_type)
    generator = torch.Generator().manual_seed(5)
    support = torch.randint(3, 90, (1, 10), generator=generator)
    support[0, [0, 5]] = IMAGE
    pixels = torch.randn(1, 2, 1, 3, 16, 16, generator=generator)
    queries = torch.randint(3, 90, (3, 4), generator=generator)
    queries[:, 0] = IMAGE
    images = torch.randn(3, 1, 1, 3, 16, 16, generator=generator)
    with torch.no_grad():
        cache = model(support, pixels, use_cache=True).cache
    everyone = cache.select_rows(torch.zeros(3, dtype=torch.int64))
    together = model.generate(queries, images, cache=everyone, max_new_tokens=5, **NO_STOP)
    assert cache.language.length == 10  # and can serve again
    for row in range(3):
        one = model.generate(
            torch.cat((support, queries[row : row + 1]), 1),
            torch.cat((pixels, images[row : row + 1]), 1),
            max_new_tokens=5,
            **NO_STOP,
        )
        assert torch.equal(together[row], one[0, 10:])


def test_streaming_and_other_outputs() -> None:
    model = build()
    pieces: list[Tensor] = []

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, value: Tensor) -> None:
            pieces.append(value.reshape(-1))

        def end(self) -> None:
            pieces.append(torch.tensor([-1]))

    ids = torch.tensor([[5, 6, 7]])
    out = model.generate(ids, max_new_tokens=4, streamer=Streamer(), **NO_STOP)
    assert torch.cat(pieces).tolist() == [*out[0].tolist(), -1]
    detailed = model.generate(
        ids, max_new_tokens=4, return_dict_in_generate=True, output_scores=True, **NO_STOP
    )
    assert torch.equal(detailed.sequences, out) and len(detailed.scores) == 4


def test_the_global_generator_is_left_alone() -> None:
    model = build()
    state = torch.get_rng_state()
    options = {"do_sample": True, "max_new_tokens": 6, **NO_STOP}
    first = model.generate(**prompt(), **options, generator=seeded())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.generate(**prompt(), **options, generator=seeded()), first)
    other = torch.Generator().manual_seed(12)
    assert not torch.equal(model.generate(**prompt(), **options, generator=other), first)


def test_generation_leaves_no_call_behind() -> None:
    """An error inside does not leak into the next call."""
    model = build()
    arguments = prompt()

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    handle = model.language_model.blocks[1].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model.generate(**arguments, max_new_tokens=2)
    handle.remove()
    ids = arguments["input_ids"]
    lm = model.language_model
    with torch.no_grad():
        assert torch.equal(lm(ids).logits, lm.model(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eos_token_id": 5}, "does not take eos_token_id: say stop_token_ids= instead"),
        ({"pad_token_id": 5}, "does not take pad_token_id: .* stop_token_ids="),
        (
            {"generation_config": transformers.GenerationConfig(max_new_tokens=3)},
            "does not take generation_config: give its options one by one",
        ),
        ({"max_length": 20}, "does not take max_length: say max_new_tokens="),
        ({"guidance_scale": 3.0}, "does not take guidance_scale: the second prompt"),
        ({"past_key_values": 1}, "does not take past_key_values: say cache="),
        ({"inputs_embeds": torch.zeros(3, 11, 32)}, "does not take inputs_embeds: images are"),
        (
            {"return_cache": True, "return_dict_in_generate": True},
            "return_cache and return_dict_in_generate both change",
        ),
        (
            {"return_cache": True, "cache_implementation": "static"},
            "return_cache does not go with cache_implementation='static'",
        ),
        (
            {"return_cache": True, "max_time": 1.0},
            r"return_cache does not go with max_time=1\.0: which tokens are padding",
        ),
        (
            {"return_cache": True, "stop_strings": ["x"]},
            r"return_cache does not go with stop_strings=\['x'\]: which tokens",
        ),
        (
            {"return_cache": True, "stopping_criteria": [lambda *_: torch.ones(3).bool()]},
            r"return_cache does not go with stopping_criteria=\[",
        ),
    ],
)
def test_options_that_collide_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build().generate(**prompt(), **options)


@pytest.mark.parametrize(
    ("name", "value", "return_cache"),
    [
        ("guidance_scale", 2.0, False),
        ("cache_implementation", "static", True),
        ("max_time", 1.0, True),
        ("stop_strings", ["x"], True),
    ],
)
def test_defaults_that_cannot_be_honoured_are_refused(name, value, return_cache) -> None:
    """Those of the language model's own generation_config, unless the call says otherwise."""
    model = build()
    own = model.language_model.model.generation_config
    setattr(own, name, value)
    options = {**prompt(), **NO_STOP, "max_new_tokens": 2, "return_cache": return_cache}
    with pytest.raises(
        ValueError, match=f"{name}.*the language model's own generation_config: set"
    ):
        model.generate(**options)
    setattr(own, name, None)
    own.guidance_scale, own.return_dict_in_generate = 1.0, True  # no guidance; says what is given
    out = model.generate(**options)
    assert isinstance(out[0] if return_cache else out, Tensor)


def test_a_turn_with_details_has_the_turns_sequences() -> None:
    model = build()
    cache = model.generate(**prompt(), max_new_tokens=3, return_cache=True, **NO_STOP).cache
    turn = {"input_ids": torch.full((3, 2), 7), "max_new_tokens": 3, **NO_STOP}
    plain = model.generate(**turn, cache=cache.select_rows(torch.arange(3)))
    detailed = model.generate(**turn, cache=cache, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(detailed.sequences, plain) and plain.shape == (3, 5)
    assert len(detailed.scores) == 3


@pytest.mark.parametrize("place", ["config", "generation_config"])
def test_every_end_of_text_of_the_language_model_stops(place: str) -> None:
    """Gemma 3 and Llama 3 have lists; none is to be passed over for the first."""
    if place == "config":
        lm = language_model("gemma3_text", eos_token_id=[2, 30])
    else:
        lm = language_model("gemma3_text")
        lm.generation_config.eos_token_id = [2, 30]
    model = FlamingoModel.from_backbones(16, lm).eval()
    ids = torch.tensor([[5, 6]])
    for stop in (2, 30, model.config.end_of_chunk_token_id):
        out = model.generate(ids, max_new_tokens=5, sequence_bias={(stop,): 1000.0})
        assert out.tolist() == [[5, 6, stop]]
    out = model.generate(ids, max_new_tokens=5, sequence_bias={(30,): 1000.0}, stop_token_ids=[2])
    assert out.tolist() == [[5, 6, *[30] * 5]]
