"""Models with int8 weights: logits, losses, casts and checkpoints are right, or say what to do."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_kernels import FlamingoModel
from flamingo_kernels.language import HuggingFaceLanguageModel, add_media_tokens
from testing.backbones import IMAGE, VOCAB, clip, language_model, open_gates, word_tokenizer
from testing.budgets import assert_close_to_reference

pytest.importorskip("transformers")


class Int8Parameter(nn.Parameter):
    """As that of bitsandbytes, which detaches to a plain int8 tensor."""


class Int8Linear(nn.Linear):
    """As that of bitsandbytes: another class, an int8 weight, and its scale beside it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def by_stand_in(module: nn.Module) -> None:
    for linear in module.modules():
        if type(linear) is nn.Linear:
            scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
            numbers = (linear.weight.detach() / scale).round().to(torch.int8)
            linear.__class__ = Int8Linear
            linear.weight = Int8Parameter(numbers, requires_grad=False)
            linear.register_buffer("scale", scale)


def by_torchao(module: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(module, quantization.Int8WeightOnlyConfig())


def dequantised(module: nn.Module) -> nn.Module:
    """Return a copy with the same numbers in floating point."""
    twin = copy.deepcopy(module)
    for linear in twin.modules():
        if not isinstance(linear, nn.Linear) or type(linear.weight) is nn.Parameter:
            continue
        if isinstance(linear, Int8Linear):
            linear.__class__ = nn.Linear
            weight = linear.weight * linear.scale
        else:
            weight = linear.weight.dequantize()
        linear.weight = nn.Parameter(weight.detach(), requires_grad=linear.weight.requires_grad)
    return twin


def build(quantise, part: str = "language_model") -> FlamingoModel:
    """Quantise one part, as it was loaded so, or the whole model for inference."""
    torch.manual_seed(4)
    lm, vision = language_model("llama"), clip()
    if part != "":
        quantise({"language_model": lm, "vision_encoder": vision}[part])
    model = open_gates(FlamingoModel.from_backbones(vision, lm)).eval()
    if part == "":
        quantise(model)
    return model


def arguments() -> dict[str, Tensor]:
    ids = torch.tensor([[3, IMAGE, 5, 6, 7], [IMAGE, 9, 3, 4, 8]])
    return {"input_ids": ids, "pixel_values": torch.randn(2, 1, 1, 3, 16, 16)}


@pytest.mark.parametrize("part", ["language_model", "vision_encoder", ""])
@pytest.mark.parametrize("quantise", [by_torchao, by_stand_in])
def test_int8_weights_are_the_numbers_that_they_stand_for(quantise, part: str) -> None:
    model, given = build(quantise, part), arguments()
    plain = dequantised(model)
    for wanted in (True, False):
        out = model(**given, labels=given["input_ids"], return_logits=wanted)
        expected = plain(**given, labels=given["input_ids"])
        assert_close_to_reference(out.loss, expected.loss, torch.float32)
    logits = model(**given).logits
    assert_close_to_reference(logits, expected.logits, torch.float32)
    assert torch.equal(model.generate(**given)[:, :6], plain.generate(**given)[:, :6])
    out.loss.backward()
    expected.loss.backward()
    latents = plain.perceiver.latents.grad
    assert_close_to_reference(model.perceiver.latents.grad, latents, torch.float32)


@pytest.mark.parametrize("part", ["language_model", ""])
@pytest.mark.parametrize("quantise", [by_torchao, by_stand_in])
def test_casts_leave_the_integers_alone(quantise, part: str) -> None:
    model, given = build(quantise, part), arguments()
    expected = dequantised(model).double()(**given).logits
    model.to(torch.float64)
    assert_close_to_reference(model(**given).logits, expected, torch.float32)


@pytest.mark.parametrize("quantise", [by_torchao, by_stand_in])
def test_checkpoints_of_a_bridge_to_an_int8_language_model(quantise, tmp_path) -> None:
    model, given = build(quantise), arguments()
    with pytest.raises(ValueError, match=r"cannot write \d+ parameters that are quantised, shar"):
        model.save_pretrained(tmp_path, include_frozen=True)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    vision, lm = model.unwrap()
    loaded = FlamingoModel.from_pretrained(tmp_path, vision_encoder=vision, language_model=lm)
    again = build(quantise)(**given).logits
    assert torch.equal(loaded(**given).logits, again)
    whole = build(quantise, "")
    with pytest.raises(ValueError, match="save the model as it was before, and quantise it"):
        whole.save_pretrained(tmp_path)


@pytest.mark.parametrize("quantise", [by_torchao, by_stand_in])
def test_media_tokens_come_before_quantising(quantise) -> None:
    lm = language_model("llama")
    quantise(lm)
    words = [f"w{i}" for i in range(VOCAB - 1)]
    with pytest.raises(ValueError, match=r"from 97 to 100 rows.*add_media_tokens before quantis"):
        add_media_tokens(word_tokenizer(*words), lm)
    assert lm.get_input_embeddings().weight.shape[0] == VOCAB


def test_how_weights_were_quantised_is_no_option_of_the_architecture() -> None:
    lm = language_model("llama")
    lm.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert "quantization_config" not in HuggingFaceLanguageModel(lm).config.options
