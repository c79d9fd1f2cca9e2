"""Adapters of PEFT in the bridge, and language models inside those of PEFT or compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flamingo_kernels import FlamingoModel
from flamingo_kernels.language import HuggingFaceLanguageModel
from testing.backbones import IMAGE, clip, language_model, open_gates
from testing.budgets import assert_close_to_reference
from testing.tiny_model import make_model, ragged_batch

peft = pytest.importorskip("peft")
LN, LORA = peft.LNTuningConfig, peft.LoraConfig
ADAPTERS = {
    "norm_media": LN(target_modules=["norm_media"]),
    "all norms of the bridge": LN(
        target_modules=r".*(attn\.norm|norm_media|norm_latents|ff\.0|layers\.\d+\.1\.0)"
    ),
    "norms of the blocks": LN(target_modules=["attention_norm"]),
    "products of the bridge": LORA(r=2, target_modules=["to_kv", "to_out", "ff.1", "ff.3"]),
}


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=list(ADAPTERS))
def test_adapters_change_nothing_at_first_and_are_trained(adapter) -> None:
    arguments = ragged_batch().arguments()
    expected = make_model()(**arguments, labels=arguments["input_ids"]).loss
    model = peft.get_peft_model(make_model(), adapter)
    for wanted in (True, False):
        model.zero_grad()
        out = model(**arguments, labels=arguments["input_ids"], return_logits=wanted)
        assert_close_to_reference(out.loss, expected, torch.float32)
        out.loss.backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        first = {name for name in trained if "lora_A" in name}  # behind a product of zeros
        assert trained and all(trained[name].any() for name in trained.keys() - first)


def adapted(*modules: str) -> nn.Module:
    options, lm = (
        LORA(r=2, target_modules=list(modules), init_lora_weights=False),
        language_model("llama"),
    )
    torch.manual_seed(9)
    return peft.get_peft_model(lm, options)


def wrap(lm: nn.Module) -> FlamingoModel:
    torch.manual_seed(4)
    return open_gates(FlamingoModel.from_backbones(clip(), lm)).eval()


def arguments() -> dict[str, Tensor]:
    ids = torch.tensor([[3, IMAGE, 5, 6, 7], [IMAGE, 9, 3, 4, 8]])
    pixels = torch.randn(2, 1, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "pixel_values": pixels}


def assert_same(model: FlamingoModel, plain: FlamingoModel) -> None:
    given = arguments()
    for wanted in (True, False):
        losses = [
            part(**given, labels=given["input_ids"], return_logits=wanted).loss
            for part in (model, plain)
        ]
        assert_close_to_reference(*losses, torch.float32)
    for options in ({}, {"num_beams": 2}):
        expected = plain.generate(**given, **options, max_new_tokens=3)
        assert torch.equal(model.generate(**given, **options, max_new_tokens=3), expected)
    with torch.no_grad():
        caches = [part(**given, use_cache=True).cache for part in (model, plain)]
        logits = [
            part(given["input_ids"].clamp(max=90), cache=cache).logits
            for part, cache in zip((model, plain), caches, strict=True)
        ]
    assert_close_to_reference(*logits, torch.float32)


@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), ("down_proj", "lm_head")])
def test_a_language_model_with_adapters(modules: tuple[str, ...], tmp_path: Path) -> None:
    lm = adapted(*modules)
    model, merged = wrap(lm), wrap(adapted(*modules).merge_and_unload())
    assert_same(model, merged)
    assert len(model.language_model.blocks) == model.config.language.depth
    for name, parameter in model.language_model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    given = arguments()
    model(**given, labels=given["input_ids"], return_logits=False).loss.backward()
    trained = {n: p for n, p in model.trainable_parameters().items() if "lora_" in n}
    assert trained and all(p.grad.any() for p in trained.values())
    for parameter in trained.values():
        parameter.data += 0.01
    model.save_pretrained(tmp_path)
    frozen = {"vision_encoder": clip(), "language_model": adapted(*modules)}
    loaded = FlamingoModel.from_pretrained(tmp_path, **frozen)
    assert torch.equal(loaded(**given).logits, model(**given).logits)
    assert model.unwrap()[1] is lm


def test_adapters_that_are_put_in_afterwards() -> None:
    model = wrap(language_model("llama"))
    options = LORA(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(9)
    model.language_model.model = peft.get_peft_model(model.language_model.model, options)
    assert_same(model, wrap(adapted("q_proj").merge_and_unload()))
    model.gradient_checkpointing_enable()


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused(kind: str) -> None:
    options = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    lm = peft.get_peft_model(language_model("llama"), options)
    with pytest.raises(ValueError, match=f"PEFT model with {kind}: its virtual tokens would shift"):
        HuggingFaceLanguageModel(lm)


def _whole(lm: nn.Module) -> nn.Module:
    return torch.compile(lm, backend="eager")


def _blocks(lm: nn.Module) -> nn.Module:
    for index, block in enumerate(lm.model.layers):
        lm.model.layers[index] = torch.compile(block, backend="eager")
    return lm


def _around_adapters(lm: nn.Module) -> nn.Module:
    options = LORA(r=2, target_modules=["q_proj"])
    return torch.compile(peft.get_peft_model(lm, options), backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [_whole, _blocks, _around_adapters])
def test_a_compiled_language_model(compiled: Callable[[nn.Module], nn.Module]) -> None:
    torch.compiler.reset()
    lm = compiled(language_model("llama"))
    model, plain, given = wrap(lm), wrap(language_model("llama")), arguments()
    with torch.no_grad():
        for pixels in (given["pixel_values"], 2 * given["pixel_values"]):
            logits = [part(given["input_ids"], pixels).logits for part in (model, plain)]
            assert_close_to_reference(*logits, torch.float32)
    assert model.unwrap()[1] is lm


def test_a_compiled_language_model_is_wrapped() -> None:
    wrapped = HuggingFaceLanguageModel(torch.compile(language_model("llama"), backend="eager"))
    assert wrapped.num_blocks == len(wrapped.blocks) == wrapped.config.depth
