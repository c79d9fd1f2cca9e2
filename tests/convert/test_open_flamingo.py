"""OpenFlamingo 2.0.1's own model, converted: same logits, same tokens."""

from __future__ import annotations

import copy
import logging
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from flamingo_kernels import FlamingoModel
from flamingo_kernels.convert import load_open_flamingo, to_open_flamingo
from flamingo_kernels.language.huggingface.cache import cache_name, returned_cache
from testing.backbones import END_OF_CHUNK, IMAGE, VOCAB, clip, language_model, state_of
from testing.budgets import assert_close_to_reference, assert_parity
from testing.originals import open_flamingo, released
from testing.peers import open_clip_tower, open_flamingo_model

pytest.importorskip("einops_exts")
CASES = [("gpt_neox", 1), ("gpt_neox", 2), ("mpt", 1), ("mpt", 3)]


def prompt(*, text_first: bool = True) -> dict[str, Tensor]:
    """Left padding, text before the first image, several images per row."""
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(3, 90, (2, 12), generator=generator)
    ids[0, :4] = 0
    ids[0, [6, 9]] = IMAGE
    ids[1, [2 if text_first else 0, 7]] = IMAGE
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    pixels = torch.randn(2, 2, 1, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def theirs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"input_ids": "lang_x", "pixel_values": "vision_x"}
    return {names.get(name, name): tensor for name, tensor in batch.items()}


@pytest.mark.parametrize(("model_type", "every"), CASES)
def test_parity(model_type: str, every: int, caplog) -> None:
    peer = open_flamingo(model_type, every)
    state = released(peer)
    with caplog.at_level(logging.INFO, "flamingo_kernels"):
        model = load_open_flamingo(state, clip(), language_model(model_type))
    assert len(caplog.messages) == 1
    assert caplog.messages[0] == f"{len(state)} tensors used"
    batch = prompt()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        ours = model(**batch).logits
        assert_parity(ours[real], peer(**theirs(batch)).logits[real])
        blind = model(**{**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}).logits
    assert (blind - ours)[real].abs().max() > 100 * 1e-4  # the images matter


class TwoTowers(nn.Module):
    """As ``CLIP`` of open_clip: the text tower is not read."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual


@pytest.mark.skipif(find_spec("open_clip") is None, reason="needs open-clip-torch")
@pytest.mark.parametrize("given", ["tower", "two towers"])
def test_parity_over_a_tower_of_open_clip(given: str, tmp_path) -> None:
    """Pixels to logits; all patches are read, before and after saving."""
    peer = open_flamingo("mpt", 1, TwoTowers(open_clip_tower()))
    tower = open_clip_tower() if given == "tower" else TwoTowers(open_clip_tower())
    model = load_open_flamingo(released(peer), tower, language_model("mpt"))
    assert (model.vision_encoder.image_size, model.vision_encoder.output_dim) == (16, 16)
    model.save_pretrained(tmp_path)
    parts = {"vision_encoder": tower, "language_model": language_model("mpt")}
    batch = prompt()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = peer(**theirs(batch)).logits[real]
        changed = dict(batch, pixel_values=batch["pixel_values"].clone())
        changed["pixel_values"][..., :8, :8] += 1  # the first patch
        assert (peer(**theirs(changed)).logits[real] - expected).abs().max() > 1e-2
        for ours in (model, FlamingoModel.from_pretrained(tmp_path, **parts).eval()):
            assert_parity(ours(**batch).logits[real], expected)
            assert ours.vision_encoder(batch["pixel_values"][0, 0]).shape == (1, 4, 16)
    assert model.unwrap()[0] is tower


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(("model_type", "every"), CASES)
def test_same_tokens(model_type: str, every: int, num_beams: int) -> None:
    peer = open_flamingo(model_type, every)
    model = load_open_flamingo(released(peer), clip(), language_model(model_type))
    batch, new = prompt(), 8
    expected = peer.generate(
        **theirs(batch),
        max_new_tokens=new,
        num_beams=num_beams,
        do_sample=False,
        suppress_tokens=[IMAGE],
        pad_token_id=0,
    )
    options = {"num_beams": num_beams} if num_beams > 1 else {}
    ours = model.generate(**batch, max_new_tokens=new, stop_token_ids=[END_OF_CHUNK], **options)
    assert torch.equal(ours, expected)


def test_more_markers_than_images_is_where_we_differ() -> None:
    """OpenFlamingo spreads such text over all images (semantics, point 3); here it is an error."""
    peer = open_flamingo("gpt_neox", 1)
    model = load_open_flamingo(released(peer), clip(), language_model("gpt_neox"))
    batch = prompt()
    fewer = {**batch, "pixel_values": batch["pixel_values"][:, :1]}
    with torch.no_grad():
        one = peer(**theirs(fewer)).logits
        other = {**fewer, "pixel_values": fewer["pixel_values"] + 1}
        last = one - peer(**theirs(other)).logits
    assert last[1, 8:].abs().max() > 1e-3  # text after the second marker sees the first image
    with pytest.raises(ValueError, match=r"row 0 has 2 <image> token\(s\) but 1 image\(s\)"):
        model(**fewer)


def test_a_step_by_step_marker_is_where_the_original_differs() -> None:
    """OpenFlamingo counts markers anew in each chunk that has one; here they are counted once."""
    peer = open_flamingo("gpt_neox", 1)
    model = load_open_flamingo(released(peer), clip(), language_model("gpt_neox"))
    batch = prompt(text_first=False)
    ids, pixels = batch["input_ids"][1:], batch["pixel_values"][1:]
    with torch.no_grad():
        whole = model(ids, pixels).logits
        first = model(ids[:, :7], pixels[:, :1], use_cache=True)
        second = model(ids[:, 7:], pixels[:, 1:], cache=first.cache).logits
        assert_parity(second, whole[:, 7:])
        peer.lang_encoder._use_cached_vision_x = True
        peer._encode_vision_x(pixels)
        start = peer.lang_encoder(input_ids=ids[:, :7], attention_mask=None, use_cache=True)
        cached = {cache_name(language_model("mpt")): returned_cache(start)}
        rest = peer.lang_encoder(input_ids=ids[:, 7:], attention_mask=None, **cached).logits
    assert (rest - whole[:, 7:]).abs().max() > 1e-2


@pytest.mark.parametrize("wrap", ["module", "nested", "live", "file"])
def test_every_form_of_a_checkpoint(wrap: str, tmp_path) -> None:
    peer = open_flamingo("mpt", 1)
    state = released(peer)
    expected = load_open_flamingo(state, clip(), language_model("mpt"))(**prompt()).logits
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    source = {
        "module": prefixed,
        "nested": {"epoch": 3, "model_state_dict": prefixed, "lr_scheduler_state_dict": {}},
        "live": peer.state_dict(),
        "file": tmp_path / "checkpoint.pt",
    }[wrap]
    torch.save({"model_state_dict": prefixed}, tmp_path / "checkpoint.pt")
    model = load_open_flamingo(source, clip(), language_model("mpt"))
    assert torch.equal(model(**prompt()).logits, expected)


@pytest.mark.parametrize(("model_type", "every"), CASES)
def test_there_and_back(model_type: str, every: int) -> None:
    peer = open_flamingo(model_type, every)
    state = released(peer)
    back = to_open_flamingo(load_open_flamingo(state, clip(), language_model(model_type)))
    if model_type == "gpt_neox":  # by its name in this transformers
        output = state.pop("lang_encoder.embed_out.weight")
        names = [name for name, _ in language_model(model_type).named_modules()]
        state[f"lang_encoder.{'lm_head' if 'lm_head' in names else 'embed_out'}.weight"] = output
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    fresh = open_flamingo_model(clip(), language_model(model_type), every, IMAGE, END_OF_CHUNK)
    assert not fresh.load_state_dict(back, strict=False).unexpected_keys
    with torch.no_grad():
        logits = fresh(**theirs(prompt())).logits
        assert torch.equal(logits, peer(**theirs(prompt())).logits)


@pytest.mark.parametrize(("model_type", "every"), [("gpt_neox", 1), ("mpt", 1)])
def test_trained_rows_of_new_tokens_go_back(model_type: str, every: int) -> None:
    state = released(open_flamingo(model_type, every))
    model = load_open_flamingo(state, clip(), language_model(model_type))
    assert model.config.new_token_ids == (IMAGE, END_OF_CHUNK)
    with torch.no_grad():
        for rows in model.new_tokens.parameters():
            rows += torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
        peer = open_flamingo_model(clip(), language_model(model_type), every, IMAGE, END_OF_CHUNK)
        back = to_open_flamingo(model)
        assert not peer.load_state_dict(back, strict=False).unexpected_keys
        batch, real = prompt(), prompt()["attention_mask"].bool()
        assert_parity(model(**batch).logits[real], peer(**theirs(batch)).logits[real])
    again = load_open_flamingo(back, clip(), language_model(model_type))
    for name, rows in model.new_tokens.named_parameters():
        assert torch.equal(again.new_tokens.get_parameter(name), rows)


def test_embeddings_come_along_when_saved(tmp_path) -> None:
    """The checkpoint's embeddings are those of new tokens; the base model does not have them."""
    peer = open_flamingo("gpt_neox", 1)
    state = released(peer)
    name = "lang_encoder.gpt_neox.embed_in.weight"
    state[name] = state[name] + 0.5
    model = load_open_flamingo(state, clip(), language_model("gpt_neox"))
    expected = model(**prompt()).logits
    for step in ("one", "two"):
        model.save_pretrained(tmp_path / step)
        parts = {"vision_encoder": clip(), "language_model": language_model("gpt_neox")}
        model = FlamingoModel.from_pretrained(tmp_path / step, **parts).eval()
        assert torch.equal(model(**prompt()).logits, expected)


@pytest.mark.parametrize("model_type", ["gpt_neox", "mpt"])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_a_given_language_model_keeps_its_dtype(saved, model_type: str, tmp_path) -> None:
    """The embeddings in the file are of another dtype than the model they are put into."""
    other = torch.bfloat16 if saved == torch.float32 else torch.float32
    state = released(open_flamingo(model_type, 1))
    model = load_open_flamingo(state, clip(), language_model(model_type).to(saved))
    model.save_pretrained(tmp_path)
    lm = language_model(model_type).to(other)
    parts = {"vision_encoder": clip(), "language_model": lm}
    loaded = FlamingoModel.from_pretrained(tmp_path, **parts).eval()
    assert {p.dtype for p in lm.parameters()} == {other}
    assert {p.dtype for p in loaded.perceiver.parameters()} == {torch.float32}
    expected = load_open_flamingo(state, clip(), language_model(model_type).to(saved).to(other))
    embeddings = lm.get_input_embeddings().weight
    assert torch.equal(
        embeddings, model.language_model.model.get_input_embeddings().weight.to(other)
    )
    with torch.no_grad():
        logits = loaded(**prompt()).logits
        assert logits.dtype == other
        real = prompt()["attention_mask"].bool()
        exact = expected(**prompt()).logits
        assert_close_to_reference(logits[real], exact[real], torch.bfloat16)


@pytest.mark.parametrize("model_type", ["gpt_neox", "mpt"])
@pytest.mark.parametrize("rows", [90, 128])
def test_embeddings_take_the_checkpoints_rows(model_type: str, rows: int, tmp_path) -> None:
    """Of a model without the new tokens, or with rows to spare; when saved and loaded too."""
    peer = open_flamingo(model_type, 1)

    def published() -> nn.Module:
        lm = language_model(model_type)
        lm.resize_token_embeddings(rows, mean_resizing=False)
        return lm

    model = load_open_flamingo(released(peer), clip(), published())
    model.save_pretrained(tmp_path)
    parts = {"vision_encoder": clip(), "language_model": published()}
    loaded = FlamingoModel.from_pretrained(tmp_path, **parts).eval()
    real = prompt()["attention_mask"].bool()
    with torch.no_grad():
        expected = peer(**theirs(prompt())).logits[real]
        for ours in (model, loaded):
            logits = ours(**prompt()).logits
            assert logits.shape[-1] == 97
            assert_parity(logits[real], expected)


def test_bad_checkpoints() -> None:
    state = released(open_flamingo("gpt_neox", 1))

    def load(state, lm: str = "gpt_neox", tower=clip, **options) -> FlamingoModel:
        return load_open_flamingo(state, tower(), language_model(lm, **options))

    with pytest.raises(ValueError, match=r"not an OpenFlamingo v2 checkpoint: extra\.weight not"):
        load({**state, "extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"checkpoint: lang_encoder\.head\.weight not in its layo"):
        load({**state, "lang_encoder.head.weight": torch.zeros(1)})
    gate = "lang_encoder.gpt_neox.layers.1.gated_cross_attn_layer.ff_gate"
    with pytest.raises(ValueError, match=r"gated_cross_attn_layers\.1\.ff_gate missing"):
        load({name: t for name, t in state.items() if name != gate})
    with pytest.raises(ValueError, match=r"ff_gate \(2,\) instead of \(1,\) of another shape"):
        load({**state, gate: torch.zeros(2)})
    with pytest.raises(ValueError, match="other backbones: the language model is 64 wide, not 32"):
        load(state, hidden_size=64)
    with pytest.raises(ValueError, match="has 2 blocks, not more than 2"):
        load(state, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"its blocks are 'model.layers', not 'gpt_neox.layers'"):
        load(state, "llama")
    with pytest.raises(ValueError, match="the vision encoder gives 8 channels, not 16"):
        load_open_flamingo(state, 8, language_model("gpt_neox"))
    norm = "lang_encoder.gpt_neox.layers.0.gated_cross_attn_layer.attn.norm.weight"
    with pytest.raises(ValueError, match=r"attn\.norm\.weight has shape \(\), 1 dimension"):
        load({**state, norm: torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"perceiver\.latents has shape \(3,\), 2 dimension"):
        load({**state, "perceiver.latents": torch.ones(3)})
    embeddings = "lang_encoder.gpt_neox.embed_in.weight"
    with pytest.raises(ValueError, match=r"embed_in\.weight has shape \(\), some dimension"):
        load({**state, embeddings: torch.tensor(1.0)})
    again = state["lang_encoder.embed_out.weight"]
    with pytest.raises(
        ValueError, match=r"keys for one tensor: lang_encoder|lm_head\.weight not in"
    ):
        load({**state, "lang_encoder.lm_head.weight": again})
    with pytest.raises(
        ValueError, match=r"floating-point tensors: perceiver\.latents \(torch\.int8"
    ):
        load({**state, "perceiver.latents": state["perceiver.latents"].to(torch.int8)})
    with pytest.raises(ValueError, match="no cross-attention keys"):
        load({"perceiver.latents": torch.zeros(2, 2)})
    without = copy.deepcopy(language_model("gpt_neox"))
    del without.config.image_token_id
    with pytest.raises(ValueError, match="has no image_token_id"):
        load_open_flamingo(state, clip(), without)
    model = load_open_flamingo(state, clip(), without, image_token_id=IMAGE)
    assert model.config.image_token_id == IMAGE


@pytest.mark.parametrize("model_type", ["gpt_neox", "mpt"])
def test_a_failed_load_leaves_the_backbones_alone(model_type: str) -> None:
    """It has the embeddings of other tokens, and lacks a tensor."""
    state = released(open_flamingo(model_type, 1))
    state = {name: t[:90] if t.shape[:1] == (VOCAB,) else t for name, t in state.items()}
    gate = next(name for name in state if name.endswith("attn_gate"))
    del state[gate]
    lm, encoder = language_model(model_type).train(), clip().train()
    before, weights = state_of(lm, encoder), copy.deepcopy(lm.state_dict())
    with pytest.raises(ValueError, match=r"attn_gate.* missing"):
        load_open_flamingo(state, encoder, lm, image_token_id=80, end_of_chunk_token_id=81)
    assert state_of(lm, encoder) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in lm.state_dict().items())


def test_what_open_flamingo_cannot_express() -> None:
    model = FlamingoModel.from_backbones(clip(), language_model("gpt_neox"))
    with pytest.raises(ValueError, match=r"OpenFlamingo has no .*activation='squared_relu' \(it"):
        to_open_flamingo(model)
