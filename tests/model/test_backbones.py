"""FlamingoModel around transformers' models."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from flamingo_kernels import FlamingoConfig, FlamingoModel
from flamingo_kernels.language import Decoder, add_media_tokens
from testing.backbones import (
    DIM,
    EAGER_ONLY,
    END_OF_CHUNK,
    IMAGE,
    LANGUAGE_OPTIONS,
    VOCAB,
    clip,
    language_model,
    open_gates,
    siglip,
    state_of,
    word_tokenizer,
)
from testing.budgets import assert_close_to_reference, assert_gradients_close
from testing.tiny_model import make_model

pytest.importorskip("transformers")
MODEL_TYPES = list(LANGUAGE_OPTIONS)


def prompt() -> dict[str, Tensor]:
    """Left-padded rows with text before the first image and one and two images."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 90, (2, 9), generator=generator)
    ids[0, :3], ids[0, 5], ids[1, 2], ids[1, 6] = 0, IMAGE, IMAGE, IMAGE
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    pixels = torch.randn(2, 2, 1, 3, 16, 16, generator=generator)
    pixels[0, 1] = float("nan")
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels,
        "num_images": torch.tensor([1, 2]),
    }


def build(model_type: str = "llama", **changes) -> FlamingoModel:
    torch.manual_seed(4)
    lm = language_model(model_type, **changes)
    return open_gates(FlamingoModel.from_backbones(clip(), lm)).eval()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = gradients_of(model, prompt())
    assert any(gradient.any() for gradient in found.values())
    return found


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [(t, "eager") for t in MODEL_TYPES] + [(t, "sdpa") for t in MODEL_TYPES if t not in EAGER_ONLY],
)
def test_wrap_run_train_and_unwrap(model_type: str, attention: str) -> None:
    """Zero gates give the LM's own bits, training moves nothing frozen, nothing stays behind."""
    lm, encoder = language_model(model_type, attention), clip()
    weights = copy.deepcopy(lm.state_dict())
    wanted = {n: p.requires_grad for n, p in lm.named_parameters()}
    attributes = {n: set(module.__dict__) for n, module in lm.named_modules()}
    arguments = prompt()
    ids, mask = arguments["input_ids"], arguments["attention_mask"]
    model = FlamingoModel.from_backbones(encoder, lm)
    closed = model(**arguments).logits
    untouched = plain_logits(lm, ids, mask)
    assert torch.equal(closed, model.language_model(ids, mask).logits)

    open_gates(model).train()
    model.gradient_checkpointing_enable()
    optimiser = torch.optim.SGD(model.trainable_parameters().values(), lr=0.1)
    first = model(**arguments, labels=ids).loss
    first.backward()
    optimiser.step()
    assert model(**arguments, labels=ids).loss < first

    vision, unwrapped = model.unwrap()
    assert vision is encoder and unwrapped is lm
    assert {n: p.requires_grad for n, p in lm.named_parameters()} == wanted
    assert {n: set(module.__dict__) for n, module in lm.named_modules()} == attributes
    assert all(torch.equal(tensor, weights[n]) for n, tensor in lm.state_dict().items())
    assert torch.equal(plain_logits(lm, ids, mask), untouched)
    hooked = [n for n, m in lm.named_modules() if m._forward_pre_hooks or m._forward_hooks]
    assert not hooked


def plain_logits(lm: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return lm(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("include_frozen", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_save_and_load(model_type: str, include_frozen: bool, tmp_path) -> None:
    model = build(model_type)
    expected = model(**prompt()).logits
    model.save_pretrained(tmp_path, include_frozen)
    parts = {}
    if not include_frozen:
        parts = {"vision_encoder": clip(), "language_model": language_model(model_type)}
    loaded = FlamingoModel.from_pretrained(tmp_path, **parts).eval()
    assert loaded.config == model.config
    assert torch.equal(loaded(**prompt()).logits, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_activation_checkpointing_changes_no_gradient(model_type: str, use_reentrant: bool) -> None:
    model = build(model_type).train()
    plain = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    runs = []
    inner = next(m for m in model.language_model.blocks[1].modules() if "Norm" in type(m).__name__)
    handle = inner.register_forward_hook(lambda *_: runs.append(1))
    assert_gradients_close(gradients(model), plain, torch.float32)
    assert len(runs) == 2  # forward, and again in the backward
    handle.remove()
    model.gradient_checkpointing_disable()
    assert "forward" not in model.language_model.blocks[1].__dict__


def test_activation_checkpointing_leaves_caches_alone() -> None:
    model = build()
    arguments = prompt()
    plain = model(**arguments, use_cache=True)
    model.gradient_checkpointing_enable()
    again = model(**arguments, use_cache=True)
    again.logits.sum().backward()
    assert again.cache.language.length == plain.cache.language.length


SAVES_PRODUCTS = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ({"use_reentrant": True, "preserve_rng_state": False}, {}),
        ({"determinism_check": "none", "debug": False}, {"every_n_layers": 2}),
        ({"context_fn": SAVES_PRODUCTS}, {"every_n_layers": 1, "offload": False}),
        (None, {"offload": True}),
    ],
    ids=["re-entrant", "every second layer", "selective", "offload"],
)
def test_keywords_of_activation_checkpointing(options, keywords) -> None:
    """Those of transformers' Trainer, and of torch."""
    model = build().train()
    plain = gradients(model)
    assert not model.is_activation_checkpointing
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=options, **keywords)
    assert model.is_activation_checkpointing
    recomputed = ["forward" in block.__dict__ for block in model.language_model.blocks]
    step = keywords.get("every_n_layers", 1)
    assert recomputed == [layer % step == 0 for layer in range(len(recomputed))]
    assert_gradients_close(gradients(model), plain, torch.float32)
    model.activation_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("options", "keywords", "message"),
    [
        ({"depth": 2}, {}, r"unknown checkpointing options \['depth'\].*use_reentrant=False: "),
        ({"use_reentrant": True, "debug": True}, {}, r"options \['debug'\].*use_reentrant=True: "),
        ({"use_reentrant": "no"}, {}, "use_reentrant must be True or False, got 'no'"),
        (None, {"every_n_layers": 0}, "every_n_layers must be an integer of at least 1, got 0"),
        (None, {"offload": 1}, "offload must be True or False, got 1"),
    ],
)
def test_keywords_that_are_refused(options, keywords, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        build().gradient_checkpointing_enable(options, **keywords)


def test_own_decoder_checkpoints_too() -> None:
    config = FlamingoConfig.from_name("tiny")
    model = open_gates(FlamingoModel(config)).train()
    ids = torch.tensor([[3, config.image_token_id, 5, 6]])
    pixels = torch.randn(1, 1, 1, 3, 32, 32)

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, pixels, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.trainable_parameters().items()}

    plain = run()
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert_gradients_close(run(), plain, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "checkpointing"), [("llama", True), ("gpt_neox", False)])
def test_compile(model_type: str, checkpointing: bool) -> None:
    model = build(model_type).train()
    plain = gradients(model)
    logits = model(**prompt()).logits
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.compile(backend="aot_eager")
    assert_close_to_reference(model(**prompt()).logits, logits, torch.float32)
    assert_gradients_close(gradients(model), plain, torch.float32)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bf16_and_autocast(model_type: str) -> None:
    model = build(model_type)
    with torch.no_grad():
        exact = model(**prompt()).logits
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(**prompt()).logits
        # A frozen model in bf16 with a bridge in fp32, as one trains it.
        model.language_model.bfloat16()
        model.vision_encoder.bfloat16()
        mixed = model(**prompt())
        narrow = model.bfloat16()(**prompt())
    assert mixed.logits.dtype == narrow.logits.dtype == torch.bfloat16
    real = prompt()["attention_mask"].bool()
    for what, logits in (("autocast", autocast), ("mixed", mixed.logits), ("bf16", narrow.logits)):
        assert_close_to_reference(logits[real], exact[real], torch.bfloat16, what)


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
)
def test_a_narrower_bridge_leaves_the_residual_stream_alone(wide, narrow, checkpointing) -> None:
    """With zero gates the logits keep the language model's bits; with open ones its own error."""
    lm = language_model("llama").to(wide)
    arguments = prompt()
    model = FlamingoModel.from_backbones(clip(), lm).eval()
    expected = model.language_model(arguments["input_ids"], arguments["attention_mask"]).logits
    for part in (model.perceiver, model.gated_cross_attn_layers):
        part.to(narrow)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    real = arguments["attention_mask"].bool()
    assert torch.equal(model(**arguments).logits[real], expected[real])
    open_gates(model)
    logits = model(**arguments).logits
    assert logits.dtype == wide and not torch.equal(logits[real], expected[real])
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    exact = model.double()(**arguments).logits
    assert_close_to_reference(logits[real], exact[real], narrow)


@pytest.mark.parametrize("tower", [clip, siglip])
def test_vision_encoders(tower) -> None:
    model = FlamingoModel.from_backbones(tower(), language_model("llama"))
    images = torch.randn(2, 3, 16, 16)
    patches = tower()(images).last_hidden_state
    kept = patches[:, 1:] if tower is clip else patches
    assert torch.equal(model.vision_encoder(images), kept)
    assert model.vision_encoder.image_mean is not None


def test_two_towers_give_their_vision_model() -> None:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small["num_attention_heads"] = 2
    vision = {**small, "image_size": 16, "patch_size": 8}
    both = CLIPModel(CLIPConfig(vision_config=vision, text_config=small))
    model = FlamingoModel.from_backbones(both, language_model("llama"))
    assert model.vision_encoder.module is both.vision_model
    assert model.unwrap()[0] is both
    assert FlamingoModel.from_backbones(16, language_model("llama")).unwrap()[0] == 16


class Patches(nn.Module):
    """Any module [N, 3, H, W] -> [N, S, D]."""

    image_size = 16
    output_dim = 3 * 64

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.unfold(images, 8, stride=8).transpose(1, 2)


def test_any_module_as_encoder(tmp_path) -> None:
    from flamingo_kernels.vision import wrap_vision_encoder

    encoder = wrap_vision_encoder(Patches(), output_dim=192, image_size=16)
    model = open_gates(FlamingoModel.from_backbones(encoder, language_model("llama"))).eval()
    expected = model(**prompt()).logits
    model.save_pretrained(tmp_path, include_frozen=True)
    with pytest.raises(ValueError, match="holds no vision_encoder; pass vision_encoder="):
        FlamingoModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="module of its user's: pass vision_encoder="):
        FlamingoModel(model.config)
    loaded = FlamingoModel.from_pretrained(tmp_path, vision_encoder=encoder).eval()
    assert torch.equal(loaded(**prompt()).logits, expected)
    with pytest.raises(
        ValueError, match=r"Bare has no config.hidden_size; call .*wrap_vision_encoder\("
    ):
        FlamingoModel.from_backbones(Bare(), language_model("llama"))


class Bare(nn.Module):
    """Says nothing about its sizes."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.unfold(images, 8, stride=8).transpose(1, 2)


def test_a_config_tells_the_sizes_of_a_module_that_does_not(tmp_path) -> None:
    from flamingo_kernels.vision import wrap_vision_encoder

    encoder = wrap_vision_encoder(Bare(), output_dim=192, image_size=16)
    model = open_gates(FlamingoModel.from_backbones(encoder, language_model("llama"))).eval()
    assert model.unwrap()[0] is encoder
    bare = Bare()
    again = FlamingoModel.from_backbones(bare, language_model("llama"), model.config).eval()
    assert again.config.vision.output_dim == 192
    again.save_pretrained(tmp_path)
    parts = {"vision_encoder": bare, "language_model": language_model("llama")}
    loaded = FlamingoModel.from_pretrained(tmp_path, **parts).eval()
    assert torch.equal(loaded(**prompt()).logits, again(**prompt()).logits)
    assert loaded.unwrap() == (bare, parts["language_model"])


@pytest.mark.parametrize("vision", [clip, lambda: 16], ids=["encoder", "features"])
@pytest.mark.parametrize("height", [16, 24])
def test_images_are_not_taken_for_features(vision, height) -> None:
    """[B, I, C, H, W] is transformers' layout; here the encoder gives as many channels as W."""
    model = FlamingoModel.from_backbones(vision(), language_model("llama")).eval()
    arguments = prompt()
    arguments["pixel_values"] = torch.randn(2, 2, 3, height, 16)
    counted = {**arguments, "num_frames": torch.full((2, 2), 3)}
    frames = model(**counted).logits
    if model.vision_encoder.image_size is None and height != 16:
        assert torch.equal(model(**arguments).logits, frames)  # no picture of these sides
        return
    message = rf"shape \(2, 2, 3, {height}, 16\) may be images .* pixel_values\[:, :, None\]"
    with pytest.raises(ValueError, match=message):
        model(**arguments)
    with pytest.raises(ValueError, match="may be images"):
        model.generate(**arguments)


def test_features_of_three_frames() -> None:
    """As many tokens as the encoder gives need no num_frames."""
    model = build()
    arguments = {**prompt(), "pixel_values": torch.randn(2, 2, 3, 4, 16)}
    counted = model(**arguments, num_frames=torch.full((2, 2), 3)).logits
    assert torch.equal(model(**arguments).logits, counted)


def adapted_clip() -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    options = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    return peft.get_peft_model(clip(), peft.LoraConfig(**options))


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(
    ("vision", "chosen"), [(clip, ""), (clip, "layers.1"), (adapted_clip, "lora_")]
)
def test_an_unfrozen_vision_encoder_is_trained(
    vision, chosen: str, counted: bool, tmp_path
) -> None:
    """As a whole, in part, or in adapters; saved, it comes back over the base."""
    model = open_gates(FlamingoModel.from_backbones(vision(), language_model("llama"))).eval()
    arguments = prompt()
    if not counted:
        arguments["pixel_values"] = arguments["pixel_values"].nan_to_num(0.5)[:, :1]
        arguments["input_ids"][1, 6] = 3
        del arguments["num_images"]
    frozen = gradients_of(model, arguments)
    assert not any(name.startswith("vision_encoder.") for name in frozen)
    wanted = {
        name
        for name, parameter in model.vision_encoder.named_parameters(prefix="vision_encoder")
        if chosen in name and parameter.requires_grad_(True) is parameter
    }
    assert wanted <= model.trainable_parameters().keys()
    found = gradients_of(model, arguments)
    without = {n for n in wanted if n not in found or not found[n].any()}
    # The pooled token is not read; a bias of keys shifts all scores of a query alike.
    assert all("post_layernorm" in n or "k_proj.bias" in n for n in without)
    assert without < wanted
    name = max(wanted - without, key=lambda n: found[n].norm())
    parameter, step = model.get_parameter(name), 1e-3
    with torch.no_grad():
        slope = found[name].norm().double()
        losses = []
        for sign in (1, -2):
            parameter += sign * step * found[name] / slope
            losses.append(model(**arguments, labels=arguments["input_ids"]).loss.double())
    assert ((losses[0] - losses[1]) / (2 * step) / slope - 1).abs() < 0.1

    expected = model(**arguments).logits
    model.save_pretrained(tmp_path)
    parts = {"vision_encoder": vision(), "language_model": language_model("llama")}
    loaded = FlamingoModel.from_pretrained(tmp_path, **parts).eval()
    assert torch.equal(loaded(**arguments).logits, expected)


def gradients_of(model: nn.Module, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**arguments, labels=arguments["input_ids"]).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("include_frozen", [True, False])
def test_a_decision_about_the_class_token_is_kept(drop, include_frozen, tmp_path) -> None:
    """Given as an argument, it holds for the bare tower of the same kind that is passed later."""
    from flamingo_kernels.vision import wrap_vision_encoder

    for name, tower, sizes in (("clip", clip(), {}), ("bare", Bare(), {"output_dim": 192})):
        sizes = sizes and {**sizes, "image_size": 16}
        encoder = wrap_vision_encoder(tower, **sizes, drop_class_token=drop)
        model = open_gates(FlamingoModel.from_backbones(encoder, language_model("llama"))).eval()
        expected = model(**prompt()).logits
        model.save_pretrained(tmp_path / name, include_frozen)
        parts = {}
        if name == "bare" or not include_frozen:
            parts = {"vision_encoder": tower, "language_model": language_model("llama")}
        loaded = FlamingoModel.from_pretrained(tmp_path / name, **parts).eval()
        assert loaded.vision_encoder.drop_class_token is drop
        assert torch.equal(loaded(**prompt()).logits, expected)
        lm = language_model("llama")
        again = FlamingoModel.from_backbones(tower, lm, model.config)
        assert again.vision_encoder.drop_class_token is drop
        other = wrap_vision_encoder(tower, **sizes, drop_class_token=not drop)
        message = f"drop_class_token={not drop}, but the config says drop_class_token={drop}"
        with pytest.raises(ValueError, match=message):
            FlamingoModel.from_pretrained(tmp_path / name, **{**parts, "vision_encoder": other})


def test_an_encoder_must_give_features() -> None:
    class Pooled(Patches):
        image_mean = image_std = None
        config = FlamingoConfig.from_name("tiny").vision

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).mean(1)

    model = FlamingoModel.from_backbones(clip(), language_model("llama"))
    model.vision_encoder = Pooled()
    with pytest.raises(ValueError, match=r"must return features \[N, S, 192\], got .* \(3, 192\)"):
        model(**prompt())


def test_features_take_the_place_of_pixels(tmp_path) -> None:
    """Of any model, and of one without an encoder; padded slots are not read."""
    model = build()
    arguments = prompt()
    expected = model(**arguments).logits
    pixels = arguments.pop("pixel_values")
    features = model.vision_encoder(pixels.nan_to_num().flatten(0, 2)).unflatten(0, (2, 2, 1))
    features[0, 1] = float("nan")
    assert torch.equal(model(pixel_values=features, **arguments).logits, expected)
    with pytest.raises(ValueError, match=r"must have 16 channels, got shape \(2, 2, 1, 4, 8\)"):
        model(pixel_values=features[..., :8], **arguments)

    blind = FlamingoModel.from_backbones(16, language_model("llama"))
    blind.perceiver.load_state_dict(model.perceiver.state_dict())
    blind.gated_cross_attn_layers.load_state_dict(model.gated_cross_attn_layers.state_dict())
    blind.save_pretrained(tmp_path, include_frozen=True)
    blind = FlamingoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(blind(pixel_values=features, **arguments).logits, expected)
    with pytest.raises(ValueError, match=r"no vision encoder: give features \[B, I, F, S, 16\]"):
        blind(**prompt())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mpt", "opt"])
def test_media_tokens_in_one_call(model_type: str) -> None:
    """New ids at the end, in OpenFlamingo's order; new rows repeat, old rows keep their bits."""
    results = []
    for _ in range(2):
        tokenizer = word_tokenizer("a", "cat")
        lm = language_model(model_type, vocab_size=3)
        before = lm.get_input_embeddings().weight.clone()
        tokens = add_media_tokens(tokenizer, lm)
        assert tokens == (4, 3, 5)
        weight = lm.get_input_embeddings().weight
        assert weight.shape[0] == lm.get_output_embeddings().weight.shape[0] == 6
        assert torch.equal(weight[:3], before)
        results.append(weight.clone())
    assert torch.equal(*results)
    assert tokenizer("<image> a cat <|endofchunk|>")["input_ids"] == [4, 1, 2, 3]
    assert add_media_tokens(tokenizer, lm) == tokens and len(tokenizer) == 6
    model = FlamingoModel.from_backbones(clip(), lm)
    assert (model.config.image_token_id, model.config.end_of_chunk_token_id) == (4, 3)
    with pytest.raises(ValueError, match="are both '<x>'"):
        add_media_tokens(tokenizer, image_token="<x>", end_of_chunk_token="<x>")


def test_markers_that_are_ordinary_words_become_special() -> None:
    """They keep their ids, and are found inside a word too."""
    tokenizer = word_tokenizer("a", "cat", "<image>", "<|endofchunk|>")
    unknown = tokenizer.convert_tokens_to_ids("[UNK]")
    assert tokenizer.encode("a<image>cat") == [unknown]
    tokens = add_media_tokens(tokenizer)
    assert tokens[:2] == (3, 4)
    assert tokenizer.encode("a<image>cat<|endofchunk|>") == [1, 3, 2, 4]
    assert tokenizer.decode([3, 1, 4], skip_special_tokens=True).split() == ["a"]
    assert {"<image>": 3, "<|endofchunk|>": 4}.items() <= tokenizer.get_added_vocab().items()
    assert add_media_tokens(tokenizer) == tokens


def test_rows_to_spare_are_kept() -> None:
    lm = language_model("llama")
    tokens = add_media_tokens(word_tokenizer("a", "cat"), lm)
    assert lm.get_input_embeddings().weight.shape[0] == VOCAB
    assert tokens.image_token_id == lm.config.image_token_id == 4


def test_what_cannot_be_wrapped_says_why() -> None:
    lm = language_model("llama")
    del lm.config.image_token_id
    with pytest.raises(ValueError, match=r"no image_token_id: call .*add_media_tokens\(tokenizer"):
        FlamingoModel.from_backbones(clip(), lm)
    with pytest.raises(ValueError, match="cannot wrap Linear: it has no config"):
        FlamingoModel.from_backbones(clip(), nn.Linear(1, 1))
    with pytest.raises(TypeError, match="language_model must be a module, got str"):
        FlamingoModel.from_backbones(clip(), "gpt2")
    for wrong in ("clip", True):
        message = f"must be a module, or an int for features, got {type(wrong).__name__}"
        with pytest.raises(TypeError, match=message):
            FlamingoModel.from_backbones(wrong, lm)
    with pytest.raises(ValueError, match=r"language_model.dim is 32, the config says 64"):
        config = FlamingoConfig.from_name("tiny")
        FlamingoModel.from_backbones(FlamingoModel(config).vision_encoder, lm, config)


def test_unwrapping_gives_back_the_training_mode() -> None:
    lm, encoder = language_model("llama").train(), clip().train()
    lm.model.layers[1].eval()
    encoder.requires_grad_(False)
    before = state_of(lm, encoder)
    model = FlamingoModel.from_backbones(encoder, lm)
    assert not lm.training and state_of(lm, encoder) != before
    model.train()
    model.unwrap()
    assert state_of(lm, encoder) == before


def test_a_failed_wrap_or_load_leaves_the_models_alone(tmp_path) -> None:
    lm, encoder = language_model("llama").train(), clip().train()
    del lm.config.image_token_id
    before = state_of(lm, encoder)
    with pytest.raises(ValueError, match="no image_token_id"):
        FlamingoModel.from_backbones(encoder, lm)
    assert state_of(lm, encoder) == before
    lm.config.image_token_id = IMAGE
    before = state_of(lm, encoder)
    with pytest.raises(ValueError, match=r"unknown kernel 'cudnn'"):
        FlamingoModel.from_backbones(encoder, lm, kernel="cudnn")
    assert state_of(lm, encoder) == before
    # A checkpoint with more embeddings, of a width that does not fit.
    wide = language_model("llama", vocab_size=120, hidden_size=64)
    saved = FlamingoModel.from_backbones(clip(), wide)
    wide.get_input_embeddings().weight.requires_grad_(True)
    saved.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"language_model.dim is 32, the config says 64"):
        FlamingoModel.from_pretrained(tmp_path, vision_encoder=encoder, language_model=lm)
    assert state_of(lm, encoder) == before
    assert torch.equal(
        lm.get_input_embeddings().weight, language_model("llama").model.embed_tokens.weight
    )


def test_the_default_config_is_the_papers() -> None:
    model = build()
    config = model.config
    assert config.cross_attention_blocks == (0, 1, 2)
    assert config.cross_attention.activation == "squared_relu" and config.cross_attention.media_norm
    assert (config.image_token_id, config.end_of_chunk_token_id) == (IMAGE, END_OF_CHUNK)
    assert (config.language.dim, config.vision.output_dim) == (DIM, 16)
    assert FlamingoConfig.from_dict(config.to_dict()) == config


def test_own_parts_are_taken_as_they_are() -> None:
    config = FlamingoConfig.from_name("tiny")
    parts = FlamingoModel(config)
    model = FlamingoModel.from_backbones(parts.vision_encoder, parts.language_model, config)
    assert isinstance(model.language_model, Decoder)
    assert model.unwrap() == (parts.vision_encoder, parts.language_model)


@pytest.mark.parametrize("kind", ["own decoder", "llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("change", ["into autocast", "out of autocast"])
def test_a_cache_crosses_autocast(kind: str, change: str) -> None:
    """Turns with and without a new image, and a generation; the text at once is the reference."""
    if kind == "own decoder":
        model, size = make_model(media_norm=True), 32
    else:
        model, size = build(kind), 16
    image = model.config.image_token_id

    def turn(seed: int, *images: int) -> tuple[Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 90, (2, 5), generator=generator)
        ids[:, list(images)] = image
        pixels = torch.randn(2, len(images), 1, 3, size, size, generator=generator)
        return ids, pixels if images else None

    turns = [turn(0, 1, 3), turn(1), turn(2, 0)]
    text, pixels = torch.cat([ids for ids, _ in turns], 1), torch.cat([turns[0][1], turns[2][1]], 1)
    with torch.no_grad():
        expected = model(text, pixels).logits
        with torch.autocast("cpu", torch.bfloat16, enabled=change == "out of autocast"):
            cache = model(*turns[0], use_cache=True).cache
        with torch.autocast("cpu", torch.bfloat16, enabled=change == "into autocast"):
            second = model(*turns[1], cache=cache)
            kept = second.cache.select_rows(torch.arange(2))
            third = model(*turns[2], cache=second.cache)
            assert model.generate(*turns[2], cache=kept, max_new_tokens=2).shape == (2, 7)
    logits = torch.cat((second.logits, third.logits), 1)
    assert_close_to_reference(logits, expected[:, 5:], torch.bfloat16)
