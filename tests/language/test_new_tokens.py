"""Trained rows of new tokens: against a copy whose embeddings hold them, and what stays frozen."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from flamingo_kernels import FlamingoConfig, FlamingoModel
from flamingo_kernels.language import NewTokenRows, add_media_tokens
from flamingo_kernels.model import loss as losses
from testing.backbones import (
    DIM,
    END_OF_CHUNK,
    IMAGE,
    LANGUAGE_OPTIONS,
    VOCAB,
    language_model,
    open_gates,
    word_tokenizer,
)
from testing.budgets import assert_close_to_reference

NEW = (IMAGE, END_OF_CHUNK)
IDS = torch.tensor(
    [[1, IMAGE, 7, 8, END_OF_CHUNK, 9], [END_OF_CHUNK, 5, IMAGE, 6, END_OF_CHUNK, 4]]
)
ENCODED = torch.randn(2, 1, 1, 5, 16, dtype=torch.float64)


def flamingo(lm: nn.Module) -> FlamingoModel:
    lm.config.new_token_ids = NEW
    return open_gates(FlamingoModel.from_backbones(16, lm, kernel="torch").double())


def move_rows(model: FlamingoModel) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.new_tokens.parameters():
            parameter += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def with_rows_inside(lm: nn.Module, model: FlamingoModel) -> FlamingoModel:
    """Return the same model with the rows in the embeddings of its language model."""
    lm = copy.deepcopy(lm)
    rows = model.new_tokens
    tied = lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
    assert tied == (rows.head is None)
    with torch.no_grad():
        lm.get_input_embeddings().weight[list(NEW)] = rows.embedding
        if not tied:
            lm.get_output_embeddings().weight[list(NEW)] = rows.head
        if rows.head_bias is not None:
            lm.get_output_embeddings().bias[list(NEW)] = rows.head_bias
    lm.config.new_token_ids = ()
    plain = open_gates(FlamingoModel.from_backbones(16, lm, kernel="torch").double())
    bridge = {n: t for n, t in model.state_dict().items() if not n.startswith("language_model.")}
    plain.load_state_dict(bridge, strict=False)
    for layer in (lm.get_input_embeddings(), lm.get_output_embeddings()):
        layer.requires_grad_(True)
    return plain


def gradients_in_embeddings(model: FlamingoModel) -> dict[str, Tensor]:
    lm = model.language_model.model
    found = {"embedding": lm.get_input_embeddings().weight.grad}
    if lm.get_output_embeddings().weight is not lm.get_input_embeddings().weight:
        found["head"] = lm.get_output_embeddings().weight.grad
    if getattr(lm.get_output_embeddings(), "bias", None) is not None:
        found["head_bias"] = lm.get_output_embeddings().bias.grad
    return {name: gradient[list(NEW)] for name, gradient in found.items()}


@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", LANGUAGE_OPTIONS)
def test_rows_as_if_they_were_in_the_embeddings(
    model_type: str, tied: bool, return_logits: bool
) -> None:
    lm = language_model(model_type, tie_word_embeddings=tied).double()
    untouched = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    model = flamingo(lm)
    move_rows(model)
    plain = with_rows_inside(lm, model)
    outputs = [m(IDS, ENCODED, labels=IDS, return_logits=return_logits) for m in (model, plain)]
    if return_logits:
        assert_close_to_reference(outputs[0].logits, outputs[1].logits, torch.float64)
    assert_close_to_reference(outputs[0].loss, outputs[1].loss, torch.float64)
    for out in outputs:
        out.loss.backward()
    for name, expected in gradients_in_embeddings(plain).items():
        actual = getattr(model.new_tokens, name).grad
        assert actual.abs().max() > 0
        assert_close_to_reference(
            actual, expected, torch.float64, terms=expected.abs().max().item()
        )
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in lm.state_dict().items())
    assert not any(p.requires_grad for p in lm.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", LANGUAGE_OPTIONS)
def test_untrained_rows_change_no_bit(model_type: str, dtype: torch.dtype) -> None:
    lm = language_model(model_type).to(dtype)
    expected = lm(IDS).logits
    lm.config.new_token_ids = NEW
    model = FlamingoModel.from_backbones(16, lm)
    assert model.new_tokens.embedding.dtype == torch.float32
    assert torch.equal(model(IDS, ENCODED.to(dtype)).logits, expected)
    assert torch.equal(lm(IDS).logits, expected)


def test_the_loss_in_chunks_and_at_once(monkeypatch) -> None:
    lm = language_model("phi").double()  # its product has a bias
    model = flamingo(lm)
    move_rows(model)
    found = []
    for in_chunks in (losses._IN_CHUNKS, False):
        monkeypatch.setattr(losses, "_IN_CHUNKS", in_chunks)
        found.append(model(IDS, ENCODED, labels=IDS, return_logits=False).loss)
    assert_close_to_reference(found[0], found[1], torch.float64)


def decoder_pair() -> tuple[FlamingoModel, FlamingoModel]:
    """Return a model of the package's own decoder with moved rows, and one with them inside."""
    config = dataclasses.replace(FlamingoConfig.from_name("tiny"), new_token_ids=(70, 256))
    torch.manual_seed(0)
    model = open_gates(FlamingoModel(config, kernel="torch").double())
    move_rows(model)
    plain = FlamingoModel(dataclasses.replace(config, new_token_ids=()), kernel="torch").double()
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        weight = plain.language_model.token_embedding.weight
        weight[[70, 256]] = model.new_tokens.embedding
    return model.eval(), plain.eval()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("own", [True, False])
def test_decoding_reads_the_rows(own: bool, num_beams: int, use_cache: bool) -> None:
    if own:
        model, plain = decoder_pair()
        ids = torch.tensor([[model.config.image_token_id, 70], [70, model.config.image_token_id]])
        media = torch.randn(2, 1, 1, 3, 32, 32, dtype=torch.float64)
    else:
        lm = language_model("llama", tie_word_embeddings=False).double()
        model = flamingo(lm).eval()
        move_rows(model)
        plain, ids, media = with_rows_inside(lm, model).eval(), IDS[:, :3], ENCODED
    options = {"max_new_tokens": 8, "use_cache": use_cache, "num_beams": num_beams}
    said = [one.generate(ids, media, stop_token_ids=[], **options) for one in (model, plain)]
    assert torch.equal(*said)
    scores = [one.score_answers(ids, [[3, 70], [END_OF_CHUNK]], media) for one in (model, plain)]
    assert_close_to_reference(scores[0], scores[1], torch.float32)


def test_the_end_of_a_caption_is_learned() -> None:
    """Frozen rows that are the mean of the others can never be said (the most likely token)."""
    tokenizer = word_tokenizer("<s>", "</s>", "a", "red", "cat", *(f"w{i}" for i in range(60)))
    lm = language_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=True)
    lm.config.bos_token_id, lm.config.eos_token_id = 1, 2
    tokens = add_media_tokens(tokenizer, lm)
    assert lm.config.new_token_ids == [tokens.end_of_chunk_token_id, tokens.image_token_id]
    frozen = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    torch.manual_seed(0)
    model = FlamingoModel.from_backbones(16, lm)
    ids = torch.tensor([tokenizer.encode("<s> <image> a red cat <|endofchunk|> </s>")])
    images = torch.randn(1, 1, 1, 9, 16)
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), lr=1e-2)
    for _ in range(60):
        loss = model(ids, images, labels=ids, return_logits=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    said = model.eval().generate(ids[:, :2], images, max_new_tokens=10)
    assert tokenizer.decode(said[0, 2:]).split() == ["a", "red", "cat", "<|endofchunk|>"]
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in lm.state_dict().items())


def test_which_tokens_are_new() -> None:
    def new(tokenizer: object, lm: nn.Module, **names: str) -> list[int]:
        add_media_tokens(tokenizer, lm, **names)
        return lm.config.new_token_ids

    known = {"image_token": "<pic>", "end_of_chunk_token": "</s>"}
    tokenizer = word_tokenizer("a", "</s>")
    assert new(tokenizer, language_model("llama"), **known) == [3]  # rows to spare; </s> is known
    small = language_model("llama", vocab_size=3)
    assert new(tokenizer, small, **known) == [3] == new(tokenizer, small, **known)
    own = word_tokenizer("a", "<image>", "<|endofchunk|>")
    assert new(own, language_model("llama")) == [2, 3]
    assert new(own, language_model("llama")) == [2, 3]


def test_ids_that_were_set_by_hand() -> None:
    """Both media tokens are new, but for one that the model has learned as something else."""

    def trained(**ids: object) -> tuple[int, ...]:
        lm = language_model("llama")
        for name, value in ids.items():
            setattr(lm.config, name, value)
        return FlamingoModel.from_backbones(16, lm).config.new_token_ids

    assert trained() == NEW
    assert trained(eos_token_id=[2, END_OF_CHUNK]) == (IMAGE,)
    assert trained(new_token_ids=[]) == ()
    assert trained(new_token_ids=[END_OF_CHUNK]) == (END_OF_CHUNK,)


@pytest.mark.parametrize("resized_before", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "phi", "gpt_neox"])
def test_saved_with_the_rest_and_loaded_into_a_base_that_lacks_them(
    model_type: str, tied: bool, resized_before: bool, tmp_path
) -> None:
    """A resize puts other modules in the place of untied output products."""
    lm = language_model(model_type, vocab_size=3, tie_word_embeddings=tied)
    add_media_tokens(word_tokenizer("a", "cat"), lm)
    model = open_gates(FlamingoModel.from_backbones(16, lm)).eval()
    with torch.no_grad():
        for rows in model.new_tokens.parameters():
            rows += 1
    ids, images = torch.tensor([[1, 4, 2, 3]]), torch.randn(1, 1, 1, 5, 16)
    expected = model(ids, images, labels=ids)
    model.save_pretrained(tmp_path)
    base = language_model(model_type, vocab_size=3, tie_word_embeddings=tied)
    if resized_before:
        add_media_tokens(word_tokenizer("a", "cat"), base)
    loaded = FlamingoModel.from_pretrained(tmp_path, language_model=base).eval()
    assert torch.equal(loaded(ids, images).logits, expected.logits)
    said = [one.generate(ids[:, :2], images, max_new_tokens=4) for one in (model, loaded)]
    assert torch.equal(*said)
    losses_of = [one(ids, images, labels=ids, return_logits=False).loss for one in (model, loaded)]
    assert torch.equal(*losses_of)
    losses_of[1].backward()
    for name, rows in loaded.new_tokens.named_parameters():
        assert rows.grad.abs().max() > 0, name
    hooks = len(base.get_output_embeddings()._forward_hooks)
    loaded.unwrap()
    assert hooks and not base.get_output_embeddings()._forward_hooks


def test_a_resize_after_wrapping_keeps_the_rows(tmp_path) -> None:
    lm = language_model("llama", tie_word_embeddings=False).double()
    model = flamingo(lm).eval()
    move_rows(model)
    expected = model(IDS, ENCODED).logits
    lm.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    assert_close_to_reference(model(IDS, ENCODED).logits[..., :VOCAB], expected, torch.float64)


def test_a_whole_model_and_another_base(tmp_path) -> None:
    lm = language_model("llama", vocab_size=3)
    add_media_tokens(word_tokenizer("a", "cat"), lm)
    model = open_gates(FlamingoModel.from_backbones(16, lm)).eval()
    ids, images = torch.tensor([[1, 4, 2, 3]]), torch.randn(1, 1, 1, 5, 16)
    expected = model(ids, images).logits
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 2 embeddings, .* with 6: call add_media_tokens"):
        wrong = language_model("llama", vocab_size=2, pad_token_id=None)
        FlamingoModel.from_pretrained(tmp_path, language_model=wrong)
    whole = tmp_path / "whole"
    model.save_pretrained(whole, include_frozen=True)
    assert torch.equal(FlamingoModel.from_pretrained(whole).eval()(ids, images).logits, expected)


def test_what_cannot_train_rows_says_so() -> None:
    lm = language_model("llama")
    config = FlamingoModel.from_backbones(16, lm).config
    with pytest.raises(ValueError, match=r"distinct ids of the vocabulary 0..96, got \[5, 5\]"):
        dataclasses.replace(config, new_token_ids=(5, 5))

    class Embedding(nn.Module):
        weight = nn.Parameter(torch.zeros(VOCAB, DIM))

    with pytest.raises(ValueError, match=r"are Embedding, not nn\.Embedding; leave these rows"):
        NewTokenRows(NEW, Embedding(), nn.Linear(DIM, VOCAB))
